"""The slab of keys and values: whatever a slot claims to hold, it holds."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from evolve_dag.inference.kv import RoundCache, SlotPool

CPU = torch.device("cpu")


def fingerprint(ids: list[int], column: int) -> float:
    """Stands for a key: depends on the token and on all before it, as the real one does."""
    return float(hash(tuple(ids[: column + 1])) % 100_003)


def write(pool: SlotPool, sessions: list[str], sequences: list[list[int]]) -> list[int]:
    """What a round does: room, slots, the missing columns, the ids. Returns how many columns were reused."""
    pool.prepare(sessions, max(map(len, sequences)))
    held = [pool.acquire(session, np.array(ids)) for session, ids in zip(sessions, sequences, strict=True)]
    order = sorted(range(len(held)), key=lambda i: held[i][0])
    width = max(len(ids) - start for ids, (_, start) in zip(sequences, held, strict=True))
    columns = torch.full((len(order), width), -1, dtype=torch.long)
    key = torch.zeros(len(order), 1, width, 1)
    for row, i in enumerate(order):
        start = held[i][1]
        for offset in range(len(sequences[i]) - start):
            columns[row, offset + width - len(sequences[i]) + start] = start + offset
            key[row, 0, offset + width - len(sequences[i]) + start, 0] = fingerprint(sequences[i], start + offset)
    length = max(map(len, sequences))
    cache = RoundCache(pool, [held[i][0] for i in order], length, CPU)
    cache.place(columns, length)
    keys, _ = cache.update(key, -key, 0)
    for row, i in enumerate(order):  # what the model sees
        assert keys[row, 0, : len(sequences[i]), 0].tolist() == [fingerprint(sequences[i], c) for c in range(len(sequences[i]))]
        pool.hold(held[i][0], held[i][1], sequences[i][held[i][1] :])
    return [start for _, start in held]


def check(pool: SlotPool) -> None:
    """Every column that has an id has the key of that id after all before it."""
    for slot in range(pool.slots):
        ids = pool.ids[slot].tolist()
        length = ids.index(-1) if -1 in ids else len(ids)
        assert all(i == -1 for i in ids[length:])
        if not length:
            continue
        assert pool.keys[0][slot, 0, :length, 0].tolist() == [fingerprint(ids, c) for c in range(length)]
        assert torch.equal(pool.values[0][slot, 0, :length], -pool.keys[0][slot, 0, :length])


tokens = st.lists(st.integers(0, 2), min_size=1, max_size=10)
rounds = st.lists(
    st.dictionaries(st.sampled_from("abcdef"), tokens, min_size=1, max_size=5) | st.sampled_from("abcdef"),
    min_size=1,
    max_size=8,
)


@given(history=rounds, budget=st.sampled_from([1, 256, 384, 10_000]))
@settings(max_examples=200, deadline=None)
def test_what_a_slot_claims_is_there(history: list[dict[str, list[int]] | str], budget: int) -> None:
    pool = SlotPool(budget, 2048)
    for event in history:
        if isinstance(event, str):
            pool.release(event)
        else:
            write(pool, list(event), list(event.values()))
        check(pool)


def test_a_shorter_prompt_forgets_what_stood_behind_it() -> None:
    pool = SlotPool(1000, 512)
    write(pool, ["s"], [[1, 2, 3, 4, 5]])
    assert write(pool, ["s"], [[1, 2, 9]]) == [2]
    assert write(pool, ["s"], [[1, 2, 9, 4, 5]]) == [3]  # 4 and 5 were computed behind another token
    check(pool)


def test_least_recently_used_goes_first() -> None:
    pool = SlotPool(3 * 128, 2048)
    for session in "abc":
        write(pool, [session], [[1, 2, 3]])
    write(pool, ["a"], [[1, 2, 3, 4]])
    write(pool, ["d"], [[7, 7, 7]])
    assert set(pool.owners) == {"a", "c", "d"}
    assert pool.slots == 3


def test_longer_sequences_leave_room_for_fewer() -> None:
    pool = SlotPool(4 * 128, 2048)
    assert pool.rows_allowed(100) == 4
    for session in "abcd":
        write(pool, [session], [[1, 2, 3]])
    write(pool, ["b"], [[1, 2, 3, *[5] * 200]])
    assert (pool.slots, pool.columns) == (2, 256)
    assert pool.rows_allowed(100) == 2
    assert "b" in pool.owners
    assert pool.rows_allowed(5000) == 1
    check(pool)


def test_a_long_sequence_that_is_over_leaves_its_room_to_others() -> None:
    pool = SlotPool(16 * 128, 2048)
    write(pool, ["long", "short"], [[1, 2, 3, *[5] * 900], [1, 2, 4]])
    pool.narrow(["short", *"abc"], 100)
    assert pool.columns == 1024, "the long one is not over"
    pool.release("long")
    pool.narrow(["short"], 100)
    assert pool.columns == 1024, "nobody needs its room"
    pool.narrow(["short", *"abc"], 600)
    assert pool.columns == 1024, "half of it is too little"
    pool.narrow(["short", *"abc"], 100)
    assert (pool.columns, pool.rows_allowed(100)) == (128, 16)
    check(pool)
    again = [[1, 2, 4, 4], [1, 2, 3, 5], [7], [7, 7]]
    assert write(pool, ["short", *"abc"], again)[:2] == [3, 3], "what fits is still there"
    check(pool)


def test_a_slab_grows_in_large_steps_where_there_is_room_for_as_many_rows_again() -> None:
    pool = SlotPool(2 * 3 * 512, 2048)
    pool.prepare("abc", 100)
    assert (pool.slots, pool.columns) == (3, 512)
    tight = SlotPool(2 * 3 * 512 - 1, 2048)
    tight.prepare("abc", 100)
    assert (tight.slots, tight.columns) == (3, 128)
    short = SlotPool(10**6, 300)
    short.prepare("abc", 100)
    assert short.columns == 300, "no sequence is longer"
