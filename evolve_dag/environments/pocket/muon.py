"""Muon in single precision, over all matrices of one shape at a time.

``torch.optim.Muon`` orthogonalizes each matrix alone and in bfloat16, which a CPU without bfloat16 units emulates: there
it took three quarters of a pretraining step (docs/LOG.md). The update is the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic iteration (Keller Jordan, https://kellerjordan.github.io/posts/muon/)."""
ITERATIONS = 5


def orthogonalized(stack_K_M_N: torch.Tensor) -> torch.Tensor:
    """Each matrix with its singular values moved near 1 (0.7 to 1.2); same shape."""
    a, b, c = COEFFICIENTS
    tall = stack_K_M_N.size(1) > stack_K_M_N.size(2)
    x = stack_K_M_N.transpose(1, 2) if tall else stack_K_M_N
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.transpose(1, 2)
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.transpose(1, 2) if tall else x


class Muon:
    """Momentum, orthogonalized: the optimizer of the hidden matrices.

    Args:
        matrices: parameters of two dimensions.
        weight_decay: decoupled, as a share of the rate.
        momentum: of the gradient, Nesterov's.
    """

    def __init__(self, matrices: Sequence[torch.nn.Parameter], weight_decay: float, momentum: float = 0.95) -> None:
        import torch

        self.weight_decay, self.momentum = weight_decay, momentum
        by_shape: dict[torch.Size, list[torch.nn.Parameter]] = {}
        for matrix in matrices:
            by_shape.setdefault(matrix.shape, []).append(matrix)
        self._groups = [(group, torch.zeros(len(group), *shape)) for shape, group in by_shape.items()]

    def step(self, rate: float) -> None:
        """One update at learning rate ``rate`` from the gradients."""
        import torch

        for group, velocity_K_M_N in self._groups:
            gradient = torch.stack([p.grad for p in group if p.grad is not None])
            velocity_K_M_N.lerp_(gradient, 1 - self.momentum)
            update = orthogonalized(gradient.lerp(velocity_K_M_N, self.momentum))
            scale = rate * math.sqrt(max(1, update.size(1) / update.size(2)))
            for p, u in zip(group, update, strict=True):
                p.data.mul_(1 - rate * self.weight_decay).add_(u, alpha=-scale)
