"""Task suites by experiment: the tasks of a split and the environment they are asked in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evolve_dag.config.parts import part_of
from evolve_dag.config.schema import Experiment, TaskSplit
from evolve_dag.environments.base import EnvironmentPart, Place
from evolve_dag.errors import DataError
from evolve_dag.inference.roles import Roles
from evolve_dag.protocols import Environment, StatefulEnvironment, Verifier
from evolve_dag.records import Task
from evolve_dag.tasks.formats import load_suite
from evolve_dag.tasks.jsonl import folded, refuse_shared_questions

SplitName = Literal["train", "development", "held_out"]
SPLITS: tuple[SplitName, ...] = ("train", "development", "held_out")
LEAST_LEFT = 0.5
"""Share of a split's tasks that must be left when those of the other splits are left out: a night must not shrink away."""


@dataclass(frozen=True, slots=True)
class Split:
    """Tasks of one use, with what answers their tool calls and what judges their answers."""

    tasks: tuple[Task, ...]
    environment: Environment | StatefulEnvironment
    verifier: Verifier


def load_split(experiment: Experiment, name: SplitName, roles: Roles | None = None) -> Split:
    """Tasks, environment and verifier of one split.

    Args:
        roles: who is asked where a model judges answers or sums up pages.

    Raises:
        DataError: a file of tasks or pages is wrong; lists the lines.
    """
    environment = experiment.environment
    place = Place(getattr(experiment.tasks, name), experiment.models.policy, roles)
    return Split(
        load_tasks_of(experiment, name),
        part_of("environment", environment).make(environment, place),
        verifier_of(experiment, roles),
    )


def verifier_of(experiment: Experiment, roles: Roles | None = None) -> Verifier:
    """What judges answers; where a model does, ``roles`` asks it."""
    verifier: Verifier = part_of("verifier", experiment.verification).make(experiment.verification, roles)
    return verifier


def load_tasks_of(experiment: Experiment, name: SplitName) -> tuple[Task, ...]:
    """The tasks of one split alone, but for those that are :func:`left_out`.

    Raises:
        DataError: a file of tasks is wrong; lists the lines.
    """
    tasks = _tasks(experiment, name)
    gone = _asked_again(experiment, name, tasks)
    return tuple(task for task in tasks if task.id not in gone)


def left_out(experiment: Experiment, name: SplitName) -> frozenset[str]:
    """Ids of the tasks of a split that the development or held-out tasks ask too, where an environment draws its own about one
    world: of a task in two splits the later one has it, so that nothing is scored that was trained on. Tasks without a
    reference answer are not compared: their question need not say what is to be done (a game's opening words).

    Raises:
        DataError: a row cannot be loaded.
    """
    return _asked_again(experiment, name, _tasks(experiment, name)) if one_world(experiment) else frozenset()


def _asked_again(experiment: Experiment, name: SplitName, tasks: Sequence[Task]) -> frozenset[str]:
    """:func:`left_out` of ``tasks``, which are those of the split."""
    if not one_world(experiment):
        return frozenset()
    asked = {_identity(task) for later in SPLITS[SPLITS.index(name) + 1 :] for task in _tasks(experiment, later)}
    return frozenset(task.id for task in tasks if task.answer and _identity(task) in asked)


def one_world(experiment: Experiment) -> bool:
    """Whether the environment makes its own tasks, and those of all splits are about the same."""
    row: EnvironmentPart[Any] = part_of("environment", experiment.environment)
    return row.tasks is not None and row.one_world


def _identity(task: Task) -> tuple[str, str]:
    return folded(task.question), folded(task.answer)


def _tasks(experiment: Experiment, name: SplitName) -> tuple[Task, ...]:
    split: TaskSplit = getattr(experiment.tasks, name)
    own: EnvironmentPart[Any] = part_of("environment", experiment.environment)
    if own.tasks is not None:
        return own.tasks(experiment.environment, split, name)
    return tuple(load_suite(split, suite=f"{experiment.experiment}/{name}"))


def check_files(experiment: Experiment) -> None:
    """Read the files of tasks and of the environment as a run will, so that their mistakes show before anything is made.

    Raises:
        DataError: a file is wrong, an environment has fewer tasks than a split asks for, or two splits share a question.
    """
    row: EnvironmentPart[Any] = part_of("environment", experiment.environment)
    row.check(experiment.environment)
    if row.tasks is not None and not row.one_world:  # else the next line reads them
        for name in SPLITS:
            _tasks(experiment, name)
    check_disjoint(experiment)


def check_disjoint(experiment: Experiment) -> None:
    """Held-out and development tasks must not be trained on.

    Raises:
        DataError: two splits share a question; names them. Or so many that too few of a split are left.
    """
    if one_world(experiment):
        _refuse_few(experiment)
    elif part_of("environment", experiment.environment).tasks is None:
        refuse_shared_questions({name: load_tasks_of(experiment, name) for name in SPLITS})
    # Else each split asks about a world of its own: the same words there ask about other facts.


def _refuse_few(experiment: Experiment) -> None:
    for name in SPLITS:
        tasks = _tasks(experiment, name)
        gone = _asked_again(experiment, name, tasks)
        if len(tasks) - len(gone) < LEAST_LEFT * len(tasks):
            others = " or ".join(f"tasks.{later}" for later in SPLITS[SPLITS.index(name) + 1 :])
            what = f"{len(gone)} of the {len(tasks)} tasks of tasks.{name} are asked in {others} too"
            remedy = "let the environment draw from more different tasks (environment.args), or lower the splits' count"
            raise DataError(f"{experiment.experiment}: {what}: too few are left", remedy)
