"""Experience from outside alone: the pool of ``start_pool`` (or of ``evolve import``) as it is, night after night.

The paper's external source of experience: a stronger author wrote it beforehand. What the loop finds out about it, graduation
and the check of the teacher, still holds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from evolve_dag.config.section import MOST
from evolve_dag.experience.extraction.base import (
    Extraction,
    ExtractorPart,
    Material,
    OtherWordsSettings,
    only_principles_graduate,
)

if TYPE_CHECKING:
    from evolve_dag.config.schema import Experiment


class GivenExtraction(OtherWordsSettings):
    """Extracts nothing: the pool that an experiment starts from stays as it is."""

    extractor: Literal["given"] = "given"
    """Extracts nothing: the pool that an experiment starts from stays as it is."""
    cap: int = Field(1000, ge=1, le=MOST)
    """Most items that the pool may hold; nothing is taken from a larger one, but the step's check fails."""


async def _extract(settings: GivenExtraction, material: Material) -> Extraction:
    count = {"trajectories": float(len(material.trajectories)), "items": float(len(material.pool))}
    return Extraction(material.pool, (), count)


def _mistakes(settings: GivenExtraction, experiment: Experiment) -> Iterator[tuple[str, str]]:
    if not experiment.start_pool:
        yield "extraction.extractor", "`given` needs a pool that is given: set start_pool"


GIVEN = ExtractorPart(settings=GivenExtraction, make=_extract, unread=only_principles_graduate, mistakes=_mistakes)
