"""What answers a tool call during one episode."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from evolve_dag.records import ToolCall


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
