from __future__ import annotations

import copy

import pytest
import torch
from distillation_fakes import tiny_model

from evolve_dag.distillation.adapter import attach
from evolve_dag.distillation.lora import _wide_product, fuse


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
