"""Environments with a state for tests: a counter that must reach a number, and every way of breaking."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from evolve_dag.protocols import TALK, Completion, Session, ToolError, ToolResult, ToolSpec
from evolve_dag.records import Task, ToolCall

ADD = ToolSpec(
    "add",
    "Add to the counter.",
    schema={
        "type": "object",
        "properties": {"n": {"type": "integer", "minimum": 1, "maximum": 5}, "note": {"type": "string"}},
        "required": ["n"],
        "additionalProperties": False,
    },
)
GOAL = 6


def add(n: object, **others: object) -> str:
    """What a policy writes to add ``n``."""
    return f"<tool_call>\n{json.dumps({'name': 'add', 'arguments': {'n': n, **others}})}\n</tool_call>"


@dataclass
class Counter(Session):
    """Starts at a number that is drawn; is over at :data:`GOAL` or more."""

    value: int
    log: list[str]

    tools = (ADD, ToolSpec("fail", "Refuses.", {}))
    system_prompt = "Count."

    def call(self, call: ToolCall) -> str | ToolResult:
        self.log.append(f"call {threading.current_thread().name}")
        if call.name == "fail":
            raise ToolError("not allowed")
        self.value += call.arguments["n"]
        features = {"counter": "at its goal" if self.value >= GOAL else "below its goal"}
        return ToolResult(f"it is {self.value}", done=self.value >= GOAL, features=features)

    def reward(self, answer: str | None) -> float | None:
        return min(1.0, self.value / GOAL)

    def close(self) -> None:
        self.log.append(f"close {threading.current_thread().name}")


@dataclass
class Counters:
    """Opens counters; what is given in ``breaks`` (open, call, reward, close) is done in place of that."""

    breaks: dict[str, Callable[[], Any]] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=list)

    def open(self, task: Task, seed: int) -> Session:
        self.seeds.append(seed)
        self.log.append(f"open {threading.current_thread().name}")
        if "open" in self.breaks:
            self.breaks["open"]()
        session = Counter(random.Random(seed).randrange(3), self.log)
        for name in ("call", "reward", "close"):
            if name in self.breaks:
                setattr(session, name, self._breaking(session, name))
        return session

    def _breaking(self, session: Counter, name: str) -> Callable[..., Any]:
        def broken(*given: object) -> Any:
            self.log.append(name)
            return self.breaks[name]()

        return broken


@dataclass
class Guess(Session):
    """A talk about a number: what is said is a guess, and the right one ends it; with other ``tools`` one can peek."""

    tools: tuple[ToolSpec, ...] = (TALK,)
    system_prompt: str = "Guess."
    question: str = "Which number from 1 to 9?"
    heard: list[ToolCall] = field(default_factory=list)
    turns: list[str] = field(default_factory=list)

    def sampled(self, completion: Completion) -> None:
        self.turns.append(completion.text)

    def call(self, call: ToolCall) -> ToolResult:
        self.heard.append(call)
        if call.name == "peek":
            return ToolResult("it is odd")
        return ToolResult("no", done=call.arguments["text"].endswith("7"))

    def reward(self, answer: str | None) -> float | None:
        return float(answer is not None and answer.endswith("7"))


@dataclass
class Guesses:
    """Opens one talk after the other, and keeps them."""

    tools: tuple[ToolSpec, ...] = (TALK,)
    opened: list[Guess] = field(default_factory=list)

    def open(self, task: Task, seed: int) -> Session:
        self.opened.append(Guess(self.tools))
        return self.opened[-1]
