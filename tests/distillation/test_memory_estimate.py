"""What is calculated before a run is what is kept in it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Glm4MoeConfig, LlamaConfig, Qwen3Config, Qwen3MoeConfig

from evolve_dag.config.loading import load_experiment
from evolve_dag.config.schema import DistillationSettings, VllmModelSettings
from evolve_dag.distillation import memory
from evolve_dag.distillation.adapter import attach
from evolve_dag.distillation.forward import Forward
from evolve_dag.distillation.memory import cache_memory, training_memory
from evolve_dag.inference.lora import fuse

SETTINGS = DistillationSettings(rank=8, alpha=16, top_k=16)
ROWS = [300, 200]
CONFIGS = Path(__file__).parents[2] / "configs"
SHAPE = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 160, "num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"moe_intermediate_size": 64, "num_experts_per_tok": 2}


def qwen3(**changes: Any) -> Qwen3Config:
    return Qwen3Config(**{**SHAPE, "num_hidden_layers": 5, "head_dim": 16, **changes})


@pytest.mark.parametrize(
    ("config", "less"),
    [(qwen3(), False), (qwen3(tie_word_embeddings=True), True), (LlamaConfig(**SHAPE, num_hidden_layers=5), False)],
)
def test_it_is_what_a_step_allocates(config: Any, less: bool) -> None:
    """Against the same step on real tensors of all five layers, counted by the same clock; the extrapolation is exact."""
    told = training_memory(config, dtype="float32", settings=SETTINGS, rows=ROWS, activation_checkpointing=less)
    model = attach(AutoModelForCausalLM.from_config(config), rank=8, alpha=16, seed=0).eval()
    fuse(model)
    parameters = list({id(one): one for one in model.parameters()}.values())
    learned = [one for one in parameters if one.requires_grad]
    assert told.adapter == sum(one.nbytes for one in learned)
    frozen = sum(one.nbytes for one in parameters) - told.adapter
    assert frozen <= told.weights <= frozen + 4096  # and the few numbers of the positions
    with memory._Live() as live:
        for one in parameters:
            live._add(one.untyped_storage())
        forward = Forward(model, recompute=less)
        with forward.ready():
            states_T_H, paths = forward.states([[row, *range(tokens - 1)] for row, tokens in enumerate(ROWS)])
            loss = memory._loss(forward, SETTINGS, states_T_H, paths)
            saved = live.bytes - frozen - told.adapter
            loss.backward()
        torch.optim.AdamW(learned).step()
    assert told.saved == pytest.approx(saved, rel=0.02)
    assert told.peak == pytest.approx(live.peak, rel=0.02)


@pytest.mark.parametrize(
    "config",
    [
        Glm4MoeConfig(**SHAPE, **EXPERTS, num_hidden_layers=6, head_dim=16, first_k_dense_replace=3, n_routed_experts=8),
        Qwen3MoeConfig(**SHAPE, **EXPERTS, num_hidden_layers=6, head_dim=16, mlp_only_layers=[0, 4], num_experts=8),
        Qwen3MoeConfig(**SHAPE, **EXPERTS, num_hidden_layers=6, head_dim=16, decoder_sparse_step=2, num_experts=8),
    ],
)
def test_layers_of_a_mixture_of_experts_that_are_dense_are_told_apart(config: Any) -> None:
    told = training_memory(config, dtype="bfloat16", settings=SETTINGS, rows=ROWS)
    weights, adapter, saved, _, peak = memory._run(config, "bfloat16", "none", SETTINGS, ROWS, False)
    assert (told.weights, told.adapter) == (weights, adapter)
    assert told.saved == pytest.approx(saved, rel=0.02)
    assert told.peak == pytest.approx(peak, rel=0.05)


def test_where_each_layer_has_a_size_of_its_own_all_count_as_the_largest(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = [1, 1, 2, 3, 4, 9, 5, 6]
    monkeypatch.setattr(memory, "_layer_sizes", lambda *_: sizes)
    monkeypatch.setattr(memory, "_run", lambda config, *_: (sum(sizes[: config.num_hidden_layers]),) * 5)
    told = training_memory(qwen3(num_hidden_layers=8), dtype="float32", settings=SETTINGS, rows=ROWS)
    assert told.weights == 2 + 6 * 9


def test_checkpointing_keeps_less_and_twice_the_tokens_take_twice_as_much() -> None:
    def saved(rows: list[int], less: bool) -> int:
        return training_memory(qwen3(), dtype="float32", settings=SETTINGS, rows=rows, activation_checkpointing=less).saved

    assert saved([1000], True) < 0.2 * saved([1000], False)
    assert saved([2000], False) == pytest.approx(2 * saved([1000], False), rel=0.02)


def test_logits_are_there_piece_by_piece() -> None:
    def logits(rows: list[int], vocabulary: int) -> int:
        return training_memory(qwen3(vocab_size=vocabulary), dtype="float32", settings=SETTINGS, rows=rows).logits

    actions, few = int(memory.ACTION_SHARE * 500), logits([500], 1000)
    assert few > actions * 1000 * 4, "a short one in one piece, with what is made of it"
    assert logits([16_000], 50_000) < 0.5 * 32 * actions * 50_000 * 4


@pytest.mark.parametrize(("outside", "gathered"), [(50, 50 + 3 * 20), (70, 2 * 70)])
def test_of_a_base_in_parts_a_process_keeps_one_and_gathers_layers(
    outside: int, gathered: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(config: Any, *_: Any) -> tuple[int, ...]:
        weights = outside + 20 * config.num_hidden_layers
        return weights, 3, 1000, 70, weights + 5000

    monkeypatch.setattr(memory, "_run", run)
    told = training_memory(qwen3(num_hidden_layers=40), dtype="float32", settings=SETTINGS, rows=ROWS, shards=4)
    kept = -(-(outside + 800) // 4)
    assert told == memory.Memory(kept, 3, 1000, 70, kept + gathered + 5000)


def test_keys_and_values() -> None:
    assert cache_memory(qwen3(), "bfloat16", 100) == 2 * 5 * 2 * 16 * 2 * 100


QWEN3_4B = {"hidden_size": 2560, "intermediate_size": 9728, "tie_word_embeddings": True}
QWEN3_8B = {"hidden_size": 4096, "intermediate_size": 12288, "tie_word_embeddings": False}


@pytest.mark.parametrize(
    ("file", "card", "tokens_per_pass", "shape"),
    [
        ("qwen3_4b_web", 24, None, QWEN3_4B),
        ("qwen3_8b_web", 48, None, QWEN3_8B),
        ("qwen3_8b_web", 80, 65_536, QWEN3_8B),
    ],
)
def test_the_experiments_on_a_gpu_fit_the_cards_they_name(
    file: str, card: int, tokens_per_pass: int | None, shape: dict[str, Any]
) -> None:
    experiment = load_experiment(CONFIGS / f"{file}.yaml")
    runtime, policy = experiment.runtime, experiment.models.policy
    assert isinstance(policy, VllmModelSettings)
    longest = policy.context_tokens
    told = training_memory(
        Qwen3Config(vocab_size=151_936, num_hidden_layers=36, head_dim=128, num_key_value_heads=8, **shape),
        dtype=policy.dtype,
        settings=experiment.distillation,
        rows=[longest] * max(1, (tokens_per_pass or runtime.tokens_per_pass) // longest),
        activation_checkpointing=runtime.activation_checkpointing,
    )
    assert told.peak < 0.9 * card * 2**30
    said = (CONFIGS / f"{file}.yaml").read_text()
    assert f"{card} GB" in said
    assert tokens_per_pass is None or f"{tokens_per_pass}" in said
