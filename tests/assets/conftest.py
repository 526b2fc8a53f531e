"""A working folder, a store and a Dagster instance of its own for every test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest

sys.path.insert(0, str(Path(__file__).parent))  # assets_helpers

from assets_helpers import FakeSteps, write_config

from evolve_dag.config import registry
from evolve_dag.config.schema import Experiment
from evolve_dag.steps import base
from evolve_dag.store.artifacts import Store


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeSteps:
    """The steps without a model."""
    steps = FakeSteps()
    monkeypatch.setattr(base, "_body", steps.body)
    return steps


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder of its own, with nothing set in the environment."""
    for variable in ("DAGSTER_HOME", registry.STORE_VARIABLE, registry.CONFIGS_VARIABLE, "EVOLVE_DEBUG"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def config(place: Path) -> Path:
    """``configs/tiny.yaml``."""
    return write_config(place / "configs" / "tiny.yaml")


@pytest.fixture
def experiment(config: Path) -> Experiment:
    """The experiment, registered in the store."""
    return registry.register(registry.default_store(), config)


@pytest.fixture
def store(place: Path) -> Store:
    """The store that everything uses by default."""
    return Store(registry.default_store())


@pytest.fixture
def instance(place: Path) -> Iterator[dg.DagsterInstance]:
    """A Dagster instance on disk: the ephemeral one has no schedule storage."""
    (place / "home").mkdir()
    with dg.DagsterInstance.local_temp(str(place / "home")) as made:
        yield made


@pytest.fixture
def memory() -> Iterator[dg.DagsterInstance]:
    """A Dagster instance in memory."""
    with dg.DagsterInstance.ephemeral() as made:
        yield made
