"""Environments with a state: an episode's own state, its end, its reward, and everything that can break in it."""

from __future__ import annotations

import asyncio
import sys
import threading
from collections.abc import Callable
from typing import Any

import pytest
from stateful_worlds import ADD, GOAL, Counters, add
from worlds import ANSWER, SEARCH, TASK, Exact, World

from evolve_dag.agent.loop import run_episode
from evolve_dag.agent.rollouts import episode_seed, gather_rollouts
from evolve_dag.agent.sessions import MOST_CHARACTERS, Worker, checked_reward
from evolve_dag.config.schema import RolloutSettings
from evolve_dag.errors import SessionError
from evolve_dag.inference.scripted import ScriptedModel
from evolve_dag.plain import LAST_STEP
from evolve_dag.protocols import Session, ToolResult
from evolve_dag.records import Task, ToolCall, Trajectory, solved

FAIL = '<tool_call>{"name": "fail", "arguments": {}}</tool_call>'


def run(script: Any, environment: Any, *, verifier: Any = None, seed: int = 7, **settings: Any) -> Trajectory:
    return asyncio.run(
        run_episode(
            TASK,
            2,
            model=ScriptedModel(script),
            environment=environment,
            verifier=verifier or Exact(),
            settings=RolloutSettings(**settings),
            seed=seed,
        )
    )


def raising(error: BaseException) -> Callable[[], Any]:
    def broken() -> Any:
        raise error

    return broken


class Bare:
    """As little as docs/extending.md asks for."""

    def __init__(self) -> None:
        self.tools = (ADD,)
        self.system_prompt = "Count."

    def call(self, call: ToolCall) -> str:
        return f"{call.arguments['n']} more"


class Derived(Bare, Session):
    """The same, of our class."""


@pytest.mark.parametrize("kind", [Bare, Derived])
def test_a_session_may_leave_out_what_it_has_nothing_to_say_of(kind: type[Any]) -> None:
    class Opens:
        def open(self, task: Task, seed: int) -> Session:
            made: Session = kind()
            return made

    trajectory = run([add(1), ANSWER], Opens())
    assert (trajectory.status, trajectory.reward, trajectory.error) == ("answered", 1.0, None)
    assert (trajectory.system, trajectory.question, trajectory.steps[0].observation) == ("Count.", TASK.question, "1 more")


def test_the_environment_ends_the_episode_and_judges_it() -> None:
    world = Counters()
    trajectory = run([add(3), add(5), ANSWER], world)
    assert (trajectory.status, trajectory.answer, trajectory.reward, trajectory.error) == ("ended", None, 1.0, None)
    assert trajectory.system == "Count."
    assert [step.features for step in trajectory.steps] == [
        {"counter": "below its goal"},
        {"counter": "at its goal"},
    ]
    assert trajectory.steps[0].call is not None
    assert trajectory.steps[0].call.arguments == {"n": 3}
    assert trajectory.steps[-1].observation is not None
    assert LAST_STEP not in trajectory.steps[-1].observation


def test_an_answer_before_the_end_gets_part_of_the_reward() -> None:
    trajectory = run([add(1), ANSWER], Counters(), seed=1)
    assert (trajectory.status, trajectory.answer) == ("answered", "Rato Miku")
    assert trajectory.reward is not None
    assert 0 < trajectory.reward < 1


def test_without_a_reward_of_its_own_the_verifier_judges() -> None:
    assert run([add(1), ANSWER], Counters({"reward": lambda: None})).reward == 1.0
    assert run([add(1), "<answer>no</answer>"], Counters({"reward": lambda: None})).reward == 0.0


def test_set_up_calls_and_tear_down_run_in_one_thread_that_is_not_the_loops() -> None:
    world = Counters()
    run([add(1), add(1), ANSWER], world)
    assert [entry.split()[0] for entry in world.log] == ["open", "call", "call", "close"]
    assert len({entry.split(maxsplit=1)[1] for entry in world.log}) == 1
    assert threading.current_thread().name not in world.log[0]


def test_same_seed_same_episode() -> None:
    first, again = (run([add(1), ANSWER], Counters(), seed=11) for _ in range(2))
    assert [s.observation for s in first.steps] == [s.observation for s in again.steps]
    starts = {run([add(1), ANSWER], Counters(), seed=seed).steps[0].observation for seed in range(12)}
    assert len(starts) == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "the argument n is missing; add takes n, note"),
        ({"n": "2"}, "the argument n must be integer"),
        ({"n": 2.5}, "the argument n must be integer"),
        ({"n": 9}, "the argument n must keep to maximum 5"),
        ({"n": 1, "m": 2}, "the argument m is unknown"),
        ({"n": [1]}, "the argument n must be integer"),
        ({"n": float("nan")}, "a number that is out of range"),
    ],
)
def test_a_wrong_argument_is_told_and_the_call_is_not_made(arguments: dict[str, Any], says: str) -> None:
    world = Counters()
    bad = add(**arguments) if "n" in arguments else '<tool_call>{"name": "add", "arguments": {}}</tool_call>'
    trajectory = run([bad, ANSWER], world)
    problem = trajectory.steps[0].problem
    assert problem is not None
    assert says in problem
    assert (
        trajectory.steps[0].observation
        == f"error: {problem}. write one tool call, a json object with name and arguments, or one answer"
    )
    assert trajectory.steps[0].features == {}
    assert not [entry for entry in world.log if entry.startswith("call")]


def test_a_refused_call_is_an_observation_that_says_so_in_a_feature() -> None:
    step = run([FAIL, ANSWER], Counters()).steps[0]
    assert (step.observation, step.problem, step.features) == ("not allowed", None, {"result": "an error"})


def test_what_describes_nothing_is_described_by_what_fits_any_text() -> None:
    texts = iter(["one", "one", "", "a\nb"])
    world = Counters({"call": lambda: next(texts)})
    trajectory = run([add(1)] * 4 + [ANSWER], world)
    assert [step.features["result"] for step in trajectory.steps[:4]] == [
        "one line",
        "the same as before",
        "empty",
        "several lines",
    ]


HANG = threading.Event()


@pytest.mark.parametrize("where", ["open", "call", "reward"])
@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (raising(ValueError("kaput")), "ValueError: kaput"),
        (raising(SystemExit(3)), "the environment raised SystemExit"),
        (raising(KeyboardInterrupt()), "the environment raised KeyboardInterrupt"),
        (raising(StopIteration()), "StopIteration"),
        (HANG.wait, "took longer than 0.2 seconds"),
    ],
)
def test_what_breaks_costs_its_episode_and_is_torn_down(where: str, broken: Callable[[], Any], says: str) -> None:
    world = Counters({where: broken})
    trajectory = run([add(1), ANSWER], world, max_seconds=0.2 if broken == HANG.wait else 600)
    assert (trajectory.status, trajectory.reward, trajectory.answer) == ("failed", None, None)
    assert trajectory.error is not None
    assert says in trajectory.error
    if broken != HANG.wait and where != "open":
        assert world.log[-1].startswith("close")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "NoneType, not text"),
        (b"bytes", "bytes, not text"),
        ("x" * (MOST_CHARACTERS + 1), "1,000,001 characters"),
        (ToolResult("x", features={"Name": "a"}), "'Name' is no feature"),
        (ToolResult("x", features={"name": "Bado Keli"}), "'Bado Keli' is no feature"),
        (ToolResult("x", features={"name": "a, b."}), "is no feature"),
        (ToolResult("x", features=dict.fromkeys("abcdefg", "x")), "7 features"),
        (ToolResult("x", features={"can": "go on; Take It"}), "'Take It' is no feature"),
        (ToolResult("x", features={"can": ["go on"]}), "['go on'] is no feature"),  # type: ignore[dict-item]
        (ToolResult("x", features={"can": []}), "[] is no feature"),  # type: ignore[dict-item]
    ],
)
def test_an_observation_that_no_episode_can_hold(given: Any, says: str) -> None:
    trajectory = run([add(1), ANSWER], Counters({"call": lambda: given}))
    assert trajectory.status == "failed"
    assert trajectory.error is not None
    assert says in trajectory.error
    assert trajectory.steps[0].call is not None
    assert trajectory.steps[0].observation is None


@pytest.mark.parametrize("given", [float("nan"), float("inf"), -0.1, 1.1, "1", [1]])
def test_a_reward_out_of_range(given: Any) -> None:
    trajectory = run([add(1), ANSWER], Counters({"reward": lambda: given}))
    assert (trajectory.status, trajectory.reward) == ("failed", None)
    assert trajectory.error is not None
    assert "the reward is" in trajectory.error

    class Wrong(Exact):
        async def verify(self, task: Task, answer: str | None) -> float | None:
            return given

    judged = run([SEARCH, ANSWER], World(), verifier=Wrong())
    assert (judged.status, judged.reward) == ("answered", None)
    assert judged.error is not None
    assert judged.error.startswith("not judged: SessionError")


def test_a_reward_of_a_library_is_a_number() -> None:
    import numpy as np

    given = (np.float32(0.5), np.int64(1), True, 0, None, np.True_, np.array([0.25]))
    assert [checked_reward(value) for value in given] == [0.5, 1.0, 1.0, 0.0, None, 1.0, 0.25]
    with pytest.raises(SessionError, match="the reward is"):
        checked_reward(np.array([0.5, 0.5]))


@pytest.mark.parametrize("total", [0.7 + 0.2 + 0.1, 0.8 + 0.05 + 0.05 + 0.1])
def test_parts_of_a_reward_that_add_up_to_all_but_rounding_are_the_whole_of_it(total: float) -> None:
    assert total != 1
    trajectory = run([add(1), ANSWER], Counters({"reward": lambda: total}))
    assert (trajectory.reward, trajectory.error) == (1.0, None)
    assert solved(trajectory.reward)
    assert checked_reward(1 - total) == 0.0
    assert checked_reward(1 - 1e-6) == 1 - 1e-6, "a part of a reward stays one"


@pytest.mark.parametrize("broken", [raising(OSError("gone")), raising(SystemExit())])
def test_a_tear_down_that_fails_keeps_the_reward(broken: Callable[[], Any]) -> None:
    trajectory = run([add(5), add(5)], Counters({"close": broken}))
    assert (trajectory.status, trajectory.reward) == ("ended", 1.0)
    assert trajectory.error is not None
    assert trajectory.error.startswith("not torn down: ")


def test_a_state_whose_set_up_came_too_late_is_torn_down() -> None:
    late = threading.Event()
    closed = threading.Event()
    world = Counters({"open": late.wait, "close": closed.set})
    assert run([ANSWER], world, max_seconds=0.05).status == "failed"
    late.set()
    assert closed.wait(10)


def test_tools_without_state_are_held_to_the_same_limits() -> None:
    class Slow(World):
        async def call(self, call: Any) -> str:
            await asyncio.sleep(60)
            return ""

    trajectory = run([SEARCH, ANSWER], Slow(), max_seconds=0.05)
    assert trajectory.status == "failed"
    assert trajectory.error == "SessionError: the call of search took longer than 0.05 seconds"
    flood = run([SEARCH, ANSWER], World(observation="x" * (MOST_CHARACTERS + 1)))
    assert (flood.status, flood.reward) == ("failed", None)

    class Ending(World):
        async def call(self, call: Any) -> Any:
            return ToolResult("over", done=True, features={"result": "the end"})

    ended = run([SEARCH, ANSWER], Ending())
    assert (ended.status, ended.reward, ended.steps[0].features) == ("ended", 0.0, {"result": "the end"})


def test_tools_that_cannot_be_listed_cost_the_episode() -> None:
    class Broken(World):
        @property
        def tools(self) -> Any:
            raise ValueError("kaput")

    trajectory = run([ANSWER], Broken())
    assert (trajectory.status, trajectory.error) == ("failed", "ValueError: kaput")


def test_a_timeout_that_the_tool_itself_raised_is_told_as_its_own() -> None:
    trajectory = run([SEARCH, ANSWER], World(error=TimeoutError("the page")))
    assert trajectory.error == "TimeoutError: the page"


def test_one_broken_episode_leaves_the_others_alone_and_a_journal_holds_all() -> None:
    from test_rollouts import ListJournal

    class OneBreaks(Counters):
        def open(self, task: Task, seed: int) -> Any:
            if task.id == "t1":
                raise ValueError("kaput")
            return super().open(task, seed)

    tasks = [Task(f"t{n}", "count", "") for n in range(3)]
    journal = ListJournal()
    arguments: dict[str, Any] = {
        "verifier": Exact(),
        "settings": RolloutSettings(),
        "seed": 3,
        "concurrency": 2,
        "journal": journal,
    }
    model = ScriptedModel([add(5), add(5)])
    first = asyncio.run(gather_rollouts(tasks, 2, model=model, environment=OneBreaks(), **arguments))
    assert [t.status for t in first] == ["ended", "ended", "failed", "failed", "ended", "ended"]
    # Killed before a row was written: only that one begins again, from its set-up and with its seed.
    world = OneBreaks()
    lost = [record for record in journal.records() if record["id"] != "t2#1"]
    arguments["journal"] = ListJournal(lost)
    again = asyncio.run(gather_rollouts(tasks, 2, model=ScriptedModel([add(5), add(5)]), environment=world, **arguments))
    written = {record["id"] for record in lost}
    [missing] = [t for t in first if t.id not in written]
    assert world.seeds == [episode_seed(3, missing.task_id, missing.rollout)]
    assert [[s.observation for s in t.steps] for t in again] == [[s.observation for s in t.steps] for t in first]
    assert [(t.reward, [s.features for s in t.steps]) for t in again] == [
        (t.reward, [s.features for s in t.steps]) for t in first
    ]


def test_a_cancelled_episode_is_torn_down() -> None:
    world = Counters()

    async def cancelled() -> None:
        model = ScriptedModel([add(1)] * 50, delay=0.01)
        episode = asyncio.create_task(
            run_episode(TASK, 0, model=model, environment=world, verifier=Exact(), settings=RolloutSettings(), seed=1)
        )
        while not world.log:
            await asyncio.sleep(0.01)
        episode.cancel()
        with pytest.raises(asyncio.CancelledError):
            await episode

    asyncio.run(cancelled())
    assert world.log[-1].startswith("close")


def test_a_thread_that_hangs_does_not_keep_the_process() -> None:
    import subprocess

    code = (
        "import asyncio, threading\n"
        "from evolve_dag.agent.sessions import Worker\n"
        "from evolve_dag.errors import SessionError\n"
        "async def main():\n"
        "    try:\n"
        "        await Worker('w').run(threading.Event().wait, 'it', 0.05)\n"
        "    except SessionError as problem:\n"
        "        print(problem.what)\n"
        "asyncio.run(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "it took longer than 0.05 seconds\n"


def test_a_worker_says_what_was_raised_and_goes_on() -> None:
    async def both() -> None:
        worker = Worker("w")
        with pytest.raises(SessionError):
            await worker.run(raising(SystemExit()), "it", 5)
        assert await worker.run(lambda: GOAL, "it", 5) == GOAL
        worker.stop()

    asyncio.run(both())
