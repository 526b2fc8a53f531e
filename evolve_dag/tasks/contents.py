"""What a user's file holds, as a hash or a number: digests do not depend on where a file lies, only on what is in it."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from evolve_dag.config.schema import TaskSplit
from evolve_dag.errors import DataError
from evolve_dag.store.disk import regular
from evolve_dag.tasks.formats import load_suite, rows_of


def file_digest(path: str, key: str) -> str:
    """Hash of a file's content.

    Args:
        key: of the experiment file that names it, for the remedy.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    return _file_digest(Path(path), key)


def folder_digest(path: str, key: str) -> str:
    """Hash of the names and contents of all files below a folder.

    Raises:
        DataError: there is no such folder, or a file in it cannot be read.
    """
    place = Path(path)
    if not place.is_dir():
        raise DataError(f"{path}: no such folder", f"correct {key} in the experiment file")
    listed = sorted(inner for inner in place.rglob("*") if inner.is_file())
    return _text_digest("\n".join(f"{one.relative_to(place).as_posix()}\0{_file_digest(one, key)}" for one in listed))


def rows_digest(split: TaskSplit, key: str) -> str:
    """Hash of the tasks that a split takes (of a stream, in its iteration), whatever else the file holds.

    Raises:
        DataError: there is no such file, or a row is broken.
        OrderError: the file holds no tasks for this iteration yet.
    """
    path = Path(split.path or "")
    _file_digest(path, key)
    stat = path.stat()
    return _tasks_digest(split.model_dump_json(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _tasks_digest(split: str, size: int, modified: int) -> str:
    tasks = load_suite(TaskSplit.model_validate_json(split), suite="stream")
    return _text_digest("\n".join(f"{t.id}\0{t.question}\0{t.answer}\0{sorted(t.metadata.items())}" for t in tasks))


def count_rows(split: TaskSplit, key: str) -> int:
    """How many rows there are for a split, whatever it takes of them.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    path = Path(split.path or "")
    _file_digest(path, key)
    stat = path.stat()
    return _count_rows(split.model_copy(update={"skip": 0, "count": None}).model_dump_json(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _count_rows(split: str, size: int, modified: int) -> int:
    return len(rows_of(TaskSplit.model_validate_json(split))[0])


def _text_digest(text: str) -> str:
    content = text.encode("utf-8", "surrogatepass")  # a row may hold half a character, as JSON spells it
    return f"sha256:{hashlib.sha256(content).hexdigest()[:32]}"


def _file_digest(path: Path, key: str) -> str:
    try:
        stat = regular(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", f"correct {key} in the experiment file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", f"correct {key} in the experiment file") from None
    return _hash(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _hash(path: str, size: int, modified: int) -> str:
    with Path(path).open("rb") as handle:
        return f"sha256:{hashlib.file_digest(handle, 'sha256').hexdigest()[:32]}"
