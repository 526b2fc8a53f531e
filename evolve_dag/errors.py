"""One exception family. Every message says what, where and how to mend it.

Each class also derives from the standard type that fits, so a caller who knows nothing of evolve-dag
can still catch ``ValueError`` or ``OSError``.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar


class EvolveError(Exception):
    """Root of the family.

    Args:
        what: the problem, with the culprit (file, key, id) in it.
        remedy: what the reader should do next; shown after a line break.
    """

    passing = False
    """Whether the same may go well another night though nobody has mended anything here: something was out of reach, another
    run had it, or it was not its turn."""

    def __init__(self, what: str, remedy: str = "") -> None:
        self.what = what
        self.remedy = remedy
        super().__init__(f"{what}\n  remedy: {remedy}" if remedy else what)


class ConfigError(EvolveError, ValueError):
    """An experiment file is wrong; lists all mistakes at once."""


class PartError(EvolveError, RuntimeError):
    """A part that others wrote cannot be used, or failed at what it was asked."""


class DataError(EvolveError, ValueError):
    """A user's file (tasks, corpus, pool) cannot be used as it is."""


class StoreError(EvolveError, OSError):
    """An artifact is missing, corrupt or cannot be written."""


class AwayError(StoreError):
    """An artifact is not here, and where else it may be cannot be looked at now: it is not known to be gone."""

    passing = True


class ConcurrencyError(EvolveError, RuntimeError):
    """Another run holds what this run needs."""

    passing = True


class OrderError(EvolveError, RuntimeError):
    """A step was asked for before what it needs exists (iteration k before promotion of k-1)."""

    passing = True


class ModelError(EvolveError, RuntimeError):
    """A language model cannot be loaded or called."""


class ClosedError(ModelError):
    """A model was closed while it was asked, since the work is being stopped: this says nothing about an episode."""


class UnreachableError(ModelError):
    """A model or a service (search) cannot be asked at all: its endpoint or engine is down, or takes neither key nor account.
    It says nothing about whoever asked, or would have been asked."""

    passing = True


class ContextOverflowError(ModelError):
    """A conversation is longer than the model takes: an acting policy brought that upon itself, no machinery failed."""


class ExhaustedError(EvolveError, MemoryError):
    """Memory ran out however little was asked for at once: the work stops. It says nothing about an episode, an answer or a
    verdict, so it is no :class:`ModelError`, which they take."""


class SessionError(EvolveError, RuntimeError):
    """An environment broke one episode: it hangs, floods, or gives what an episode cannot hold."""


class UnjudgedError(EvolveError, RuntimeError):
    """Most episodes of a step have no verdict, for reasons that lie outside of the policy: nothing is made of them."""

    passing = True


class AlignmentError(EvolveError, ValueError):
    """Student and teacher views do not share the same action ids, or history holds experience."""


def out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: Python's, or a device's, which has an error of torch's, or words only."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED", "bad_alloc")
    named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return named or (isinstance(error, RuntimeError) and any(one in str(error) for one in words))


def first_line(error: BaseException) -> str:
    """Of what an error says; its type's name where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def exhausted(what: str, error: BaseException) -> ExhaustedError:
    """That there is no memory for ``what``."""
    return ExhaustedError(f"{what}: there is no memory for it: {first_line(error)}", "free memory of the device")


_slice_errors: ContextVar[list[SliceError] | None] = ContextVar("slice_errors", default=None)


class SliceError(EvolveError, RuntimeError):
    """A step reads a setting, a model or a prompt that is not in its digest: it would be served stale results."""

    def __init__(self, what: str, remedy: str = "") -> None:
        super().__init__(what, remedy)
        if (seen := _slice_errors.get()) is not None:
            seen.append(self)


@contextmanager
def no_slice_error() -> Iterator[None]:
    """Raises, at its end, also a :class:`SliceError` that was caught inside: an episode that failed for it is no result."""
    seen: list[SliceError] = []
    token = _slice_errors.set(seen)
    try:
        yield
    finally:
        _slice_errors.reset(token)
    if seen:
        raise seen[0]
