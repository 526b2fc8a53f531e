"""What every extractor is given and what it gives."""

from __future__ import annotations

from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self, TypeVar

from pydantic import Field

from evolve_dag.config.fence import Fence
from evolve_dag.config.parts import ExtractionSettings, Part
from evolve_dag.config.schema import Experiment
from evolve_dag.experience.extraction.evidence import Evidence
from evolve_dag.experience.pool import Pool
from evolve_dag.inference.roles import Roles
from evolve_dag.records import Granularity, PoolEdit, Task, Trajectory


@dataclass(frozen=True, slots=True)
class Material:
    """What lessons are found in, and the models that may be asked."""

    trajectories: Sequence[Trajectory]
    """Of this iteration, scored."""
    tasks: Sequence[Task]
    """That they were rolled out on."""
    pool: Pool
    """E(k-1); after a placebo as it was mined."""
    shown: Pool
    """E(k-1) as it stood in contexts; another than ``pool`` only after a placebo."""
    granularity: Granularity
    iteration: int
    seed: int
    before: Evidence | None
    """What the extraction before left, if it left any."""
    roles: Roles
    concurrency: int
    """Most calls in flight."""
    on_progress: Callable[[], None]
    """Called for every group that is done."""


@dataclass(frozen=True, slots=True)
class Extraction:
    """What ``steps/experience`` stores."""

    pool: Pool
    edits: tuple[PoolEdit, ...]
    """Of this iteration only, in order."""
    statistics: Mapping[str, float]
    """Counts: trajectories, judged, not_judged, groups, mixed_groups, ..., added, updated, deleted, merged, refused, items."""
    evidence: Evidence | None = None
    """For ``principle``: what the next extraction adds its own to."""
    mined: Pool | None = None
    """For a placebo: the pool as it was mined, from which the next extraction goes on."""


class OtherWordsSettings(ExtractionSettings):
    """Of extractors whose principles are in other words than the miner's."""

    graduation: float = Field(0.0, ge=0, lt=1)
    """A principle leaves the context once the policy clearly acts the same with and without it in this share of its steps and
    it does not help the teacher any more; it comes back when that is clearly no longer so. 0: principles stay. It is measured
    with the check of the teacher (``teacher_check``), so it takes effect in the iteration after."""


def only_principles_graduate(settings: OtherWordsSettings, experiment: Experiment) -> tuple[str, ...]:
    """What such an extractor does not read."""
    return () if experiment.granularity == "principle" else ("graduation",)


ONE_OF_A_KIND = "a group of one rollout never holds both success and failure"


def taught_by_groups(experiment: Experiment) -> bool:
    """Whether all that is to be taught has to be found in groups of rollouts."""
    return experiment.injection != "none" and not experiment.start_pool


def groups_of_one(experiment: Experiment) -> bool:
    """Whether it has to be found in groups of a single rollout."""
    return experiment.rollout.group_size == 1 and taught_by_groups(experiment)


S = TypeVar("S", bound=ExtractionSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class ExtractorPart(Part[S]):
    """The row of an extractor."""

    make: Callable[[S, Material], Coroutine[Any, Any, Extraction]]
    """(settings, material) -> what is extracted from it."""
    seconds: float = 7200.0

    def fenced(self, fence: Fence) -> Self:
        """Its extraction within limits, too. It is one call a step: where it fails, the step ends, and nothing is stored."""

        async def make(settings: S, material: Material) -> Extraction:
            found = await fence.call(self.make, settings, replace(material, roles=material.roles.elsewhere()))
            if not isinstance(found, Extraction):
                raise fence.nonsense(f"what it extracted is no Extraction, but a {type(found).__name__}")
            return found

        return replace(Part.fenced(self, fence), make=make)
