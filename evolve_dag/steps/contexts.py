"""Step ``contexts``: step-aligned contexts of student and teacher (METHOD step 4, DESIGN alignment).

Source ``teacher`` samples new trajectories from the experience-aware teacher; source ``student`` takes the student's own
trajectories and adds the teacher's view. In both cases the action ids are the same in the two views, which is checked.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from evolve_dag.distillation.alignment import align_all, no_injection, replay_injection, select_rows, without_problems
from evolve_dag.distillation.dataset import DistillationRow, make_rows, retention_rows, save_contexts
from evolve_dag.distillation.teacher import TeacherScorer
from evolve_dag.evaluation.metrics import counts
from evolve_dag.protocols import ExperienceSource
from evolve_dag.records import Trajectory
from evolve_dag.seeds import stable_hash
from evolve_dag.steps.body import StepContext
from evolve_dag.steps.policies import (
    adapter_folder,
    experience_source,
    open_policy,
    open_pool,
    open_teacher,
    roll_out,
    selector_statistics,
)
from evolve_dag.store.frames import load_trajectories, save_trajectories
from evolve_dag.tasks.suites import load_split

if TYPE_CHECKING:
    from evolve_dag.config.schema import Experiment
    from evolve_dag.inference.recording import Recording


RETENTION = "retention"
"""Folder, in the artifact, of the rows in which the student reads experience too."""


def run(context: StepContext) -> None:
    """Sample or take trajectories, keep what the regime keeps, align and score by the teacher."""
    from evolve_dag.inference.transformers import TransformersModel

    experiment = context.experiment
    split = load_split(experiment, "train", context.roles)
    adapter = context.entering.adapter
    with ExitStack() as opened:
        model = opened.enter_context(open_policy(context.store, adapter, context.roles))
        source = experience_source(experiment, open_pool(context.inputs["experience"]), context.roles)
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
            trajectories = asyncio.run(with_teacher_views(load_trajectories(context.inputs["trajectories"]), source))
        selection = select_rows(trajectories, experiment.regime.rejection)
        if experiment.models.policy.backend != "transformers":
            opened.close()  # what samples gives its memory back before the weights are opened here
        with open_teacher(experiment, adapter_folder(context.store, adapter), model) as teacher:
            rows, retention = score(experiment, selection.kept, teacher, context.progress, recording)
    folder = context.build.path
    save_trajectories(folder, trajectories)
    save_contexts(folder, rows)
    save_contexts(folder / RETENTION, retention)
    chosen = [len(c.selected) for row in rows for c in row.contexts]
    context.build.note(
        **counts(trajectories) if experiment.regime.source == "teacher" else {**counts(trajectories), "tokens": 0},
        kept=len(rows),
        retention=len(retention),
        **{f"dropped_{k}": v for k, v in selection.counts.items() if k != "kept"},
        steps=len(chosen),
        action_tokens=sum(row.action_tokens for row in rows),
        items_per_step=sum(chosen) / max(1, len(chosen)),
        steps_without_item=sum(n == 0 for n in chosen),
        **selector_statistics(source),
    )


def score(
    experiment: Experiment,
    kept: Sequence[Trajectory],
    model: Any,
    progress: Any,
    recording: Recording | None = None,
) -> tuple[list[DistillationRow], list[DistillationRow]]:
    """Align ``kept`` and score every action token by the teacher (``model`` with experience in context).

    Args:
        recording: made while ``model`` sampled ``kept`` itself: those distributions are its scores.

    Returns:
        The student's clean rows, and the rows of ``distillation.retention``.

    Raises:
        AlignmentError: the two views do not share their action ids, or a student's view holds experience.
    """
    inject = no_injection if experiment.injection == "none" else replay_injection(experiment.injection)
    # A student's own malformed action is what the teacher's distribution corrects; a teacher's is nothing to learn from.
    keep_step = None if experiment.regime.source == "student" else without_problems
    aligned = align_all(kept, model.chat, inject, keep_step)
    if experiment.regime.divergence == "cross_entropy" and experiment.injection == "none":
        return make_rows(aligned, None), []
    scorer = TeacherScorer(model.model, top_k=experiment.distillation.top_k)
    progress.start("teacher scoring", len(aligned))
    try:
        rows = make_rows(aligned, scorer.score([one.views for one in aligned], progress.advance, recording))
    finally:
        progress.finish()
    return rows, retention_rows(rows, aligned, experiment.distillation.retention, experiment.seed)


async def with_teacher_views(trajectories: Sequence[Trajectory], source: ExperienceSource | None) -> list[Trajectory]:
    """Student trajectories with what the teacher would have had in its context recorded in every step."""
    if source is None:
        return list(trajectories)
    out = []
    for trajectory in trajectories:
        steps = []
        for step in trajectory.steps:
            view = await source.prepare(replace(trajectory, steps=trajectory.steps[: step.index]))
            steps.append(replace(step, selected=view.selected, injected=view.text, rationale=view.rationale))
        out.append(replace(trajectory, steps=tuple(steps)))
    return out
