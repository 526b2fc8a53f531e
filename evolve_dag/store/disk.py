"""Writing files so that a reader sees the whole or nothing, and telling a full or broken disk from other faults."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evolve_dag.errors import StoreError

_DISK_ERRORS = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO})
_DISK_WORDS = re.compile(
    r"no space left on device|disk quota exceeded|\(os error (28|122|27|30|5)\)|database or disk is full|disk i/o error",
    re.IGNORECASE,
)


def is_disk_error(error: BaseException) -> bool:
    """Whether an exception says that the disk is full, read-only or broken.

    Libraries written in Rust (Polars, safetensors) raise their own types, so their words are read as well.
    """
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in _DISK_ERRORS
    return isinstance(error, Exception) and _DISK_WORDS.search(str(error)) is not None


def disk_error(error: BaseException, path: Path) -> StoreError:
    """What to raise for an error of the disk: names the path and the remedy."""
    words = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return StoreError(
        f"{path}: cannot be written: {words}",
        "free room on that disk (or name another folder with --store), then run the same command: it resumes, nothing is lost",
    )


def pretty(content: Mapping[str, Any]) -> bytes:
    """JSON for people, in ASCII, with a line break at the end.

    Raises:
        ValueError: a number is not finite.
    """
    return (json.dumps(content, indent=2, allow_nan=False) + "\n").encode("ascii")


def write_atomic(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file so that readers see the old content or the new one, whole; its folder must be there.

    Args:
        durable: also outlive a power cut.

    Raises:
        OSError: it cannot be written; the old content stands.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as stream:
            stream.write(content)
            stream.flush()
            if durable:
                os.fsync(stream.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    if durable:
        fsync_folder(path.parent)


def fsync_folder(path: Path) -> None:
    """Make what was created or renamed in a folder outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
