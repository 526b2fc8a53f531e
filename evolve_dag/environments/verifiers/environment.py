"""``environment: {kind: verifiers, id: ...}``: tasks, tools, turns and reward of a taskset of the library ``verifiers``."""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Mapping
from itertools import combinations
from typing import Any, Literal

from pydantic import Field

from evolve_dag.config.parts import EnvironmentSettings
from evolve_dag.config.schema import Experiment, TaskSplit
from evolve_dag.environments.base import EnvironmentPart
from evolve_dag.environments.verifiers.conversation import Talk
from evolve_dag.environments.verifiers.stage import Stage
from evolve_dag.environments.verifiers.tasksets import Taskset, code_digest, taskset
from evolve_dag.errors import DataError, PartError
from evolve_dag.protocols import Session
from evolve_dag.records import Task


class VerifiersEnvironment(EnvironmentSettings):
    """A v1 taskset of the library ``verifiers`` that is installed, plays with one agent and needs no container."""

    kind: Literal["verifiers"] = "verifiers"
    """A taskset of the library ``verifiers``."""
    id: str = Field(min_length=1)
    """Name of the taskset's package, which is installed, e.g. ``textarena``."""
    args: dict[str, Any] = Field({})
    """Keys of the taskset's own configuration; its package says which there are."""
    reward: str = ""
    """The part of its rubric that counts alone, without its weight; empty: the weighted sum of all parts."""
    seconds: float = Field(60.0, gt=0, le=1e6)
    """How long it may take from one turn to what follows, and to judge; then its episode has failed."""


class VerifiersTasks:
    """A :class:`~evolve_dag.protocols.StatefulEnvironment`; the library's side starts with the first episode."""

    def __init__(self, settings: VerifiersEnvironment, split: TaskSplit) -> None:
        self.settings, self.split = settings, split
        self._lock = threading.Lock()
        self._stage: Stage | None = None
        self._rows: Mapping[str, Any] = {}

    def open(self, task: Task, seed: int) -> Session:
        """Begin an episode. The library knows no seed of an episode: what it draws follows from its task."""
        with self._lock:
            if not self._rows:
                self._rows = {ours.id: theirs for ours, theirs in _rows(self.settings, self.split)}
            if self._stage is None or self._stage.lost:
                self._stage = Stage(_taskset(self.settings))
                weakref.finalize(self, self._stage.stop)
            stage = self._stage
        if task.id not in self._rows:
            raise DataError(f"taskset {self.settings.id} has no task {task.id}", "play tasks of its own split")
        return Talk(stage, stage.play(self._rows[task.id], self.settings.seconds), self.settings.reward)


def _taskset(settings: VerifiersEnvironment) -> Taskset:
    return taskset(settings.id, json.dumps(settings.args, sort_keys=True))


def _rows(settings: VerifiersEnvironment, split: TaskSplit) -> list[tuple[Task, Any]]:
    found = _taskset(settings).take(split.skip, split.count or 0)
    if len(found) < (split.count or 0):
        what = f"taskset {settings.id}: rows {split.skip + 1} to {split.skip + (split.count or 0)} were asked for"
        raise DataError(f"{what}, {len(found)} of them are there (twins count once)", "lower count or skip of the split")
    return found


def _tasks(settings: VerifiersEnvironment, split: TaskSplit, name: str) -> tuple[Task, ...]:
    return tuple(task for task, _ in _rows(settings, split))


def _mistakes(settings: VerifiersEnvironment, experiment: Experiment) -> list[tuple[str, str]]:
    found = []
    spans: dict[str, range] = {}
    for name, split in experiment.tasks.splits.items():
        if split.path is not None or split.suite != "jsonl" or split.fields:
            found.append((f"tasks.{name}", "path, suite and fields are for files; the taskset has its own rows"))
        if split.count is None:
            found.append((f"tasks.{name}.count", "missing: how many rows of the taskset"))
        nights = experiment.iterations if split.stream else 1
        spans[name] = range(split.skip, split.skip + (split.count or 0) * nights)
    for one, other in combinations(spans, 2):
        if range(max(spans[one].start, spans[other].start), min(spans[one].stop, spans[other].stop)):
            found.append((f"tasks.{other}.skip", f"shares rows with tasks.{one}: splits must not share tasks"))
    return found


def _data(settings: VerifiersEnvironment) -> str:
    """What is not there stops a run (:func:`_taskset`), but no experiment file from being read."""
    try:
        return code_digest(settings.id)
    except PartError:
        return "not installed"


VERIFIERS = EnvironmentPart(
    settings=VerifiersEnvironment,
    make=lambda settings, place: VerifiersTasks(settings, place.split),
    tasks=_tasks,
    one_world=True,
    fresh=lambda split, iteration: {"skip": split.skip + (split.count or 0) * (iteration - 1)},
    mistakes=_mistakes,
    check=_taskset,
    libraries={"verifiers": "verifiers"},
    data=_data,
)
