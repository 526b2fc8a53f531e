"""Runs that ended without a word: found, ended, and brought back into order.

Dagster's default launcher cannot ask whether a run's process still lives, so a machine that went down leaves runs that are
'started' for ever and block their experiment. Here every run holds a file lock as long as its process lives.
``lost_runs`` ends the runs whose lock is free; ``run_retries`` in ``dagster.yaml`` starts them again; the store resumes.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import dagster as dg
from dagster._core.errors import DagsterRunNotFoundError
from dagster._core.execution.backfill import BulkActionStatus
from dagster._core.storage.tags import (
    BACKFILL_ID_TAG,
    PRIORITY_TAG,
    RETRY_ON_ASSET_OR_OP_FAILURE_TAG,
    RUN_FAILURE_REASON_TAG,
    WILL_RETRY_TAG,
)
from dagster._time import get_current_timestamp
from evolve_dag.assets import partitions
from evolve_dag.assets.resources import StoreResource
from filelock import FileLock, Timeout

from evolve_dag.steps.base import STEP_ORDER

IN_PROGRESS = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]

GRACE_SECONDS = 180.0
"""Between a run's start and the lock of its first step lies the import of everything, on a machine that may be busy."""

RETRY_SECONDS = 60.0
"""Dagster starts a retry within seconds of the failure, or has overlooked it."""
REMINDED_TAG = "evolve/retry_reminded"
"""Run tag, the run's own id: Dagster was told of its failure a second time."""

_held: dict[Path, FileLock] = {}


def hold(root: Path, run_id: str) -> None:
    """Hold a run for the rest of this process, or until the process works on another run."""
    path = _lock_file(root, run_id)
    if path in _held:
        return
    # Without its lock a run is found lost late or never, which must fail neither that run nor the next.
    for earlier in list(_held):
        lock = _held.pop(earlier)
        with suppress(OSError):
            lock.release()
        with suppress(OSError):
            earlier.unlink()
    lock = FileLock(path, thread_local=False)
    with suppress(OSError, Timeout):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=5)  # lost_runs may be looking at this very moment
        _held[path] = lock


def is_lost(root: Path, record: dg.RunRecord) -> bool:
    """Whether a run of an iteration that counts as started has no process any more."""
    run = record.dagster_run
    if run.status not in (dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING) or not is_iteration(run):
        return False
    path = _lock_file(root, run.run_id)
    if path in _held:
        return False
    if not path.exists():
        started = record.start_time or record.create_timestamp.timestamp()
        return get_current_timestamp() - started > GRACE_SECONDS
    return _is_free(path)


def end_lost_runs(instance: dg.DagsterInstance, root: Path, name: str | None = None) -> list[str]:
    """End the lost runs (of one experiment), so that they block nothing and are retried; returns their ids."""
    tags = {partitions.EXPERIMENT_TAG: name} if name else None
    ended = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=IN_PROGRESS, tags=tags)):
        run = record.dagster_run
        if not is_lost(root, record):
            continue
        if run.status == dg.DagsterRunStatus.CANCELING:
            instance.report_run_canceled(run, "its process ended without a word")
        else:
            instance.report_run_failed(run, "its process ended without a word (killed, out of memory, machine down?)")
        with suppress(OSError):
            _lock_file(root, run.run_id).unlink()
        ended.append(run.run_id)
    return ended


def clear_locks(instance: dg.DagsterInstance, root: Path) -> None:
    """Remove the lock files of runs that are over: a killed one leaves its own."""
    for path in _leftovers(instance, root):
        with suppress(OSError):
            path.unlink()


def settle_retries(instance: dg.DagsterInstance) -> list[str]:
    """Remind Dagster of retries that it has promised and not started; returns the runs.

    The daemon reads a failure's event before the run's status is written, every so often, and then passes the run over for
    good; its backfill waits for the retry for ever. Told again, it starts the retry. What is not started then either is no
    longer promised, and told (``failure_watch``) where somebody waits for it.
    """
    promised = dg.RunsFilter(statuses=[dg.DagsterRunStatus.FAILURE], tags={WILL_RETRY_TAG: "true"})
    settled = []
    for record in instance.get_run_records(promised, limit=200):
        run = record.dagster_run
        since = get_current_timestamp() - (record.end_time or record.update_timestamp.timestamp())
        if not is_iteration(run) or not run.is_complete_and_waiting_to_retry or since < RETRY_SECONDS:
            continue
        if run.tags.get(REMINDED_TAG) != run.run_id:
            instance.add_run_tags(run.run_id, {REMINDED_TAG: run.run_id})
            instance.report_run_failed(run, "its retry was not started: asked for once more")
        else:
            if not _is_settled(instance, run):
                instance.report_run_failed(run, "its retry was not started either: run it again; what was made is kept")
            instance.add_run_tags(run.run_id, {WILL_RETRY_TAG: "false"})  # last: a failure promises anew
        settled.append(run.run_id)
    return settled


def _is_settled(instance: dg.DagsterInstance, run: dg.DagsterRun) -> bool:
    """Whether nobody waits for a run's retry: it had made its last step, another retry went well, its backfill was canceled."""
    made = instance.all_logs(run.run_id, of_type=dg.DagsterEventType.STEP_SUCCESS)
    if any(entry.dagster_event and entry.dagster_event.step_key == STEP_ORDER[-1] for entry in made):
        return True
    with suppress(DagsterRunNotFoundError):  # the first run of the group was deleted
        group = instance.get_run_group(run.run_id)
        if group and any(one.status == dg.DagsterRunStatus.SUCCESS for one in group[1]):
            return True
    backfill = instance.get_backfill(run.tags[BACKFILL_ID_TAG]) if BACKFILL_ID_TAG in run.tags else None
    return backfill is not None and backfill.status in (BulkActionStatus.CANCELING, BulkActionStatus.CANCELED)


@dg.sensor(
    minimum_interval_seconds=20,
    default_status=dg.DefaultSensorStatus.RUNNING,
    description="Ends runs whose process is gone. `run_retries` of dagster.yaml starts them again; the store resumes.",
)
def lost_runs(context: dg.SensorEvaluationContext, store: StoreResource) -> dg.SkipReason:
    ended = end_lost_runs(context.instance, store.path)
    for run_id in ended:
        context.log.warning(f"run {run_id} has no process any more: ended")
    for run_id in settle_retries(context.instance):
        context.log.warning(f"run {run_id} was to be retried and was not: Dagster is reminded, then released")
    clear_locks(context.instance, store.path)
    return dg.SkipReason(f"ended: {', '.join(ended)}" if ended else "every run that counts as started has its process")


def ask_for_another_turn(context: dg.AssetExecutionContext) -> None:
    """Within a backfill: retry this run, which came before its turn, behind the iteration that it waits for.

    When iteration k is lost, the queue goes on with k+1 before k is started again. k+1 rightly refuses; without another turn
    the backfill would end there. Earlier iterations get the higher priority.
    """
    run = context.run
    backfill = run.tags.get(BACKFILL_ID_TAG)
    if backfill is None:
        return
    name, iteration = partitions.split(context.partition_key)
    siblings = context.instance.get_runs(dg.RunsFilter(tags={BACKFILL_ID_TAG: backfill, partitions.EXPERIMENT_TAG: name}))
    earlier = [one for one in siblings if is_iteration(one) and iteration_of(one) < iteration]
    if any(not one.is_finished or one.is_complete_and_waiting_to_retry for one in earlier):
        tags = {RETRY_ON_ASSET_OR_OP_FAILURE_TAG: "true", PRIORITY_TAG: str(-iteration)}
        context.instance.add_run_tags(run.run_id, tags)


def is_iteration(run: dg.DagsterRun) -> bool:
    """Whether a run is about one iteration of one experiment."""
    return partitions.EXPERIMENT_TAG in run.tags and run.tags.get(partitions.ITERATION_TAG, "").isdecimal()


def iteration_of(run: dg.DagsterRun) -> int:
    """Number of a run's iteration."""
    return int(run.tags[partitions.ITERATION_TAG])


def failed_by_a_step(run: dg.DagsterRun) -> bool:
    """Whether a failed run failed because a step said so, and not because its process or its launch was lost."""
    return run.tags.get(RUN_FAILURE_REASON_TAG) == "STEP_FAILURE"


def _lock_file(root: Path, run_id: str) -> Path:
    return root.resolve() / "locks" / f"run-{run_id}.lock"


def _is_free(path: Path) -> bool:
    lock = FileLock(path, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return False
    lock.release()
    return True


def _leftovers(instance: dg.DagsterInstance, root: Path) -> Iterator[Path]:
    """Lock files of runs that are over."""
    files = {path.name.removeprefix("run-").removesuffix(".lock"): path for path in (root / "locks").glob("run-*.lock")}
    if files:
        live = {run.run_id for run in instance.get_runs(dg.RunsFilter(run_ids=list(files), statuses=IN_PROGRESS))}
        yield from (path for run_id, path in files.items() if run_id not in live and path.resolve() not in _held)
