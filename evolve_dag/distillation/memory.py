"""How much memory a training step takes, before it is run.

The step itself is run, with the code that trains, on tensors that have a shape and no content, and what would be in memory
is added up. So no formula has to follow the code. Layers of one size are alike: of each size one is run on top of those before
it, and the rest is drawn on.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evolve_dag.distillation.adapter import attach
from evolve_dag.distillation.forward import Forward
from evolve_dag.distillation.losses import Teacher, token_losses_from_hidden
from evolve_dag.inference.kv import bytes_per_token
from evolve_dag.inference.lora import fuse
from evolve_dag.inference.quantization import packed, state_of

if TYPE_CHECKING:
    import numpy as np

    from evolve_dag.config.schema import DistillationSettings

ACTION_SHARE = 0.15
"""Of the tokens of a trajectory, those of actions."""

FEW = 2
"""Layers that are run, the first ones; then those, of each size one, that the others are like."""
MOST_SIZES = 4
"""Sizes of layers that are told apart; where there are more, all count as the largest."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes of one training step at its peak."""

    weights: int
    """Of the frozen base, as much of it as one process keeps."""
    adapter: int
    """LoRA weights; their gradients and Adam's two moments are three times as much once more, and in ``peak``."""
    saved: int
    """What the forward pass keeps for the way back."""
    logits: int
    """What the loss holds at once on top of what was there before it: logits, piece by piece, and what is made of them."""
    peak: int
    """The most there is at once, all of the above included."""


def training_memory(
    config: Any,
    *,
    dtype: str,
    settings: DistillationSettings,
    rows: Sequence[int],
    activation_checkpointing: bool = False,
    shards: int = 1,
    quantize: str = "none",
) -> Memory:
    """Memory of a training step with one pass, in one process.

    Args:
        config: of the model, as transformers reads it from ``config.json``.
        dtype: number format of the base (``models.policy.dtype``).
        rows: tokens of each trajectory in the pass, which share nothing; 15% of them are action tokens. (Rows that branch off
            another keep the keys and values of what stands before them once more: with ``distillation.retention`` or ``drills``
            at contexts of many thousand tokens, plan for more.)
        shards: processes that keep a part of the base's weights each (``runtime.shard``).
        quantize: how the base is kept (``models.policy.quantize``); other than none it needs bitsandbytes.

    Raises:
        ModelError: the architecture cannot be trained here.
    """
    sizes = _layer_sizes(config, dtype)

    @cache
    def first(layers: int) -> tuple[int, ...]:
        """A model of the first layers alone."""
        return _run(_with_layers(config, layers), dtype, quantize, settings, rows, activation_checkpointing)

    @cache
    def adds(size: int, first_one: bool = False) -> tuple[int, ...]:
        """What a layer of that size adds. The first one may move the peak to itself, and the others add to that."""
        places = [at for at, own in enumerate(sizes) if own == size]
        at = next(at for at in (*places[0 if first_one else 1 :], *places) if at >= FEW)
        return tuple(b - a for a, b in zip(first(at), first(at + 1), strict=True))

    few, further = first(min(FEW, len(sizes))), sizes[FEW:]
    if len(set(further)) > MOST_SIZES:
        further = [max(further)] * len(further)
    begins = {size: further.index(size) for size in set(further) - set(sizes[:FEW])}
    added = [adds(size, first_one=begins.get(size) == at) for at, size in enumerate(further)]
    weights, adapter, saved, logits, peak = (sum(parts) for parts in zip(few, *added, strict=True))
    if shards == 1 or not further:
        return Memory(weights, adapter, saved, logits, peak)
    layer = adds(largest := max(further))[0]
    outside = few[0] - round(layer * sum(sizes[:FEW]) / largest)
    kept, gathered = -(-weights // shards), _gathered(layer, outside)
    return Memory(kept, adapter, saved, logits, peak - weights + kept + gathered)


def _layer_sizes(config: Any, dtype: str) -> list[int]:
    """Bytes of each layer, in order: in mixtures of experts some are dense, the first ones or every other. All alike where the
    architecture does not name them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        decoder: Any = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).get_decoder()
    count = config.get_text_config().num_hidden_layers
    layers = getattr(decoder, "layers", ())
    return [sum(one.nbytes for one in layer.parameters()) for layer in layers] if len(layers) == count else [1] * count


def _gathered(layer: int, outside: int) -> int:
    """Most bytes of whole weights that one process holds at once, of which each keeps a part.

    A layer is whole while it runs; the next one is on its way, and is copied when it has come. ``outside`` are the weights
    that are no layer's: the embedding is whole until the last layer is through, the output layer while losses are computed.
    """
    return max(outside + 3 * layer, 2 * outside)


def cache_memory(config: Any, dtype: str, tokens: int) -> int:
    """Bytes of the keys and values of ``tokens`` tokens while sampling."""
    return bytes_per_token(config.get_text_config(), getattr(torch, dtype)) * tokens


def _run(
    config: Any,
    dtype: str,
    quantize: str,
    settings: DistillationSettings,
    rows: Sequence[int],
    activation_checkpointing: bool,
) -> tuple[int, int, int, int, int]:
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        model = attach(base, rank=settings.rank, alpha=settings.alpha, seed=0).eval()
    fuse(model)
    with FakeTensorMode(allow_non_fake_inputs=True), _Live() as live:
        if quantize != "none":
            _pack(model)
        _materialize(model)
        learned = [one for one in model.parameters() if one.requires_grad]
        adapter = sum(one.nbytes for one in learned)
        weights = live.bytes - adapter
        optimizer = torch.optim.AdamW(learned)
        forward = Forward(model, recompute=activation_checkpointing)
        with forward.ready():
            states_T_H, paths = forward.states([[row, *range(tokens - 1)] for row, tokens in enumerate(rows)])
            before, so_far, live.peak = live.bytes, live.peak, live.bytes
            loss = _loss(forward, settings, states_T_H, paths)
            logits, live.peak = live.peak - before, max(live.peak, so_far)
            saved = live.bytes - weights - adapter
            loss.backward()
        optimizer.step()
    return weights, adapter, saved, logits, live.peak


def _loss(forward: Forward, settings: DistillationSettings, states_T_H: Tensor, paths: Sequence[np.ndarray]) -> Tensor:
    """What :func:`~evolve_dag.distillation.batch.row_losses` does, for rows whose tokens are not there."""
    actions = sum(max(1, int(ACTION_SHARE * len(path))) for path in paths)
    kept = (actions, settings.top_k or forward.vocabulary)
    ids = torch.zeros(kept, dtype=torch.long) if settings.top_k else None
    tail = torch.zeros(actions) if settings.top_k else None
    losses, _ = token_losses_from_hidden(
        "forward_kl",
        states_T_H.index_select(0, torch.arange(actions)),
        forward.head,
        teacher=Teacher(torch.zeros(kept), ids, tail),
    )
    return losses.sum()


def _with_layers(config: Any, layers: int) -> Any:
    changed = copy.deepcopy(config)
    text = changed.get_text_config()
    text.num_hidden_layers = layers
    if getattr(text, "layer_types", None) is not None:
        text.layer_types = text.layer_types[:layers]
    return changed


def _pack(model: nn.Module) -> None:
    """Weights in 4 bit, without content, below every LoRA layer."""
    from peft.tuners.lora import LoraLayer

    for module in model.modules():
        if isinstance(module, LoraLayer):
            base: Any = module.base_layer
            base.weight = packed(base.weight.shape, base.weight.dtype)


def _materialize(model: nn.Module) -> None:
    """Tensors without content on the CPU, in place of those on ``meta``; tied weights stay tied."""
    made: dict[int, Any] = {}
    for module in model.modules():
        for own in (module._parameters, module._buffers):
            for name, old in own.items():
                if old is None or state_of(old) is not None:
                    continue
                if id(old) not in made:
                    new = torch.empty(old.shape, dtype=old.dtype)
                    made[id(old)] = nn.Parameter(new, old.requires_grad) if isinstance(old, nn.Parameter) else new
                own[name] = made[id(old)]


class _Live(TorchDispatchMode):
    """Adds up the storages that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0
        self.peak = 0
        self._alive: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for one in tree_leaves(made):
            if isinstance(one, Tensor):
                self._add(one.untyped_storage())
        return made

    def _add(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return

        def gone(_: Any) -> None:
            self.bytes -= size
            del self._alive[key]

        self._alive[key] = weakref.ref(storage, gone)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)
