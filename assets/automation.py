"""What runs by itself: the watch over the experiment files, a schedule per experiment, 'continue until'.

What launches runs is off until somebody switches it on. ``config_watch`` is on: it tells Dagster what is there.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import dagster as dg
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.scheduler.instigation import ScheduleInstigatorData
from dagster._core.storage.tags import PARTITION_NAME_TAG
from evolve_dag.assets import partitions, recovery, switches
from evolve_dag.assets.loop import loop_assets
from evolve_dag.assets.resources import PASSING, StoreResource
from evolve_dag.assets.settings import CONFIGURED_STEPS, settings_assets, settings_key, settings_metadata

from evolve_dag.config import registry, scheduling
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import ConfigError, EvolveError
from evolve_dag.steps.base import resolve, settings_digest
from evolve_dag.store.artifacts import Store
from evolve_dag.store.mirror import open_store

UNTIL_TAG = "evolve/until"
"""Run tag: after this run succeeds, go on with the next iteration, up to the one named here."""
SCHEDULE_TAG = "evolve/schedule"
"""Run tag: the schedule that asked for the run."""

iteration_job = dg.define_asset_job(
    "iteration",
    selection=dg.AssetSelection.assets(*loop_assets),
    description="One iteration of one experiment. Tag it `evolve/until=K` and switch `continue_until` on to go on up to K.",
)
settings_job = dg.define_asset_job(
    "experiment_config",
    selection=dg.AssetSelection.assets(*settings_assets),
    description="Record the config slices of one experiment.",
)


def settings_events(instance: dg.DagsterInstance, experiment: Experiment, store: Store) -> Iterator[dg.AssetMaterialization]:
    """Config slices whose data version differs from what Dagster has last heard of."""
    for step in CONFIGURED_STEPS:
        version = settings_digest(step, experiment, store)
        if recorded_version(instance, settings_key(step), experiment.experiment) != version:
            yield dg.AssetMaterialization(
                settings_key(step),
                partition=experiment.experiment,
                tags={"dagster/data_version": version},
                metadata=settings_metadata(step, experiment),
            )


def recorded_version(instance: dg.DagsterInstance, key: dg.AssetKey, partition: str) -> str | None:
    """Data version of the latest materialization of a partition; None when there is none."""
    record = instance.get_latest_data_version_record(key, is_source=False, partition_key=partition)
    return (record.event_log_entry.tags or {}).get("dagster/data_version") if record is not None else None


def known_experiments(root: Path) -> tuple[list[Experiment], list[str]]:
    """Experiments of the configs folder and of the store, and what is wrong with the others."""
    return _known(root, *registry.scan(registry.configs_folder()))


def _known(
    root: Path, found: Mapping[registry.Entry, Experiment], mistakes: Sequence[ConfigError]
) -> tuple[list[Experiment], list[str]]:
    problems = [mistake.what for mistake in mistakes]
    experiments: dict[str, Experiment] = {}
    for entry in registry.resolved(root, found).values():
        try:
            experiments[entry.name] = found[entry] if entry in found else entry.load()
        except EvolveError as error:
            problems.append(error.what)
    return list(experiments.values()), sorted(set(problems))


@dg.sensor(
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Reads the experiment files: adds their partitions, and reports config slices that have changed.",
)
def config_watch(context: dg.SensorEvaluationContext, store: StoreResource) -> dg.SensorResult | dg.SkipReason:
    found, mistakes = registry.scan(registry.configs_folder())
    registry.remember(store.path, found)
    switches.carry_over(context.instance, {entry.name for entry in registry.entries(store.path)})
    experiments, problems = _known(store.path, found, mistakes)
    events: list[dg.AssetMaterialization] = []
    for experiment in experiments:
        try:
            events += settings_events(context.instance, experiment, store.open())
        except EvolveError as error:  # a file of tasks or a model that it names is missing
            problems.append(f"{experiment.experiment}: {error.what}")
    for problem in problems:
        context.log.warning(f"left out: {problem}")
    wanted = {
        partitions.EXPERIMENT: [e.experiment for e in experiments],
        partitions.ITERATION: partitions.iteration_keys(max((e.iterations for e in experiments), default=0)),
    }
    requests = []
    for dimension in (partitions.experiments, partitions.iterations):
        known = set(context.instance.get_dynamic_partitions(str(dimension.name)))
        missing = [key for key in wanted[str(dimension.name)] if key not in known]
        if missing:
            requests.append(dimension.build_add_request(missing))
    if not requests and not events:
        return dg.SkipReason(f"nothing has changed in {len(experiments)} experiments" + _left_out(problems))
    return dg.SensorResult(dynamic_partitions_requests=requests, asset_events=events)


def _left_out(problems: list[str]) -> str:
    return f"; left out: {'; '.join(problems)}" if problems else ""


def promoted_iterations(instance: dg.DagsterInstance, name: str) -> set[int]:
    """Iterations of an experiment whose promotion is materialized."""
    keys = (partitions.split(key) for key in instance.get_materialized_partitions(dg.AssetKey("promotion")))
    return {iteration for experiment, iteration in keys if experiment == name}


def running(instance: dg.DagsterInstance, name: str) -> dg.DagsterRun | None:
    """A run of this experiment that is queued, going on, or about to be retried by Dagster."""
    mine = {partitions.EXPERIMENT_TAG: name}
    found = instance.get_runs(dg.RunsFilter(statuses=recovery.IN_PROGRESS, tags=mine), limit=1)
    if found:
        return found[0]
    failed = instance.get_runs(dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], tags=mine), limit=1)
    return next((run for run in failed if run.is_complete_and_waiting_to_retry), None)


def _request(name: str, iteration: int, run_key: str, tags: dict[str, str]) -> dg.RunRequest:
    return dg.RunRequest(run_key=run_key, partition_key=partitions.loop_key(name, iteration), tags=tags)


def situation(
    instance: dg.DagsterInstance, root: Path, experiment: Experiment, switched_on: float = 0.0
) -> scheduling.Situation:
    """What a tick knows of an experiment.

    Args:
        switched_on: when somebody last switched the schedule on, in seconds of the epoch; failures before it are acknowledged.
    """
    name = experiment.experiment
    promoted = frozenset(promoted_iterations(instance, name))
    going_on = running(instance, name)
    at = scheduling.Situation(name, experiment.iterations, promoted, running=going_on.run_id if going_on else None)
    if going_on is not None or not 1 < at.following <= experiment.iterations:
        return at
    first = resolve("trajectories", experiment, at.following, open_store(root))  # also tells where there are no tasks yet
    missing = first.missing if first.digest is None else None
    return replace(at, missing=missing, last=_last_run(instance, name, at.following, switched_on))


def _last_run(instance: dg.DagsterInstance, name: str, iteration: int, switched_on: float) -> scheduling.LastRun | None:
    tags = {partitions.EXPERIMENT_TAG: name, partitions.ITERATION_TAG: partitions.iteration_key(iteration)}
    found = instance.get_run_records(dg.RunsFilter(tags=tags), limit=1)
    if not found:
        return None
    run, ended = found[0].dagster_run, found[0].end_time or 0.0
    if run.status == dg.DagsterRunStatus.SUCCESS:
        return scheduling.LastRun(run.run_id, "succeeded")
    if run.status == dg.DagsterRunStatus.CANCELED:
        return scheduling.LastRun(run.run_id, "canceled")
    if not recovery.failed_by_a_step(run):
        return scheduling.LastRun(run.run_id, "lost")
    failures = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    events = [entry.dagster_event for entry in failures if entry.dagster_event]
    state: Literal["failed", "passing"] = "passing" if events and all(map(_passing, events)) else "failed"
    step = events[0].step_key if events else None
    return scheduling.LastRun(run.run_id, state, step or "", acknowledged=ended < switched_on)


def _passing(event: dg.DagsterEvent) -> bool:
    """Whether a step failed for what may be over in another night."""
    told = event.step_failure_data.user_failure_data
    value = told.metadata.get(PASSING) if told is not None and told.metadata else None
    return value is not None and value.value is True


def nightly(
    context: dg.ScheduleEvaluationContext, store: StoreResource, name: str, schedule: str
) -> dg.RunRequest | dg.SkipReason:
    """One tick: the next iteration of one experiment, or why there is none now."""
    instance = context.instance
    try:
        experiment = registry.load(store.path, name)
        for run_id in recovery.end_lost_runs(instance, store.path, name):
            context.log.warning(f"run {run_id} has no process any more: ended")
        decision = scheduling.decide(situation(instance, store.path, experiment, _switched_on(instance, schedule)))
    except EvolveError as error:
        return dg.SkipReason(f"{name}: {error}")
    context.log.info(decision.reason)
    if decision.iteration is None:
        return dg.SkipReason(decision.reason)
    partitions.add_partitions(instance, [name], decision.iteration)
    # Ticks of the same minute are one request, also when the daemon died in between; another night is another request.
    when = context.scheduled_execution_time.isoformat(timespec="minutes")
    return _request(
        name, decision.iteration, f"{partitions.loop_key(name, decision.iteration)}@{when}", {SCHEDULE_TAG: schedule}
    )


def _switched_on(instance: dg.DagsterInstance, schedule: str) -> float:
    """When somebody last switched a schedule on."""
    states = instance.all_instigator_state(instigator_type=InstigatorType.SCHEDULE)
    data = next((state.instigator_data for state in states if state.name == schedule), None)
    return (data.start_timestamp or 0.0) if isinstance(data, ScheduleInstigatorData) else 0.0


def nightly_schedules(root: Path) -> list[dg.ScheduleDefinition]:
    """A schedule per known experiment, off until somebody switches it on (``evolve schedule on``).

    Dagster reads schedules when it loads the code: a new experiment, cron or time zone needs a reload of the code location.
    """
    experiments = known_experiments(root)[0]
    return [
        _nightly_schedule(e, scheduling.schedule_name(e.experiment))
        for e in experiments
        if scheduling.check_schedule(e.schedule.cron, e.schedule.timezone) is None
    ]


def _nightly_schedule(experiment: Experiment, schedule: str) -> dg.ScheduleDefinition:
    name = experiment.experiment

    @dg.schedule(
        name=schedule,
        job=iteration_job,
        cron_schedule=experiment.schedule.cron,
        execution_timezone=experiment.schedule.timezone,
        default_status=dg.DefaultScheduleStatus.STOPPED,
        metadata={"experiment": name},
        description=f"The next iteration of `{name}`, once the last one is promoted, up to its last one.",
    )
    def next_iteration(context: dg.ScheduleEvaluationContext, store: StoreResource) -> dg.RunRequest | dg.SkipReason:
        return nightly(context, store, name, schedule)

    return next_iteration


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.SUCCESS,
    request_job=iteration_job,
    default_status=dg.DefaultSensorStatus.STOPPED,
    minimum_interval_seconds=15,
    description=f"After a successful run with the tag `{UNTIL_TAG}=K`: the next iteration, up to K.",
)
def continue_until(context: dg.RunStatusSensorContext) -> dg.RunRequest | dg.SkipReason:
    run, instance = context.dagster_run, context.instance
    until, partition = run.tags.get(UNTIL_TAG), run.tags.get(PARTITION_NAME_TAG)
    if until is None or partition is None or "|" not in partition:
        return dg.SkipReason(f"run {run.run_id[:8]} has no tag {UNTIL_TAG} or no iteration")
    if not until.isdecimal():
        return dg.SkipReason(f"run {run.run_id[:8]}: tag {UNTIL_TAG}={until} is not a number: write e.g. {UNTIL_TAG}=5")
    name, iteration = partitions.split(partition)
    following = iteration + 1
    if following > int(until):
        return dg.SkipReason(f"{name}: iteration {until} is reached")
    if iteration not in promoted_iterations(instance, name):
        return dg.SkipReason(f"{name}: promotion[{partition}] is not materialized: materialize it to go on")
    partitions.add_partitions(instance, [name], following)
    # Whatever else of the experiment is going on, this waits its turn in the queue: nobody asks again.
    return _request(name, following, f"{partitions.loop_key(name, following)}@{run.run_id}", {UNTIL_TAG: until})
