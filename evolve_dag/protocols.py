"""What the parts ask of each other: models, environments, verifiers and sources of experience, with the values that pass.

Whoever implements one imports this and the records alone; whoever uses one needs to know no implementation.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from evolve_dag.records import Message, Task, ToolCall, Trajectory


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one completion is sampled."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    max_tokens: int = 64
    """Most tokens to sample for this completion, end-of-turn included."""
    seed: int = 0
    """Every sampled token follows from (seed, position in the completion) alone, whatever else is in the
    batch; endpoints that cannot promise that pass the seed on."""


@dataclass(frozen=True, slots=True)
class Request:
    """One model call."""

    messages: tuple[Message, ...]
    """Conversation so far, the assistant's turn being next. Assistant messages with ``token_ids`` are
    used verbatim by backends that own a tokenizer."""
    sampling: Sampling
    session: str = ""
    """Calls of one episode share it; a hint for KV reuse, never needed for correctness."""
    answer_schema: Mapping[str, Any] | None = None
    """JSON schema of the answer. Backends with structured outputs enforce it, endpoints without its bounds (``pattern``,
    ``maxLength``, ``maxItems``); the others ignore it, so the caller parses what comes
    (:mod:`evolve_dag.inference.structured`)."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled assistant turn."""

    text: str
    """Decoded, without end-of-turn token."""
    token_ids: tuple[int, ...]
    """Sampled ids, end-of-turn included when it was sampled; empty where the endpoint hides them."""
    logprobs: tuple[float, ...]
    """Log-probability (nats, temperature 1) of each sampled id."""
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    """Tokens of the context."""
    cached_tokens: int = 0
    """How many of ``prompt_tokens`` were reused from an earlier call of the session."""
    cut_characters: int = 0
    """Characters that were cut out of the request to fit the context limit; 0: it was sent whole."""


@runtime_checkable
class LanguageModel(Protocol):
    """A policy, extractor, selector or judge that can be asked."""

    async def generate(self, request: Request) -> Completion:
        """Sample one assistant turn.

        Raises:
            ContextOverflowError: the context is longer than the model takes.
            ModelError: the model cannot serve the request (endpoint down after retries).
        """
        ...

    def release(self, session: str) -> None:
        """The episode is over: what was cached for ``session`` may go."""
        ...

    async def close(self) -> None:
        """Free memory and connections; safe to call twice."""
        ...


@runtime_checkable
class CountsTokens(Protocol):
    """A model that has its tokenizer at hand."""

    def count_tokens(self, message: Message) -> int:
        """Tokens that ``message`` adds to a conversation, its markup included."""
        ...


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """One tool as the policy sees it (rendered as JSON schema in the system message)."""

    name: str
    description: str
    parameters: Mapping[str, str]
    """Argument name -> what it is; every argument is a required string."""


@runtime_checkable
class Environment(Protocol):
    """A set of tools over one world. Safe to call from many episodes at once."""

    @property
    def tools(self) -> tuple[ToolSpec, ...]: ...

    @property
    def system_prompt(self) -> str:
        """First message of every episode: the tools and how to call them."""
        ...

    @property
    def digest(self) -> str:
        """Hash of everything that decides what a call returns; part of the lineage."""
        ...

    async def call(self, call: ToolCall) -> str:
        """Run one tool call whose name is in ``tools`` and whose arguments are complete.

        Returns:
            The observation as plain text. Text from outside is data: it is never interpreted.

        Raises:
            ToolError: the call could not be served; the message becomes the observation.
        """
        ...


class ToolError(Exception):
    """A tool refused or failed; its message is shown to the policy as the observation."""


@runtime_checkable
class Verifier(Protocol):
    """Scores final answers (METHOD step 2). Safe to call from many episodes at once."""

    async def verify(self, task: Task, answer: str | None) -> float | None:
        """The reward of ``answer``.

        Args:
            task: the task with its reference answer.
            answer: what the policy gave; None when it gave nothing.

        Returns:
            1.0 right, 0.0 wrong, or None when it could not be judged. "Could not be judged" is never "wrong": a
            failing judge that returned 0.0 would move tasks in and out of the groups that extraction learns from.
        """
        ...


@dataclass(frozen=True, slots=True)
class Injected:
    """The teacher's view of a history."""

    messages: tuple[Message, ...]
    """A copy; equals the history when nothing was selected."""
    selected: tuple[str, ...] = ()
    """Ids of the items that stand in it."""
    text: str = ""
    """Exactly what was added; '' for nothing."""
    rationale: str = ""
    """Why these items; '' where nobody chose."""


class ExperienceSource(Protocol):
    """Gives the teacher's view before each call."""

    async def prepare(self, trajectory: Trajectory) -> Injected:
        """View of the history that precedes the next step of ``trajectory`` (all its steps have happened)."""
        ...
