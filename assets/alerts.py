"""What is told while nobody looks: a run that failed, with the remedy, and a champion that had to give way to an earlier one. A
line in the log, and a call to a webhook."""

import json
import logging
import os
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import dagster as dg
from evolve_dag.assets import partitions, recovery
from evolve_dag.assets.resources import StoreResource

from evolve_dag.config import registry
from evolve_dag.errors import EvolveError
from evolve_dag.secrecy import excerpt

TIMEOUT_SECONDS = 5.0
PAUSES = (1.0, 3.0)
"""Seconds before the second and the third attempt."""
EACH_TICK = 50
"""Promotions that one tick looks at, at most."""
LONGEST = 2000
"""Characters of the message that are told."""


@dg.run_failure_sensor(
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=15,
    description="Logs why an iteration failed and how to mend it; posts it where `schedule.webhook` of its experiment says.",
)
def failure_watch(context: dg.RunFailureSensorContext, store: StoreResource) -> dg.SkipReason:
    run = context.dagster_run
    if not recovery.is_iteration(run):
        return dg.SkipReason(f"run {run.run_id[:8]} is not about an iteration")
    told = describe(run, failed_steps(context.instance, run.run_id), context.failure_event.message or "")
    line = f"{told['experiment']}: iteration {told['iteration']} failed (run {run.run_id[:8]}): {told['message']}"
    context.log.error(line)
    if told["will_retry"]:
        return dg.SkipReason(f"{line}\nIt is started again by itself.")
    return dg.SkipReason(f"{line}{_posted(context, store.path, told)}")


@dg.sensor(
    default_status=dg.DefaultSensorStatus.RUNNING,
    minimum_interval_seconds=30,
    description="Logs that the best champion so far came back, and posts it where `schedule.webhook` of its experiment says.",
)
def restore_watch(context: dg.SensorEvaluationContext, store: StoreResource) -> dg.SensorResult:
    """Looks at the promotions since the last tick, up to a second one to tell of; the first tick only notes where it begins."""
    cursor = int(context.cursor or 0)
    begun = context.cursor is not None and cursor <= _newest(context.instance)
    where = dg.AssetRecordsFilter(dg.AssetKey("promotion"), after_storage_id=cursor if begun else 0)
    records = context.instance.fetch_materializations(where, limit=EACH_TICK if begun else 1, ascending=begun).records
    seen, line = cursor if begun else 0, ""
    for record in records:
        told = _restored(record) if begun else None
        if told is not None:
            if line:  # a tick is cut off after 60 s, of which a silent webhook takes a third, and would begin anew for ever
                break
            line = f"{told['experiment']}: iteration {told['iteration']}: {told['message']}"
            context.log.warning(line)
            line += _posted(context, store.path, told)
        seen = record.storage_id
    return dg.SensorResult(skip_reason=line or "no champion was restored", cursor=str(seen))


def _newest(instance: dg.DagsterInstance) -> int:
    """Number of the newest promotion among Dagster's events: below what was seen where the database is another one by now."""
    newest = instance.fetch_materializations(dg.AssetKey("promotion"), limit=1).records
    return newest[0].storage_id if newest else 0


def _restored(record: dg.EventLogRecord) -> dict[str, Any] | None:
    """What is posted about a materialized promotion; None unless it restored the best champion just now."""
    made = record.asset_materialization
    if made is None or made.partition is None:
        return None
    facts = {
        name: value.value for name, value in made.metadata.items() if name in ("decision", "reasons", "best", "recomputed")
    }
    if facts.get("decision") != "restore" or not facts.get("recomputed", True):
        return None
    name, iteration = partitions.split(made.partition)
    return {
        "experiment": name,
        "iteration": iteration,
        "run_id": record.run_id,
        "decision": "restore",
        "champion": facts.get("best"),
        "message": f"the best champion so far (iteration {facts.get('best')}) comes back:\n{facts.get('reasons')}",
    }


def _posted(context: dg.RunFailureSensorContext | dg.SensorEvaluationContext, root: Path, told: dict[str, Any]) -> str:
    """Post to the experiment's webhook, if it has one; what became of it, as a line."""
    try:
        variable = registry.load(root, told["experiment"]).schedule.webhook
    except EvolveError as error:
        return f"\nnot posted: {error.what}"
    if not variable:
        return ""
    problem = post(os.environ.get(variable, ""), told)
    if problem:
        context.log.warning(f"the webhook in {variable} was not reached: {problem}")
    return f"\nwebhook: {problem or 'posted'}"


def failed_steps(instance: dg.DagsterInstance, run_id: str) -> list[tuple[str, str]]:
    """(step, message) of a run's failed steps, in order."""
    found = []
    for entry in instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE):
        event = entry.dagster_event
        if event is None or event.step_key is None:
            continue
        data = event.step_failure_data
        said = data.user_failure_data.description if data.user_failure_data else None
        error = data.error.cause if data.error and data.error.cause else data.error
        found.append((event.step_key, said or (error.message.strip() if error else "failed")))
    return found


def describe(run: dg.DagsterRun, steps: list[tuple[str, str]], otherwise: str) -> dict[str, Any]:
    """What is posted. ``failed_step`` is null when the run itself was lost; secrets are masked in the message."""
    step, message = steps[0] if steps else (None, otherwise or "the run ended without a word")
    return {
        "experiment": run.tags[partitions.EXPERIMENT_TAG],
        "iteration": recovery.iteration_of(run),
        "run_id": run.run_id,
        "failed_step": step,
        "message": excerpt(message, LONGEST),
        "will_retry": run.is_complete_and_waiting_to_retry,
    }


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would send the message on to an address that nobody named, or drop its body."""

    def redirect_request(self, *_: Any) -> None:
        return None


def post(
    address: str, body: dict[str, Any], *, timeout: float = TIMEOUT_SECONDS, pauses: tuple[float, ...] = PAUSES
) -> str | None:
    """POST JSON to a webhook, twice more when that fails; returns what is wrong, never raises and never names the address.

    An answer of 4xx (but 408 and 429) is final: the same body would be refused again.
    """
    if not address.lower().startswith(("http://", "https://")):
        return "the variable is not set, or holds no http(s) address"
    data = json.dumps(body, ensure_ascii=False).encode()
    opener = urllib.request.build_opener(_NoRedirect)
    problem = ""
    for pause in (*pauses, None):
        try:
            request = urllib.request.Request(address, data, {"Content-Type": "application/json"}, method="POST")
            with opener.open(request, timeout=timeout):
                return None
        except urllib.error.HTTPError as error:
            problem = f"it answered {error.code}"
            if 300 <= error.code < 500 and error.code not in (408, 429):
                return problem
        except Exception as error:  # an unusable address, a refused connection, half an answer: a webhook never fails anything
            problem = type(error).__name__
            logging.getLogger("evolve_dag").debug("webhook", exc_info=True)
        if pause is not None:
            time.sleep(pause)
    return f"{problem}, after {len(pauses) + 1} attempts"
