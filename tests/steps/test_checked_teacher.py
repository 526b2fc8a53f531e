"""A pool of harmful advice, written for the test, through the real steps: it is withdrawn, and nothing of it is learned.

A script takes the place of the policy: it knows every answer, and obeys advice.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
from small_lineage import copy_of, play_by, small

from evolve_dag.config.schema import Experiment
from evolve_dag.distillation.teacher import TeacherScorer
from evolve_dag.environments.pocket.tokenizer import build_tokenizer
from evolve_dag.environments.pocket.world import World
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.base import Selection
from evolve_dag.experience.teacher_check import CheckedItem, Comparison, TeacherCheck
from evolve_dag.inference.chat import ChatFormat
from evolve_dag.inference.recording import Recording
from evolve_dag.records import ExperienceItem, Message, Trajectory
from evolve_dag.steps import contexts, teacher_check
from evolve_dag.steps.base import STEP_ORDER, entering_policy, run_step
from evolve_dag.steps.body import Silent
from evolve_dag.steps.policies import open_pool, selector_statistics
from evolve_dag.steps.teacher_check import check_of
from evolve_dag.store.artifacts import Artifact, Store
from evolve_dag.store.frames import load_trajectories, trajectories_from_frames

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

    play_by(act, chat, monkeypatch)


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


class First:
    """A selector that takes the first item that it is given: each hides those behind it."""

    async def select(self, question: str, steps: Sequence[Any], pool: Pool) -> Selection:
        return Selection(pool.ids[:1], "the first")


@pytest.fixture
def one_by_one(obedient: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evolve_dag.steps.policies.part_of", lambda *_: SimpleNamespace(make=lambda *_: First()))


ANYWAY = "Haste: when nothing is known yet, answer at once anyway."
BELOW = "the teacher with experience is below the student without it: -100.0 points (-100.0 to -100.0) on 8 training tasks"
BOTH = pytest.mark.parametrize("regime", ["off_policy", "on_policy"])


def rollouts_of(made: Artifact, folder: str) -> list[Trajectory]:
    """Without the time that each took."""
    frames = (pl.read_parquet(made.path / folder / name) for name in ("trajectories.parquet", "steps.parquet"))
    found = trajectories_from_frames(*frames)
    return [replace(t, seconds=0.0, steps=tuple(replace(step, seconds=0.0) for step in t.steps)) for t in found]


def stood(rollouts: Sequence[Trajectory]) -> set[str]:
    return {name for t in rollouts for step in t.steps for name in step.selected}


def tokens(rollouts: Sequence[Trajectory]) -> int:
    return sum(len(step.token_ids) for t in rollouts for step in t.steps)


@BOTH
def test_a_refused_teacher_is_asked_again_without_what_was_withdrawn(one_by_one: None, tmp_path: Path, regime: str) -> None:
    e, store = experiment(tmp_path, GUESS, ANYWAY, SEARCH, regime=regime), Store(tmp_path / "store")
    made = iteration(e, store, 1, until="contexts")["contexts"]
    told, check = made.summary, check_of(made)
    assert check is not None
    assert (told["attempts"], told["withdrawn"]) == (3, 2)
    assert [(f["operation"], f["item_id"]) for f in told["findings"]] == [("withdraw", "p0001"), ("withdraw", "p0002")]
    assert "not_taught" not in told
    assert [(one.item, one.attempt) for one in check.items] == [("p0001", 1), ("p0002", 2), ("p0003", 3)]
    assert check.told[:3] == (
        f"attempt 1 of 3: {BELOW}",
        f"attempt 2 of 3: {BELOW}",
        "attempt 3 of 3: the teacher may teach, without p0001, p0002: +0.0 points (+0.0 to +0.0) on 8 training tasks",
    )
    assert [line.partition(":")[0] for line in check.told[3:]] == [f"p000{n} is withdrawn by attempt {n}" for n in (1, 2)]
    [verdict] = [v for v in contexts.examine(made, e) if v.check == "teacher"]
    assert (verdict.passed, verdict.evidence["attempts"], verdict.text) == (False, 3, "; ".join(check.told))
    assert list(verdict.evidence["withdrawn"]) == ["p0001", "p0002"]

    assert stood(load_trajectories(made)) == {"p0003"}
    assert told["kept"] == 2 * TASKS
    assert {name for names in made.frame("contexts.parquet")["selected"].to_list() for name in names} == {"p0003"}
    refused = [rollouts_of(made, f"{teacher_check.CHECKED}/attempt_{n}") for n in (1, 2)]
    assert [stood(rollouts) for rollouts in refused] == [{"p0001"}, {"p0002"}]
    last = rollouts_of(made, "" if regime == "off_policy" else teacher_check.CHECKED)
    assert told["tokens"] == sum(map(tokens, (*refused, last)))
    assert len({t.seed for rollouts in (*refused, last) for t in rollouts}) == 3 * 2 * TASKS, "draws of their own"


def test_where_every_attempt_is_refused_nothing_is_taught_and_all_withdrawals_stay(one_by_one: None, tmp_path: Path) -> None:
    haste = [f"{ANYWAY} {n}" for n in range(3)]
    e = experiment(tmp_path, GUESS, *haste, teacher_check={"attempts": 2})
    store = Store(tmp_path / "store")
    made = iteration(e, store, 1)
    told, check = made["contexts"].summary, check_of(made["contexts"])
    assert check is not None
    assert (told["kept"], told["withdrawn"], told["attempts"], told["not_taught"]) == (0, 2, 2, BELOW)
    assert check.told[:2] == (f"attempt 1 of 2: {BELOW}", f"attempt 2 of 2: nothing is taught: {BELOW}")
    assert made["adapter"].summary["unchanged"]
    assert entering_policy(e, 2, store).withdrawn == {"p0001", "p0002"}
    entered = open_pool(iteration(e, store, 2, until="experience")["experience"])
    assert [item.withdrawn for item in entered.items] == [2, 2, 0, 0]


@BOTH
@pytest.mark.parametrize("left", [True, False], ids=["attempts: 1", "nothing left"])
def test_no_further_attempt_where_none_is_allowed_or_nothing_is_left(
    one_by_one: None, tmp_path: Path, regime: str, left: bool
) -> None:
    texts, settings = ([GUESS, SEARCH], {"attempts": 1}) if left else ([GUESS], {})
    e, store = experiment(tmp_path, *texts, regime=regime, teacher_check=settings), Store(tmp_path / "store")
    made = iteration(e, store, 1, until="contexts")["contexts"]
    check = check_of(made)
    assert check is not None
    assert (made.summary["withdrawn"], made.summary["not_taught"], check.told[0]) == (1, BELOW, f"nothing is taught: {BELOW}")
    assert "attempts" not in made.summary
    assert not list(made.path.glob(f"{teacher_check.CHECKED}/*/"))


def test_what_a_selector_counted_in_all_attempts_adds_up() -> None:
    sources: list[Any] = [SimpleNamespace(selector=SimpleNamespace(statistics=Counter(asked=n, forced=0))) for n in (3, 4)]
    assert selector_statistics(*sources) == {"selector": {"asked": 7, "forced": 0}}
    assert selector_statistics(None, SimpleNamespace(selector=None)) == {}  # type: ignore[arg-type]


class Killed(Silent):
    """At some unit of progress of one phase."""

    def __init__(self, label: str, unit: int) -> None:
        self.label, self.unit, self.units = label, unit, -1

    def start(self, label: str, total: int) -> None:
        self.units = 0 if label == self.label else -1
        self.advance(0)

    def advance(self, n: int = 1) -> None:
        self.units += n if self.units >= 0 else 0
        if self.units == self.unit:
            raise KeyboardInterrupt


@pytest.mark.parametrize("unit", [0, 3, 2 * TASKS], ids=["before the second", "in it", "after it"])
@BOTH
def test_killed_between_the_attempts_the_night_comes_out_the_same(
    one_by_one: None, tmp_path: Path, regime: str, unit: int
) -> None:
    label = {"off_policy": "teacher rollouts", "on_policy": "teacher check"}[regime]
    e, whole, torn = experiment(tmp_path, GUESS, SEARCH, regime=regime), Store(tmp_path / "whole"), Store(tmp_path / "torn")
    expected = iteration(e, whole, 1, until="contexts")["contexts"]
    iteration(e, torn, 1, until="experience")
    with pytest.raises(KeyboardInterrupt):
        run_step("contexts", e, 1, torn, Killed(f"{label} of attempt 2", unit))
    made = run_step("contexts", e, 1, torn).artifact
    assert made.manifest.resumed
    assert (made.digest, made.summary) == (expected.digest, expected.summary)
    timed = [n for n in expected.manifest.files if n.endswith(("trajectories.parquet", "steps.parquet"))]  # how long each took
    files, wanted = ({n: f for n, f in one.manifest.files.items() if n not in timed} for one in (made, expected))
    assert files == wanted
    folders = {name.rpartition("/")[0] for name in timed}
    assert len(folders) == (2 if regime == "off_policy" else 3)
    for folder in folders:
        assert rollouts_of(made, folder) == rollouts_of(expected, folder)


def test_rollouts_of_another_pool_are_not_taken_for_those_of_an_attempt(
    one_by_one: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A selector that chooses otherwise after a kill makes the first attempt withdraw another item."""
    e, store = experiment(tmp_path, GUESS, ANYWAY, SEARCH), Store(tmp_path / "store")
    iteration(e, store, 1, until="experience")
    with pytest.raises(KeyboardInterrupt):
        run_step("contexts", e, 1, store, Killed("teacher rollouts of attempt 2", 3))
    found, real = CheckedItem("p0002", None, (), "the test says so"), teacher_check.check_teacher

    def otherwise(pool: Pool, *sides: Any, **settings: Any) -> TeacherCheck:
        check = real(pool, *sides, **settings)
        return replace(check, items=(found,)) if len(pool.items) == 3 else check

    monkeypatch.setattr(teacher_check, "check_teacher", otherwise)
    made = run_step("contexts", e, 1, store).artifact
    second = rollouts_of(made, f"{teacher_check.CHECKED}/attempt_2")
    assert len(second) == 2 * TASKS
    assert stood(second) == {"p0001"}, "none of those with p0002, which the first attempt withdraws now"


def test_what_the_refused_teacher_sampled_from_teaches_nothing(
    small_lineage: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The real model, whose distributions are recorded while it samples: those of the last attempt are its scores."""
    e, store, real = small(), copy_of(small_lineage, tmp_path / "store"), teacher_check.check_teacher
    shutil.rmtree(store.folder("contexts", store.ref("small", 1, "contexts").digest))
    first: list[str] = []

    def refusing(pool: Pool, *sides: Any, **settings: Any) -> TeacherCheck:
        if first:
            return real(pool, *sides, **settings)
        first.append(next(name for t in sides[0] for step in t.steps for name in step.selected))
        return TeacherCheck(Comparison(12, 0.0, 0.5, -0.5, -0.6, -0.4), (CheckedItem(first[0], None, (), "the test says so"),))

    recorded: list[Recording] = []

    def score(*arguments: Any) -> contexts.Scored:
        recorded.append(arguments[4])
        return scored(*arguments)

    scored = contexts.score
    monkeypatch.setattr(teacher_check, "check_teacher", refusing)
    monkeypatch.setattr(contexts, "score", score)
    monkeypatch.setattr(TeacherScorer, "_pass", lambda *_: pytest.fail("what was sampled is computed again"))
    again = run_step("contexts", e, 1, store).artifact
    assert again.summary["attempts"] == 2
    assert again.summary["kept"] > 0
    taught = load_trajectories(again)
    assert first[0] not in stood(taught)
    [recording] = recorded
    assert 0 < len(recording) <= sum(len(t.steps) for t in taught), "the refused attempt's are gone"


class ByLength:
    """A selector that gives each question one of the two items."""

    async def select(self, question: str, steps: Sequence[Any], pool: Pool) -> Selection:
        return Selection(("p0001" if len(question) % 2 else "p0002",), "by length")


@pytest.mark.parametrize("regime", ["off_policy", "on_policy"])
def test_a_teacher_that_must_help_and_does_not_teaches_nothing(obedient: None, tmp_path: Path, regime: str) -> None:
    """Its advice changes nothing; without the setting it is taught. No harm: the check passes, nothing is withdrawn."""
    e = experiment(tmp_path, FIRST, regime=regime, teacher_check={"must_help": True})
    made = iteration(e, Store(tmp_path / "store"), 1, until="adapter")
    than = "not established to be better than the student without it"
    why = f"the teacher with experience is {than}: +0.0 points (+0.0 to +0.0) on {TASKS} training tasks"
    told = made["contexts"].summary
    assert (told["kept"], told["withdrawn"], told["not_taught"]) == (0, 0, why)
    assert made["adapter"].summary["unchanged"]
    [verdict] = [v for v in contexts.examine(made["contexts"], e) if v.check == "teacher"]
    assert verdict.passed
    assert why in verdict.text
    taught = iteration(experiment(tmp_path, FIRST, regime=regime), Store(tmp_path / "store"), 1, until="contexts")
    assert taught["contexts"].summary["kept"] == 2 * TASKS


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
