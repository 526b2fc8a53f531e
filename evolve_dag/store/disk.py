"""Files: only regular ones are read, and they are written so that a reader sees the whole or nothing."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evolve_dag.errors import StoreError

_KINDS = {
    stat.S_IFDIR: "a folder",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
}


TEMPORARY = ".tmp"
"""Ending of a file that is being written (its name begins with a dot). A killed writer leaves it; no reader looks at it."""


def regular(path: Path) -> os.stat_result:
    """Facts of a regular file (or of what a link leads to); opens nothing: a pipe would wait for ever, a device never end.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: it is something else, or cannot be reached; ``strerror`` says what, in a reader's words.
    """
    try:
        found = path.stat()
    except ValueError:  # a zero byte
        raise OSError(errno.EINVAL, "no file can have this name", str(path)) from None
    kind = stat.S_IFMT(found.st_mode)
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"it is {_KINDS.get(kind, 'something else')}, not a file", str(path))
    return found


def read_bytes(path: Path, *, most: int | None = None) -> bytes:
    """Content of a regular file.

    Args:
        most: bytes; a larger file is refused.

    Raises:
        FileNotFoundError: nothing is there.
        OSError: as :func:`regular`, or it cannot be read.
    """
    size = regular(path).st_size
    if most is not None and size > most:
        raise OSError(errno.EFBIG, f"it has {size} bytes, and at most {most} are read", str(path))
    return path.read_bytes()


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
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}{TEMPORARY}")
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


def require_address(path: Path) -> None:
    """That SQLAlchemy, through which Dagster and MLflow open their SQLite files, finds ``path``: in its addresses ``?`` begins
    the options, and from its version 2.1 on ``%`` and two digits stand for another sign, so that another file would be made.

    Raises:
        StoreError: it does not.
    """
    if "?" not in str(path) and "%" not in str(path):
        return
    from sqlalchemy.engine import make_url

    if make_url(f"sqlite:///{path}").database != str(path):
        what = f"{path}: Dagster and MLflow take a `?` or `%` in a path for another file"
        raise StoreError(what, "put the store (--store, EVOLVE_STORE) and DAGSTER_HOME into a folder without these signs")
