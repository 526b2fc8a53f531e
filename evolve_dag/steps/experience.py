"""Step ``experience``: scored trajectories -> pool E(k) (METHOD step 3)."""

from __future__ import annotations

from dataclasses import asdict, replace

from evolve_dag.benchmarks.suites import load_split
from evolve_dag.experience.locality import locality
from evolve_dag.experience.pool import extract
from evolve_dag.frames import edits_to_frame, items_to_frame
from evolve_dag.steps.base import StepContext
from evolve_dag.steps.policies import load_trajectories, open_pool


def run(context: StepContext) -> None:
    """Extract from the groups of this iteration into the pool that entered it."""
    experiment = context.experiment
    trajectories = load_trajectories(context.inputs["trajectories"])
    entering = context.entering.experience
    pool = open_pool(context.store.open("experience", entering) if entering else None)
    pool = replace(pool, next_number=max(pool.next_number, context.entering.next_item))
    context.progress.start("extraction", 1)
    found = extract(
        trajectories,
        pool,
        granularity=experiment.granularity,
        settings=experiment.extraction,
        iteration=context.iteration,
        seed=experiment.seed,
    )
    context.progress.advance()
    context.progress.finish()
    folder = context.build.path
    (folder / "pool.json").write_text(found.pool.to_json(), encoding="utf-8")
    items_to_frame(found.pool.items).write_parquet(folder / "items.parquet")
    edits_to_frame(found.edits).write_parquet(folder / "edits.parquet")
    operations = [edit.operation for edit in found.edits]
    tasks = load_split(experiment, "train").tasks
    context.build.note(
        items=len(found.pool.items),
        added=operations.count("add"),
        updated=operations.count("update"),
        deleted=operations.count("delete"),
        merged=operations.count("merge"),
        locality=asdict(locality(found.pool.items, tasks)),
        statistics=dict(found.statistics),
    )
