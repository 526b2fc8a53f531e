"""Reading a study from a store: by the digests that the file asks for, whatever the lineages last used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from studies import study

from evolve_dag.evaluation.metrics import evaluate_summary, score_trajectories
from evolve_dag.records import Step, Task, Trajectory
from evolve_dag.steps import base
from evolve_dag.steps.base import STEP_ORDER, run_step
from evolve_dag.steps.body import StepContext
from evolve_dag.store.artifacts import Store
from evolve_dag.store.frames import scores_to_frame
from evolve_dag.study.definition import Study
from evolve_dag.study.results import Results, breakdowns, read

TASKS = {f"h{n}": Task(f"h{n}", "What?", "Rato", metadata={"depth": str(n % 2), "id": str(n)}) for n in range(20)}
CONDITIONS = ("without", "with", "greedy", "development_candidate", "development_best")


def rollouts(right: int) -> list[Trajectory]:
    """One of every task; the first ``right`` are right, the last one is not judged."""
    return [
        Trajectory(
            f"{name}#0", name, 0, 1, "system", "What?", (Step(0, "Rato", (1, 2), (-0.1, -0.1), answer="Rato"),), "answered",
            "Rato", None if n == 19 else float(n < right),
        )
        for n, name in enumerate(TASKS)
    ]  # fmt: skip


def scores(context: StepContext) -> None:
    first = ("base", "base_at_0") if context.iteration == 1 else ()
    found, summary = [], {}
    for place, condition in enumerate((*first, *CONDITIONS)):
        done = rollouts(context.iteration + place)
        found += score_trajectories(done, TASKS, condition)
        summary[condition] = evaluate_summary(done, TASKS, context.experiment.evaluation)
    scores_to_frame(found).write_parquet(context.build.path / "scores.parquet")
    (context.build.path / "summary.json").write_text(json.dumps(summary))


DECISIONS: dict[int, tuple[str, int, tuple[str, ...]]] = {}
"""Iteration -> decision, who holds after it, what has been withdrawn from its pool; promoted where it has no entry."""


def promotion(context: StepContext) -> None:
    k = context.iteration
    decision, champion, withdrawn = DECISIONS.get(k, ("promote", k, ()))
    adapter = {"promote": context.inputs["adapter"].digest, "keep": context.entering.adapter, "restore": None}[decision]
    findings = [{"operation": "withdraw", "item_id": item, "reason": "harm"} for item in withdrawn]
    leaving = {"base": context.entering.base, "adapter": adapter, "experience": None, "next_item": 1, "findings": findings}
    content = {"decision": decision, "reasons": ["x"], "evidence": {}, "standing": {"champion": champion}, "policy": leaving}
    (context.build.path / "decision.json").write_text(json.dumps(content))


def noted(**facts: object) -> Callable[[StepContext], None]:
    return lambda context: context.build.note(**facts)


BODIES = {
    "policy": noted(),
    "trajectories": noted(tokens=100, calls={"judge": {"completion_tokens": 1000}}),
    "experience": noted(items=3, calls={"extractor": {"completion_tokens": 7}, "policy": {"completion_tokens": 50}}),
    "contexts": noted(tokens=50),
    "adapter": noted(tokens=0, tokens_trained=900),
    "scores": scores,
    "promotion": promotion,
}


def make(found: Study, store: Store) -> None:
    """All iterations of a study, but for the last one of its last cell where it has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "_body", BODIES.__getitem__)
        for cell in found.cells:
            left_out = len(found.cells) > 1 and cell is found.cells[-1]
            for k in range(1, cell.iterations + (not left_out)):
                for step in STEP_ORDER:
                    run_step(step, cell.experiment, k, store)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Study, Store]:
    """A study whose last cell has one of two iterations."""
    folder = tmp_path_factory.mktemp("made")
    found, store = study(folder, set={"evaluation": {"bootstrap": 100}}), Store(folder / "store")
    make(found, store)
    return found, store


def test_every_iteration_of_every_cell_is_read(made: tuple[Study, Store]) -> None:
    found = read(*made)
    everything = [(arm, seed, k) for arm in ("plain", "greedy") for seed in (4, 5) for k in (0, 1, 2)]
    assert [(r.arm, r.seed, r.iteration) for r in found.rows] == everything[:-1]
    assert dict(found.missing) == {"tiny.greedy-s5": 1}
    assert found.iterations("plain") == (1, 2)
    assert found.iterations("greedy") == (1,), "a mean over other seeds would not be the same curve"
    base_row, first, _ = found.rows[:3]
    assert set(base_row.rewards) == {"without", "base_at_0", "held"}
    assert base_row.metrics["without"].success == pytest.approx(1 / 19)
    assert set(first.rewards) == {
        "without", "with", "greedy", "held", "held_with", "held_greedy",
    }, "development tasks are the gate's"  # fmt: skip
    assert sum(first.rewards["without"].values()) == 3
    assert "h19" not in first.rewards["without"], "not judged is not wrong"
    assert (first.items, first.decision, first.sampled, first.trained) == (3, "promote", 157, 900)
    assert found.column("plain", 2, "with").keys() == {4, 5}
    assert set(found.base_columns("plain")) == {"without", "base_at_0"}
    other = [row for row in found.rows if (row.arm, row.seed, row.iteration) == ("greedy", 4, 0)]
    assert found.base_columns("greedy")["without"][4] is other[0].rewards["without"], "its own, at its own temperature"


def right(found: Results, condition: str) -> list[float | None]:
    """Tasks that are answered rightly at iterations 0, 1, ... of the only cell."""
    return [sum(row.rewards[condition].values()) if condition in row.rewards else None for row in found.rows]


@pytest.mark.parametrize(
    ("decisions", "champions", "held", "held_with"),
    [
        pytest.param({}, [0, 1, 2, 3, 4], [1, 3, 2, 3, 4], [None, 4, 3, 4, 5], id="promoted: the candidate's own"),
        pytest.param(
            {2: ("keep", 1, ()), 4: ("restore", 1, ())}, [0, 1, 1, 3, 1], [1, 3, 3, 3, 3], [None, 4, 4, 4, 4],
            id="kept: the champion's; restored: the best one's",
        ),
        pytest.param(
            {1: ("keep", 0, ()), 3: ("restore", 0, ())}, [0, 0, 2, 0, 4], [1, 1, 2, 1, 4], [None, None, 3, None, 5],
            id="the base policy, which has no pool",
        ),
        pytest.param(
            {1: ("promote", 1, ("p1",)), 2: ("keep", 1, ("p1",)), 3: ("keep", 1, ("p1", "p2"))}, [0, 1, 1, 1, 4],
            [1, 3, 3, 3, 4], [None, 4, 4, None, 5], id="a pool that has lost an item since was not scored",
        ),
    ],
)  # fmt: skip
def test_what_is_held_has_the_scores_of_the_night_it_comes_from(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    decisions: dict[int, tuple[str, int, tuple[str, ...]]],
    champions: list[int],
    held: list[float],
    held_with: list[float | None],
) -> None:
    for k, decision in decisions.items():
        monkeypatch.setitem(DECISIONS, k, decision)
    arms, store = {"plain": "arm.yaml"}, Store(tmp_path / "store")
    asked = study(tmp_path, arms=arms, seeds=[4], iterations=4, set={"evaluation": {"bootstrap": 100}})
    make(asked, store)
    found = read(asked, store)
    assert [row.champion for row in found.rows] == champions
    assert right(found, "without") == [1, 3, 2, 3, 4], "the candidates stay what they were"
    assert right(found, "held") == held
    assert right(found, "held_with") == held_with
    assert [row.metrics["held"].success for row in found.rows] == [pytest.approx(n / 19) for n in held]
    assert found.column("plain", 2)[4] == found.column("plain", champions[2], "without")[4], "task by task"


def test_facts_with_few_values_break_results_down(made: tuple[Study, Store]) -> None:
    assert breakdowns(read(*made)) == {"depth": ["0", "1"]}


def test_what_was_made_under_another_definition_is_not_there(made: tuple[Study, Store], tmp_path: Path) -> None:
    _, store = made
    changed = study(tmp_path, set={"evaluation": {"bootstrap": 100, "seed": 1}})
    found = read(changed, store)
    assert found.rows == ()
    assert sum(found.missing.values()) == 8


def test_reading_a_store_that_holds_nothing(tmp_path: Path) -> None:
    found = read(study(tmp_path), Store(tmp_path / "empty"))
    assert found.rows == ()
    assert not (tmp_path / "empty").exists()
