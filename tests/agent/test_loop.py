"""One episode: every limit, every bad action, every failure."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from worlds import ANSWER, SEARCH, TASK, Exact, World

from evolve_dag.agent.loop import call_seed, run_episode
from evolve_dag.config.loading import load_experiment
from evolve_dag.config.schema import RolloutSettings, VllmModelSettings
from evolve_dag.errors import ContextOverflowError, ModelError
from evolve_dag.inference.chat import ChatFormat
from evolve_dag.inference.scripted import Reply, ScriptedModel
from evolve_dag.plain import LAST_STEP
from evolve_dag.protocols import Completion, Injected, Request, ToolError
from evolve_dag.records import Message, Trajectory
from evolve_dag.secrecy import describe_error


def run(script: Any, *, environment: World | None = None, verifier: Exact | None = None, **settings: Any) -> Trajectory:
    return asyncio.run(episode(script, environment, verifier, **settings))


async def episode(
    script: Any, environment: World | None = None, verifier: Exact | None = None, experience: Any = None, **settings: Any
) -> Trajectory:
    model = script if isinstance(script, (ScriptedModel, Bounded)) else ScriptedModel(script)
    trajectory = await run_episode(
        TASK,
        2,
        model=model,
        environment=environment or World(),
        verifier=verifier or Exact(),
        settings=RolloutSettings(**settings),
        seed=7,
        experience=experience,
    )
    assert len(model.released) == 1
    assert model.released[0].startswith("t1#2@")
    return trajectory


def test_search_then_answer() -> None:
    model = ScriptedModel([SEARCH, ANSWER])
    trajectory = run(model)
    assert (trajectory.id, trajectory.task_id, trajectory.rollout, trajectory.seed) == ("t1#2", "t1", 2, 7)
    assert (trajectory.status, trajectory.answer, trajectory.reward, trajectory.error) == ("answered", "Rato Miku", 1.0, None)
    assert trajectory.system == "Use the tools."
    assert trajectory.question == TASK.question
    first, last = trajectory.steps
    assert first.call is not None
    assert first.call.arguments == {"query": "Bado Keli"}
    assert first.observation == World().observation
    assert (last.answer, last.observation) == ("Rato Miku", None)
    assert model.requests[1].messages == trajectory.history(1)
    assert [request.sampling.seed for request in model.requests] == [call_seed(7, 0), call_seed(7, 1)]
    assert len({request.session for request in model.requests}) == 1


def test_ids_and_logprobs_are_kept(byte_chat: ChatFormat) -> None:
    trajectory = run(ScriptedModel([SEARCH, ANSWER], chat=byte_chat), max_action_tokens=400)
    for step, text in zip(trajectory.steps, (SEARCH, ANSWER), strict=True):
        assert step.token_ids == tuple(byte_chat.encode_action(text))
        assert len(step.logprobs) == len(step.token_ids)
        assert step.prompt_tokens == len(byte_chat.encode(trajectory.history(step.index)))


def test_wrong_answer_is_zero_and_unjudged_is_none() -> None:
    assert run(["<answer>no</answer>"]).reward == 0.0
    trajectory = run([ANSWER], verifier=Exact(error=ValueError("judge is down")))
    assert (trajectory.status, trajectory.reward) == ("answered", None)
    assert trajectory.error == "not judged: ValueError: judge is down"


@pytest.mark.parametrize(
    ("reply", "says"),
    [
        ("hm", "there is no tool call and no answer"),
        ("<tool_call>{</tool_call>", "not valid json"),
        ("<tool_call>{", "not closed"),
        (SEARCH + SEARCH, "2 tool calls"),
        (SEARCH + ANSWER, "both"),
        ("<answer></answer>", "empty"),
        ('<tool_call>{"name": "find", "arguments": {"query": "a"}}</tool_call>', "no tool find; the tools are: search, visit"),
        ('<tool_call>{"name": "search", "arguments": {}}</tool_call>', "query is missing"),
        ('<tool_call>{"name": "search", "arguments": {"query": "a", "n": 1}}</tool_call>', "n is unknown"),
    ],
)
def test_bad_action_is_told_and_the_loop_goes_on(reply: str, says: str) -> None:
    world = World()
    trajectory = run([reply, SEARCH, ANSWER], environment=world)
    bad = trajectory.steps[0]
    assert bad.problem is not None
    assert says in bad.problem
    assert bad.observation is not None
    assert bad.problem in bad.observation
    assert "write one tool call" in bad.observation
    assert trajectory.status == "answered"
    assert len(world.calls) == 1


def test_action_that_was_cut_off_says_so(byte_chat: ChatFormat) -> None:
    trajectory = run(ScriptedModel([SEARCH, ANSWER], chat=byte_chat), max_action_tokens=12)
    assert trajectory.steps[0].problem == "the action is longer than 12 tokens"


def test_tool_error_is_an_observation() -> None:
    visit = '<tool_call>{"name": "visit", "arguments": {"page": "x"}}</tool_call>'
    trajectory = run([visit, ANSWER])
    assert trajectory.steps[0].observation == "no page of that name"
    assert trajectory.steps[0].problem is None
    assert trajectory.status == "answered"


@pytest.mark.parametrize("max_steps", [1, 2, 5])
def test_last_step_is_announced_once_in_the_clean_history(max_steps: int) -> None:
    model = ScriptedModel([SEARCH] * (max_steps - 1) + [ANSWER])
    trajectory = run(model, max_steps=max_steps)
    assert trajectory.status == "forced"
    assert trajectory.turns == max_steps
    announced = [LAST_STEP in message.content for message in model.requests[-1].messages]
    assert announced == [False] * (len(announced) - 1) + [True]
    assert all(LAST_STEP not in m.content for request in model.requests[:-1] for m in request.messages)
    assert model.requests[-1].messages[-1].content.endswith(f"\n{LAST_STEP}")
    assert model.requests[-1].messages == trajectory.history(max_steps - 1)


def test_answer_before_the_limit_is_not_forced() -> None:
    assert run([SEARCH, ANSWER], max_steps=3).status == "answered"


@pytest.mark.parametrize(
    ("reply", "status", "answer"),
    [
        (ANSWER, "forced", "Rato Miku"),
        ("Rato Miku", "forced", "Rato Miku"),
        ("<think>\nperson Rato Miku\n</think>\n\nRato Miku", "forced", "Rato Miku"),
        ("<think>Rato Miku", "unanswered", None),
        ("<think>perhaps <answer>Rato Miku</answer> or", "unanswered", None),
        (" \n", "unanswered", None),
        (SEARCH, "unanswered", None),
        ("Rato <answer>", "unanswered", None),
        ("<answer></answer>", "unanswered", None),
    ],
)
def test_forced_call(reply: str, status: str, answer: str | None) -> None:
    world = World()
    trajectory = run([SEARCH, reply], environment=world, max_steps=2)
    assert (trajectory.status, trajectory.answer) == (status, answer)
    assert trajectory.reward == (1.0 if answer else 0.0)
    assert trajectory.steps[-1].observation is None
    assert len(world.calls) == 1  # no tool runs after the last call


def test_plain_text_is_an_answer_only_when_forced() -> None:
    trajectory = run(["Rato Miku", ANSWER], max_steps=3)
    assert trajectory.steps[0].answer is None
    assert trajectory.status == "answered"


def test_a_plain_answer_is_what_stands_after_the_reasoning() -> None:
    trajectory = run(["<think>cut off", "<think>he is</think>\n\nRato Miku"], max_steps=4, plain_answers=True)
    assert (trajectory.turns, trajectory.status, trajectory.answer) == (2, "answered", "Rato Miku")


def test_context_limit_forces_an_answer() -> None:
    long = World(observation="word " * 200)
    trajectory = run([SEARCH, SEARCH, ANSWER], environment=long, max_tokens=200)
    assert trajectory.turns == 2
    assert trajectory.steps[0].observation == long.observation + f"\n{LAST_STEP}"
    assert trajectory.status == "unanswered"


class Counting(ScriptedModel):
    """A model with a tokenizer of one token a character."""

    def count_tokens(self, message: Message) -> int:
        return len(message.content)


def test_the_context_limit_counts_the_tokens_of_a_tokenizer() -> None:
    page = World(observation="长" * 150)  # 150 characters; at four characters a token they would pass for 37
    assert run(Counting([SEARCH, ANSWER]), environment=page, max_tokens=155).status == "forced"
    assert run(Counting([SEARCH, ANSWER]), environment=page, max_tokens=400).status == "answered"


@dataclass
class Bounded:
    """A model of one token a character whose engine takes so many, the answer included, as :mod:`evolve_dag.inference.vllm`."""

    replies: list[str]
    context: int
    released: list[str] = field(default_factory=list)

    def count_tokens(self, message: Message) -> int:
        return len(message.content)

    async def generate(self, request: Request) -> Completion:
        used = sum(map(self.count_tokens, request.messages))
        if used >= self.context:
            raise ContextOverflowError(f"the context is {used} tokens long")
        whole = self.replies.pop(0)
        text = whole[: min(request.sampling.max_tokens, self.context - used)]
        return Completion(text, (1,) * len(text), (0.0,) * len(text), "stop" if text == whole else "length", used)

    def release(self, session: str) -> None:
        self.released.append(session)

    async def close(self) -> None: ...


@pytest.mark.parametrize("name", ["qwen3_4b_web", "qwen3_8b_web", "math"])
@pytest.mark.parametrize("below", [1, -1])
def test_with_the_files_for_a_gpu_an_episode_at_the_context_limit_gives_its_last_answer(name: str, below: int) -> None:
    """As close to the limit as can be without reaching it, or past it; then everything is as long as it may be."""
    experiment = load_experiment(Path(__file__).parents[2] / f"configs/{name}.yaml")
    policy, limits = experiment.models.policy, experiment.rollout
    assert isinstance(policy, VllmModelSettings)
    longest = limits.max_action_tokens
    action, answer = SEARCH.replace("look", "look" * longest)[-longest:], ANSWER.rjust(longest)
    begun = len(World.system_prompt) + len(TASK.question) + len(action)
    pages = ["." * (limits.max_tokens - begun - below), "." * 4000]
    model = Bounded([action, action, answer] if below > 0 else [action, answer], policy.context_tokens)
    trajectory = run(model, environment=World(pages=pages), **limits.model_dump())
    assert (trajectory.status, trajectory.answer, trajectory.error) == ("forced", "Rato Miku", None)
    assert trajectory.steps[-2].observation is not None
    assert trajectory.steps[-2].observation.endswith(LAST_STEP)


def test_without_a_tokenizer_chinese_pages_are_not_taken_for_short() -> None:
    page = World(observation="北京市长" * 50)  # 200 characters, some 150 to 200 tokens of a multilingual tokenizer
    assert run([SEARCH, ANSWER], environment=page, max_tokens=160).status == "forced"
    assert run([SEARCH, ANSWER], environment=World(observation="mayor " * 33), max_tokens=160).status == "answered"


def test_a_context_that_overflows_is_the_policys_own_failure() -> None:
    trajectory = run([SEARCH, ContextOverflowError("the context is 5000 tokens long, the model takes 4096", "shorten it")])
    assert (trajectory.status, trajectory.answer, trajectory.reward) == ("unanswered", None, 0.0)
    assert trajectory.error == "ContextOverflowError: the context is 5000 tokens long, the model takes 4096"
    assert trajectory.turns == 1


def test_a_model_of_the_environment_or_of_the_selector_that_overflows_is_no_failure_of_the_policy() -> None:
    class Selecting:
        async def prepare(self, trajectory: Trajectory) -> Injected:
            raise ContextOverflowError("the selector's context is 5000 tokens long")

    world = World(error=ContextOverflowError("the page is 5000 tokens long, the model that sums up takes 4096"))
    for trajectory in (run([SEARCH, ANSWER], environment=world), asyncio.run(episode([ANSWER], experience=Selecting()))):
        assert (trajectory.status, trajectory.reward) == ("failed", None)
        assert (trajectory.error or "").startswith("ContextOverflowError: the ")


def test_time_limit_forces_an_answer() -> None:
    trajectory = run(ScriptedModel([SEARCH, ANSWER], delay=0.02), max_seconds=0.01)
    assert (trajectory.turns, trajectory.status) == (2, "forced")


@pytest.mark.parametrize("error", [RuntimeError("index\nis gone"), ModelError("the endpoint is down", "start it")])
def test_failed_rollout_is_a_row(error: Exception) -> None:
    trajectory = run([SEARCH, error])
    assert (trajectory.status, trajectory.answer, trajectory.reward) == ("failed", None, None)
    assert trajectory.error == f"{type(error).__name__}: {str(error).splitlines()[0]}" + (
        " is gone" if "index" in str(error) else ""
    )
    assert trajectory.turns == 1


def test_broken_tool_keeps_the_call_that_broke_it() -> None:
    trajectory = run([SEARCH], environment=World(error=KeyError("page")))
    assert trajectory.error == "KeyError: 'page'"
    assert trajectory.steps[0].call is not None
    assert trajectory.steps[0].observation is None


def test_cancellation_passes_and_releases_the_session() -> None:
    model = ScriptedModel([SEARCH], delay=30)

    async def scene() -> None:
        task = asyncio.create_task(
            run_episode(TASK, 0, model=model, environment=World(), verifier=Exact(), settings=RolloutSettings(), seed=0)
        )
        await asyncio.sleep(0.01)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scene())
    assert len(model.released) == 1


def test_errors_hold_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEARCH_API_KEY", "abcdefgh12345")
    text = describe_error(
        RuntimeError(
            "GET https://me:hunter22@host/x?api_key=zzz9 failed for abcdefgh12345, Authorization: Bearer q.w.e and sk-12345678"
        )
    )
    assert text == "RuntimeError: GET https://me:***@host/x?api_key=*** failed for ***, Authorization: Bearer *** and ***"
    assert len(describe_error(RuntimeError("x" * 10_000))) == 500
    assert describe_error(ToolError()) == "ToolError"
    assert describe_error(OSError("http://localhost:8000/v1 refused")) == "OSError: http://localhost:8000/v1 refused"


class Hints:
    """Appends its texts, one per step, to the last message of a copy."""

    def __init__(self, hints: list[str]) -> None:
        self.hints = hints

    async def prepare(self, trajectory: Trajectory) -> Injected:
        history = trajectory.history(trajectory.turns)
        hint = self.hints[trajectory.turns % len(self.hints)]
        if not hint:
            return Injected(history)
        text = f"\nhint:\n{hint}"
        copy = (*history[:-1], replace(history[-1], content=history[-1].content + text))
        return Injected(copy, (f"item-{trajectory.turns}",), text)


replies = st.sampled_from(
    [
        SEARCH,
        ANSWER,
        "hm",
        "<tool_call>",
        RuntimeError("gone"),
        '<tool_call>{"name": "visit", "arguments": {"page": "x"}}</tool_call>',
    ]
)


@given(
    script=st.lists(replies, min_size=1, max_size=6),
    hints=st.lists(st.sampled_from(["", "ZEBRA one", "ZEBRA two"]), min_size=1, max_size=4),
    max_steps=st.integers(1, 6),
)
@settings(max_examples=60, deadline=None)
def test_history_never_holds_experience(script: list[Reply], hints: list[str], max_steps: int) -> None:
    model = ScriptedModel(script)
    trajectory = asyncio.run(episode(model, experience=Hints(hints), max_steps=max_steps))
    history = trajectory.history(trajectory.turns)
    assert all("ZEBRA" not in message.content for message in history)
    assert "ZEBRA" not in trajectory.system + trajectory.question
    for step, request in zip(trajectory.steps, model.requests, strict=False):
        hint = hints[step.index % len(hints)]
        assert step.injected == (f"\nhint:\n{hint}" if hint else "")
        assert step.selected == ((f"item-{step.index}",) if hint else ())
        # The teacher's view is the clean history with the recorded text behind its last message, and nothing else.
        clean = trajectory.history(step.index)
        assert request.messages == (*clean[:-1], Message(clean[-1].role, clean[-1].content + step.injected))
    plain = asyncio.run(episode(ScriptedModel(script), max_steps=max_steps))
    assert plain.history(plain.turns) == history  # the same script, without experience, leaves the same history


def test_failing_experience_source_is_a_failed_rollout() -> None:
    class Broken:
        async def prepare(self, trajectory: Trajectory) -> Injected:
            raise ValueError("no pool")

    trajectory = asyncio.run(episode([ANSWER], experience=Broken()))
    assert (trajectory.status, trajectory.error) == ("failed", "ValueError: no pool")


def test_call_seeds_are_stable_numbers() -> None:
    assert call_seed(0, 0) == 1737924735993394113  # journals hold seeds: another value would run everything anew
    assert len({call_seed(seed, step) for seed in range(50) for step in range(50)}) == 2500
    assert all(0 <= call_seed(seed, 1) < 2**63 for seed in (0, -1, 2**63 - 1))
