"""Train an adapter from files, in one process or in several that share the work.

    torchrun --standalone --nproc-per-node 2 -m evolve_dag.distillation request.json

The request is a :class:`Request` as JSON. What is trained on is a contexts artifact's folder, or several.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from evolve_dag.config.schema import DistillationSettings, Regime
from evolve_dag.distillation.dataset import load_contexts
from evolve_dag.distillation.trainer import DistillationResult, distill, load_model
from evolve_dag.errors import DataError, EvolveError
from evolve_dag.store.jsonvalues import from_values


@dataclass(frozen=True, slots=True)
class Request:
    """One training."""

    model: str
    """Folder that ``from_pretrained`` reads."""
    contexts: list[str]
    """Folders of rows (:mod:`evolve_dag.distillation.dataset`), in order."""
    out: str
    """Folder for the adapter."""
    settings: DistillationSettings
    regime: Regime
    dtype: str = "float32"
    quantize: str = "none"
    """How the base is kept; ``nf4``: in 4 bit."""
    init_adapter: str | None = None
    seed: int = 0
    iteration: int = 1
    threads: int = 1
    """Of each process."""
    device: str = "cpu"
    """``cuda`` gives every process the GPU of its local rank."""
    tokens_per_pass: int = 8192
    activation_checkpointing: bool = False
    base: str = ""
    checkpoint: str | None = None


def train(request: Request) -> DistillationResult:
    """Do what is asked, together with the other processes if torchrun started several."""
    with ExitStack() as stack:
        device = _join(request.device, stack)
        return distill(
            load_model(request.model, request.dtype, request.quantize, device),
            [row for folder in request.contexts for row in load_contexts(Path(folder))],
            settings=request.settings,
            regime=request.regime,
            out=Path(request.out),
            init_adapter=None if request.init_adapter is None else Path(request.init_adapter),
            seed=request.seed,
            iteration=request.iteration,
            threads=request.threads,
            device=device,
            tokens_per_pass=request.tokens_per_pass,
            activation_checkpointing=request.activation_checkpointing,
            base=request.base,
            checkpoint=None if request.checkpoint is None else Path(request.checkpoint),
        )


def _join(device: str, stack: ExitStack) -> str:
    """Meet the other processes; the device of this one."""
    if "WORLD_SIZE" not in os.environ:
        return device
    import torch.distributed

    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    torch.distributed.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    stack.callback(torch.distributed.destroy_process_group)
    return device


def main() -> None:
    """Prints the result as JSON, the curve without speeds, from the first process."""
    if len(sys.argv) != 2:
        sys.exit("usage: [torchrun ... -m | python -m] evolve_dag.distillation REQUEST.json")
    path = Path(sys.argv[1])
    try:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {error}", "give a request as JSON") from error
        result = train(from_values(Request, values, str(path), "see evolve_dag/distillation/__main__.py"))
    except EvolveError as error:
        sys.exit(str(error))
    if os.environ.get("RANK", "0") == "0":
        print(json.dumps(asdict(result), default=str))


if __name__ == "__main__":
    main()
