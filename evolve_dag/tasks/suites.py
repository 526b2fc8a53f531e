"""Task suites by experiment: the tasks of a split and the environment they are asked in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from evolve_dag.config.parts import part_of
from evolve_dag.config.schema import Experiment, TaskSplit
from evolve_dag.environments.base import EnvironmentPart, Place
from evolve_dag.inference.roles import Roles
from evolve_dag.protocols import Environment, StatefulEnvironment, Verifier
from evolve_dag.records import Task
from evolve_dag.tasks.formats import load_suite
from evolve_dag.tasks.jsonl import refuse_shared_questions

SplitName = Literal["train", "development", "held_out"]
SPLITS: tuple[SplitName, ...] = ("train", "development", "held_out")


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
    environment, verification = experiment.environment, experiment.verification
    place = Place(getattr(experiment.tasks, name), experiment.models.policy, roles)
    return Split(
        load_tasks_of(experiment, name),
        part_of("environment", environment).make(environment, place),
        part_of("verifier", verification).make(verification, roles),
    )


def load_tasks_of(experiment: Experiment, name: SplitName) -> tuple[Task, ...]:
    """The tasks of one split alone.

    Raises:
        DataError: a file of tasks is wrong; lists the lines.
    """
    split: TaskSplit = getattr(experiment.tasks, name)
    own: EnvironmentPart[Any] = part_of("environment", experiment.environment)
    if own.tasks is not None:
        return own.tasks(experiment.environment, split, name)
    return tuple(load_suite(split, suite=f"{experiment.experiment}/{name}"))


def check_files(experiment: Experiment) -> None:
    """Read the files of tasks and of the environment as a run will, so that their mistakes show before anything is made.

    Raises:
        DataError: a file is wrong, or two splits share a question.
    """
    row: EnvironmentPart[Any] = part_of("environment", experiment.environment)
    row.check(experiment.environment)
    check_disjoint(experiment)


def check_disjoint(experiment: Experiment) -> None:
    """Held-out and development tasks must not be trained on.

    Raises:
        DataError: two splits share a question; names them.
    """
    if part_of("environment", experiment.environment).tasks is not None:
        return  # each split asks about a world of its own: the same words there ask about other facts
    refuse_shared_questions({name: load_tasks_of(experiment, name) for name in SPLITS})
