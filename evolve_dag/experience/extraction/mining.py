"""Scored trajectories -> E(k) without a language model (METHOD step 3)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

from pydantic import Field

from evolve_dag.config.parts import ExtractionSettings
from evolve_dag.config.schema import Experiment
from evolve_dag.config.section import MOST
from evolve_dag.experience.extraction import contrast, instance, reconcile
from evolve_dag.experience.extraction.base import ONE_OF_A_KIND, Extraction, ExtractorPart, Material, groups_of_one
from evolve_dag.experience.extraction.evidence import Evidence
from evolve_dag.experience.extraction.placebo import placebo
from evolve_dag.experience.graduation import graduations
from evolve_dag.experience.pool import Pool, counted
from evolve_dag.records import Granularity, Trajectory


class ContrastExtraction(ExtractionSettings):
    """Mines state -> action patterns that separate success from failure; needs no LLM."""

    extractor: Literal["contrast"] = "contrast"
    """Contrast mining (``granularity: principle``), or one successful case per task (``instance``)."""
    min_support: int = Field(10, ge=1, le=MOST)
    """Trajectories that must show a pattern."""
    min_lift: float = Field(0.05, ge=0.0)
    """Least gain in group-centred success of the action over the others in the same state."""
    confidence: float = Field(0.95, gt=0.5, lt=1.0)
    """1 less the share of false ones that is expected at most among what is found (Benjamini-Hochberg on one-sided tests that
    the lift is above zero). Also the level of the lift's two-sided interval, which may just include zero where more than half
    of what is tested is found."""
    memory: float = Field(0.8, ge=0, le=1)
    """What evidence of the iteration before still counts, of two before its square, and so on; 0: none."""
    history: bool = False
    """Situations may also tell of what is longer ago than the last call: what the last step did, how often in a row the same
    came back, whether the asked value was shown before. More is told apart, and more is asked of the same evidence. For
    policies that read free text: the packaged pocket policy does not know the words."""
    placebo: bool = False
    """A control: every mined principle stands in the pool with another action than the one that was mined."""
    graduation: float = Field(0.0, ge=0, lt=1)
    """An item leaves the context once the policy, without experience, clearly does what it says in this share of the steps in
    its situation, and comes back when it clearly does so less often. 0: items stay."""


def extract(
    trajectories: Sequence[Trajectory],
    pool: Pool,
    *,
    granularity: Granularity,
    settings: ContrastExtraction,
    iteration: int,
    seed: int,
    case_path: bool = False,
    before: Evidence | None = None,
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
            history=settings.history,
        )
        evidence = mined.evidence
        statistics = dict(mined.statistics)
        first = pool.apply(reconcile.reconcile(mined, pool), iteration=iteration)
        tidied = first.pool.apply(reconcile.subsumed(first.pool, mined.seen), iteration=iteration)
        leaving = graduations(tidied.pool, trajectories, settings.graduation)
        second = tidied.pool.apply(leaving, iteration=iteration, cap=settings.cap)
        edits, refused = (*first.edits, *tidied.edits, *second.edits), (*first.refused, *tidied.refused, *second.refused)
    else:
        evidence = None
        cases = instance.cases(trajectories, seed=key, path=case_path)
        statistics = dict(cases.statistics)
        first = pool.apply(instance.reconcile(cases, pool, cap=settings.cap), iteration=iteration)
        second = first.pool.apply((), iteration=iteration, cap=settings.cap)
        edits, refused = (*first.edits, *second.edits), (*first.refused, *second.refused)
    after = Pool(second.pool.items, pool.version + bool(edits), second.pool.next_number)  # one extraction, one version
    statistics |= {name: float(count) for name, count in counted(edits).items()}
    statistics["refused"] = float(len(refused))
    statistics["items"] = float(len(after))
    return Extraction(after, edits, statistics, evidence)


async def _extract(settings: ContrastExtraction, material: Material) -> Extraction:
    found = extract(
        material.trajectories,
        material.pool,
        granularity=material.granularity,
        settings=settings,
        iteration=material.iteration,
        seed=material.seed,
        before=material.before,
    )
    if not settings.placebo:
        return found
    disguised = placebo(found.pool, found.edits, material.trajectories, before=material.shown, seed=material.seed)
    return replace(found, pool=disguised.pool, edits=disguised.edits, mined=found.pool)


def _unread(settings: ContrastExtraction, experiment: Experiment) -> tuple[str, ...]:
    """One successful case a task (``granularity: instance``) is no pattern that must show often enough, nor a habit."""
    mined = experiment.granularity == "principle"
    return () if mined else ("min_support", "min_lift", "confidence", "memory", "graduation", "history")


def _mistakes(settings: ContrastExtraction, experiment: Experiment) -> Iterator[tuple[str, str]]:
    if settings.placebo and (experiment.granularity != "principle" or experiment.start_pool):
        yield "extraction.placebo", "only mined principles have one: no instances, no start_pool"
    if experiment.granularity == "principle" and groups_of_one(experiment):
        yield "rollout.group_size", f"{ONE_OF_A_KIND}, and no principle is ever found: set it to 2 or more"


CONTRAST = ExtractorPart(settings=ContrastExtraction, make=_extract, unread=_unread, mistakes=_mistakes)
