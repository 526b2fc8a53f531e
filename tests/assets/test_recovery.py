"""Runs whose process is gone are found and ended; living ones are left alone; a backfill gets back into order."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest
from assets_helpers import FakeSteps, iteration
from dagster._core.execution.backfill import BulkActionStatus
from dagster._core.execution.plan.objects import StepSuccessData
from evolve_dag.assets import launch, partitions, recovery
from evolve_dag.assets.resources import StoreResource

from evolve_dag.config.schema import Experiment
from evolve_dag.definitions import defs
from evolve_dag.steps import base

ROOT = Path(".evolve")
HOLDER = """
import sys
from pathlib import Path
from evolve_dag.assets import recovery
recovery.hold(Path(sys.argv[1]), sys.argv[2])
print("held", flush=True)
sys.stdin.read()
"""


def started(
    instance: dg.DagsterInstance, k: int = 1, status: dg.DagsterRunStatus = dg.DagsterRunStatus.STARTED, **tags: str
) -> dg.DagsterRun:
    """A run of iteration k of ``tiny`` that counts as started."""
    mine = {partitions.EXPERIMENT_TAG: "tiny", partitions.ITERATION_TAG: partitions.iteration_key(k), **tags}
    return instance.create_run_for_job(job_def=defs.resolve_job_def("iteration"), status=status, tags=mine)


def status(instance: dg.DagsterInstance, run: dg.DagsterRun) -> dg.DagsterRunStatus:
    found = instance.get_run_by_id(run.run_id)
    assert found is not None
    return found.status


def lost_runs(instance: dg.DagsterInstance) -> str:
    """One tick of the sensor."""
    with dg.build_sensor_context(instance=instance, resources={"store": StoreResource(root=str(ROOT))}) as context:
        result = recovery.lost_runs(context)
    assert isinstance(result, dg.SkipReason)
    return str(result.skip_message)


def test_a_killed_process_loses_its_run_and_a_living_one_keeps_it(memory: dg.DagsterInstance) -> None:
    runs = [started(memory), started(memory, 2)]
    command = [sys.executable, "-c", HOLDER, str(ROOT)]
    holders = [
        subprocess.Popen([*command, run.run_id], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for run in runs
    ]
    try:
        for holder in holders:
            assert holder.stdout is not None
            assert holder.stdout.readline() == "held\n"
        assert recovery.end_lost_runs(memory, ROOT) == []
        holders[0].send_signal(signal.SIGKILL)
        holders[0].wait()
        assert recovery.end_lost_runs(memory, ROOT, "another") == []
        assert runs[0].run_id in lost_runs(memory)
        assert status(memory, runs[0]) == dg.DagsterRunStatus.FAILURE
        assert status(memory, runs[1]) == dg.DagsterRunStatus.STARTED
        failed = memory.get_run_by_id(runs[0].run_id)
        assert failed is not None
        assert not recovery.failed_by_a_step(failed), "so that it is started again"
        assert [path.name for path in (ROOT / "locks").glob("run-*")] == [f"run-{runs[1].run_id}.lock"]
    finally:
        for holder in holders:
            holder.kill()
            holder.communicate()


def test_a_lock_that_cannot_be_let_go_fails_no_later_run(monkeypatch: pytest.MonkeyPatch) -> None:
    class Stale:
        def release(self) -> None:
            raise OSError(116, "Stale file handle")

    monkeypatch.setattr(recovery, "_held", {Path("of an earlier run"): Stale()})
    recovery.hold(ROOT, "later")
    assert [path.name for path in recovery._held] == ["run-later.lock"]


def test_a_run_between_start_and_first_step_gets_time(memory: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    run = started(memory)
    assert recovery.end_lost_runs(memory, ROOT) == []
    monkeypatch.setattr(recovery, "GRACE_SECONDS", -1.0)
    assert recovery.end_lost_runs(memory, ROOT) == [run.run_id]


def test_only_started_runs_of_iterations_can_be_lost(memory: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery, "GRACE_SECONDS", -1.0)
    started(memory, status=dg.DagsterRunStatus.STARTING)
    started(memory, status=dg.DagsterRunStatus.SUCCESS)
    memory.create_run_for_job(job_def=defs.resolve_job_def("experiment_config"), status=dg.DagsterRunStatus.STARTED)
    canceling = started(memory, status=dg.DagsterRunStatus.CANCELING)
    assert recovery.end_lost_runs(memory, ROOT) == [canceling.run_id]
    assert status(memory, canceling) == dg.DagsterRunStatus.CANCELED


def test_a_run_is_held_while_it_goes_on_and_let_go_afterwards(
    fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance
) -> None:
    seen: list[list[str]] = []
    real = fake.trajectories

    def looking(context: base.StepContext) -> None:
        seen.append(recovery.end_lost_runs(memory, ROOT))
        real(context)

    fake.trajectories = looking  # type: ignore[method-assign]
    first = iteration(memory, 1)
    second = iteration(memory, 2)
    assert len(seen) == 2
    assert not any(seen), "no run called lost while it went on"
    assert [path.name for path in (ROOT / "locks").glob("run-*")] == [f"run-{second.run_id}.lock"]
    assert first.success


def test_within_a_backfill_a_run_before_its_turn_asks_for_another(
    fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance
) -> None:
    """What happens after iteration 1 was lost: the queue goes on with 2, which refuses."""
    backfill = {"dagster/backfill": "b1"}

    def refused(**tags: str) -> dict[str, str]:
        partitions.add_partitions(memory, ["tiny"], 2)
        result = defs.resolve_job_def("iteration").execute_in_process(
            instance=memory, partition_key=partitions.loop_key("tiny", 2), tags=tags, raise_on_error=False
        )
        assert not result.success
        run = memory.get_run_by_id(result.run_id)
        assert run is not None
        return run.tags

    retry = "dagster/retry_on_asset_or_op_failure"
    first = started(memory, **backfill)
    assert refused(**backfill)[retry] == "true"
    assert refused(**backfill)["dagster/priority"] == "-2", "behind iteration 1, before iteration 3"
    assert retry not in refused(), "outside of a backfill nobody promised iteration 1"
    assert retry not in refused(**{"dagster/backfill": "b2"})
    memory.report_run_failed(first)
    assert retry not in refused(**backfill), "iteration 1 has failed for good"
    memory.add_run_tags(first.run_id, {"dagster/will_retry": "true"})
    assert refused(**backfill)[retry] == "true"


@pytest.fixture
def retrying(place: Path) -> Iterator[dg.DagsterInstance]:
    """An instance that retries: every failure that it is told of promises a retry anew."""
    with dg.DagsterInstance.local_temp(str(place), overrides={"run_retries": launch.INSTANCE["run_retries"]}) as made:
        yield made


@pytest.mark.parametrize("why_quiet", ["", "made", "retried", "canceled"])
def test_a_promised_retry_that_dagster_has_overlooked_is_asked_for_once_then_withdrawn_and_told(
    retrying: dg.DagsterInstance, why_quiet: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = started(retrying, **({"dagster/backfill": "b1"} if why_quiet == "canceled" else {}))
    retrying.report_run_failed(run)
    assert recovery.settle_retries(retrying) == [], "it has its time"
    monkeypatch.setattr(recovery, "RETRY_SECONDS", -1.0)
    if why_quiet == "made":
        done = dg.DagsterEvent(
            "STEP_SUCCESS", job_name=run.job_name, step_key="promotion", event_specific_data=StepSuccessData(0.0)
        )
        retrying.report_dagster_event(done, run.run_id)
    if why_quiet == "retried":
        of = {"dagster/parent_run_id": run.run_id, "dagster/root_run_id": run.run_id}
        started(retrying, 1, dg.DagsterRunStatus.SUCCESS, **of)
    monkeypatch.setattr(retrying, "get_backfill", lambda _: SimpleNamespace(status=BulkActionStatus.CANCELED))

    def told() -> int:
        return len(retrying.all_logs(run.run_id, of_type=dg.DagsterEventType.RUN_FAILURE))

    def waiting() -> bool:
        found = retrying.get_run_by_id(run.run_id)
        assert found is not None
        return bool(found.is_complete_and_waiting_to_retry)

    assert (told(), waiting()) == (1, True)
    assert recovery.settle_retries(retrying) == [run.run_id]
    assert (told(), waiting()) == (2, True)
    assert recovery.settle_retries(retrying) == [run.run_id]
    assert (told(), waiting()) == (2 if why_quiet else 3, False)
    assert recovery.settle_retries(retrying) == []


def test_a_retry_that_was_started_and_the_retry_itself_are_left_alone(
    memory: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recovery, "RETRY_SECONDS", -1.0)
    first = started(memory, **{"dagster/will_retry": "true", "dagster/auto_retry_run_id": "another"})
    memory.report_run_failed(first)
    assert recovery.settle_retries(memory) == []
    inherited = started(memory, **{"dagster/will_retry": "true", recovery.REMINDED_TAG: first.run_id})
    memory.report_run_failed(inherited)
    assert recovery.settle_retries(memory) == [inherited.run_id]
    found = memory.get_run_by_id(inherited.run_id)
    assert found is not None
    assert found.is_complete_and_waiting_to_retry, "a tag that came with the parent's tags does not count"
