"""Limits around what others wrote: a part from outside may raise, hang or end the interpreter, and only its call is lost.

Every call works in a thread of its own, so that one that never returns holds up nobody: its thread is left behind, and asked to
end (which ends an endless loop of Python, but no call into a library that never comes back).
"""

from __future__ import annotations

import asyncio
import ctypes
import inspect
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from contextvars import copy_context
from dataclasses import dataclass
from functools import wraps
from threading import Thread
from typing import Any, TypeVar

from evolve_dag.errors import EvolveError, PartError
from evolve_dag.secrecy import describe_error

T = TypeVar("T")

GRACE = 1.0
"""Seconds that a call has beyond its limit, so that what it awaits is ended from inside, in good order."""


class _GivenUpError(BaseException):
    """Raised in a thread that nobody waits for any more; no `except Exception` of a part keeps it."""


@dataclass(frozen=True, slots=True)
class Fence:
    """The limits of one part."""

    part: str
    """What messages call it: ``selector hybrid (evolve-hybrid 0.1.0)``."""
    seconds: float
    """Longest one call may take."""

    def run(self, function: Callable[..., T], *args: Any) -> T:
        """The result of ``function(*args)``; the caller waits.

        Raises:
            PartError: it raised, or took too long. Errors of our own family are raised as they are.
        """
        future, thread = self._start(function, args)
        try:
            return future.result(self.seconds + GRACE)
        except TimeoutError:
            raise self._late(future, thread) from None

    async def call(self, function: Callable[..., Any], *args: Any) -> Any:
        """As :meth:`run`, for a function or coroutine function, while the event loop goes on."""
        future, thread = self._start(function, args)
        try:
            return await asyncio.wait_for(asyncio.wrap_future(future), self.seconds + GRACE)
        except TimeoutError:
            raise self._late(future, thread) from None

    async def limited(self, work: Awaitable[Any]) -> Any:
        """The result of ``work`` in this event loop, for what belongs to it; only what it awaits can be cut off."""
        try:
            return await asyncio.wait_for(work, self.seconds)
        except TimeoutError:
            raise self._told_late() from None
        except EvolveError:
            raise
        except Exception as error:
            raise PartError(f"{self.part}: {describe_error(error)}", "mend the part") from error

    def around(self, function: Callable[..., T]) -> Callable[..., T]:
        """``function`` within these limits."""

        @wraps(function)
        def fenced(*args: Any) -> T:
            return self.run(function, *args)

        return fenced

    def nonsense(self, what: str) -> PartError:
        """The error for a result that is none: ``what`` says what came."""
        return PartError(f"{self.part}: {what}", "mend the part: docs/extending.md says what it has to give")

    def _start(self, function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Future[Any], Thread]:
        future: Future[Any] = Future()

        def work() -> None:
            with suppress(InvalidStateError):  # nobody waits for it any more
                try:
                    result = function(*args)
                    future.set_result(asyncio.run(self._awaited(result)) if inspect.isawaitable(result) else result)
                except InvalidStateError:
                    raise
                except EvolveError as error:
                    future.set_exception(error)
                except BaseException as error:  # SystemExit too: a part does not end the run
                    future.set_exception(self._told(error))

        thread = Thread(target=copy_context().run, args=(work,), name=self.part, daemon=True)
        thread.start()
        return future, thread

    async def _awaited(self, result: Awaitable[T]) -> T:
        try:
            return await asyncio.wait_for(result, self.seconds)
        except TimeoutError:
            raise self._told_late() from None

    def _told(self, error: BaseException) -> PartError:
        told = PartError(f"{self.part}: {describe_error(error)}", "mend the part")
        told.__cause__ = error
        return told

    def _told_late(self) -> PartError:
        return PartError(f"{self.part}: no answer within {self.seconds:g} s", "mend the part, or raise `seconds` in its row")

    def _late(self, future: Future[Any], thread: Thread) -> PartError:
        future.cancel()
        give_up(thread)
        return self._told_late()


def give_up(thread: Thread) -> None:
    """Ask a thread that nobody waits for any more to end what it does."""
    if thread.ident is not None:
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(_GivenUpError))
