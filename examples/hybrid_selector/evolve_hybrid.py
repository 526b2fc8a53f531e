"""A hybrid selector: items by their condition and items by their words, two rankings fused by reciprocal ranks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field

from evolve_dag.config.parts import SelectionSettings
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.base import Selection, Selector, SelectorPart
from evolve_dag.experience.selection.lexical import LexicalSelector
from evolve_dag.experience.selection.state import StateSelector
from evolve_dag.inference.roles import Roles
from evolve_dag.records import Step


class HybridSelection(SelectionSettings):
    """Conditions and word overlap, fused by reciprocal ranks."""

    damping: float = Field(60.0, gt=0)
    """k of reciprocal rank fusion: the larger, the less the first places count."""
    state_weight: float = Field(1.0, ge=0)
    """What the ranking by conditions counts; the one by words counts 1."""


@dataclass(frozen=True, slots=True)
class HybridSelector:
    """Reciprocal rank fusion (Cormack, Clarke & Büttcher 2009): an item scores sum w / (k + rank) over the rankings."""

    rankings: Sequence[tuple[float, Selector]]
    damping: float
    max_items: int

    async def select(self, question: str, steps: Sequence[Step], pool: Pool) -> Selection:
        """Ids of ``pool``, best first."""
        scores: dict[str, float] = defaultdict(float)
        for weight, selector in self.rankings:
            chosen = await selector.select(question, steps, pool)
            for rank, item in enumerate(chosen.ids, 1):
                scores[item] += weight / (self.damping + rank)
        best = sorted(scores, key=lambda item: (-scores[item], item))[: self.max_items]
        shown = ", ".join(f"{item} {scores[item]:.4f}" for item in best)
        return Selection(tuple(best), f"reciprocal ranks: {shown or 'no item fits'}")


def _make(settings: HybridSelection, roles: Roles, seed: int) -> HybridSelector:
    most = 3 * settings.max_items  # an item far down in both rankings can still come out on top
    rankings = [(settings.state_weight, StateSelector(most)), (1.0, LexicalSelector(most, keep=0.0))]
    return HybridSelector(rankings, settings.damping, settings.max_items)


HYBRID = SelectorPart(settings=HybridSelection, make=_make)
