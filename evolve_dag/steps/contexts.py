"""Step ``contexts``: step-aligned contexts of student and teacher (METHOD step 4, DESIGN alignment).

Source ``teacher`` samples new trajectories from the experience-aware teacher; source ``student`` takes the student's own
trajectories and adds the teacher's view. In both cases the action ids are the same in the two views, which is checked.

Before anything is learned the teacher itself is checked (:mod:`evolve_dag.experience.teacher_check`): steps at which an item
stood that is withdrawn are left out, and of a teacher that is below the student nothing is taken: it is asked again without
what was withdrawn, as often as the experiment lets it be.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evolve_dag.config.schema import Experiment
from evolve_dag.distillation.alignment import (
    Inject,
    Kept,
    TeacherContext,
    align_all,
    holds_experience,
    no_injection,
    replay_injection,
    select_rows,
    without_problems,
)
from evolve_dag.distillation.dataset import DistillationRow, load_contexts, make_rows, retention_rows, save_contexts
from evolve_dag.distillation.teacher import TeacherScorer
from evolve_dag.evaluation.metrics import counts
from evolve_dag.experience.drills import Place, drills
from evolve_dag.experience.injection import injected
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.teacher_check import TeacherCheck
from evolve_dag.protocols import ExperienceSource, LanguageModel
from evolve_dag.records import InjectionPattern, Step, Trajectory
from evolve_dag.seeds import stable_hash
from evolve_dag.steps import teacher_check
from evolve_dag.steps.body import StepContext
from evolve_dag.steps.policies import (
    ANSWERED,
    FRONTIER,
    INJECTION_KEYS,
    TASK_KEYS,
    adapter_folder,
    answered,
    experience_source,
    open_policy,
    open_pool,
    open_teacher,
    roll_out,
    selector_statistics,
    teacher_views,
    without_choice,
)
from evolve_dag.steps.spec import Check, StepSpec, Table, Verdict
from evolve_dag.store.artifacts import Artifact
from evolve_dag.store.frames import load_trajectories, save_trajectories, trajectories_from_frames
from evolve_dag.store.jsonvalues import to_values
from evolve_dag.store.layout import CONTEXTS, STEPS, TRAJECTORIES
from evolve_dag.tasks.suites import Split, load_split

if TYPE_CHECKING:
    from evolve_dag.inference.recording import Recording

RETENTION = "retention"
"""Folder, in the artifact, of the rows in which the student reads experience too."""
DRILLS = "drills"
"""The same of the rows in which it reads advice that was drawn at random."""


def run(context: StepContext) -> None:
    """Sample or take trajectories, keep what the regime keeps, align and score by the teacher."""
    experiment = context.experiment
    pool = open_pool(context.inputs["experience"])
    if experiment.injection == "none" or pool.active.items:
        made = _teach(context, pool)
    else:  # the teacher would be the student: nothing is sampled to find that out
        nobody = _Attempt([], None, teacher_check.Checked(teacher_check.UNCHECKED))
        made = _Taught([nobody], select_rows([], experiment.regime.rejection), Scored([], [], []))
    *refused, last = made.attempts
    folder, scored, check = context.build.path, made.scored, last.checked.check
    (folder / teacher_check.CHECK).write_text(json.dumps(to_values(check), indent=1) + "\n", encoding="utf-8")
    settled = teacher_check.settle(context, pool, last.checked)
    aside = {f"attempt_{n}": one.rollouts(experiment) for n, one in enumerate(refused, 1)} | {"": last.checked.sampled}
    for name, rollouts in aside.items():
        if rollouts:
            (folder / teacher_check.CHECKED / name).mkdir(parents=True, exist_ok=True)
            save_trajectories(folder / teacher_check.CHECKED / name, rollouts)
    save_trajectories(folder, last.trajectories)
    save_contexts(folder, scored.rows)
    save_contexts(folder / RETENTION, scored.retention)
    save_contexts(folder / DRILLS, scored.drills)
    chosen = [len(c.selected) for row in scored.rows for c in row.contexts]
    context.build.note(
        **counts(last.trajectories) | {"tokens": sum(counts(one.rollouts(experiment))["tokens"] for one in made.attempts)},
        kept=len(scored.rows),
        retention=len(scored.retention),
        drills=len(scored.drills),
        **{f"dropped_{k}": v for k, v in made.selection.counts.items() if k != "kept"},
        steps=len(chosen),
        action_tokens=sum(row.action_tokens for row in scored.rows),
        items_per_step=sum(chosen) / max(1, len(chosen)),
        steps_without_item=sum(n == 0 for n in chosen),
        **teacher_check.told(check, settled),
        **selector_statistics(*(one.source for one in made.attempts)),
    )


@dataclass(frozen=True, slots=True)
class _Attempt:
    """What the teacher did when it was asked once."""

    trajectories: list[Trajectory]
    """Its own, or the student's with its views."""
    source: ExperienceSource | None
    """What it read."""
    checked: teacher_check.Checked

    def rollouts(self, experiment: Experiment) -> list[Trajectory]:
        """All that it acted in."""
        return self.trajectories if experiment.regime.source == "teacher" else self.checked.sampled


@dataclass(frozen=True, slots=True)
class _Taught:
    """What the teacher did, and what is learned from it."""

    attempts: list[_Attempt]
    """The last is learned from; the others were refused."""
    selection: Kept
    scored: Scored


def _teach(context: StepContext, pool: Pool) -> _Taught:
    experiment = context.experiment
    split = load_split(experiment, "train", context.roles)
    adapter = context.entering.adapter
    with ExitStack() as opened:
        model = opened.enter_context(open_policy(context.store, adapter, context.roles))
        attempts: list[_Attempt] = []
        check: TeacherCheck | None = None
        while check is None or teacher_check.asked_again(experiment, pool, check):
            recording = opened.enter_context(_recorded(experiment, model))  # in place of the one before: it is large
            attempts.append(_ask(context, split, model, pool, check))
            check = attempts[-1].checked.check
        selection = select_rows([] if check.refusal else attempts[-1].trajectories, experiment.regime.rejection)
        if not selection.kept:
            return _Taught(attempts, selection, Scored([], [], []))
        if experiment.models.policy.backend != "transformers":
            opened.close()  # what samples gives its memory back before the weights are opened here
        with open_teacher(adapter_folder(context.store, adapter), context.roles, model) as teacher:
            scored = score(experiment, selection.kept, teacher, context.progress, recording, frozenset(check.withdrawn))
    return _Taught(attempts, selection, scored)


def _recorded(experiment: Experiment, model: LanguageModel) -> AbstractContextManager[Recording | None]:
    """Keeps what the teacher samples from, where that is its score."""
    from evolve_dag.inference.transformers import TransformersModel

    if experiment.regime.source != "teacher" or experiment.injection == "none" or not isinstance(model, TransformersModel):
        return nullcontext()
    return model.recording(experiment.distillation.top_k)


def _ask(context: StepContext, split: Split, model: LanguageModel, pool: Pool, before: TeacherCheck | None) -> _Attempt:
    """The teacher without what ``before``, the check of a refused attempt, withdrew; checked.

    Its draws follow from what is left out, so it takes nothing from the journal that was played with another pool.
    """
    experiment = context.experiment
    gone = () if before is None else before.withdrawn
    left = pool.without(gone)
    source = experience_source(experiment, left, context.roles)
    if experiment.regime.source == "teacher":
        trajectories = roll_out(
            context,
            split,
            model,
            label=teacher_check.of_attempt("teacher rollouts", before),
            seed=stable_hash("contexts", experiment.seed, context.iteration, *sorted(gone)),
            group_size=experiment.rollout.group_size,
            experience=source,
        )
    else:
        own = load_trajectories(context.inputs["trajectories"])
        trajectories = teacher_views(context, own, source, "teacher views")
    checked = teacher_check.check(context, split, model, source, left, trajectories, before)
    return _Attempt(trajectories, source, checked)


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


def examine(artifact: Artifact, experiment: Experiment) -> Iterator[Verdict]:
    """That the student never sees experience, that both views hold the actions that were sampled, what the teacher's
    check found, and whether who was asked did answer."""
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
            if context.injected.strip() and any(holds_experience(message, context.injected) for message in history):
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
    yield teacher_check.verdict(artifact)
    yield answered(artifact)


def _unread(experiment: Experiment) -> tuple[str, ...]:
    scored = ("distillation.top_k", "distillation.retention", "distillation.drills")
    if experiment.injection == "none":
        return (*without_choice(experiment), *scored, "teacher_check", FRONTIER)
    settings = experiment.teacher_check
    unused: tuple[str, ...] = () if teacher_check.costs(experiment) else ("tasks",)
    if not settings.enabled:
        unused = ("attempts", "must_help", "tasks", "confidence")
    return (*without_choice(experiment), *(f"teacher_check.{key}" for key in unused), FRONTIER)


SPEC = StepSpec(
    "contexts",
    "Step-aligned contexts: the student's clean view, the teacher's view with experience, the shared action tokens.",
    version="13",
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
        ANSWERED,
    ),
    hidden=frozenset({"findings", "not_taught"}),
    examine=examine,
    tables=(Table(CONTEXTS, ("trajectory_id", "step", "selected", "injected", "teacher_tokens")),),
)
