"""Attention of our own, under one name in transformers' registry, for models that take a registered function.

Two things that the stock function does not: key/value heads are never copied per query head on a CPU, and a row may be a
:class:`~evolve_dag.inference.prefix_tree.PrefixTree`, in which a token sees what stands before it in its own sequence.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from evolve_dag.errors import ModelError
from evolve_dag.inference.prefix_tree import Chain, PrefixTree, Range, hosts, prefix_tree

ATTENTION = "evolve_grouped"

Places = np.ndarray | slice
"""Which tokens of a sequence."""

QUERIES = 192
"""Most queries of one product under a mask on a CPU, which computes what the mask forbids: half as much as of 512 at a time."""

SHORT = 1024
"""Tokens of a chain up to which every block of queries keeps a gradient of the keys that it sees until all are there: a few
times as much as the keys themselves. Of long chains it would grow with the square."""

PLACEHOLDER = (1, 1, 1, 1)
"""Shape of the mask that a packed row comes with."""

LONG = 1024
"""Mean tokens of the chains of a row from which on each goes to the GPU's kernel for one sequence, which is twice as fast."""


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
        if attention_mask is None or attention_mask.shape != PLACEHOLDER:
            raise ModelError(
                f"{type(module).__name__} says itself who sees whom, so a packed row cannot be computed",
                "use an architecture that leaves it to its mask (Qwen, Llama, Mistral, SmolLM)",
            )
        chains.asked += 1
        return (_wanted_attention if chains.narrow else _tree_attention)(query, key, value, chains, scaling), None
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
    """Who sees whom in a packed row: the same for every layer of a forward pass.

    Args:
        wanted: ascending packed indices of the tokens whose last hidden states are asked for, at least one; None: all.
    """

    asked = 0
    """Layers that used it."""
    narrow = False
    """Whether queries that are not wanted are left out."""

    def __init__(self, chains: Sequence[Chain], wanted: np.ndarray | None = None) -> None:
        self._wanted = wanted
        self._runs = chains
        self.lengths = [chain.end - chain.start for chain in chains]
        self.widths = [chain.depth + length for chain, length in zip(chains, self.lengths, strict=True)]
        self.ranges: list[Range] = [one for number in range(len(chains)) for one in self.own_ranges(number)]
        self.parts: list[tuple[int, int]] = []
        """Beginnings of what a chain sees: the chain, and how many tokens."""
        self.blocks: list[tuple[int, int, int]] = []
        """At most :data:`QUERIES` tokens at a time: the part with what they see, how many they are, what the last one sees."""
        for number, (length, width) in enumerate(zip(self.lengths, self.widths, strict=True)):
            for at in range(0, length, QUERIES):
                end = min(at + QUERIES, length)
                seen = width - length + end
                if length <= SHORT or not at:
                    self.parts.append((number, seen if length <= SHORT else width))
                self.blocks.append((len(self.parts) - 1, end - at, seen))
        self._mask: Tensor | None = None
        self._there: dict[str, Tensor] = {}

    @property
    def stand_alone(self) -> bool:
        """Whether nothing stands before any chain, so that what they see lies behind each other as it is."""
        return self.widths == self.lengths

    def own_ranges(self, number: int) -> tuple[Range, ...]:
        """All that the chain's last token sees, in order."""
        chain = self._runs[number]
        return (*chain.prefix, (chain.start, chain.end))

    def wanted(self, device: Any) -> Tensor | None:
        """Packed index of every token that is wanted; None: all are."""
        wanted = self._wanted
        return None if wanted is None else self._once("wanted", lambda: wanted, device)

    @contextmanager
    def only_wanted(self) -> Iterator[None]:
        """Queries that are not wanted are left out meanwhile, as a last layer may."""
        self.narrow = True
        try:
            yield
        finally:
            self.narrow = False

    def wanted_places(self) -> list[tuple[int, np.ndarray]]:
        """Wanted tokens in their order, at most :data:`QUERIES` at a time: the chain, and their places among what it sees."""
        assert self._wanted is not None
        own = np.split(self._wanted, np.searchsorted(self._wanted, [chain.start for chain in self._runs[1:]]))
        return [
            (number, places[at : at + QUERIES])
            for number, (chain, tokens) in enumerate(zip(self._runs, own, strict=True))
            for places in [tokens - chain.start + chain.depth]
            for at in range(0, len(places), QUERIES)
        ]

    def rows(self, device: Any) -> Tensor:
        """Packed index of every token of :attr:`ranges`, one behind the other; made once for all layers."""
        return self._once("rows", lambda: np.concatenate([np.arange(start, end) for start, end in self.ranges]), device)

    def bounds(self, which: str, device: Any) -> Tensor:
        """int32 ``(chains + 1,)``: where each chain begins among all ``lengths`` or ``widths``."""
        return self._once(which, lambda: np.cumsum([0, *getattr(self, which)], dtype=np.int32), device)

    def _once(self, name: str, make: Callable[[], np.ndarray], device: Any) -> Tensor:
        if name not in self._there:
            self._there[name] = torch.from_numpy(make()).to(device)
        return self._there[name]

    def mask(self, like: Tensor, queries: int, keys: int) -> Tensor:
        """What is added to the scores of the last ``queries`` of ``keys`` tokens, ``[queries, keys]``: a part of one mask.

        Args:
            queries: at most :data:`QUERIES`.
        """
        if self._mask is None:
            rows, width = min(QUERIES, max(self.lengths)), max(self.widths)
            self._mask = like.new_full((rows, width), -torch.inf).triu(width - rows + 1)
        return self._mask[-queries:, -keys:]


def _tree_attention(query: Tensor, key: Tensor, value: Tensor, chains: Chains, scaling: float | None) -> Tensor:
    """One product per chain, so nothing is computed that a mask would forbid; ``[1, T, heads, D]``."""
    if _needs_mask(query):
        return _blocked_attention(query, key, value, chains, scaling)
    key, value = _seen(key, chains), _seen(value, chains)
    if query.is_cuda and query.dtype == torch.float32:  # else the kernel that keeps T x T is taken: the others want equal heads
        groups = query.shape[1] // key.shape[1]
        key, value = (one.repeat_interleave(groups, dim=1) for one in (key, value))
    elif _one_kernel(query, chains):
        return _varlen_attention(query, key, value, chains, scaling)
    keys, values = key.split(chains.widths, dim=2), value.split(chains.widths, dim=2)
    out = [_chain_attention(*one, scaling) for one in zip(query.split(chains.lengths, dim=2), keys, values, strict=True)]
    return torch.cat(out, dim=2).transpose(1, 2).contiguous()


def _blocked_attention(query: Tensor, key: Tensor, value: Tensor, chains: Chains, scaling: float | None) -> Tensor:
    """:func:`_tree_attention` by a kernel that computes what a mask forbids, and keeps the mask: so few queries at a time, over
    the keys that they see."""
    queries = query.split([rows for _, rows, _ in chains.blocks], dim=2)
    keys, values = _Parts.apply(key, chains), _Parts.apply(value, chains)
    out = []
    for q, (number, rows, seen) in zip(queries, chains.blocks, strict=True):
        k, v = (one if one.shape[2] == seen else one[:, :, :seen] for one in (keys[number], values[number]))
        mask = chains.mask(q, rows, seen) if 1 < rows < seen else None
        causal = 1 < rows == seen
        found = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scaling, enable_gqa=True)
        out.append(found.transpose(1, 2))
    return torch.cat(out, dim=1)


def _wanted_attention(query: Tensor, key: Tensor, value: Tensor, chains: Chains, scaling: float | None) -> Tensor:
    """:func:`_tree_attention` of the tokens that are wanted; zeros for the others."""
    keys, values = (_seen(one, chains).split(chains.widths, dim=2) for one in (key, value))
    rows, blocks = chains.wanted(query.device), chains.wanted_places()
    assert rows is not None
    found = []
    for q, (number, places) in zip(
        query.index_select(2, rows).split([len(one) for _, one in blocks], dim=2), blocks, strict=True
    ):
        seen = int(places[-1]) + 1
        later = torch.arange(seen) > torch.from_numpy(places)[:, None]
        mask = q.new_zeros(later.shape).masked_fill_(later.to(q.device), -torch.inf) if len(places) > 1 else None
        k, v = keys[number][:, :, :seen], values[number][:, :, :seen]
        found.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling, enable_gqa=True))
    out = torch.cat(found, dim=2).transpose(1, 2)
    return out.new_zeros((1, query.shape[2], *out.shape[2:])).index_copy(1, rows, out)


def _chain_attention(q: Tensor, k: Tensor, v: Tensor, scaling: float | None) -> Tensor:
    """A chain over what stands before it and causally over itself, ``[1, heads, t, D]``."""
    length, width = q.shape[2], k.shape[2]
    how: Any = {"is_causal": length > 1} if length in (1, width) else {"attn_mask": causal_lower_right(length, width)}
    return F.scaled_dot_product_attention(q, k, v, scale=scaling, enable_gqa=True, **how)


def _varlen_attention(query: Tensor, key: Tensor, value: Tensor, chains: Chains, scaling: float | None) -> Tensor:
    """All chains by one kernel, which lays the last query of a chain on its last key."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = (one[0].transpose(0, 1) for one in (query, key, value))
    lengths, widths = (chains.bounds(which, query.device) for which in ("lengths", "widths"))
    more: Any = {"scale": scaling, "window_size": (-1, 0)} | (_grouped() or {})
    out: Any = varlen_attn(q, k, v, lengths, widths, max(chains.lengths), max(chains.widths), **more)
    found: Tensor = out[None]
    return found


def _one_kernel(query: Tensor, chains: Chains) -> bool:
    """Whether to take the kernel of several sequences at once: for short chains, on a GPU that runs it, from torch 2.11 on."""
    short, half = query.shape[2] < LONG * len(chains.lengths), query.dtype in (torch.bfloat16, torch.float16)
    return short and half and query.is_cuda and _ampere(query.device) and _grouped() is not None


@cache
def _ampere(device: torch.device) -> bool:
    """Whether the device is of a kind on which flash kernels run."""
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def _grouped() -> dict[str, bool] | None:
    """How torch's kernel of several sequences is told that heads share keys (its first versions see it); None: it has none."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    known = inspect.signature(varlen_attn).parameters
    if not {"scale", "window_size"} <= known.keys():
        return None
    return {"enable_gqa": True} if "enable_gqa" in known else {}


def _needs_mask(q: Tensor) -> bool:
    """Elsewhere kernels know by themselves which keys the last queries see."""
    return q.device.type == "cpu"


def _seen(source: Tensor, chains: Chains) -> Tensor:
    """Keys or values ``[1, heads, T, D]``, for every chain what it sees."""
    if chains.stand_alone:
        return source
    found: Tensor = _Gather.apply(source, chains)
    return found


def _behind_each_other(source: Tensor, chains: Chains) -> Tensor:
    """The ranges of ``[1, heads, T, D]``: token by token, since hundreds of ranges would be a kernel, or a view, each."""
    return source.transpose(1, 2).index_select(1, chains.rows(source.device)).transpose(1, 2)


def _add_back(total: Tensor, ranges: Sequence[Range], gradient: Tensor) -> None:
    """Add to the ranges of ``total`` what ``gradient`` has of them; it may end early."""
    at, most = 0, gradient.shape[2]
    for start, end in ranges:
        length = min(end - start, most - at)
        total[:, :, start : start + length] += gradient[:, :, at : at + length]
        at += length
        if at == most:
            return


class _Gather(torch.autograd.Function):
    """For every chain what it sees, behind each other. Indexing would write a gradient of full size per range."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, chains: Chains) -> Tensor:
        ctx.ranges, ctx.shape = chains.ranges, source.shape
        return _behind_each_other(source, chains)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        total = gradient.new_zeros(ctx.shape)
        _add_back(total, ctx.ranges, gradient)
        return total, None


class _Parts(torch.autograd.Function):
    """``[1, heads, seen, D]`` for each of :attr:`Chains.parts`, views of one tensor. Slices of it would each write a gradient
    of the whole chain's size, as they do of a long one."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, chains: Chains) -> tuple[Tensor, ...]:
        ctx.chains, ctx.shape = chains, source.shape
        begins = np.cumsum([0, *chains.widths]).tolist()
        copied = source if chains.stand_alone else _behind_each_other(source, chains)
        return tuple(copied[:, :, begins[number] : begins[number] + seen] for number, seen in chains.parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        batch, heads, tokens, size = ctx.shape
        total = gradients[0].new_zeros((batch, tokens, heads, size)).transpose(1, 2)  # laid out like what it is the gradient of
        for (number, _), gradient in zip(ctx.chains.parts, gradients, strict=True):
            _add_back(total, ctx.chains.own_ranges(number), gradient)
        return total, None


def bare(model: Any) -> Any:
    """The model itself, without peft's wrapping."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def takes_chains(model: Any) -> bool:
    """Whether every layer of ``model`` (bare or wrapped by peft) is full attention by the registered function."""
    base = bare(model)
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
    base = bare(model)
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

    Raises:
        ModelError: the model's layers do not hand on who sees whom.
    """
    tree = prefix_tree(sequences)
    return _states(decoder, tree, Chains(tree.chains), device), list(tree.paths)


def packed_states_at(decoder: Any, sequences: Sequence[Sequence[int]], places: Sequence[Places], device: Any) -> Tensor:
    """Hidden states ``(N, H)`` of some tokens of each sequence, behind each other; else :func:`packed_states`.

    Args:
        places: of each sequence, which of its tokens.

    Raises:
        ModelError: as there.
    """
    tree = prefix_tree(sequences)
    asked = np.concatenate([path[own] for path, own in zip(tree.paths, places, strict=True)])
    wanted, rows = np.unique(asked, return_inverse=True)
    states = _states(decoder, tree, Chains(tree.chains, wanted if len(wanted) else None), device)
    narrow = len(states) == len(wanted)  # the last layer left the others out, or there are no others
    return states.index_select(0, torch.from_numpy(rows if narrow else asked).to(device))


def _states(decoder: Any, tree: PrefixTree, chains: Chains, device: Any) -> Tensor:
    states: Tensor = decoder(
        input_ids=torch.from_numpy(tree.ids)[None].to(device),
        position_ids=torch.from_numpy(tree.positions)[None].to(device),
        attention_mask=torch.zeros(PLACEHOLDER, device=device),  # given, so that the model does not make one of T x T
        chains=chains,
        use_cache=False,
    ).last_hidden_state
    if not chains.asked:  # its layers did not hand it on: every token saw every other
        raise ModelError(
            f"{type(decoder).__name__} keeps who sees whom from its layers, so a packed row cannot be computed",
            "use an architecture whose layers take it (Qwen, Llama, Mistral, SmolLM)",
        )
    return states[0]


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
