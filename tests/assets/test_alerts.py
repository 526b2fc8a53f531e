"""A failed run is told: in the log with its remedy, and at a webhook that may be broken in any way."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from assets_helpers import FakeSteps, iteration, write_config
from evolve_dag.assets import alerts, partitions
from evolve_dag.assets.resources import StoreResource

from evolve_dag.config import registry
from evolve_dag.errors import DataError


class Hook(ThreadingHTTPServer):
    """A webhook that answers what it is told to, one answer a call; the last one stays."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answers = [200]
        self.got: list[dict[str, Any]] = []
        self.pause = 0.0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/hook"


class _Handler(BaseHTTPRequestHandler):
    server: Hook

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append({"type": self.headers["Content-Type"], **json.loads(body)})
        time.sleep(self.server.pause)
        answers = self.server.answers
        self.send_response(answers.pop(0) if len(answers) > 1 else answers[0])
        self.send_header("Location", f"{self.server.address}/elsewhere")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def hook() -> Iterator[Hook]:
    with Hook() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        yield server
        server.shutdown()


def fail(instance: dg.DagsterInstance, fake: FakeSteps, error: BaseException) -> dg.ExecuteInProcessResult:
    """Iteration 1 of ``tiny`` with an adapter step that raises."""
    fake.fail["adapter"] = error
    result = iteration(instance, 1, check=False)
    instance.add_run_tags(result.run_id, {"dagster/partition/experiment": "tiny", "dagster/partition/iteration": "01"})
    return result


def tick(instance: dg.DagsterInstance, run_id: str) -> str:
    """What ``failure_watch`` says of a run."""
    run = instance.get_run_by_id(run_id)
    assert run is not None
    event = dg.DagsterEvent("PIPELINE_FAILURE", job_name=run.job_name, message="the run failed")
    context = dg.build_run_status_sensor_context(
        sensor_name="failure_watch",
        dagster_event=event,
        dagster_instance=instance,
        dagster_run=run,
        resources={"store": StoreResource()},
    ).for_run_failure()
    result = alerts.failure_watch(context)
    assert isinstance(result, dg.SkipReason)
    return str(result.skip_message)


def register(place: Path, **schedule: str) -> None:
    registry.register(registry.default_store(), write_config(place / "configs" / "tiny.yaml", schedule=schedule))


def test_a_failure_is_posted_with_its_step_and_remedy_and_without_secrets(
    fake: FakeSteps, place: Path, memory: dg.DagsterInstance, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHT_HOOK", hook.address)
    monkeypatch.setenv("SOME_API_KEY", "correct-horse-battery")
    register(place, webhook="NIGHT_HOOK")
    result = fail(memory, fake, DataError("401 for correct-horse-battery", "renew the key"))
    said = tick(memory, result.run_id)
    assert said.endswith("webhook: posted")
    [got] = hook.got
    assert {k: v for k, v in got.items() if k != "message"} == {
        "type": "application/json",
        "experiment": "tiny",
        "iteration": 1,
        "run_id": result.run_id,
        "failed_step": "adapter",
        "will_retry": False,
    }
    assert got["message"] == "401 for *** remedy: renew the key"
    assert "correct-horse" not in said
    assert hook.address not in said


def test_without_a_webhook_the_log_alone_is_told(fake: FakeSteps, place: Path, memory: dg.DagsterInstance) -> None:
    register(place)
    said = tick(memory, fail(memory, fake, DataError("no room", "free some")).run_id)
    assert "tiny: iteration 1 failed" in said
    assert said.endswith("no room remedy: free some")


def test_a_bug_is_told_with_its_own_message(fake: FakeSteps, place: Path, memory: dg.DagsterInstance) -> None:
    register(place)
    said = tick(memory, fail(memory, fake, ZeroDivisionError("division by zero")).run_id)
    assert "ZeroDivisionError: division by zero" in said


def test_a_run_that_is_started_again_is_not_posted(
    fake: FakeSteps, place: Path, memory: dg.DagsterInstance, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHT_HOOK", hook.address)
    register(place, webhook="NIGHT_HOOK")
    result = fail(memory, fake, DataError("no room"))
    memory.add_run_tags(result.run_id, {"dagster/will_retry": "true"})
    assert "started again by itself" in tick(memory, result.run_id)
    assert hook.got == []


def test_a_variable_that_is_not_set_fails_nothing(fake: FakeSteps, place: Path, memory: dg.DagsterInstance) -> None:
    register(place, webhook="NOT_SET_ANYWHERE")
    assert "webhook: the variable is not set" in tick(memory, fail(memory, fake, DataError("no room")).run_id)


BODY = {"experiment": "tiny", "message": "naïve ✓"}


@pytest.mark.parametrize(
    ("answers", "calls", "problem"),
    [
        ([200], 1, None),
        ([204], 1, None),
        ([500, 503, 200], 3, None),
        ([429, 200], 2, None),
        ([500], 3, "it answered 500, after 3 attempts"),
        ([404], 1, "it answered 404"),
        ([302], 1, "it answered 302"),
    ],
)
def test_a_webhook_is_tried_at_most_three_times(hook: Hook, answers: list[int], calls: int, problem: str | None) -> None:
    hook.answers = answers
    assert alerts.post(hook.address, BODY, pauses=(0.0, 0.0)) == problem
    assert len(hook.got) == calls
    assert hook.got[0]["message"] == BODY["message"]


def test_a_silent_webhook_costs_its_timeouts_and_no_more(hook: Hook) -> None:
    hook.pause = 1.0
    begun = time.monotonic()
    assert "after 3 attempts" in str(alerts.post(hook.address, BODY, timeout=0.1, pauses=(0.0, 0.0)))
    assert time.monotonic() - begun < 1.0
    assert len(alerts.PAUSES) == 2
    assert 3 * alerts.TIMEOUT_SECONDS + sum(alerts.PAUSES) < 30, "a sensor's tick ends after 60 s"


def test_nobody_at_home_and_nonsense_fail_nothing() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{probe.getsockname()[1]}/"
    assert "after 3 attempts" in str(alerts.post(nobody, BODY, pauses=(0.0, 0.0)))
    for address in ("", "file:///etc/passwd", "ftp://example.org", "http://", "http://[::1", "http://a b/"):
        assert alerts.post(address, BODY, pauses=(0.0, 0.0)), address


# -- a champion that had to give way


def decided(instance: dg.DagsterInstance, iteration: int, decision: str, **metadata: object) -> None:
    partitions.add_partitions(instance, ["tiny"], iteration)
    key = partitions.loop_key("tiny", iteration)
    facts = {"decision": decision, "reasons": dg.MetadataValue.md("- lost 2.0 points"), "best": 3, "recomputed": True}
    instance.report_runless_asset_event(dg.AssetMaterialization("promotion", partition=key, metadata=facts | metadata))


def look(instance: dg.DagsterInstance, cursor: str | None) -> tuple[str, str]:
    """What ``restore_watch`` says, and where the next tick begins."""
    context = dg.build_sensor_context(instance=instance, cursor=cursor, resources={"store": StoreResource()})
    result = alerts.restore_watch(context)
    assert isinstance(result, dg.SensorResult)
    return str(result.skip_reason.skip_message if result.skip_reason else ""), str(result.cursor)


def test_a_restored_champion_is_posted_once(
    place: Path, memory: dg.DagsterInstance, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHT_HOOK", hook.address)
    register(place, webhook="NIGHT_HOOK")
    _, cursor = look(memory, None)
    decided(memory, 5, "promote")
    decided(memory, 6, "restore")
    decided(memory, 7, "keep")
    said, cursor = look(memory, cursor)
    assert said.endswith("webhook: posted")
    [got] = hook.got
    assert (got["experiment"], got["iteration"], got["decision"], got["champion"]) == ("tiny", 6, "restore", 3)
    assert got["message"] == "the best champion so far (iteration 3) comes back:\n- lost 2.0 points"
    assert look(memory, cursor) == ("no champion was restored", cursor)
    assert len(hook.got) == 1


def test_a_tick_tells_of_one_restored_champion_and_the_next_tick_of_the_next(
    place: Path, memory: dg.DagsterInstance, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four that wait for a silent webhook would take longer than a tick may, and begin anew with every tick."""
    monkeypatch.setenv("NIGHT_HOOK", hook.address)
    register(place, webhook="NIGHT_HOOK")
    _, cursor = look(memory, None)
    for night, decision in enumerate(("restore", "promote", "restore", "keep"), 5):
        decided(memory, night, decision)
    for told in ([5], [5, 7], [5, 7]):
        _, cursor = look(memory, cursor)
        assert [got["iteration"] for got in hook.got] == told


def test_a_database_that_was_made_anew_is_looked_at_from_its_beginning(place: Path, memory: dg.DagsterInstance) -> None:
    register(place)
    assert look(memory, "3000") == ("no champion was restored", "0"), "nothing has the number that was seen last"
    decided(memory, 5, "restore")
    assert "iteration 5: the best champion" in look(memory, "0")[0]
    said, cursor = look(memory, "3000")
    assert said == "no champion was restored", "as at the first look of all"
    decided(memory, 6, "restore")
    assert "iteration 6: the best champion" in look(memory, cursor)[0]


def test_what_was_restored_before_the_first_look_or_found_again_is_no_news(
    place: Path, memory: dg.DagsterInstance, hook: Hook, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NIGHT_HOOK", hook.address)
    register(place, webhook="NIGHT_HOOK")
    decided(memory, 1, "restore")
    _, cursor = look(memory, None)
    decided(memory, 2, "restore", recomputed=False)
    assert look(memory, cursor)[0] == "no champion was restored"
    assert hook.got == []


def test_a_webhook_that_is_down_loses_the_message_and_nothing_else(
    place: Path, memory: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(alerts, "PAUSES", (0.0,))
    register(place, webhook="NOT_SET")
    _, cursor = look(memory, None)
    decided(memory, 2, "restore")
    said, following = look(memory, cursor)
    assert "iteration 2: the best champion so far (iteration 3) comes back" in said
    assert following != cursor
