"""The divergences between teacher p and student q, one row each (METHOD: regime; shapes and sources in losses.py).

    forward_kl      KL(p || q) = sum_v p (log p - log q)              mass-covering; the off-policy preset
    reverse_kl      KL(q || p) = sum_v q (log q - log p)              mode-seeking; the on-policy preset
    jsd             w KL(p || m) + (1 - w) KL(q || m),  m = w p + (1 - w) q
    cross_entropy   -log q(sampled token)                             plain fine-tuning; the control

A row costs no import of torch: what it does to tensors are their own methods.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

from evolve_dag.config.fence import Fence
from evolve_dag.config.schema import DistillationSettings
from evolve_dag.errors import PartError
from evolve_dag.secrecy import describe_error

if TYPE_CHECKING:
    from torch import Tensor

LOG_FLOOR = -30.0
"""Least teacher log-probability that reverse KL sees. A token that the teacher calls impossible (-inf) would
make the loss infinite for any student; e^-30 is far below what float32 probabilities resolve."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """One row."""

    loss: Callable[..., Tensor] | None
    """(log p ``(N, K)``, log q ``(N, K)``, its keys by name) -> loss per token ``(N,)``. None: distributions are not
    compared, the sampled tokens are learned, and no teacher is needed."""
    keys: tuple[str, ...] = ()
    """Keys of ``distillation`` that it alone reads."""

    def fenced(self, fence: Fence) -> Self:
        """The same row for a divergence from outside: one that fails ends the training with its name, and nothing is stored.

        It works inside of autograd, in the training's own thread, so the time that it takes is not limited.

        Raises:
            PartError: it names keys that are not there.
        """
        if unknown := set(self.keys) - set(DistillationSettings.model_fields):
            raise fence.nonsense(f"there is no key distillation.{sorted(unknown)[0]}")
        if (loss := self.loss) is None:
            return self

        def checked(p_N_K: Tensor, q_N_K: Tensor, **options: Any) -> Tensor:
            try:
                losses = loss(p_N_K, q_N_K, **options)
            except Exception as error:
                raise PartError(f"{fence.part}: {describe_error(error)}", "mend the part") from error
            if getattr(losses, "shape", None) != p_N_K.shape[:1]:
                shape = tuple(getattr(losses, "shape", ())) or type(losses).__name__
                raise fence.nonsense(f"one loss a token, ({p_N_K.shape[0]},), not {shape}")
            return losses

        return replace(self, loss=checked)


def _expectation(log_weight: Tensor, difference: Tensor) -> Tensor:
    """sum of exp(log_weight) * difference over the last axis, where weight 0 times infinity is 0."""
    weight = log_weight.exp()
    return (weight * difference.masked_fill(weight <= 0, 0.0)).sum(-1)


def forward_kl(p_N_K: Tensor, q_N_K: Tensor) -> Tensor:
    """KL(p || q) per token, ``(N,)``, from log-probabilities of teacher p and student q."""
    return _expectation(p_N_K, p_N_K - q_N_K)


def reverse_kl(p_N_K: Tensor, q_N_K: Tensor) -> Tensor:
    """KL(q || p) per token, ``(N,)``; the teacher's log-probabilities are floored at :data:`LOG_FLOOR`."""
    return _expectation(q_N_K, q_N_K - p_N_K.clamp(min=LOG_FLOOR))


def jsd(p_N_K: Tensor, q_N_K: Tensor, jsd_weight: float = 0.5) -> Tensor:
    """Generalised Jensen-Shannon divergence per token, ``(N,)``; at most the entropy of ``jsd_weight``.

    Args:
        jsd_weight: share of the teacher in the mixture, between 0 and 1 (both excluded).
    """
    mixture = (p_N_K + math.log(jsd_weight)).logaddexp(q_N_K + math.log1p(-jsd_weight))
    return jsd_weight * _expectation(p_N_K, p_N_K - mixture) + (1 - jsd_weight) * _expectation(q_N_K, q_N_K - mixture)


FORWARD_KL = Divergence(forward_kl)
REVERSE_KL = Divergence(reverse_kl)
JSD = Divergence(jsd, keys=("jsd_weight",))
CROSS_ENTROPY = Divergence(None)
