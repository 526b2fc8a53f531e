"""Many token sequences as one: what several of them begin with is there once.

Agent trajectories share most of what they read: the rollouts of a task their question, the teacher's views of a
trajectory its history, a retention row its clean row. Packed, every distinct beginning goes through the model once, at
the positions that it has in its own sequences, and a token attends to what stands before it *in its sequence*; so
values and gradients are those of one sequence at a time.

The tree is cut into *chains*: runs of tokens that follow one another. A chain hangs on the tokens before it, which
belong to earlier chains. No torch here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Range = tuple[int, int]
"""Packed tokens ``[start, end)``."""


@dataclass(frozen=True, slots=True)
class Chain:
    """A run of packed tokens, each seen by those behind it."""

    start: int
    end: int
    prefix: tuple[Range, ...] = ()
    """What stands before the run in its sequences, in order: packed ranges of earlier chains."""

    @property
    def depth(self) -> int:
        """Tokens before the run: the position of its first token."""
        return sum(end - start for start, end in self.prefix)


@dataclass(frozen=True, slots=True)
class PrefixTree:
    """Sequences packed into one row of T tokens."""

    ids: np.ndarray
    """int64 ``(T,)``."""
    positions: np.ndarray
    """int64 ``(T,)``: position of each token in its sequences."""
    chains: tuple[Chain, ...]
    """In packed order; together they are the whole row."""
    paths: tuple[np.ndarray, ...]
    """Per sequence given, the packed index of each of its tokens, int64."""

    @property
    def tokens(self) -> int:
        """T: tokens that go through the model."""
        return len(self.ids)


def prefix_tree(sequences: Sequence[Sequence[int]]) -> PrefixTree:
    """Pack ``sequences``; long ones first, so that shorter ones become branches of them and chains are few.

    Raises:
        ValueError: a sequence is empty.
    """
    growing = GrowingTree()
    paths: dict[int, tuple[Range, ...]] = {}
    for index in sorted(range(len(sequences)), key=lambda index: -len(sequences[index])):
        paths[index] = growing.add(sequences[index])
    return PrefixTree(
        ids=_joined(growing.runs),
        positions=_joined([np.arange(chain.depth, chain.depth + chain.end - chain.start) for chain in growing.chains]),
        chains=tuple(growing.chains),
        paths=tuple(_joined([np.arange(start, end) for start, end in paths[index]]) for index in range(len(sequences))),
    )


def hosts(sequences: Sequence[Sequence[int]]) -> list[int]:
    """For each of ``sequences`` the index of one that begins with it: its own where no other does."""
    growing = GrowingTree()
    owners: dict[int, int] = {}
    found = [0] * len(sequences)
    for index in sorted(range(len(sequences)), key=lambda index: -len(sequences[index])):
        *_, (start, _) = growing.add(sequences[index])
        # Where the whole sequence was there already, it ends in a chain that a longer one hung up.
        found[index] = owners.setdefault(start, index)
    return found


class GrowingTree:
    """A tree that grows by one sequence at a time."""

    def __init__(self) -> None:
        self.chains: list[Chain] = []
        self.runs: list[np.ndarray] = []
        """Token ids of each chain."""
        self._branches: dict[tuple[int, int], dict[int, int]] = {}
        """(chain, tokens of it that are passed) -> first token of a branch -> its chain; roots hang on (-1, 0)."""

    @property
    def tokens(self) -> int:
        """Distinct tokens so far."""
        return self.chains[-1].end if self.chains else 0

    def add(self, sequence: Sequence[int]) -> tuple[Range, ...]:
        """Follow ``sequence`` as far as the tree goes and hang the rest on it; packed ranges of the whole sequence.

        Raises:
            ValueError: it is empty.
        """
        ids = np.asarray(sequence, dtype=np.int64)
        if not len(ids):
            raise ValueError("an empty sequence cannot be packed")
        path: list[Range] = []
        done, at = 0, (-1, 0)
        while done < len(ids):
            branches = self._branches.setdefault(at, {})
            chain = branches.get(int(ids[done]))
            if chain is None:
                branches[int(ids[done])] = len(self.chains)
                path.append(self._hang(ids[done:], tuple(path)))
                break
            start = self.chains[chain].start
            shared = _common(self.runs[chain], ids[done:])
            path.append((start, start + shared))
            done, at = done + shared, (chain, shared)
        return tuple(path)

    def _hang(self, ids: np.ndarray, prefix: tuple[Range, ...]) -> Range:
        start = self.tokens
        self.chains.append(Chain(start, start + len(ids), prefix))
        self.runs.append(ids)
        return start, start + len(ids)


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the longest common beginning."""
    shorter = min(len(a), len(b))
    differ = np.flatnonzero(a[:shorter] != b[:shorter])
    return int(differ[0]) if len(differ) else shorter


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.int64)
