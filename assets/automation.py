"""What runs by itself. Only ``config_watch`` is on from the start: it launches nothing, it tells Dagster what is there."""

from collections.abc import Iterator

import dagster as dg
from dagster._core.storage.tags import PARTITION_NAME_TAG
from evolve_dag.assets import partitions
from evolve_dag.assets.loop import loop_assets
from evolve_dag.assets.resources import StoreResource
from evolve_dag.assets.settings import CONFIGURED_STEPS, settings_assets, settings_key, settings_metadata

from evolve_dag import registry
from evolve_dag.config import Experiment
from evolve_dag.errors import EvolveError
from evolve_dag.steps.base import settings_digest

UNTIL_TAG = "evolve/until"
"""Run tag: after this run succeeds, go on with the next iteration, up to the one named here."""

IN_PROGRESS = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]

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


def settings_events(instance: dg.DagsterInstance, experiment: Experiment) -> Iterator[dg.AssetMaterialization]:
    """Config slices whose data version differs from what Dagster has last heard of."""
    for step in CONFIGURED_STEPS:
        version = settings_digest(step, experiment)
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


def known_experiments(root: registry.Path) -> tuple[list[Experiment], list[str]]:
    """Experiments of the configs folder and of the store, and what is wrong with the others."""
    found, mistakes = registry.scan(registry.configs_folder())
    problems = [mistake.what for mistake in mistakes]
    by_name = {entry.name: entry for entry in found} | {entry.name: entry for entry in registry.entries(root)}
    experiments = []
    for entry in by_name.values():
        try:
            experiments.append(entry.load())
        except EvolveError as error:
            problems.append(error.what)
    return experiments, sorted(set(problems))


@dg.sensor(
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Reads the experiment files: adds their partitions, and reports config slices that have changed.",
)
def config_watch(context: dg.SensorEvaluationContext, store: StoreResource) -> dg.SensorResult | dg.SkipReason:
    for entry in registry.scan(registry.configs_folder())[0]:
        registry.remember(store.path, entry)
    experiments, problems = known_experiments(store.path)
    events: list[dg.AssetMaterialization] = []
    for experiment in experiments:
        try:
            events += settings_events(context.instance, experiment)
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


def is_running(instance: dg.DagsterInstance, name: str) -> bool:
    """Whether a run of this experiment is queued or going on."""
    runs = instance.get_runs(dg.RunsFilter(statuses=IN_PROGRESS, tags={partitions.EXPERIMENT_TAG: name}), limit=1)
    return bool(runs)


def _request(instance: dg.DagsterInstance, name: str, iteration: int, run_key: str, tags: dict[str, str]) -> dg.RunRequest:
    key = partitions.loop_key(name, iteration)
    instance.add_dynamic_partitions(partitions.ITERATION, [partitions.iteration_key(iteration)])
    return dg.RunRequest(run_key=run_key, partition_key=key, tags=tags)


@dg.schedule(
    job=iteration_job,
    cron_schedule="0 2 * * *",
    default_status=dg.DefaultScheduleStatus.STOPPED,
    description="Every night the next iteration of each experiment that has begun and is not at its last one.",
)
def nightly(context: dg.ScheduleEvaluationContext, store: StoreResource) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """An experiment joins by its first iteration being run by hand; nothing starts that nobody has started."""
    reasons: list[str] = []
    requested = False
    experiments, problems = known_experiments(store.path)
    for experiment in experiments:
        name = experiment.experiment
        promoted = promoted_iterations(context.instance, name)
        following = max(promoted, default=0) + 1
        if not promoted:
            reasons.append(f"{name}: has not begun")
        elif following > experiment.iterations:
            reasons.append(f"{name}: all {experiment.iterations} iterations are promoted")
        elif is_running(context.instance, name):
            reasons.append(f"{name}: a run is going on")
        else:
            requested = True
            day = context.scheduled_execution_time.date().isoformat()
            yield _request(context.instance, name, following, f"{partitions.loop_key(name, following)}@{day}", {})
    if not requested:
        yield dg.SkipReason("; ".join(reasons + problems) or "no experiment is known")


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.SUCCESS,
    request_job=iteration_job,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description=f"After a successful run with the tag `{UNTIL_TAG}=K`: the next iteration, up to K.",
)
def continue_until(context: dg.RunStatusSensorContext) -> dg.RunRequest | dg.SkipReason:
    run, instance = context.dagster_run, context.instance
    until, partition = run.tags.get(UNTIL_TAG), run.tags.get(PARTITION_NAME_TAG)
    if until is None or partition is None or "|" not in partition:
        return dg.SkipReason(f"run {run.run_id[:8]} has no tag {UNTIL_TAG} or no iteration")
    if not until.isdigit():
        return dg.SkipReason(f"run {run.run_id[:8]}: tag {UNTIL_TAG}={until} is not a number: write e.g. {UNTIL_TAG}=5")
    name, iteration = partitions.split(partition)
    following = iteration + 1
    if following > int(until):
        return dg.SkipReason(f"{name}: iteration {until} is reached")
    if iteration not in promoted_iterations(instance, name):
        return dg.SkipReason(f"{name}: promotion[{partition}] is not materialized: materialize it to go on")
    if is_running(instance, name):
        return dg.SkipReason(f"{name}: a run is going on")
    return _request(instance, name, following, f"{partitions.loop_key(name, following)}@{run.run_id}", {UNTIL_TAG: until})
