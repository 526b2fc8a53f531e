"""The campaign's dials, and the world that it attacks (`make test-attack`; not a part of `make test`).

Every draw follows from ``--attack-seed``, which the head of the run prints.
"""

from __future__ import annotations

import random
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # forks, instruments, world

from forks import Forks
from world import NAME, environment, write_world


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("attack")
    group.addoption("--attack-seed", type=int, default=1, help="what every random choice follows from")
    group.addoption("--kills", type=int, default=60, help="how often `evolve run` is killed")
    group.addoption("--sync-kills", type=int, default=15, help="how often `evolve sync-mlflow` is killed")
    group.addoption("--damages", type=int, default=40, help="how many damaged files every command is tried on; 0: all")


def pytest_report_header(config: pytest.Config) -> str:
    names = ("--attack-seed", "--kills", "--sync-kills", "--damages")
    return "attack: " + " ".join(f"{name} {config.getoption(name)}" for name in names)


@dataclass(frozen=True, slots=True)
class Calm:
    """A lineage that nobody disturbed."""

    folder: Path
    """Working folder, with the experiment's file."""
    store: Path
    seconds: float
    """What it took."""
    draws: list[str]
    """What it drew, see :func:`instruments.count_draws`."""


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """The server that runs commands."""
    with Forks(tmp_path_factory.mktemp("said"), environment()) as server:
        yield server


@pytest.fixture(scope="session")
def calm(forks: Forks, tmp_path_factory: pytest.TempPathFactory) -> Calm:
    """The undisturbed run, made once."""
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    draws, store = folder / "draws", folder / "calm"
    started = time.monotonic()
    said = forks.run(
        "run", f"{NAME}.yaml", "--store", str(store), folder=folder, instruments={"draws": str(draws)}, patience=3600
    )
    assert said.code == 0, said.err
    return Calm(folder, store, time.monotonic() - started, draws.read_text().splitlines())


@pytest.fixture
def copied(calm: Calm, tmp_path: Path) -> Path:
    """A copy of the undisturbed store."""
    return Path(shutil.copytree(calm.store, tmp_path / "store"))


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> random.Random:
    """A test's own stream of choices."""
    return random.Random(f"{request.config.getoption('--attack-seed')} {request.node.name}")
