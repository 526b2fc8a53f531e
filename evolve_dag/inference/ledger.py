"""What the language models were asked and what it cost: one line a call, kept across kills.

A line is written when a call has its outcome, whatever that is: a failed call may have been paid as well. A step that
is killed and resumed goes on in the same file, so the calls that the killed process paid still count.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from evolve_dag.protocols import Completion, LanguageModel, Request
from evolve_dag.records import Call

_purpose: ContextVar[str] = ContextVar("evolve_dag_purpose", default="")


_FIELDS = tuple(field.name for field in fields(Call))
_SUMMED = ("attempts", "prompt_tokens", "cached_tokens", "completion_tokens", "seconds")


class Ledger:
    """An append-only list of calls; safe to use from many threads.

    Args:
        path: file of JSON lines. What it already holds counts: those calls were made and paid. None keeps the calls in
            memory only.

    Lines are flushed to the operating system, not forced to the disk: a killed process loses nothing, a power cut may
    lose the last calls.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.torn = 0
        """Lines of the file that could not be read: a process was killed while it wrote one. They count as no call."""
        self._lock = threading.Lock()
        self._calls: list[Call] = []
        self._torn_end = False
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                self._read(path.read_bytes())

    def record(self, call: Call) -> None:
        """Append one call.

        Raises:
            OSError: the file cannot be written.
        """
        line = json.dumps(asdict(call), ensure_ascii=False, separators=(",", ":")) if self.path is not None else ""
        with self._lock:
            if self.path is not None:
                # One write to a file opened for appending: lines of several processes do not mix.
                start = "\n" if self._torn_end else ""
                data = f"{start}{line}\n".encode("utf-8", "replace")
                handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
                try:
                    while data:
                        data = data[os.write(handle, data) :]
                finally:
                    os.close(handle)
                self._torn_end = False
            self._calls.append(call)

    def calls(self) -> list[Call]:
        """What the file held when it was opened, then what was recorded here, in order."""
        with self._lock:
            return list(self._calls)

    def totals(self) -> dict[str, dict[str, Any]]:
        """:func:`summarize` of all calls, per role."""
        return summarize(self.calls())

    def _read(self, content: bytes) -> None:
        lines = content.split(b"\n")
        self._torn_end = bool(lines[-1])
        for line in lines:
            if line.strip():
                call = _parse(line)
                if call is None:
                    self.torn += 1
                else:
                    self._calls.append(call)


def summarize(calls: Iterable[Call], by: Literal["role", "model", "purpose"] = "role") -> dict[str, dict[str, Any]]:
    """Sums over calls, per value of ``by``, in order of appearance.

    Returns:
        Value -> ``calls``, ``errors``, ``attempts``, ``prompt_tokens``, ``cached_tokens``, ``completion_tokens``,
        ``seconds`` (sum of wall times: concurrent calls count each), ``cost`` and ``cut`` (calls that were cut to fit).
        ``cost`` is the price of *all* calls in US dollars or None: where the cost of one successful call is unknown no
        number is given, for a partial sum reads like the price. A failed call of unknown cost counts as 0: what an
        endpoint charges for an error is not stated anywhere, and mostly nothing.
    """
    sums: dict[str, dict[str, Any]] = {}
    for call in calls:
        row = sums.setdefault(
            getattr(call, by), {"calls": 0, "errors": 0, **dict.fromkeys(_SUMMED, 0), "seconds": 0.0, "cost": 0.0, "cut": 0}
        )
        row["calls"] += 1
        row["errors"] += call.outcome == "error"
        row["cut"] += call.cut_characters > 0
        for name in _SUMMED:
            row[name] += getattr(call, name)
        if call.cost is None:
            if call.outcome == "ok":
                row["cost"] = None
        elif row["cost"] is not None:
            row["cost"] += call.cost
    return sums


@contextmanager
def purpose(name: str) -> Iterator[None]:
    """Calls inside this block, tasks started there included, are recorded with ``name`` as what they are for."""
    token = _purpose.set(name)
    try:
        yield
    finally:
        _purpose.reset(token)


def current_purpose() -> str:
    """Name of the innermost :func:`purpose` block; '' outside of any."""
    return _purpose.get()


class Metered:
    """A model whose calls are recorded; for backends that do not record themselves.

    Each call counts as one attempt; its cost is unknown (the model runs here). Anything but the three methods of
    :class:`~evolve_dag.protocols.LanguageModel` is read from the model underneath.
    """

    def __init__(self, model: LanguageModel, role: str, model_name: str, ledger: Ledger, purpose: str = "") -> None:
        self.inner = model
        self._role, self._model_name, self._ledger, self._default_purpose = role, model_name, ledger, purpose

    async def generate(self, request: Request) -> Completion:
        """The model's completion; recorded, an exception too.

        Raises:
            ModelError: as the model underneath.
        """
        from evolve_dag.secrecy import describe_error

        started = time.monotonic()
        try:
            completion = await self.inner.generate(request)
        except Exception as error:
            self._record(started, None, describe_error(error))
            raise
        self._record(started, completion, None)
        return completion

    def release(self, session: str) -> None:
        self.inner.release(session)

    async def close(self) -> None:
        await self.inner.close()

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not set yet: a copy is being made
            raise AttributeError(name)
        return getattr(self.inner, name)

    def _record(self, started: float, completion: Completion | None, error: str | None) -> None:
        self._ledger.record(
            Call(
                role=self._role,
                model=self._model_name,
                purpose=current_purpose() or self._default_purpose,
                outcome="ok" if completion is not None else "error",
                attempts=1,
                prompt_tokens=completion.prompt_tokens if completion is not None else 0,
                cached_tokens=completion.cached_tokens if completion is not None else 0,
                completion_tokens=len(completion.token_ids) if completion is not None else 0,
                seconds=time.monotonic() - started,
                cost=None,
                error=error,
                cut_characters=completion.cut_characters if completion is not None else 0,
            )
        )


def metered(model: LanguageModel, role: str, model_name: str, ledger: Ledger, purpose: str = "") -> LanguageModel:
    """``model`` with every call recorded in ``ledger``; ``purpose`` names calls outside of any :func:`purpose` block."""
    return Metered(model, role, model_name, ledger, purpose)


def _parse(line: bytes) -> Call | None:
    try:
        value = json.loads(line)
        return Call(**{name: value[name] for name in _FIELDS})
    except (ValueError, TypeError, KeyError):  # ValueError: not JSON, or not UTF-8
        return None
