"""Instance-level experience: keeps trajectory detail, 'for this question, that answer' (METHOD: granularity ``instance``).

The form is ``Case: <question> answer <answer>.``, with the calls that led there when asked for. It exists to be
compared with principles; the paper's instance-level items hold an entity string 94 times in 100.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evolve_dag.experience.features import strip_last_step
from evolve_dag.experience.pool import Pool, Proposal, lift
from evolve_dag.records import Trajectory, solved


@dataclass(frozen=True, slots=True)
class Case:
    """One successful trajectory, as an item would tell it."""

    question: str
    text: str
    trajectory_id: str
    steps: int
    group_mean: float
    """Mean reward of the judged trajectories of its task."""

    def evidence(self) -> dict[str, float]:
        """``lift`` is what recalling the case would add: success minus the group's mean. So mixed groups count more than
        tasks that always succeed, and the pool's cap keeps the cases that the policy most often misses."""
        return {"support": 1.0, "lift": round(1.0 - self.group_mean, 4), "steps": float(self.steps)}


@dataclass(frozen=True, slots=True)
class Cases:
    cases: tuple[Case, ...]
    """Best first: mixed groups, then others, each in a seeded order that does not depend on the input's order."""
    statistics: Mapping[str, float]


def case_text(question: str, answer: str, path: Sequence[str] = ()) -> str:
    """``Case: <question> answer <answer>.``, with ``path`` (calls as ``tool argument``) when given."""
    plain = " ".join(strip_last_step(question).split())
    steps = f" path {', then '.join(' '.join(call.split()) for call in path)}." if path else ""
    return f"Case: {plain} answer {' '.join(answer.split())}.{steps}"


def cases(trajectories: Sequence[Trajectory], *, seed: int, path: bool = False) -> Cases:
    """The shortest success of each task (ties: lowest rollout).

    Trajectories without a verdict are left out.
    """
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in sorted(trajectories, key=lambda t: (t.task_id, t.rollout, t.id)):
        if trajectory.reward is not None:
            groups.setdefault(trajectory.task_id, []).append(trajectory)
    mixed: list[Case] = []
    others: list[Case] = []
    for group in groups.values():
        rewards = [t.reward for t in group if t.reward is not None]
        mean = sum(rewards) / len(rewards)
        successes = [t for t in group if solved(t.reward) and t.answer and t.answer.strip()]
        if not successes:
            continue
        best = min(successes, key=lambda t: len(t.steps))
        calls = [f"{s.call.name} {' '.join(s.call.texts.values())}" for s in best.steps if s.call is not None] if path else ()
        text = case_text(best.question, best.answer or "", calls)
        case = Case(strip_last_step(best.question), text, best.id, len(best.steps), mean)
        (mixed if mean < 1 else others).append(case)
    for place, part in enumerate((mixed, others)):
        random.Random(f"{seed}:{place}").shuffle(part)
    judged = sum(len(group) for group in groups.values())
    statistics = {
        "trajectories": float(len(trajectories)),
        "judged": float(judged),
        "not_judged": float(len(trajectories) - judged),
        "groups": float(len({t.task_id for t in trajectories})),
        "mixed_groups": float(sum(0 < sum(t.reward or 0.0 for t in g) < len(g) for g in groups.values())),
        "cases": float(len(mixed) + len(others)),
    }
    return Cases((*mixed, *others), statistics)


def reconcile(found: Cases, pool: Pool, *, cap: int) -> list[Proposal]:
    """Add the best cases: as many as there is room for, then those that beat the pool's weakest item. A question that
    stands in the pool already gets the new evidence (and text: it may now have another accepted answer) instead of a
    second item."""
    standing = [item for item in pool.items if item.granularity == "instance"]
    proposals: list[Proposal] = []
    added: set[str] = set()
    room = cap - len(pool.active)
    weakest = sorted((lift(item) for item in pool.active.items), reverse=True)
    for case in found.cases:
        beginning = case_text(case.question, "").removesuffix(".")
        item = next((i for i in standing if i.text.startswith(beginning)), None)
        evidence = case.evidence()
        reason = f"success in {case.steps} steps; the group's mean reward is {case.group_mean:.2f}"
        if item is None:
            if case.text in added:  # two tasks may ask the same question
                continue
            if room > 0:
                room -= 1
            elif weakest and evidence["lift"] > weakest[-1]:
                weakest.pop()
            else:
                continue
            added.add(case.text)
            proposals.append(
                Proposal("add", text=case.text, granularity="instance", evidence=evidence,
                         trajectory_ids=(case.trajectory_id,), reason=reason)
            )  # fmt: skip
        elif not item.withdrawn and (item.text != case.text or dict(item.evidence) != evidence):
            proposals.append(
                Proposal("update", item_id=item.id, text=case.text, evidence=evidence,
                         trajectory_ids=(case.trajectory_id,), reason=f"new evidence: {reason}")
            )  # fmt: skip
    return proposals
