"""What every language-model backend offers: one request in, one completion out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Protocol, runtime_checkable

from evolve_dag.records import Message


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
            ModelError: the model cannot serve the request (context too long, endpoint down after retries).
        """
        ...

    def release(self, session: str) -> None:
        """The episode is over: what was cached for ``session`` may go."""
        ...

    async def close(self) -> None:
        """Free memory and connections; safe to call twice."""
        ...
