"""A pool from outside stays as it is, night after night."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from experience_builders import answer, search, trajectory

from evolve_dag.config.loading import load_experiment
from evolve_dag.errors import ConfigError
from evolve_dag.experience.extraction.base import Material
from evolve_dag.experience.extraction.given import GIVEN, GivenExtraction
from evolve_dag.experience.pool import Pool
from evolve_dag.inference.roles import Roles
from evolve_dag.records import ExperienceItem


def test_nothing_is_extracted_and_the_pool_stays() -> None:
    pool = Pool(tuple(ExperienceItem(f"mine-{n}", "Look: when lost, look first.", "principle") for n in range(30)))
    played = [trajectory("a", n, [search("x", "no results"), answer("Rato")], float(n)) for n in range(2)]
    material = Material(
        played,
        (),
        pool,
        pool,
        "principle",
        3,
        0,
        before=None,
        roles=Roles.__new__(Roles),
        concurrency=1,
        on_progress=lambda: None,
    )
    found = asyncio.run(GIVEN.make(GivenExtraction(cap=12), material))
    assert (found.pool, found.edits, found.mined, found.evidence) == (pool, (), None, None)


def test_it_needs_a_pool_that_is_given(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("models: {policy: {path: pocket}}\nextraction: {extractor: given}\n")
    with pytest.raises(ConfigError, match="set start_pool"):
        load_experiment(path)
