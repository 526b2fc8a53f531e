"""Right is what is equal as mathematics: 1/2, 0.5 and \\frac{1}{2} are one answer (math-verify)."""

from __future__ import annotations

import asyncio
import atexit
import logging
import multiprocessing
import threading
from concurrent.futures import BrokenExecutor, CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late
from typing import Literal

from evolve_dag.config.parts import VerificationSettings
from evolve_dag.errors import ModelError
from evolve_dag.records import Task
from evolve_dag.verification.base import VerifierPart
from evolve_dag.verification.equality import equal
from evolve_dag.verification.exact import equals, references

log = logging.getLogger(__name__)

READING = "reading 4"
"""How an answer is read, a part of what verdicts are: what was scored by an earlier reading, which was wrong at times, does not
stand for what is scored now."""
SECONDS = 20.0
"""Longest wait for one comparison; the library's own limits are 5 seconds for each of its parts."""


class MathematicsVerifier:
    """Compares answer and reference with math-verify, in a process of its own.

    Simplifying an expression that a model wrote can take for ever, and math-verify stops it by a signal, which works in the
    main thread of a process only. A comparison that takes too long or brings its process down is None, "not judged".
    A reference that is no mathematics is compared as text.

    Lenient in prose, where the last expression counts: "72 or 73" is right where 73 is. What is an expression is judged whole.

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
        if equals(task, answer):
            return 1.0
        loop = asyncio.get_running_loop()
        verdicts = []
        for reference in references(task):
            verdicts.append(await loop.run_in_executor(_turns, _compare, reference, answer))
            if verdicts[-1] == 1.0:
                return 1.0
        return None if None in verdicts else 0.0


_turns = ThreadPoolExecutor(1, "mathematics")
"""One comparison at a time, so that the clock of each runs for it alone; the others wait here, for no slow one's fault."""


def _compare(reference: str, answer: str) -> float | None:
    pool = _pool()
    try:
        return pool.submit(equal, reference, answer).result(SECONDS)
    except (Late, BrokenExecutor, CancelledError) as error:
        log.warning("not judged: comparing %.60r with %.60r: %s", answer, reference, type(error).__name__)
        _drop(pool)
        return None


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


class MathematicsVerification(VerificationSettings):
    """Equal as mathematics (math-verify). In a sentence the last expression counts: "72 or 73" is right where 73 is."""

    kind: Literal["mathematics"] = "mathematics"
    """The answer equals the reference as mathematics."""


MATHEMATICS = VerifierPart(
    settings=MathematicsVerification,
    make=lambda settings, roles: MathematicsVerifier(),
    libraries={"math_verify": "math"},
    data=lambda settings: READING,
)
