"""A training as a step asks for it: in this process, or in several on this machine, which torchrun starts.

The processes get files (:class:`Request`) and say on standard output how far they are and what went wrong, a line of JSON
each. They read standard input, which this side holds open: when it closes, whoever asked is gone and nobody needs the result.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from evolve_dag.config.schema import DistillationSettings, Regime, RuntimeSettings
from evolve_dag.distillation.dataset import DistillationRow, save_parts
from evolve_dag.distillation.trainer import CurvePoint, DistillationResult, Resample, distill, load_model
from evolve_dag.errors import EvolveError, ModelError
from evolve_dag.store.faults import disk_error, retold
from evolve_dag.store.jsonvalues import from_values, to_values

OnStep = Callable[[CurvePoint, int], None]

GIVEN = "given"
"""Folder beside the checkpoint for what the processes are given."""

FROM_RUNTIME = ("threads", "device", "tokens_per_pass", "activation_checkpointing", "shard")
"""Fields of a request that are settings of the same name under ``runtime``."""


@dataclass(frozen=True, slots=True)
class Request:
    """One training."""

    model: Path
    """Folder that ``from_pretrained`` reads."""
    out: Path
    """Folder for the adapter."""
    settings: DistillationSettings
    regime: Regime
    contexts: tuple[Path, ...] = ()
    """Folders of rows (:mod:`evolve_dag.distillation.dataset`), in order."""
    dtype: str = "float32"
    quantize: str = "none"
    """How the base is kept; ``nf4``: in 4 bit."""
    init_adapter: Path | None = None
    seed: int = 0
    training: int = 1
    threads: int = 1
    """Of each process."""
    device: str = "cpu"
    """``cuda`` gives every process the GPU of its local rank."""
    tokens_per_pass: int = 8192
    activation_checkpointing: bool = False
    shard: bool = False
    """Every process keeps a part of the base model's weights; needs several processes."""
    base: str = ""
    checkpoint: Path | None = None
    attended: bool = False
    """Whoever started the processes reads how far they are, and holds their standard input open."""


def train(
    request: Request,
    rows: Sequence[DistillationRow],
    runtime: RuntimeSettings,
    *,
    resample: Resample | None = None,
    on_step: OnStep,
) -> DistillationResult:
    """What :func:`~evolve_dag.distillation.trainer.distill` does, here or in as many processes as ``runtime`` says.

    Args:
        request: with a ``checkpoint``; what ``runtime`` says, and ``contexts``, are set here.

    Raises:
        ModelError: a process ended without a word.
        EvolveError: as ``distill``, wherever it runs.
    """
    request = replace(request, **{name: getattr(runtime, name) for name in FROM_RUNTIME})
    if runtime.processes == 1:
        return train_here(request, rows, resample=resample, on_step=on_step)
    if not rows:  # nothing is computed, so nothing of the model has to be on a device
        return train_here(replace(request, shard=False, device="cpu"), rows)
    assert request.checkpoint is not None
    folder = request.checkpoint / GIVEN
    shutil.rmtree(folder, ignore_errors=True)  # of a killed one
    given = replace(request, contexts=tuple(save_parts(folder, rows)), attended=True)
    result = _in_others(given, folder, runtime.processes, on_step)
    shutil.rmtree(folder, ignore_errors=True)
    return result


def train_here(
    request: Request,
    rows: Sequence[DistillationRow],
    *,
    resample: Resample | None = None,
    on_step: OnStep | None = None,
) -> DistillationResult:
    """:func:`~evolve_dag.distillation.trainer.distill` as requested, on ``rows``."""
    return distill(
        # A base that is to be spread goes to its device layer by layer.
        load_model(request.model, request.dtype, request.quantize, "cpu" if request.shard else request.device),
        rows,
        settings=request.settings,
        regime=request.regime,
        out=request.out,
        init_adapter=request.init_adapter,
        seed=request.seed,
        training=request.training,
        threads=request.threads,
        device=request.device,
        tokens_per_pass=request.tokens_per_pass,
        activation_checkpointing=request.activation_checkpointing,
        shard=request.shard,
        base=request.base,
        checkpoint=request.checkpoint,
        resample=resample,
        on_step=on_step,
    )


def _in_others(request: Request, folder: Path, processes: int, on_step: OnStep) -> DistillationResult:
    path, errors = folder / "request.json", folder / "errors.txt"
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, "-m", *torchrun, "-m", "evolve_dag.distillation", str(path.absolute())]
    environment = os.environ | {"OMP_NUM_THREADS": str(request.threads)}
    try:
        path.write_text(json.dumps(to_values(request)), encoding="utf-8")
        said = errors.open("w", encoding="utf-8")
    except OSError as error:
        raise disk_error(error, path) from error
    pipe = subprocess.PIPE
    with said, subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=said, text=True, env=environment) as started:
        try:
            result = _heard(started.stdout or (), on_step)
        except BaseException:
            started.terminate()
            raise
    if result is not None and started.returncode == 0:
        return result
    raise ModelError(
        f"training in {processes} processes ended without a word: {_ended(errors, started.returncode)}",
        f"{errors} has what they printed; where memory ran out set runtime.activation_checkpointing or lower "
        "runtime.tokens_per_pass; the same command goes on from the last checkpoint",
    )


def _heard(lines: Iterable[str], on_step: OnStep) -> DistillationResult | None:
    """What the processes say, to the end.

    Raises:
        EvolveError: what one of them says that went wrong.
    """
    failure: EvolveError | None = None
    result: DistillationResult | None = None
    for line in lines:
        told = _told(line)
        if "point" in told:
            on_step(CurvePoint(**told["point"]), told["total"])
        elif "failure" in told and failure is None:
            failure = retold(told["failure"])
        elif "curve" in told:
            result = from_values(DistillationResult, told, "the result of a training", "")
    if failure is not None:
        raise failure
    return result


def _told(line: str) -> dict[str, Any]:
    """Empty for what a library printed."""
    try:
        told = json.loads(line)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _ended(errors: Path, code: int) -> str:
    """How the process ended that ended first, as torchrun says in its last lines."""
    found = re.findall(r"exitcode\s*: (-?\d+)", errors.read_text(encoding="utf-8", errors="replace"))
    first = int(found[-1]) if found else code
    return f"one was killed by {signal.Signals(-first).name}" if first < 0 else f"exit code {first}"
