"""Where the library runs: a thread with one event loop for all episodes of an environment, and what they share."""

from __future__ import annotations

import asyncio
import importlib
import threading
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any, TypeVar

from evolve_dag.config.fence import give_up
from evolve_dag.environments.verifiers.tasksets import Taskset
from evolve_dag.errors import SessionError

if TYPE_CHECKING:
    from evolve_dag.environments.verifiers.library import Play

T = TypeVar("T")

GRACE = 2.0
"""Seconds beyond an episode's own limit until the library's thread counts as blocked."""
STARTING_SECONDS = 120.0
"""How long the servers that all episodes share may take to start."""


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
        self._thread = threading.Thread(target=self._work, name=f"verifiers {tasks.id}", daemon=True)
        self._thread.start()
        started: asyncio.Event = asyncio.Event()
        self._serving = asyncio.run_coroutine_threadsafe(self._serve(started), self._loop)
        self.run(self._started(started), STARTING_SECONDS)

    def _work(self) -> None:
        """The loop, until it is stopped: what ends the interpreter, or asked it to end too late, ends only its episode."""
        while True:
            try:
                return self._loop.run_forever()
            except BaseException:
                continue

    def play(self, row: Any, seconds: float) -> Play:
        """An episode of one row, not begun yet."""
        play: Play = self._library.Play(self._env, self._client, row, seconds)
        return play

    def run(self, work: Coroutine[Any, Any, T], seconds: float) -> T:
        """The result of ``work`` in the library's loop.

        Raises:
            SessionError: the loop does not come to it; what blocks it is asked to end.
        """
        if self.lost:
            work.close()
            raise _blocked()
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result(seconds + GRACE)
        except TimeoutError:
            if future.done():  # an error of the work itself
                raise
            future.cancel()
            give_up(self._thread)
            self.lost = not self._answers()
            raise _blocked() from None

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
        try:
            await asyncio.wait_for(started.wait(), STARTING_SECONDS)
        except TimeoutError:
            what = f"the tool servers of the taskset did not start within {STARTING_SECONDS:g} seconds"
            raise SessionError(what, "try on a machine with less to do, or mend them") from None
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


def _blocked() -> SessionError:
    return SessionError("an environment blocks the library's event loop", "mend it: it must await what takes time")
