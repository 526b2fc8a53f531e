"""Distributions that a model samples from, kept for whoever wants to learn from them: the forward pass was paid for already."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import Tensor

Columns = tuple[np.ndarray, ...]
"""Of N tokens: ``(N, K)`` log-probabilities, descending, their ``(N, K)`` int32 ids and the ``(N,)`` log of the probability of
all others together; or ``(N, V)`` log-probabilities alone."""


def distribution(logits_N_V: Tensor, top_k: int) -> tuple[Tensor, ...]:
    """:data:`Columns` as tensors; ``top_k`` 0 (or the vocabulary's size and more) keeps all."""
    import torch

    logprobs = torch.log_softmax(logits_N_V.float(), dim=-1)
    if top_k == 0 or top_k >= logprobs.shape[1]:
        return (logprobs,)
    top, ids = logprobs.topk(top_k, dim=-1)
    return top, ids.int(), logprobs.scatter_(1, ids, -torch.inf).logsumexp(-1)


class Recording:
    """What was sampled, found again by the tokens themselves: the same context and the same action, whoever asks."""

    def __init__(self, top_k: int) -> None:
        self.top_k = top_k
        self._columns: dict[bytes, Columns] = {}

    def __len__(self) -> int:
        return len(self._columns)

    def add(self, ids: Sequence[int] | np.ndarray, start: int, columns: Columns) -> None:
        """Keep the distributions of ``ids[start:]`` behind ``ids[:start]``."""
        self._columns[_key(ids, start)] = columns

    def get(self, ids: Sequence[int] | np.ndarray, start: int) -> Columns | None:
        """The distributions of ``ids[start:]`` behind ``ids[:start]``; None when nobody sampled just that."""
        return self._columns.get(_key(ids, start))


def _key(ids: Sequence[int] | np.ndarray, start: int) -> bytes:
    return blake2b(np.asarray(ids, dtype=np.int64).tobytes() + start.to_bytes(8, "little"), digest_size=16).digest()
