"""Reading a lineage from a real store, as far as it has come."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from lineages import lineage, metrics

from evolve_dag.config import registry
from evolve_dag.errors import DataError, OrderError, StoreError
from evolve_dag.evaluation.gate import GateDecision, gate_to_json
from evolve_dag.evaluation.metrics import metrics_to_json
from evolve_dag.records import ExperienceItem, Score, Standing
from evolve_dag.reporting.summary import (
    IterationRow,
    LineageSummary,
    count,
    dollars,
    duration,
    mean_count,
    number,
    percent,
    percent_interval,
    standing_note,
    status_json,
    summarize,
)
from evolve_dag.store.artifacts import Artifact, Build, Store
from evolve_dag.store.frames import items_to_frame, scores_to_frame

BASE, FIRST, WITH = metrics(0.28, 0.76, 3.9, 0.0), metrics(0.6, 0.3, 4.9, 0.01), metrics(0.7, 0.2, 5.0, 0.01)
ITEM = ExperienceItem("p-001", "Verify: when a listing shows it, visit the page.", "principle", created=1, updated=1)


def make(store: Store, kind: str, body: Callable[[Build], Any] | None = None, **config: Any) -> Artifact:
    digest = Store.digest_of(kind, "1", config, {})
    with store.build(kind, digest, code_version="1", config=config, inputs={}) as build:
        if body is not None:
            body(build)
    return store.open(kind, digest)


def put(store: Store, iteration: int, kind: str, body: Callable[[Build], Any] | None = None, **config: Any) -> Artifact:
    artifact = make(store, kind, body, iteration=iteration, **config)
    store.set_ref("pocket", iteration, kind, artifact.digest, recomputed=True)
    return artifact


def write(name: str, content: Any) -> Callable[[Build], Any]:
    return lambda build: (build.path / name).write_text(json.dumps(content))


def experience(build: Build) -> None:
    items_to_frame([ITEM]).write_parquet(build.path / "items.parquet")
    shares = {"items": 1, "url": 0.0, "number": 0.0, "entity": 0.0, "strategy": 1.0}
    build.note(items=1, added=1, updated=0, deleted=0, merged=0, locality=shares)


def adapter(build: Build) -> None:
    import polars as pl

    pl.DataFrame({"step": [0, 1, 2], "loss": [0.5, float("nan"), 0.25]}).write_parquet(build.path / "curve.parquet")
    build.note(rows=10, loss_first=0.5, loss_last=0.25, tokens=0)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "store")
    put(store, 1, "policy")
    put(store, 1, "trajectories", lambda build: build.note(tokens=1234), seed=7)
    put(store, 1, "experience", experience, granularity="principle")
    put(store, 1, "adapter", adapter)
    scores = {"base": metrics_to_json(BASE), "without": metrics_to_json(FIRST), "with": metrics_to_json(WITH)}
    put(store, 1, "scores", write("summary.json", scores))
    decision = gate_to_json(GateDecision("promote", ("success 60%",), {"success_difference": 0.3}))
    leaving = {"base": "b", "adapter": None, "experience": None}
    put(store, 1, "promotion", write("decision.json", {**decision, "policy": leaving}))
    put(store, 2, "policy")  # a promotion commits the next policy at once
    return store


def test_everything_that_the_steps_write_is_read(store: Store) -> None:
    summary = summarize(store, "pocket")
    assert [row.iteration for row in summary.rows] == [0, 1], "iteration 2 has not begun"
    base, first = summary.rows
    assert base.without == BASE
    assert first.without == FIRST
    assert first.with_experience == WITH
    assert first.greedy is None
    assert first.items == (ITEM,)
    assert first.pool_size == 1
    assert first.edits == {"added": 1, "updated": 0, "deleted": 0, "merged": 0}
    assert first.locality == {"url": 0.0, "number": 0.0, "entity": 0.0, "strategy": 1.0}, "the count is no share"
    assert first.gate is not None
    assert first.gate.decision == "promote"
    assert summary.champion == 1
    assert [step.name for step in first.steps] == ["policy", "trajectories", "experience", "adapter", "scores", "promotion"]
    assert [step.tokens for step in first.steps] == [None, 1234, None, 0, None, None]
    assert all(step.recomputed for step in first.steps)
    assert [record["loss"] for record in first.curve] == [0.5, 0.25], "a skipped batch has no loss"
    assert summary.settings == {"granularity": "principle", "seed": 7}
    assert summary.command == "evolve run configs/pocket.yaml --iterations 1"
    assert summary.tokens == 1234


def test_what_is_sampled_as_extractor_or_selector_counts(tmp_path: Path) -> None:
    """Also where the policy plays the role: the step's own count is of its episodes alone. Verdicts are the store's."""
    store = Store(tmp_path / "store")
    put(store, 1, "policy")
    rollouts = {"policy": {"completion_tokens": 100}, "selector": {"completion_tokens": 9}, "judge": {"completion_tokens": 50}}
    put(store, 1, "trajectories", lambda build: build.note(tokens=100, calls=rollouts))
    put(store, 1, "experience", lambda build: build.note(calls={"extractor": {"completion_tokens": 7}}))
    put(store, 1, "promotion", write("decision.json", gate_to_json(GateDecision("keep", ("x",), {}))))
    summary = summarize(store, "pocket")
    assert {step.name: step.tokens for step in summary.rows[-1].steps} == {
        "policy": None, "trajectories": 109, "experience": 7, "promotion": None,
    }  # fmt: skip
    assert summary.tokens == 116


def test_what_the_environment_ended_is_counted_in_nights_of_an_earlier_version(store: Store) -> None:
    def scored(build: Build) -> None:
        write("summary.json", {"without": metrics_to_json(FIRST)})(build)
        rows = [
            Score(f"t{n}", 0, "without", float(n == 0), False, "ended" if n < 3 else "failed", 1, 1, None) for n in range(4)
        ]
        scores_to_frame([*rows, replace(rows[3], condition="with")]).write_parquet(build.path / "scores.parquet")

    put(store, 1, "scores", scored, confidence=0.95)
    assert FIRST.ended is None
    row = summarize(store, "pocket").rows[-1]
    assert row.without == replace(FIRST, ended=0.75, ended_solved=0.25)


def test_the_run_says_what_it_recomputed(store: Store) -> None:
    summary = summarize(store, "pocket", config="my/pocket.yaml", recomputed={(1, "adapter"): False})
    assert {step.name: step.recomputed for step in summary.rows[1].steps}["adapter"] is False
    assert summary.command.startswith("evolve run my/pocket.yaml ")


def test_another_seed_is_part_of_the_command(store: Store) -> None:
    digest = make(store, "trajectories", seed=7).digest
    store.set_ref("pocket-s7", 1, "trajectories", digest)
    assert summarize(store, "pocket-s7").command == "evolve run configs/pocket.yaml --seed 7 --iterations 1"
    odd = "my configs/it's.yaml"
    assert shlex.split(summarize(store, "pocket-s7", config=odd).command)[:3] == ["evolve", "run", odd]


def test_the_command_names_the_file_on_record(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = store.root.parent
    monkeypatch.chdir(folder)
    monkeypatch.delenv(registry.CONFIGS_VARIABLE, raising=False)
    (folder / "mine.yaml").write_text("experiment: pocket\n")
    registry.register(store.root, Path("mine.yaml"))
    assert summarize(store, "pocket").command == "evolve run mine.yaml --iterations 1"
    for name in ("pocket-s9", "pocket-s09x"):
        with pytest.raises(OrderError) as raised:
            summarize(store, name)
        seeded = "evolve run mine.yaml --seed 9" if name == "pocket-s9" else f"evolve run configs/{name}.yaml"
        assert raised.value.remedy == f"run it first: {seeded}"
    registry.register(store.root, Path("mine.yaml"), seed=9)
    store.set_ref("pocket-s9", 1, "trajectories", make(store, "trajectories", seed=9).digest)
    assert summarize(store, "pocket-s9").command == "evolve run mine.yaml --seed 9 --iterations 1"


def test_a_lineage_that_has_just_begun(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    put(store, 1, "policy")
    summary = summarize(store, "pocket")
    assert [row.iteration for row in summary.rows] == [1]
    assert summary.rows[0].without is None
    assert summary.champion is None
    assert json.loads(json.dumps(status_json(summary)))["iterations"][0]["gate"] is None


def test_a_declined_candidate_leaves_the_champion(store: Store) -> None:
    put(store, 2, "promotion", write("decision.json", gate_to_json(GateDecision("keep", ("worse",), {}))))
    assert summarize(store, "pocket").champion == 1


def decide(store: Store, iteration: int, decision: Any, standing: Standing, **evidence: float) -> None:
    gate = GateDecision(decision, ("a reason",), evidence, standing)
    put(store, iteration, "promotion", write("decision.json", gate_to_json(gate)), best=standing.best)


def test_the_distance_to_the_best_is_the_champions_and_not_that_of_a_declined_candidate(store: Store) -> None:
    decide(store, 1, "promote", Standing(1, 1))
    assert standing_note(summarize(store, "pocket")) == "The champion is the candidate of iteration 1. It is the best so far."
    decide(store, 2, "promote", Standing(2, 1), success_difference=-0.02, success_low=-0.05, success_high=0.01)
    drift = {"drift_evidence": 7.3, "drift_needed": 20.0}
    decide(store, 3, "keep", Standing(2, 1, nights=2, lost=0.06), success_difference=-0.1, **drift)
    summary = summarize(store, "pocket")
    assert (summary.champion, summary.best) == (2, 1)
    assert standing_note(summary) == (
        "The champion is the candidate of iteration 2. The best so far is the candidate of iteration 1. Champion against best: "
        "-2.0 points (-5.0 to +1.0). Candidates since the best: -6.0 points on average over 2 nights; evidence of a drift 7.3, "
        "established from 20."
    )
    first = GateDecision("promote", ("a reason",), drift, Standing(1, 0, nights=1, lost=0.02))
    assert "-2.0 points on average over 1 night; evidence" in standing_note(LineageSummary("x", (IterationRow(1, gate=first),)))
    content = json.loads(json.dumps(status_json(summary)))
    assert content["best"] == 1
    assert content["distance_to_best"] == {"difference": -0.02, "low": -0.05, "high": 0.01}


def test_a_restored_champion_holds_and_later_candidates_that_are_declined_leave_it(store: Store) -> None:
    decide(store, 1, "promote", Standing(1, 1))
    decide(store, 2, "promote", Standing(2, 1))
    decide(store, 3, "restore", Standing(1, 1))
    assert summarize(store, "pocket").champion == 1
    decide(store, 4, "keep", Standing(1, 1, nights=1))
    summary = summarize(store, "pocket")
    assert (summary.champion, summary.best, summary.distance) == (1, 1, (0.0, 0.0, 0.0))


def test_decisions_of_an_earlier_version_say_nothing_about_a_best_one(store: Store) -> None:
    summary = summarize(store, "pocket")
    assert (summary.champion, summary.best, summary.distance) == (1, None, None)
    assert standing_note(summary) == "The champion is the candidate of iteration 1."


def test_an_unknown_experiment_names_the_known_ones(store: Store) -> None:
    with pytest.raises(OrderError, match=r"'pockt' has not been run .*it holds pocket"):
        summarize(store, "pockt")


def test_an_empty_store_stays_empty(tmp_path: Path) -> None:
    with pytest.raises(OrderError, match=r"it is empty"):
        summarize(Store(tmp_path / "none"), "pocket")
    assert not (tmp_path / "none").exists()


def test_a_corrupt_artifact_is_told(store: Store) -> None:
    ref = store.ref("pocket", 1, "scores")
    assert ref is not None
    (store.root / "objects" / "scores" / ref.digest / "summary.json").write_text("{}")
    with pytest.raises(StoreError, match=r"summary\.json"):
        summarize(store, "pocket")


@pytest.mark.parametrize("content", [[], {"without": {"n": 3}}, {"without": 3}])
def test_scores_of_another_shape_are_told_with_their_file(tmp_path: Path, content: Any) -> None:
    store = Store(tmp_path / "store")
    put(store, 1, "scores", write("summary.json", content))
    with pytest.raises(DataError, match=r"summary\.json"):
        summarize(store, "pocket")


def test_status_is_json_with_everything() -> None:
    summary = lineage(declined=(3,))
    content = json.loads(json.dumps(status_json(summary), allow_nan=False))
    assert content["champion"] == 2
    assert [row["iteration"] for row in content["iterations"]] == [0, 1, 2, 3]
    last = content["iterations"][3]
    assert last["without"]["success"] == 0.81
    assert last["without"]["intervals"]["success"][0] < 0.81
    assert last["gate"]["decision"] == "keep"
    assert last["pool"]["items"] == 6
    assert set(last["steps"]["adapter"]) == {"digest", "seconds", "tokens", "recomputed", "resumed", "created"}
    steps = [step for row in content["iterations"] for step in row["steps"].values()]
    assert content["seconds"] == pytest.approx(sum(step["seconds"] for step in steps))


@pytest.mark.parametrize(
    ("shown", "expected"),
    [
        (percent(None), "–"),
        (percent(0.0), "0.0%"),
        (percent_interval(None), ""),
        (percent_interval((0.551, 0.67)), "55.1–67.0"),
        (number(5.213), "5.21"),
        (duration(7.42), "7.4 s"),
        (duration(99.96), "1 min 40 s"),
        (duration(185), "3 min 05 s"),
        (duration(7800), "2 h 10 min"),
        (count(None), "–"),
        (count(950), "950"),
        (count(41_200), "41.2k"),
        (count(999), "999"),
        (count(999_949), "999.9k"),
        (count(999_960), "1.0M"),
        (count(1_500_000), "1.5M"),
        (count(999_990_000), "1.0G"),
        (dollars(None), "–"),
        (dollars(0.0), "$0.00"),
        (dollars(0.00005), "$0.00005"),
        (dollars(0.0123), "$0.012"),
        (dollars(0.999), "$1.00"),
        (mean_count(7.333), "7.33"),
        (mean_count(999.6), "1000"),
        (mean_count(1250.5), "1250"),
    ],
)
def test_how_values_are_shown(shown: str, expected: str) -> None:
    assert shown == expected


def test_calls_and_their_cost_come_with_the_step(store: Store) -> None:
    paid = {"extractor": {"calls": 2, "cost": 0.5}, "judge": {"calls": 1, "cost": 0.25}}
    put(store, 1, "experience", lambda build: (experience(build), build.note(calls=paid)), granularity="instance")
    put(store, 1, "contexts", lambda build: build.note(calls={"selector": {"calls": 1, "cost": None}}), seed=1)
    steps = {step.name: step for step in summarize(store, "pocket").rows[-1].steps}
    assert steps["experience"].calls == paid
    assert steps["experience"].cost == 0.75
    assert steps["contexts"].cost is None, "unknown is not 0"
    assert (steps["adapter"].calls, steps["adapter"].cost) == ({}, None)
    told = status_json(summarize(store, "pocket"))["iterations"][-1]["steps"]
    assert told["experience"]["cost"] == 0.75
    assert "calls" not in told["adapter"]
