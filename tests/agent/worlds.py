"""A world of one page and a verifier, for tests of the loop."""

from __future__ import annotations

from dataclasses import dataclass, field

from evolve_dag.protocols import ToolError, ToolSpec
from evolve_dag.records import Task, ToolCall

TASK = Task("t1", "Who is the mayor of Bado Keli?", "Rato Miku")
SEARCH = 'look\n<tool_call>\n{"name": "search", "arguments": {"query": "Bado Keli"}}\n</tool_call>'
ANSWER = "<answer>Rato Miku</answer>"


@dataclass
class World:
    """Answers a search with a fixed text; a visit is refused."""

    observation: str = "1 result\n1. city Bado Keli: mayor: person Rato Miku"
    error: BaseException | None = None
    calls: list[ToolCall] = field(default_factory=list)
    pages: list[str] = field(default_factory=list)
    """Texts of the first searches, in place of the fixed one."""

    tools = (ToolSpec("search", "find pages", {"query": "words"}), ToolSpec("visit", "read a page", {"page": "title"}))
    system_prompt = "Use the tools."
    digest = "world"

    async def call(self, call: ToolCall) -> str:
        self.calls.append(call)
        if self.error is not None:
            raise self.error
        if call.name == "visit":
            raise ToolError("no page of that name")
        return self.pages.pop(0) if self.pages else self.observation


@dataclass
class Exact:
    """1 for the reference answer, 0 for another, None where told not to judge."""

    error: Exception | None = None

    async def verify(self, task: Task, answer: str | None) -> float | None:
        if self.error is not None:
            raise self.error
        return float(answer == task.answer)
