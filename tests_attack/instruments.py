"""What an attack puts into a command before it begins: a fuse, a fault in a step, a count of the draws."""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

_CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "shutil.rmtree"})
_OPENS_TO_WRITE = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def install(
    fuse: int | None = None,
    below: str = "",
    fault: tuple[str, str, str] | None = None,
    draws: str | None = None,
    largest: int | None = None,
) -> None:
    """Arm this process.

    Args:
        fuse: kill it when it is about to make the so-manieth change in a folder (from 1); None: never.
        below: that folder.
        fault: step, ``before`` or ``after`` its work, name of what is raised there (see :data:`FAULTS`).
        largest: bytes; no file may become larger, as on a disk that is full.
        draws: file that gets a line a rollout that is drawn: ``drawn``, or ``again`` when the journal holds it already.
    """
    if fuse is not None:
        light_fuse(fuse, below)
    if fault is not None:
        put_fault(*fault)
    if draws is not None:
        count_draws(Path(draws))
    if largest is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))


def light_fuse(length: int, below: str) -> None:
    """Kill this process before its change number ``length`` below a folder: a rename, a removal, a file opened to write."""
    left = length

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        changes = event in _CHANGES or (event == "open" and isinstance(arguments[2], int) and arguments[2] & _OPENS_TO_WRITE)
        if changes and str(arguments[0]).startswith(below):
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)


def _disk_full() -> BaseException:
    import errno

    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _circle() -> BaseException:
    """Two exceptions that lead to each other."""
    first, second = RuntimeError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    return first


class ShyError(Exception):
    """Its text cannot be made."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


FAULTS: dict[str, Callable[[], BaseException]] = {
    "RuntimeError": lambda: RuntimeError("boom"),
    "MemoryError": MemoryError,
    "disk full": _disk_full,
    "circle": _circle,
    "no text": ShyError,
    "not text": lambda: ValueError("\ud800 lone surrogate"),
    "SystemExit": lambda: SystemExit(3),
    "Ctrl-C": KeyboardInterrupt,
}


def put_fault(step: str, where: str, name: str) -> None:
    """Raise in a step, before its work or after it and before it is published."""
    from evolve_dag.steps import base

    real = base._body

    def body(wanted: str) -> base.Body:
        def run(context: base.StepContext) -> None:
            if wanted == step and where == "before":
                raise FAULTS[name]()
            real(wanted)(context)
            if wanted == step:
                raise FAULTS[name]()

        return run

    base._body = body


def count_draws(path: Path) -> None:
    """Write down every rollout that is drawn, with its journal, and whether that journal had it."""
    from evolve_dag.agent.rollouts import Condition, episode_seed

    real = Condition.run

    async def run(condition: Condition, task: Any, rollout: int, *earlier: Any) -> Any:
        journal = condition.journal.path
        kind = "again" if _holds(journal, task.id, rollout, episode_seed(condition.seed, task.id, rollout)) else "drawn"
        with path.open("a") as file:
            file.write(f"{kind} {journal.relative_to(journal.parents[3])} {task.id} {rollout}\n")
        return await real(condition, task, rollout, *earlier)

    Condition.run = run


def _holds(journal: Path, task: str, rollout: int, seed: int) -> bool:
    if not journal.exists():
        return False
    records = [json.loads(line) for line in journal.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
    return any((one["task_id"], one["rollout"], one["seed"]) == (task, rollout, seed) for one in records)
