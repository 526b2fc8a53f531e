from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from distillation_fakes import tiny_model

from evolve_dag.distillation.adapter import attach
from evolve_dag.inference.lora import _wide_product, can_merge, fuse, merge, wear


def trained_adapter(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    wrapped = attach(model, rank=4, alpha=8, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return wrapped


def step(wrapped: torch.nn.Module) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    wrapped.zero_grad()
    logits = wrapped(input_ids=torch.arange(8, 40).reshape(2, 16)).logits
    logits.float().square().mean().backward()
    found = {name: one.grad.clone() for name, one in wrapped.named_parameters() if one.grad is not None}
    return logits.detach(), found


@pytest.mark.parametrize("bias", [False, True])
def test_fused_layers_give_what_peft_gives(bias: bool) -> None:
    wrapped = trained_adapter(tiny_model(attention_bias=bias))
    expected, gradients = step(wrapped)
    fuse(wrapped)
    found, fused = step(wrapped)
    torch.testing.assert_close(found, expected)
    assert fused.keys() == gradients.keys()
    assert len(fused) == 2 * 7 * 2
    for name, gradient in fused.items():
        torch.testing.assert_close(gradient, gradients[name])


def test_the_lora_matrices_of_a_half_precision_base_stay_float32() -> None:
    wrapped = trained_adapter(tiny_model().to(torch.bfloat16))
    expected, gradients = step(wrapped)
    fuse(wrapped)
    found, fused = step(wrapped)
    assert found.dtype == torch.bfloat16
    assert all(gradient.dtype == torch.float32 for gradient in fused.values())
    torch.testing.assert_close(found, expected, atol=0.05, rtol=0.05)
    for name, gradient in fused.items():
        assert (gradient - gradients[name]).norm() < 0.1 * gradients[name].norm()


def test_a_copy_has_its_own_weights() -> None:
    wrapped = trained_adapter(tiny_model())
    fuse(wrapped)
    other = copy.deepcopy(wrapped)
    for name, parameter in other.named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()
    before, _ = step(wrapped)
    without, _ = step(other)
    torch.testing.assert_close(without, tiny_model()(input_ids=torch.arange(8, 40).reshape(2, 16)).logits)
    assert not torch.allclose(before, without, atol=1e-3)
    assert torch.equal(step(wrapped)[0], before)


def test_a_gradient_beyond_the_largest_number_of_float16_is_one() -> None:
    token_N = torch.full((4096, 1), 10.0, dtype=torch.float16)
    assert float(_wide_product(token_N.t(), token_N, torch.float32)) == 409_600


IDS = torch.randint(8, 60, (16, 32), generator=torch.Generator().manual_seed(1))


def logits(model: torch.nn.Module) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=IDS).logits
    return found.detach().float()


def small_adapter() -> torch.nn.Module:
    """Over a base in bfloat16: most of it is less than half a unit in the last place of what it is added to."""
    wrapped = trained_adapter(tiny_model(attention_bias=True).to(torch.bfloat16))
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.mul_(3e-4)
    return wrapped


def kept(found: torch.Tensor, wrapped: Any) -> float:
    """The share of what the adapter changes in float32 that ``found`` has."""
    wide = copy.deepcopy(wrapped).float()
    change = logits(wide) - logits(copy.deepcopy(wide).unload())
    return float(((found - logits(copy.deepcopy(wrapped).unload())) * change).sum() / change.square().sum())


@torch.no_grad()
def test_a_small_adapter_is_not_rounded_away() -> None:
    """As it is where it is added to a product that is rounded already (peft's layer), or to the weights."""
    wrapped = small_adapter()
    added, merged = logits(wrapped), logits(copy.deepcopy(wrapped).merge_and_unload())
    assert not can_merge(wrapped)
    worn = merge(copy.deepcopy(wrapped))  # what acts and teaches
    assert kept(logits(worn), wrapped) > 0.8
    assert kept(added, wrapped) < 0.6
    assert kept(merged, wrapped) < 0.6


def test_what_learns_computes_as_what_acts() -> None:
    wrapped = small_adapter()
    worn = wear(copy.deepcopy(wrapped))
    fuse(wrapped)
    assert torch.equal(logits(wrapped.eval()), logits(worn))  # one with a graph behind it, one without
    with torch.no_grad():
        assert torch.equal(logits(wrapped), logits(worn))


def test_in_float32_it_is_merged() -> None:
    wrapped = trained_adapter(tiny_model())
    assert can_merge(wrapped)
    expected = logits(copy.deepcopy(wrapped).eval())
    merged = merge(wrapped)
    assert not any("lora" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(logits(merged), expected)
