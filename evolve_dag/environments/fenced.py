"""An environment without state that others wrote, within limits. One with a state lives in threads of its own already."""

from __future__ import annotations

from typing import Any

from evolve_dag.config.fence import Fence
from evolve_dag.protocols import Environment, ToolError, ToolSpec
from evolve_dag.records import ToolCall


class FencedEnvironment:
    """Its calls work in a thread each, so one that blocks costs its episode alone; none keeps a connection for the next."""

    def __init__(self, environment: Environment, fence: Fence) -> None:
        self._environment, self._fence = environment, fence
        self.tools: tuple[ToolSpec, ...] = tuple(environment.tools)
        self.system_prompt = environment.system_prompt
        self.digest = environment.digest

    def check(self) -> None:
        """What it lacks, where it can say so beforehand. Raises ModelError."""
        if callable(check := getattr(self._environment, "check", None)):
            self._fence.run(check)

    async def call(self, call: ToolCall) -> Any:
        """What the environment gives; a ToolError of its own is an observation, any other error ends the episode."""
        result = await self._fence.call(self._answer, call)
        if isinstance(result, ToolError):
            raise result
        return result

    async def _answer(self, call: ToolCall) -> Any:
        try:
            return await self._environment.call(call)
        except ToolError as problem:
            return problem
