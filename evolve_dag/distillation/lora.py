"""A LoRA layer as one function: half the passes over the activations of peft's own, and less kept for the way back.

Base weights are frozen and may be in half precision or in 4 bit; the LoRA matrices are float32 and their gradients are too. The
product is computed in the number format of the base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evolve_dag.inference.quantization import dense, state_of


class _LoraLinear(torch.autograd.Function):
    """y = x W' + bias + scale x A' B', for frozen W."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        state: Any,
        bias: Tensor | None,
        a: Tensor,
        b: Tensor,
        scale: float,
        narrow_matrices: tuple[Tensor, Tensor],
    ) -> Tensor:
        full = dense(weight, state)
        x = x.to(full.dtype)
        low_a, low_b = narrow_matrices
        narrow = x @ low_a.t()
        y = F.linear(x, full, bias)
        y.view(-1, y.shape[-1]).addmm_(narrow.reshape(-1, narrow.shape[-1]), low_b.t(), alpha=scale)
        ctx.save_for_backward(x, narrow, weight, low_a, low_b)  # not `full`: in 4 bit it is read once more on the way back
        ctx.state, ctx.scale, ctx.kept = state, scale, a.dtype
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow, weight, low_a, low_b = ctx.saved_tensors
        flat_y, flat_x = d_y.reshape(-1, d_y.shape[-1]), x.reshape(-1, x.shape[-1])
        d_narrow = flat_y @ low_b
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (flat_y @ dense(weight, ctx.state)).addmm_(d_narrow, low_a, alpha=ctx.scale).view(x.shape)
        d_a = _wide_product(d_narrow.t(), flat_x, ctx.kept).mul_(ctx.scale)
        d_b = _wide_product(flat_y.t(), narrow.reshape(-1, narrow.shape[-1]), ctx.kept).mul_(ctx.scale)
        return d_x, None, None, None, d_a, d_b, None, None


def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``a @ b`` in a number format that is at least as wide as theirs."""
    if a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)  # the sums are float32 anyway: not rounded in between
    if a.dtype == torch.float16:  # which ends at 65,504; a sum over the tokens of a pass need not
        a, b = a.to(dtype), b.to(dtype)
    return (a @ b).to(dtype)


def fuse(wrapped: Any) -> None:
    """Let the LoRA layers that :func:`~evolve_dag.distillation.adapter.attach` made compute as one function.

    Layers over anything but a linear layer, ordinary or in 4 bit, stay peft's.
    """
    from peft.tuners.lora import Linear, LoraLayer

    for module in wrapped.modules():
        if not isinstance(module, LoraLayer):
            continue
        ordinary = type(module) is Linear and type(module.base_layer) is torch.nn.Linear
        if ordinary or state_of(module.base_layer.weight) is not None:
            module.forward = MethodType(_forward, module)


def _forward(self: Any, x: Tensor, *_: Any, **__: Any) -> Tensor:
    base, (a, b) = self.base_layer, _matrices(self)
    narrow = getattr(self, NARROWED, None) or _narrow(self)
    return _LoraLinear.apply(x, base.weight, state_of(base.weight), base.bias, a, b, *self.scaling.values(), narrow)


@contextmanager
def narrowed(model: Any) -> Iterator[None]:
    """The matrices of all fused layers of ``model`` in the number format of the base, made once for the passes meanwhile, in
    which they must not change."""
    layers = [one for one in model.modules() if hasattr(one, "lora_A") and isinstance(vars(one).get("forward"), MethodType)]
    for layer in layers:
        setattr(layer, NARROWED, _narrow(layer))
    try:
        yield
    finally:
        for layer in layers:
            delattr(layer, NARROWED)


NARROWED = "evolve_narrowed"


def _matrices(layer: Any) -> tuple[Tensor, Tensor]:
    (a,), (b,) = layer.lora_A.values(), layer.lora_B.values()
    return a.weight, b.weight


def _narrow(layer: Any) -> tuple[Tensor, ...]:
    weight = layer.base_layer.weight
    dtype = getattr(state_of(weight), "dtype", weight.dtype)
    return tuple(one.detach().to(dtype) for one in _matrices(layer))
