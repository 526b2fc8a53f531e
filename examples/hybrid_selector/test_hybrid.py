"""Fused ranks by hand, and the row as an experiment names it."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from evolve_hybrid import HYBRID, HybridSelection, HybridSelector

from evolve_dag.config.schema import Experiment
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.base import Selection
from evolve_dag.inference.roles import Roles
from evolve_dag.records import ExperienceItem


@dataclass(frozen=True)
class Ranking:
    ids: tuple[str, ...]

    async def select(self, question: str, steps: object, pool: Pool) -> Selection:
        return Selection(self.ids, "")


def test_ranks_are_fused_as_by_hand() -> None:
    selector = HybridSelector([(1.0, Ranking(("a", "b"))), (0.6, Ranking(("c", "b")))], damping=1.0, max_items=2)
    chosen = asyncio.run(selector.select("?", (), Pool()))
    assert chosen.ids == ("b", "a")  # a: 1/2; b: 1/3 + 0.6/3; c: 0.6/2
    assert chosen.rationale == "reciprocal ranks: b 0.5333, a 0.5000"


def test_the_row_makes_a_selector_that_finds_an_item_by_its_words() -> None:
    items = ("Look up: when no tool was used, search.", "Stop: when the page shows a price, answer.")
    pool = Pool(tuple(ExperienceItem(f"p{n}", text, "principle") for n, text in enumerate(items)))
    settings = HybridSelection(selector="hybrid", max_items=1)
    selector = HYBRID.make(settings, Roles(Experiment(experiment="x")), 0)
    assert asyncio.run(selector.select("what is the name?", (), pool)).ids == ("p0",)
    assert asyncio.run(selector.select("what is the name?", (), Pool())).ids == ()
