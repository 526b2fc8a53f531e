"""Step ``experience``: scored trajectories -> pool E(k) (METHOD step 3)."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

from evolve_dag.experience.extraction.contrast import Evidence
from evolve_dag.experience.extraction.mining import Extraction, extract
from evolve_dag.experience.locality import locality
from evolve_dag.experience.pool import Pool
from evolve_dag.records import Task, Trajectory
from evolve_dag.steps.body import StepContext
from evolve_dag.steps.policies import open_policy, open_pool
from evolve_dag.store.frames import edits_to_frame, items_to_frame, load_trajectories
from evolve_dag.tasks.suites import load_tasks_of

EVIDENCE = "evidence.json"
"""Beside the pool: the sums that extraction rests on, see :class:`~evolve_dag.experience.extraction.contrast.Evidence`."""


def run(context: StepContext) -> None:
    """Extract from the groups of this iteration into the pool that entered it."""
    experiment = context.experiment
    trajectories = load_trajectories(context.inputs["trajectories"])
    entering = context.entering.experience
    pool = open_pool(context.store.open("experience", entering) if entering else None)
    pool = replace(pool, next_number=max(pool.next_number, context.entering.next_item))
    tasks = load_tasks_of(experiment, "train")
    found = _extract(context, trajectories, tasks, pool)
    folder = context.build.path
    if found.evidence is not None:
        (folder / EVIDENCE).write_text(found.evidence.to_json(), encoding="utf-8")
    (folder / "pool.json").write_text(found.pool.to_json(), encoding="utf-8")
    items_to_frame(found.pool.items).write_parquet(folder / "items.parquet")
    edits_to_frame(found.edits).write_parquet(folder / "edits.parquet")
    operations = [edit.operation for edit in found.edits]
    context.build.note(
        items=len(found.pool.items),
        added=operations.count("add"),
        updated=operations.count("update"),
        deleted=operations.count("delete"),
        merged=operations.count("merge"),
        locality=asdict(locality(found.pool.items, tasks)),
        statistics=dict(found.statistics),
    )


def _evidence(context: StepContext) -> Evidence | None:
    """What the pool that entered rests on; None for the first, for one from a file, and for one of another extractor."""
    entering = context.entering.experience
    if not entering or not context.store.exists("experience", entering):
        return None
    artifact = context.store.open("experience", entering)
    if EVIDENCE not in artifact.manifest.files:
        return None
    return Evidence.from_json(artifact.file(EVIDENCE).read_text(encoding="utf-8"))


def _extract(context: StepContext, trajectories: Sequence[Trajectory], tasks: Sequence[Task], pool: Pool) -> Extraction:
    experiment, settings = context.experiment, context.experiment.extraction
    if settings.extractor == "contrast":
        context.progress.start("extraction", 1)
        found = extract(
            trajectories,
            pool,
            granularity=experiment.granularity,
            settings=settings,
            iteration=context.iteration,
            seed=experiment.seed,
            before=_evidence(context),
        )
        context.progress.advance()
        context.progress.finish()
        return found
    from evolve_dag.experience.extraction.llm import extract_with_llm

    roles = context.roles
    with ExitStack() as opened:
        if experiment.models.extractor == "policy":
            opened.enter_context(open_policy(context.store, context.entering.adapter, roles))
        context.progress.start("extraction", len({t.task_id for t in trajectories}))
        try:
            return asyncio.run(
                extract_with_llm(
                    trajectories,
                    tasks,
                    pool,
                    model=roles.model("extractor"),
                    identity=roles.identity("extractor"),
                    granularity=experiment.granularity,
                    settings=settings,
                    iteration=context.iteration,
                    seed=experiment.seed,
                    memory=roles.memory,
                    concurrency=experiment.runtime.concurrency,
                    characters=settings.max_characters,
                    on_progress=lambda: context.progress.advance(),
                )
            )
        finally:
            context.progress.finish()
