"""The Rényi divergence of order 1/2, -2 log sum_v sqrt(p q): symmetric, between covering modes and seeking them.

Van Erven & Harremoës 2014, equations 1 and 9: of order alpha it is log(sum_v p^alpha q^(1 - alpha)) / (alpha - 1), and of
order 1/2 it is twice the Bhattacharyya distance.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evolve_dag.distillation.divergences import LOG_FLOOR, Divergence

if TYPE_CHECKING:
    from torch import Tensor


def renyi_half(p_N_K: Tensor, q_N_K: Tensor) -> Tensor:
    """The divergence per token, ``(N,)``, nats, from log-probabilities of teacher p and student q; never negative.

    The teacher's are floored: a token that it calls impossible has no gradient that is a number.
    """
    return -2.0 * ((p_N_K.clamp(min=LOG_FLOOR) + q_N_K) / 2.0).logsumexp(-1)


RENYI_HALF = Divergence(renyi_half)
