"""Step ``contexts``: step-aligned contexts of student and teacher (METHOD step 4, DESIGN alignment).

Source ``teacher`` samples new trajectories from the experience-aware teacher; source ``student`` takes the student's own
trajectories and adds the teacher's view. In both cases the action ids are the same in the two views, which is checked.

Before anything is learned the teacher itself is checked (:mod:`evolve_dag.experience.teacher_check`): steps at which an item
stood that is withdrawn are left out, and of a teacher that is below the student nothing is taken.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

from evolve_dag.config.parts import part_of
from evolve_dag.config.schema import Experiment
from evolve_dag.distillation.agreement import overlaps
from evolve_dag.distillation.alignment import (
    Inject,
    Kept,
    TeacherContext,
    align_all,
    no_injection,
    replay_injection,
    select_rows,
    without_problems,
)
from evolve_dag.distillation.dataset import DistillationRow, load_contexts, make_rows, retention_rows, save_contexts
from evolve_dag.distillation.teacher import TeacherScorer
from evolve_dag.errors import PartError
from evolve_dag.evaluation.metrics import counts
from evolve_dag.experience.drills import Place, drills
from evolve_dag.experience.graduation import Habit, decided, in_our_words
from evolve_dag.experience.injection import injected
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.base import SelectorPart
from evolve_dag.experience.teacher_check import TeacherCheck, check_teacher
from evolve_dag.protocols import ExperienceSource, LanguageModel
from evolve_dag.records import Finding, InjectionPattern, Step, Task, Trajectory
from evolve_dag.secrecy import describe_error
from evolve_dag.seeds import stable_hash
from evolve_dag.steps.body import StepContext
from evolve_dag.steps.policies import (
    INJECTION_KEYS,
    TASK_KEYS,
    adapter_folder,
    experience_source,
    open_policy,
    open_pool,
    open_teacher,
    roll_out,
    selector_statistics,
    without_choice,
)
from evolve_dag.steps.spec import Check, StepSpec, Table, Verdict
from evolve_dag.store.artifacts import Artifact
from evolve_dag.store.frames import STEPS, TRAJECTORIES, load_trajectories, save_trajectories, trajectories_from_frames
from evolve_dag.store.jsonvalues import from_values, to_values
from evolve_dag.tasks.suites import Split, load_split, load_tasks_of

if TYPE_CHECKING:
    from evolve_dag.inference.recording import Recording

RETENTION = "retention"
"""Folder, in the artifact, of the rows in which the student reads experience too."""
DRILLS = "drills"
"""The same of the rows in which it reads advice that was drawn at random."""
CHECK = "teacher_check.json"
"""What the check of the teacher found."""
CHECKED = "teacher_check"
"""Folder of the teacher's rollouts that were made for the check alone."""


def run(context: StepContext) -> None:
    """Sample or take trajectories, keep what the regime keeps, align and score by the teacher."""
    experiment = context.experiment
    pool = open_pool(context.inputs["experience"])
    if experiment.injection == "none" or pool.active.items:
        made = _teach(context, pool)
    else:  # the teacher would be the student: nothing is sampled to find that out
        made = _Taught([], select_rows([], experiment.regime.rejection), Scored([], [], []), None, _Checked(_UNCHECKED))
    folder, scored, check = context.build.path, made.scored, made.checked.check
    (folder / CHECK).write_text(json.dumps(to_values(check), indent=1) + "\n", encoding="utf-8")
    settled = _settle(context, pool, made.checked)
    if made.checked.sampled:
        (folder / CHECKED).mkdir()
        save_trajectories(folder / CHECKED, made.checked.sampled)
    save_trajectories(folder, made.trajectories)
    save_contexts(folder, scored.rows)
    save_contexts(folder / RETENTION, scored.retention)
    save_contexts(folder / DRILLS, scored.drills)
    chosen = [len(c.selected) for row in scored.rows for c in row.contexts]
    context.build.note(
        **counts(made.trajectories)
        | ({} if experiment.regime.source == "teacher" else {"tokens": counts(made.checked.sampled)["tokens"]}),
        kept=len(scored.rows),
        retention=len(scored.retention),
        drills=len(scored.drills),
        **{f"dropped_{k}": v for k, v in made.selection.counts.items() if k != "kept"},
        steps=len(chosen),
        action_tokens=sum(row.action_tokens for row in scored.rows),
        items_per_step=sum(chosen) / max(1, len(chosen)),
        steps_without_item=sum(n == 0 for n in chosen),
        **_told(check, settled),
        **selector_statistics(made.source),
    )


@dataclass(frozen=True, slots=True)
class _Taught:
    """What the teacher did, and what is learned from it."""

    trajectories: list[Trajectory]
    selection: Kept
    scored: Scored
    source: ExperienceSource | None
    checked: _Checked


@dataclass(frozen=True, slots=True)
class _Checked:
    """What the check of the teacher came to."""

    check: TeacherCheck
    sampled: list[Trajectory] = field(default_factory=list)
    """Rollouts of the teacher that were made for the check alone."""
    student: list[Trajectory] = field(default_factory=list)
    """The student's rollouts that were compared, with the views of the teacher."""


_UNCHECKED = TeacherCheck(None, note="no experience stood in any context")


def _told(check: TeacherCheck, settled: Sequence[Finding]) -> dict[str, Any]:
    """The check in the step's summary; what follows reads ``findings`` and ``not_taught`` there."""
    told: dict[str, Any] = {"withdrawn": len(check.withdrawn)}
    if check.whole is not None:
        told["teacher_check"] = to_values(check.whole)
    if findings := (*check.findings, *settled):
        told["findings"] = [asdict(finding) for finding in findings]
    return told | ({"not_taught": check.refusal} if check.refusal else {})


def _teach(context: StepContext, pool: Pool) -> _Taught:
    from evolve_dag.inference.transformers import TransformersModel

    experiment = context.experiment
    split = load_split(experiment, "train", context.roles)
    adapter = context.entering.adapter
    with ExitStack() as opened:
        model = opened.enter_context(open_policy(context.store, adapter, context.roles))
        source = experience_source(experiment, pool, context.roles)
        recording = None
        if experiment.regime.source == "teacher":
            if isinstance(model, TransformersModel):
                recording = opened.enter_context(model.recording(experiment.distillation.top_k))
            trajectories = roll_out(
                context,
                split,
                model,
                label="teacher rollouts",
                seed=stable_hash("contexts", experiment.seed, context.iteration),
                group_size=experiment.rollout.group_size,
                experience=source,
            )
        else:
            trajectories = context.roles.run(with_teacher_views(load_trajectories(context.inputs["trajectories"]), source))
        checked = _check(context, split, model, source, pool, trajectories)
        selection = select_rows([] if checked.check.refusal else trajectories, experiment.regime.rejection)
        if not selection.kept:
            return _Taught(trajectories, selection, Scored([], [], []), source, checked)
        if experiment.models.policy.backend != "transformers":
            opened.close()  # what samples gives its memory back before the weights are opened here
        with open_teacher(adapter_folder(context.store, adapter), context.roles, model) as teacher:
            withdrawn = frozenset(checked.check.withdrawn)
            scored = score(experiment, selection.kept, teacher, context.progress, recording, withdrawn)
    return _Taught(trajectories, selection, scored, source, checked)


def _check(
    context: StepContext,
    split: Split,
    model: LanguageModel,
    source: ExperienceSource | None,
    pool: Pool,
    trajectories: Sequence[Trajectory],
) -> _Checked:
    """Compare teacher and student. One side of it is there already: the teacher's rollouts, or the student's with the views of
    the teacher. The other is made of the training tasks, or of as many as the check may cost."""
    experiment, settings = context.experiment, context.experiment.teacher_check
    if source is None or not settings.enabled:
        return _Checked(_UNCHECKED if source is None else TeacherCheck(None, note="switched off (teacher_check.enabled)"))
    tasks = _looked_at(experiment, split.tasks)
    names = {task.id for task in tasks}
    there = [t for t in trajectories if t.task_id in names]
    if experiment.regime.source == "teacher":
        own = [t for t in load_trajectories(context.inputs["trajectories"]) if t.task_id in names]
        viewed = context.roles.run(with_teacher_views(own, source))
        teacher, sampled = there, []
    else:
        viewed = there
        teacher = sampled = roll_out(
            context,
            replace(split, tasks=tasks),
            model,
            label="teacher check",
            seed=stable_hash("teacher check", experiment.seed, context.iteration),
            group_size=experiment.rollout.group_size,
            experience=source,
        )
    found = check_teacher(pool.active, teacher, viewed, iteration=context.iteration, confidence=settings.confidence)
    return _Checked(found, sampled, viewed)


def _settle(context: StepContext, pool: Pool, checked: _Checked) -> list[Finding]:
    """Principles in other words than ours which the policy need not read any more, and those that it must read again. (Of those
    in our words the miner decides, when it extracts.)"""
    experiment = context.experiment
    pattern = experiment.injection
    if experiment.granularity != "principle" or pattern == "none" or not experiment.teacher_check.enabled:
        return []
    gone = checked.check.withdrawn.keys()
    others = replace(pool, items=tuple(i for i in pool.without(gone).items if not i.withdrawn and not in_our_words(i)))
    share: float = getattr(experiment.extraction, "graduation", 0.0)
    left = replace(others, items=tuple(replace(item, graduated=0) for item in others.items if item.graduated))
    found: dict[str, list[float]] = {}
    if share > 0 and (left.items or (others.items and checked.student)):
        with open_policy(context.store, context.entering.adapter, context.roles) as model:
            again: list[Trajectory] = []
            if (source := experience_source(experiment, left, context.roles)) is not None:
                names = {task.id for task in _looked_at(experiment, load_tasks_of(experiment, "train"))}
                own = [t for t in load_trajectories(context.inputs["trajectories"]) if t.task_id in names]
                again = context.roles.run(with_teacher_views(own, source))
            with open_teacher(adapter_folder(context.store, context.entering.adapter), context.roles, model) as teacher:
                for seen in (checked.student, again):
                    found |= overlaps(seen, others.ids, teacher, pattern=pattern, top_k=experiment.distillation.top_k)
    habits = {item: Habit(len(values), sum(values)) for item, values in found.items() if item not in checked.check.helpful}
    proposals = decided(others, habits, share, "acted the same without it")
    return [Finding(p.operation, p.item_id, p.reason) for p in proposals]  # type: ignore[arg-type]


def _looked_at(experiment: Experiment, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
    return tasks[: experiment.teacher_check.tasks] if _costs(experiment) else tasks


def _costs(experiment: Experiment) -> bool:
    """Whether the other side of the check must be sampled, or chosen for by a model."""
    if experiment.regime.source == "student" or experiment.injection != "step_wise":
        return experiment.regime.source == "student"
    row: SelectorPart[Any] = part_of("selector", experiment.selection)
    return bool(row.roles(experiment.selection))


@dataclass(frozen=True, slots=True)
class Scored:
    """What the student learns from, each action token with the teacher's distribution."""

    rows: list[DistillationRow]
    """Without experience in the student's view."""
    retention: list[DistillationRow]
    """With the teacher's experience in it (``distillation.retention``)."""
    drills: list[DistillationRow]
    """With advice drawn at random in it (``distillation.drills``)."""


def score(
    experiment: Experiment,
    kept: Sequence[Trajectory],
    model: Any,
    progress: Any,
    recording: Recording | None = None,
    withdrawn: frozenset[str] = frozenset(),
) -> Scored:
    """Align ``kept`` and score every action token by the teacher (``model`` with experience in context).

    Args:
        withdrawn: ids of items; the steps at which one of them stood in the context are not learned.
        recording: made while ``model`` sampled ``kept`` itself: those distributions are its scores.

    Raises:
        AlignmentError: the two views do not share their action ids, or a student's view holds experience.
    """
    inject = no_injection if experiment.injection == "none" else replay_injection(experiment.injection)

    def learned(trajectory: Trajectory, step: Step) -> bool:
        fine = experiment.regime.refused or without_problems(trajectory, step)
        return fine and not withdrawn.intersection(step.selected)

    aligned = align_all(kept, model.chat, inject, learned)
    if experiment.injection == "none":  # then nothing is compared with a teacher (config/schema.py: contradictions)
        return Scored(make_rows(aligned, None), [], [])
    texts = drills(kept, experiment.distillation.drills, experiment.seed)
    drilled = align_all(
        kept, model.chat, _drill(experiment.injection, texts), lambda t, s: (t.id, s.index) in texts and s.problem is None
    )
    scorer = TeacherScorer(model.model, top_k=experiment.distillation.top_k)
    progress.start("teacher scoring", len(aligned) + len(drilled))
    try:
        targets = scorer.score([one.views for one in (*aligned, *drilled)], progress.advance, recording)
    finally:
        progress.finish()
    rows = make_rows(aligned, targets[: len(aligned)])
    return Scored(
        rows,
        retention_rows(rows, aligned, experiment.distillation.retention, experiment.seed),
        retention_rows(make_rows(drilled, targets[len(aligned) :]), drilled, 1.0, experiment.seed),
    )


def _drill(pattern: InjectionPattern, texts: Mapping[Place, str]) -> Inject:
    """Puts the advice of a drill where the experiment puts its experience."""

    def inject(trajectory: Trajectory, step: int) -> TeacherContext:
        messages, text = injected(pattern, trajectory.history(step), [texts[trajectory.id, step]])
        return TeacherContext(messages, (), text)

    return inject


async def with_teacher_views(trajectories: Sequence[Trajectory], source: ExperienceSource | None) -> list[Trajectory]:
    """Student trajectories with what the teacher would have had in its context recorded in every step.

    One for which a selector from outside fails is ``failed``, as it is where the teacher acts: nothing is learned from it.
    """
    if source is None:
        return list(trajectories)
    out = []
    for trajectory in trajectories:
        try:
            out.append(await _with_teacher_view(trajectory, source))
        except PartError as error:
            out.append(replace(trajectory, status="failed", reward=None, error=describe_error(error)))
    return out


async def _with_teacher_view(trajectory: Trajectory, source: ExperienceSource) -> Trajectory:
    steps = []
    for step in trajectory.steps:
        view = await source.prepare(replace(trajectory, steps=trajectory.steps[: step.index]))
        steps.append(replace(step, selected=view.selected, injected=view.text, rationale=view.rationale))
    return replace(trajectory, steps=tuple(steps))


def examine(artifact: Artifact, experiment: Experiment) -> Iterator[Verdict]:
    """That the student never sees experience, and that both views hold the actions that were sampled."""
    artifact.verify()
    rows, retention, drilled = (load_contexts(artifact.path / part) for part in ("", RETENTION, DRILLS))
    found = trajectories_from_frames(artifact.frame(TRAJECTORIES), artifact.frame(STEPS))
    trajectories = {trajectory.id: trajectory for trajectory in found}
    steps, other_ids, seen = 0, [], []
    for one in rows:
        trajectory = trajectories[one.row.trajectory_id]
        history = trajectory.history(len(trajectory.steps))
        for context, (start, end) in zip(one.contexts, one.row.spans, strict=True):
            steps += 1
            where = f"{trajectory.id} step {context.step}"
            if one.row.ids[start:end] != trajectory.steps[context.step].token_ids:
                other_ids.append(where)
            if context.injected.strip() and any(context.injected.strip() in message.content for message in history):
                seen.append(where)
    for one in (
        *retention,
        *drilled,
    ):  # these hold experience by design (docs/adr/0004-retention.md): only the actions must agree
        name, _, number = one.row.trajectory_id.rpartition("@")
        [(start, end)] = one.row.spans
        if one.row.ids[start:end] != trajectories[name].steps[int(number)].token_ids:
            other_ids.append(one.row.trajectory_id)
    evidence = {
        "trajectories": len(rows),
        "steps": steps,
        "steps_with_experience": sum(bool(context.injected) for one in rows for context in one.contexts),
        "experience_in_student_view": seen,
    }
    yield Verdict("clean", not seen, evidence)
    evidence = {
        "steps": steps,
        "action_tokens": sum(one.action_tokens for one in rows),
        "teacher_distributions": sum(len(one.teacher) for one in rows if one.teacher is not None),
        "retention_rows": len(retention),
        "drill_rows": len(drilled),
        "other_action_ids": other_ids,
    }
    yield Verdict("same_actions", not other_ids, evidence)
    yield _verdict(artifact)


def _verdict(artifact: Artifact) -> Verdict:
    """What the check of the teacher found."""
    check = check_of(artifact) or TeacherCheck(None, note="made before the teacher was checked")
    whole = {} if check.whole is None else to_values(check.whole)
    items = {one.item: str(one.comparison) for one in check.items if one.comparison is not None}
    evidence = {**whole, "items": items, "withdrawn": check.withdrawn}
    text = check.note or check.refusal or ("an item lowers the teacher's success" if check.withdrawn else "")
    return Verdict("teacher", not check.withdrawn and not check.refusal, evidence, text)


def check_of(contexts: Artifact) -> TeacherCheck | None:
    """The check of the teacher as the artifact holds it; None where it was made before there was one."""
    if CHECK not in contexts.manifest.files:
        return None
    remedy = "the file was written by another version or changed by hand: run this step again"
    return from_values(TeacherCheck, contexts.json(CHECK), str(contexts.path / CHECK), remedy)


def _unread(experiment: Experiment) -> tuple[str, ...]:
    scored = ("distillation.top_k", "distillation.retention", "distillation.drills")
    if experiment.injection == "none":
        return (*without_choice(experiment), *scored, "teacher_check")
    settings = experiment.teacher_check
    unused = ("confidence", "tasks") if not settings.enabled else () if _costs(experiment) else ("tasks",)
    return (*without_choice(experiment), *(f"teacher_check.{key}" for key in unused))


SPEC = StepSpec(
    "contexts",
    "Step-aligned contexts: the student's clean view, the teacher's view with experience, the shared action tokens.",
    version="11",
    config=(
        "seed",
        *INJECTION_KEYS,
        "regime.source",
        "regime.rejection",
        "regime.refused",
        "distillation.top_k",
        "distillation.retention",
        "distillation.drills",
        "teacher_check",
        "tasks.train",
        *TASK_KEYS,
    ),
    inputs=("policy", "trajectories", "experience"),
    run=run,
    kinds=frozenset({"parquet", "polars"}),
    iteration=True,
    unread=_unread,
    checks=(
        Check("clean", "No clean row of the student holds experience.", blocking=True),
        Check(
            "same_actions",
            "Student and teacher share the action ids: those that were sampled, token for token.",
            blocking=True,
        ),
        Check("teacher", "With experience the teacher is not below the student, and no item lowers its success."),
    ),
    hidden=frozenset({"findings", "not_taught"}),
    examine=examine,
    tables=(Table("contexts.parquet", ("trajectory_id", "step", "selected", "injected", "teacher_tokens")),),
)
