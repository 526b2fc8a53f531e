"""Who runs an experiment, across machines: a lease on object storage, beside the lock on this machine.

The holder writes *terms*, ``leases/<experiment>/<number>.json``: it creates the next number, by a write that fails where the
name is taken, so of two machines one gets it; and writes its end anew every :data:`RENEW_SECONDS`. A term ends when it is
given back, or :data:`TERM_SECONDS` after the last sign of life of its holder, by the clocks of the machines. Who lets it run
out finds at the next renewal that there is a higher number, and may set no ref any more. The store of a killed process takes
its own term over at once: the lock on that machine, which it holds, proves that the process is gone.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

from evolve_dag.errors import ConcurrencyError
from evolve_dag.secrecy import describe_error
from evolve_dag.store.disk import write_atomic

log = logging.getLogger(__name__)

TERM_SECONDS = 180.0
"""A holder without a sign of life for that long has lost its term."""
RENEW_SECONDS = 30.0
PREFIX = "leases"


class Objects(Protocol):
    """What a lease needs of object storage; any call may raise what the storage raises."""

    def names(self, folder: str) -> Iterable[str]: ...

    def read(self, name: str) -> bytes | None: ...

    def write(self, name: str, content: bytes) -> None: ...

    def create(self, name: str, content: bytes) -> bool:
        """Write what is not there yet, in one go; False where it is."""

    def remove(self, names: Iterable[str]) -> None:
        """Remove objects that nobody needs; may do nothing."""


@dataclass(frozen=True, slots=True)
class Term:
    """One holder's time."""

    holder: str
    """Which store on which machine, and nothing else."""
    who: str
    """For people: machine and process."""
    since: str
    """ISO 8601, UTC."""
    until: float
    """Seconds of the epoch; 0: given back."""
    token: str
    """Its own, so that a holder knows what it wrote."""


def holder_of(root: Path) -> str:
    """What stands for a store folder on a machine: a copy of the folder on another machine is another holder."""
    path = root / "mirror" / "holder"
    try:
        own = path.read_text(encoding="ascii").strip()
    except OSError:
        own = uuid.uuid4().hex
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, own.encode())
    return f"{own}@{socket.gethostname()}"


class Lease:
    """The lease of one experiment, as one process holds it.

    Args:
        holder: as :func:`holder_of`.
        where: the storage's address, for messages.
    """

    def __init__(self, objects: Objects, experiment: str, holder: str, where: str) -> None:
        self.experiment = experiment
        self._objects, self._holder, self._where = objects, holder, where
        self._number = 0
        self._term: Term | None = None
        self._taken_by: Term | None = None
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def acquire(self) -> Term | None:
        """Take the next term; gives the term of another holder where that one still lasts."""
        number, newest = self._newest()
        if newest is not None and newest.until > time.time() and newest.holder != self._holder:
            return newest
        who = f"process {os.getpid()} on {socket.gethostname()}"
        since = datetime.now(UTC).isoformat(timespec="seconds")
        mine = Term(self._holder, who, since, time.time() + TERM_SECONDS, uuid.uuid4().hex)
        created = self._objects.create(self._name(number + 1), _content(mine))
        last, newest = self._newest()
        if not created or (last, newest) != (number + 1, mine):
            return newest or replace(mine, who="another machine")
        self._number, self._term = last, mine
        self._objects.remove(self._name(n) for n in range(max(1, last - 8), last))
        self._thread = threading.Thread(target=self._renew_until_released, daemon=True, name=f"lease of {self.experiment}")
        self._thread.start()
        return None

    def release(self) -> None:
        """Give the term back, as long as it is ours."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        if self._term is not None and self._taken_by is None:
            self._objects.write(self._name(self._number), _content(replace(self._term, until=0.0)))

    def check(self) -> None:
        """Raises ConcurrencyError where another machine has taken over.

        A term that has run out is looked at now: who was asleep wakes up before its next renewal.
        """
        if self._term is not None and self._taken_by is None and self._term.until <= time.time():
            self._try_to_renew()
        if self._taken_by is not None:
            raise ConcurrencyError(
                f"experiment {self.experiment!r} was taken over by {self._taken_by.who}: this process gave no sign of life to "
                f"{self._where} for {TERM_SECONDS:.0f} s",
                "let the other one go on; what was made here is kept",
            )

    def refusal(self, term: Term) -> ConcurrencyError:
        """What to say where another one holds it."""
        left = max(0.0, term.until - time.time())
        return ConcurrencyError(
            f"experiment {self.experiment!r} is being run by {term.who} since {term.since} (lease in {self._where})",
            f"wait until it has ended, or end it there; if that machine is gone, its lease ends by itself in {left:.0f} s",
        )

    def renew(self) -> None:
        """Write that the holder still lives, unless another one has taken over."""
        assert self._term is not None
        last, newest = self._newest()
        if last > self._number:
            self._taken_by = newest or self._term
            log.error("the lease of %s was taken over by %s", self.experiment, self._taken_by.who)
            return
        self._term = replace(self._term, until=time.time() + TERM_SECONDS)
        self._objects.write(self._name(self._number), _content(self._term))

    def _renew_until_released(self) -> None:
        while self._taken_by is None and not self._stop.wait(RENEW_SECONDS):
            self._try_to_renew()

    def _try_to_renew(self) -> None:
        try:
            self.renew()
        except Exception as error:  # whatever the storage raises: the term lasts a while, and the next renewal may succeed
            log.warning("the lease of %s was not renewed: %s", self.experiment, describe_error(error))

    def _newest(self) -> tuple[int, Term | None]:
        """The highest number, and its term; None where that is not written yet, and will not be: its writer looks again."""
        numbers = [
            int(stem) for name in self._objects.names(f"{PREFIX}/{self.experiment}") if (stem := Path(name).stem).isdecimal()
        ]
        last = max(numbers, default=0)
        content = self._objects.read(self._name(last)) if last else None
        return last, _term(content)

    def _name(self, number: int) -> str:
        return f"{PREFIX}/{self.experiment}/{number:09d}.json"


def _content(term: Term) -> bytes:
    return json.dumps(asdict(term)).encode()


def _term(content: bytes | None) -> Term | None:
    try:
        values = json.loads(content or b"")
        return Term(values["holder"], values["who"], values["since"], float(values["until"]), values["token"])
    except (ValueError, KeyError, TypeError):
        return None
