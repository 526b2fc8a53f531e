"""What answers the calls of one episode: tools without state, or a session in a thread of its own, with one face for the loop.

What an environment does reaches no further than its episode. A set-up, a call or a reward that raises, takes longer than it
may, or gives what an episode cannot hold ends in an exception here, and the loop makes a failed trajectory of it. Only what
never gives the event loop back (``time.sleep`` in the ``async`` call of an environment without state) is beyond reach.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import queue
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Protocol, TypeVar

from evolve_dag.errors import SessionError
from evolve_dag.plain import plain
from evolve_dag.protocols import (
    CAN,
    OR,
    Completion,
    Environment,
    Session,
    StatefulEnvironment,
    ToolError,
    ToolResult,
    ToolSpec,
    as_reward,
    of_session,
)
from evolve_dag.records import Task, ToolCall
from evolve_dag.secrecy import describe_error

MOST_CHARACTERS = 1_000_000
"""Of one observation; more is a flood, not something to read."""
MOST_FEATURES = 6
"""Of one observation."""
CLOSING_SECONDS = 10.0
"""How long an episode waits for its tear-down; the thread goes on with it."""
_WORDS = re.compile(r"[a-z](?:[a-z -]{0,38}[a-z])?")
"""Of a feature: lessons quote them, so they hold neither names nor numbers nor punctuation."""

T = TypeVar("T")


class Calls(Protocol):
    """What the loop sees of an environment during one episode."""

    tools: tuple[ToolSpec, ...]
    system_prompt: str
    question: str
    """In place of the task's; '': the task's."""

    async def open(self) -> None:
        """Set up; the attributes hold from now on."""
        ...

    async def call(self, call: ToolCall, completion: Completion) -> ToolResult:
        """The observation of one call, as :func:`plain` text; also that of a call that was refused (ToolError)."""
        ...

    async def reward(self, answer: str | None) -> float | None:
        """0 to 1; None: the verifier judges."""
        ...

    async def close(self) -> str | None:
        """Tear down; never raises. What went wrong, in words, or None."""
        ...


def calls_of(environment: Environment | StatefulEnvironment, task: Task, seed: int, seconds: float) -> Calls:
    """What answers the calls of one episode; not set up yet.

    Args:
        seconds: that the set-up and every call may take.
    """
    if isinstance(environment, StatefulEnvironment):
        return _Stateful(environment, task, seed, seconds)
    return _Stateless(environment, seconds)


class _Stateless:
    """One environment for all episodes: there is nothing to set up."""

    question: str = ""

    def __init__(self, environment: Environment, seconds: float) -> None:
        self._environment, self._seconds = environment, seconds
        self.tools: tuple[ToolSpec, ...] = ()
        self.system_prompt = ""

    async def open(self) -> None:
        self.tools, self.system_prompt = self._environment.tools, self._environment.system_prompt

    async def call(self, call: ToolCall, completion: Completion) -> ToolResult:
        try:
            async with asyncio.timeout(self._seconds) as limit:
                return checked_result(await self._environment.call(call))
        except ToolError as problem:
            return _refused(problem)
        except TimeoutError:
            if limit.expired():
                raise _too_long(f"the call of {call.name}", self._seconds) from None
            raise

    async def reward(self, answer: str | None) -> float | None:
        return None

    async def close(self) -> str | None:
        return None


class _Stateful:
    """A session, in a thread that nothing else uses."""

    def __init__(self, environment: StatefulEnvironment, task: Task, seed: int, seconds: float) -> None:
        self._environment, self._task, self._seed, self._seconds = environment, task, seed, seconds
        self._worker = Worker(f"episode of {task.id}")
        self._session: Session | None = None
        self._seen: set[str] = set()
        self.tools: tuple[ToolSpec, ...] = ()
        self.system_prompt = ""
        self.question = ""

    async def open(self) -> None:
        self.tools, self.system_prompt, self.question = await self._worker.run(self._open, "the set-up", self._seconds)

    def _open(self) -> tuple[tuple[ToolSpec, ...], str, str]:
        self._session = session = self._environment.open(self._task, self._seed)
        return tuple(session.tools), plain(session.system_prompt), plain(of_session(session, "question"))

    async def call(self, call: ToolCall, completion: Completion) -> ToolResult:
        session = self._opened

        def work() -> object:
            of_session(session, "sampled")(completion)
            return session.call(call)

        try:
            given = await self._worker.run(work, f"the call of {call.name}", self._seconds)
        except ToolError as problem:
            result = _refused(problem)
            return replace(result, features={"result": "an error"})
        result = checked_result(given)
        features = result.features or {"result": _seen_as(result.text, self._seen)}
        self._seen.add(result.text)
        return replace(result, features=features)

    async def reward(self, answer: str | None) -> float | None:
        session = self._opened
        given = await self._worker.run(lambda: of_session(session, "reward")(answer), "the reward", self._seconds)
        return checked_reward(given)

    async def close(self) -> str | None:
        stuck = self._worker.stuck  # then the tear-down waits its turn, and nobody for it
        try:
            await self._worker.run(self._close, "the tear-down", 0.0 if stuck else CLOSING_SECONDS)
        except Exception as problem:
            return None if stuck else describe_error(problem)
        finally:
            self._worker.stop()
        return None

    def _close(self) -> None:
        if self._session is not None:
            of_session(self._session, "close")()

    @property
    def _opened(self) -> Session:
        assert self._session is not None  # the loop opens first
        return self._session


class Worker:
    """A thread that does one job after the other. It is a daemon: what hangs in it keeps no process from ending."""

    def __init__(self, name: str) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._started = False
        self._name = name
        self.stuck = False
        """Whether a job took too long; it may still be running."""

    async def run(self, work: Callable[[], T], what: str, seconds: float) -> T:
        """The result of ``work``, or what it raised.

        Raises:
            SessionError: it has not ended after ``seconds``; it goes on, and so do the jobs behind it.
        """
        loop = asyncio.get_running_loop()
        future: asyncio.Future[T] = loop.create_future()
        context = contextvars.copy_context()

        def job() -> None:
            result, error = _outcome(lambda: context.run(work))
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_deliver, future, result, error)

        self._start()
        self._jobs.put(job)
        try:
            await asyncio.wait({future}, timeout=seconds)
            if not future.done():
                self.stuck = True
                raise _too_long(what, seconds)
            return future.result()
        finally:
            future.cancel()  # what comes too late is dropped

    def stop(self) -> None:
        """No job will come any more."""
        self._jobs.put(None)

    def _start(self) -> None:
        if not self._started:
            self._started = True
            threading.Thread(target=self._serve, name=self._name, daemon=True).start()

    def _serve(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


def _outcome(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except StopIteration as problem:  # no future takes it
        return None, RuntimeError(f"StopIteration: {problem}")
    except Exception as problem:
        return None, problem
    except BaseException as problem:  # sys.exit() in an environment ends its episode, not the run
        return None, SessionError(f"the environment raised {type(problem).__name__}", "mend the environment")


def _deliver(future: asyncio.Future[Any], result: object, error: Exception | None) -> None:
    if future.done():
        return
    if error is None:
        future.set_result(result)
    else:
        future.set_exception(error)


def checked_result(given: object) -> ToolResult:
    """What a call gave, as a result that an episode can hold.

    Raises:
        SessionError: it is no text, it is a flood, or its features are no words.
    """
    result = ToolResult(given) if isinstance(given, str) else given
    if not isinstance(result, ToolResult) or not isinstance(result.text, str):
        raise SessionError(f"a call gave {type(given).__name__}, not text", "return text, or a ToolResult")
    if len(result.text) > MOST_CHARACTERS:
        what = f"a call gave {len(result.text):,} characters; an observation holds at most {MOST_CHARACTERS:,}"
        raise SessionError(what, "let the environment cut what it shows")
    return ToolResult(plain(result.text), bool(result.done), _checked_features(result.features))


def _checked_features(features: Mapping[str, str]) -> dict[str, str]:
    said = {name: value for name, value in features.items() if name != CAN}
    able = features.get(CAN, "")
    can = [able] if not isinstance(able, str) else able.split(OR) if able else []
    wrong = [one for one in (*said, *said.values(), *can) if not isinstance(one, str) or not _WORDS.fullmatch(one)]
    if wrong or len(said) > MOST_FEATURES:
        what = f"{wrong[0]!r:.60} is no feature" if wrong else f"{len(said)} features"
        raise SessionError(f"a call gave {what}", f"at most {MOST_FEATURES} names and values, of lower-case words")
    return dict(features)


def checked_reward(given: object) -> float | None:
    """A reward from an environment or a verifier.

    Raises:
        SessionError: it is no number from 0 to 1.
    """
    if given is None:
        return None
    reward = as_reward(given)
    if reward is None:
        raise SessionError(f"the reward is {given!r:.60}", "give a number from 0 to 1, or None where nothing can be said")
    return reward


def _refused(problem: ToolError) -> ToolResult:
    return ToolResult(checked_result(str(problem)).text or "error")


def _seen_as(text: str, seen: set[str]) -> str:
    """What can be said of any text, where the environment says nothing."""
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        return "empty"
    return "the same as before" if text in seen else "one line" if len(lines) == 1 else "several lines"


def _too_long(what: str, seconds: float) -> SessionError:
    return SessionError(f"{what} took longer than {seconds:g} seconds", "mend the environment, or raise rollout.max_seconds")
