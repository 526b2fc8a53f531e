"""Graduation: an item that the policy need not read any more leaves the context, and comes back as what it says fades.

Where an item's situation and advice stand in our words (the miner's), the policy must clearly do what it says without reading
it. Of an item in other words, it must clearly act the same with and without it (:mod:`evolve_dag.distillation.agreement`).

What is inside the weights need not stand in the context as well: it takes room, costs tokens, and keeps the night busy with
what it has learned. A graduated item stays in the pool, with its id and its evidence; when every item has graduated, the
night has nothing to teach and the adapter stays as it is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evolve_dag.evaluation.intervals import Interval, wilson
from evolve_dag.experience.features import any_looks_back, choices
from evolve_dag.experience.phrases import action_of
from evolve_dag.experience.pool import Pool, Proposal
from evolve_dag.records import ExperienceItem, Trajectory

LEAST_STEPS = 20
"""Steps in the situation of an item below which nothing is decided about it."""
LEAST_TASKS = 5
"""Tasks that they are of, likewise: how alike the steps of a task go shows only between tasks. Of one task each step would be a
witness of its own, and of two a habit of 75% has its interval above that in an eighth of the nights."""


@dataclass(frozen=True, slots=True)
class Habit:
    """How often the policy, without the item in its context, does what the item says."""

    tasks: tuple[str, ...]
    """Of each step in the item's situation."""
    done: tuple[float, ...]
    """Whether it was done there, 0..1: a step may count in part."""

    @property
    def steps(self) -> int:
        return len(self.done)

    @property
    def followed(self) -> float:
        return sum(self.done)

    @property
    def share(self) -> float:
        """Of the steps; 0 without any."""
        return self.followed / max(1, self.steps)

    @property
    def witnesses(self) -> float:
        """How many independent steps would say as much (Kish's effective sample size): as many as there are where the steps of
        a task go their own ways, down to the number of tasks where they all do the same."""
        apart: dict[str, float] = {}
        for task, done in zip(self.tasks, self.done, strict=True):
            apart[task] = apart.get(task, 0.0) + done - self.share
        spread = sum(one * one for one in apart.values())
        alone = self.steps * self.share * (1 - self.share)
        return self.steps * min(1.0, alone / spread) if spread > 0 else float(self.steps)

    @property
    def interval(self) -> Interval:
        """95% interval of the share, Wilson's over the :attr:`witnesses`; (0, 1) without steps."""
        return wilson(self.share, self.witnesses) or (0.0, 1.0)


def habit(steps: Sequence[tuple[str, float]]) -> Habit:
    """Of (task, whether it was done) at every step in the situation."""
    return Habit(tuple(task for task, _ in steps), tuple(done for _, done in steps))


def habits(items: Sequence[ExperienceItem], trajectories: Sequence[Trajectory]) -> dict[str, Habit]:
    """The habit of every item that has a condition and an action in our words (the miner's principles have both).

    Args:
        trajectories: of the policy without experience in its context.
    """
    known = {
        i.id: (set(i.condition.items()), action) for i in items if i.condition and (action := action_of(i.text)) is not None
    }
    found: dict[str, list[tuple[str, float]]] = {item_id: [] for item_id in known}
    history = any_looks_back(items)
    for trajectory in trajectories:
        for choice in choices(trajectory, history=history):
            for item_id, (condition, action) in known.items():
                if condition <= choice.state.items() and choice.allows(action):
                    found[item_id].append((trajectory.task_id, float(choice.action == action)))
    return {item_id: habit(steps) for item_id, steps in found.items()}


def in_our_words(item: ExperienceItem) -> bool:
    """Whether its situation and its advice can be found in a trajectory."""
    return bool(item.condition) and action_of(item.text) is not None


def graduations(pool: Pool, trajectories: Sequence[Trajectory], share: float) -> list[Proposal]:
    """Who leaves the context and who comes back, by :func:`habits`.

    Args:
        trajectories: of this iteration, without experience in context.
        share: 0..1; 0: nobody graduates, and who has comes back.
    """
    return decided(pool, habits(pool.items, trajectories), share, "done without it")


def decided(pool: Pool, found: Mapping[str, Habit], share: float, told: str) -> list[Proposal]:
    """Who leaves the context and who comes back.

    An item graduates when the policy clearly does what it says in at least ``share`` of its steps (the interval lies above),
    and comes back when it clearly does so in fewer (the interval lies below); between the two nothing changes.

    Args:
        share: 0..1; 0: nobody graduates, and who has comes back.
        told: begins the reason: what was counted.
    """
    if share <= 0:
        return [_proposal("recall", item, "graduation is switched off") for item in pool.items if item.graduated]
    proposals = []
    for item_id, habit in found.items():
        item, (low, high) = pool.get(item_id), habit.interval
        reason = f"{told} in {habit.followed:.4g} of {habit.steps} steps"
        if habit.steps < LEAST_STEPS or len(set(habit.tasks)) < LEAST_TASKS:
            continue
        if item.active and low >= share:
            proposals.append(_proposal("graduate", item, f"{reason}: it need not be read"))
        elif item.graduated and high < share:
            proposals.append(_proposal("recall", item, f"{reason}: it must be read again"))
    return proposals


def _proposal(operation: str, item: ExperienceItem, reason: str) -> Proposal:
    return Proposal(operation, item_id=item.id, reason=reason)  # type: ignore[arg-type]
