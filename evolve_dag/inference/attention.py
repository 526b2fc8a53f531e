"""Attention of our own, under one name in transformers' registry, for models that take a registered function.

Two things that the stock function does not: key/value heads are never copied per query head on a CPU, and a row may be a
:class:`~evolve_dag.inference.prefix_tree.PrefixTree`, in which a token sees what stands before it in its own sequence.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from evolve_dag.inference.prefix_tree import Chain, Range, hosts, prefix_tree

ATTENTION = "evolve_grouped"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    chains: Chains | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """What the model's layers call; ``query [B, heads, T, D]``, keys and values with as many or fewer heads."""
    if chains is not None:
        return _tree_attention(query, key, value, chains, scaling), None
    groups, tokens = query.shape[1] // key.shape[1], query.shape[2]
    if query.device.type != "cpu" or attention_mask is None or dropout or groups == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs)
    if tokens == 1 and attention_mask.shape[1] == 1:
        # The queries of one group stand side by side: one small product per key/value head.
        packed = query.reshape(query.shape[0], key.shape[1], groups, query.shape[3])
        out = F.scaled_dot_product_attention(packed, key, value, attn_mask=attention_mask, scale=scaling)
        out = out.reshape(query.shape[0], query.shape[1], 1, value.shape[3])
    else:
        # Stock `sdpa` copies keys and values per query head whenever a mask is given (half the time of a prefill).
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling, enable_gqa=True)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # without chains it is ordinary attention


class Chains:
    """Who sees whom in a packed row: the same for every layer of a forward pass."""

    def __init__(self, chains: Sequence[Chain]) -> None:
        self.lengths = [chain.end - chain.start for chain in chains]
        self.widths = [chain.depth + length for chain, length in zip(chains, self.lengths, strict=True)]
        self.ranges: list[Range] = [one for chain in chains for one in (*chain.prefix, (chain.start, chain.end))]
        self._masks: list[Tensor | None] | None = None

    def masks(self, like: Tensor) -> list[Tensor | None]:
        """What is added to the scores of each chain; None where the kernel knows by itself (no prefix, or one token)."""
        if self._masks is None:
            self._masks = [
                like.new_full((length, width), -torch.inf).triu(width - length + 1) if width > length > 1 else None
                for length, width in zip(self.lengths, self.widths, strict=True)
            ]
        return self._masks


def _tree_attention(query: Tensor, key: Tensor, value: Tensor, chains: Chains, scaling: float | None) -> Tensor:
    """One product per chain, so nothing is computed that a mask would forbid; ``[1, T, heads, D]``."""
    if query.device.type != "cpu" and query.shape[1] != key.shape[1]:
        # Elsewhere the fast kernels take either a mask or grouped heads.
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
    keys = _Gather.apply(key, chains.ranges).split(chains.widths, dim=2)
    values = _Gather.apply(value, chains.ranges).split(chains.widths, dim=2)
    out = [
        F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None and q.shape[2] > 1, scale=scaling, enable_gqa=True
        )
        for q, k, v, mask in zip(query.split(chains.lengths, dim=2), keys, values, chains.masks(query), strict=True)
    ]
    return torch.cat(out, dim=2).transpose(1, 2).contiguous()


class _Gather(torch.autograd.Function):
    """The ranges of ``[1, heads, T, D]`` behind each other. Indexing would write a gradient of full size per range."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, ranges: Sequence[Range]) -> Tensor:
        ctx.ranges, ctx.shape = ranges, source.shape
        return torch.cat([source[:, :, start:end] for start, end in ranges], dim=2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.new_zeros(ctx.shape)
        at = 0
        for start, end in ctx.ranges:
            total[:, :, start:end] += gradient[:, :, at : at + end - start]
            at += end - start
        return total, None


def takes_chains(model: Any) -> bool:
    """Whether every layer of ``model`` (bare or wrapped by peft) is full attention by the registered function."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not (getattr(base, "_supports_attention_backend", False) and getattr(base, "_supports_sdpa", False)):
        return False
    config = base.config.get_text_config()
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return False
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return set(kinds) == {"full_attention"}
    return getattr(config, "sliding_window", None) is None


@contextmanager
def our_attention(model: Any) -> Iterator[None]:
    """``model`` uses :func:`attention` meanwhile."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    before = base.config._attn_implementation
    base.set_attn_implementation(ATTENTION)
    try:
        yield
    finally:
        base.set_attn_implementation(before)


def packed_states(decoder: Any, sequences: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, list[np.ndarray]]:
    """Hidden states of all sequences, packed as a prefix tree.

    Args:
        decoder: body of a model that :func:`takes_chains`, under :func:`our_attention`.

    Returns:
        ``(T, H)``, and per sequence the row in it of each of its tokens.
    """
    tree = prefix_tree(sequences)
    states = decoder(
        input_ids=torch.from_numpy(tree.ids)[None].to(device),
        position_ids=torch.from_numpy(tree.positions)[None].to(device),
        attention_mask=torch.zeros((1, 1, 1, 1), device=device),  # given, so that the model does not make one of T x T
        chains=Chains(tree.chains),
        use_cache=False,
    ).last_hidden_state
    return states[0], list(tree.paths)


def padded_states(decoder: Any, sequences: Sequence[Sequence[int]], device: Any) -> tuple[Tensor, list[np.ndarray]]:
    """:func:`packed_states` for any causal model: one row per sequence, but for those that another begins with.

    Padding stands on the right: no real token sees it, so no mask is needed.
    """
    owners = hosts(sequences)
    rows = {owner: row for row, owner in enumerate(sorted(set(owners)))}
    length = max(map(len, sequences))
    ids_B_L = torch.zeros((len(rows), length), dtype=torch.long)
    for owner, row in rows.items():
        ids_B_L[row, : len(sequences[owner])] = torch.tensor(sequences[owner])
    states = decoder(input_ids=ids_B_L.to(device), use_cache=False).last_hidden_state
    places = zip(owners, sequences, strict=True)
    return states.flatten(0, 1), [rows[owner] * length + np.arange(len(sequence)) for owner, sequence in places]
