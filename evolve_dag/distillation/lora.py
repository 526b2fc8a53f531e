"""A LoRA layer as one function: half the passes over the activations of peft's own, and less kept for the way back.

Base weights are frozen and may be in half precision or in 4 bit; the LoRA matrices are float32 and their gradients are too. The
product is computed in the number format of the base.
"""

from __future__ import annotations

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
        ctx: Any, x: Tensor, weight: Tensor, state: Any, bias: Tensor | None, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        full = dense(weight, state)
        x = x.to(full.dtype)
        narrow = x @ a.to(x.dtype).t()
        y = F.linear(x, full, bias)
        y.view(-1, y.shape[-1]).addmm_(narrow.reshape(-1, narrow.shape[-1]), b.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, narrow, weight, a, b)  # not `full`: in 4 bit it is read once more on the way back
        ctx.state, ctx.scale = state, scale
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow, weight, a, b = ctx.saved_tensors
        flat_y, flat_x = d_y.reshape(-1, d_y.shape[-1]), x.reshape(-1, x.shape[-1])
        d_narrow = flat_y @ b.to(d_y.dtype)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (flat_y @ dense(weight, ctx.state)).addmm_(d_narrow, a.to(d_y.dtype), alpha=ctx.scale).view(x.shape)
        d_a = (d_narrow.t() @ flat_x).to(a.dtype).mul_(ctx.scale)
        d_b = (flat_y.t() @ narrow.reshape(-1, narrow.shape[-1])).to(b.dtype).mul_(ctx.scale)
        return d_x, None, None, None, d_a, d_b, None


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
    (adapter,) = self.lora_A
    base, a, b = self.base_layer, self.lora_A[adapter], self.lora_B[adapter]
    state = state_of(base.weight)
    return _LoraLinear.apply(x, base.weight, state, base.bias, a.weight, b.weight, self.scaling[adapter])
