"""What every selector gives, and the words that none compares."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

from evolve_dag.config.fence import Fence
from evolve_dag.config.parts import Part, SelectionSettings
from evolve_dag.experience.pool import Pool
from evolve_dag.inference.roles import Roles
from evolve_dag.records import Step


@dataclass(frozen=True, slots=True)
class Selection:
    """What a selector chose for one step."""

    ids: tuple[str, ...]
    """Best first."""
    rationale: str
    """Why, for the trace of the step."""


@runtime_checkable
class Selector(Protocol):
    """Picks items of a pool for the next step."""

    async def select(self, question: str, steps: Sequence[Step], pool: Pool) -> Selection:
        """Ids of ``pool`` that fit the state after ``steps``, best first; may be none."""
        ...


S = TypeVar("S", bound=SelectionSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class SelectorPart(Part[S]):
    """The row of a selector."""

    make: Callable[[S, Roles, int], Selector]
    """(settings, the models that it may ask, seed of sampling) -> the selector."""

    def fenced(self, fence: Fence) -> Self:
        """Its selector within limits, too."""
        row = Part.fenced(self, fence)

        def make(settings: S, roles: Roles, seed: int) -> FencedSelector:
            return FencedSelector(row.make(settings, roles.elsewhere(), seed), settings.max_items, fence)

        return replace(row, make=make)


@dataclass(frozen=True, slots=True)
class FencedSelector:
    """A selector from outside. An error, a hang or a choice that is none costs the episode in which it comes."""

    selector: Selector
    max_items: int
    fence: Fence

    async def select(self, question: str, steps: Sequence[Step], pool: Pool) -> Selection:
        chosen = await self.fence.call(self.selector.select, question, tuple(steps), pool)
        if not isinstance(chosen, Selection) or not isinstance(chosen.rationale, str):
            raise self.fence.nonsense(f"what it chose is no Selection, but a {type(chosen).__name__}")
        ids = chosen.ids
        if not isinstance(ids, tuple) or not all(isinstance(one, str) for one in ids):
            raise self.fence.nonsense(f"what it chose is no tuple of ids: {ids!r:.200}")
        if len(set(ids)) < len(ids) or not set(ids) <= set(pool.ids):
            raise self.fence.nonsense(f"chose what is not in the pool, or twice: {', '.join(ids):.200}")
        if len(ids) > self.max_items:
            raise self.fence.nonsense(f"chose {len(ids)} items, and selection.max_items is {self.max_items}")
        return Selection(ids, chosen.rationale)

    @property
    def statistics(self) -> Any:
        """What it counted, if it counts."""
        return getattr(self.selector, "statistics", None)


ONLY_ANSWER = Selection((), "only an answer is possible now")
"""What every selector gives for a step at which only an answer is possible."""


STOP_WORDS = frozenset(
    re.findall(r"\w+", "the a an of to is are it that this and or in on at by with was were be has have for from")
)


TOKEN = re.compile(r"[^\W_]+")
