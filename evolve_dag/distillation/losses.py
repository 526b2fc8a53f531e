"""What is minimised between teacher p and student q on every action token (METHOD: regime).

Pure functions over tensors. Shapes: N action tokens, V vocabulary, K classes the teacher kept, H hidden
size. All values are in nats. A top-k teacher is compared on K + 1 classes: its K most probable tokens and
everything else together (the tail). Merging classes can only lower a KL divergence (data processing
inequality), so the top-k value is a lower bound of the full one, and equals it for K = V.

The divergences themselves are rows of divergences.py.

The number that training minimises is the mean over all action tokens of a batch: a long action counts by
its tokens, tokens outside actions do not count at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from evolve_dag.config.parts import part
from evolve_dag.distillation.divergences import Divergence, forward_kl

CHUNK_ELEMENTS = 1 << 25
"""Logits held at once (128 MB in float32); more are computed in chunks and recomputed in the backward pass."""


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


def cross_entropy(logits_N_V: Tensor, sampled_N: Tensor) -> Tensor:
    """-log q of the sampled ids per token, ``(N,)``."""
    return -torch.log_softmax(logits_N_V, dim=-1).gather(1, sampled_N[:, None]).squeeze(1)


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
    logits = logits_N_V if logits_N_V.dtype == torch.float64 else logits_N_V.float()
    p = q = None
    if teacher is not None:
        p = teacher_classes(teacher, logits.shape[-1]).to(logits.dtype)
        q = student_classes(logits, teacher)
    divergence: Divergence = part("divergence", kind)
    if divergence.loss is None:
        if sampled_N is None:
            raise ValueError(f"{kind} needs the sampled ids")
        loss = cross_entropy(logits, sampled_N)
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
    head: Callable[[Tensor], Tensor],
    *,
    teacher: Teacher | None = None,
    sampled_N: Tensor | None = None,
    chunk: int | None = None,
    vocabulary: int | None = None,
    **options: float,
) -> tuple[Tensor, Tensor]:
    """:func:`token_losses` on hidden states of the action positions, so that logits exist only there.

    Args:
        head: the output embeddings, ``(n, H) -> (n, V)``.
        chunk: action tokens whose logits are held at once; None picks it from ``vocabulary`` and
            :data:`CHUNK_ELEMENTS`. Chunks are recomputed in the backward pass; the value does not change.
    """
    n = hidden_N_H.shape[0]
    if chunk is None:
        chunk = max(1, CHUNK_ELEMENTS // vocabulary) if vocabulary else max(1, n)

    def part(hidden: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        return token_losses(
            kind,
            head(hidden),
            teacher=None if teacher is None else teacher[rows],
            sampled_N=None if sampled_N is None else sampled_N[rows],
            **options,
        )

    if n <= chunk:
        return part(hidden_N_H, slice(0, n))
    losses, divergences = [], []
    for start in range(0, n, chunk):
        rows = slice(start, min(start + chunk, n))
        loss, divergence = checkpoint(part, hidden_N_H[rows], rows, use_reentrant=False)
        losses.append(loss)
        divergences.append(divergence)
    return torch.cat(losses), torch.cat(divergences)


def mean_over_tokens(values_N: Tensor, mask_N: Tensor | None = None) -> Tensor:
    """Mean over the action tokens where ``mask_N`` is true; 0 (not NaN) when there is none."""
    if mask_N is None:
        return values_N.mean() if values_N.numel() else values_N.sum()
    kept = torch.where(mask_N, values_N, torch.zeros_like(values_N))
    return kept.sum() / mask_N.sum().clamp(min=1)
