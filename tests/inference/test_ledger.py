"""The ledger: sums, resuming, torn lines, threads, purposes."""

from __future__ import annotations

import asyncio
import json
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_dag.errors import ModelError
from evolve_dag.inference.ledger import Ledger, current_purpose, metered, purpose, summarize
from evolve_dag.inference.scripted import ScriptedModel
from evolve_dag.protocols import Completion, LanguageModel, Request, Sampling
from evolve_dag.records import Call, Message

CALL = Call("judge", "m", "verdict", "ok", 2, 100, 40, 7, 0.5, 0.25, None, 0)
REQUEST = Request((Message("user", "what now?"),), Sampling())


def test_totals_are_the_sums_per_role() -> None:
    ledger = Ledger()
    ledger.record(CALL)
    ledger.record(replace(CALL, attempts=1, cost=0.5, cut_characters=12))
    ledger.record(replace(CALL, outcome="error", prompt_tokens=0, cached_tokens=0, completion_tokens=0, cost=None, error="no"))
    ledger.record(replace(CALL, role="selector"))
    assert ledger.totals() == {
        "judge": {
            "calls": 3, "errors": 1, "attempts": 5, "prompt_tokens": 200, "cached_tokens": 80, "completion_tokens": 14,
            "seconds": 1.5, "cost": 0.75, "cut": 1,
        },
        "selector": {
            "calls": 1, "errors": 0, "attempts": 2, "prompt_tokens": 100, "cached_tokens": 40, "completion_tokens": 7,
            "seconds": 0.5, "cost": 0.25, "cut": 0,
        },
    }  # fmt: skip


def test_a_cost_is_whole_or_unknown() -> None:
    known, unknown = CALL, replace(CALL, cost=None)
    assert summarize([known, unknown])["judge"]["cost"] is None
    assert summarize([unknown, known])["judge"]["cost"] is None
    assert summarize([known, replace(unknown, outcome="error")])["judge"]["cost"] == 0.25
    assert summarize([]) == {}


def test_sums_by_model_and_purpose() -> None:
    calls = [CALL, replace(CALL, model="n"), replace(CALL, purpose="")]
    assert {name: row["calls"] for name, row in summarize(calls, "model").items()} == {"m": 2, "n": 1}
    assert {name: row["calls"] for name, row in summarize(calls, "purpose").items()} == {"verdict": 2, "": 1}


texts = st.text(max_size=30)
calls = st.builds(
    Call,
    role=st.sampled_from(["policy", "extractor"]),
    model=texts,
    purpose=texts,
    outcome=st.sampled_from(["ok", "error"]),
    attempts=st.integers(0, 9),
    prompt_tokens=st.integers(0, 10**6),
    cached_tokens=st.integers(0, 10**6),
    completion_tokens=st.integers(0, 10**6),
    seconds=st.floats(0, 1e4),
    cost=st.none() | st.floats(0, 10),
    error=st.none() | texts,
    cut_characters=st.integers(0, 10**6),
)


@given(before=st.lists(calls, max_size=5), after=st.lists(calls, max_size=5))
def test_a_resumed_ledger_holds_what_was_paid_before(tmp_path_factory: Any, before: list[Call], after: list[Call]) -> None:
    path = tmp_path_factory.mktemp("ledger") / "deep" / "calls.jsonl"
    first = Ledger(path)
    for call in before:
        first.record(call)
    second = Ledger(path)
    for call in after:
        second.record(call)
    assert second.calls() == before + after
    assert Ledger(path).calls() == before + after
    assert Ledger(path).torn == 0


@pytest.mark.parametrize("kept", [1, 40, -1])
def test_a_line_torn_by_a_kill_is_no_call_and_does_not_spoil_the_next(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "calls.jsonl"
    ledger = Ledger(path)
    ledger.record(CALL)
    ledger.record(replace(CALL, purpose="torn"))
    lines = path.read_bytes().split(b"\n")
    whole = kept == -1  # only the line feed is missing: the call is all there
    path.write_bytes(lines[0] + b"\n" + (lines[1] if whole else lines[1][:kept]))
    resumed = Ledger(path)
    resumed.record(replace(CALL, purpose="next"))
    assert [c.purpose for c in Ledger(path).calls()] == ["verdict", *(["torn"] if whole else []), "next"]
    assert Ledger(path).torn == resumed.torn == (0 if whole else 1)


def test_foreign_lines_count_as_torn(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    path.write_bytes(b'{"role": "judge"}\n[1]\n\xff\xfe\n\n')
    assert Ledger(path).calls() == []
    assert Ledger(path).torn == 3


def test_threads_and_ledgers_on_one_file_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "calls.jsonl"
    shared, other = Ledger(path), Ledger(path)

    def work(ledger: Ledger, name: str) -> None:
        for n in range(100):
            ledger.record(replace(CALL, purpose=f"{name}{n}", model="x" * 300))

    threads = [
        threading.Thread(target=work, args=(ledger, name)) for ledger, name in ((shared, "a"), (shared, "b"), (other, "c"))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(shared.calls()) == 200
    found = Ledger(path).calls()
    assert sorted(c.purpose for c in found) == sorted(f"{name}{n}" for name in "abc" for n in range(100))


def test_a_line_holds_every_field_by_name(tmp_path: Path) -> None:
    Ledger(tmp_path / "c.jsonl").record(CALL)
    assert json.loads((tmp_path / "c.jsonl").read_text()) == {
        "role": "judge", "model": "m", "purpose": "verdict", "outcome": "ok", "attempts": 2, "prompt_tokens": 100,
        "cached_tokens": 40, "completion_tokens": 7, "seconds": 0.5, "cost": 0.25, "error": None, "cut_characters": 0,
    }  # fmt: skip


def test_purposes_nest_and_follow_their_tasks() -> None:
    seen: list[str] = []

    async def look() -> None:
        await asyncio.sleep(0)
        seen.append(current_purpose())

    async def main() -> None:
        with purpose("outer"):
            started = asyncio.create_task(look())
            with purpose("inner"):
                await look()
            seen.append(current_purpose())
        seen.append(current_purpose())
        await started

    asyncio.run(main())
    assert seen == ["inner", "outer", "", "outer"]


def test_metered_records_completions_and_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "very-secret-value")

    class Told(ScriptedModel):
        async def generate(self, request: Request) -> Completion:
            done = await super().generate(request)
            return replace(done, token_ids=(1, 2, 3), prompt_tokens=9, cached_tokens=4, cut_characters=5)

    ledger = Ledger()
    inner = Told(["yes", ModelError("key very-secret-value is wrong")])
    model = metered(inner, "extractor", "tiny", ledger, purpose="summary")
    assert isinstance(model, LanguageModel)

    async def main() -> None:
        assert (await model.generate(REQUEST)).text == "yes"
        with purpose("critique"), pytest.raises(ModelError):
            await model.generate(REQUEST)
        model.release("s")
        await model.close()

    asyncio.run(main())
    good, bad = ledger.calls()
    assert good == Call("extractor", "tiny", "summary", "ok", 1, 9, 4, 3, good.seconds, None, None, 5)
    assert (bad.outcome, bad.purpose, bad.attempts, bad.prompt_tokens) == ("error", "critique", 1, 0)
    assert bad.error is not None
    assert "wrong" in bad.error
    assert "very-secret-value" not in bad.error
    assert inner.released == ["s"]
    assert inner.closed
    assert model.requests is inner.requests  # type: ignore[attr-defined]
