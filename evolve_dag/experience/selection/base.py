"""What every selector gives, and the words that none compares."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar, runtime_checkable

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


ONLY_ANSWER = Selection((), "only an answer is possible now")
"""What every selector gives for a step at which only an answer is possible."""


STOP_WORDS = frozenset(
    re.findall(r"\w+", "the a an of to is are it that this and or in on at by with was were be has have for from")
)


TOKEN = re.compile(r"[^\W_]+")
