"""Step ``experience``: scored trajectories -> pool E(k) (METHOD step 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from typing import Any

from evolve_dag.config.parts import part_of
from evolve_dag.config.schema import Experiment
from evolve_dag.experience.extraction.base import Extraction, ExtractorPart, Material
from evolve_dag.experience.extraction.evidence import Evidence
from evolve_dag.experience.locality import locality, trajectory_detail
from evolve_dag.experience.pool import Pool, Proposal, counted
from evolve_dag.records import PoolEdit, Task, Trajectory
from evolve_dag.steps.body import StepContext
from evolve_dag.steps.policies import ANSWERED, answered, open_policy, open_pool
from evolve_dag.steps.spec import Check, StepSpec, Table, Verdict
from evolve_dag.store.artifacts import Artifact
from evolve_dag.store.frames import edits_to_frame, items_from_frame, items_to_frame, load_trajectories
from evolve_dag.store.layout import EDITS, ITEMS, POOL
from evolve_dag.tasks.suites import load_tasks_of

EVIDENCE = "evidence.json"
"""Beside the pool: the sums that extraction rests on, see :class:`~evolve_dag.experience.extraction.evidence.Evidence`."""
MINED = "mined.json"
"""Beside the pool of a placebo: the one that was mined, from which the next iteration goes on mining."""


def run(context: StepContext) -> None:
    """Extract from the groups of this iteration into the pool that entered it."""
    experiment = context.experiment
    trajectories = load_trajectories(context.inputs["trajectories"])
    entering = context.store.open("experience", context.entering.experience) if context.entering.experience else None
    shown = open_pool(entering)
    pool = open_pool(entering, MINED) if entering and MINED in entering.manifest.files else shown
    pool = replace(pool, next_number=max(pool.next_number, context.entering.next_item))
    pool, _ = _entered(context, pool)
    shown, entered = _entered(context, shown)
    tasks = load_tasks_of(experiment, "train")
    found = _extract(context, trajectories, tasks, pool, shown, _evidence(entering))
    folder = context.build.path
    if found.mined is not None:
        (folder / MINED).write_text(found.mined.to_json(), encoding="utf-8")
    if found.evidence is not None:
        (folder / EVIDENCE).write_text(found.evidence.to_json(), encoding="utf-8")
    (folder / POOL).write_text(found.pool.to_json(), encoding="utf-8")
    items_to_frame(found.pool.items).write_parquet(folder / ITEMS)
    edits = (*entered, *found.edits)
    edits_to_frame(edits).write_parquet(folder / EDITS)
    context.build.note(
        items=len(found.pool.items),
        active=len(found.pool.active),
        **counted(edits),
        locality=asdict(locality(found.pool.items, tasks)),
        statistics=dict(found.statistics),
    )


def _entered(context: StepContext, pool: Pool) -> tuple[Pool, list[PoolEdit]]:
    """The pool after what the check of the teacher found in the night before, and the edits that it took."""
    proposals = [Proposal(f.operation, item_id=f.item_id, reason=f.reason) for f in context.entering.findings]
    applied = pool.apply(proposals, iteration=context.iteration)
    return applied.pool, applied.edits


def _evidence(entering: Artifact | None) -> Evidence | None:
    """What the pool that entered rests on; None for the first, for one from a file, and for one of another extractor."""
    if entering is None or EVIDENCE not in entering.manifest.files:
        return None
    return Evidence.from_json(entering.file(EVIDENCE).read_text(encoding="utf-8"))


def _extract(
    context: StepContext,
    trajectories: Sequence[Trajectory],
    tasks: Sequence[Task],
    pool: Pool,
    shown: Pool,
    before: Evidence | None,
) -> Extraction:
    experiment, roles = context.experiment, context.roles
    row: ExtractorPart[Any] = part_of("extractor", experiment.extraction)
    with ExitStack() as opened:
        if any(getattr(experiment.models, role) == "policy" for role in row.roles(experiment.extraction)):
            opened.enter_context(open_policy(context.store, context.entering.adapter, roles))
        context.progress.start("extraction", len({t.task_id for t in trajectories}))
        try:
            material = Material(
                trajectories,
                tasks,
                pool,
                shown,
                experiment.granularity,
                context.iteration,
                experiment.seed,
                before=before,
                roles=roles,
                concurrency=experiment.runtime.concurrency,
                on_progress=context.progress.advance,
            )
            return roles.run(row.make(experiment.extraction, material))
        finally:
            context.progress.finish()


def examine(artifact: Artifact, experiment: Experiment) -> Iterator[Verdict]:
    """The cap of the pool, what its principles keep of trajectories, and whether who was asked did answer."""
    items = items_from_frame(artifact.frame(ITEMS))
    cap, distinct = experiment.extraction.cap, len({item.id for item in items})
    active = sum(item.active for item in items)
    evidence = {"items": len(items), "active": active, "distinct_ids": distinct, "cap": cap}
    yield Verdict("within_cap", active <= cap and distinct == len(items), evidence)
    objections = {item.id: trajectory_detail(item.text) for item in items if item.granularity == "principle"}
    wrong = {item_id: mistakes for item_id, mistakes in objections.items() if mistakes}
    yield Verdict("detail", not wrong, {"items": len(items), "wrong": wrong})
    yield answered(artifact)


SPEC = StepSpec(
    "experience",
    "The experience pool E(k), every pool edit, and which trajectories taught what.",
    version="12",
    config=("seed", "granularity", "extraction"),
    inputs=("policy", "trajectories"),
    run=run,
    kinds=frozenset({"parquet", "polars"}),
    iteration=True,
    checks=(
        Check(
            "within_cap",
            "At most `extraction.cap` items may stand in a context; ids are distinct.",
            blocking=True,
        ),
        Check("detail", "No principle holds trajectory detail: no address, no number, no entity."),
        ANSWERED,
    ),
    examine=examine,
    tables=(
        Table(ITEMS, ("id", "text", "created", "updated"), rows=50),
        Table(EDITS, ("operation", "item_id", "before", "after", "reason")),
    ),
)
