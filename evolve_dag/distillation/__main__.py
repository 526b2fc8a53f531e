"""Train an adapter from files, in one process or in several that share the work.

    torchrun --standalone --nproc-per-node 2 -m evolve_dag.distillation request.json

The request is a :class:`~evolve_dag.distillation.launch.Request` as JSON. What is trained on is a contexts artifact's folder,
or several.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

from evolve_dag.distillation.dataset import load_contexts
from evolve_dag.distillation.launch import Request, train_here
from evolve_dag.distillation.parallel import Processes
from evolve_dag.distillation.trainer import CurvePoint, DistillationResult
from evolve_dag.errors import ConfigError, DataError, EvolveError, ModelError
from evolve_dag.secrecy import masker
from evolve_dag.store.faults import told
from evolve_dag.store.jsonvalues import from_values


class LostError(ModelError):
    """Another process of this training ended before its time: what it said itself is what went wrong."""


def train(request: Request) -> DistillationResult:
    """Do what is asked, together with the other processes if torchrun started several."""
    with _together(request.device) as device:
        rows = [row for folder in request.contexts for row in load_contexts(folder)]
        tells = request.attended and Processes.here().leads
        return train_here(replace(request, device=device), rows, on_step=_tell_step if tells else None)


@contextmanager
def _together(device: str) -> Iterator[str]:
    """Meet the other processes, if there are; gives the device of this one.

    Raises:
        ConfigError: there is no GPU for this process.
        LostError: another one is gone.
    """
    if "WORLD_SIZE" not in os.environ:
        yield device
        return
    import torch.distributed

    if device == "cuda":
        device = f"cuda:{_own_gpu()}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    except RuntimeError as error:
        if not (isinstance(error, torch.distributed.DistError) or "gloo" in str(error)):
            raise
        raise LostError(
            f"another process of this training is gone: {str(error).splitlines()[0]}",
            "its own message says why; the same command again goes on from the checkpoint",
        ) from error
    torch.distributed.destroy_process_group()  # not after an error: it may wait for the others


def _own_gpu() -> int:
    import torch

    own, there = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if own >= there:
        raise ConfigError(
            f"process {own + 1} of a training has no GPU: {there} are here",
            "start as many processes as there are GPUs (runtime.processes), or set runtime.device to cpu",
        )
    return own


def _tell_step(point: CurvePoint, total: int) -> None:
    print(json.dumps({"point": asdict(point), "total": total}), flush=True)


def _end_with_input() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    """Prints the result as JSON, the curve without speeds, from the first process."""
    if len(sys.argv) != 2:
        sys.exit("usage: [torchrun ... -m | python -m] evolve_dag.distillation REQUEST.json")
    path = Path(sys.argv[1])
    attended = False
    try:
        request = _read(path)
        attended = request.attended
        if attended:
            threading.Thread(target=_end_with_input, daemon=True).start()
        result = train(request)
    except Exception as error:
        if attended:
            if not isinstance(error, LostError):
                print(json.dumps({"failure": told(error)}), flush=True)
            sys.exit(masker()(traceback.format_exc()))  # into a file of the store
        if isinstance(error, EvolveError):
            sys.exit(str(error))
        raise
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(asdict(result), default=str), flush=True)


def _read(path: Path) -> Request:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}", "give a request as JSON") from error
    request = from_values(Request, values, str(path), "see evolve_dag/distillation/launch.py")
    if not request.contexts:
        raise DataError(f"{path}: contexts: missing", "name the folders of rows to train on")
    return request


if __name__ == "__main__":
    main()
