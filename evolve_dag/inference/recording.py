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

    if 0 < top_k < logits_N_V.shape[1] and _worth_parting(logits_N_V):
        return _partitioned(logits_N_V.detach().contiguous().numpy(), top_k)
    logprobs = torch.log_softmax(logits_N_V.float(), dim=-1)
    if top_k == 0 or top_k >= logprobs.shape[1]:
        return (logprobs,)
    top, ids = logprobs.topk(top_k, dim=-1)
    return top, ids.int(), logprobs.scatter_(1, ids, -torch.inf).logsumexp(-1)


BLOCK = 1 << 17
"""Logits that are worked on at once: half a megabyte, which stays in a core's cache."""


def _worth_parting(logits_N_V: Tensor) -> bool:
    """Whether numpy's partition, on one core, is faster than torch's top-k: two to three times so in float32 (docs/LOG.md). The
    latter takes every thread, and in half precision many logits are equal."""
    import torch

    return logits_N_V.device.type == "cpu" and logits_N_V.dtype == torch.float32 and torch.get_num_threads() <= 2


def _partitioned(logits_N_V: np.ndarray, top_k: int) -> tuple[Tensor, ...]:
    import torch

    rows = max(1, BLOCK // logits_N_V.shape[1])
    parts = [_top(logits_N_V[at : at + rows], top_k) for at in range(0, max(len(logits_N_V), 1), rows)]
    return tuple(torch.from_numpy(np.concatenate(column)) for column in zip(*parts, strict=True))


def _top(logits_N_V: np.ndarray, top_k: int) -> Columns:
    """Columns of a block of logits. Nothing is sorted but what is kept, and only what is left goes through an exponential."""
    count, size = logits_N_V.shape
    begins = np.arange(0, count * size, size)[:, None]
    flat = logits_N_V.ravel()
    places = _largest(logits_N_V, top_k, begins)
    top, others = flat[places], logits_N_V.copy()
    others.ravel()[places] = -np.inf
    with np.errstate(divide="ignore", invalid="ignore"):
        tail = _log_sum_exp(others)
        log_z = np.logaddexp(_log_sum_exp(top.copy()), tail)
        return top - log_z, (places - begins).astype(np.int32), (tail - log_z)[:, 0]


def _log_sum_exp(x_N_M: np.ndarray) -> np.ndarray:
    """``(N, 1)``; writes over ``x_N_M``, where torch's makes tensors of that size: a whole :func:`distribution` takes a quarter
    more with it at 700 tokens, a tenth at 50,000. A tail of 1e-200 keeps its digits."""
    largest = x_N_M.max(1, keepdims=True)
    largest = np.where(np.isfinite(largest), largest, np.float32(0))
    x_N_M -= largest
    found: np.ndarray = np.log(np.exp(x_N_M, out=x_N_M).sum(1, keepdims=True)) + largest
    return found


def _largest(logits_N_V: np.ndarray, top_k: int, begins: np.ndarray) -> np.ndarray:
    """Places of the ``top_k`` largest of every row in the array as a whole, descending."""
    import torch

    count, size = logits_N_V.shape
    least = np.partition(logits_N_V, size - top_k, axis=1)[:, size - top_k, None]
    found = np.flatnonzero(logits_N_V >= least)
    if len(found) == count * top_k:
        places = found.reshape(count, top_k)
        if (places[:, :1] >= begins).all() and (places[:, -1:] < begins + size).all():
            return np.take_along_axis(places, np.argsort(-logits_N_V.ravel()[places], axis=1), 1)
    # In some row several are as large as the last one, or some are no numbers.
    ids: np.ndarray = torch.from_numpy(logits_N_V).topk(top_k, dim=-1).indices.numpy()
    return begins + ids


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
