"""Tasks as a stream: every iteration takes its own (``tasks.train.stream``).

A night that asks the same questions as the night before can only teach what that night left over. A stream is a plain rule
from the number of the iteration to tasks, so the tasks of iteration k never depend on when it runs, nor on what was
appended since: :func:`of_iteration` turns the experiment into the one that iteration k runs, with ordinary splits.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from evolve_dag.config.parts import part_of
from evolve_dag.config.schema import Experiment, TaskSplit
from evolve_dag.errors import DataError, OrderError

if TYPE_CHECKING:
    from collections.abc import Mapping


def of_iteration(experiment: Experiment, iteration: int) -> Experiment:
    """The experiment as iteration ``iteration`` (from 1) reads it: its own training tasks where they are a stream.

    Raises:
        OrderError: the stream holds nothing for this iteration yet.
        DataError: the folder of the stream cannot be read.
    """
    train = experiment.tasks.train
    if not train.stream:
        return experiment
    fresh = part_of("environment", experiment.environment).fresh
    own = _of_files(train, iteration, experiment.experiment) if fresh is None else fresh(train, iteration)
    tasks = experiment.tasks.model_copy(update={"train": train.model_copy(update=own)})
    return experiment.model_copy(update={"tasks": tasks})


def _of_files(split: TaskSplit, iteration: int, experiment: str) -> Mapping[str, object]:
    assert split.path is not None  # checked with the experiment
    path = Path(split.path)
    if not path.is_dir():
        return {"skip": split.skip + (split.count or 1) * (iteration - 1)}
    try:
        files = sorted(entry for entry in path.iterdir() if entry.is_file() and not entry.name.startswith("."))
    except OSError as error:
        raise DataError(f"{path}: cannot be listed: {error.strerror}", "correct tasks.train.path") from error
    if iteration > len(files):
        raise OrderError(
            f"trajectories[{experiment}|{iteration:02d}]: no tasks yet: {path} holds {len(files)} files, one an iteration",
            "put the next file there, or lower `iterations`",
        )
    return {"path": str(files[iteration - 1])}
