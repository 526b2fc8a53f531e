"""What to say of an exception that this program did not raise itself: disks, databases, and what nobody foresaw."""

from __future__ import annotations

import errno
import re
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Literal

from evolve_dag import errors
from evolve_dag.errors import EvolveError, StoreError, first_line, out_of_memory
from evolve_dag.secrecy import masker

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_READ_ONLY = frozenset({errno.EROFS})
_BROKEN = frozenset({errno.EIO})
# Libraries written in Rust (Polars, safetensors) and SQLite raise types of their own, so their words are read.
_FULL_WORDS = re.compile(r"no space left on device|disk quota exceeded|\(os error (28|122|27)\)|database or disk is full", re.I)
_READ_ONLY_WORDS = re.compile(r"read-only file system|\(os error 30\)|attempt to write a readonly database", re.I)
_BROKEN_WORDS = re.compile(r"\(os error 5\)|disk i/o error", re.I)
_DAMAGED_WORDS = re.compile(r"database disk image is malformed|file is not a database|malformed database schema", re.I)


class UnexpectedError(EvolveError, RuntimeError):
    """Something that no message was written for: a mistake in the program, or a machine in trouble."""


def explained(error: BaseException) -> EvolveError:
    """The message for whatever was raised: our own error behind it where there is one, else the best that can be said."""
    behind = list(chain(error))
    for one in behind:
        if isinstance(one, EvolveError):
            return one
    for one in behind:
        if is_disk_error(one) or isinstance(one, PermissionError):
            named = getattr(one, "filename", None)
            return disk_error(one, Path(named) if isinstance(named, str) else None)
        if is_damaged_database(one):
            return StoreError(
                f"a database is damaged: {one}", "`evolve doctor` names it; artifacts are files of their own and not touched"
            )
    return _unexpected(behind)


def told(error: BaseException) -> dict[str, str]:
    """An exception on its way to another process, as JSON values: :func:`explained`, without secrets."""
    mask, found = masker(), explained(error)
    return {"type": type(found).__name__, "what": mask(found.what), "remedy": mask(found.remedy)}


def retold(values: Mapping[str, str]) -> EvolveError:
    """The error that another process told; of the same type, where it is one of ours."""
    kinds = {kind.__name__: kind for kind in (*vars(errors).values(), UnexpectedError) if isinstance(kind, type)}
    kind = kinds.get(values["type"], EvolveError)
    return (kind if issubclass(kind, EvolveError) else EvolveError)(values["what"], values["remedy"])


def chain(error: BaseException) -> Iterator[BaseException]:
    """An exception and all that led to it, nearest first and each once: the links may run in a circle.

    ``user_exception`` is where Dagster keeps what a step raised.
    """
    seen: set[int] = set()
    waiting: list[BaseException | None] = [error]
    while waiting:
        one = waiting.pop(0)
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        yield one
        context = None if one.__suppress_context__ else one.__context__
        waiting += [one.__cause__, getattr(one, "user_exception", None), context]


def is_disk_error(error: BaseException) -> bool:
    """Whether an exception says that the disk is full, read-only or broken."""
    return disk_trouble(error) is not None


def disk_error(error: BaseException, path: Path | None = None) -> StoreError:
    """The message for a disk that did not take what was written to ``path``, with the remedy that fits."""
    # SQLAlchemy says the whole statement, with its values, behind the first line.
    words = (error.strerror if isinstance(error, OSError) else None) or first_line(error)
    what = f"{path}: cannot be written: {words}" if path is not None else f"the disk: {words}"
    remedy = _REMEDIES[disk_trouble(error) or "denied"]
    return StoreError(what, f"{remedy}, then run the same command: it resumes, nothing is lost")


_REMEDIES = {
    "full": "free room on that disk (or name another folder with --store)",
    "read-only": "make that disk writable (or name another folder with --store)",
    "broken": "check that disk, which reports errors (or name another folder with --store)",
    "denied": "see that you may write there (or name another folder with --store)",
}


def disk_trouble(error: BaseException) -> Literal["full", "read-only", "broken"] | None:
    """What an exception says of the disk; None: nothing. SQLite calls a disk broken when its own file is, too."""
    kinds: tuple[tuple[Literal["full", "read-only", "broken"], frozenset[int], re.Pattern[str]], ...]
    kinds = (("full", _FULL, _FULL_WORDS), ("read-only", _READ_ONLY, _READ_ONLY_WORDS), ("broken", _BROKEN, _BROKEN_WORDS))
    for kind, numbers, words in kinds:
        if isinstance(error, OSError) and error.errno is not None:
            if error.errno in numbers:
                return kind
        elif isinstance(error, Exception) and not isinstance(error, EvolveError) and words.search(str(error)):
            return kind
    return None


def is_damaged_database(error: BaseException) -> bool:
    """Whether an exception says that a SQLite file is not what SQLite wrote."""
    return isinstance(error, sqlite3.DatabaseError) and _DAMAGED_WORDS.search(str(error)) is not None


def damaged_databases(folder: Path) -> list[Path]:
    """The ``*.db`` and ``*.sqlite`` files below a folder that are empty or that SQLite cannot read, by name."""
    found = []
    for path in sorted([*folder.rglob("*.db"), *folder.rglob("*.sqlite")]):
        if not path.is_file() or path.stat().st_size == 0:
            found.append(path)
            continue
        try:
            connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
            try:
                whole = connection.execute("pragma quick_check(1)").fetchone() == ("ok",)
            finally:
                connection.close()
        except sqlite3.OperationalError:  # locked, or in use: not damaged
            whole = True
        except sqlite3.DatabaseError:
            whole = False
        if not whole:
            found.append(path)
    return found


def alembic_revision(path: Path, patience: float = 5.0) -> str | None:
    """The revision that a database's maker writes down once all tables are there; None where that table is empty.

    Not opened read-only: what a kill has left of a transaction is rolled back by whoever comes first.

    Args:
        patience: seconds to wait for another writer.

    Raises:
        sqlite3.DatabaseError: it cannot be read, or has no such table.
    """
    connection = sqlite3.connect(f"{path.resolve().as_uri()}?mode=rw", uri=True, timeout=patience)
    try:
        found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    finally:
        connection.close()
    return None if found is None else str(found[0])


def _unexpected(behind: list[BaseException]) -> UnexpectedError:
    culprit = next((one for one in behind if getattr(one, "user_exception", None) is None), behind[0])
    if spent := [one for one in behind if out_of_memory(one)]:
        told = "" if isinstance(spent[0], MemoryError) else f": {first_line(spent[0])}"
        return UnexpectedError(
            f"out of memory{_place(culprit)}{told}",
            "set runtime.concurrency or distillation.tokens_per_batch lower, then run the same command: it goes on from there",
        )
    return UnexpectedError(
        f"{type(culprit).__name__}: {culprit}{_place(culprit)}",
        "nobody foresaw this; what was made so far is kept, and the same command goes on from there. "
        "For a report, EVOLVE_DEBUG=1 shows the traceback",
    )


def _place(error: BaseException) -> str:
    """`` (evolve_dag/steps/adapter.py:60)``: the innermost line of this package, else the innermost of all."""
    places: list[tuple[Path, int]] = []
    at = error.__traceback__
    while at is not None:
        places.append((Path(at.tb_frame.f_code.co_filename), at.tb_lineno))
        at = at.tb_next
    home = Path(__file__).resolve().parent.parent
    ours = [(path.relative_to(home.parent), line) for path, line in places if path.is_relative_to(home)]
    if not places:
        return ""
    path, line = (ours or places)[-1]
    return f" ({path}:{line})"
