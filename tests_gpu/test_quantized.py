"""A base in 4 bit on a GPU against the one on the CPU. Needs bitsandbytes (extra ``[quantized]``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_fakes import make_scored_rows
from memory import random_row
from transformers import Qwen3Config, Qwen3ForCausalLM

from evolve_dag.config.schema import DistillationSettings, Regime
from evolve_dag.distillation.alignment import replay_injection
from evolve_dag.distillation.memory import training_memory
from evolve_dag.distillation.trainer import distill, load_model
from evolve_dag.inference.quantization import dense, state_of

pytest.importorskip("bitsandbytes", reason="extra [quantized]")

SETTINGS = DistillationSettings(rank=4, alpha=8, learning_rate=1e-3, epochs=2, tokens_per_batch=200, top_k=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 64}
    config = Qwen3Config(**shape, vocab_size=368, num_key_value_heads=1, max_position_embeddings=512)
    Qwen3ForCausalLM(config).save_pretrained(place)
    return place


def weights(model: Any) -> dict[str, torch.Tensor]:
    """What the layers in 4 bit compute with."""
    found = {name: (one.weight, state_of(one.weight)) for name, one in model.named_modules() if hasattr(one, "weight")}
    return {name: dense(weight, state).cpu() for name, (weight, state) in found.items() if state is not None}


def test_a_card_keeps_the_same_numbers(folder: Path) -> None:
    """But for scales of blocks, which are quantized once more, by another order of sums: a step of those is some 0.1%."""
    here, there = (weights(load_model(folder, quantize="nf4", device=device)) for device in ("cpu", "cuda:0"))
    assert here.keys() == there.keys()
    assert len(here) == 14
    for name, weight in here.items():
        torch.testing.assert_close(there[name], weight, atol=1e-5, rtol=5e-3)


def test_training_is_that_of_the_cpu(folder: Path, tmp_path: Path) -> None:
    rows = make_scored_rows(load_model(folder, quantize="nf4"), range(12), replay_injection("step_wise"))

    def losses(device: str, dtype: str = "float32") -> list[float]:
        model = load_model(folder, dtype, "nf4", device)
        out = tmp_path / f"{device}-{dtype}"
        return [point.loss for point in distill(model, rows, settings=SETTINGS, regime=Regime(), out=out, device=device).curve]

    expected = losses("cpu")
    assert losses("cuda:0") == pytest.approx(expected, rel=1e-3, abs=1e-4)
    half = losses("cuda:0", "bfloat16")
    assert half == pytest.approx(expected, rel=0.1)
    assert half[-1] < half[0]


def test_memory_is_what_is_calculated(tmp_path: Path) -> None:
    """Within 15%, of what the allocator gave out at most; less than a base in full takes."""
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6, "vocab_size": 32_000}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    config = Qwen3Config(**shape, **heads, tie_word_embeddings=True)
    settings = DistillationSettings(epochs=1)
    told = training_memory(config, dtype="bfloat16", settings=settings, rows=[8192], quantize="nf4")
    full = training_memory(config, dtype="bfloat16", settings=settings, rows=[8192])
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path / "model")
    rows = [random_row(8192, 32_000, settings.top_k)]
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    model = load_model(tmp_path / "model", "bfloat16", "nf4", "cuda:0")
    torch.cuda.reset_peak_memory_stats()
    options: dict[str, Any] = {"regime": Regime(), "device": "cuda:0", "tokens_per_pass": 8192}
    distill(model, rows, settings=settings, out=tmp_path / "adapter", **options)
    measured = torch.cuda.max_memory_allocated() - before
    print(f"calculated {told.peak / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB, in full {full.peak / 1e6:.0f}")
    assert told.peak == pytest.approx(measured, rel=0.15)
    assert told.weights < full.weights
