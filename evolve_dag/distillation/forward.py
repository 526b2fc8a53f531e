"""Token sequences through a model, each distinct beginning once: what teacher scoring and training share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from typing import TYPE_CHECKING, Any

from evolve_dag.errors import ModelError
from evolve_dag.inference.folders import same_angles
from evolve_dag.inference.prefix_tree import GrowingTree, hosts

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from evolve_dag.inference.attention import Chains, Places

Ids = Sequence[int]

CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier", "output_multiplier")
"""Fields of a config that say how logits are changed behind the output layer; unset or 1: not at all."""

FULL = 0.75
"""Share of the tokens of a pass from which on it may end early, where the next sequence begins otherwise."""


class Forward:
    """A causal language model (bare or wrapped by peft), split into its body and its output layer.

    Args:
        share: pack sequences that begin alike (the default). Models whose attention cannot take a packed row (sliding
            windows, an attention of their own) get one padded row per sequence whatever this says.
        recompute: keep only what enters each layer, and compute the layer again on the way back (activation checkpointing).

    Raises:
        ModelError: the model rescales its logits behind the output layer, or is not a causal model.
    """

    collective = False
    """Whether a pass waits for the other processes, which must run as many."""

    def __init__(self, model: nn.Module, *, share: bool = True, recompute: bool = False) -> None:
        from evolve_dag.inference.attention import bare, takes_chains

        self.model: Any = model
        self.decoder, self.head = decoder_and_head(model)
        self.share = share and takes_chains(model)
        self._same_angles = same_angles(bare(model).config.get_text_config().to_dict())
        self.recompute = recompute

    @property
    def vocabulary(self) -> int:
        return int(self.head.weight.shape[0])

    @property
    def device(self) -> Any:
        return self.head.weight.device

    @contextmanager
    def ready(self) -> Iterator[None]:
        """The model takes packed rows meanwhile, and keeps less where that is asked."""
        from evolve_dag.inference.attention import our_attention
        from evolve_dag.inference.kernels import fused_layers
        from evolve_dag.inference.lora import narrowed

        with ExitStack() as meanwhile:
            if self.share:
                meanwhile.enter_context(our_attention(self.model))
                if self.device.type == "cpu":
                    meanwhile.enter_context(_wanted_at_the_end(self.decoder))
            meanwhile.enter_context(narrowed(self.model))
            meanwhile.enter_context(fused_layers(self.decoder))
            if self.recompute:
                meanwhile.enter_context(_recomputed(self.decoder))
            yield

    def passes(self, sequences: Sequence[Ids], tokens: int) -> list[list[int]]:
        """Indices of ``sequences`` per forward pass of at most ``tokens`` tokens (more if one alone is longer).

        Packed, neighbours stay together, since they are what begins alike, and a shared token counts once. Otherwise
        sequences of like length meet, and padding counts. One so long that it would change the others' angles is alone.
        """
        if apart := [index for index, one in enumerate(sequences) if len(one) > self._same_angles]:
            others = sorted(set(range(len(sequences))) - set(apart))
            found = self.passes([sequences[index] for index in others], tokens)
            return [*([others[index] for index in chosen] for chosen in found), *([index] for index in apart)]
        return _neighbours(sequences, tokens) if self.share else _like_length(sequences, tokens)

    def states(self, sequences: Sequence[Ids]) -> tuple[Tensor, list[np.ndarray]]:
        """Hidden states ``(T, H)`` of one pass, and per sequence the row in it of each of its tokens."""
        from evolve_dag.inference.attention import packed_states, padded_states

        return (packed_states if self.share else padded_states)(self.decoder, sequences, self.device)

    def states_at(self, sequences: Sequence[Ids], places: Sequence[Places]) -> Tensor:
        """Hidden states ``(N, H)`` of some tokens of each sequence, behind each other; a last layer may leave out the others.

        Args:
            places: of each sequence, which of its tokens.
        """
        import numpy as np
        import torch

        from evolve_dag.inference.attention import packed_states_at

        if self.share:
            return packed_states_at(self.decoder, sequences, places, self.device)
        states_T_H, paths = self.states(sequences)
        rows = np.concatenate([path[own] for path, own in zip(paths, places, strict=True)])
        return states_T_H.index_select(0, torch.from_numpy(rows).to(self.device))

    @contextmanager
    def output_layer(self) -> Iterator[Any]:
        """The output layer with its weights, which may be used meanwhile."""
        yield self.head

    def idle(self) -> None:
        """What a process runs for a pass that only others have; nothing, where nobody waits for it."""


@contextmanager
def _wanted_at_the_end(decoder: Any) -> Iterator[None]:
    """The last layer of ``decoder`` hands on the tokens that :class:`Chains` wants meanwhile, where it does what Llama's does.

    Keys and values of the others are all that is needed of them there. On a CPU alone: what a model of few layers gains most by
    has not been tried on a GPU, whose kernels take chains whole.
    """
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    from evolve_dag.inference.kernels import computes_as, computing

    last = next(reversed(getattr(decoder, "layers", None) or [None]))
    if last is None or "forward" in vars(last) or not computes_as(last, LlamaDecoderLayer):
        yield
        return
    whole = last.forward

    def forward(hidden: Tensor, *, chains: Chains, **more: Any) -> Tensor:
        rows = chains.wanted(hidden.device)
        if rows is None:
            everything: Tensor = whole(hidden, chains=chains, **more)
            return everything
        with chains.only_wanted():
            attended, _ = last.self_attn(hidden_states=last.input_layernorm(hidden), chains=chains, **more)
        hidden = hidden.index_select(1, rows) + attended.index_select(1, rows)
        states: Tensor = hidden + last.mlp(last.post_attention_layernorm(hidden))
        return states

    with computing(last, forward):
        yield


@contextmanager
def _recomputed(decoder: Any) -> Iterator[None]:
    """The layers of ``decoder`` are checkpointed meanwhile.

    transformers' own switch does nothing in a model that is not in training mode, and training mode would bring its dropout.

    Raises:
        ModelError: the architecture names no layers.
    """
    from torch.utils.checkpoint import checkpoint

    from evolve_dag.inference.kernels import computing

    again = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    with ExitStack() as meanwhile:
        for layer in repeated_layers(decoder):
            meanwhile.enter_context(computing(layer, partial(again, layer.forward)))
        yield


def repeated_layers(decoder: Any) -> list[Any]:
    """The layers of a transformer body, which activation checkpointing and sharding go by.

    Raises:
        ModelError: the architecture names none.
    """
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in decoder.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(decoder).__name__} does not name its layers: they cannot be computed again, nor spread over processes",
            "set runtime.activation_checkpointing and runtime.shard to false",
        )
    return layers


def _neighbours(sequences: Sequence[Ids], tokens: int) -> list[list[int]]:
    found: list[list[int]] = []
    begin = 0
    while begin < len(sequences):
        end = _cut(sequences, begin, tokens)
        found.append(list(range(begin, end)))
        begin = end
    return found


def _cut(sequences: Sequence[Ids], begin: int, tokens: int) -> int:
    """Where a pass from ``begin`` on ends: what the next one begins with is computed there again, so where least is shared."""
    tree = GrowingTree()
    shared: dict[int, int] = {}
    """Possible end -> tokens of the sequence there that the pass has."""
    for index in range(begin, len(sequences)):
        before = tree.tokens
        tree.add(sequences[index])
        if index > begin and before >= FULL * tokens:
            shared[index] = len(sequences[index]) - (tree.tokens - before)
        if tree.tokens > tokens and index > begin:
            return min(reversed(shared), key=shared.__getitem__) if shared else index
    return len(sequences)


def _like_length(sequences: Sequence[Ids], tokens: int) -> list[list[int]]:
    riders: dict[int, list[int]] = {}
    for index, owner in enumerate(hosts(sequences)):
        riders.setdefault(owner, []).append(index)
    found: list[list[int]] = []
    rows, longest = 0, 0
    for owner in sorted(riders, key=lambda owner: -len(sequences[owner])):
        if not found or (rows + 1) * longest > tokens:
            found.append([])
            rows, longest = 0, len(sequences[owner])
        rows += 1
        found[-1].extend(riders[owner])
    return found


def decoder_and_head(model: nn.Module) -> tuple[Any, Any]:
    """The transformer body and the output layer of a causal language model, bare or wrapped by peft.

    Raises:
        ModelError: the architecture changes the logits behind its output layer, or is not a causal model.
    """
    from evolve_dag.inference.attention import bare

    base = bare(model)
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None:
        raise ModelError(f"{type(base).__name__} has no output embeddings", "give a causal language model (…ForCausalLM)")
    configs = (base.config, base.config.get_text_config())  # of a model that sees too, what is said of its text stands apart
    for name, config in product(CHANGES, configs):
        value = getattr(config, name, None)
        if value is not None and value != 1:
            raise ModelError(
                f"{type(base).__name__} changes its logits behind the output layer ({name} = {value})",
                "use an architecture without it (Qwen, Llama, Mistral, SmolLM)",
            )
    decoder = base.get_decoder()
    if decoder is base:
        raise ModelError(
            f"{type(base).__name__} does not say which part of it is its body",
            "use an architecture that does (Qwen, Llama 3, Mistral, SmolLM)",
        )
    return decoder, head
