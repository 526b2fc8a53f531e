"""LoRA over a base in 4 bit against LoRA over the weights that are read back. Needs the extra ``[quantized]``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_fakes import make_scored_rows, tiny_model, train_to_follow_hints
from test_lora import step, trained_adapter
from torch import nn
from transformers import AutoModelForCausalLM, Qwen3Config

from evolve_dag.config.schema import DistillationSettings, Regime, RuntimeSettings
from evolve_dag.distillation import launch, memory
from evolve_dag.distillation.adapter import attach, detach, load_adapter
from evolve_dag.distillation.alignment import replay_injection
from evolve_dag.distillation.batch import step_divergences
from evolve_dag.distillation.dataset import DistillationRow
from evolve_dag.distillation.forward import Forward
from evolve_dag.distillation.launch import Request
from evolve_dag.distillation.memory import training_memory
from evolve_dag.distillation.trainer import DistillationResult, distill, load_model
from evolve_dag.inference.lora import fuse, merge
from evolve_dag.inference.quantization import dense, is_quantized, state_of
from evolve_dag.store.layout import ADAPTER_WEIGHTS

pytest.importorskip("bitsandbytes", reason="make test-quantized")

SETTINGS = DistillationSettings(rank=8, alpha=16, learning_rate=1e-2, epochs=2, tokens_per_batch=256, top_k=8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the model that follows hints elsewhere, but every layer has 64 inputs: with 32, bitsandbytes 0.50.2 reads the weights
    back wrongly on CPUs with AVX512, and such a base is refused."""
    place = tmp_path_factory.mktemp("model")
    model: Any = train_to_follow_hints(tiny_model(hidden_size=64, head_dim=16))
    model.save_pretrained(place)
    return place


@pytest.fixture(scope="module")
def rows(folder: Path) -> list[DistillationRow]:
    """Scored by the teacher that has the base in 4 bit, as its student has."""
    return make_scored_rows(load_model(folder, quantize="nf4"), range(16), replay_injection("step_wise"))


def read_back(folder: Path, dtype: str = "float32") -> nn.Module:
    quantized = load_model(folder, dtype, "nf4")
    model = load_model(folder, dtype)
    for name, one in quantized.named_modules():
        if isinstance(one, nn.Linear) and (state := state_of(one.weight)) is not None:
            model.get_submodule(name).weight = nn.Parameter(dense(one.weight, state))
    return model


def train(folder: Path, rows: list[DistillationRow], out: Path, quantize: str = "nf4", **options: Any) -> DistillationResult:
    model = load_model(folder, quantize=quantize)
    settings = options.pop("settings", SETTINGS)
    return distill(model, rows, settings=settings, regime=Regime(divergence="forward_kl"), out=out, **options)


def mean(found: list[list[float]]) -> float:
    values = [value for steps in found for value in steps]
    return sum(values) / len(values)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_outputs_and_gradients_are_those_over_the_weights_that_are_read_back(folder: Path, dtype: str) -> None:
    ordinary, quantized = trained_adapter(read_back(folder, dtype)), trained_adapter(load_model(folder, dtype, "nf4"))
    fuse(ordinary)
    expected, gradients = step(ordinary)
    over_peft, of_peft = step(quantized)
    fuse(quantized)
    found, fused = step(quantized)
    assert torch.equal(found, expected)
    assert len(fused) == 2 * 7 * 2  # LoRA's alone
    for name, gradient in fused.items():
        assert gradient.dtype == torch.float32
        assert torch.equal(gradient, gradients[name])
    close = {"float32": 1e-4, "bfloat16": 0.1}[dtype]
    assert (found - over_peft).norm() <= close * over_peft.norm()
    for name, gradient in fused.items():
        assert (gradient - of_peft[name]).norm() <= close * of_peft[name].norm()


def test_the_student_learns_and_its_adapter_fits_the_base_in_full(
    folder: Path, rows: list[DistillationRow], tmp_path: Path
) -> None:
    before = mean(step_divergences(load_model(folder, quantize="nf4"), rows))
    result = train(folder, rows, tmp_path / "adapter", settings=SETTINGS.model_copy(update={"epochs": 6}))
    assert not result.skipped
    worn = load_adapter(load_model(folder, quantize="nf4"), tmp_path / "adapter")
    after = mean(step_divergences(merge(worn), rows))
    assert after < 0.7 * before
    elsewhere = merge(load_adapter(load_model(folder), tmp_path / "adapter"))
    assert not is_quantized(elsewhere)
    assert after < mean(step_divergences(elsewhere, rows)) < before  # another base: less well, but it is of use


def test_an_adapter_begins_as_over_the_base_in_full_and_checkpointing_gives_the_same_bytes(
    folder: Path, rows: list[DistillationRow], tmp_path: Path
) -> None:
    for name, quantize in (("full", "none"), ("nf4", "nf4")):
        train(folder, [], tmp_path / name, quantize)
    begun = [(tmp_path / name / ADAPTER_WEIGHTS).read_bytes() for name in ("full", "nf4")]
    assert begun[0] == begun[1]
    for name, again in (("kept", False), ("again", True)):
        train(folder, rows[:4], tmp_path / name, activation_checkpointing=again)
    assert (tmp_path / "kept" / ADAPTER_WEIGHTS).read_bytes() == (tmp_path / "again" / ADAPTER_WEIGHTS).read_bytes()


def test_the_base_is_given_back_and_can_be_worn_again(folder: Path) -> None:
    base = load_model(folder, quantize="nf4")
    ids = torch.arange(8, 40).reshape(2, 16)
    with torch.no_grad():
        expected = base(input_ids=ids).logits
        wrapped = trained_adapter(base)
        assert not torch.allclose(wrapped(input_ids=ids).logits, expected, atol=1e-3)
        assert detach(wrapped) is base
        assert torch.equal(base(input_ids=ids).logits, expected)
    attach(base, rank=4, alpha=8, seed=0)


def test_who_samples_while_training_is_the_student_with_its_adapter_beside_the_base(
    folder: Path, rows: list[DistillationRow], tmp_path: Path
) -> None:
    seen: list[float] = []

    def resample(number: int, student: nn.Module) -> list[DistillationRow]:
        assert is_quantized(student)
        assert any("lora" in name for name, _ in student.named_parameters())
        seen.append(mean(step_divergences(student, rows)))
        with torch.no_grad():  # a copy: what happens to it stays without effect
            for parameter in student.parameters():
                parameter.zero_()
        return rows

    result = train(folder, rows, tmp_path, settings=SETTINGS.model_copy(update={"refresh": 2}), resample=resample)
    assert result.refreshes == 1
    base = load_model(folder, quantize="nf4")
    begun = mean(step_divergences(base, rows))
    assert begun > seen[0] > mean(step_divergences(load_adapter(base, tmp_path), rows))


def test_two_processes_that_each_have_all_of_it_find_what_one_finds(
    folder: Path, rows: list[DistillationRow], tmp_path: Path
) -> None:
    asked = Request(folder, tmp_path / "two", SETTINGS, Regime(), quantize="nf4", checkpoint=tmp_path / "kept", base="nf4")
    runtime = RuntimeSettings(processes=2, threads=1, tokens_per_pass=512)
    both = launch.train(asked, rows, runtime, on_step=lambda *_: None)
    alone = train(folder, rows, tmp_path / "one", threads=1, tokens_per_pass=512)
    full = train(folder, rows, tmp_path / "full", "none", threads=1, tokens_per_pass=512)
    found, expected, elsewhere = ([point.loss for point in one.curve] for one in (both, alone, full))
    assert found == pytest.approx(expected, rel=1e-3)
    assert expected[0] != pytest.approx(elsewhere[0], rel=1e-3)


SHAPE = {"vocab_size": 1000, "hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4, "num_key_value_heads": 2}


def test_what_is_calculated_is_what_a_step_allocates(tmp_path: Path) -> None:
    """As in test_memory_estimate.py, with a real base in 4 bit."""
    config, rows = Qwen3Config(**SHAPE, num_hidden_layers=4, head_dim=16), [300, 200]
    told = training_memory(config, dtype="bfloat16", quantize="nf4", settings=SETTINGS, rows=rows)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(tmp_path)
    model = attach(load_model(tmp_path, "bfloat16", "nf4"), rank=8, alpha=16, seed=0).eval()
    fuse(model)
    learned = [one for one in model.parameters() if one.requires_grad]
    states = [state for one in model.parameters() if (state := state_of(one)) is not None]
    inner = [part for one in states for part in (one.absmax, one.code, one.offset, one.state2.absmax, one.state2.code)]
    assert len(states) == 4 * 7
    with memory._Live() as live:
        for one in (*model.parameters(), *inner):
            live._add(one.untyped_storage())
        held = live.bytes
        forward = Forward(model)
        with forward.ready():
            states_T_H, paths = forward.states([[row, *range(tokens - 1)] for row, tokens in enumerate(rows)])
            loss = memory._loss(forward, SETTINGS, states_T_H, paths)
            loss.backward()
        torch.optim.AdamW(learned).step()
    assert told.weights + told.adapter == pytest.approx(held, rel=0.02)
    assert told.peak == pytest.approx(live.peak, rel=0.02)
