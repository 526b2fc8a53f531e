"""The examples are installable packages of few lines, and their experiments run: their own tests are in examples/."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from outside_parts import install
from small_lineage import copy_of, small

from evolve_dag.config.loading import load_experiment
from evolve_dag.config.outside import group
from evolve_dag.config.parts import CHOICES, outside
from evolve_dag.steps import base
from evolve_dag.store.artifacts import Store

EXAMPLES = Path(__file__).parent.parent / "examples"
PROJECTS = sorted(path.parent for path in EXAMPLES.glob("*/pyproject.toml") if "entry-points" in path.read_text())
"""Those that bring parts; a taskset of the library verifiers is none."""
MOST_LINES = 80


def laid(folder: Path, example: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, str]]:
    """The example as pip lays it; gives its entry points."""
    project = tomllib.loads((example / "pyproject.toml").read_text())
    [module] = project["tool"]["setuptools"]["py-modules"]
    meta: dict[str, Any] = project["project"]
    laid_at = install(folder, monkeypatch, meta["name"], meta["entry-points"], version=meta["version"])
    laid_at.with_name(f"{module}.py").write_text((example / f"{module}.py").read_text())
    return meta["entry-points"]


@pytest.mark.parametrize("example", PROJECTS, ids=lambda path: path.name)
def test_an_example_is_small_and_its_experiment_names_its_part(
    example: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    [(where, names)] = laid(tmp_path, example, monkeypatch).items()
    [choice] = [choice for choice in CHOICES if group(choice) == where]
    [module] = list(example.glob("evolve_*.py"))
    assert len(module.read_text().splitlines()) <= MOST_LINES
    assert list(example.glob("test_*.py"))
    assert load_experiment(example / "experiment.yaml").experiment
    for name in names:
        found = outside(choice, name)
        assert found is not None
        assert name in (example / "experiment.yaml").read_text()


def test_an_iteration_runs_on_parts_of_others_and_the_store_says_what_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_lineage: Store
) -> None:
    """Over the shared iteration: what they do not decide is not made again."""
    for example in PROJECTS:
        laid(tmp_path / example.name, example, monkeypatch)
    regime = {"preset": "off_policy", "divergence": "renyi_half"}
    experiment = small(regime=regime, selection={"selector": "hybrid"})
    store = copy_of(small_lineage, tmp_path / "store")
    made = {step: base.run_step(step, experiment, 1, store) for step in base.STEP_ORDER}
    assert {step for step, one in made.items() if one.recomputed} == {"contexts", "adapter", "scores", "promotion"}
    config = {step: one.artifact.manifest.config for step, one in made.items()}
    assert config["adapter"]["regime.divergence"].startswith("renyi_half (evolve-renyi 0.1.0, sha256:")
    assert config["contexts"]["selection"]["selector"].startswith("hybrid (evolve-hybrid 0.1.0, sha256:")
    chosen = made["contexts"].artifact.frame("steps.parquet")
    assert chosen["rationale"].str.starts_with("reciprocal ranks: p").any()
    assert not made["contexts"].artifact.summary["failed"]
    losses = made["adapter"].artifact.frame("curve.parquet")["loss"]
    assert losses.is_finite().all()
    assert losses.min() >= -1e-5
