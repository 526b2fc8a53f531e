"""What is minimised between teacher p and student q on every action token (METHOD: regime).

Pure functions over tensors. Shapes: N action tokens, V vocabulary, K classes the teacher kept, H hidden
size. All values are in nats. A top-k teacher is compared on K + 1 classes: its K most probable tokens and
everything else together (the tail). Merging classes can only lower a KL divergence (data processing
inequality), so the top-k value is a lower bound of the full one, and equals it for K = V.

The divergences themselves are rows of divergences.py.

The number that training minimises is the (weighted) mean over all action tokens of a batch: a long action counts by
its tokens, tokens outside actions do not count at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evolve_dag.config.parts import part
from evolve_dag.distillation.divergences import Divergence, forward_kl

CHUNK_ELEMENTS = 1 << 22
"""Logits held at once (16 MB in float32, what a cache holds)."""

LEAST_CHUNK = 128
"""Fewest action tokens of a chunk: with fewer rows the product with the output layer only waits for its weights."""


@dataclass(frozen=True, slots=True)
class Teacher:
    """The teacher's distribution on N action tokens."""

    logprobs: Tensor
    """``(N, V)`` for the full vocabulary, ``(N, K)`` of the kept tokens for a top-k teacher."""
    ids: Tensor | None = None
    """``(N, K)`` token ids of ``logprobs``, or None for the full vocabulary."""
    tail: Tensor | None = None
    """``(N,)`` log of the probability of all other tokens together; with ``ids`` only."""

    def __getitem__(self, rows: slice) -> Teacher:
        return Teacher(
            self.logprobs[rows],
            None if self.ids is None else self.ids[rows],
            None if self.tail is None else self.tail[rows],
        )


def teacher_classes(teacher: Teacher, vocabulary: int) -> Tensor:
    """Teacher log-probabilities per class: ``(N, V)``, or ``(N, K + 1)`` with the tail last.

    With K = V nothing is left for the tail, so there is no such class.
    """
    if teacher.ids is None or teacher.tail is None or teacher.ids.shape[1] >= vocabulary:
        return teacher.logprobs
    return torch.cat([teacher.logprobs, teacher.tail[:, None]], dim=1)


def student_classes(logits_N_V: Tensor, teacher: Teacher) -> Tensor:
    """Student log-probabilities of the same classes as :func:`teacher_classes`.

    The tail is the log-sum-exp over the other tokens, not log(1 - sum): the difference loses every digit
    once the kept tokens hold nearly all mass, and its gradient explodes there.
    """
    if teacher.ids is None:
        return torch.log_softmax(logits_N_V, dim=-1)
    log_z = torch.logsumexp(logits_N_V, dim=-1, keepdim=True)
    kept = logits_N_V.gather(1, teacher.ids) - log_z
    if teacher.tail is None or teacher.ids.shape[1] >= logits_N_V.shape[1]:
        return kept
    others = logits_N_V.scatter(1, teacher.ids, -math.inf)
    return torch.cat([kept, torch.logsumexp(others, dim=-1, keepdim=True) - log_z], dim=1)


def token_losses(
    kind: str,
    logits_N_V: Tensor,
    *,
    teacher: Teacher | None = None,
    sampled_N: Tensor | None = None,
    **options: float,
) -> tuple[Tensor, Tensor]:
    """Loss and divergence of every action token.

    Args:
        logits_N_V: student logits; half-precision is widened to float32 first.
        kind: name of a divergence, as in the experiment file.
        teacher: needed by every kind but ``cross_entropy``.
        sampled_N: sampled ids, needed by ``cross_entropy``.
        options: the divergence's own keys, e.g. ``jsd_weight``.

    Returns:
        ``(N,)`` what is minimised, and ``(N,)`` the forward KL without gradient (NaN without a teacher): the
        one yardstick on which curves of different regimes can be laid over each other.

    Raises:
        ValueError: the kind is unknown, or what it needs is not given.
    """
    logits = _widened(logits_N_V)
    p = q = sampled = None
    if teacher is not None:
        p = teacher_classes(teacher, logits.shape[-1]).to(logits.dtype)
        q = student_classes(logits, teacher)
    if sampled_N is not None:
        sampled = torch.log_softmax(logits, dim=-1).gather(1, sampled_N[:, None]).squeeze(1)
    return _losses(kind, p, q, sampled, options)


def _widened(logits: Tensor) -> Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


def _losses(
    kind: str, p: Tensor | None, q: Tensor | None, sampled: Tensor | None, options: Mapping[str, float]
) -> tuple[Tensor, Tensor]:
    """Loss and forward KL from log-probabilities of teacher, student and the sampled token."""
    divergence: Divergence = part("divergence", kind)
    if divergence.loss is None:
        if sampled is None:
            raise ValueError(f"{kind} needs the sampled ids")
        loss = -sampled
    elif p is None or q is None:
        raise ValueError(f"{kind} needs the teacher's log-probabilities")
    else:
        loss = divergence.loss(p, q, **options)
    if p is None or q is None:
        return loss, torch.full_like(loss, math.nan).detach()
    return loss, forward_kl(p, q.detach()).detach()


def token_losses_from_hidden(
    kind: str,
    hidden_N_H: Tensor,
    head: nn.Linear,
    *,
    teacher: Teacher | None = None,
    sampled_N: Tensor | None = None,
    chunk: int | None = None,
    **options: float,
) -> tuple[Tensor, Tensor]:
    """:func:`token_losses` on hidden states of the action positions, with no more than ``chunk`` rows of logits at a time.

    The output layer is frozen and a token's loss depends on its own hidden state alone, so the gradient with respect to
    that state is computed together with the loss, while the logits are there, and no chunk is computed twice.

    Args:
        head: the output layer, frozen, ``(n, H) -> (n, V)``.
        chunk: action tokens whose logits are held at once; None: :func:`default_chunk`. The value does not change.
    """
    size = chunk or default_chunk(head.weight.shape[0])
    losses, divergences = _FusedLosses.apply(hidden_N_H, kind, head, teacher, sampled_N, options, size)
    return losses, divergences


def default_chunk(vocabulary: int) -> int:
    """Action tokens whose logits are held at once: 16 MB of them, but enough rows for one good matrix product."""
    return max(LEAST_CHUNK, CHUNK_ELEMENTS // vocabulary)


class _FusedLosses(torch.autograd.Function):
    """Output layer and divergence, chunk by chunk, the gradient made on the way forward."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_N_H: Tensor,
        kind: str,
        head: nn.Linear,
        teacher: Teacher | None,
        sampled_N: Tensor | None,
        options: Mapping[str, float],
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        gradient = torch.empty_like(hidden_N_H) if ctx.needs_input_grad[0] else None
        parts = []
        for start in range(0, max(1, hidden_N_H.shape[0]), chunk):
            rows = slice(start, start + chunk)
            loss, divergence, d_logits = _chunk_losses(
                kind,
                F.linear(hidden_N_H[rows], head.weight, head.bias),
                None if teacher is None else teacher[rows],
                None if sampled_N is None else sampled_N[rows],
                options,
            )
            if gradient is not None:
                gradient[rows] = d_logits.to(head.weight.dtype) @ head.weight
            parts.append((loss, divergence))
        ctx.save_for_backward(gradient)
        losses, divergences = (torch.cat(column) for column in zip(*parts, strict=True))
        ctx.mark_non_differentiable(divergences)
        return losses, divergences

    @staticmethod
    def backward(ctx: Any, d_losses_N: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * d_losses_N[:, None].to(gradient.dtype), None, None, None, None, None, None


def _chunk_losses(
    kind: str, logits_N_V: Tensor, teacher: Teacher | None, sampled_N: Tensor | None, options: Mapping[str, float]
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, divergence and the gradient of the loss with respect to the logits; overwrites ``logits_N_V``."""
    logits = _widened(logits_N_V)
    kept = None if sampled_N is None else sampled_N[:, None]
    if teacher is not None:
        kept = teacher.ids
    if kept is not None and kept.shape[1] < logits.shape[1]:
        return _few_classes(kind, logits, kept, teacher, sampled_N, options)
    with torch.enable_grad():
        logits = logits.detach().requires_grad_()
        loss, divergence = token_losses(kind, logits, teacher=teacher, sampled_N=sampled_N, **options)
        (d_logits,) = torch.autograd.grad(loss.sum(), logits)
    return loss.detach(), divergence, d_logits


def _few_classes(
    kind: str,
    logits_N_V: Tensor,
    kept_ids_N_K: Tensor,
    teacher: Teacher | None,
    sampled_N: Tensor | None,
    options: Mapping[str, float],
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`_chunk_losses` where only K of the tokens have a class of their own.

    All others act through one number, their log-sum-exp. So autograd works on K + 1 numbers per token, and the vocabulary
    is passed over in place where autograd on it would make a dozen copies (half the time, docs/LOG.md).
    """
    kept = logits_N_V.gather(1, kept_ids_N_K)
    sampled = None if sampled_N is None else logits_N_V.gather(1, sampled_N[:, None])
    logits_N_V.scatter_(1, kept_ids_N_K, -math.inf)
    largest = logits_N_V.amax(-1, keepdim=True)
    weights = logits_N_V.sub_(largest).exp_()
    total = weights.sum(-1, keepdim=True)
    others = total.log() + largest
    with torch.enable_grad():
        leaves = [leaf.requires_grad_() for leaf in (kept, others, sampled) if leaf is not None]
        loss, divergence = _class_losses(kind, kept, others, sampled, teacher, options)
        d_kept, d_others, *d_sampled = torch.autograd.grad(loss.sum(), leaves, materialize_grads=True)
    d_logits = weights.mul_(d_others / total).scatter_(1, kept_ids_N_K, d_kept)
    if sampled_N is not None:
        d_logits.scatter_add_(1, sampled_N[:, None], d_sampled[0])
    return loss.detach(), divergence, d_logits


def _class_losses(
    kind: str,
    kept_N_K: Tensor,
    others_N_1: Tensor,
    sampled_N_1: Tensor | None,
    teacher: Teacher | None,
    options: Mapping[str, float],
) -> tuple[Tensor, Tensor]:
    """:func:`token_losses` from the logits of the kept tokens, the log-sum-exp of the others and the sampled token's logit."""
    log_z = torch.logaddexp(torch.logsumexp(kept_N_K, -1, keepdim=True), others_N_1)
    p = q = sampled = None
    if teacher is not None:
        p = teacher_classes(teacher, kept_N_K.shape[1] + 1).to(kept_N_K.dtype)
        q = torch.cat([kept_N_K, others_N_1], 1) - log_z
    if sampled_N_1 is not None:
        sampled = (sampled_N_1 - log_z).squeeze(1)
    return _losses(kind, p, q, sampled, options)
