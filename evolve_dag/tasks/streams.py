"""Tasks as a stream: every iteration takes its own (``tasks.train.stream``).

A night that asks the same questions as the night before can only teach what that night left over. A stream is a plain rule
from the number of the iteration to tasks, so the tasks of iteration k never depend on when it runs, nor on what was
appended since: :func:`of_iteration` turns the experiment into the one that iteration k runs, with ordinary splits.

What a finished iteration took is remembered with it (:func:`read_so_far`). Files of a folder go by name: one that comes late,
and sorts before one that was read, moves no iteration to another file, it is passed over. An iteration that came to the end of
a file and took fewer rows than it might stays so when more are appended; the next one begins behind it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve_dag.config.parts import part_of
from evolve_dag.config.schema import Experiment, TaskSplit
from evolve_dag.errors import DataError, OrderError, StoreError
from evolve_dag.tasks.contents import count_rows
from evolve_dag.tasks.formats import without_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from evolve_dag.store.artifacts import Store

TRAIN = "tasks.train.path"
FILE = "tasks_file"
"""Fact of the ref of trajectories: folder and name of the file that the iteration took."""
ROWS = "tasks_rows"
"""The same of a long file: its name, ``count``, the rows before those that the iteration took, and how many it took."""


def of_iteration(experiment: Experiment, iteration: int, read: Sequence[Any] = ()) -> Experiment:
    """The experiment as iteration ``iteration`` (from 1) reads it: its own training tasks where they are a stream.

    Args:
        read: what iterations 1, 2, ... of the lineage took (:func:`read_so_far`).

    Raises:
        OrderError: the stream holds nothing for this iteration yet.
        DataError: the folder of the stream cannot be read.
    """
    train = experiment.tasks.train
    if not train.stream:
        return experiment
    fresh = part_of("environment", experiment.environment).fresh
    own = _of_files(train, iteration, experiment.experiment, read) if fresh is None else fresh(train, iteration)
    tasks = experiment.tasks.model_copy(update={"train": train.model_copy(update=own)})
    return experiment.model_copy(update={"tasks": tasks})


def of_lineage(experiment: Experiment, iteration: int, store: Store) -> Experiment:
    """:func:`of_iteration` behind what the finished iterations of the lineage took."""
    return of_iteration(experiment, iteration, read_so_far(experiment, store))


def read_so_far(experiment: Experiment, store: Store) -> tuple[Any, ...]:
    """What the finished iterations of this lineage took, from the first on: of a folder the names of files, of a file the facts
    :data:`ROWS` (None where that is not known); () where there is no file."""
    train = experiment.tasks.train
    if not train.stream or train.path is None:
        return ()
    folder = _folder(train)
    read: list[Any] = []
    for iteration in count(1):
        with suppress(StoreError):  # a damaged ref is written anew with its iteration
            ref = store.ref(experiment.experiment, iteration, "trajectories")
            if folder is None:
                read += [ref.facts.get(ROWS)] if ref else []
            else:
                parent, _, name = str(ref.facts.get(FILE, "") if ref else "").partition("/")
                read += [name] if name and parent == folder.name else []
        if len(read) < iteration:
            break
    return tuple(read)


def facts_of(experiment: Experiment, seen: Experiment) -> dict[str, Any]:
    """What the ref of the trajectories remembers; ``seen`` is ``experiment`` as the iteration reads it."""
    train, own = experiment.tasks.train, seen.tasks.train
    if not train.stream or train.path is None or own.path is None:
        return {}
    if (folder := _folder(train)) is not None:
        return {FILE: f"{folder.name}/{Path(own.path).name}"}
    # A short night of an older version counts as one of all its rows, under which it was made.
    whole = own.count is not None and own.count <= count_rows(train, TRAIN) - own.skip
    return {ROWS: [*_rule(train, own.skip), own.count]} if whole else {}


def _rule(split: TaskSplit, skip: int) -> list[Any]:
    return [Path(split.path or "").name, split.count, skip]


def _folder(split: TaskSplit) -> Path | None:
    return Path(split.path) if split.stream and split.path is not None and Path(split.path).is_dir() else None


def _of_files(split: TaskSplit, iteration: int, experiment: str, read: Sequence[Any]) -> Mapping[str, object]:
    folder = _folder(split)
    if folder is None:
        return _next_rows(split, iteration, read)
    if iteration <= len(read):
        taken = folder / read[iteration - 1]
        if not taken.exists():
            raise DataError(
                f"{taken}: gone, and the finished iteration {iteration} of {experiment} took its tasks from it",
                "put it back as it was: the lineage is walked from its first night, and no file that was read may go",
            )
        return {"path": str(taken)}
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
        left = [name for name in names if name > max(read, default="")]
        question = str(split.fields.get("question", "question"))
        empty = [name for name in left if without_rows(folder / name, question)]  # a day on which nothing came in
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror}", f"correct {TRAIN}") from error
    fresh = [name for name in left if name not in empty]
    at = iteration - len(read) - 1
    if at >= len(fresh):
        held = f"{folder} holds {len(read) + len(fresh)} files, one an iteration"
        passed = "".join(_passed_over(sorted({*names} - {*left, *read}), empty))
        raise OrderError(
            f"trajectories[{experiment}|{iteration:02d}]: no tasks yet: {held}{passed}",
            "put the next file there, under a name that sorts last, or lower `iterations`",
        )
    return {"path": str(folder / fresh[at])}


def _next_rows(split: TaskSplit, iteration: int, read: Sequence[Any]) -> Mapping[str, object]:
    """Which rows of a file an iteration takes: behind the last one the next ``count``, or what is left of the file."""
    most, skip = split.count or 1, split.skip
    for noted in (*read, *[None] * iteration)[: iteration - 1]:
        skip += _taken(noted, _rule(split, skip)) or most
    if iteration > len(read):
        return {"skip": skip, "count": _at_most(most, split, skip)}
    noted = read[iteration - 1]
    if noted is None:
        return {"skip": skip, "count": most}
    return {"skip": skip, "count": _at_most(_taken(noted, _rule(split, skip)) or most, split, skip)}


def _taken(noted: Any, rule: list[Any]) -> int | None:
    """The rows that an iteration took; None where it was under another rule, as where ``count`` has been changed since."""
    match noted:
        case [*known, int(taken)] if known == rule and taken > 0:
            return taken
    return None


def _at_most(wanted: int, split: TaskSplit, skip: int) -> int:
    """As many rows as there are; all that were wanted where there is none, which is told where they are read."""
    with suppress(DataError):
        return min(wanted, max(0, count_rows(split, TRAIN) - skip)) or wanted
    return wanted


def _passed_over(late: Sequence[str], empty: Sequence[str]) -> Iterator[str]:
    if late:
        yield f"; passed over, since they sort before what was read: {', '.join(late)}"
    if empty:
        yield f"; passed over, since they are empty: {', '.join(empty)}"
