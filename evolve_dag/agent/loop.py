"""One episode: think, call a tool, observe, ..., answer (ReAct; METHOD step 1).

The history that is kept is the clean one. An :class:`ExperienceSource` gives a copy with experience in it for
each call; what it showed is recorded in the step and nowhere else.
"""

from __future__ import annotations

import itertools
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from evolve_dag.agent.actions import ParsedAction, explain, parse_action, validate_call
from evolve_dag.errors import ContextOverflowError
from evolve_dag.inference.outgoing import estimate
from evolve_dag.plain import LAST_STEP, plain
from evolve_dag.protocols import (
    Completion,
    CountsTokens,
    Environment,
    ExperienceSource,
    Injected,
    LanguageModel,
    Request,
    Sampling,
    ToolError,
)
from evolve_dag.records import Message, Step, Task, Trajectory, TrajectoryStatus
from evolve_dag.secrecy import describe_error
from evolve_dag.seeds import stable_hash

if TYPE_CHECKING:
    from evolve_dag.config.schema import RolloutSettings
    from evolve_dag.protocols import Verifier

_session_numbers = itertools.count()


def call_seed(seed: int, step: int) -> int:
    """Seed of one model call; depends on the episode's seed and the step's index alone."""
    return stable_hash("call", seed, step)


async def run_episode(
    task: Task,
    rollout: int,
    *,
    model: LanguageModel,
    environment: Environment,
    verifier: Verifier,
    settings: RolloutSettings,
    seed: int,
    experience: ExperienceSource | None = None,
) -> Trajectory:
    """Run the policy on ``task`` until it answers, a limit ends the episode, or something fails.

    The last call that a limit allows is announced in the clean history by :data:`LAST_STEP`. ``max_tokens`` and
    ``max_seconds`` are looked at between calls: past either, the next call is the last. An answer on that call
    is ``forced``; text without any tag counts as one there.

    Args:
        seed: every sampled token follows from it, given the same views.

    Returns:
        The trajectory, verified. What the policy brought upon itself (limits, a context that overflows) leaves it
        ``unanswered`` and is judged so; any other exception but cancellation ends in status ``failed`` with reward None
        and the steps so far; one of the verifier leaves the status, with reward None.
    """
    started = time.monotonic()
    session = f"{task.id}#{rollout}@{next(_session_numbers)}"
    episode = _Episode(task, rollout, model, environment, settings, seed, experience, session, started)
    try:
        trajectory = await episode.run()
    finally:
        model.release(session)
    reward, error = None, trajectory.error
    if trajectory.status != "failed":
        try:
            reward = await verifier.verify(task, trajectory.answer)
        except Exception as problem:
            error = f"not judged: {describe_error(problem)}"
    return replace(trajectory, reward=reward, error=error, seconds=time.monotonic() - started)


class _Episode:
    """The state of one running episode."""

    def __init__(
        self,
        task: Task,
        rollout: int,
        model: LanguageModel,
        environment: Environment,
        settings: RolloutSettings,
        seed: int,
        experience: ExperienceSource | None,
        session: str,
        started: float,
    ) -> None:
        self.model, self.environment, self.settings = model, environment, settings
        self.experience, self.session, self.started = experience, session, started
        self.last = settings.max_steps == 1
        asked = plain(task.question)
        question = f"{asked}\n{LAST_STEP}" if self.last else asked
        self.trajectory = Trajectory(
            id=f"{task.id}#{rollout}",
            task_id=task.id,
            rollout=rollout,
            seed=seed,
            system=environment.system_prompt,
            question=question,
            steps=(),
            status="unanswered",
        )

    async def run(self) -> Trajectory:
        try:
            while not await self.step():
                pass
        except ContextOverflowError as problem:  # the policy read more than it can hold: it has not answered
            self.trajectory = replace(self.trajectory, error=describe_error(problem))
        except Exception as problem:
            self.trajectory = replace(self.trajectory, status="failed", answer=None, error=describe_error(problem))
        return self.trajectory

    async def step(self) -> bool:
        """One model call and its observation; True when the episode is over."""
        begun = time.monotonic()
        index = self.trajectory.turns
        view = Injected(self.trajectory.history(index))
        if self.experience is not None:
            view = await self.experience.prepare(self.trajectory)
        completion = await self.model.generate(
            Request(
                view.messages,
                Sampling(
                    temperature=self.settings.temperature,
                    top_p=self.settings.top_p,
                    max_tokens=self.settings.max_action_tokens,
                    seed=call_seed(self.trajectory.seed, index),
                ),
                self.session,
            )
        )
        action = parse_action(completion.text)
        if (self.last or self.settings.plain_answers) and action.plain and completion.text.strip():
            action = ParsedAction("", answer=completion.text.strip())
        problem = action.problem
        if problem is not None and completion.finish_reason == "length":
            problem = f"the action is longer than {self.settings.max_action_tokens} tokens"
        if action.call is not None:
            problem = validate_call(action.call, self.environment.tools)
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
        if self.last:
            self.record(step)
            return True
        # Recorded before the tool runs: should it break, the row still shows which call broke it.
        before = self.trajectory
        self.record(step)
        observation = explain(problem) if problem is not None else await self.observe(step)
        self.last = self.limit_reached(index, completion, observation)
        if self.last:
            observation = f"{observation}\n{LAST_STEP}"
        self.trajectory = before
        self.record(replace(step, observation=observation, seconds=time.monotonic() - begun))
        return False

    async def observe(self, step: Step) -> str:
        assert step.call is not None
        try:
            return plain(await self.environment.call(step.call))
        except ToolError as problem:
            return plain(str(problem)) or "error"

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
        if isinstance(self.model, CountsTokens):
            return self.model.count_tokens(Message("tool", observation))
        return estimate([{"role": "tool", "content": observation}])

    def record(self, step: Step, status: TrajectoryStatus = "unanswered", answer: str | None = None) -> None:
        self.trajectory = replace(self.trajectory, steps=(*self.trajectory.steps, step), status=status, answer=answer)
