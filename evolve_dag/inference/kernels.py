"""Normalisation, rotary embedding and gated activation of a transformer layer, each as one function that keeps what it needs.

transformers computes each in six to eight passes over memory, and keeps what every pass made. Where Liger is installed its
kernels compute; the bodies here say what, and stand in where they are not.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache, partial
from threading import Lock
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
    """What is computed, in torch's operations, few of which make a tensor of their own."""

    def norm(self, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        """The values, and what each row was multiplied with, float32."""
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        root = length.square_().div_(x.shape[-1]).add_(eps).rsqrt_()
        return (x * root).to(x.dtype).mul_(weight), root

    def norm_backward(self, d_y: Tensor, x: Tensor, weight: Tensor, root: Tensor) -> Tensor:
        scaled, wide = (d_y * weight).float(), x.float()
        along = torch.linalg.vecdot(scaled, wide)[..., None].mul_(root.square()).div_(-x.shape[-1])
        return scaled.addcmul_(wide, along).mul_(root).to(x.dtype)

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        return F.silu(gate).mul_(up)

    def gated_backward(self, d_y: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ops.aten.silu_backward(d_y * up, gate), F.silu(gate).mul_(d_y)

    def rotated(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = cos[:, None], sin[:, None]
        return _turned(q, cos, sin), _turned(k, cos, sin)

    def rotated_back(self, d_q: Tensor, d_k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        return self.rotated(d_q, d_k, cos, -sin)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, half by half into one tensor."""
    y = torch.empty_like(x)
    (a, b), (y_a, y_b), (cos_a, cos_b), (sin_a, sin_b) = (one.chunk(2, dim=-1) for one in (x, y, cos, sin))
    torch.mul(a, cos_a, out=y_a).addcmul_(b, sin_a, value=-1)
    torch.mul(b, cos_b, out=y_b).addcmul_(a, sin_b)
    return y


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
def fused_layers(model: nn.Module) -> Iterator[None]:
    """The layers of ``model``, whole or its body alone, compute so meanwhile, where they do what Llama's do. Norms that are
    learned themselves do so without gradients only."""
    with ExitStack() as meanwhile:
        for module in model.modules():
            if (forward := _replacement(module)) is not None:
                meanwhile.enter_context(computing(module, MethodType(forward, module)))
        meanwhile.enter_context(_rotating(model))
        yield


ROTATE = apply_rotary_pos_emb.__name__
_replacing, _users, _originals = Lock(), Counter[str](), dict[str, Any]()
"""By the file of an architecture: how many models compute so at the moment, in whatever thread, and the function replaced."""


@contextmanager
def _rotating(model: nn.Module) -> Iterator[None]:
    """The rotary function in the file of ``model``, whose attention looks it up there at every call, is ours meanwhile, where
    it is Llama's."""
    kinds = (kind.__module__ for kind in type(model).__mro__)  # sharding puts a class of its own before it
    file = next((name for name in kinds if ROTATE in vars(sys.modules[name])), "")
    names = vars(sys.modules[file]) if file else {}
    with _replacing:
        ours = bool(file) and (file in _originals or _turns_as_llama(names))
        if ours:
            _originals.setdefault(file, names[ROTATE])
            _users[file] += 1
            names[ROTATE] = _rotate
    try:
        yield
    finally:
        with _replacing:
            if ours:
                _users[file] -= 1
                if not _users[file]:
                    names[ROTATE] = _originals.pop(file)


def _turns_as_llama(names: dict[str, Any]) -> bool:
    return _same_code(names.get("rotate_half"), rotate_half) and _same_code(names[ROTATE], apply_rotary_pos_emb)


def _replacement(module: nn.Module) -> Callable[..., Tensor] | None:
    if "forward" in vars(module):
        return None
    if computes_as(module, LlamaRMSNorm) and not (torch.is_grad_enabled() and module.weight.requires_grad):
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
    rotate: Any
    if unsqueeze_dim != 1:
        rotate = partial(apply_rotary_pos_emb, unsqueeze_dim=unsqueeze_dim)
    else:
        rotate = _Rotated.apply if _learns(q, k) else _bodies(q).rotated
    found: tuple[Tensor, Tensor] = rotate(q, k, cos, sin)
    return found


def _norm_forward(self: Any, x: Tensor) -> Tensor:
    if not _learns(x):
        return _bodies(x).norm(x, self.weight, self.variance_epsilon)[0]
    y: Tensor = _RmsNorm.apply(x, self.weight, self.variance_epsilon)
    return y


def _gated_forward(self: Any, x: Tensor) -> Tensor:
    gate, up = self.gate_proj(x), self.up_proj(x)
    y: Tensor = self.down_proj((_Gated.apply if _learns(gate, up) else _bodies(x).gated)(gate, up))
    return y


def _learns(*given: Tensor) -> bool:
    return torch.is_grad_enabled() and any(one.requires_grad for one in given)
