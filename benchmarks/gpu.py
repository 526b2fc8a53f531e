"""The distillation engine on a GPU, at the shape of Qwen3-4B: tokens a second, share of the card's matmul peak, memory, TRL.

    make bench-gpu                             # some minutes; installs TRL and Liger
    python benchmarks/gpu.py --only peak training --hidden 1024 --layers 8

Weights are random, in bfloat16; trajectories have ten steps, 8K tokens and 15% action tokens. Seconds are of the wall clock,
with the device waited for; a first pass of every arm, in which kernels are compiled, does not count. The FLOPs of a share are
those that must be done: one forward pass, and the way back to activations and LoRA (the base is frozen); causal attention
counts half of T x T, the output layer action tokens only, and what is computed again does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from distillation import synthetic, view_by_view
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoModelForCausalLM, Qwen3Config

from evolve_dag.config.schema import DistillationSettings, Regime
from evolve_dag.distillation.alignment import Aligned
from evolve_dag.distillation.dataset import DistillationRow, make_rows
from evolve_dag.distillation.memory import training_memory
from evolve_dag.distillation.teacher import TeacherScorer
from evolve_dag.distillation.trainer import distill
from evolve_dag.inference import attention, kernels
from evolve_dag.inference.prefix_tree import Chain

DEVICE = "cuda:0"
ACTION, OBSERVATION, HINT = (115, 130), (670, 710), (150, 300)
"""Tokens, for 8K in ten steps."""
RANK = 32
PASS = 8400
"""Tokens that hold one trajectory."""
SCORED = 16_384
"""Tokens of a pass of the teacher."""
RECOMPUTE: dict[str, Any] = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
SETTINGS = DistillationSettings(epochs=1, rank=RANK, alpha=64.0, tokens_per_batch=PASS, warmup_steps=0)


def shape(hidden: int, layers: int) -> Qwen3Config:
    """Qwen3-4B's by default; others keep its proportions."""
    return Qwen3Config(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=hidden * 19 // 5,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 80,
        num_key_value_heads=hidden // 320,
        head_dim=128,
        tie_word_embeddings=True,
        max_position_embeddings=40_960,
    )


def random_model(config: Qwen3Config, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    with torch.device(DEVICE):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval().requires_grad_(False)


def trajectories(count: int, vocabulary: int, injection: str = "none", group: int = 1) -> list[Aligned]:
    """In groups that share their question."""
    names = [(index // group, f"t{index // group}#{index % group}") for index in range(count)]
    return [synthetic(task, name, vocabulary, injection, (10, 10), ACTION, OBSERVATION, HINT) for task, name in names]


ARMS: list[str] = []
"""Names of arms that the command line asks for; none: all."""


def asked(arms: Mapping[str, Any]) -> dict[str, Any]:
    return {name: arm for name, arm in arms.items() if not ARMS or name in ARMS}


def seconds(arm: Callable[[], Any], repeats: int = 3) -> float:
    """Least of ``repeats``, after one that does not count."""
    least = float("inf")
    for number in range(repeats + 1):
        torch.cuda.synchronize()
        started = time.perf_counter()
        arm()
        torch.cuda.synchronize()
        if number:
            least = min(least, time.perf_counter() - started)
    return least


def peak(size: int = 8192) -> float:
    """FLOPs a second of a product of two random bfloat16 matrices."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    return 10 * 2 * size**3 / seconds(lambda: [a @ b for _ in range(10)])


def flops(config: Qwen3Config, rows: Sequence[DistillationRow]) -> float:
    """Of a training pass over rows that share nothing."""
    width, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    shapes = [(config.hidden_size, out) for out in (width, keys, keys, config.intermediate_size, config.intermediate_size)]
    shapes += [(width, config.hidden_size), (config.intermediate_size, config.hidden_size)]
    base, lora = sum(a * b for a, b in shapes), sum(RANK * (a + b) for a, b in shapes)
    total = 0.0
    for row in rows:
        causal = row.tokens**2 / 2 * 2 * width  # products of a query with a key, and of a weight with a value
        total += config.num_hidden_layers * (row.tokens * (4 * base + 6 * lora) + 6 * causal)
        total += 4 * row.action_tokens * config.hidden_size * config.vocab_size
    return total


def attention_kernels(_: Qwen3Config) -> Iterator[str]:
    """Forward and backward of one layer's attention, 8K tokens, 32 query heads on 8."""
    q, k, v = (
        torch.randn(1, heads, 8192, 128, device=DEVICE, dtype=torch.bfloat16, requires_grad=True) for heads in (32, 8, 8)
    )
    gradient = torch.randn_like(q)
    work = 6 * 8192**2 / 2 * 2 * 32 * 128

    def both(product: Callable[..., Any]) -> None:
        product(q, k, v).backward(gradient)

    causal = partial(F.scaled_dot_product_attention, is_causal=True, enable_gqa=True)
    for name in ("FLASH_ATTENTION", "CUDNN_ATTENTION"):
        with sdpa_kernel(getattr(SDPBackend, name)):
            found = seconds(lambda: both(causal))
        yield f"attention {name.lower():20} {1e3 * found:6.2f} ms  {work / found / 1e12:5.0f} TFLOP/s"
    chains = attention.Chains([Chain(0, 8192)])
    found = seconds(lambda: both(lambda *three: attention._varlen_attention(*three, chains, None).transpose(1, 2)))
    yield f"attention varlen                {1e3 * found:6.2f} ms"


def scoring(config: Qwen3Config) -> Iterator[str]:
    """Ten steps, groups of four, against one prefill a step."""
    model = random_model(config)
    for injection in ("step_wise", "global"):
        aligned = trajectories(4, config.vocab_size, injection, group=4)
        views = [one.views for one in aligned]
        tokens = sum(len(one.row.ids) for one in aligned)
        scorer = TeacherScorer(model, tokens_per_pass=32_768)
        packed = seconds(partial(scorer.score, views), 2)
        alone = seconds(partial(view_by_view, model, aligned, tokens=32_768), 1)
        a, b = scorer.score(views[:1]), view_by_view(model, aligned[:1], tokens=32_768)
        differ = abs(a[0].logprobs - b[0].logprobs).max()
        yield (
            f"scoring {injection:10} {tokens / packed:8.0f} trajectory tokens/s, {alone / packed:.2f} x one prefill a step "
            f"(largest difference of two log-probabilities, bf16: {differ:.2g})"
        )


def rows_of(model: Any, count: int) -> list[DistillationRow]:
    """Of different tasks, so nothing is shared."""
    aligned = trajectories(count, model.config.vocab_size)
    return make_rows(aligned, TeacherScorer(model, tokens_per_pass=SCORED).score([one.views for one in aligned]))


def train(model: Any, rows: list[DistillationRow], together: int = 1, **more: Any) -> tuple[float, float]:
    """Tokens a second of the first epoch and of the second: a kernel library plans anew for every length that it meets."""
    settings = SETTINGS.model_copy(update={"epochs": 2, "tokens_per_batch": together * PASS})
    with tempfile.TemporaryDirectory() as folder:
        found = distill(
            model,
            rows,
            settings=settings,
            regime=Regime(),
            out=Path(folder),
            device=DEVICE,
            tokens_per_pass=together * PASS,
            **more,
        )
    taken = [point.tokens / point.tokens_per_second for point in found.curve]
    half, tokens = len(taken) // 2, sum(row.tokens for row in rows)
    return tokens / sum(taken[:half]), tokens / sum(taken[half:])


VARIANTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "transformers' own layers": (patch.object(kernels, "fused_layers", lambda _: contextlib.nullcontext()), {}),
    "plain bodies in place of Liger": (patch.object(kernels, "_bodies", lambda _: kernels.PLAIN), {}),
    "Liger": (contextlib.nullcontext(), {}),
    "Liger, two trajectories a pass": (contextlib.nullcontext(), {"together": 2}),
    "Liger, four, activations computed twice": (contextlib.nullcontext(), {"together": 4, "activation_checkpointing": True}),
}


def training(config: Qwen3Config) -> Iterator[str]:
    """One trajectory of 8K tokens a step, or several."""
    best = peak()
    model = random_model(config)
    rows = rows_of(model, 8)
    tokens = sum(row.tokens for row in rows)
    for name, (changed, more) in asked(VARIANTS).items():
        with changed:
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                first, rate = train(model, rows, **more)
            except Exception as problem:
                yield f"training {name}: {str(problem).splitlines()[0]}"
                continue
        most, together = torch.cuda.max_memory_allocated(), more.get("together", 1)
        told = training_memory(
            config,
            dtype="bfloat16",
            settings=SETTINGS,
            rows=[tokens // len(rows)] * together,
            activation_checkpointing="activation_checkpointing" in more,
        ).peak
        share = flops(config, rows) / tokens * rate / best
        yield (
            f"training {name:40} {rate:6.0f} tokens/s (first epoch {first:.0f})  {100 * share:3.0f}% of the peak  "
            f"{most / 2**30:5.1f} GiB (calculated {told / 2**30:.1f}, {told / most:.2f} x)"
        )


def profile(config: Qwen3Config) -> Iterator[str]:
    """Where four steps go, by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    model = random_model(config)
    rows = rows_of(model, 4)
    for together in (1, 2):
        train(model, rows, together)
        with profiler(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
            train(model, rows, together)
        yield f"{together} a pass"
        yield found.key_averages().table(sort_by="self_cuda_time_total", row_limit=32, max_name_column_width=70)


def trl(config: Qwen3Config) -> Iterator[str]:
    """The same trajectories through TRL's GKDTrainer, teacher and student of the same shape, bfloat16."""
    from against_trl import ours, theirs

    teacher = random_model(config, 1)
    aligned = trajectories(8, config.vocab_size)
    tokens = sum(len(one.row.ids) for one in aligned)
    here = {"settings": SETTINGS, "scored": SCORED, "device": DEVICE, "tokens_per_pass": PASS}
    arms: dict[str, Callable[[Any], Any]] = {
        f"evolve-dag, {name}": lambda student, top_k=top_k: ours(student, teacher, aligned, top_k, **here)
        for name, top_k in (("top 64", 64), ("whole vocabulary", 0))
    }
    for name, more in {
        "TRL": {},
        "TRL, Liger": {"use_liger_kernel": True},
        "TRL, gradient checkpointing": RECOMPUTE,
        "TRL, Liger, gradient checkpointing": {"use_liger_kernel": True} | RECOMPUTE,
    }.items():
        there = {"settings": SETTINGS, "use_cpu": False, "bf16": True} | more
        arms[name] = lambda student, there=there: theirs(student, teacher, aligned, **there)
    for name, arm in asked(arms).items():
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        student = random_model(config, 0)  # a new one: Liger's patches stay, and so does an adapter after an error
        try:
            taken, losses = float("inf"), []
            for _ in range(2):
                torch.cuda.synchronize()
                started = time.perf_counter()
                losses = arm(student)
                torch.cuda.synchronize()
                taken = min(taken, time.perf_counter() - started)
            most = torch.cuda.max_memory_allocated() / 2**30
            yield f"{name:36} {tokens / taken:6.0f} tokens/s  {most:5.1f} GiB  losses {losses[0]:.3f} {losses[-1]:.3f}"
        except Exception as problem:
            traceback.print_exc()
            yield f"{name:36} {type(problem).__name__}: {str(problem).splitlines()[0][:150]}"


PARTS: dict[str, Callable[[Qwen3Config], Iterator[str]]] = {
    "peak": lambda _: iter([f"peak of a product of 8192 x 8192, bf16: {peak() / 1e12:.0f} TFLOP/s"]),
    "attention": attention_kernels,
    "training": training,
    "scoring": scoring,
    "trl": trl,
    "profile": profile,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=[name for name in PARTS if name != "profile"])
    parser.add_argument("--arms", nargs="+", default=[], metavar="NAME", help="of training and trl, as they are printed")
    parser.add_argument("--hidden", type=int, default=2560)
    parser.add_argument("--layers", type=int, default=36)
    given = parser.parse_args()
    ARMS[:] = given.arms
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    if not torch.cuda.is_available():
        parser.exit(1, "there is no GPU here\n")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}", flush=True)
    random.seed(0)
    for name in given.only:
        try:
            for line in PARTS[name](shape(given.hidden, given.layers)):
                print(line, flush=True)
        except Exception:  # the other parts still count
            traceback.print_exc()
        gc.collect()
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
