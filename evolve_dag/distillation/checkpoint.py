"""Where a training stands, on disk, so that a killed one goes on.

One file, written whole or not at all: a line with the hash of the rest, then the tensors (LoRA weights, moments of Adam) with
the facts (counters, curve) in their header. Rows that were sampled while training lie beside it. Everything else that decides
how training goes on follows from its arguments; ``run`` is the hash of those, and a checkpoint of another run is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve_dag.distillation.dataset import DistillationRow, load_contexts, save_parts
from evolve_dag.errors import StoreError
from evolve_dag.store.disk import write_atomic
from evolve_dag.store.faults import disk_error

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

SECONDS = 15.0
"""Least time between two checkpoints."""

SHARE = 0.01
"""Least share of all steps between two checkpoints: a run writes about a hundred of them at most."""

STATE = "training.state"
ANEW = "training begins anew"


@dataclass(frozen=True, slots=True)
class State:
    """What a checkpoint holds."""

    tensors: Mapping[str, Tensor]
    facts: Mapping[str, Any]
    """JSON values."""
    rows_of: int = 0
    """Resampling round of the rows that training goes on with; 0 for those that were given."""
    rows: Sequence[DistillationRow] = ()
    """These rows; empty for those that were given."""


@dataclass(slots=True)
class Checkpoint:
    """The checkpoint of one training."""

    folder: Path
    run: str
    """Hash of everything that decides the training (:func:`fingerprint`)."""
    refused: str = ""
    """Why a checkpoint that was there is not used; '' when there is nothing to say."""
    _saved: float = field(default_factory=lambda: time.monotonic())
    _steps: int = 0
    """Steps of the training that the last one holds."""

    def due(self, steps: int, total: int) -> bool:
        """Whether to save after ``steps`` of ``total``: a kill costs the work of :data:`SECONDS` and a step, or 1% of all."""
        return steps - self._steps >= SHARE * total and time.monotonic() - self._saved >= SECONDS

    def save(self, state: State, steps: int) -> None:
        """Replace what is there; :meth:`save_rows` comes first where the state goes on with sampled rows.

        Args:
            steps: taken so far.

        Raises:
            StoreError: the disk is full or broken; the earlier checkpoint stands.
        """
        from safetensors.torch import save

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.tensors.items()}
        told = {"run": self.run, "facts": json.dumps(state.facts), "round": str(state.rows_of), "rows": str(len(state.rows))}
        body = save(tensors, metadata=told)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_atomic(self.folder / STATE, hashlib.sha256(body).hexdigest().encode("ascii") + b"\n" + body)
        except OSError as error:
            raise disk_error(error, self.folder / STATE) from error
        self._saved, self._steps = time.monotonic(), steps

    def load(self) -> State | None:
        """What was saved last; None when there is nothing, or nothing that may be used (:attr:`refused` says why)."""
        try:
            return self._read()
        except StoreError as error:
            self.refused = f"the checkpoint {error.what}: {error.remedy}"
            log.warning("%s: %s", self.folder / STATE, self.refused)
            return None

    def _read(self) -> State | None:
        from safetensors.torch import load

        try:
            told, _, body = (self.folder / STATE).read_bytes().partition(b"\n")
        except FileNotFoundError:
            return None
        except OSError as error:
            raise StoreError(f"cannot be read: {error.strerror}", ANEW) from error
        if hashlib.sha256(body).hexdigest().encode("ascii") != told:
            raise StoreError("is cut off or was changed", ANEW)
        header = json.loads(body[8 : 8 + int.from_bytes(body[:8], "little")])["__metadata__"]
        if header["run"] != self.run:
            raise StoreError("belongs to another training (other rows, settings, model or start)", ANEW)
        number = int(header["round"])
        rows = self._load_rows(number) if number else []
        if len(rows) != int(header["rows"]):
            raise StoreError(f"lacks its sampled rows ({len(rows)} of {header['rows']} are there)", ANEW)
        return State(load(body), json.loads(header["facts"]), number, rows)

    def save_rows(self, number: int, rows: Sequence[DistillationRow]) -> None:
        """Keep the rows of a resampling round; they count once a state names the round.

        Raises:
            StoreError: they cannot be written.
        """
        shutil.rmtree(self._round(number), ignore_errors=True)
        save_parts(self._round(number), rows)

    def _load_rows(self, number: int) -> list[DistillationRow]:
        try:
            return [row for folder in sorted(self._round(number).glob("part-*")) for row in load_contexts(folder)]
        except StoreError as error:
            raise StoreError(f"lacks its sampled rows ({error.what})", ANEW) from error

    def _round(self, number: int) -> Path:
        return self.folder / f"round-{number}"


def fingerprint(rows: Sequence[DistillationRow], start: Mapping[str, Tensor], **values: Any) -> str:
    """Hash of what decides a training.

    Args:
        rows: as given, in their order.
        start: trainable weights that it begins with.
        values: settings and numbers, as JSON values.
    """
    found = hashlib.sha256(json.dumps(values, sort_keys=True).encode())
    for row in rows:
        found.update(repr((row.row, row.retention)).encode())
        if row.teacher is not None:
            found.update(row.teacher.logprobs.tobytes())
    for name, tensor in start.items():
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()
