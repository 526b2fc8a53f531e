"""One episode: think, call a tool, observe, ..., answer (ReAct; METHOD step 1).

The history that is kept is the clean one. An :class:`ExperienceSource` gives a copy with experience in it for
each call; what it showed is recorded in the step and nowhere else.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from evolve_dag.agent.actions import ParsedAction, explain, parse_action, said, validate_call
from evolve_dag.agent.sessions import Calls, calls_of, checked_reward
from evolve_dag.errors import ClosedError, ContextOverflowError, ExhaustedError
from evolve_dag.inference.outgoing import tokens_of
from evolve_dag.plain import LAST_STEP, plain
from evolve_dag.protocols import (
    TALK,
    Completion,
    Environment,
    ExperienceSource,
    Injected,
    LanguageModel,
    Request,
    Sampling,
    StatefulEnvironment,
    ToolResult,
)
from evolve_dag.records import REPLY, Message, Step, Task, Trajectory, TrajectoryStatus
from evolve_dag.secrecy import describe_error
from evolve_dag.seeds import stable_hash

if TYPE_CHECKING:
    from evolve_dag.config.schema import RolloutSettings
    from evolve_dag.protocols import Verifier

_session_numbers = itertools.count()
NOT_JUDGED = "not judged: "
"""Begins what is told of an episode that was played and for which the verifier failed."""


def call_seed(seed: int, step: int) -> int:
    """Seed of one model call; depends on the episode's seed and the step's index alone."""
    return stable_hash("call", seed, step)


async def run_episode(
    task: Task,
    rollout: int,
    *,
    model: LanguageModel,
    environment: Environment | StatefulEnvironment,
    verifier: Verifier,
    settings: RolloutSettings,
    seed: int,
    experience: ExperienceSource | None = None,
) -> Trajectory:
    """Run the policy on ``task`` until it answers, the environment or a limit ends the episode, or something fails.

    The last call that a limit allows is announced in the clean history by :data:`LAST_STEP`. ``max_tokens`` and
    ``max_seconds`` are looked at between calls: past either, the next call is the last. An answer on that call
    is ``forced``; text without any tag counts as one there.

    Args:
        seed: every sampled token follows from it, given the same views; and what an environment with a state draws.

    Returns:
        The trajectory, judged by the environment, or where that says nothing by ``verifier``. What the policy brought upon
        itself (limits, a context that overflows) leaves it ``unanswered`` and is judged so; any other exception but
        cancellation ends in status ``failed`` with reward None and the steps so far; one of the verifier leaves the status,
        with reward None. A tear-down that fails is told in ``error`` and costs nothing.
    """
    started = time.monotonic()
    session = f"{task.id}#{rollout}@{next(_session_numbers)}"
    calls = calls_of(environment, task, seed, settings.max_seconds)
    episode = _Episode(task, rollout, model, calls, settings, seed, experience, session, started)
    try:
        trajectory = await episode.run()
    finally:
        model.release(session)
        left = await calls.close()
    if left is not None and trajectory.error is None:
        trajectory = replace(trajectory, error=f"not torn down: {left}")
    if trajectory.status != "failed" and trajectory.reward is None:
        trajectory = await judged(trajectory, task, verifier)
    return replace(trajectory, seconds=time.monotonic() - started)


async def judged(trajectory: Trajectory, task: Task, verifier: Verifier) -> Trajectory:
    """An episode that was played and has no verdict, with that of ``verifier``, or with why there is none."""
    try:
        return replace(trajectory, reward=checked_reward(await verifier.verify(task, trajectory.answer)))
    except ExhaustedError:
        raise
    except Exception as problem:
        return replace(trajectory, error=f"{NOT_JUDGED}{describe_error(problem)}")


class _Episode:
    """The state of one running episode."""

    def __init__(
        self,
        task: Task,
        rollout: int,
        model: LanguageModel,
        calls: Calls,
        settings: RolloutSettings,
        seed: int,
        experience: ExperienceSource | None,
        session: str,
        started: float,
    ) -> None:
        self.model, self.calls, self.settings = model, calls, settings
        self.experience, self.session, self.started = experience, session, started
        self.last = settings.max_steps == 1
        self.trajectory = Trajectory(
            id=f"{task.id}#{rollout}",
            task_id=task.id,
            rollout=rollout,
            seed=seed,
            system="",
            question=self.asked(plain(task.question)),
            steps=(),
            status="unanswered",
        )

    @property
    def converses(self) -> bool:
        """Whether what is said is heard, and an answer where the episode ends with it."""
        return TALK in self.calls.tools

    def asked(self, question: str) -> str:
        """The first user message."""
        return f"{question}\n{LAST_STEP}" if self.last else question

    async def run(self) -> Trajectory:
        try:
            await self.calls.open()
            tools = any(tool != TALK for tool in self.calls.tools)
            self.trajectory = replace(self.trajectory, system=self.calls.system_prompt, offers_tools=tools)
            if self.calls.question:
                self.trajectory = replace(self.trajectory, question=self.asked(self.calls.question))
            await self.act()
            reward = await self.calls.reward(self.trajectory.answer)
            self.trajectory = replace(self.trajectory, reward=reward)
        except (ClosedError, ExhaustedError):  # the work stops; the episode has not failed, and is played when it goes on
            raise
        except Exception as problem:
            self.trajectory = replace(self.trajectory, status="failed", answer=None, error=describe_error(problem))
        return self.trajectory

    async def act(self) -> None:
        """All steps."""
        while not await self.step():
            pass

    async def step(self) -> bool:
        """One model call and its observation; True when the episode is over."""
        begun = time.monotonic()
        index = self.trajectory.turns
        view = Injected(self.trajectory.history(index))
        if self.experience is not None:
            view = await self.experience.prepare(self.trajectory)
        sampling = Sampling(
            temperature=self.settings.temperature,
            top_p=self.settings.top_p,
            max_tokens=self.settings.max_action_tokens,
            seed=call_seed(self.trajectory.seed, index),
        )
        try:
            completion = await self.model.generate(Request(view.messages, sampling, self.session))
        except ContextOverflowError as overflow:  # the policy read more than it can hold: it has not answered
            self.trajectory = replace(self.trajectory, error=describe_error(overflow))
            return True
        action, problem = self.read(completion)
        step = Step(
            index=index,
            text=completion.text,
            token_ids=completion.token_ids,
            logprobs=completion.logprobs,
            call=action.call,
            answer=action.answer,
            problem=problem,
            selected=view.selected,
            injected=view.text,
            rationale=view.rationale,
            prompt_tokens=completion.prompt_tokens,
            seconds=time.monotonic() - begun,
        )
        if action.answer is not None:
            self.record(step, "forced" if self.last else "answered", action.answer)
            return True
        if self.last and (problem is not None or not self.converses):
            self.record(step)
            return True
        # Recorded before the tool runs: should it break, the row still shows which call broke it.
        before = self.trajectory
        self.record(step)
        result = ToolResult(explain(problem)) if problem is not None else await self.observe(step, completion)
        self.trajectory = before
        step = replace(step, seconds=time.monotonic() - begun)
        if result.done and self.converses and step.call is not None and step.call.name == REPLY:  # it ended with what was said
            answer = step.call.arguments["text"]
            self.record(replace(step, call=None, answer=answer), "forced" if self.last else "answered", answer)
            return True
        status: TrajectoryStatus = "ended" if result.done else "unanswered"
        if self.last:
            self.record(step, status)
            return True
        observation = result.text
        self.last = not result.done and self.limit_reached(index, completion, observation)
        if self.last:
            observation = f"{observation}\n{LAST_STEP}"
        self.record(replace(step, observation=observation, features=result.features), status)
        return result.done

    def read(self, completion: Completion) -> tuple[ParsedAction, str | None]:
        """What the policy does, and why nothing can be done with it, if so."""
        action = parse_action(completion.text, self.calls.tools)
        answer = said(completion.text).strip()
        if (self.last or self.settings.plain_answers) and action.plain and answer:
            action = ParsedAction("", answer=answer)
        problem = action.problem
        if problem is not None and completion.finish_reason == "length":
            problem = f"the action is longer than {self.settings.max_action_tokens} tokens"
        if action.call is not None:
            problem = validate_call(action.call, self.calls.tools)
        return action, problem

    async def observe(self, step: Step, completion: Completion) -> ToolResult:
        assert step.call is not None
        return await self.calls.call(step.call, completion)

    def limit_reached(self, index: int, completion: Completion, observation: str) -> bool:
        """Whether the next call is the last one."""
        context = completion.prompt_tokens + len(completion.token_ids) + self.tokens(observation)
        return (
            index + 2 >= self.settings.max_steps
            or context >= self.settings.max_tokens
            or time.monotonic() - self.started >= self.settings.max_seconds
        )

    def tokens(self, observation: str) -> int:
        """What an observation adds to the context; on the careful side where the backend hides its tokenizer."""
        return tokens_of(self.model, Message("tool", observation))

    def record(self, step: Step, status: TrajectoryStatus = "unanswered", answer: str | None = None) -> None:
        self.trajectory = replace(self.trajectory, steps=(*self.trajectory.steps, step), status=status, answer=answer)
