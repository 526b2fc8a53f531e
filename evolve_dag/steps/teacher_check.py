"""The check of the teacher inside the step ``contexts``: what it compares, what it tells, and what it finds about the pool.

How it decides is in :mod:`evolve_dag.experience.teacher_check`; why, in docs/adr/0021-teacher-check.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from evolve_dag.config.parts import part_of
from evolve_dag.config.schema import Experiment
from evolve_dag.distillation.agreement import overlaps
from evolve_dag.experience.graduation import decided, habit, in_our_words
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.base import SelectorPart
from evolve_dag.experience.teacher_check import TeacherCheck, check_teacher, new_items
from evolve_dag.protocols import ExperienceSource, LanguageModel
from evolve_dag.records import Finding, Task, Trajectory
from evolve_dag.seeds import stable_hash
from evolve_dag.steps.body import StepContext
from evolve_dag.steps.policies import (
    adapter_folder,
    experience_source,
    injects,
    open_policy,
    open_teacher,
    roll_out,
    teacher_views,
)
from evolve_dag.steps.spec import Verdict
from evolve_dag.store.artifacts import Artifact
from evolve_dag.store.frames import edits_from_frame, load_trajectories
from evolve_dag.store.jsonvalues import from_values, to_values
from evolve_dag.store.layout import EDITS
from evolve_dag.tasks.suites import Split, load_tasks_of

CHECK = "teacher_check.json"
"""What the check of the teacher found."""
CHECKED = "teacher_check"
"""Folder of the teacher's rollouts that were made for the check alone; below it one of each attempt that was refused before the
last, ``attempt_1`` and so on."""


@dataclass(frozen=True, slots=True)
class Checked:
    """What the check of the teacher came to."""

    check: TeacherCheck
    sampled: list[Trajectory] = field(default_factory=list)
    """Rollouts of the teacher that were made for the check alone."""
    student: list[Trajectory] = field(default_factory=list)
    """The student's rollouts that were compared, with the views of the teacher."""


UNCHECKED = TeacherCheck(None, note="no experience stood in any context")
"""Of a night in which there is nobody to check."""


def check(
    context: StepContext,
    split: Split,
    model: LanguageModel,
    source: ExperienceSource | None,
    pool: Pool,
    trajectories: Sequence[Trajectory],
    before: TeacherCheck | None = None,
) -> Checked:
    """Compare teacher and student. One side of it is there already: the teacher's rollouts, or the student's with the views of
    the teacher. The other is made of the training tasks, or of as many as the check may cost.

    Args:
        pool: what may stand in the teacher's context.
        before: of the attempt before this one, which was refused.
    """
    if source is None:
        return Checked(UNCHECKED)
    experiment, settings = context.experiment, context.experiment.teacher_check
    if not settings.enabled:
        return Checked(TeacherCheck(None, note="switched off (teacher_check.enabled)"))
    tasks = _looked_at(experiment, split.tasks)
    names = {task.id for task in tasks}
    there = [t for t in trajectories if t.task_id in names]
    if experiment.regime.source == "teacher":
        own = [t for t in load_trajectories(context.inputs["trajectories"]) if t.task_id in names]
        viewed = teacher_views(context, own, source, "teacher check")
        teacher, sampled = there, []
    else:
        viewed = there
        teacher = sampled = roll_out(
            context,
            replace(split, tasks=tasks),
            model,
            label=of_attempt("teacher check", before),
            seed=stable_hash("teacher check", experiment.seed, context.iteration, *sorted(before.withdrawn if before else ())),
            group_size=experiment.rollout.group_size,
            experience=source,
        )
    found = check_teacher(
        pool.active,
        teacher,
        viewed,
        new=_new(context, pool),
        confidence=settings.confidence,
        must_help=settings.must_help,
    )
    return Checked(found if before is None else found.after(before), sampled, viewed)


def asked_again(experiment: Experiment, pool: Pool, check: TeacherCheck) -> bool:
    """Whether the teacher is asked once more tonight: it was refused, something was withdrawn, and something is left."""
    if not check.refusal or not check.withdrew:
        return False
    return check.attempts < experiment.teacher_check.attempts and injects(experiment, pool.without(check.withdrawn))


def of_attempt(label: str, before: TeacherCheck | None) -> str:
    """The label of an attempt's rollouts."""
    return label if before is None else f"{label} of attempt {before.attempts + 1}"


def _new(context: StepContext, pool: Pool) -> frozenset[str]:
    """Items that no teacher has had in its context before."""
    if context.iteration == 1:  # a pool to start from may be older
        return frozenset(pool.ids)
    return new_items(edits_from_frame(context.inputs["experience"].frame(EDITS)))


def settle(context: StepContext, pool: Pool, checked: Checked) -> list[Finding]:
    """Principles in other words than ours which the policy need not read any more, and those that it must read again. (Of those
    in our words the miner decides, when it extracts.)"""
    experiment = context.experiment
    if experiment.granularity != "principle" or experiment.injection == "none" or not experiment.teacher_check.enabled:
        return []
    gone = checked.check.withdrawn.keys()
    others = replace(pool, items=tuple(i for i in pool.without(gone).items if not i.withdrawn and not in_our_words(i)))
    share: float = getattr(experiment.extraction, "graduation", 0.0)
    found = _alike(context, others, checked.student) if share > 0 and others.items else {}
    habits = {item: habit(steps) for item, steps in found.items() if item not in checked.check.helpful}
    proposals = decided(others, habits, share, "acted the same without it")
    return [Finding(p.operation, p.item_id, p.reason) for p in proposals]  # type: ignore[arg-type]


def _alike(context: StepContext, others: Pool, viewed: Sequence[Trajectory]) -> dict[str, list[tuple[str, float]]]:
    """How much alike the policy acts with and without the items, step by step; those that have graduated get views of their
    own."""
    experiment, adapter = context.experiment, context.entering.adapter
    assert experiment.injection != "none"  # the caller looked
    left, again = replace(others, items=tuple(replace(i, graduated=0) for i in others.items if i.graduated)), list[Trajectory]()
    if left.items:
        names = {task.id for task in _looked_at(experiment, load_tasks_of(experiment, "train"))}
        own = [t for t in load_trajectories(context.inputs["trajectories"]) if t.task_id in names]
        with open_policy(context.store, adapter, context.roles):  # a selector may ask it
            again = teacher_views(context, own, experience_source(experiment, left, context.roles), "items that graduated")
    found: dict[str, list[tuple[str, float]]] = {}
    if viewed or again:
        with open_teacher(adapter_folder(context.store, adapter), context.roles, None) as teacher:
            for seen in (viewed, again):
                top_k = experiment.distillation.top_k
                found |= overlaps(seen, others.ids, teacher, pattern=experiment.injection, top_k=top_k)
    return found


def _looked_at(experiment: Experiment, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
    return tasks[: experiment.teacher_check.tasks] if costs(experiment) else tasks


def costs(experiment: Experiment) -> bool:
    """Whether the other side of the check must be sampled, or chosen for by a model."""
    if experiment.regime.source == "student":
        return True
    if experiment.injection != "step_wise":
        return False
    row: SelectorPart[Any] = part_of("selector", experiment.selection)
    return bool(row.roles(experiment.selection))


def told(check: TeacherCheck, settled: Sequence[Finding]) -> dict[str, Any]:
    """The check in the step's summary; what follows reads ``findings`` and ``not_taught`` there."""
    facts: dict[str, Any] = {"withdrawn": len(check.withdrawn)}
    if check.earlier:
        facts["attempts"] = check.attempts
    if check.whole is not None:
        facts["teacher_check"] = to_values(check.whole)
    if findings := (*check.findings, *settled):
        facts["findings"] = [asdict(finding) for finding in findings]
    return facts | ({"not_taught": check.refusal} if check.refusal else {})


def verdict(artifact: Artifact) -> Verdict:
    """What the check of the teacher found."""
    check = check_of(artifact) or TeacherCheck(None, note="made before the teacher was checked")
    whole = {} if check.whole is None else to_values(check.whole)
    items = {one.item: str(one.comparison) for one in check.items if one.comparison is not None}
    attempts = {"attempts": check.attempts} if check.earlier else {}
    evidence = {**whole, **attempts, "items": items, "withdrawn": check.withdrawn}
    text = "; ".join(check.told) or check.note
    below = check.whole is not None and check.whole.harmful
    return Verdict("teacher", not check.withdrawn and not below, evidence, text)


def check_of(contexts: Artifact) -> TeacherCheck | None:
    """The check of the teacher as the artifact holds it; None where it was made before there was one."""
    if CHECK not in contexts.manifest.files:
        return None
    remedy = "the file was written by another version or changed by hand: run this step again"
    return from_values(TeacherCheck, contexts.json(CHECK), str(contexts.path / CHECK), remedy)
