"""Memory of a training step: calculated before the run, and measured.

    python benchmarks/memory.py              # five minutes on one core, up to 4 GB

Every case trains one step in a process of its own; measured is the growth of its largest resident size from before the model
was made: once where what is freed goes back at once (MALLOC_MMAP_THRESHOLD_), and once as glibc does by itself, which keeps
what is freed of tensors below 32 MB.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig

from evolve_dag.config.schema import DistillationSettings, Regime
from evolve_dag.distillation.alignment import StudentRow
from evolve_dag.distillation.dataset import DistillationRow, StepView
from evolve_dag.distillation.memory import ACTION_SHARE, training_memory
from evolve_dag.distillation.teacher import TeacherTargets
from evolve_dag.distillation.trainer import distill

CASES: dict[str, tuple[str, str, int, dict[str, Any]]] = {
    "pocket, hidden 128 x 4": ("qwen3", "float32", 16_384, {"hidden_size": 128, "num_hidden_layers": 4, "vocab_size": 702}),
    "hidden 256 x 6": ("qwen3", "float32", 8192, {"hidden_size": 256, "num_hidden_layers": 6, "vocab_size": 2048}),
    "SmolLM2, hidden 576 x 30": ("llama", "float32", 1024, {"hidden_size": 576, "num_hidden_layers": 30, "vocab_size": 49_152}),
}
"""Name -> architecture, number format, tokens, shape."""
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": str(1 << 18)}
SMALL = {"hidden_size": 128, "num_hidden_layers": 1, "vocab_size": 128}


def config_of(kind: str, shape: dict[str, Any]) -> PretrainedConfig:
    hidden = shape["hidden_size"]
    heads = {"num_attention_heads": hidden // 64, "num_key_value_heads": max(1, hidden // 192), "head_dim": 64}
    if kind == "qwen3" and hidden % 128 == 0:
        heads = {"num_attention_heads": hidden // 32, "num_key_value_heads": hidden // 64, "head_dim": 32}
    return AutoConfig.for_model(kind, intermediate_size=3 * hidden, tie_word_embeddings=True, **heads, **shape)


def random_row(tokens: int, vocabulary: int, top_k: int, seed: int = 0) -> DistillationRow:
    """A trajectory of random tokens whose last 15% are one action."""
    numbers = np.random.default_rng(seed)
    actions = int(ACTION_SHARE * tokens)
    ids = numbers.integers(0, vocabulary, tokens)
    teacher = TeacherTargets(
        np.full((actions, top_k), -np.log(2 * top_k), np.float32),
        np.tile(np.arange(top_k, dtype=np.int32), (actions, 1)),
        np.full(actions, -np.log(2), np.float32),
    )
    student = StudentRow(f"t{seed}#0", tuple(map(int, ids)), (0,), ((tokens - actions, tokens),))
    return DistillationRow(student, (StepView(0, (), "", tokens - actions),), teacher)


def resident(name: str) -> int:
    """What Linux says of this process's memory, bytes: RssAnon, RssFile, VmHWM."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return 1024 * int(lines[name].split()[0])


def high_water() -> int:
    """Largest resident size of this process so far, bytes; ``ru_maxrss`` begins with that of the process that started it."""
    return resident("VmHWM")


def measure(name: str, activation_checkpointing: bool) -> None:
    """Print the growth of the largest resident size, bytes, and CPU seconds of one step."""
    kind, dtype, tokens, shape = CASES[name]
    settings = DistillationSettings(epochs=1)
    rows = [random_row(tokens, shape["vocab_size"], settings.top_k)]
    train(
        "qwen3", dtype, SMALL, [random_row(64, SMALL["vocab_size"], settings.top_k)], settings, False
    )  # what libraries load once
    before = high_water()
    started = time.process_time()
    train(kind, dtype, shape, rows, settings, activation_checkpointing)
    seconds = time.process_time() - started
    print(high_water() - before, seconds)


def train(
    kind: str, dtype: str, shape: dict[str, Any], rows: list[DistillationRow], settings: DistillationSettings, less: bool
) -> None:
    model = AutoModelForCausalLM.from_config(config_of(kind, shape), dtype=getattr(torch, dtype))
    with tempfile.TemporaryDirectory() as folder:
        distill(
            model,
            rows,
            settings=settings,
            regime=Regime(),
            out=Path(folder),
            tokens_per_pass=1 << 20,
            activation_checkpointing=less,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--case", choices=list(CASES), help="measure one, in this process")
    parser.add_argument("--checkpointing", action="store_true")
    given = parser.parse_args()
    if given.case:
        measure(given.case, given.checkpointing)
        return
    print(f"{'case':28} tokens  checkpointing  calculated MB  measured MB  ratio  as glibc does MB  CPU s, both")
    for name, (kind, dtype, tokens, shape) in CASES.items():
        for less in (False, True):
            settings, config = DistillationSettings(), config_of(kind, shape)
            told = training_memory(config, dtype=dtype, settings=settings, rows=[tokens], activation_checkpointing=less).peak
            (exact, slow), (usual, fast) = (in_process(name, less, more) for more in (GIVE_BACK, {}))
            print(
                f"{name:28} {tokens:6}  {less!s:13} {told / 1e6:14.0f} {exact / 1e6:12.0f} {told / exact:6.2f} "
                f"{usual / 1e6:17.0f}  {slow:.2f} {fast:.2f}",
                flush=True,
            )


def in_process(case: str, less: bool, environment: dict[str, str]) -> list[float]:
    """What :func:`measure` prints in a process of its own."""
    command = [sys.executable, __file__, "--case", case, *(["--checkpointing"] if less else [])]
    told = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment).stdout
    return [float(one) for one in told.split()]


if __name__ == "__main__":
    main()
