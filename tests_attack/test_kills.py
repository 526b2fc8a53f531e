"""Killed at any moment, a command given again ends where an undisturbed one ends, and does nothing twice that was kept."""

from __future__ import annotations

import math
import random
import shutil
import time
from collections import Counter
from pathlib import Path

import pytest
from conftest import Calm
from forks import Forks, Said
from world import NAME, mlflow_content, store_differences

from evolve_dag.store.artifacts import Store

CHANGES = 600
"""About so many changes of files (renames, removals, files opened to write) are in one undisturbed run."""


def kill_moment(rng: random.Random, seconds: float, below: Path) -> dict[str, object]:
    """Half of the kills by the clock, half before a change of a file; short and long spans alike."""
    if rng.random() < 0.5:
        return {"kill_after": seconds * math.exp(rng.uniform(math.log(0.002), 0.0))}
    return {"instruments": {"fuse": round(math.exp(rng.uniform(0.0, math.log(CHANGES)))), "below": str(below)}}


def test_a_run_that_is_killed_goes_on_and_ends_the_same(
    forks: Forks, calm: Calm, tmp_path: Path, rng: random.Random, request: pytest.FixtureRequest
) -> None:
    wanted, killed, lineages = request.config.getoption("--kills"), 0, 0
    while killed < wanted:
        lineages += 1
        store = tmp_path / "store"
        draws = tmp_path / "draws"
        kills = lineage_under_kills(forks, calm, store, draws, rng)
        killed += kills
        where = f"lineage {lineages}, {killed} kills so far"
        assert store_differences(calm.store, store) == [], where
        assert wrong_draws(calm.draws, draws.read_text().splitlines(), kills) == [], where
        assert not list((store / "locks").glob("*.holder")), where
        print(f"{where}: no difference", flush=True)
        shutil.rmtree(store)
        draws.unlink()


def lineage_under_kills(forks: Forks, calm: Calm, store: Path, draws: Path, rng: random.Random) -> int:
    """A whole lineage, its command killed and given again until it comes to its end; returns the number of kills."""
    kills = 0
    while True:
        how = kill_moment(rng, calm.seconds, store)
        instruments = {"draws": str(draws), **how.pop("instruments", {})}  # type: ignore[dict-item]
        command = ("run", f"{NAME}.yaml", "--store", str(store))
        said = forks.run(*command, folder=calm.folder, instruments=instruments, patience=3600, **how)  # type: ignore[arg-type]
        if said.code != -9:
            assert (said.code, said.complaints) == (0, []), said.err
            return kills
        assert not said.hung
        kills += 1
        for artifact in Store(store).artifacts():
            artifact.verify()
        Store(store).refs()


def wrong_draws(calm: list[str], drawn: list[str], kills: int) -> list[str]:
    """Rollouts that were drawn although they were journalled, left out, or drawn more often than the kills explain."""
    found = [line for line in drawn if not line.startswith("drawn")]
    expected, counted = Counter(calm), Counter(drawn)
    found += [f"never: {line}" for line in expected if line not in counted]
    found += [f"{counted[line]} times: {line}" for line in counted if counted[line] > expected[line] + kills]
    return found


def test_a_sync_that_is_killed_goes_on_and_mlflow_holds_the_same(
    forks: Forks, calm: Calm, tmp_path: Path, rng: random.Random, request: pytest.FixtureRequest
) -> None:
    def sync(store: Path, **how: object) -> Said:
        return forks.run("sync-mlflow", "--store", str(store), folder=calm.folder, patience=1800, **how)  # type: ignore[arg-type]

    store = tmp_path / "store"
    shutil.copytree(calm.store, store)
    started = time.monotonic()
    assert sync(store).code == 0
    seconds = time.monotonic() - started
    expected = mlflow_content(store)
    shutil.rmtree(store)
    killed = 0
    while killed < request.config.getoption("--sync-kills"):
        shutil.copytree(calm.store, store)
        while (said := sync(store, **kill_moment(rng, seconds, store))).code == -9:
            killed += 1
        assert (said.code, said.complaints) == (0, []), said.err
        assert mlflow_content(store) == expected, f"{killed} kills so far"
        assert sync(store).out == "sent: nothing to send\n"
        print(f"{killed} kills of the sync: no difference", flush=True)
        shutil.rmtree(store)
