"""What more cores give: a pocket iteration by ``runtime.threads``, a training by ``runtime.processes``.

    python benchmarks/cores.py night 1 2 4 8         # seconds of each step of night 1 of configs/pocket.yaml
    python benchmarks/cores.py training 1 2 4        # tokens a second of one thread each, same rows and batches

Every number is a run of its own, held to as many cores as it has threads or processes (of those that this process may use;
``taskset`` chooses), one after the other. Seconds by the clock: the cores must be idle.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from statistics import median

TRAINED = "trained"
"""The word by which torchrun's processes are told apart from the one that starts them."""
ROWS, TOKENS, EPOCHS = 16, 512, 3


def seconds_of_steps(threads: int, clock: Callable[[], float]) -> dict[str, float]:
    """Step -> seconds by ``clock``, for night 1 of configs/pocket.yaml in a store of its own."""
    from evolve_dag.config.loading import load_experiment
    from evolve_dag.steps.base import STEP_ORDER, run_step
    from evolve_dag.store.artifacts import Store

    experiment = load_experiment(Path(__file__).parents[1] / "configs" / "pocket.yaml")
    experiment = experiment.model_copy(update={"runtime": experiment.runtime.model_copy(update={"threads": threads})})
    spent = {}
    with tempfile.TemporaryDirectory() as folder:
        for step in STEP_ORDER:
            started = clock()
            run_step(step, experiment, 1, Store(folder))
            spent[step] = clock() - started
    return spent


def told(spent: Mapping[str, float]) -> str:
    """The steps that take long enough to be told."""
    return ", ".join(f"{step} {seconds:.1f}" for step, seconds in spent.items() if seconds >= 0.5)


def night(threads: int, cores: list[int]) -> None:
    os.sched_setaffinity(0, cores[:threads])
    spent = seconds_of_steps(threads, time.perf_counter)
    print(f"night 1, {threads} threads: {sum(spent.values()):.1f} s ({told(spent)})", flush=True)


def training(processes: int, cores: list[int]) -> None:
    """A random Llama of 25 million parameters; batches of 4K tokens, 15% of them actions, forward KL over the top 64."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    given = ",".join(map(str, cores[:processes]))
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([*command, __file__, TRAINED, given, folder], check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def trained(cores: list[int], folder: Path) -> None:
    import torch
    import torch.distributed as dist
    from memory import random_row
    from transformers import LlamaConfig, LlamaForCausalLM

    from evolve_dag.config.schema import DistillationSettings, Regime
    from evolve_dag.distillation.trainer import CurvePoint, distill

    dist.init_process_group("gloo")
    os.sched_setaffinity(0, {cores[dist.get_rank()]})
    torch.set_num_threads(1)
    torch.manual_seed(0)
    shape = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "vocab_size": 8192}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=6, tie_word_embeddings=True))
    settings = DistillationSettings(rank=8, alpha=16, epochs=EPOCHS, tokens_per_batch=ROWS * TOKENS // 2)
    points: list[CurvePoint] = []
    distill(
        model,
        [random_row(TOKENS, 8192, 64, number) for number in range(ROWS)],
        settings=settings,
        regime=Regime(),
        out=folder / str(dist.get_rank()),
        on_step=lambda point, _: points.append(point),
        threads=1,
    )
    if not dist.get_rank():
        rate = median(point.tokens_per_second for point in points[1:])
        print(f"training, {dist.get_world_size()} processes: {rate:.0f} tokens/s, last loss {points[-1].loss:.6f}", flush=True)
    dist.destroy_process_group()


def main() -> None:
    if sys.argv[1:2] == [TRAINED]:
        trained([int(core) for core in sys.argv[2].split(",")], Path(sys.argv[3]))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("part", choices=["night", "training"])
    parser.add_argument("counts", nargs="+", type=int, metavar="N")
    given = parser.parse_args()
    cores = sorted(os.sched_getaffinity(0))
    if max(given.counts) > len(cores):
        parser.error(f"{max(given.counts)} were asked for, this process may use {len(cores)} cores")
    for count in given.counts:
        if given.part == "training":
            training(count, cores)
        else:  # a process of its own: what one imported and compiled, the next would find
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
                process.submit(night, count, cores).result()


if __name__ == "__main__":
    main()
