"""A whole iteration whose extractor, selector and judge sit behind an endpoint.

With a fifth of its answers failing, the artifacts are those of a calm endpoint, nothing is lost or counted twice, and the
ledger adds up.
"""

from __future__ import annotations

import hashlib
import json
import re
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from misbehaving import Endpoint, Fault, at_random

from evolve_dag import secrecy
from evolve_dag.agent import rollouts
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import UnjudgedError
from evolve_dag.inference.openai import OpenAIModel
from evolve_dag.records import Task
from evolve_dag.steps.adapter import share_of
from evolve_dag.steps.base import STEP_ORDER, resolve, run_step
from evolve_dag.store.artifacts import Artifact, Store
from evolve_dag.store.layout import CALLS
from evolve_dag.store.query import run_sql

LESSONS = (
    "Verify: when a search lists a page, visit it before you answer.",
    "Follow: when a page points to another page, visit that page next.",
    "Reword: when a search finds nothing, search the name alone.",
    "Continue: when an answer needs one more fact, search what was just found.",
    "Stop: when the page states the fact that was asked for, answer at once.",
)


def helper(body: dict[str, Any]) -> str:
    """Extractor, selector and judge in one; what it says follows from the request alone."""
    text = body["messages"][-1]["content"]
    number = int(hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest(), 16)
    keys = set(body.get("response_format", {}).get("json_schema", {}).get("schema", {}).get("properties", {}))
    if "items" in keys:
        return json.dumps({"items": [{"text": LESSONS[(number + n) % 5], "why": "they parted there"} for n in range(2)]})
    if "decisions" in keys:
        return json.dumps({"decisions": []})
    if "deletes" in keys or "merges" in keys:
        return json.dumps({key: [] for key in keys})
    if "ids" in keys:
        pool = sorted(set(re.findall(r"\bp\d{4}\b", text)))
        return json.dumps({"ids": [pool[number % len(pool)]], "rationale": "it fits"})
    if "Correct or Incorrect" in text:
        given, reference = (text.split(f"<{tag}>\n")[-1].split(f"\n</{tag}>")[0] for tag in ("given", "reference"))
        return "Correct" if reference.casefold() in given.casefold() else "Incorrect"
    return "Path: it searched and answered. Facts: none. Turning point: the first step."


def experiment(url: str, **changes: Any) -> Experiment:
    model = {"backend": "openai", "model": "helper", "endpoints": (url,), "price_prompt": 1.0, "price_completion": 2.0}
    return Experiment.model_validate(
        {
            "experiment": "remote",
            "seed": 3,
            "models": {"extractor": model, "selector": model, "judge": model},
            "verification": {"kind": "judge"},
            "tasks": {
                "train": {"count": 8, "world": 13},
                "development": {"count": 4, "world": 23},
                "held_out": {"count": 4, "world": 33},
            },
            "extraction": {"extractor": "llm", "cap": 4},
            "selection": {"selector": "llm", "min_items": 1, "max_items": 2},
            "distillation": {"epochs": 1},
            "evaluation": {"bootstrap": 100, "greedy": False},
            "runtime": {
                "threads": 1,
                "concurrency": 1,
            },  # batches of one: what is sampled must not depend on who waits for whom
        }
        | changes
    )


def content(artifact: Artifact) -> dict[str, Any]:
    """What an artifact holds, but for wall times and the calls' own record."""
    found: dict[str, Any] = {}
    for name in set(artifact.manifest.files) - {CALLS}:
        if name.endswith(".parquet"):
            frame = artifact.frame(name)
            found[name] = frame.drop([c for c in frame.columns if c.startswith(("seconds", "tokens_per_second"))])
            if "logprobs" in frame.columns:  # who shares a batch with whom differs, and with it the last bits
                found[name] = found[name].drop("logprobs")
                found[f"{name}: logprobs"] = pytest.approx(frame["logprobs"].explode().drop_nulls().to_list(), abs=1e-4)
        else:
            found[name] = artifact.file(name).read_bytes()
    return found


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pauses between attempts that fit a test."""
    made = OpenAIModel.__init__

    def patient(self: OpenAIModel, *args: Any, **keys: Any) -> None:
        made(self, *args, **{**keys, "pause": 0.001, "longest_pause": 0.01})

    monkeypatch.setattr(OpenAIModel, "__init__", patient)


def iterate(folder: Path, **faults: Any) -> tuple[dict[str, Artifact], Endpoint]:
    with Endpoint(helper, **faults) as endpoint:
        store = Store(folder)
        made = {step: run_step(step, experiment(endpoint.url), 1, store).artifact for step in STEP_ORDER}
    return made, endpoint


def test_a_fifth_of_the_answers_failing_changes_nothing(tmp_path: Path, quick: None) -> None:
    calm, quiet = iterate(tmp_path / "calm")
    shaken, noisy = iterate(tmp_path / "shaken", script=at_random(0.2, seed=7))
    assert calm["experience"].summary["items"] > 0
    assert calm["contexts"].summary["kept"] > 0
    assert sum(noisy.served.faults.values()) > 10
    for step in STEP_ORDER:
        assert shaken[step].digest == calm[step].digest
        one, other = content(calm[step]), content(shaken[step])
        assert one.keys() == other.keys()
        for name, value in one.items():
            if name.endswith(": logprobs"):
                assert value == other[name].expected, f"{step}: {name}"
                continue
            same = value.equals(other[name]) if isinstance(value, pl.DataFrame) else value == other[name]
            assert same, f"{step}: {name}"

    for made, endpoint in ((calm, quiet), (shaken, noisy)):
        calls = [totals for step in STEP_ORDER for totals in made[step].summary.get("calls", {}).values()]
        assert sum(c["calls"] for c in calls) == endpoint.served.answers
        assert sum(c["errors"] for c in calls) == 0
        assert sum(c["prompt_tokens"] for c in calls) == endpoint.served.prompt_tokens
        assert sum(c["completion_tokens"] for c in calls) == endpoint.served.completion_tokens
        cost = (endpoint.served.prompt_tokens + 2 * endpoint.served.completion_tokens) / 1e6
        assert sum(c["cost"] for c in calls) == pytest.approx(cost)
    assert run_sql(Store(tmp_path / "shaken"), "select count(*) n from calls")["n"][0] == sum(c["calls"] for c in calls)
    roles = {role for step in STEP_ORDER for role in calm[step].summary.get("calls", {})}
    assert roles == {"extractor", "selector", "judge"}


def test_a_night_without_its_judge_is_not_stored_and_only_the_verdicts_are_made_up_for(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The account is empty, or the key was withdrawn: what was played is paid for, and stands."""
    store = Store(tmp_path)
    with Endpoint(helper, script=lambda body, seen: Fault("401")) as shut:
        run_step("policy", experiment(shut.url), 1, store)
        told = r"rollouts: \d+ of 32 episodes have no verdict.*judge model helper.*401"
        with pytest.raises(UnjudgedError, match=told) as stopped:
            run_step("trajectories", experiment(shut.url), 1, store)
    assert "the same command" in stopped.value.remedy
    assert not resolve("trajectories", experiment(shut.url), 1, store).exists

    async def played(*_: Any, **__: Any) -> None:
        raise AssertionError("played again")

    monkeypatch.setattr(rollouts, "run_episode", played)
    with Endpoint(helper) as back:
        made = run_step("trajectories", experiment(back.url), 1, store).artifact
    assert made.summary["judged"] == made.summary["trajectories"] == 32
    assert set(made.frame("trajectories.parquet")["error"]) == {None}


def test_an_outage_while_trajectories_are_sampled_anew_stops_the_training(tmp_path: Path, quick: None) -> None:
    """On-policy with refresh: what is left of a round would be learned from, and stand."""
    on_policy = {"regime": {"preset": "on_policy", "rejection": True}, "teacher_check": {"enabled": False}}
    anew = on_policy | {"distillation": {"epochs": 1, "refresh": 2}}
    store = Store(tmp_path)
    with Endpoint(helper) as endpoint:
        for step in STEP_ORDER[: STEP_ORDER.index("adapter")]:
            run_step(step, experiment(endpoint.url, **anew), 1, store)
    with Endpoint(helper, script=lambda body, seen: Fault("401")) as shut:
        told = r"sampled anew, round 1: \d+ of \d+ episodes have no verdict.*401"
        with pytest.raises(UnjudgedError, match=told):
            run_step("adapter", experiment(shut.url, **anew), 1, store)
    assert not resolve("adapter", experiment(shut.url, **anew), 1, store).exists
    with Endpoint(helper) as back:
        made = run_step("adapter", experiment(back.url, **anew), 1, store).artifact
    assert made.summary["refreshes"] == 1


@pytest.mark.parametrize("refresh", [2, 3, 4, 7])
def test_every_task_is_asked_once_while_trajectories_are_sampled_anew(refresh: int) -> None:
    tasks = [Task(str(n), f"{n}?", "x") for n in range(11)]
    shares = [share_of(tasks, number, refresh) for number in range(1, refresh)]
    assert sorted((task for share in shares for task in share), key=tasks.index) == tasks
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert share_of(tasks[:1], 2, 3) == tasks[:1], "fewer tasks than rounds"


KEY = "Zq9vK2xWb7LmT4YpRg6N"


def texts_of(store: Path) -> Iterator[tuple[str, str]]:
    """All that a store's files say, by name: tables and databases unpacked."""
    for path in store.rglob("*"):
        if path.suffix == ".parquet":
            yield path.name, pl.read_parquet(path).write_json()
        elif path.suffix == ".sqlite":
            with sqlite3.connect(path) as connection:
                yield path.name, str(connection.execute("select * from memory").fetchall())
        elif path.is_file():
            yield path.name, path.read_bytes().decode("latin-1")


def test_an_endpoint_that_says_the_key_back_leaves_no_piece_of_it(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In good answers, which are remembered and learned from, and in errors, which the ledger keeps."""
    monkeypatch.setattr(secrecy, "_keys", set())
    monkeypatch.setenv("HELPER_WORD", KEY)

    def echoing(body: dict[str, Any]) -> str:
        said = helper(body)
        try:
            value = json.loads(said)
        except ValueError:
            return f"{said} (asked with {KEY})"
        for name in ("items", "rationale"):
            if isinstance(value.get(name), str):
                value[name] += f" {KEY}"
            elif isinstance(value.get(name), list):
                value[name] = [{**item, "why": f"as {KEY} says"} for item in value[name]]
        return json.dumps(value)

    def cut_key(body: dict[str, Any], seen: int) -> Fault | None:
        number = int(hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest(), 16)
        always = (
            "Correct or Incorrect" in str(body) and number % 11 == 0
        )  # some verdicts never come: those calls end in an error
        return Fault("500", message="." * (number % 320) + KEY) if seen == 0 or always else None

    with Endpoint(echoing, script=cut_key) as endpoint:
        content = experiment(endpoint.url).model_dump(mode="json")
        for role in ("extractor", "selector", "judge"):
            content["models"][role] |= {"key": "HELPER_WORD", "attempts": 2}
        content["tasks"]["train"]["count"] = 4
        told = Experiment.model_validate(content)
        store = Store(tmp_path)
        for step in ("policy", "trajectories", "experience"):
            run_step(step, told, 1, store)
    assert sum(endpoint.served.faults.values()) > 4
    pieces = [KEY[n : n + 4] for n in range(len(KEY) - 3)]
    assert not {(name, piece) for name, text in texts_of(tmp_path) for piece in pieces if piece in text}
    for name in ("memory.sqlite", "calls.parquet"):  # it was there
        assert any("***" in text for other, text in texts_of(tmp_path) if other == name), name
