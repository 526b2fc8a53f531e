"""Every file of a store, damaged in six ways, under every command: a message or the same answer, never a traceback or a lie."""

from __future__ import annotations

import os
import random
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from commands import COMMANDS
from conftest import Calm
from forks import Forks, Said
from world import store_differences


def flip(path: Path, rng: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(bytes(content))


def folder(path: Path, rng: random.Random) -> None:
    path.unlink()
    path.mkdir()


DAMAGES: dict[str, Callable[[Path, random.Random], object]] = {
    "missing": lambda path, rng: path.unlink(),
    "empty": lambda path, rng: path.write_bytes(b""),
    "cut": lambda path, rng: os.truncate(path, path.stat().st_size // 2),
    "a bit flipped": flip,
    "noise": lambda path, rng: path.write_bytes(rng.randbytes(path.stat().st_size)),
    "a folder": folder,
}


@pytest.fixture(scope="module")
def whole(forks: Forks, calm: Calm, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with all that commands leave in it: MLflow's database, an audit, a report."""
    store = Path(shutil.copytree(calm.store, tmp_path_factory.mktemp("whole") / "store"))
    for name in ("sync-mlflow", "audit", "report", "schedule on"):
        said = forks.run(*COMMANDS[name], "--store", str(store), folder=calm.folder)
        assert said.code == 0, said.err
    return store


def victims(store: Path) -> list[str]:
    """Files that something could damage; of a kind's artifacts those of one, of runs' databases one."""
    kinds: dict[str, str] = {}
    for path in sorted(store.rglob("*")):
        name = path.relative_to(store).as_posix()
        if path.is_file() and not name.startswith(("locks/", "reports/")):
            alike = re.sub(r"[0-9a-f]{16,}|[0-9a-f]{8}-[-0-9a-f]{27}", "*", name)
            kinds.setdefault(alike, name)
    return sorted(kinds.values())


def cases(store: Path, rng: random.Random, count: int) -> list[tuple[str, str]]:
    """(file, damage); all of them, or ``count`` by chance."""
    every = [(name, damage) for name in victims(store) for damage in DAMAGES]
    return every if count == 0 else sorted(rng.sample(every, min(count, len(every))))


def test_every_damage_under_every_command(
    forks: Forks, calm: Calm, whole: Path, tmp_path: Path, rng: random.Random, request: pytest.FixtureRequest
) -> None:
    store = tmp_path / "store"
    shutil.copytree(whole, store)
    answers = {name: {ask(forks, calm, store, name).out} for name in ("status", "sql")}
    shutil.rmtree(store / "cache")  # what is remembered may be forgotten
    for name, right in answers.items():
        right.add(ask(forks, calm, store, name).out)
    shutil.rmtree(store)
    found: list[str] = []
    tried = cases(whole, rng, request.config.getoption("--damages"))
    for number, (name, damage) in enumerate(tried, 1):
        shutil.copytree(whole, store)
        DAMAGES[damage](store / name, random.Random(f"{name} {damage}"))
        lines = [f"{name}, {damage}: {line}" for line in under_every_command(forks, calm, store, answers)]
        lines += [f"{name}, {damage}: {line}" for line in after_the_remedies(forks, calm, store)]
        for line in lines:
            print(line, flush=True)
        found += lines
        print(f"{number} of {len(tried)}: {name}, {damage}: {'no complaint' if not lines else len(lines)}", flush=True)
        shutil.rmtree(store)
    assert not found, "\n".join(found)


def ask(forks: Forks, calm: Calm, store: Path, name: str) -> Said:
    return forks.run(*COMMANDS[name], "--store", str(store), folder=calm.folder)


def under_every_command(forks: Forks, calm: Calm, store: Path, answers: dict[str, set[str]]) -> Iterator[str]:
    for name in COMMANDS:
        if name == "run":
            continue
        said = ask(forks, calm, store, name)
        for complaint in said.complaints:
            yield f"{name}: {complaint}\n{said.err[-800:]}"
        if said.code == 0 and name in answers and said.out not in answers[name]:
            yield f"{name}: answers otherwise than before the damage, without a word"


def after_the_remedies(forks: Forks, calm: Calm, store: Path, most: int = 4) -> Iterator[str]:
    """Run, do what the message says, run again: it must come to the same end."""
    for _ in range(most):
        said = ask(forks, calm, store, "run")
        yield from (f"run: {one}\n{said.err[-800:]}" for one in said.complaints)
        if said.code == 0:
            yield from store_differences(calm.store, store)
            return
        named = re.search(r"remedy: (?:delete|move) (?:folder |file )?(.+?)(?: away| and run|,|:|$)", said.err)
        if named is None:
            yield f"run: its remedy cannot be followed\n{said.err[-800:]}"
            return
        for path in map(Path, named[1].split(" and ")):
            if not path.is_relative_to(store):
                yield f"run: its remedy leaves the store: {path}"
                return
            if path.exists():
                path.rename(store.parent / f"away-{time.time_ns()}")
    yield "run: its remedies do not come to an end"
