"""Episodes that the library `verifiers` plays with our policy, and what can break in them (`make test-verifiers`)."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verifiers", reason="pip install 'evolve-dag[verifiers]'")

from evolve_dag.agent.rollouts import gather_rollouts
from evolve_dag.config.schema import Experiment, RolloutSettings, TaskSplit
from evolve_dag.environments.verifiers import environment as module
from evolve_dag.environments.verifiers.environment import VERIFIERS, VerifiersEnvironment, VerifiersTasks
from evolve_dag.errors import DataError
from evolve_dag.inference.chat import ChatFormat
from evolve_dag.inference.scripted import ScriptedModel
from evolve_dag.plain import LAST_STEP
from evolve_dag.protocols import Completion
from evolve_dag.records import REPLY, Message, Task, ToolCall, Trajectory
from evolve_dag.steps.base import STEP_ORDER, run_step
from evolve_dag.store.artifacts import Store
from evolve_dag.store.frames import load_trajectories
from evolve_dag.store.journal import Journal
from evolve_dag.tasks.suites import SPLITS, check_disjoint, load_tasks_of
from evolve_dag.verification.exact import ExactVerifier

TASKSETS = str(Path(__file__).parent / "vf_tasksets")


@pytest.fixture(autouse=True)
def _tasksets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(TASKSETS)
    monkeypatch.setenv("PYTHONPATH", TASKSETS)  # of tool servers, which are processes


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    from transformers import AutoTokenizer

    folder = Path(module.__file__).parents[1] / "pocket" / "model"
    return ChatFormat.from_tokenizer(AutoTokenizer.from_pretrained(folder))


def settings(id: str, args: dict[str, Any] | None = None, **more: Any) -> VerifiersEnvironment:
    return VerifiersEnvironment(id=id, args=args or {}, **{"seconds": 60.0, **more})


def tasks(chosen: VerifiersEnvironment, count: int = 2, skip: int = 0) -> tuple[Task, ...]:
    assert VERIFIERS.tasks is not None
    return VERIFIERS.tasks(chosen, TaskSplit(count=count, skip=skip), "train")


def play(
    script: Any,
    chosen: VerifiersEnvironment,
    *,
    count: int = 2,
    chat: ChatFormat | None = None,
    journal: Journal | None = None,
    **rollout: Any,
) -> list[Trajectory]:
    return asyncio.run(
        gather_rollouts(
            tasks(chosen, count),
            1,
            model=ScriptedModel(script, chat=chat),
            environment=VerifiersTasks(chosen, TaskSplit(count=count)),
            verifier=ExactVerifier(),
            settings=RolloutSettings(**rollout),
            seed=3,
            concurrency=4,
            journal=journal,
        )
    )


def guess(messages: Sequence[Message]) -> str:
    """Halves what is left."""
    low, high = 1, 9
    for said, heard in zip(messages[2::2], messages[3::2], strict=True):
        middle = int(said.content.split()[-1])
        low, high = (middle + 1, high) if heard.content.startswith("higher") else (low, middle - 1)
    return f"I say {(low + high) // 2}"


def test_one_turn_is_judged_by_the_rubric() -> None:
    right, wrong = play(["It is 3."], settings("vf-sums"))
    assert (right.status, right.answer, right.reward, right.system) == ("answered", "It is 3.", 0.75, "Answer with a number.")
    assert (wrong.question, wrong.reward) == ("What is 1 + 3?", 0.0)
    assert not right.offers_tools
    assert play(["3"], settings("vf-sums", reward="short"))[1].reward == 1.0
    assert "no part 'long': it has right, short" in (play(["3"], settings("vf-sums", reward="long"))[0].error or "")


def test_rows_are_tasks_twins_count_once_and_ranges_share_none() -> None:
    chosen = settings("vf-sums")
    assert [task.question for task in tasks(chosen, 3, 2)] == [f"What is {a} + 3?" for a in (2, 3, 4)]
    assert [task.answer for task in tasks(chosen, 3, 2)] == ["5", "6", "7"]
    assert not {t.id for t in tasks(chosen, 5)} & {t.id for t in tasks(chosen, 5, 5)}
    with pytest.raises(DataError, match=r"rows 9 to 12 were asked for, 2 of them are there"):
        tasks(chosen, 4, 8)


def test_ids_that_differ_behind_what_a_task_is_called_are_no_twins() -> None:
    found = tasks(settings("vf-sums", {"named": f"https://example.org/{'x' * 80}/"}), 10)
    assert [task.question for task in found] == [f"What is {a} + 3?" for a in range(10)]
    assert len({task.id for task in found}) == 10
    assert max(len(task.id) for task in found) <= 80
    assert [task.id for task in tasks(settings("vf-sums", {"named": "sum  "}), 2)] == ["sum 0", "sum 1"]
    assert play(["4"], settings("vf-sums", {"named": "x" * 80}))[1].reward == 1.0


def test_a_question_that_several_splits_drew_is_asked_in_the_last_of_them() -> None:
    """Its rows differ in what nobody reads: their place."""
    splits = {"train": {"count": 4}, "development": {"count": 4, "skip": 5}, "held_out": {"count": 4, "skip": 8}}
    chosen = {"kind": "verifiers", "id": "vf-sums", "args": {"placed": True}}
    experiment = Experiment.model_validate({"experiment": "sums", "environment": chosen, "tasks": splits})
    asked = [[task.question.split()[2] for task in load_tasks_of(experiment, name)] for name in SPLITS]
    assert asked == [["0", "0", "1", "1"], ["2", "3", "3"], ["4", "4", "5", "5"]]
    check_disjoint(experiment)


def test_several_turns_with_the_ids_that_were_sampled(chat: ChatFormat) -> None:
    for number, t in enumerate(play(guess, settings("vf-talk"), count=9, chat=chat), 1):
        assert (t.status, t.answer, t.reward) == ("answered", f"I say {number}", 1 / t.turns)
        assert t.question == "I think of a number from 1 to 9."
        assert {step.observation for step in t.steps[:-1]} <= {"higher", "lower"}
        assert [step.call and step.call.name for step in t.steps] == [*[REPLY] * (t.turns - 1), None]
        assert [step.token_ids for step in t.steps] == [tuple(chat.encode_action(step.text)) for step in t.steps]


def test_reasoning_is_told_apart_from_a_call_that_speaks_of_it() -> None:
    from evolve_dag.environments.verifiers.library import response_of

    call = json.dumps({"name": "peek", "arguments": {"at": "</think>"}})
    for before, reasoning in (("<think>hm</think>", "hm"), ("", None)):
        text = f"{before}I look.\n<tool_call>\n{call}\n</tool_call>"
        message = response_of(ToolCall("peek", {"at": "</think>"}), Completion(text, (), (), "stop", 9), 1, ()).message
        assert (message.content, message.reasoning_content) == ("I look.", reasoning)
        assert message.tool_calls is not None
        assert json.loads(message.tool_calls[0].arguments) == {"at": "</think>"}


def test_the_last_call_ends_the_talk_and_what_is_reached_is_judged() -> None:
    [t] = play(["1", "2", "3"], settings("vf-faults", {"fault": "endless"}), count=1, max_steps=3)
    assert (t.status, t.reward, t.turns, t.error) == ("unanswered", 1.0, 3, None)
    assert (t.steps[1].observation or "").splitlines() == ["go on", LAST_STEP]


def test_tools_keep_their_state_and_are_torn_down() -> None:
    def asks(messages: Sequence[Message]) -> str:
        call = {"name": "prices_price", "arguments": {"item": "pear", "count": 3}}
        wrong = {"name": "prices_price", "arguments": {"item": "pear", "count": "three"}}
        steps = [f"<tool_call>{json.dumps(wrong)}</tool_call>", f"first\n<tool_call>{json.dumps(call)}</tool_call>"]
        return [*steps, messages[-1].content][len(messages) // 2 - 1]

    [t] = play(asks, settings("vf-shop", seconds=120.0), count=1)
    assert t.steps[0].problem == "the argument count must be integer; prices_price takes item, count"
    assert [step.observation for step in t.steps[1:]] == ["15", None]
    assert (t.status, t.answer, t.reward) == ("answered", "15", 1.0)
    assert '"name": "prices_price"' in t.system


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("nan", "the rubric gave nan, which is not from 0 to 1 (given nan x 1)"),
        ("two", "the rubric gave 2, which is not from 0 to 1"),
        ("below", "the rubric gave -0.5"),
        ("rubric", "TaskError: task Fault scoring: ValueError: no rubric today"),
        ("set-up", "TaskError: task setup: RuntimeError: cannot set up"),
        ("crash", "the board fell over"),
        ("twice", "plays more than one rollout in an episode"),
        ("rewrites", "the environment changed what was said before"),
        ("no ids", "no token ids"),
        ("shots", "begins with turns of an assistant"),
        ("image", "shows images"),
    ],
)
def test_a_fault_costs_its_episode(fault: str, told: str, chat: ChatFormat) -> None:
    [t] = play(["hello"] * 4, settings("vf-faults", {"fault": fault}), count=1, chat=chat)
    assert (t.status, t.reward) == ("failed", None)
    assert told in (t.error or "")


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("waits", "neither asked for a turn nor ended within 0.2 seconds"),
        ("spins", "blocks the library's event loop"),
        ("exits", "the environment raised SystemExit"),
    ],
)
def test_what_hangs_costs_its_episode_alone(fault: str, told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evolve_dag.environments.verifiers.stage.GRACE", 0.3)
    [t] = play(["hello"], settings("vf-faults", {"fault": fault}, seconds=0.2), count=1)
    assert told in (t.error or "")
    assert play(["3"], settings("vf-sums"))[0].reward == 1.0


@pytest.mark.parametrize(
    ("id", "args", "told"),
    [
        ("vf-faults", {"fault": "licence"}, "asks for input"),
        ("vf-faults", {"fault": "load"}, "OSError: gated: accept the terms first"),
        ("vf-faults", {"fault": "container"}, "row 0 needs a container"),
        ("vf-faults", {"flaw": "x"}, r"environment\.args: taskset\.flaw: Extra inputs"),
        ("vf-two", {}, r"seats 2 agents \(asker, solver\)"),
        ("verifiers", {}, "defines no `__all__`"),
        ("harbor", {}, "Harbor tasksets require the Harbor CLI"),
    ],
)
def test_what_cannot_be_played_is_refused_before_anything_is(id: str, args: dict[str, Any], told: str) -> None:
    with pytest.raises(DataError, match=told):
        tasks(settings(id, args), 1)


def test_a_finished_episode_is_not_played_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    first = play(["3"], settings("vf-sums"), journal=journal)
    model = ScriptedModel(["another"])
    again = asyncio.run(gather_rollouts(
        tasks(settings("vf-sums")), 1, model=model, environment=VerifiersTasks(settings("vf-sums"), TaskSplit(count=2)),
        verifier=ExactVerifier(), settings=RolloutSettings(), seed=3, concurrency=1, journal=Journal(tmp_path / "journal"),
    ))  # fmt: skip
    assert again == first
    assert model.requests == []


def test_nothing_is_left_when_the_environment_goes() -> None:
    before = {thread.name for thread in threading.enumerate()}
    chosen = settings("vf-sums")
    world = VerifiersTasks(chosen, TaskSplit(count=1))
    session = world.open(tasks(chosen, 1)[0], 0)
    session.close()
    assert "verifiers vf-sums" in {thread.name for thread in threading.enumerate()}
    del world, session
    assert {thread.name for thread in threading.enumerate() if thread.is_alive()} <= before


def test_two_nights_of_the_whole_loop(tmp_path: Path) -> None:
    """Rolled out, taught, learned and scored with the pocket policy, which here succeeds by chance; nothing fails."""
    pool = tmp_path / "pool.json"
    pool.write_text(json.dumps({"p0001": "Length: when asked to speak, count the letters."}))
    splits = {
        "train": {"count": 3, "stream": True},
        "development": {"count": 2, "skip": 20},
        "held_out": {"count": 2, "skip": 40},
    }
    experiment = Experiment.model_validate({
        "experiment": "even", "seed": 5, "start_pool": str(pool), "environment": {"kind": "verifiers", "id": "vf-even"},
        "tasks": splits, "rollout": {"group_size": 3, "max_action_tokens": 6}, "injection": "global",
        "distillation": {"epochs": 1, "rank": 2, "retention": 0.0}, "evaluation": {"bootstrap": 100, "base_temperatures": []},
        "runtime": {"threads": 1, "concurrency": 8},
    })  # fmt: skip
    store = Store(tmp_path / "store")
    made = {(step, k): run_step(step, experiment, k, store).artifact for k in (1, 2) for step in STEP_ORDER}
    for night in (1, 2):
        rolled = load_trajectories(made["trajectories", night])
        assert {t.status for t in rolled} == {"answered"}
        assert {t.reward for t in rolled} <= {0.0, 0.5, 1.0}
        assert all(step.token_ids for t in rolled for step in t.steps)
        assert made["scores", night].summary["failed"] == 0
    assert made["contexts", 1].summary["kept"] > 0
    assert not {t.task_id for t in load_trajectories(made["trajectories", 1])} & {
        t.task_id for t in load_trajectories(made["trajectories", 2])
    }
