"""A base model that is spread over the processes that train it: each keeps a part of every weight (FSDP2).

The base is frozen and nearly all of the memory, so it alone is spread. LoRA matrices, their gradients and moments stay whole
in every process, and files, checkpoints and the sum of gradients are what they are without it.

A layer's weights are gathered before it runs, forward and back, and let go behind it. Every process takes part in that: all of
them run the same number of passes, and one that has fewer rows runs empty ones (:meth:`Sharded.idle`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from evolve_dag.distillation.forward import Forward, repeated_layers
from evolve_dag.distillation.parallel import Processes

if TYPE_CHECKING:
    from torch import nn


class Sharded(Forward):
    """A :class:`Forward` whose frozen weights are spread over the processes of torch.distributed.

    Args:
        model: on the CPU, its LoRA layers attached. Its base weights stay spread: it is of no use to one process any more.
        device: where it computes. Layer by layer goes there, so that no device ever holds all of it.

    Raises:
        ModelError: the architecture names no layers that can be spread.
    """

    collective = True

    def __init__(self, model: nn.Module, *, device: str, recompute: bool = False) -> None:
        import torch
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        super().__init__(model, recompute=recompute)
        learned = {one for one in model.parameters() if one.requires_grad}
        mesh = init_device_mesh(torch.device(device).type, (Processes.here().count,))
        spread = partial(fully_shard, mesh=mesh, reshard_after_forward=True, ignored_params=learned)
        for layer in reversed(repeated_layers(self.decoder)):  # inner ones first, where they are nested
            spread(layer)
        embedding = self.decoder.get_input_embeddings()
        if embedding.weight is self.head.weight:
            spread([embedding, self.head])
        else:
            spread(embedding)
            spread(self.head)
        spread(self.decoder)
        for one in learned:
            one.data = one.data.to(device)

    @contextmanager
    def output_layer(self) -> Iterator[Any]:
        self.head.unshard()
        try:
            yield self.head
        finally:
            self.head.reshard()

    def idle(self) -> None:
        """A pass that adds nothing to any gradient: what the other processes gather in theirs is gathered here too."""
        states_T_H, _ = self.states([[0]])
        with self.output_layer():
            pass
        (0.0 * states_T_H.sum()).backward()
