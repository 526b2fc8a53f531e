"""The recorded decision: who enters the next iteration, and what becomes of a best champion that is gone. Bodies that write one
line take the place of the other steps."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evolve_dag.config.schema import Experiment
from evolve_dag.errors import AwayError, OrderError
from evolve_dag.evaluation.betting import Capital
from evolve_dag.experience.pool import Pool
from evolve_dag.lineage import garbage
from evolve_dag.records import ExperienceItem, Finding, Score, Standing
from evolve_dag.steps import base, promotion
from evolve_dag.steps import scores as scoring
from evolve_dag.steps.base import STEP_ORDER, entering_policy, resolve, run_step
from evolve_dag.steps.body import StepContext
from evolve_dag.steps.policies import open_pool
from evolve_dag.steps.scores import AGAINST, OF_BEST, OF_CANDIDATE
from evolve_dag.store.artifacts import Store
from evolve_dag.store.frames import scores_to_frame
from evolve_dag.store.mirror import Mirror, MirroredStore

TASKS = 200
WORLDS = {
    "train": {"count": 10, "world": 12},
    "development": {"count": TASKS, "world": 22},
    "held_out": {"count": 6, "world": 32},
}
EVEN, BETTER, SLIGHTLY = (5, 5), (0, 60), (9, 3)
"""Tasks that the candidate lost against the best, and won."""


def experiment(**changes: Any) -> Experiment:
    return Experiment.model_validate({"experiment": "quick", "iterations": 9, "tasks": WORLDS} | changes)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


@pytest.fixture
def nights(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Bodies that write one line; the scores of iteration k are those of the k-th outcome."""

    def given(*outcomes: tuple[int, int]) -> None:
        def body(name: str) -> Callable[[StepContext], None]:
            return promotion.run if name == "promotion" else lambda context: write(name, context, outcomes)

        monkeypatch.setattr(base, "_body", body)

    return given


IDLE = (0, 0)
"""The outcome of a night in which nothing was trained."""


def write(name: str, context: StepContext, outcomes: tuple[tuple[int, int], ...]) -> None:
    inputs = {kind: artifact.digest for kind, artifact in context.inputs.items()}
    (context.build.path / "made.json").write_text(json.dumps({"of": inputs, "iteration": context.iteration}))
    if name == "policy":
        context.build.note(adapter=context.entering.adapter, experience=context.entering.experience, base="b")
    elif name == "adapter":
        context.build.note(unchanged=outcomes[context.iteration - 1] == IDLE)
    elif name == "experience":
        (context.build.path / "pool.json").write_text(Pool(next_number=10 * context.iteration + 1).to_json())
    elif name == "scores":
        worse, better = outcomes[context.iteration - 1]
        best = [1.0] * (100 + worse - better) + [0.0] * (100 - worse + better)
        candidate = [0.0] * worse + best[worse : TASKS - better] + [1.0] * better
        rows = [
            Score(f"t{i:03d}", 0, condition, reward, False, "answered", 4, 20)
            for condition, rewards in zip((OF_CANDIDATE, OF_BEST), (candidate, best), strict=True)
            for i, reward in enumerate(rewards)
        ]
        scores_to_frame(rows).write_parquet(context.build.path / "scores.parquet")
        against, adapter = scoring._reference(context)
        context.build.note(**{AGAINST: against, "reference": adapter})


def run(e: Experiment, store: Store, *iterations: int) -> list[str]:
    """The decisions of these iterations."""
    return [[run_step(step, e, k, store).artifact for step in STEP_ORDER][-1].summary["decision"] for k in iterations]


@pytest.fixture
def checked(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Pools of two items, which say what was entered, and what the check of the teacher finds in an iteration."""

    def given(found: dict[int, tuple[Finding, ...]]) -> None:
        inner = base._body

        def body(name: str) -> Callable[[StepContext], None]:
            def run(context: StepContext) -> None:
                inner(name)(context)
                k = context.iteration
                if name == "contexts":
                    context.build.note(findings=[asdict(finding) for finding in found.get(k, ())])
                if name == "experience":
                    before, gone = context.entering.experience, context.entering.withdrawn
                    pool = open_pool(context.store.open("experience", before)) if before else Pool(ITEMS)
                    items = tuple(replace(i, withdrawn=k if i.id in gone else i.withdrawn) for i in pool.items)
                    (context.build.path / "pool.json").write_text(Pool(items, next_number=10 * k + 1).to_json())

            return run

        monkeypatch.setattr(base, "_body", body)

    return given


ITEMS = tuple(ExperienceItem(f"p000{n}", f"Verify: when {n} pages agree, answer.", "principle") for n in (1, 2))
HARMS = {n: Finding("withdraw", f"p000{n}", "the teacher does worse with it: -20 points") for n in (1, 2, 7)}


def test_what_was_withdrawn_leaves_with_the_policy_and_stays_with_a_champion(
    store: Store, nights: Callable[..., None], checked: Callable[..., None]
) -> None:
    nights(BETTER, (60, 0))
    checked({1: (HARMS[1],), 2: (HARMS[2], HARMS[7], Finding("graduate", "p0002", "earlier"))[::-1]})
    assert run(experiment(), store, 1) == ["promote"]
    second = entering_policy(experiment(), 2, store)
    assert second.findings == (HARMS[1],)
    assert second.withdrawn == {"p0001"}
    assert run(experiment(), store, 2) == ["keep"]
    third = entering_policy(experiment(), 3, store)
    assert third.experience == second.experience, "the pool of night 1, which knows of nothing"
    assert sorted(third.withdrawn) == ["p0001", "p0002"], "p0007 was in the declined pool only"


def test_the_newest_policy_is_found_also_beyond_what_the_file_says(store: Store, nights: Callable[..., None]) -> None:
    nights(BETTER, BETTER, BETTER)
    run(experiment(), store, 1, 2, 3)
    newest = entering_policy(experiment(iterations=1), None, store)
    assert newest == entering_policy(experiment(), 4, store), "iterations were run by `--iterations 3`, or the file said more"


@pytest.mark.parametrize(("made", "told"), [((), "has policy 1 alone"), ((1, 2), "has policies 1 to 3")])
def test_a_policy_that_is_not_there_is_told_with_those_that_are(
    made: tuple[int, ...], told: str, store: Store, nights: Callable[..., None]
) -> None:
    nights(BETTER, BETTER)
    run(experiment(), store, *made)
    with pytest.raises(OrderError) as caught:
        entering_policy(experiment(), 9, store)
    assert "policy[quick|09] is not promoted yet" in caught.value.what
    assert caught.value.what.endswith(f"{told} in {store.root}")
    assert "iterations 1 to 8" in caught.value.remedy


def test_without_findings_a_policy_is_named_as_before(store: Store, nights: Callable[..., None]) -> None:
    nights(BETTER)
    run(experiment(), store, 1)
    assert "findings" not in entering_policy(experiment(), 2, store).content


def test_what_was_withdrawn_since_stays_withdrawn_when_the_best_comes_back(
    store: Store, nights: Callable[..., None], checked: Callable[..., None]
) -> None:
    """Night 1 is the best; night 2 withdrew p0001, whose pool of night 3 says so; night 3 finds p0002."""
    nights(BETTER, SLIGHTLY, SLIGHTLY)
    checked({2: (HARMS[1], Finding("graduate", "p0002", "of another policy")), 3: (HARMS[2],)})
    run(experiment(), store, 1, 2, 3)
    made = {step: store.open(step, digest(store, 3, step)) for step in STEP_ORDER}
    entering = entering_policy(experiment(), 4, store)
    context = SimpleNamespace(entering=entering, inputs=made, store=store, iteration=3)
    best = Standing(1, 1, digest(store, 1, "adapter"), digest(store, 1, "experience"))
    leaving = promotion._leaving(context, SimpleNamespace(decision="restore", standing=best))  # type: ignore[arg-type]
    assert leaving.experience == digest(store, 1, "experience")
    assert [(f.operation, f.item_id) for f in leaving.findings] == [("withdraw", "p0001"), ("withdraw", "p0002")]
    assert leaving.findings[0].reason == "withdrawn in iteration 3"


def digest(store: Store, iteration: int, step: str) -> str:
    found = store.ref("quick", iteration, step)
    assert found is not None
    return found.digest


def test_the_best_comes_back_with_adapter_and_pool_and_item_ids_count_on(store: Store, nights: Callable[..., None]) -> None:
    nights(BETTER, *[SLIGHTLY] * 8)
    e, decisions = experiment(iterations=9), []
    while "restore" not in decisions:
        decisions += run(e, store, len(decisions) + 1)
    k = len(decisions)
    assert decisions == [*["promote"] * (k - 1), "restore"]
    after = entering_policy(e, k + 1, store)
    assert after.adapter == digest(store, 1, "adapter")
    assert after.experience == digest(store, 1, "experience")
    assert after.next_item == 10 * k + 1, "past every id that a lost pool gave"
    assert (after.standing.champion, after.standing.best, after.standing.nights) == (1, 1, 0)
    # What was decided stands in the ref's artifact, and the next iteration starts from it.
    assert store.open("policy", digest(store, k + 1, "policy")).summary["adapter"] == after.adapter
    assert store.open("promotion", digest(store, k, "promotion")).summary["best"] == 1


def test_the_candidate_is_compared_with_the_best_not_with_the_last(store: Store, nights: Callable[..., None]) -> None:
    nights(BETTER, EVEN, EVEN)
    run(experiment(), store, 1, 2, 3)
    made = store.open("scores", digest(store, 3, "scores")).summary
    assert (made[AGAINST], made["reference"]) == (1, digest(store, 1, "adapter"))
    assert entering_policy(experiment(), 4, store).adapter == digest(store, 3, "adapter")


def test_a_night_in_which_nothing_was_trained_is_not_bet_on(store: Store, nights: Callable[..., None]) -> None:
    nights(IDLE, BETTER, IDLE, IDLE, SLIGHTLY, IDLE)
    standings = []
    for k in range(1, 7):
        assert run(experiment(), store, k) == ["promote"]
        standings.append(entering_policy(experiment(), k + 1, store).standing)
    first, better, idle, again, slightly, other = standings
    assert (first.champion, first.nights, first.capital) == (1, 0, ())
    assert (idle.champion, again.champion) == (3, 4)
    assert replace(again, champion=2) == replace(idle, champion=2) == better, "the best itself, by another digest"
    assert (slightly.nights, other.nights) == (1, 2), "whoever came after it is another one, also untrained"


def test_how_sure_the_gate_is_does_not_touch_the_next_iteration(store: Store, nights: Callable[..., None]) -> None:
    """Another margin, the same verdict: policy, rollouts and scores of the next iteration stay; its promotion is made anew."""
    nights(BETTER, EVEN, EVEN)
    lenient = experiment(gate={"margin": 0.02})
    run(experiment(), store, 1, 2)
    before = {step: resolve(step, experiment(), 3, store).digest for step in STEP_ORDER}
    run(lenient, store, 1, 2)
    after = {step: resolve(step, lenient, 3, store).digest for step in STEP_ORDER}
    assert {step for step in STEP_ORDER if before[step] != after[step]} == {"promotion"}


def test_every_night_draws_anew_and_the_best_decides_whom_it_scores(store: Store, nights: Callable[..., None]) -> None:
    nights(BETTER, EVEN)
    run(experiment(), store, 1)
    entering = entering_policy(experiment(), 2, store)
    scored = base.resolve_from("scores", experiment(), 2, store, entering)
    assert scored.config["iteration"] == 2
    assert scored.config["standing"] == {"adapter": digest(store, 1, "adapter")}
    other = replace(entering, standing=replace(entering.standing, adapter=None))
    assert base.resolve_from("scores", experiment(), 2, store, other).digest != scored.digest
    surer = replace(entering, standing=replace(entering.standing, capital=(1.0,) * 5))
    assert base.resolve_from("scores", experiment(), 2, store, surer).digest == scored.digest


def gone(store: Store, iteration: int) -> None:
    shutil.rmtree(store.open("adapter", digest(store, iteration, "adapter")).path)


def test_a_best_champion_that_is_gone_is_said_and_the_champion_takes_its_place(
    store: Store, nights: Callable[..., None]
) -> None:
    nights(BETTER, EVEN, SLIGHTLY)
    run(experiment(), store, 1, 2)
    gone(store, 1)
    assert run(experiment(), store, 3) == ["promote"]
    scored = store.open("scores", digest(store, 3, "scores")).summary
    assert (scored[AGAINST], scored["reference"]) == (2, digest(store, 2, "adapter"))
    made = store.open("promotion", digest(store, 3, "promotion"))
    assert "the best champion so far, of iteration 1, cannot come back: it is gone" in made.summary["reasons"][-1]
    after = entering_policy(experiment(), 4, store).standing
    assert (after.champion, after.best, after.adapter) == (3, 2, digest(store, 2, "adapter"))


def test_a_best_champion_that_vanishes_before_it_is_restored_leaves_the_champion(
    store: Store, nights: Callable[..., None]
) -> None:
    nights(BETTER, *[SLIGHTLY] * 8)
    e, decisions = experiment(iterations=9), run(experiment(), store, 1)
    while True:
        k = len(decisions) + 1
        for step in STEP_ORDER[:-1]:
            run_step(step, e, k, store)
        capital = Capital(entering_policy(e, k, store).standing.capital)
        losses = [1.0] * SLIGHTLY[0] + [-1.0] * SLIGHTLY[1] + [0.0] * (TASKS - sum(SLIGHTLY))
        if capital.after(losses, e.gate.margin).total >= 20:
            break
        decisions += run(e, store, k)
    gone(store, 1)
    decisions += run(e, store, k)
    assert decisions == [*["promote"] * (k - 1), "keep"]
    made = store.open("promotion", digest(store, k, "promotion")).json("decision.json")
    assert "the best champion so far, of iteration 1, cannot come back" in made["reasons"][-1]
    assert f"(adapter {digest(store, 1, 'adapter')[:8]})" in made["reasons"][-1]
    assert made["policy"]["adapter"] == digest(store, k - 1, "adapter")
    assert (made["standing"]["champion"], made["standing"]["best"]) == (k - 1, k - 1)


def test_a_best_champion_that_cannot_be_looked_at_now_is_not_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine has it: a lost connection must not make the champion the best."""
    url = f"file://{tmp_path}/bucket"
    there = MirroredStore(tmp_path / "there", Mirror(url))
    config = {"n": 1}
    best = Store.digest_of("adapter", "1", config, {})
    with there.build("adapter", best, code_version="1", config=config, inputs={}) as build:
        (build.path / "weights").write_text("best")
    context = SimpleNamespace(store=MirroredStore(tmp_path / "here", Mirror(url)))
    standing = Standing(champion=2, best=1, adapter=best)

    def lost(*_: object) -> None:
        raise ConnectionError("connection reset by peer")

    with monkeypatch.context() as patch:
        patch.setattr(Mirror, "_read", lost)
        with pytest.raises(AwayError, match="cannot be read"):
            promotion._missing(context, standing)  # type: ignore[arg-type]
    assert promotion._missing(context, standing) == ""  # type: ignore[arg-type]


def test_the_best_champion_is_no_garbage(store: Store, nights: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when no reference names its iteration any more."""
    nights(BETTER, EVEN, EVEN)
    run(experiment(), store, 1, 2, 3)
    best = {kind: digest(store, 1, kind) for kind in ("adapter", "experience")}
    for iteration in ("01", "02"):
        shutil.rmtree(store.root / "refs" / "quick" / iteration)
    assert not {one.digest for one in garbage.find(store).removable} & set(best.values())
