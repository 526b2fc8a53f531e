"""Norms, rotary embedding and activations in one function each: the values and gradients of transformers' own modules."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.gemma3.modeling_gemma3 import Gemma3MLP, Gemma3RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from evolve_dag.inference.kernels import PLAIN, fused_layers

CLOSE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 40, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def tiny_model(kind: str = "qwen3") -> Any:
    torch.manual_seed(0)
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**SHAPE, **HEADS)).eval()
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE, **HEADS)).eval()


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
    torch.testing.assert_close(y_fused, y, atol=CLOSE[dtype] / 10, rtol=CLOSE[dtype])
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


def test_the_rotary_function_comes_back_with_the_last_of_several_models() -> None:
    """A policy that samples and a teacher that scores do so in threads of their own."""
    one, other = tiny_model(), tiny_model()
    home: Any = sys.modules[type(one).__module__]
    before = home.apply_rotary_pos_emb
    first, second = fused_layers(one), fused_layers(other)
    first.__enter__()
    second.__enter__()
    ours = home.apply_rotary_pos_emb
    assert ours is not before
    first.__exit__(None, None, None)
    assert home.apply_rotary_pos_emb is ours
    second.__exit__(None, None, None)
    assert home.apply_rotary_pos_emb is before


def test_turning_and_turning_back_are_those_of_the_whole_product() -> None:
    """Forward against the formula, backward against autograd through it."""
    torch.manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, requires_grad=True) for heads in (4, 2))
    angles = torch.rand(1, 5, 4).repeat(1, 1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected = apply_rotary_pos_emb(q, k, cos, sin)
    found = PLAIN.rotated(q.detach(), k.detach(), cos, sin)
    d_q, d_k = torch.randn_like(q), torch.randn_like(k)
    back = torch.autograd.grad(expected, (q, k), (d_q, d_k))
    for a, b in zip((*found, *PLAIN.rotated_back(d_q, d_k, cos, sin)), (*expected, *back), strict=True):
        torch.testing.assert_close(a, b.detach())


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
    torch.testing.assert_close(found[1][0], found[0][0], atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(found[1][1], found[0][1], atol=1e-6, rtol=1e-4)
