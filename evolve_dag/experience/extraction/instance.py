"""Instance-level experience: keeps trajectory detail, 'for this question, that answer' (METHOD: granularity ``instance``).

The form is ``Case: <question> answer <answer>.``, with the calls that led there when asked for. An episode without an answer (a
game that was won) is told by what was done: ``Case: <question> <beginning> path <calls>.`` It exists to be compared with
principles; the paper's instance-level items hold an entity string 94 times in 100.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evolve_dag.experience.features import strip_last_step
from evolve_dag.experience.pool import Pool, Proposal, lift
from evolve_dag.plain import one_line
from evolve_dag.records import Step, Trajectory, solved

CASE = "Case:"
"""Begins every case."""


@dataclass(frozen=True, slots=True)
class Case:
    """One successful trajectory, as an item would tell it."""

    question: str
    text: str
    trajectory_id: str
    steps: int
    group_mean: float
    """Mean reward of the judged trajectories of its task."""
    answered: bool
    """Whether it ended with an answer."""

    def stands_as(self, text: str) -> bool:
        """Whether an item of this text is about the same: the same question. Where there is no answer the question may be that
        of every game, and the case is what was done."""
        return text.startswith(case_text(self.question, "").removesuffix(".")) if self.answered else text == self.text

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
    return f"{CASE} {_asked(question)} answer {' '.join(answer.split())}.{f' {_path(path)}' if path else ''}"


def played_text(question: str, beginning: str, path: Sequence[str]) -> str:
    """``Case: <question> <beginning> path <calls>.``, of an episode without an answer."""
    return " ".join(part for part in (f"{CASE} {_asked(question)}", one_line(beginning), _path(path)) if part)


def _asked(question: str) -> str:
    return " ".join(strip_last_step(question).split())


def _path(calls: Sequence[str]) -> str:
    return f"path {', then '.join(' '.join(call.split()) for call in calls)}."


def _calls(steps: Sequence[Step]) -> list[str]:
    """The calls that were made, as ``tool argument``; a plain turn as it was written."""
    found = []
    for step in steps:
        if step.call is not None and step.problem is None:
            said = " ".join(step.call.texts.values())
            found.append(said if step.text.strip() == said.strip() else f"{step.call.name} {said}")
    return found


def cases(trajectories: Sequence[Trajectory], *, seed: int, path: bool = False) -> Cases:
    """The shortest success of each task (ties: lowest rollout).

    Trajectories without a verdict are left out. What the beginning of an episode showed are the lines of its system message
    that not every one of ``trajectories`` has.
    """
    systems = [t.system.splitlines() for t in trajectories]
    common = set(systems[0]).intersection(*systems) if systems else set[str]()
    groups: dict[str, list[Trajectory]] = {}
    for trajectory in sorted(trajectories, key=lambda t: (t.task_id, t.rollout, t.id)):
        if trajectory.reward is not None:
            groups.setdefault(trajectory.task_id, []).append(trajectory)
    mixed: list[Case] = []
    others: list[Case] = []
    for group in groups.values():
        rewards = [t.reward for t in group if t.reward is not None]
        mean = sum(rewards) / len(rewards)
        successes = [t for t in group if solved(t.reward) and ((t.answer or "").strip() or _calls(t.steps))]
        if not successes:
            continue
        best = min(successes, key=lambda t: len(t.steps))
        answer, calls = (best.answer or "").strip(), _calls(best.steps)
        if answer:
            text = case_text(best.question, answer, calls if path else ())
        else:
            beginning = " ".join(line for line in best.system.splitlines() if line not in common)
            text = played_text(best.question, beginning, calls)
        case = Case(strip_last_step(best.question), text, best.id, len(best.steps), mean, bool(answer))
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
    """Add the best cases: as many as there is room for, then those that beat the pool's weakest item. A question (of an
    episode without an answer: a path) that stands in the pool already gets the new evidence (and text: it may now have
    another accepted answer) instead of a second item."""
    standing = [item for item in pool.items if item.granularity == "instance"]
    proposals: list[Proposal] = []
    added: set[str] = set()
    room = cap - len(pool.active)
    weakest = sorted((lift(item) for item in pool.active.items), reverse=True)
    for case in found.cases:
        item = next((i for i in standing if case.stands_as(i.text)), None)
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
