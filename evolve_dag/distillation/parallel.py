"""Several processes that train one student: each works on a part of every batch, and what they found is added up.

Weights, moments and the order of batches are the same in all of them, so nothing but gradients is exchanged.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from evolve_dag.distillation.dataset import DistillationRow


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes that train, as one of them sees them."""

    rank: int = 0
    count: int = 1

    @classmethod
    def here(cls) -> Processes:
        """As torch.distributed was set up; one process where it was not."""
        import torch.distributed

        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return cls()
        return cls(torch.distributed.get_rank(), torch.distributed.get_world_size())

    @property
    def leads(self) -> bool:
        """Whether this one writes files and tells how far they are."""
        return self.rank == 0

    def own(self, rows: Sequence[DistillationRow]) -> list[DistillationRow]:
        """This process's part of a batch: neighbours, about as many tokens as everyone's. It may be empty."""
        ends = list(accumulate(row.tokens for row in rows))
        middles = [end - row.tokens / 2 for row, end in zip(rows, ends, strict=True)]
        return [row for row, middle in zip(rows, middles, strict=True) if int(middle * self.count / ends[-1]) == self.rank]

    def most(self, number: int, device: Any) -> int:
        """The largest ``number`` that one of the processes has; ``device`` is where they exchange it."""
        import torch
        from torch.distributed import ReduceOp, all_reduce

        found = torch.tensor(number, device=device)
        all_reduce(found, ReduceOp.MAX)
        return int(found)

    def add_up(self, parameters: Iterable[nn.Parameter], numbers: Sequence[float]) -> list[float]:
        """Put the sum over all processes in place of every gradient; ``numbers`` added up likewise."""
        if self.count == 1:
            return list(numbers)
        import torch
        from torch.distributed import all_reduce

        learned = list(parameters)
        flat = torch.cat([torch.zeros_like(one).flatten() if one.grad is None else one.grad.flatten() for one in learned])
        summed = torch.tensor(numbers, dtype=torch.float64, device=flat.device)
        all_reduce(flat)
        all_reduce(summed)
        for one, gradient in zip(learned, flat.split([one.numel() for one in learned]), strict=True):
            one.grad = gradient.view_as(one)
        return [float(one) for one in summed]
