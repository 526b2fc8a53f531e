"""What runs by itself: the watch over the experiment files, the nightly schedule, 'continue until'."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import dagster as dg
import pytest
from assets_helpers import FakeSteps, iteration, watch, write_config
from evolve_dag.assets import automation, partitions
from evolve_dag.assets.settings import CONFIGURED_STEPS, settings_key

from evolve_dag import registry
from evolve_dag.config import Experiment
from evolve_dag.definitions import defs


def promote(instance: dg.DagsterInstance, name: str, k: int) -> None:
    """Record promotion[name|k] without running it."""
    partitions.add_partitions(instance, [name], k)
    event = dg.AssetMaterialization("promotion", partition=partitions.loop_key(name, k))
    instance.report_runless_asset_event(event)


def nightly(instance: dg.DagsterInstance) -> list[dg.RunRequest | dg.SkipReason]:
    """One tick of the schedule."""
    when = datetime(2026, 6, 1, 2, 0)
    context = dg.build_schedule_context(instance=instance, scheduled_execution_time=when, resources=defs.resources)
    return list(automation.nightly(context))


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


def test_only_the_watch_is_on_from_the_start() -> None:
    assert automation.config_watch.default_status == dg.DefaultSensorStatus.RUNNING
    assert automation.continue_until.default_status == dg.DefaultSensorStatus.STOPPED
    assert automation.nightly.default_status == dg.DefaultScheduleStatus.STOPPED


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


def test_nightly_plans_the_next_iteration_of_what_has_begun(experiment: Experiment, instance: dg.DagsterInstance) -> None:
    assert "has not begun" in str(nightly(instance))
    promote(instance, "tiny", 1)
    [request] = nightly(instance)
    assert isinstance(request, dg.RunRequest)
    assert (request.partition_key, request.run_key) == ("tiny|02", "tiny|02@2026-06-01")
    assert instance.has_dynamic_partition(partitions.ITERATION, "02")
    run = instance.create_run_for_job(
        job_def=defs.resolve_job_def("iteration"),
        status=dg.DagsterRunStatus.STARTED,
        tags={partitions.EXPERIMENT_TAG: "tiny"},
    )
    assert "a run is going on" in str(nightly(instance))
    instance.report_run_failed(run)
    assert isinstance(nightly(instance)[0], dg.RunRequest), "a failed night is tried again"
    promote(instance, "tiny", 2)
    assert "all 2 iterations are promoted" in str(nightly(instance))


def test_nightly_without_any_experiment_says_so(instance: dg.DagsterInstance) -> None:
    assert "no experiment is known" in str(nightly(instance))


def test_continue_until_goes_on_and_stops(memory: dg.DagsterInstance) -> None:
    promote(memory, "tiny", 1)
    run = finished_run(memory, {"evolve/until": "3", "dagster/partition": "tiny|01"})
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
