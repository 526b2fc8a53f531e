"""A LoRA layer as one function: half the passes over the activations of peft's own, and less kept for the way back.

Base weights are frozen and may be in half precision or in 4 bit; the LoRA matrices are float32 and their gradients are too. The
product is computed in the number format of the base. Where the base is in half precision, rollouts and teachers compute so too
(:func:`wear`): added into such weights, much of what was learned would be rounded away.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from evolve_dag.inference.quantization import dense, is_quantized, state_of


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
        x, narrow, y = _product(x, dense(weight, state), bias, narrow_matrices, scale)
        ctx.save_for_backward(x, narrow, weight, *narrow_matrices)  # in 4 bit the full weight is read once more on the way back
        ctx.state, ctx.scale, ctx.kept = state, scale, a.dtype
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor | None, ...]:
        x, narrow, weight, low_a, low_b = ctx.saved_tensors
        flat_y, flat_x = d_y.reshape(-1, d_y.shape[-1]), x.reshape(-1, x.shape[-1])
        d_narrow = flat_y @ low_b
        d_x = None
        if ctx.needs_input_grad[0]:
            full = dense(weight, ctx.state)
            if full.dtype == torch.float32:
                d_x = (flat_y @ full).addmm_(d_narrow, low_a, alpha=ctx.scale).view(x.shape)
            else:
                d_x = _sum(d_narrow @ low_a, ctx.scale, flat_y, full).view(x.shape)
        d_a = _wide_product(d_narrow.t(), flat_x, ctx.kept).mul_(ctx.scale)
        d_b = _wide_product(narrow.reshape(-1, narrow.shape[-1]).t(), flat_y, ctx.kept).mul_(ctx.scale)
        return d_x, None, None, None, d_a, d_b.t(), None, None


def _product(
    x: Tensor, full: Tensor, bias: Tensor | None, narrow_matrices: tuple[Tensor, Tensor], scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The input in the number format of the weight, x A', and y."""
    low_a, low_b = narrow_matrices
    x = x.to(full.dtype)
    narrow = x @ low_a.t()
    flat = narrow.reshape(-1, narrow.shape[-1])
    if full.dtype == torch.float32:
        y = F.linear(x, full, bias)
        y.view(-1, y.shape[-1]).addmm_(flat, low_b.t(), alpha=scale)
        return x, narrow, y
    y = _sum(flat @ low_b.t(), scale, x.reshape(-1, x.shape[-1]), full.t()).view(*x.shape[:-1], full.shape[0])
    return x, narrow, y if bias is None else y.add_(bias)


def _sum(low: Tensor, scale: float, x: Tensor, full: Tensor) -> Tensor:
    """``low * scale + x @ full`` in half precision and in place, rounded once.

    The small part comes first, and the product is added to it while its sums are float32 still. The other way round, what is
    less than half a unit in the last place of a product that is rounded already would be lost: nine tenths of what a short
    training had learned (docs/LOG.md).
    """
    return low.mul_(scale).addmm_(x, full)


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
    narrow: tuple[Tensor, Tensor] = getattr(self, NARROWED, None) or _narrow(self)
    if not torch.is_grad_enabled():
        return _product(x, dense(base.weight, state_of(base.weight)), base.bias, narrow, *self.scaling.values())[-1]
    return _LoraLinear.apply(x, base.weight, state_of(base.weight), base.bias, a, b, *self.scaling.values(), narrow)


def can_merge(wrapped: Any) -> bool:
    """Whether LoRA matrices can be added into the weights of a peft model and leave the policy that was trained.

    In float32 alone. What adds less than half a unit in a weight's last place is lost: in bfloat16 nine tenths of what a short
    training had learned at a small rate (docs/LOG.md), in 4 bit more.
    """
    half = (torch.bfloat16, torch.float16)
    return not is_quantized(wrapped) and not any(one.dtype in half for one in wrapped.parameters())


def merge(wrapped: Any) -> Any:
    """The policy of a peft model, to act; the wrapper must not be used afterwards.

    Merged into its base where that leaves the policy that was trained (:func:`can_merge`), since unmerged LoRA costs rollouts
    20-37%; else with the adapter beside.
    """
    if not can_merge(wrapped):
        return wear(wrapped)
    base = wrapped.merge_and_unload()
    for name in ("peft_config", "_hf_peft_config_loaded"):  # peft's notes: the next adapter would be taken for a second one
        if name in vars(base):
            delattr(base, name)
    return base.eval()


def wear(wrapped: Any) -> Any:
    """A peft model in evaluation mode, its adapter beside the base for good, computed as in training, which must be over."""
    fuse(wrapped)
    _narrow_all(wrapped)
    return wrapped.eval()


@contextmanager
def narrowed(model: Any) -> Iterator[None]:
    """The matrices of all fused layers of ``model`` in the number format of the base, made once for the passes meanwhile, in
    which they must not change."""
    layers = _narrow_all(model)
    try:
        yield
    finally:
        for layer in layers:
            delattr(layer, NARROWED)


NARROWED = "evolve_narrowed"


def _narrow_all(model: Any) -> list[Any]:
    layers = [one for one in model.modules() if hasattr(one, "lora_A") and isinstance(vars(one).get("forward"), MethodType)]
    for layer in layers:
        setattr(layer, NARROWED, _narrow(layer))
    return layers


def _matrices(layer: Any) -> tuple[Tensor, Tensor]:
    (a,), (b,) = layer.lora_A.values(), layer.lora_B.values()
    return a.weight, b.weight


def _narrow(layer: Any) -> tuple[Tensor, Tensor]:
    weight, (a, b) = layer.base_layer.weight, _matrices(layer)
    dtype = getattr(state_of(weight), "dtype", weight.dtype)
    return a.detach().to(dtype), b.detach().to(dtype)
