"""The examples are installable packages of few lines, and their experiments run: their own tests are in examples/."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import pytest
from outside_parts import install
from small_lineage import SMALL, iterate

from evolve_dag.config.loading import load_experiment
from evolve_dag.config.outside import group
from evolve_dag.config.parts import CHOICES, outside, part_of
from evolve_dag.config.schema import Experiment
from evolve_dag.environments.web.sandbox import sandbox_report
from evolve_dag.steps import base
from evolve_dag.store.artifacts import Store

EXAMPLES = Path(__file__).parent.parent / "examples"
PROJECTS = sorted(path.parent for path in EXAMPLES.glob("*/pyproject.toml"))
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


@pytest.mark.skipif("holds" not in sandbox_report(), reason="no sandbox on this machine")
def test_an_iteration_runs_on_parts_of_others_and_the_store_says_what_they_were(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All three at once, on very few tasks."""
    for example in PROJECTS:
        laid(tmp_path / example.name, example, monkeypatch)
    tests = str(EXAMPLES / "unit_test_verifier/names.py")
    few = {name: {**split, "count": 4} for name, split in SMALL["tasks"].items()}
    experiment = Experiment.model_validate(
        SMALL
        | {
            "experiment": "examples",
            "tasks": few,
            "rollout": {"group_size": 3},
            "extraction": {"min_support": 2, "confidence": 0.5},
            "regime": {"preset": "off_policy", "divergence": "renyi_half", "rejection": False},
            "selection": {"selector": "hybrid"},
            "verification": {"kind": "unit_tests", "tests": tests},
            "evaluation": {"bootstrap": 200, "greedy": False},
        }
    )
    store = iterate(Store(tmp_path / "store"), experiment)
    made = base.resolve_iteration(experiment, 1, store)
    config = {name: dict(one.config) for name, one in made.items()}
    assert config["adapter"]["regime.divergence"].startswith("renyi_half (evolve-renyi 0.1.0, sha256:")
    assert config["contexts"]["selection"]["selector"].startswith("hybrid (evolve-hybrid 0.1.0, sha256:")
    assert config["scores"]["verification"]["kind"].startswith("unit_tests (evolve-unit-tests 0.1.0, sha256:")
    assert config["scores"]["verification"]["tests"].startswith("sha256:")
    assert str(EXAMPLES) not in str(config)
    rewards = store.open("trajectories", made["trajectories"].digest).frame("trajectories.parquet")["reward"]
    assert set(rewards.to_list()) <= {0.0, 1.0}
    assert 0 < rewards.mean() < 1
    assert part_of("selector", experiment.selection).settings.__name__ == "HybridSelection"
