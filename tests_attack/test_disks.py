"""A disk that is full or cannot be written: told with the remedy that fits, and when it is mended the run ends the same."""

from __future__ import annotations

import random
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commands import COMMANDS
from conftest import Calm
from forks import Forks
from world import NAME, store_differences

READERS = ("status", "plan", "trace", "sql", "gc")
"""Commands that write nothing."""


def mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A small disk of its own."""
    place = tmp_path / "disk"
    place.mkdir()
    try:
        mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(place))
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a disk needs the rights of root")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_disk_that_fills_up_again_and_again(forks: Forks, calm: Calm, disk: Path, rng: random.Random) -> None:
    store = disk / "store"
    room = 64
    while True:
        said = forks.run("run", f"{NAME}.yaml", "--store", str(store), folder=calm.folder)
        assert said.complaints == [], (room, said.err)
        if said.code == 0:
            break
        assert "free room" in said.err, (room, said.err)
        room = round(room * rng.uniform(1.05, 1.5))
        mount("-o", f"remount,size={room}k", str(disk))
    assert room > 1000, "it never was full"
    assert store_differences(calm.store, store) == []


def test_files_that_cannot_grow(forks: Forks, calm: Calm, tmp_path: Path, rng: random.Random) -> None:
    """As a disk quota says it; needs no rights."""
    store, largest = tmp_path / "store", 1000
    command = ("run", f"{NAME}.yaml", "--store", str(store))
    while (said := forks.run(*command, folder=calm.folder, instruments={"largest": largest})).code != 0:
        assert said.complaints == [], (largest, said.err)
        largest = round(largest * rng.uniform(1.1, 2.0))
    assert store_differences(calm.store, store) == []


def test_a_disk_that_is_read_only_under_every_command(forks: Forks, calm: Calm, disk: Path) -> None:
    mount("-o", "remount,size=200m", str(disk))
    store = Path(shutil.copytree(calm.store, disk / "store"))
    synced = forks.run("sync-mlflow", "--store", str(store), folder=calm.folder)
    assert synced.code == 0, synced.err
    mount("-o", "remount,ro", str(disk))
    found = []
    for name, arguments in COMMANDS.items():
        said = forks.run(*arguments, "--store", str(store), folder=calm.folder)
        told = list(said.complaints)
        if name in READERS and said.code:
            told.append("reads, and needs to write")
        if said.code and re.search(r"free room", said.err):
            told.append("room is not what is missing")
        found += [f"{name}: {one}\n{said.err[-600:]}" for one in told]
    assert not found, "\n".join(found)


def test_a_new_run_on_a_read_only_disk(forks: Forks, calm: Calm, disk: Path) -> None:
    mount("-o", "remount,ro", str(disk))
    said = forks.run("run", f"{NAME}.yaml", "--store", str(disk / "store"), folder=calm.folder)
    assert (said.code, said.complaints) == (1, [])
    assert "writ" in said.err
    assert "free room" not in said.err
