"""A pool of harmful advice, written for the test, through the real steps: it is withdrawn, and nothing of it is learned.

A script takes the place of the policy: it knows every answer, and obeys advice.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evolve_dag.config.schema import Experiment
from evolve_dag.environments.pocket.tokenizer import build_tokenizer
from evolve_dag.environments.pocket.world import World
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.base import Selection
from evolve_dag.experience.teacher_check import CheckedItem, Comparison, TeacherCheck
from evolve_dag.inference.chat import ChatFormat
from evolve_dag.inference.scripted import ScriptedModel
from evolve_dag.records import ExperienceItem, Message
from evolve_dag.steps import contexts, scores, teacher_check, trajectories
from evolve_dag.steps.base import STEP_ORDER, entering_policy, run_step
from evolve_dag.steps.policies import open_pool
from evolve_dag.steps.teacher_check import check_of
from evolve_dag.store.artifacts import Artifact, Store
from evolve_dag.store.frames import load_trajectories

WORLDS = {"train": 11, "development": 21, "held_out": 31}
TASKS = 8
GUESS = "Guess: when nothing is known yet, answer at once."
FIRST = "First: when nothing is known yet, open the first result."
SEARCH = "Narrow: when nothing is known yet, search only the short name."
NOTHING = {"observation": "none"}


@pytest.fixture
def obedient(monkeypatch: pytest.MonkeyPatch) -> None:
    tasks = [task for world in WORLDS.values() for task in World(world).tasks(TASKS, "any")]
    answers = {task.question: task.answer for task in tasks}
    chat = ChatFormat.from_tokenizer(build_tokenizer())

    def act(messages: Sequence[Message]) -> str:
        advised = any("answer at once" in message.content for message in messages)
        [question] = [question for question in answers if messages[1].content.startswith(question)]
        return "<answer>Rato Miku</answer>" if advised else f"<answer>{answers[question]}</answer>"

    @contextmanager
    def policy(*_: Any) -> Iterator[ScriptedModel]:
        yield ScriptedModel(act, chat=chat)

    for step in (trajectories, contexts, teacher_check, scores):
        monkeypatch.setattr(step, "open_policy", policy)


def experiment(folder: Path, *texts: str, **changes: Any) -> Experiment:
    items = (ExperienceItem(f"p000{n}", text, "principle", NOTHING) for n, text in enumerate(texts, 1))
    (folder / "pool.json").write_text(Pool(tuple(items)).to_json())
    values: dict[str, Any] = {
        "experiment": "harm",
        "start_pool": str(folder / "pool.json"),
        "tasks": {name: {"count": TASKS, "world": world} for name, world in WORLDS.items()},
        "rollout": {"group_size": 2},
        "evaluation": {"bootstrap": 200, "base_temperatures": [], "greedy": False},
        "runtime": {"threads": 1},
    }
    return Experiment.model_validate(values | changes)


def iteration(e: Experiment, store: Store, k: int, until: str = "promotion") -> dict[str, Artifact]:
    return {step: run_step(step, e, k, store).artifact for step in STEP_ORDER[: STEP_ORDER.index(until) + 1]}


@pytest.mark.parametrize(
    "how", [{}, {"injection": "global"}, {"regime": "on_policy"}], ids=lambda how: ",".join(how.values()) or "default"
)
def test_harmful_advice_is_withdrawn_and_the_student_does_not_fall(obedient: None, tmp_path: Path, how: dict[str, str]) -> None:
    e, store = experiment(tmp_path, GUESS, **how), Store(tmp_path / "store")
    made = iteration(e, store, 1, until="adapter" if how else "promotion")
    told = made["contexts"].summary
    assert (told["kept"], told["withdrawn"]) == (0, 1)
    assert told["not_taught"].startswith("the teacher with experience is below the student without it: -100.0 points")
    assert made["adapter"].summary["unchanged"]
    assert made["adapter"].summary["note"] == f"nothing is taught: {told['not_taught']}"
    [verdict] = [v for v in contexts.examine(made["contexts"], e) if v.check == "teacher"]
    assert not verdict.passed
    assert list(verdict.evidence["withdrawn"]) == ["p0001"]

    if how:
        return  # from here on all are alike
    scored = made["scores"].json("summary.json")
    assert scored["without"]["success"] == 1.0
    assert "with" not in scored, "no item is left to stand in a context"
    assert entering_policy(e, 2, store).withdrawn == {"p0001"}
    made = iteration(e, store, 2, until="contexts")
    assert open_pool(made["experience"]).get("p0001").withdrawn == 2
    assert made["contexts"].summary["trajectories"] == 0, "the teacher would be the student"


def test_steps_with_a_withdrawn_item_are_not_learned_and_the_others_are(
    obedient: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    e, store = experiment(tmp_path, FIRST, SEARCH), Store(tmp_path / "store")
    found = TeacherCheck(Comparison(TASKS, 1.0, 1.0, 0.0, -0.1, 0.1), (CheckedItem("p0001", None, (), "the test says so"),))
    monkeypatch.setattr(teacher_check, "check_teacher", lambda *_, **__: found)
    monkeypatch.setattr("evolve_dag.steps.policies.part_of", lambda *_: SimpleNamespace(make=lambda *_: ByLength()))
    made = iteration(e, store, 1, until="contexts")["contexts"]
    assert check_of(made) == found
    assert {name for t in load_trajectories(made) for step in t.steps for name in step.selected} == {"p0001", "p0002"}
    learned = [tuple(names) for names in made.frame("contexts.parquet")["selected"].to_list()]
    assert set(learned) == {("p0002",)}


class ByLength:
    """A selector that gives each question one of the two items."""

    async def select(self, question: str, steps: Sequence[Any], pool: Pool) -> Selection:
        return Selection(("p0001" if len(question) % 2 else "p0002",), "by length")


def test_switched_off_the_teacher_teaches_what_it_likes(obedient: None, tmp_path: Path) -> None:
    e = experiment(tmp_path, GUESS, regime={"rejection": False}, teacher_check={"enabled": False})
    store = Store(tmp_path / "store")
    made = iteration(e, store, 1, until="contexts")["contexts"]
    assert (made.summary["withdrawn"], made.summary["kept"]) == (0, 2 * TASKS)
    check = check_of(made)
    assert check is not None
    assert check.note == "switched off (teacher_check.enabled)"


def test_on_policy_the_check_says_what_it_cost(obedient: None, tmp_path: Path) -> None:
    e = experiment(tmp_path, SEARCH, regime="on_policy", teacher_check={"tasks": 3})
    store = Store(tmp_path / "store")
    made = iteration(e, store, 1, until="contexts")["contexts"]
    check = check_of(made)
    assert check is not None
    assert check.whole is not None
    assert (check.whole.tasks, check.withdrawn) == (3, {})
    assert made.summary["tokens"] > 0
    assert (made.path / teacher_check.CHECKED / "trajectories.parquet").is_file()


def test_a_principle_in_other_words_graduates_and_comes_back(
    obedient: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The miner knows no habit of it; how much alike the policy acts with and without it is told by the test."""
    foreign = "Think: when in doubt, remember what you know."
    e = experiment(tmp_path, foreign, injection="global", extraction={"graduation": 0.9})
    store, alike = Store(tmp_path / "store"), {1: 0.99, 2: 0.5}

    def told(seen: Sequence[Any], items: Sequence[str], *_: Any, **__: Any) -> dict[str, list[tuple[str, float]]]:
        return {item: [(f"t{n}", alike[k]) for n in range(200)] for item in items} if seen else {}

    monkeypatch.setattr(teacher_check, "overlaps", told)
    for k, operation in ((1, "graduate"), (2, "recall")):
        made = iteration(e, store, k)
        [finding] = entering_policy(e, k + 1, store).findings
        assert (finding.operation, finding.item_id) == (operation, "p0001")
    assert open_pool(made["experience"]).get("p0001").graduated == 2
    assert made["contexts"].summary["trajectories"] == 0, "in no context any more"
    assert finding.reason == "acted the same without it in 100 of 200 steps: it must be read again"
