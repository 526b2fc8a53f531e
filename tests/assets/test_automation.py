"""What runs by itself: the watch over the experiment files, the nightly schedule, 'continue until'."""

from __future__ import annotations

import time
from datetime import datetime
from pathlib import Path

import dagster as dg
import pytest
from assets_helpers import FakeSteps, iteration, watch, write_config
from evolve_dag.assets import alerts, automation, partitions, recovery
from evolve_dag.assets.location import build
from evolve_dag.assets.resources import StoreResource
from evolve_dag.assets.settings import CONFIGURED_STEPS, settings_key

from evolve_dag.config import registry, scheduling
from evolve_dag.config.schema import Experiment
from evolve_dag.definitions import defs
from evolve_dag.errors import AwayError, ConcurrencyError, DataError, EvolveError, UnjudgedError, UnreachableError
from evolve_dag.steps import base
from evolve_dag.store.artifacts import Store
from evolve_dag.tasks.streams import read_so_far

NIGHT = datetime(2026, 6, 1, 2, 0)


def promote(instance: dg.DagsterInstance, name: str, k: int) -> None:
    """Record promotion[name|k] without running it."""
    partitions.add_partitions(instance, [name], k)
    event = dg.AssetMaterialization("promotion", partition=partitions.loop_key(name, k))
    instance.report_runless_asset_event(event)


def tick(instance: dg.DagsterInstance) -> dg.RunRequest | dg.SkipReason:
    """One tick of the schedule of ``tiny``."""
    [schedule] = automation.nightly_schedules(registry.default_store())
    resources = {"store": StoreResource()}
    with dg.build_schedule_context(instance=instance, scheduled_execution_time=NIGHT, resources=resources) as context:
        result = schedule(context)
    assert isinstance(result, dg.RunRequest | dg.SkipReason)
    return result


def decision(instance: dg.DagsterInstance, switched_on: float = 0.0) -> scheduling.ScheduleDecision:
    """What a tick would decide of ``tiny``."""
    root = registry.default_store()
    return scheduling.decide(automation.situation(instance, root, registry.load(root, "tiny"), switched_on))


def run_of(
    instance: dg.DagsterInstance, k: int, status: dg.DagsterRunStatus, tags: dict[str, str] | None = None
) -> dg.DagsterRun:
    """A run of iteration k of ``tiny``."""
    mine = {partitions.EXPERIMENT_TAG: "tiny", partitions.ITERATION_TAG: partitions.iteration_key(k), **(tags or {})}
    return instance.create_run_for_job(job_def=defs.resolve_job_def("iteration"), status=status, tags=mine)


def finished_run(instance: dg.DagsterInstance, tags: dict[str, str]) -> dg.DagsterRun:
    """A successful run of the iteration job."""
    job = defs.resolve_job_def("iteration")
    return instance.create_run_for_job(job_def=job, status=dg.DagsterRunStatus.SUCCESS, tags=tags)


def follow(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.RunRequest | dg.SkipReason:
    """What ``continue_until`` says after that run."""
    event = dg.DagsterEvent("PIPELINE_SUCCESS", job_name=run.job_name)
    context = dg.build_run_status_sensor_context(
        sensor_name="continue_until", dagster_event=event, dagster_instance=instance, dagster_run=run
    )
    result = automation.continue_until(context)
    assert isinstance(result, dg.RunRequest | dg.SkipReason)
    return result


def test_what_launches_runs_is_off_until_somebody_switches_it_on(experiment: Experiment) -> None:
    assert automation.continue_until.default_status == dg.DefaultSensorStatus.STOPPED
    [schedule] = automation.nightly_schedules(registry.default_store())
    assert schedule.default_status == dg.DefaultScheduleStatus.STOPPED
    for quiet in (automation.config_watch, recovery.lost_runs, alerts.failure_watch, alerts.restore_watch):
        assert quiet.default_status == dg.DefaultSensorStatus.RUNNING


def test_every_experiment_has_a_schedule_at_the_time_that_its_file_says(config: Path) -> None:
    write_config(config.with_name("my-other.yaml"), schedule={"cron": "30 4 * * mon", "timezone": "Europe/Berlin"})
    found = {s.name: s for s in automation.nightly_schedules(registry.default_store())}
    assert set(found) == {"nightly_tiny", scheduling.schedule_name("my-other")}
    assert (found["nightly_tiny"].cron_schedule, found["nightly_tiny"].execution_timezone) == ("0 2 * * *", "UTC")
    other = found[scheduling.schedule_name("my-other")]
    assert (other.cron_schedule, other.execution_timezone) == ("30 4 * * mon", "Europe/Berlin")
    dg.Definitions.validate_loadable(build(StoreResource(root=str(registry.default_store()))))


def test_the_watch_shows_experiments_as_partitions_and_then_is_quiet(config: Path, memory: dg.DagsterInstance) -> None:
    write_config(config.with_name("longer.yaml"), iterations=5)
    first = watch(memory)
    assert isinstance(first, dg.SensorResult)
    assert set(memory.get_dynamic_partitions(partitions.EXPERIMENT)) == {"tiny", "longer"}
    assert list(memory.get_dynamic_partitions(partitions.ITERATION)) == ["01", "02", "03", "04", "05"]
    assert len(first.asset_events) == 2 * len(CONFIGURED_STEPS)
    assert {entry.name for entry in registry.entries(registry.default_store())} == {"tiny", "longer"}
    assert isinstance(watch(memory), dg.SkipReason)


def test_the_watch_reports_only_the_slices_that_changed(config: Path, memory: dg.DagsterInstance) -> None:
    watch(memory)
    write_config(config, gate={"max_turn_ratio": 3.0})
    result = watch(memory)
    assert isinstance(result, dg.SensorResult)
    assert [(event.asset_key, event.partition) for event in result.asset_events] == [(settings_key("promotion"), "tiny")]
    assert not result.dynamic_partitions_requests


def test_a_file_that_was_renamed_or_moved_is_found_again_with_its_seeds(place: Path, memory: dg.DagsterInstance) -> None:
    root = registry.default_store()
    first = write_config(place / "configs" / "a.yaml", experiment="tiny")
    registry.register(root, first, seed=5)
    watch(memory)
    first.rename(first.with_name("b.yaml"))
    assert registry.load(root, "tiny-s5").seed == 5, "also before the watch has looked"
    assert {e.experiment for e in automation.known_experiments(root)[0]} == {"tiny", "tiny-s5"}
    assert len(automation.nightly_schedules(root)) == 2, "the code location may be loaded before the watch has looked"
    watch(memory)
    assert {entry.config.name for entry in registry.entries(root)} == {"b.yaml"}
    assert {e.experiment for e in automation.known_experiments(root)[0]} == {"tiny", "tiny-s5"}
    assert automation.nightly_schedules(root)


def test_a_name_stays_with_its_file_while_somebody_edits_it(config: Path, memory: dg.DagsterInstance) -> None:
    root = registry.default_store()
    watch(memory)
    other = write_config(config.with_name("z.yaml"), experiment="tiny", iterations=3)
    write_config(config, iteratons=3)
    watch(memory)
    assert [entry.config for entry in registry.entries(root)] == [config]
    write_config(config, experiment="another")
    assert {e.experiment: e.iterations for e in automation.known_experiments(root)[0]} == {"tiny": 3, "another": 2}
    watch(memory)
    assert {entry.name: entry.config for entry in registry.entries(root)} == {"tiny": other, "another": config}


def test_a_broken_file_is_left_out_and_told(config: Path, memory: dg.DagsterInstance) -> None:
    write_config(config.with_name("broken.yaml"), iteratons=3)
    watch(memory)
    assert list(memory.get_dynamic_partitions(partitions.EXPERIMENT)) == ["tiny"]
    quiet = watch(memory)
    assert isinstance(quiet, dg.SkipReason)
    assert "iteratons" in str(quiet.skip_message)
    dg.Definitions.validate_loadable(defs)


def test_an_experiment_whose_model_is_missing_does_not_stop_the_others(config: Path, memory: dg.DagsterInstance) -> None:
    write_config(config.with_name("modelless.yaml"), models={"policy": {"path": "nowhere"}})
    result = watch(memory)
    assert isinstance(result, dg.SensorResult)
    assert {event.partition for event in result.asset_events} == {"tiny"}
    quiet = watch(memory)
    assert isinstance(quiet, dg.SkipReason)
    assert "modelless: " in str(quiet.skip_message)


def test_a_seed_of_its_own_is_an_experiment_of_its_own(config: Path, memory: dg.DagsterInstance) -> None:
    registry.register(registry.default_store(), config, seed=7)
    watch(memory)
    assert set(memory.get_dynamic_partitions(partitions.EXPERIMENT)) == {"tiny", "tiny-s7"}
    versions = {name: automation.recorded_version(memory, settings_key("trajectories"), name) for name in ("tiny", "tiny-s7")}
    assert versions["tiny"] != versions["tiny-s7"]


def test_a_tick_asks_for_the_next_iteration_or_says_why_not(
    config: Path, experiment: Experiment, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "run it by hand first" in str(tick(instance))
    go_on = scheduling.ScheduleDecision(2, "tiny: iteration 2 is next")
    monkeypatch.setattr(scheduling, "decide", lambda situation: go_on)
    request = tick(instance)
    assert isinstance(request, dg.RunRequest)
    assert request.partition_key == "tiny|02"
    assert str(request.run_key).startswith("tiny|02@2026-06-01T02:00"), "another night is another request"
    assert request.tags["evolve/schedule"] == "nightly_tiny"
    assert instance.has_dynamic_partition(partitions.ITERATION, "02")
    [schedule] = automation.nightly_schedules(registry.default_store())
    config.write_text("iteratons: 3\n")
    with dg.build_schedule_context(instance=instance, scheduled_execution_time=NIGHT, resources=defs.resources) as context:
        assert "iteratons" in str(schedule(context)), "a broken file is a reason, not a failure"


def test_nightly_goes_on_where_the_lineage_stands_and_stops_at_the_last(
    fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance
) -> None:
    assert "run it by hand first" in decision(memory).reason
    iteration(memory, 1)
    assert decision(memory).iteration == 2
    iteration(memory, 2)
    assert "all 2 iterations are promoted" in decision(memory).reason


def test_nightly_waits_for_a_run_and_for_one_that_dagster_will_retry(
    fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance
) -> None:
    iteration(memory, 1)
    run = run_of(memory, 2, dg.DagsterRunStatus.STARTING)
    assert f"run {run.run_id[:8]} is going on" in decision(memory).reason
    memory.report_run_failed(run)
    memory.add_run_tags(run.run_id, {"dagster/will_retry": "true"})
    assert f"run {run.run_id[:8]} is going on" in decision(memory).reason
    memory.add_run_tags(run.run_id, {"dagster/auto_retry_run_id": "another"})
    assert decision(memory).iteration == 2


def test_nightly_retries_what_was_lost_but_not_what_a_step_has_explained(
    fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance
) -> None:
    iteration(memory, 1)
    run_of(memory, 2, dg.DagsterRunStatus.CANCELED)
    assert decision(memory).iteration == 2
    memory.report_run_failed(run_of(memory, 2, dg.DagsterRunStatus.STARTING))
    assert decision(memory).iteration == 2, "a launch that was lost"
    fake.fail["adapter"] = DataError("the disk of doom", "mend it")
    failed = iteration(memory, 2, check=False)
    said = decision(memory)
    assert said.iteration is None
    assert f"iteration 2 failed at adapter (run {failed.run_id[:8]})" in said.reason
    assert "evolve schedule on tiny" in said.reason
    assert decision(memory, switched_on=time.time() + 1).iteration == 2, "somebody has looked and switched it on again"
    del fake.fail["adapter"]
    iteration(memory, 2)
    assert "all 2 iterations are promoted" in decision(memory).reason


@pytest.mark.parametrize("kind", [UnjudgedError, UnreachableError, AwayError, ConcurrencyError])
def test_nightly_tries_again_what_may_be_over_by_now(
    fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance, kind: type[EvolveError]
) -> None:
    """A judge that is down, or another run that holds the experiment, ends a night, and not the ones after it."""
    iteration(memory, 1)
    fake.fail["adapter"] = kind("the judge is down", "wait for it")
    failed = iteration(memory, 2, check=False)
    said = decision(memory)
    assert said.iteration == 2
    assert f"run {failed.run_id[:8]} failed at adapter for what may be over by now" in said.reason


def test_nightly_takes_no_step_that_was_asked_for_too_early_for_a_failed_night(
    fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance
) -> None:
    iteration(memory, 1)
    assert not iteration(memory, 2, only=["scores"], check=False).success
    assert decision(memory).iteration == 2


def test_nightly_says_what_is_out_of_date_in_place_of_failing_at_night(
    fake: FakeSteps, config: Path, experiment: Experiment, memory: dg.DagsterInstance
) -> None:
    iteration(memory, 1)
    write_config(config, distillation={"epochs": 3})
    assert "promotion[tiny|01] is missing or out of date" in decision(memory).reason


def stream_of_days(place: Path, *days: int) -> None:
    (place / "days").mkdir()
    for name in ("development", "held_out", *(f"days/{day}" for day in days)):
        (place / f"{name}.jsonl").write_text(f'{{"question": "{name}?", "answer": "x"}}\n')
    (place / "pages.jsonl").write_text('{"title": "a", "text": "b"}\n')
    tasks = {
        "train": {"path": "../days", "world": None, "count": None, "stream": True},
        "development": {"path": "../development.jsonl", "world": None},
        "held_out": {"path": "../held_out.jsonl", "world": None},
    }
    write_config(
        place / "configs" / "tiny.yaml", iterations=5, environment={"kind": "corpus", "pages": "../pages.jsonl"}, tasks=tasks
    )


def test_nightly_waits_for_the_tasks_of_a_stream(fake: FakeSteps, place: Path, memory: dg.DagsterInstance) -> None:
    stream_of_days(place, 1)
    assert iteration(memory, 1).success, "its policy is handed over, though there are no tasks for the next night"
    assert "holds 1 files, one an iteration" in decision(memory).reason
    (place / "days" / "2.jsonl").write_text('{"question": "Who?", "answer": "x"}\n')
    assert decision(memory).iteration == 2


def test_a_file_that_comes_late_changes_no_finished_night(
    fake: FakeSteps, place: Path, memory: dg.DagsterInstance, store: Store
) -> None:
    stream_of_days(place, 1, 3)
    assert iteration(memory, 1).success
    assert iteration(memory, 2).success
    (place / "days" / "2.jsonl").write_text('{"question": "Who came late?", "answer": "x"}\n')
    experiment = registry.load(store.root, "tiny")
    for night in (1, 2):
        assert all(step.exists for step in base.resolve_iteration(experiment, night, store).values())
    told = decision(memory).reason
    assert "holds 2 files, one an iteration; passed over, since they sort before what was read: 2.jsonl" in told
    (place / "days" / "4.jsonl").write_text('{"question": "Who is next?", "answer": "x"}\n')
    assert decision(memory).iteration == 3
    (place / "days" / "1.jsonl").write_text('{"question": "Who, again?", "answer": "x"}\n')
    assert not base.resolve("trajectories", experiment, 1, store).exists, "a file that was changed is another night"


def test_a_file_that_comes_during_a_night_is_not_taken_for_the_one_that_was_read(
    fake: FakeSteps, place: Path, memory: dg.DagsterInstance, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream_of_days(place, 1, 3)
    assert iteration(memory, 1).success
    play = fake.trajectories

    def late(context: base.StepContext) -> None:
        (place / "days" / "2.jsonl").write_text('{"question": "Who came late?", "answer": "x"}\n')
        play(context)

    monkeypatch.setattr(fake, "trajectories", late)
    assert iteration(memory, 2).success
    assert read_so_far(registry.load(store.root, "tiny"), store) == ("1.jsonl", "3.jsonl")
    assert "2.jsonl" in decision(memory).reason


def test_continue_until_goes_on_and_stops(memory: dg.DagsterInstance) -> None:
    promote(memory, "tiny", 1)
    run = finished_run(memory, {"evolve/until": "3", "dagster/partition": "tiny|01"})
    run_of(
        memory, 1, dg.DagsterRunStatus.STARTED
    )  # whatever else is going on: the queue lets one run of an experiment at a time
    request = follow(memory, run)
    assert isinstance(request, dg.RunRequest)
    assert request.partition_key == "tiny|02"
    assert request.tags["evolve/until"] == "3", "the tag travels on"
    promote(memory, "tiny", 3)
    last = finished_run(memory, {"evolve/until": "3", "dagster/partition": "tiny|03"})
    assert "iteration 3 is reached" in str(follow(memory, last))


@pytest.mark.parametrize(
    ("tags", "reason"),
    [
        ({"dagster/partition": "tiny|01"}, "has no tag evolve/until"),
        ({"evolve/until": "3", "dagster/partition": "tiny"}, "no iteration"),
        ({"evolve/until": "ever", "dagster/partition": "tiny|01"}, "is not a number"),
        ({"evolve/until": "²", "dagster/partition": "tiny|01"}, "is not a number"),
        ({"evolve/until": "3", "dagster/partition": "tiny|01"}, "promotion[tiny|01] is not materialized"),
    ],
)
def test_continue_until_says_why_it_does_not(memory: dg.DagsterInstance, tags: dict[str, str], reason: str) -> None:
    assert reason in str(follow(memory, finished_run(memory, tags)))


def test_a_backfill_over_iterations_runs_one_at_a_time_per_experiment(
    fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance
) -> None:
    run = iteration(memory, 1)
    tags = memory.get_run_by_id(run.run_id).tags  # type: ignore[union-attr]
    assert tags[partitions.EXPERIMENT_TAG] == "tiny", "dagster.yaml limits concurrency on this tag"
