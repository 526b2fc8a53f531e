"""Right is what is equal as mathematics: 1/2, 0.5 and \\frac{1}{2} are one answer (math-verify)."""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
import threading
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from concurrent.futures import TimeoutError as Late

from evolve_dag.errors import ModelError
from evolve_dag.records import Task
from evolve_dag.verification.exact import normalise

log = logging.getLogger(__name__)

SECONDS = 20.0
"""Longest wait for one comparison; the library's own limits are 5 seconds for each of its parts."""


class MathematicsVerifier:
    """Compares answer and reference with math-verify, in a process of its own.

    Simplifying an expression that a model wrote can take for ever, and math-verify stops it by a signal, which works in the
    main thread of a process only. A comparison that takes too long or brings its process down is None, "not judged".
    A reference that is no mathematics is compared as text.

    Raises:
        ModelError: math-verify is not installed.
    """

    def __init__(self) -> None:
        from importlib.util import find_spec

        if find_spec("math_verify") is None:
            raise ModelError(
                "verification.kind is mathematics, but math-verify is not installed", "pip install 'evolve-dag[math]'"
            )

    async def verify(self, task: Task, answer: str | None) -> float | None:
        """1.0 equal, 0.0 not, None when it could not be decided."""
        if answer is None or not answer.strip():
            return 0.0
        if normalise(answer) == normalise(task.answer):
            return 1.0
        return await asyncio.to_thread(_compare, task.answer, answer)


def _compare(reference: str, answer: str) -> float | None:
    pool = _pool()
    try:
        return pool.submit(_equal, reference, answer).result(SECONDS)
    except (Late, BrokenExecutor) as error:
        log.warning("not judged: comparing %.60r with %.60r: %s", answer, reference, type(error).__name__)
        _drop(pool)
        return None


def _equal(reference: str, answer: str) -> float | None:
    """Runs in the worker's main thread."""
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    try:
        gold = parse(_anchored(reference), raise_on_error=True)
        if not gold:
            return 0.0  # no mathematics, and not the same text
        # An answer in a sentence is searched for its last expression first; a bare expression is taken as LaTeX.
        candidates = (answer, _anchored(answer))
        return 1.0 if any(verify(gold, parse(one, raise_on_error=True), raise_on_error=True) for one in candidates) else 0.0
    except (TimeoutError, TimeoutException):
        return None
    except Exception as error:
        log.warning("not judged: %s", type(error).__name__)
        return None


def _anchored(text: str) -> str:
    """A bare expression between dollar signs, so that it is read as LaTeX; text that has an anchor stays."""
    return text if "$" in text or "\\boxed" in text or "\\(" in text else f"${text}$"


_lock = threading.Lock()
_current: ProcessPoolExecutor | None = None


def _pool() -> ProcessPoolExecutor:
    global _current
    with _lock:
        if _current is None:
            _current = ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn"))
            atexit.register(_drop, _current)
        return _current


def _drop(pool: ProcessPoolExecutor) -> None:
    """End a worker that hangs; the next comparison gets a new one."""
    global _current
    with _lock:
        if _current is pool:
            _current = None
    for process in list((getattr(pool, "_processes", None) or {}).values()):
        process.kill()
    pool.shutdown(wait=False, cancel_futures=True)
