"""Keys and values of many sessions in one slab, and the view of it that one round of calls works on.

A *slot* is one row of the slab: the keys and values of one token sequence, known by its ids. Slots outlive the
calls of an episode, so a later call computes only what its history has more, and a released slot still serves
as the start of another session with the same beginning (the system message).
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from transformers.cache_utils import Cache

_COLUMN_STEP = 128
_MOST_ON_CPU = 2**31
"""Bytes."""
_ROOM = 4
"""Steps that a slab grows by where memory allows: growing copies everything, and touches as much memory anew."""


def bytes_per_token(config: Any, dtype: torch.dtype) -> int:
    """Of the keys and values of one token in all layers.

    Args:
        config: of the text model.
    """
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim * dtype.itemsize)


def cache_share(free: int, device: str) -> int:
    """Bytes that keys and values may take of a device of which ``free`` are left beside the weights: a quarter, since passes
    and whoever else is there need some, and on a CPU, where a round is slow long before it is full, no more than 2 GiB."""
    quarter = max(0, free) // 4
    return quarter if device.startswith("cuda") else min(quarter, _MOST_ON_CPU)


def tokens_in(cache_bytes: int, config: Any, dtype: torch.dtype) -> int:
    """Tokens whose keys and values fit into ``cache_bytes``; at least one.

    Args:
        config: of the text model.
    """
    return max(1, cache_bytes // bytes_per_token(config, dtype))


class SlotPool:
    """The slab: per layer keys and values of shape [slots, heads, columns + 1, head_dim].

    Column ``t`` of a slot belongs to token ``t`` of its sequence. The last column is waste: padding writes there.
    Buffers are made when a layer first writes, so shapes and number format are the model's own.

    Args:
        budget: most tokens that the slab may hold (slots x columns); at least one slot is always allowed.
        max_columns: longest sequence.
    """

    def __init__(self, budget: int, max_columns: int) -> None:
        self.budget = budget
        self.max_columns = max_columns
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.ids = np.full((0, 0), -1, dtype=np.int64)
        """[slots, columns]: token whose key and value stand there; -1 where there is none."""
        self.owners: list[str | None] = []
        """Session of each slot; None: free, though what it holds may still be copied."""
        self._used: list[int] = []
        self._clock = 0

    @property
    def slots(self) -> int:
        return self.ids.shape[0]

    @property
    def columns(self) -> int:
        return self.ids.shape[1]

    def rows_allowed(self, length: int) -> int:
        """How many sequences of ``length`` tokens one round may hold."""
        return max(1, self.budget // self._columns_for(length))

    def shrink(self, rows: int, length: int) -> None:
        """Hold no more than ``rows`` sequences of ``length`` tokens from now on; what was held is dropped."""
        self.forget()
        self.budget = min(self.budget, rows * self._columns_for(length))

    def narrow(self, sessions: Collection[str], length: int) -> None:
        """Give back columns that a longer sequence has left behind, where they stand in the way of rows.

        That is where not all sessions fit, those that hold a slot and ``sessions``, which need ``length`` tokens, and half of
        the columns would do for every one of them.
        """
        columns = _rounded(length)
        owners = {owner for owner in self.owners if owner is not None}
        if 2 * columns > self.columns or len(owners.union(sessions)) * self.columns <= self.budget:
            return
        owned = [i for i, owner in enumerate(self.owners) if owner is not None]
        columns = max(columns, _rounded(int((self.ids[owned] >= 0).sum(axis=1).max(initial=0))))
        if 2 * columns <= self.columns:
            self._resize(list(range(self.slots)), self.slots, columns)

    def release(self, session: str) -> None:
        if session in self.owners:
            self.owners[self.owners.index(session)] = None

    def forget(self) -> None:
        """Drop everything: what the slab holds cannot be trusted."""
        self.keys, self.values, self.owners, self._used = [], [], [], []
        self.ids = np.full((0, 0), -1, dtype=np.int64)

    def prepare(self, sessions: Collection[str], length: int) -> None:
        """Make room for one slot per session of ``sessions``, each ``length`` tokens long."""
        columns = self._roomy(self._columns_for(length), len(sessions))
        held = [i for i, owner in enumerate(self.owners) if owner in sessions]
        missing = len(sessions) - len(held)
        allowed = max(len(sessions), self.budget // columns)
        free = [i for i, owner in enumerate(self.owners) if owner is None]
        others = [i for i, owner in enumerate(self.owners) if owner is not None and owner not in sessions]
        slots = self.slots
        if len(free) < missing:
            slots = max(slots + missing - len(free), min(2 * slots, allowed))
        slots = min(slots, allowed)
        evict = max(len(held) + len(others) + missing - slots, 0)
        for slot in sorted(others, key=self._used.__getitem__)[:evict]:
            self.owners[slot] = None
        if slots != self.slots or columns != self.columns:
            keep = [i for i, owner in enumerate(self.owners) if owner is not None]
            spare = sorted(set(range(self.slots)) - set(keep), key=lambda i: -self._used[i])
            self._resize(sorted(keep + spare[: max(slots - len(keep), 0)]), slots, columns)

    def acquire(self, session: str, ids: np.ndarray) -> tuple[int, int]:
        """Slot of ``session`` and how many leading tokens of ``ids`` it holds; the rest of it is dropped.

        At least one token of ``ids`` is left to compute, because its logits are wanted.
        """
        self._clock += 1
        limit = len(ids) - 1
        if session in self.owners:
            slot = self.owners.index(session)
            shared = self._shared(slot, ids[:limit])
        else:
            lengths = self._shared_by_all(ids[:limit])
            free = [i for i, owner in enumerate(self.owners) if owner is None]
            slot = max(free, key=lambda i: (lengths[i], -i))
            donor = int(np.argmax(lengths))
            shared = int(lengths[donor])
            if lengths[slot] < shared:
                self.copy(donor, slot, 0, ids[:shared])
            self.owners[slot] = session
        self.ids[slot, shared:] = -1
        self._used[slot] = self._clock
        return slot, shared

    def best_prefix(self, ids: np.ndarray) -> int:
        """Most leading tokens of ``ids`` that any slot holds."""
        return int(self._shared_by_all(ids).max(initial=0))

    def hold(self, slot: int, start: int, ids: Sequence[int] | np.ndarray) -> None:
        """Say that the slot's columns from ``start`` now hold ``ids``."""
        self.ids[slot, start : start + len(ids)] = ids

    def copy(self, source: int, target: int, start: int, ids: np.ndarray) -> None:
        """Give ``target`` the columns of ``source`` from ``start``, which hold the end of ``ids``."""
        for buffer in (*self.keys, *self.values):
            buffer[target, :, start : len(ids)] = buffer[source, :, start : len(ids)]
        self.hold(target, start, ids[start:])

    def buffers(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer; made like ``key`` and ``value`` [*, heads, *, head_dim] if there are none."""
        while len(self.keys) <= layer:
            self.keys.append(key.new_zeros(self.slots, key.shape[1], self.columns + 1, key.shape[3]))
            self.values.append(value.new_zeros(self.slots, value.shape[1], self.columns + 1, value.shape[3]))
        return self.keys[layer], self.values[layer]

    def _columns_for(self, length: int) -> int:
        return min(max(_rounded(length), self.columns), self.max_columns)

    def _roomy(self, columns: int, rows: int) -> int:
        """More than ``columns`` where the slab has to grow and ``rows``, and as many again, would still fit."""
        room = _ROOM * _COLUMN_STEP
        wide = min(-(-columns // room) * room, self.max_columns)
        return wide if columns > self.columns and 2 * max(rows, self.slots) * wide <= self.budget else columns

    def _shared(self, slot: int, ids: np.ndarray) -> int:
        return int(_leading(self.ids[slot : slot + 1, : len(ids)] == ids[: self.columns], len(ids))[0])

    def _shared_by_all(self, ids: np.ndarray) -> np.ndarray:
        return _leading(self.ids[:, : len(ids)] == ids[: self.columns], len(ids))

    def _resize(self, kept: list[int], slots: int, columns: int) -> None:
        """Keep the slots ``kept`` (as the first ones) in a slab of the given size."""
        width = min(columns, self.columns)
        index = torch.tensor(kept, dtype=torch.long)
        for buffers in (self.keys, self.values):
            for layer, old in enumerate(buffers):
                new = old.new_zeros(slots, old.shape[1], columns + 1, old.shape[3])
                new[: len(kept), :, :width] = old[index.to(old.device), :, :width]
                buffers[layer] = new
        ids = np.full((slots, columns), -1, dtype=np.int64)
        ids[: len(kept), :width] = self.ids[kept, :width]
        self.ids = ids
        self.owners = [self.owners[i] for i in kept] + [None] * (slots - len(kept))
        self._used = [self._used[i] for i in kept] + [0] * (slots - len(kept))


def _rounded(length: int) -> int:
    return -(-length // _COLUMN_STEP) * _COLUMN_STEP


def _leading(equal: np.ndarray, full: int) -> np.ndarray:
    """Length of the run of True that each row of ``equal`` starts with."""
    if equal.shape[1] == 0:
        return np.zeros(equal.shape[0], dtype=np.int64)
    first_other = np.where(equal.all(axis=1), equal.shape[1], equal.argmin(axis=1))
    return np.minimum(first_other, full)


class RoundCache(Cache):
    """The rows of one round, as a cache that any causal language model of transformers accepts.

    Rows whose slots lie side by side are worked on in the slab itself; other rows, and what is left after
    :meth:`compact`, on a contiguous copy, every new key and value being written to the slab as well. So there is
    no copy per token, and nothing to write back.
    """

    def __init__(self, pool: SlotPool, slots: Sequence[int], length: int, device: torch.device) -> None:
        super().__init__(layers=[])
        self._pool = pool
        self._width = length
        self._slots = torch.tensor(list(slots), dtype=torch.long, device=device)
        self._copies: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        low = min(slots)
        self._span = slice(low, low + len(slots)) if list(slots) == list(range(low, low + len(slots))) else None
        self._rows = torch.arange(len(slots), device=device)[:, None]

    def place(self, columns: torch.Tensor, length: int) -> None:
        """Where the next forward pass writes.

        Args:
            columns: [rows, new tokens]; -1 marks padding and, being the last column, is where padding goes.
            length: columns of the slab that the pass attends to.
        """
        self._length = length
        self._columns = columns

    def compact(self, keep: torch.Tensor) -> None:
        """Go on with the rows ``keep`` (indices, ascending) only."""
        self._slots = self._slots[keep]
        self._rows = self._rows[: len(keep)]
        self._span = None
        self._copies = {
            layer: (keys.index_select(0, keep), values.index_select(0, keep)) for layer, (keys, values) in self._copies.items()
        }

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [rows, heads, new tokens, head_dim] and return all keys and values so far, as views."""
        keys, values = self._pool.buffers(layer_idx, key_states, value_states)
        new = key_states.transpose(1, 2), value_states.transpose(1, 2)
        if self._span is not None:
            keys, values = keys[self._span], values[self._span]
            keys[self._rows, :, self._columns], values[self._rows, :, self._columns] = new
        else:
            slots = self._slots[:, None]
            keys[slots, :, self._columns], values[slots, :, self._columns] = new
            if layer_idx in self._copies:
                keys, values = self._copies[layer_idx]
                keys[self._rows, :, self._columns], values[self._rows, :, self._columns] = new
            else:
                # What was just written comes along. One column more, for what padding writes.
                keys, values = (buffer[:, :, : self._width + 1].index_select(0, self._slots) for buffer in (keys, values))
                self._copies[layer_idx] = keys, values
        return keys[:, :, : self._length], values[:, :, : self._length]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self._length, 0
