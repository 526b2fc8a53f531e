"""Calls of the extraction chain: bounded, remembered, counted.

A finished call is remembered by the model's identity, the prompt's digest and the whole request, so a killed step goes on
without paying twice. A failed call, or an answer that cannot be read, is never remembered.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from evolve_dag import prompts
from evolve_dag.agent.together import together
from evolve_dag.errors import ModelError, UnreachableError
from evolve_dag.experience.extraction.llm_plans import Tally
from evolve_dag.inference.ledger import purpose
from evolve_dag.inference.patience import MOST_UNREACHABLE
from evolve_dag.inference.reasoning import said
from evolve_dag.inference.structured import ask_json, extract_json
from evolve_dag.protocols import LanguageModel, Request, Sampling
from evolve_dag.records import Message
from evolve_dag.store.memory import Memory

T = TypeVar("T")
SPACE = "extraction"
"""Where answers are remembered."""
_PURPOSES = {"instance": "critique"}
"""First word of a prompt's name -> what the ledger calls it, where they differ."""


class Asker:
    """Asks one model with the prompts of ``experience/prompts``.

    Args:
        identity: what the model is; part of every key.
        memory: None remembers nothing.
        concurrency: calls in flight.
        seed: every call's seed follows from it and the call's ``key``.
        tally: gets ``failed_calls`` and ``unreadable``.
    """

    def __init__(
        self,
        model: LanguageModel,
        identity: str,
        *,
        memory: Memory | None,
        concurrency: int,
        seed: tuple[int, ...],
        temperature: float,
        max_tokens: int,
        tally: Tally,
    ) -> None:
        self._model, self._identity, self._memory = model, identity, memory
        self._free = asyncio.Semaphore(max(1, concurrency))
        self._seed, self._temperature = seed, temperature
        self.max_tokens = max_tokens
        """Most tokens of one answer."""
        self._tally = tally
        self.answered = self.remembered = self.unreachable = 0
        """Calls that came back, were not made, and could not be."""
        self.error: ModelError | None = None
        """The last failure; where there was no model to be asked, the last of those."""

    def raise_if_too_little_came_back(self, lost: int, groups: int) -> None:
        """What an outage leaves of an extraction would stand for good. What was answered is remembered.

        Args:
            lost: of ``groups``, those of which nothing is learned since there was no model to be asked.

        Raises:
            UnreachableError: for more than one, and more than :data:`~evolve_dag.inference.patience.MOST_UNREACHABLE`, of the
                calls or of the groups there was no model to be asked, or for all of the calls.
            ModelError: there were calls, and all of them failed for other reasons.
        """
        if self.error is None:
            return
        came = self.answered + self.remembered
        kind = UnreachableError if self.unreachable else ModelError
        if not came:
            raise kind(f"extraction: every call to the model failed: {self.error.what}", self.error.remedy)
        for few, all_, what in ((self.unreachable, came + self.unreachable, "calls"), (lost, groups, "groups")):
            if few > max(1, MOST_UNREACHABLE * all_):
                told = f"extraction: for {few} of {all_} {what} there was no model to be asked: {self.error.what}"
                raise UnreachableError(told, self.error.remedy)

    async def text(self, name: str, key: tuple[object, ...], blanks: Mapping[str, object]) -> str:
        """The model's answer as plain text, reasoning left out; '' (counted as ``unreadable``) when there is none.

        Raises:
            ModelError: the model could not be asked (counted).
        """

        async def ask(messages: tuple[Message, ...], sampling: Sampling) -> str | None:
            completion = await self._model.generate(Request(messages, sampling))
            return said(completion.text) or None

        return await self._ask(name, key, blanks, None, ask) or ""

    async def json(
        self,
        name: str,
        key: tuple[object, ...],
        blanks: Mapping[str, object],
        schema: Mapping[str, Any],
        readable: Callable[[Any], bool],
        *,
        guide: Mapping[str, Any] | None = None,
        repairs: int = 1,
    ) -> Any | None:
        """The model's answer as a JSON value that ``readable`` accepts; None (counted as ``unreadable``) when there is none.

        An answer that does not fit ``schema`` is asked for anew ``repairs`` times; if it still does not, but can be
        understood, it counts.

        Args:
            guide: what a decoder is held to; see :func:`~evolve_dag.inference.structured.ask_json`.

        Raises:
            ModelError: the model could not be asked (counted).
        """

        def check(value: Any) -> str | None:
            return None if readable(value) else "it holds nothing of what was asked for"

        async def ask(messages: tuple[Message, ...], sampling: Sampling) -> Any | None:
            answer = await ask_json(self._model, messages, schema, sampling, check=check, repairs=repairs, guide=guide)
            value = answer.value if answer.ok else extract_json(answer.text)
            return value if value is not None and readable(value) else None

        return await self._ask(name, key, blanks, schema if guide is None else guide, ask)

    async def _ask(
        self,
        name: str,
        key: tuple[object, ...],
        blanks: Mapping[str, object],
        schema: Mapping[str, Any] | None,
        ask: Callable[[tuple[Message, ...], Sampling], Awaitable[Any]],
    ) -> Any | None:
        from evolve_dag.seeds import stable_hash

        full = f"experience/{name}"
        content = prompts.load(full).fill(**blanks)
        sampling = Sampling(
            temperature=self._temperature, max_tokens=self.max_tokens, seed=stable_hash(*self._seed, name, *key)
        )
        remembered = Memory.key_of(self._identity, prompts.digest(full), content, asdict(sampling), schema)
        if self._memory is not None and (known := self._memory.get(SPACE, remembered)) is not None:
            self.remembered += 1
            return json.loads(known)
        async with self._free:
            try:
                with purpose(_PURPOSES.get(kind := name.partition("_")[0], kind)):
                    value = await ask((Message("user", content),), sampling)
            except ModelError as error:
                self._tally["failed_calls"] += 1
                self.unreachable += (outage := isinstance(error, UnreachableError))
                if outage or not self.unreachable:
                    self.error = error
                raise
        self.answered += 1
        if value is None:
            self._tally["unreadable"] += 1
        elif self._memory is not None:  # an unreadable answer is not: asked again, the model may do better
            self._memory.put(SPACE, remembered, json.dumps(value))
        return value


async def in_order(jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Results of concurrent jobs in the order of ``jobs``.

    Raises:
        ModelError: of the first job that raised it, after the others came to their end: what they ask is paid for.
        BaseException: any other, after the others were cancelled.
    """

    async def held(job: Coroutine[Any, Any, T]) -> T | ModelError:
        try:
            return await job
        except ModelError as error:
            return error

    jobs = list(jobs)
    try:
        results = await together(map(held, jobs))
    finally:
        for job in jobs:
            job.close()  # those that never began
    done: list[T] = []
    for result in results:
        if isinstance(result, ModelError):
            raise result
        done.append(result)
    return done
