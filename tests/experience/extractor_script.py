"""A scripted extractor for tests: answers every prompt of the chain by its kind."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from experience_builders import answer, search, trajectory, visit

from evolve_dag.experience.extraction.base import Extraction
from evolve_dag.experience.extraction.llm import LLMExtraction, extract_with_llm
from evolve_dag.experience.pool import Pool, Proposal
from evolve_dag.protocols import Completion, Request
from evolve_dag.records import Message, Task, Trajectory

Answer = Any
"""A text, a JSON value, or an exception."""

KINDS = ("trajectory", "attempts", "candidates", "proposals", "item")
NAMES = {"trajectory": "summary", "attempts": "critique", "candidates": "decide", "proposals": "reconcile", "item": "repair"}


def kind_of(messages: Sequence[Message]) -> str:
    """Which prompt of the chain it is."""
    for name in KINDS:
        if f'<data name="{name}">' in messages[0].content:
            return NAMES[name]
    return "consolidate"


def data(messages: Sequence[Message], name: str) -> str:
    """What stands between the fences."""
    found = re.search(rf'<data name="{name}">\n(.*?)\n</data>', messages[0].content, re.S)
    assert found is not None
    return found[1]


def principle(word: str, name: str = "Narrow") -> str:
    return f"{name}: when {word} is shown, search only the short name."


class Extractor:
    """A language model for the chain.

    Args:
        answers: kind -> answer, or a function from the messages to it. Without one: summaries say 'summary', a critique
            gives one principle about the task's question, decisions add, nothing is merged, a consolidation fails.
        delay: kind -> seconds.
    """

    def __init__(self, answers: Mapping[str, Answer] | None = None, delay: Callable[[str], float] | None = None) -> None:
        self._answers = {**DEFAULTS, **(answers or {})}
        self._delay = delay
        self.calls: list[tuple[str, tuple[Message, ...]]] = []
        self.requests: list[Request] = []

    def count(self, kind: str) -> int:
        return sum(known == kind for known, _ in self.calls)

    async def generate(self, request: Request) -> Completion:
        kind = kind_of(request.messages)
        self.calls.append((kind, request.messages))
        self.requests.append(request)
        if self._delay is not None:
            await asyncio.sleep(self._delay(request.messages[0].content))
        found = self._answers[kind]
        value = found(request.messages) if callable(found) else found
        if isinstance(value, BaseException):
            raise value
        return Completion(value if isinstance(value, str) else json.dumps(value), (), (), "stop", 10)

    def release(self, session: str) -> None: ...

    async def close(self) -> None: ...


def about_question(messages: Sequence[Message]) -> Answer:
    """One principle whose situation is the first word of the question that is in lower case."""
    word = data(messages, "question").split()[3]
    return {"items": [{"text": principle(f"the {word}"), "why": f"about {word}"}]}


DEFAULTS: Mapping[str, Answer] = {
    "summary": "summary",
    "critique": about_question,
    "decide": {"decisions": [{"candidate": 1, "operation": "ADD", "id": None, "content": None, "reason": "new"}]},
    "reconcile": {"merges": []},
    "consolidate": "no plan",
    "repair": "no repair",
}

WORDS = ("mayor", "stream", "patron", "mouth", "keeper", "source", "seat", "chief", "partner", "author", "house", "setting")


def task(number: int) -> Task:
    return Task(f"t{number}", f"What is the {WORDS[number]} of the home of person Bado Keli?", "Rato Miku")


def group(number: int, rewards: Sequence[float | None] = (1.0, 0.0)) -> list[Trajectory]:
    steps = [search("Bado Keli", "1 result\n1. person Bado Keli: home: city Zano Pile"), visit("x", "page: x"), answer("y")]
    question = task(number).question
    return [trajectory(f"t{number}", n, steps, reward, question) for n, reward in enumerate(rewards)]


def groups(*numbers: int) -> list[Trajectory]:
    return [one for number in numbers for one in group(number)]


def pool_of(*words: str, support: Mapping[str, float] | None = None) -> Pool:
    proposals = [
        Proposal(
            "add", text=principle(word), evidence={"support": (support or {}).get(word, 1.0)}, trajectory_ids=(f"{word}#0",)
        )
        for word in words
    ]
    return Pool().apply(proposals, iteration=1, strict=True).pool


def run(
    model: Any,
    trajectories: Sequence[Trajectory],
    pool: Pool | None = None,
    *,
    granularity: Any = "principle",
    iteration: int = 2,
    memory: Any = None,
    concurrency: int = 8,
    on_progress: Callable[[], None] | None = None,
    **settings: Any,
) -> Extraction:
    return asyncio.run(
        extract_with_llm(
            trajectories,
            [task(number) for number in range(len(WORDS))],
            pool or Pool(),
            model=model,
            identity="scripted",
            granularity=granularity,
            settings=LLMExtraction(**{"cap": 50, **settings}),
            iteration=iteration,
            seed=7,
            memory=memory,
            concurrency=concurrency,
            on_progress=on_progress,
        )
    )
