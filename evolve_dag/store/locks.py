"""Locks that vanish with their process, and who holds them."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from evolve_dag.errors import ConcurrencyError
from evolve_dag.store.disk import write_atomic
from evolve_dag.store.faults import disk_error

if TYPE_CHECKING:
    from filelock import FileLock

log = logging.getLogger(__name__)


def taken(root: Path, name: str, wait_seconds: float = 0.0) -> FileLock:
    """Take a lock of the store under ``root``, to be released by the caller; without a note of its holder.

    Raises:
        Timeout: filelock's own: another process still holds it.
        StoreError: the disk is full or broken.
    """
    from filelock import FileLock, Timeout

    path = root / "locks" / f"{name}.lock"
    lock = FileLock(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=wait_seconds)
    except Timeout:
        raise
    except OSError as error:
        raise disk_error(error, path) from error
    return lock


@contextlib.contextmanager
def locked(root: Path, name: str, what: str, wait_seconds: float) -> Iterator[None]:
    """Hold a lock of the store under ``root``.

    Args:
        what: what the holder is doing, for messages: ``experiment 'pocket' is being run``.
        wait_seconds: 0 does not wait.

    Raises:
        ConcurrencyError: another process still holds it; names that process.
        StoreError: the disk is full or broken.
    """
    from filelock import Timeout

    holder = root / "locks" / f"{name}.holder"
    try:
        try:
            lock = taken(root, name)
        except Timeout:
            if wait_seconds <= 0:
                raise
            log.warning("%s by %s: waiting for it", what, _holder(holder))
            lock = taken(root, name, wait_seconds)
    except Timeout:
        raise ConcurrencyError(
            f"{what} by {_holder(holder)} (store {root})", "wait until it has ended, or end it: its lock goes with it"
        ) from None
    try:
        with contextlib.suppress(OSError):  # the holder's name is a courtesy, the lock itself is held
            since = datetime.now(UTC).isoformat(timespec="seconds")
            write_atomic(holder, json.dumps({"pid": os.getpid(), "since": since}).encode(), durable=False)
        yield
    finally:
        with contextlib.suppress(OSError):
            holder.unlink()
        lock.release()


def held(root: Path) -> Iterator[str]:
    """Names of the locks that a living process holds.

    Only locks with a holder's note are tried: a process that ended leaves its lock file, and trying each would take one of them
    for an instant from whoever wants it.
    """
    from filelock import FileLock, Timeout

    for holder in sorted((root / "locks").glob("*.holder")):
        lock = FileLock(holder.with_suffix(".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            yield holder.stem
        except OSError:
            yield holder.stem  # cannot be told: taken for busy
        else:
            lock.release()


def discard(root: Path, name: str) -> None:
    """Remove what a lock has left, unless a living process holds it: the file and the holder's note of a killed one.

    Only of a lock that nobody needs any more: who is about to take it may come to hold a file that is gone, beside another
    process that holds a new one.
    """
    from filelock import FileLock, Timeout

    path = root / "locks" / f"{name}.lock"
    lock = FileLock(path)
    with contextlib.suppress(OSError, Timeout), lock.acquire(timeout=0):
        path.with_suffix(".holder").unlink(missing_ok=True)
        path.unlink()  # last: who goes on after a kill finds what is left by this file


def _holder(path: Path) -> str:
    for _ in range(5):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return f"process {int(content['pid'])} since {content['since']}"
        except (OSError, ValueError, KeyError, TypeError):
            time.sleep(0.04)  # it has taken the lock this instant
    return "another process"
