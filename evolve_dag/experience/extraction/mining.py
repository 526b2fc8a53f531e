"""Scored trajectories -> E(k) without a language model (METHOD step 3)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from evolve_dag.config.schema import ExtractionSettings
from evolve_dag.experience.extraction import contrast, instance
from evolve_dag.experience.graduation import graduations
from evolve_dag.experience.pool import Pool, counted
from evolve_dag.records import Granularity, PoolEdit, Trajectory


@dataclass(frozen=True, slots=True)
class Extraction:
    """What ``steps/experience`` stores."""

    pool: Pool
    edits: tuple[PoolEdit, ...]
    """Of this iteration only, in order."""
    statistics: Mapping[str, float]
    """Counts: trajectories, judged, not_judged, groups, mixed_groups, ..., added, updated, deleted, merged, refused, items."""
    evidence: contrast.Evidence | None = None
    """For ``principle``: what the next extraction adds its own to."""


def extract(
    trajectories: Sequence[Trajectory],
    pool: Pool,
    *,
    granularity: Granularity,
    settings: ExtractionSettings,
    iteration: int,
    seed: int,
    case_path: bool = False,
    before: contrast.Evidence | None = None,
) -> Extraction:
    """Scored trajectories + E(k-1) -> E(k) (METHOD step 3), without an LLM.

    ``principle``: contrast mining over groups with mixed outcomes. ``instance``: one successful case per task.
    The result does not depend on the order of ``trajectories``.

    Args:
        seed: decides ties between equally good cases and which trajectories stand for a pattern.
        case_path: for ``instance``: keep the path of calls as well.
        before: for ``principle``: evidence of the iterations before, as they left it.
    """
    key = seed * 1000 + iteration
    if granularity == "principle":
        mined = contrast.mine(
            trajectories,
            min_support=settings.min_support,
            min_lift=settings.min_lift,
            confidence=settings.confidence,
            seed=key,
            before=before.faded(settings.memory) if before is not None else None,
        )
        evidence = mined.evidence
        statistics = dict(mined.statistics)
        first = pool.apply(contrast.reconcile(mined, pool), iteration=iteration)
        tidied = first.pool.apply(contrast.subsumed(first.pool), iteration=iteration)
        leaving = graduations(tidied.pool, trajectories, settings.graduation)
        second = tidied.pool.apply(leaving, iteration=iteration, cap=settings.cap)
        edits = (*first.edits, *tidied.edits, *second.edits)
    else:
        evidence = None
        cases = instance.cases(trajectories, seed=key, path=case_path)
        statistics = dict(cases.statistics)
        first = pool.apply(instance.reconcile(cases, pool, cap=settings.cap), iteration=iteration)
        second = first.pool.apply((), iteration=iteration, cap=settings.cap)
        edits = (*first.edits, *second.edits)
    after = Pool(second.pool.items, pool.version + bool(edits), second.pool.next_number)  # one extraction, one version
    statistics |= {name: float(count) for name, count in counted(edits).items()}
    statistics["refused"] = float(len(first.refused) + len(second.refused))
    statistics["items"] = float(len(after))
    return Extraction(after, edits, statistics, evidence)
