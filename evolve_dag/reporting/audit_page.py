"""The audit page: one HTML file that leads from a score row back to what taught it, and from an item to what it did.

What is said stands in ``templates/audit.html.jinja``; here is what it asks for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evolve_dag.evaluation.metrics import partial, told_reward
from evolve_dag.lineage import audit
from evolve_dag.records import solved
from evolve_dag.reporting import pages
from evolve_dag.reporting.principles import SPELLED_OUT, Contrast, Facts, Principle, ScoreRow, gather

if TYPE_CHECKING:
    from evolve_dag.store.artifacts import Store

ROWS = SPELLED_OUT
"""Rows of one table; the rest is counted, and ``evolve trace`` finds each of them."""
NEWEST = 6
"""Iterations whose rows are listed; of earlier ones the chain alone."""
CHARACTERS = 400
"""Of an observation that are shown."""
WRITTEN = 1000
"""The same of a thought and of an action: with a model that thinks at length the page would be tens of megabytes."""


def render(store: Store, experiment: str, iterations: Sequence[int] | None = None, *, report: str = "") -> str:
    """The page of one lineage as HTML text.

    Args:
        iterations: those to read; None reads all.
        report: address of the report, relative to the page; '' for none.

    Raises:
        OrderError: the experiment has not been run.
        StoreError, DataError: an artifact is missing, corrupt or of another version.
    """
    return page(gather(store, experiment, iterations), report=report)


def page(facts: Facts, *, report: str = "") -> str:
    """The page for what was gathered."""
    return pages.render(
        "audit.html.jinja",
        title=f"Audit of {facts.experiment}",
        back=report,
        sections={"items": "What every item did"}
        | {f"iteration-{one.iteration}": f"Iteration {one.iteration}" for one in facts.chains},
        lineage=facts,
        links=Links(facts),
        taken_over=lambda iteration: _taken_over(facts, iteration),
        newest_held_out=_newest_held_out,
        measured_iterations=_measured_iterations,
        told_reward=told_reward,
        outcome=_outcome,
        ROWS=ROWS,
        NEWEST=NEWEST,
        CHARACTERS=CHARACTERS,
        WRITTEN=WRITTEN,
    )


class Links:
    """Anchors on the page. They are numbered, so that no text of an artifact becomes a part of an address."""

    def __init__(self, facts: Facts) -> None:
        self.items = {one.item.id: f"item-{n}" for n, one in enumerate(facts.principles)}
        self.taught = {
            (chain.iteration, name): f"taught-{chain.iteration}-{n}"
            for chain in facts.chains
            for n, name in enumerate(chain.taught)
        }
        self.iterations = {chain.iteration for chain in facts.chains}
        self.adapters = {
            chain.artifacts["adapter"][0]: chain.iteration for chain in facts.chains if "adapter" in chain.artifacts
        }
        self.teaches: dict[tuple[int, str], list[str]] = {}
        for one in facts.principles:
            for edit in one.edits:
                for name in edit.trajectory_ids:
                    if one.item.id not in self.teaches.setdefault((edit.iteration, name), []):
                        self.teaches[edit.iteration, name].append(one.item.id)


def _outcome(rows: Sequence[ScoreRow]) -> str:
    """``61 of 256 right``; where parts of a reward are given, the mean and who has all of it."""
    known = [row.reward for row in rows if row.reward is not None]
    right = sum(map(solved, known))
    if not partial(known):
        return f"{right} of {len(rows)} right"
    return f"mean reward {sum(known) / len(known):.2f} of 1, {right} of {len(rows)} with all of it"


def _newest_held_out(one: Principle) -> Contrast | None:
    """With and without the item in the newest iteration whose held-out episodes could choose it."""
    held = [c for k in sorted(one.contrasts) for c in one.contrasts[k] if c.where == "held-out"]
    return held[-1] if held else None


def _measured_iterations(one: Principle) -> list[tuple[Any, ...]]:
    """By iteration: learned steps, what is inside the weights, what it did to the teacher, success with and without it."""
    inside = {found.iteration: found for found in one.internalized}
    rows = []
    for k in sorted({*one.learned, *one.contrasts, *one.checks, *inside}):
        by_place = {contrast.where: contrast for contrast in one.contrasts.get(k, ())}
        check = one.checks.get(k)
        rows.append((k, one.learned.get(k), inside.get(k), check, [by_place.get(where) for where in ("teacher", "held-out")]))
    return rows


def _taken_over(facts: Facts, iteration: int) -> list[audit.Internalized]:
    """What the adapter took over of the items, most first; a score without experience goes back to these."""
    rows = [one for p in facts.principles for one in p.internalized if one.iteration == iteration and one.share is not None]
    return sorted(rows, key=lambda one: -(one.before - one.after) * one.tokens)[:8]
