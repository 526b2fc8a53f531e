"""Episodes of one step, fanned out over Ray actors: here is who gets which, in the actor is the policy that plays.

An episode is one call of an actor, and its trajectory is written down by the step that asked. So an actor that dies costs the
episodes that it had begun: they go to another one, and a new actor takes its place.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

from evolve_dag import prompts
from evolve_dag.agent.rollouts import PlayEpisode, played_here
from evolve_dag.config import registry
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import EvolveError, ModelError, no_slice_error
from evolve_dag.inference.ledger import Ledger
from evolve_dag.inference.roles import Roles
from evolve_dag.records import Call, Task, Trajectory
from evolve_dag.secrecy import describe_error
from evolve_dag.steps import base
from evolve_dag.steps.body import Playing
from evolve_dag.steps.policies import Checked, open_policy
from evolve_dag.store.faults import retold, told
from evolve_dag.store.memory import Memory
from evolve_dag.store.mirror import open_store
from evolve_dag.tasks.suites import load_split

log = logging.getLogger(__name__)

MOST_DEATHS = 3
"""Actors that one place, or one episode, may lose before the step fails: what kills each of them will kill the next."""

Played = tuple[Trajectory | None, Sequence[Call], Mapping[str, str]]
"""A trajectory or None, the calls of models since the last one, and what went wrong (:func:`~evolve_dag.store.faults.told`)."""


@dataclass(frozen=True, slots=True)
class RayWorkers:
    """Actors that play episodes.

    Args:
        experiment: whole, as JSON values.
        count: of actors.
        cpus: that Ray sets aside for each.
        gpus: likewise.
    """

    experiment: Mapping[str, Any]
    count: int
    cpus: float = 1.0
    gpus: float = 0.0

    @contextmanager
    def open(self, playing: Playing, ledger: Ledger | None) -> Iterator[tuple[PlayEpisode, int]]:
        """What plays one episode on some actor, and how many may be in flight."""
        import ray

        if not ray.is_initialized():
            ray.init(address="auto", log_to_driver=False, configure_logging=False)
        each = int(self.experiment["runtime"]["concurrency"])
        actor = ray.remote(Player).options(num_cpus=self.cpus, num_gpus=self.gpus, max_concurrency=each + 1, max_restarts=0)
        crew = _Crew(lambda: actor.remote(self.experiment, playing), self.count, each, ledger)
        try:
            yield crew.play, self.count * each
        finally:
            crew.dismiss()


@dataclass(slots=True)
class _Crew:
    """Actors and how busy each is. It lives in one event loop."""

    hire: Any
    """Starts an actor; it is ready when its ``ready`` returns."""
    count: int
    each: int
    """Episodes in flight on one actor, at most."""
    ledger: Ledger | None
    busy: dict[Any, int] = field(default_factory=dict)
    """Actor that is ready -> episodes in flight on it."""
    hired: set[Any] = field(default_factory=set)
    """Those, and the ones that are still starting."""
    starting: set[asyncio.Task[None]] = field(default_factory=set)
    deaths: int = 0
    problem: EvolveError | None = None
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def play(self, task: Task, rollout: int, seed: int) -> Trajectory:
        """The trajectory of one episode, whichever actor plays it to its end."""
        from ray.exceptions import RayActorError

        for _ in range(MOST_DEATHS):
            async with self._actor() as actor:
                try:
                    trajectory, calls, problem = await actor.play.remote(task, rollout, seed)
                except RayActorError as error:
                    self._died(actor, error)
                    continue
            if self.ledger is not None:
                for call in calls:
                    self.ledger.record(call)
            if trajectory is None:
                raise retold(problem)
            return trajectory
        raise ModelError(
            f"{task.id}#{rollout}: {MOST_DEATHS} rollout workers died over this episode",
            "see their logs in Ray's dashboard; where memory ran out, lower runtime.concurrency or raise memory per worker",
        )

    @asynccontextmanager
    async def _actor(self) -> AsyncIterator[Any]:
        """The least busy actor, one episode busier meanwhile."""
        self._fill()
        async with self.changed:
            await self.changed.wait_for(lambda: self.problem or any(n < self.each for n in self.busy.values()))
            if self.problem is not None:
                raise self.problem
            actor = min(self.busy, key=lambda one: self.busy[one])
            self.busy[actor] += 1
        try:
            yield actor
        finally:
            async with self.changed:
                if actor in self.busy:
                    self.busy[actor] -= 1
                self.changed.notify_all()

    def _fill(self) -> None:
        while len(self.hired) < self.count and self.problem is None:
            actor = self.hire()
            self.hired.add(actor)
            self.starting.add(task := asyncio.create_task(self._begin(actor)))
            task.add_done_callback(self.starting.discard)

    async def _begin(self, actor: Any) -> None:
        from ray.exceptions import RayActorError

        try:
            try:
                problem = await actor.ready.remote()
            except RayActorError as error:
                self._died(actor, error)
            else:
                self.busy[actor] = 0
                self.problem = self.problem or (retold(problem) if problem else None)
        except Exception as error:  # nobody awaits this task: every episode would wait for ever
            self.problem = self.problem or ModelError(
                f"a rollout worker cannot be started: {describe_error(error)}",
                "see that evolve-dag is installed on all nodes, in the same version, and their logs in Ray's dashboard",
            )
        async with self.changed:
            self.changed.notify_all()

    def _died(self, actor: Any, error: Exception) -> None:
        """Have another one take its place; told by each of its episodes, and heard once."""
        if actor not in self.hired:
            return
        self.hired.discard(actor)
        self.busy.pop(actor, None)
        self.deaths += 1
        log.warning("a rollout worker died (%s): its unfinished episodes are played again", type(error).__name__)
        if self.deaths >= MOST_DEATHS * self.count:
            self.problem = ModelError(f"{self.deaths} rollout workers died", "see their logs in Ray's dashboard")
        self._fill()

    def dismiss(self) -> None:
        """End the actors; what they opened goes with their processes."""
        import ray

        for actor in self.hired:
            ray.kill(actor)


class Player:
    """In an actor: one policy, and any number of episodes at once. All of them are played in the loop of one thread."""

    def __init__(self, experiment: Mapping[str, Any], playing: Playing) -> None:
        self._experiment = Experiment.model_validate(experiment)
        self._playing = playing
        self._ready: Future[dict[str, str] | None] = Future()
        self._jobs: asyncio.Queue[tuple[Task, int, int, Future[Trajectory]]] = asyncio.Queue()
        self._ledger = Ledger()
        self._told = 0
        self._lock = threading.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None
        threading.Thread(target=self._work, daemon=True).start()

    def ready(self) -> dict[str, str] | None:
        """Waits until the policy is open; gives what went wrong."""
        return self._ready.result()

    def play(self, task: Task, rollout: int, seed: int) -> Played:
        """One episode."""
        done: Future[Trajectory] = Future()
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._jobs.put_nowait, (task, rollout, seed, done))
        try:
            trajectory, problem = done.result(), {}
        except Exception as error:
            trajectory, problem = None, told(error)
        with self._lock:
            calls = self._ledger.calls()[self._told :]
            self._told += len(calls)
        return trajectory, calls, problem

    def _work(self) -> None:
        """Open what a step's body opens, and play until the process ends."""
        try:
            store = open_store(registry.default_store())
            step = self._playing.step
            shown, names = base.body_view(step, base.seen_by(step, self._experiment, self._playing.iteration, store))
            memory = Memory(store.root / "cache" / "memory.sqlite")
            with Roles(shown, ledger=self._ledger, memory=memory) as roles, prompts.only(names):
                split = load_split(shown, self._playing.split, roles)
                with open_policy(store, self._playing.adapter, roles) as model:
                    if isinstance(split.environment, Checked):
                        split.environment.check()
                    roles.run(self._serve(shown, split, model))
        except Exception as error:
            if self._ready.done():
                os._exit(1)  # nobody would answer the episodes that are waiting: they are played elsewhere
            self._ready.set_result(told(error))

    async def _serve(self, experiment: Experiment, split: Any, model: Any) -> None:
        self._loop = asyncio.get_running_loop()
        self._ready.set_result(None)
        play = played_here(model, split.environment, split.verifier, experiment.rollout)
        going_on = set()

        async def one(task: Task, rollout: int, seed: int, done: Future[Trajectory]) -> None:
            try:
                with no_slice_error():
                    trajectory = await play(task, rollout, seed)
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(trajectory)

        while True:
            episode = asyncio.create_task(one(*await self._jobs.get()))
            going_on.add(episode)
            episode.add_done_callback(going_on.discard)
