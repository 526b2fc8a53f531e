"""Normalisation, rotary embedding and gated activation of a transformer layer, each as one function that keeps what it needs.

transformers computes each in six to eight passes over memory, and keeps what every pass made. Where Liger is installed its
kernels compute; the bodies here say what, and stand in where they are not.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from types import MethodType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import SiLUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm, apply_rotary_pos_emb, rotate_half


class _RmsNorm(torch.autograd.Function):
    """y = w x / sqrt(mean(x²) + eps), for frozen w; the root in float32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, root = _bodies(x).norm(x, weight, eps)
        ctx.save_for_backward(x, weight, root)
        return y

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, None, None]:
        return _bodies(d_y).norm_backward(d_y, *ctx.saved_tensors), None, None


class _Gated(torch.autograd.Function):
    """y = silu(gate) x up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _bodies(gate).gated(gate, up)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> tuple[Tensor, Tensor]:
        return _bodies(d_y).gated_backward(d_y, *ctx.saved_tensors)


class _Rotated(torch.autograd.Function):
    """Queries and keys ``[B, heads, T, D]``, turned by the angle of their position; ``cos`` and ``sin`` ``[B or 1, T, D]``."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _bodies(q).rotated(q, k, cos, sin)

    @staticmethod
    def backward(ctx: Any, d_q: Tensor, d_k: Tensor) -> tuple[Tensor, Tensor, None, None]:
        return *_bodies(d_q).rotated_back(d_q, d_k, *ctx.saved_tensors), None, None


class Plain:
    """What is computed, in torch's operations."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The values, and what each row was multiplied with, float32."""
        wide = x.float()
        root = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        return weight * (wide * root).to(x.dtype), root

    def norm_backward(self, d_y: Tensor, x: Tensor, weight: Tensor, root: Tensor) -> Tensor:
        scaled, wide = (d_y * weight).float(), x.float()
        along = (scaled * wide).mean(-1, keepdim=True) * root.square()
        return (root * (scaled - wide * along)).to(x.dtype)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate) * up

    def gated_backward(self, d_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.silu_backward(d_y * up, gate), d_y * F.silu(gate)

    def rotated(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos[:, None], sin[:, None]
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin

    def rotated_back(self, d_q: Tensor, d_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self.rotated(d_q, d_k, cos, -sin)


class Liger:
    """The same by Liger's kernels."""

    def __init__(self) -> None:
        from liger_kernel.ops import rms_norm, rope, swiglu

        self._norms, self._gates, self._rope = rms_norm, swiglu, rope

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        y, _, root, *_ = self._norms.rms_norm_forward(x.contiguous(), weight, eps, 0.0, "llama", None)
        return y, root

    def norm_backward(self, d_y: Tensor, x: Tensor, weight: Tensor, root: Tensor) -> Tensor:
        block, warps = self._norms.calculate_settings(x.shape[-1])
        rows = x.contiguous().view(-1, x.shape[-1])
        llama = self._norms._CASTING_MODE_LLAMA.value
        found = self._norms.rms_norm_backward(
            d_y.contiguous(), rows, weight, root, 0.0, llama, block, warps, False, None, needs_dw=False
        )
        return found[0]

    def rotated(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        # It writes over what it is given, there and back; nothing else reads the two.
        with torch.cuda.device(q.device):  # the others see to it themselves
            return self._rope.rope_forward(q, k, cos, sin)[:2]

    def rotated_back(self, d_q: Tensor, d_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        with torch.cuda.device(d_q.device):
            return self._rope.rope_backward(d_q, d_k, cos, sin)[:2]

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return self._gates.swiglu_forward(gate.contiguous(), up.contiguous())[2]

    def gated_backward(self, d_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        # It writes over what it is given; nothing else reads the two.
        return self._gates.swiglu_backward(gate.contiguous(), up.contiguous(), d_y.contiguous())


PLAIN = Plain()


def _bodies(x: Tensor) -> Plain | Liger:
    """What computes on tensors that lie where ``x`` does."""
    return (_liger() if x.is_cuda else None) or PLAIN


@cache
def _liger() -> Liger | None:
    """None where it is not installed."""
    return Liger() if importlib.util.find_spec("liger_kernel") is not None else None


@contextmanager
def computing(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """``module`` computes ``forward`` meanwhile."""
    before = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        del module.forward
        if before is not None:
            module.forward = before


@contextmanager
def fused_layers(decoder: nn.Module) -> Iterator[None]:
    """The layers of ``decoder`` compute so meanwhile, where they do what Llama's do."""
    names = _rotating(decoder)
    rotate = names.get(ROTATE)
    with ExitStack() as meanwhile:
        for module in decoder.modules():
            if (forward := _replacement(module)) is not None:
                meanwhile.enter_context(computing(module, MethodType(forward, module)))
        if rotate is not None:
            meanwhile.callback(names.__setitem__, ROTATE, rotate)
            names[ROTATE] = _rotate
        yield


ROTATE = apply_rotary_pos_emb.__name__


def _rotating(decoder: nn.Module) -> dict[str, Any]:
    """The names of the file of ``decoder``, whose attention looks the rotary function up there at every call; empty where that
    is another function than Llama's, or replaced already."""
    for kind in type(decoder).__mro__:  # sharding puts a class of its own before it
        names = vars(sys.modules[kind.__module__])
        if ROTATE in names:
            halves = _same_code(names.get("rotate_half"), rotate_half)
            return names if halves and _same_code(names[ROTATE], apply_rotary_pos_emb) else {}
    return {}


def _replacement(module: nn.Module) -> Callable[..., Tensor] | None:
    if "forward" in vars(module):
        return None
    if computes_as(module, LlamaRMSNorm) and not module.weight.requires_grad:
        return _norm_forward
    if computes_as(module, LlamaMLP) and isinstance(module.act_fn, (nn.SiLU, SiLUActivation)):
        return _gated_forward
    return None


def computes_as(module: nn.Module, known: type[nn.Module]) -> bool:
    """Whether the class of ``module``, of whatever architecture, has the forward of ``known``, instruction by instruction."""
    return _same_code(type(module).forward, known.forward)


def _same_code(one: Any, other: Any) -> bool:
    own, known = (getattr(inspect.unwrap(function), "__code__", None) if function else None for function in (one, other))
    return own is not None and all(getattr(own, name) == getattr(known, name) for name in ("co_code", "co_names", "co_consts"))


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
    rotate: Any = _Rotated.apply if unsqueeze_dim == 1 else partial(apply_rotary_pos_emb, unsqueeze_dim=unsqueeze_dim)
    found: tuple[Tensor, Tensor] = rotate(q, k, cos, sin)
    return found


def _norm_forward(self: Any, x: Tensor) -> Tensor:
    y: Tensor = _RmsNorm.apply(x, self.weight, self.variance_epsilon)
    return y


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    y: Tensor = self.down_proj(_Gated.apply(self.gate_proj(x), self.up_proj(x)))
    return y
