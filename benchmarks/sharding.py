"""A base in parts against a whole one, side by side: what each process holds, and how long a step takes.

    torchrun --standalone --nproc-per-node 2 benchmarks/sharding.py [LAYERS]

A random Llama of 12 layers (45 million parameters, float32), 2 rounds of each, in turn. Without a GPU the processes meet by
gloo on one machine: the bytes are what they are anywhere, the times are not.
"""

from __future__ import annotations

import ctypes
import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from memory import resident
from transformers import LlamaConfig, LlamaForCausalLM

from evolve_dag.config.schema import DistillationSettings, Regime
from evolve_dag.distillation import trainer
from evolve_dag.distillation.alignment import StudentRow
from evolve_dag.distillation.dataset import DistillationRow, StepView

ROUNDS, ROWS, TOKENS = 2, 4, 96
MIB = 2**20


def rows() -> list[DistillationRow]:
    made = []
    for number in range(ROWS):
        ids = tuple(random.Random(number).choices(range(1000), k=TOKENS))
        row = StudentRow(f"t{number}", ids, (0,), ((TOKENS - 40, TOKENS),))
        made.append(DistillationRow(row, (StepView(0, (), "", 0),), None, False))
    return made


def memory() -> dict[str, int]:
    """MiB that are this process's own, and the most there have been; what the C library only keeps for later is given back."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    return {name: resident(name) // 2**20 for name in ("RssAnon", "RssFile", "VmHWM")}


def held(model: Any) -> int:
    frozen = {id(one): one for one in model.parameters() if not one.requires_grad}
    return sum((one.to_local() if hasattr(one, "to_local") else one).nbytes for one in frozen.values())


def main() -> None:
    layers = int(sys.argv[1]) if len(sys.argv) > 1 else 12
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shared = [tempfile.mkdtemp()]
    dist.broadcast_object_list(shared)
    folder = Path(shared[0])
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "vocab_size": 8192}
    config = LlamaConfig(**shape, num_hidden_layers=layers, tie_word_embeddings=True)
    if not dist.get_rank():
        LlamaForCausalLM(config).save_pretrained(folder)
    dist.barrier()
    settings = DistillationSettings(rank=8, alpha=16, epochs=3, tokens_per_batch=ROWS * TOKENS)
    seconds: dict[bool, list[float]] = {False: [], True: []}
    busy: dict[bool, list[float]] = {False: [], True: []}
    told: dict[bool, Any] = {}
    step = trainer._Run._step
    for number in range(2 * ROUNDS):
        shard = bool(number % 2)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = memory()

        def watched(run: Any, *given: Any, shard: bool = shard, before: dict[str, int] = before) -> Any:
            begun = time.process_time()
            point = step(run, *given)
            if point.step:
                seconds[shard].append(point.tokens / point.tokens_per_second)
                busy[shard].append(time.process_time() - begun)
            now = memory()
            told[shard] = {"base MiB": held(run.wrapped) // MIB, **{key: now[key] - before[key] for key in now}}
            return point

        trainer._Run._step = watched  # type: ignore[method-assign]
        trainer.distill(
            trainer.load_model(folder),
            rows(),
            settings=settings,
            regime=Regime(divergence="cross_entropy"),
            out=folder / f"{shard}-{dist.get_rank()}",
            tokens_per_pass=2 * TOKENS,
            shard=shard,
        )
    clock, cpu = (median(found[True]) / median(found[False]) for found in (seconds, busy))
    print(f"process {dist.get_rank()}: whole {told[False]}, in parts {told[True]}", flush=True)
    print(f"a step: {clock:.2f} x by the clock, {cpu:.2f} x CPU seconds", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
