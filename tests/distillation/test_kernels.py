"""Norms, rotary embedding and activations in one function each: the values and gradients of transformers' own modules."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from distillation_fakes import tiny_model
from transformers import Gemma3TextConfig, LlamaConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from evolve_dag.distillation.kernels import fused_layers

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def mlp(**changed: Any) -> LlamaMLP:
    return LlamaMLP(LlamaConfig(hidden_size=24, intermediate_size=40, num_attention_heads=4, **changed))


def norm(kind: type[torch.nn.Module]) -> torch.nn.Module:
    module = kind(24, eps=1e-6)
    torch.nn.init.normal_(module.weight, 1.0, 0.2)  # type: ignore[arg-type]
    return module


def both(module: torch.nn.Module, x: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Output and gradient of the input: as it is, and as it is replaced."""
    module.requires_grad_(False)
    found = []
    for replaced in (False, True):
        own = x.clone().requires_grad_()
        with fused_layers(module) if replaced else nullcontext():
            y = module(own)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y).to(y.dtype))
        assert own.grad is not None
        found.append((y.detach(), own.grad))
    return found


@pytest.mark.parametrize("dtype", CLOSE)
@pytest.mark.parametrize("make", [lambda: norm(LlamaRMSNorm), lambda: norm(Qwen3RMSNorm), mlp], ids=["llama", "qwen3", "mlp"])
def test_values_and_gradients_are_those_of_the_module(make: Any, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    module, x = make().to(dtype), torch.randn(2, 5, 24, dtype=dtype) * 3
    (y, d_x), (y_fused, d_x_fused) = both(module, x)
    assert torch.equal(y, y_fused)
    torch.testing.assert_close(d_x_fused, d_x, atol=CLOSE[dtype], rtol=CLOSE[dtype])


def test_a_row_of_zeros_has_a_finite_gradient() -> None:
    _, (y, d_x) = both(norm(LlamaRMSNorm), torch.zeros(1, 2, 24))
    assert not y.any()
    assert d_x.isfinite().all()


def test_what_computes_otherwise_stays() -> None:
    gemma = Gemma3MLP(
        Gemma3TextConfig(hidden_size=24, intermediate_size=40, num_attention_heads=4, hidden_activation="gelu_pytorch_tanh")
    )
    modules = [gemma, Gemma3RMSNorm(24), mlp(hidden_act="gelu"), torch.nn.LayerNorm(24)]
    with fused_layers(torch.nn.ModuleList(modules)):
        assert not any("forward" in vars(module) for module in modules)


def test_modules_come_back_as_they_were_after_an_error() -> None:
    module = mlp()
    seen = []

    def fail() -> None:
        with fused_layers(module):
            seen.append("forward" in vars(module))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert seen == [True]
    assert "forward" not in vars(module)


def test_a_norm_that_learns_keeps_its_gradient() -> None:
    module = norm(LlamaRMSNorm)
    with fused_layers(module):
        module(torch.randn(2, 24)).sum().backward()
    assert module.weight.grad is not None


def test_a_model_that_turns_otherwise_keeps_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Some have Llama's rotary function over another ``rotate_half``."""
    model: Any = tiny_model()
    home: Any = sys.modules[type(model.model).__module__]
    monkeypatch.setattr(home, "rotate_half", lambda x: torch.cat((x[..., 4:], -x[..., :4]), dim=-1))
    before = home.apply_rotary_pos_emb
    with fused_layers(model.model):
        assert home.apply_rotary_pos_emb is before


def test_within_one_another_the_outer_one_stays() -> None:
    model: Any = tiny_model().requires_grad_(False)
    home: Any = sys.modules[type(model.model).__module__]
    before = home.apply_rotary_pos_emb
    with fused_layers(model.model):
        with fused_layers(model.model):
            pass
        assert home.apply_rotary_pos_emb is not before
        assert "forward" in vars(model.model.norm)
    assert home.apply_rotary_pos_emb is before


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_a_model_learns_the_same(kind: str) -> None:
    """Rotary embedding included."""
    found = []
    for replaced in (False, True):
        model: Any = tiny_model(kind=kind)
        home: Any = sys.modules[type(model.model).__module__]
        before, embedding = home.apply_rotary_pos_emb, model.get_input_embeddings().weight
        model.requires_grad_(False)
        embedding.requires_grad_()
        ids = torch.arange(24)[None] % 7
        with fused_layers(model.model) if replaced else nullcontext():
            assert (home.apply_rotary_pos_emb is not before) == replaced
            loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
        assert home.apply_rotary_pos_emb is before
        found.append((loss.detach(), embedding.grad))
    assert torch.equal(found[0][0], found[1][0])
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-6, rtol=1e-4)
