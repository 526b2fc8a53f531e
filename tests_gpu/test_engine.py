"""Attention, kernels, scoring and training: what a GPU computes is what the CPU does, up to the number format."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from distillation import synthetic, view_by_view
from distillation_fakes import make_scored_rows, tiny_model
from memory import random_row
from rollouts import random_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, Qwen3Config

from evolve_dag.config.schema import DistillationSettings, Regime, RuntimeSettings
from evolve_dag.distillation import checkpoint
from evolve_dag.distillation.alignment import replay_injection
from evolve_dag.distillation.launch import Request, train
from evolve_dag.distillation.memory import training_memory
from evolve_dag.distillation.teacher import TeacherScorer
from evolve_dag.distillation.trainer import CurvePoint, distill
from evolve_dag.inference import attention, kernels
from evolve_dag.inference.prefix_tree import prefix_tree

SETTINGS = DistillationSettings(rank=4, alpha=8, learning_rate=1e-3, epochs=2, tokens_per_batch=200, top_k=8)


def sequences() -> list[list[int]]:
    """Branches at several depths, a sequence of one token, two that are alike."""
    order = random.Random(0)
    trunk = [order.randrange(100) for _ in range(300)]
    found = [
        [*trunk[:cut], *(order.randrange(100, 200) for _ in range(length))] for cut, length in ((300, 0), (40, 70), (257, 1))
    ]
    deeper = [*found[1][:80], *(order.randrange(200, 300) for _ in range(33))]
    return [*found, deeper, list(found[2]), [7], [order.randrange(300, 400) for _ in range(129)]]


@pytest.mark.parametrize("long", [1, 1024], ids=["one by one", "at once"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_packed_attention_is_that_of_a_mask(dtype: torch.dtype, long: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "LONG", long)
    tree = prefix_tree(sequences())
    generator = torch.Generator("cuda").manual_seed(0)
    shapes = [(1, heads, tree.tokens, 64) for heads in (8, 2, 2)]
    q, k, v = (torch.randn(shape, generator=generator, device="cuda").to(dtype).requires_grad_() for shape in shapes)
    chains = attention.Chains(tree.chains)
    assert attention._one_kernel(q, chains) == (dtype != torch.float32 and long > 1 and attention._grouped() is not None)
    weight = torch.randn(1, tree.tokens, 8, 64, generator=generator, device="cuda")
    packed = attention._tree_attention(q, k, v, chains, None)
    gradients = torch.autograd.grad((packed.float() * weight).sum(), (q, k, v))

    seen = torch.zeros(tree.tokens, tree.tokens, dtype=torch.bool)
    for chain in tree.chains:
        for start, end in chain.prefix:
            seen[chain.start : chain.end, start:end] = True
        own = slice(chain.start, chain.end)
        seen[own, own] = torch.ones(chain.end - chain.start, chain.end - chain.start).tril().bool()
    wide_q, wide_k, wide_v = wide = [one.detach().double().requires_grad_() for one in (q, k, v)]
    expected = F.scaled_dot_product_attention(wide_q, wide_k, wide_v, attn_mask=seen.cuda(), enable_gqa=True).transpose(1, 2)
    oracle = torch.autograd.grad((expected * weight).sum(), wide)
    for found, true in zip((packed, *gradients), (expected, *oracle), strict=True):
        error = (found.double() - true).norm() / true.norm()
        assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 37, 256), (1, 5000, 8, 64), (2, 3, 9728)], ids=str)
def test_liger_computes_what_the_plain_bodies_do(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    x, up, d_y = (torch.randn(shape, device="cuda", dtype=dtype) for _ in range(3))
    weight, liger = torch.rand(shape[-1], device="cuda", dtype=dtype) + 0.5, kernels.Liger()
    close: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 2e-2}
    (y, root), (y_plain, root_plain) = liger.norm(x, weight, 1e-6), kernels.PLAIN.norm(x, weight, 1e-6)
    torch.testing.assert_close(y, y_plain, **close)
    torch.testing.assert_close(
        liger.norm_backward(d_y, x, weight, root), kernels.PLAIN.norm_backward(d_y, x, weight, root_plain), **close
    )
    torch.testing.assert_close(liger.gated(x, up), kernels.PLAIN.gated(x, up), **close)
    plain = kernels.PLAIN.gated_backward(d_y, x, up)
    torch.testing.assert_close(liger.gated_backward(d_y, x.clone(), up.clone()), plain, **close)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_liger_turns_queries_and_keys_alike(dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    shapes = [(1, 77, 6, 64), (1, 77, 2, 64)]
    q, k = (torch.randn(shape, device="cuda", dtype=dtype).transpose(1, 2) for shape in shapes)
    angles = torch.rand(1, 77, 32, device="cuda").repeat(1, 1, 2) * 6
    cos, sin, liger = angles.cos().to(dtype), angles.sin().to(dtype), kernels.Liger()
    close: dict[str, Any] = {"atol": 1e-5, "rtol": 1e-5} if dtype == torch.float32 else {"atol": 3e-2, "rtol": 2e-2}
    for name in ("rotated", "rotated_back"):
        expected = getattr(kernels.PLAIN, name)(q, k, cos, sin)
        found = getattr(liger, name)(q.clone(), k.clone(), cos, sin)
        torch.testing.assert_close(tuple(found), expected, **close)


def test_scores_are_those_of_the_cpu() -> None:
    model = tiny_model(vocab_size=512, hidden_size=128, num_attention_heads=2, num_key_value_heads=1, head_dim=64)
    aligned = [synthetic(index // 3, f"t{index // 3}#{index % 3}", 512, "step_wise", (4, 6)) for index in range(6)]
    expected = view_by_view(model, aligned, 8)
    views = [one.views for one in aligned]
    for dtype, close in ((torch.float32, 1e-4), (torch.bfloat16, 0.1)):
        found = TeacherScorer(model.to("cuda", dtype), top_k=8).score(views)
        assert max(float(np.abs(a.logprobs - b.logprobs).max()) for a, b in zip(expected, found, strict=True)) < close


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("less", [False, True], ids=["all kept", "computed again"])
def test_training_is_that_of_the_cpu(less: bool, kind: str, tmp_path: Path) -> None:
    """Llama's queries are turned as they come from a linear layer, Qwen3's after a norm."""
    model = tiny_model(kind=kind)
    rows = make_scored_rows(model, range(12), replay_injection("step_wise"))

    def curve(device: str) -> list[CurvePoint]:
        out = tmp_path / device
        found = distill(model, rows, settings=SETTINGS, regime=Regime(), out=out, device=device, activation_checkpointing=less)
        assert next(model.parameters()).device.type == "cpu"
        return list(found.curve)

    here, there = curve("cpu"), curve("cuda:0")
    assert [point.loss for point in there] == pytest.approx([point.loss for point in here], rel=1e-4, abs=1e-5)
    weights = load_file(tmp_path / "cpu" / "adapter_model.safetensors")
    for name, weight in load_file(tmp_path / "cuda:0" / "adapter_model.safetensors").items():
        torch.testing.assert_close(weight, weights[name], atol=2e-4, rtol=1e-2)


def test_half_precision_learns_as_well(tmp_path: Path) -> None:
    teacher = tiny_model()
    rows = make_scored_rows(teacher, range(24), replay_injection("step_wise"))
    settings = SETTINGS.model_copy(update={"epochs": 8})
    last = []
    for dtype in (torch.float32, torch.bfloat16):
        found = distill(
            tiny_model().to(dtype), rows, settings=settings, regime=Regime(), out=tmp_path / str(dtype), device="cuda:0"
        )
        losses = [point.loss for point in found.curve]
        assert losses[-1] < losses[0]
        last.append(losses[-1])
    assert last[1] == pytest.approx(last[0], rel=0.15)


def test_a_training_that_was_killed_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    model = tiny_model()
    rows = make_scored_rows(model, range(12), replay_injection("step_wise"))
    whole = distill(model, rows, settings=SETTINGS, regime=Regime(), out=tmp_path / "whole", device="cuda:0")

    before: list[CurvePoint] = []

    def kill(point: CurvePoint, _: int) -> None:
        before.append(point)
        if point.step == 3:
            raise KeyboardInterrupt

    kept: dict[str, Any] = {"settings": SETTINGS, "regime": Regime(), "checkpoint": tmp_path / "kept", "device": "cuda:0"}
    with pytest.raises(KeyboardInterrupt):
        distill(model, rows, out=tmp_path / "again", on_step=kill, **kept)
    again = distill(model, rows, out=tmp_path / "again", **kept)
    assert again.curve[: len(before)] == tuple(before)  # with the seconds that they took
    assert [point.loss for point in again.curve] == pytest.approx([point.loss for point in whole.curve], rel=1e-4)


@pytest.mark.parametrize("less", [False, True], ids=["all kept", "computed again"])
def test_memory_is_what_is_calculated(less: bool, tmp_path: Path) -> None:
    """Within 15%, of what the allocator gave out at most."""
    shape = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 6, "vocab_size": 32_000}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64}
    config = Qwen3Config(**shape, **heads, tie_word_embeddings=True)
    settings = DistillationSettings(epochs=1)
    told = training_memory(config, dtype="bfloat16", settings=settings, rows=[8192], activation_checkpointing=less)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    rows = [random_row(8192, 32_000, settings.top_k)]
    distill(tiny_model(), [random_row(64, 100, 8)], settings=settings, regime=Regime(), out=tmp_path / "a", device="cuda:0")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    distill(
        model,
        rows,
        settings=settings,
        regime=Regime(),
        out=tmp_path / "b",
        device="cuda:0",
        tokens_per_pass=8192,
        activation_checkpointing=less,
    )
    measured = torch.cuda.max_memory_allocated() - before
    print(f"calculated {told.peak / 1e6:.0f} MB, measured {measured / 1e6:.0f} MB")
    assert told.peak == pytest.approx(measured, rel=0.15)


def test_memory_that_runs_out_halves_the_passes_once(tmp_path: Path) -> None:
    model = random_model(8192, hidden=512)
    rows = [random_row(4096, 8192, 64, seed) for seed in range(4)]
    settings = DistillationSettings(epochs=1, tokens_per_batch=16_384)
    told = [training_memory(model.config, dtype="float32", settings=settings, rows=[4096] * count).peak for count in (2, 4)]
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction((sum(told) / 2 + torch.cuda.memory_allocated()) / total)
    try:
        found = distill(model, rows, settings=settings, regime=Regime(), out=tmp_path, device="cuda:0", tokens_per_pass=16_384)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "out of memory at step 0" in found.note
    assert not found.skipped


def test_torchrun_sets_up_nccl(tmp_path: Path) -> None:
    """One process: there is one GPU."""
    request = Request(tmp_path / "model", tmp_path / "out", SETTINGS, Regime(), device="cuda", base="tiny")
    model = tiny_model()
    model.save_pretrained(request.model)
    rows = make_scored_rows(model, range(12), replay_injection("step_wise"))
    told: list[CurvePoint] = []
    runtime = RuntimeSettings(processes=1, threads=1, device="cuda")
    found = train(request, rows, runtime, on_step=lambda point, _: told.append(point))
    alone = distill(model, rows, settings=SETTINGS, regime=Regime(), out=tmp_path / "alone", device="cuda:0")
    assert [point.loss for point in found.curve] == pytest.approx([point.loss for point in alone.curve], rel=1e-4)
    assert len(told) == len(found.curve)
