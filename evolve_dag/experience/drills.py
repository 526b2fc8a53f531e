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
from evolve_dag.experience.features import walk
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
    walked = {t.id: [(next(situations_of(state), ()), action) for state, action in walk(t)] for t in trajectories}
    done = _done(walked.values())
    texts: dict[Place, str] = {}
    for trajectory in trajectories:
        # A call that is announced as the last has no situation, nor has one before which an environment said nothing of its
        # state: there is nothing to advise.
        for step, (condition, _) in zip(trajectory.steps, walked[trajectory.id], strict=False):
            draw = random.Random(f"drill:{seed}:{trajectory.id}:{step.index}")
            advised = done.get(condition, ())
            if condition and draw.random() < share and len(advised) > 1:
                texts[trajectory.id, step.index] = render(dict(condition), draw.choice(advised))
    return texts


def _done(walked: Iterable[Sequence[tuple[Condition, str]]]) -> dict[Condition, tuple[str, ...]]:
    """Situation -> the actions that were done there and can be advised, in a fixed order."""
    found: dict[Condition, set[str]] = {}
    for steps in walked:
        for condition, action in steps:
            if strategy(action) is not None:
                found.setdefault(condition, set()).add(action)
    return {condition: tuple(sorted(actions)) for condition, actions in found.items()}
