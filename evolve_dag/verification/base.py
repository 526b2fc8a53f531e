"""The row of a verifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Self, TypeVar

from evolve_dag.config.fence import Fence
from evolve_dag.config.parts import Part, VerificationSettings
from evolve_dag.protocols import Verifier, as_reward
from evolve_dag.records import Task

if TYPE_CHECKING:
    from evolve_dag.inference.roles import Roles

S = TypeVar("S", bound=VerificationSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierPart(Part[S]):
    """The row of a verifier."""

    make: Callable[[S, Roles | None], Verifier]
    """(settings, the models that it may ask; None: none is needed now) -> the verifier."""

    def fenced(self, fence: Fence) -> Self:
        """Its verifier within limits, too: what it cannot judge is not judged."""
        row = Part.fenced(self, fence)
        return replace(row, make=lambda settings, roles: row.make(settings, roles and roles.elsewhere()))

    def held(self, made: Verifier, fence: Fence) -> Verifier:
        return FencedVerifier(made, fence)


@dataclass(frozen=True, slots=True)
class FencedVerifier:
    """A verifier from outside. An error, a hang or a reward that is none leaves its episode without a reward."""

    verifier: Verifier
    fence: Fence

    async def verify(self, task: Task, answer: str | None) -> float | None:
        given = await self.fence.call(self.verifier.verify, task, answer)
        reward = as_reward(given)
        if reward is None and given is not None:
            raise self.fence.nonsense(f"a reward is a number from 0 to 1, or None, not {given!r:.80}")
        return reward
