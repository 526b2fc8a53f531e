"""``environment: {kind: verifiers, id: ...}``: tasks, tools, turns and reward of an environment of the library ``verifiers``."""

from __future__ import annotations

import asyncio
import importlib
import json
import threading
import weakref
from collections.abc import Coroutine, Mapping
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from pydantic import Field

from evolve_dag.config.fence import give_up
from evolve_dag.config.parts import EnvironmentSettings
from evolve_dag.config.schema import Experiment, TaskSplit
from evolve_dag.environments.base import EnvironmentPart, Place
from evolve_dag.environments.verifiers.conversation import Talk
from evolve_dag.environments.verifiers.tasksets import Taskset, code_digest, taskset
from evolve_dag.errors import DataError, SessionError
from evolve_dag.protocols import Session
from evolve_dag.records import Task

if TYPE_CHECKING:
    from evolve_dag.environments.verifiers.library import Play

T = TypeVar("T")

GRACE = 2.0
"""Seconds beyond an episode's own limit until the library's thread counts as blocked."""
STARTING_SECONDS = 120.0
"""How long the servers that all episodes share may take to start."""


class VerifiersEnvironment(EnvironmentSettings):
    """An environment of the library ``verifiers``: any v1 taskset that installs, plays with one agent and needs no container."""

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


class Stage:
    """The library in a thread of its own: one event loop for all episodes, as its environments expect.

    Raises:
        SessionError: what all episodes share could not be started.
    """

    def __init__(self, tasks: Taskset) -> None:
        self.lost = False
        """Whether an environment blocks the thread for good; nothing is to be played here any more."""
        self._library = importlib.import_module("evolve_dag.environments.verifiers.library")
        self._env = importlib.import_module("verifiers.v1.utils.loaders").load_environment(tasks.config)
        self._client = self._library.PolicyClient()
        self._loop = asyncio.new_event_loop()
        self._end = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"verifiers {tasks.id}", daemon=True)
        self._thread.start()
        started: asyncio.Event = asyncio.Event()
        self._serving = asyncio.run_coroutine_threadsafe(self._serve(started), self._loop)
        self.run(self._started(started), STARTING_SECONDS)

    def play(self, row: Any, seconds: float) -> Play:
        """An episode of one row, not begun yet."""
        play: Play = self._library.Play(self._env, self._client, row, seconds)
        return play

    def run(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        """The result of ``work`` in the library's loop.

        Raises:
            SessionError: the loop does not come to it; what blocks it is asked to end.
        """
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds + GRACE)
        except TimeoutError:
            future.cancel()
            give_up(self._thread)
            self.lost = not self._answers()
            raise SessionError("the environment blocks the library's event loop", "mend it: it must await what takes time") from None

    def stop(self) -> None:
        """Tear down what all episodes share."""
        self._loop.call_soon_threadsafe(self._end.set)
        if not self.lost:
            asyncio.run_coroutine_threadsafe(self._served(), self._loop).add_done_callback(lambda _: self._loop.stop())
            self._thread.join(GRACE)

    async def _serve(self, started: asyncio.Event) -> None:
        env = self._env
        try:
            async with env.serving():
                secrets = tuple(one.state_secret for one in env._shared_tools.values() if one.state_secret)
                async with self._library.PolicyInterception(self._client, secrets) as env._interception:
                    started.set()
                    await self._end.wait()
        finally:
            started.set()

    async def _started(self, started: asyncio.Event) -> None:
        await started.wait()
        if self._serving.done():
            self._serving.result()

    async def _served(self) -> None:
        while not self._serving.done():
            await asyncio.sleep(0.01)

    def _answers(self) -> bool:
        async def nothing() -> None:
            return None

        try:
            asyncio.run_coroutine_threadsafe(nothing(), self._loop).result(GRACE)
        except TimeoutError:
            return False
        return True


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
    for name in ("train", "development", "held_out"):
        split: TaskSplit = getattr(experiment.tasks, name)
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


VERIFIERS = EnvironmentPart(
    settings=VerifiersEnvironment,
    make=lambda settings, place: VerifiersTasks(settings, place.split),
    tasks=_tasks,
    fresh=lambda split, iteration: {"skip": split.skip + (split.count or 0) * (iteration - 1)},
    mistakes=_mistakes,
    libraries={"verifiers": "verifiers"},
    data=lambda settings: code_digest(settings.id),
)
