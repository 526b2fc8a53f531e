"""Drills: advice drawn at random, about the very situation of a step, so that a student goes on reading advice.

Internalizing one lesson wears away the ability to read any other: after three nights a small policy followed an item that it
had never seen in 38 to 81 of 100 situations, where the base policy followed it in 77 to 97 (docs/adr/0019-drills.md). A
drill says 'in this situation, do that', where *that* is anything that somebody did there in this iteration, good or bad. It
carries no verdict, so nothing about tasks can be learned from it.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

from evolve_dag.experience.extraction.situations import Condition, situations_of
from evolve_dag.experience.features import choices
from evolve_dag.experience.phrases import render, strategy
from evolve_dag.records import Trajectory

Place = tuple[str, int]
"""(trajectory id, index of a step)."""


def drills(trajectories: Sequence[Trajectory], share: float, seed: int) -> dict[Place, str]:
    """A text for ``share`` of the steps, in the words of a principle.

    Which steps, and what is advised there, follow from ``seed``, the step, and what all ``trajectories`` did in its situation;
    a step is left out where only one thing was done.

    Args:
        share: 0..1, of all steps.
    """
    if share <= 0:
        return {}
    # A call that is announced as the last is no choice, and one before which an environment said nothing of its state has no
    # situation: there is nothing to advise.
    walked = {(t.id, c.step): (next(situations_of(c.state), ()), c.action) for t in trajectories for c in choices(t)}
    done = _done(walked.values())
    texts: dict[Place, str] = {}
    for place, (condition, _) in walked.items():
        draw = random.Random(f"drill:{seed}:{place[0]}:{place[1]}")
        advised = done.get(condition, ())
        if condition and draw.random() < share and len(advised) > 1:
            texts[place] = render(dict(condition), draw.choice(advised))
    return texts


def _done(walked: Iterable[tuple[Condition, str]]) -> dict[Condition, tuple[str, ...]]:
    """Situation -> the actions that were done there and can be advised, in a fixed order."""
    found: dict[Condition, set[str]] = {}
    for condition, action in walked:
        if strategy(action) is not None:
            found.setdefault(condition, set()).add(action)
    return {condition: tuple(sorted(actions)) for condition, actions in found.items()}
