"""Tasks as a stream: every iteration takes its own (``tasks.train.stream``).

A night that asks the same questions as the night before can only teach what that night left over. A stream is a plain rule
from the number of the iteration to tasks, so the tasks of iteration k never depend on when it runs, nor on what was
appended since: :func:`of_iteration` turns the experiment into the one that iteration k runs, with ordinary splits.

Files of a folder go by name. What a finished iteration took is remembered with it (:func:`files_read`), so a file that comes
late, and sorts before one that was read, moves no iteration to another file: it is passed over.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from evolve_dag.config.parts import part_of
from evolve_dag.config.schema import Experiment, TaskSplit
from evolve_dag.errors import DataError, OrderError, StoreError
from evolve_dag.tasks.formats import without_rows

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from evolve_dag.store.artifacts import Store

FILE = "tasks_file"
"""Fact of the ref of trajectories: folder and name of the file that the iteration took."""


def of_iteration(experiment: Experiment, iteration: int, read: Sequence[str] = ()) -> Experiment:
    """The experiment as iteration ``iteration`` (from 1) reads it: its own training tasks where they are a stream.

    Args:
        read: names of the files that iterations 1, 2, ... of the lineage took (:func:`files_read`).

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
    return of_iteration(experiment, iteration, files_read(experiment, store))


def files_read(experiment: Experiment, store: Store) -> tuple[str, ...]:
    """Names of the files that the finished iterations of this lineage took, from the first on; () where there is no folder."""
    folder = _folder(experiment.tasks.train)
    if folder is None:
        return ()
    names: list[str] = []
    for iteration in count(1):
        with suppress(StoreError):  # a damaged ref is written anew with its iteration
            ref = store.ref(experiment.experiment, iteration, "trajectories")
            parent, _, name = str(ref.facts.get(FILE, "") if ref else "").partition("/")
            if name and parent == folder.name:
                names.append(name)
        if len(names) < iteration:
            break
    return tuple(names)


def facts_of(experiment: Experiment, seen: Experiment) -> dict[str, str]:
    """What the ref of the trajectories remembers; ``seen`` is ``experiment`` as the iteration reads it."""
    folder, path = _folder(experiment.tasks.train), seen.tasks.train.path
    return {} if folder is None or path is None else {FILE: f"{folder.name}/{Path(path).name}"}


def _folder(split: TaskSplit) -> Path | None:
    return Path(split.path) if split.stream and split.path is not None and Path(split.path).is_dir() else None


def _of_files(split: TaskSplit, iteration: int, experiment: str, read: Sequence[str]) -> Mapping[str, object]:
    folder = _folder(split)
    if folder is None:
        return {"skip": split.skip + (split.count or 1) * (iteration - 1)}
    if iteration <= len(read):
        return {"path": str(folder / read[iteration - 1])}
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.is_file() and not entry.name.startswith("."))
        left = [name for name in names if name > max(read, default="")]
        question = str(split.fields.get("question", "question"))
        empty = [name for name in left if without_rows(folder / name, question)]  # a day on which nothing came in
    except OSError as error:
        raise DataError(f"{folder}: cannot be listed: {error.strerror}", "correct tasks.train.path") from error
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


def _passed_over(late: Sequence[str], empty: Sequence[str]) -> Iterator[str]:
    if late:
        yield f"; passed over, since they sort before what was read: {', '.join(late)}"
    if empty:
        yield f"; passed over, since they are empty: {', '.join(empty)}"
