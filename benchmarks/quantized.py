"""A base in 4 bit (`models.policy.quantize: nf4`) beside the same one in full: bytes, CPU seconds of a step, distance.

    python benchmarks/quantized.py configs/pocket.yaml --episodes 96
    python benchmarks/quantized.py configs/smollm2_cpu.yaml --tokens 256 --rounds 3 --episodes 8
    python benchmarks/quantized.py configs/smollm2_cpu.yaml --distance --episodes 4      # that alone

Needs the extra `[quantized]`. Steps take turns in one process, so ratios hold where the machine does other work too. The
distance is the KL from the base in float32 to the one in 4 bit, on the actions of episodes that the former plays in training.
"""

from __future__ import annotations

import argparse
import asyncio
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import torch
from memory import random_row

from evolve_dag.agent.rollouts import gather_rollouts
from evolve_dag.config.loading import load_experiment
from evolve_dag.config.schema import Experiment
from evolve_dag.distillation.adapter import attach, detach
from evolve_dag.distillation.alignment import align_all, no_injection
from evolve_dag.distillation.batch import row_losses, step_divergences
from evolve_dag.distillation.dataset import DistillationRow, make_rows
from evolve_dag.distillation.forward import Forward
from evolve_dag.distillation.memory import _Live
from evolve_dag.distillation.teacher import TeacherScorer
from evolve_dag.distillation.trainer import load_model
from evolve_dag.inference.backends import open_transformers
from evolve_dag.inference.folders import model_folder
from evolve_dag.inference.lora import fuse
from evolve_dag.inference.quantization import state_of
from evolve_dag.inference.roles import Roles
from evolve_dag.records import Trajectory
from evolve_dag.tasks.suites import load_split

KINDS = {
    "float32": ("float32", "none", True),
    "bfloat16": ("bfloat16", "none", True),
    "nf4 in float32": ("float32", "nf4", True),
    "nf4 in bfloat16": ("bfloat16", "nf4", True),
    "nf4 in bfloat16, peft's LoRA": ("bfloat16", "nf4", False),
}
"""Name -> number format, how it is kept, whether LoRA is one function with the base (`inference/lora.py`)."""


def held(model: Any) -> tuple[int, int]:
    """Bytes of all weights, and of those of the linear layers below LoRA, scales included."""
    bytes_: dict[str, int] = {}
    for name, one in model.named_parameters():
        state = state_of(one)
        bytes_[name] = one.nbytes + (0 if state is None else state.absmax.nbytes + state.state2.absmax.nbytes)
    return sum(bytes_.values()), sum(size for name, size in bytes_.items() if "proj" in name)


def step(model: Any, rows: list[DistillationRow]) -> float:
    """CPU seconds of a forward and a backward pass."""
    forward = Forward(model)
    begun = time.process_time()
    with forward.ready():
        row_losses(forward, rows, "forward_kl").loss.sum().backward()
    return time.process_time() - begun


def answering(model: Any) -> float:
    """Median CPU seconds of a token of each of 32 episodes, nothing before it."""
    ids, spent = torch.ones((32, 1), dtype=torch.long), []
    with torch.inference_mode():
        for _ in range(20):
            begun = time.process_time()
            model(input_ids=ids)
            spent.append(time.process_time() - begun)
    return median(spent)


def kept_by(model: Any, rows: list[DistillationRow]) -> int:
    """Bytes that the forward pass keeps for the way back."""
    forward = Forward(model)
    with forward.ready(), _Live() as live:
        loss = row_losses(forward, rows, "forward_kl").loss.sum()
        kept = live.bytes
    del loss
    return kept


def timings(folder: Path, tokens: int, rounds: int) -> None:
    seconds: dict[str, list[float]] = {name: [] for name in KINDS}
    models, sampling = {}, {}
    for name, (dtype, quantize, ours) in KINDS.items():
        base = load_model(folder, dtype, quantize)
        total, linear = held(base)
        merged = answering(base)  # an adapter that is added in costs nothing
        models[name] = attach(base, rank=16, alpha=32, seed=0).eval()
        sampling[name] = merged if quantize == "none" else answering(models[name])
        if ours:
            fuse(models[name])
        print(f"{name:30} weights {total / 1e6:7.1f} MB, of linear layers {linear / 1e6:7.1f} MB", flush=True)
    rows = [random_row(tokens, Forward(models["float32"]).vocabulary, 64)]
    kept = {name: kept_by(model, rows) for name, model in models.items()}
    for _ in range(rounds):
        for name, model in models.items():
            seconds[name].append(step(model, rows))
    for name, found in seconds.items():
        ratio = median(one / full for one, full in zip(found, seconds["float32"], strict=True))
        memory = f"kept for the way back {kept[name] / 1e6:.0f} MB"
        sampled = f"sampling {sampling[name] / sampling['float32']:.2f} of float32"
        print(f"{name:30} {median(found):6.2f} CPU s a step, {ratio:.2f} of float32; {memory}; {sampled}", flush=True)
    for model in models.values():
        detach(model)


def played(e: Experiment, count: int, quantize: str) -> tuple[list[Trajectory], Any]:
    """Episodes of the first training tasks, and the model that played them."""
    settings = e.models.policy.model_copy(update={"quantize": quantize, "dtype": "float32"})
    model = open_transformers(settings, runtime=e.runtime)
    with Roles(e) as roles:
        split = load_split(e, "train", roles)
        found = asyncio.run(
            gather_rollouts(
                (list(split.tasks) * (count // len(split.tasks) + 1))[:count],
                1,
                model=model,
                environment=split.environment,
                verifier=split.verifier,
                settings=e.rollout,
                seed=7,
                concurrency=e.runtime.concurrency,
            )
        )
    return found, model


def distance(e: Experiment, episodes: int) -> None:
    full, model = played(e, episodes, "none")
    aligned = align_all(full, model.chat, no_injection)
    rows = make_rows(aligned, TeacherScorer(model.model, top_k=0).score([one.views for one in aligned]))
    print(f"float32: reward {fmean(one.reward or 0.0 for one in full):.3f} over {len(full)} training episodes", flush=True)
    folder = model_folder(e.models.policy)
    for name, (dtype, quantize) in {"nf4": ("float32", "nf4"), "bfloat16": ("bfloat16", "none")}.items():
        steps = [value for one in step_divergences(load_model(folder, dtype, quantize), rows) for value in one]
        told = f"KL(float32 || {name}) {fmean(steps):.4f} nats a token, mean of {len(steps)} steps; median {median(steps):.4f}"
        print(told, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--tokens", type=int, default=1024, help="of the row that is trained on")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--episodes", type=int, default=64)
    parser.add_argument("--distance", action="store_true", help="nothing but the divergence")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    e = load_experiment(asked.config)
    if not asked.distance:
        timings(model_folder(e.models.policy), asked.tokens, asked.rounds)
    distance(e, asked.episodes)
    if not asked.distance:
        found, _ = played(e, asked.episodes, "nf4")
        print(f"nf4: reward {fmean(one.reward or 0.0 for one in found):.3f} over {len(found)} training episodes")


if __name__ == "__main__":
    main()
