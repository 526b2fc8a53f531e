"""How sequences are cut into passes."""

from __future__ import annotations

from distillation_fakes import tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st

from evolve_dag.distillation.forward import Forward
from evolve_dag.inference.prefix_tree import prefix_tree

PACKED = Forward(tiny_model())
SOME = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=20)


@settings(max_examples=300, deadline=None)
@given(SOME, st.integers(1, 30))
def test_passes_hold_every_sequence_once_in_order_and_fit(sequences: list[list[int]], tokens: int) -> None:
    found = PACKED.passes(sequences, tokens)
    assert [index for chosen in found for index in chosen] == list(range(len(sequences)))
    for chosen in found:
        assert len(chosen) == 1 or prefix_tree([sequences[index] for index in chosen]).tokens <= tokens


def test_a_pass_ends_where_the_next_begins_otherwise() -> None:
    shared, other = list(range(10)), [50, 51]
    views = [[*shared, 20], [*shared, 21], [*shared, 22], [*other, 23], [*other, 24]]  # 11 12 13, then 16 17 distinct tokens
    assert PACKED.passes(views, 16) == [[0, 1, 2], [3, 4]], "by the budget alone the last would be a pass of its own"


def test_a_pass_that_is_not_nearly_full_goes_on() -> None:
    views = [[1, 2], [3, 4, 5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6, 7, 8, 9, 10, 12]]
    assert PACKED.passes(views, 11) == [[0, 1], [2]]


def test_nothing_asks_for_no_pass() -> None:
    assert PACKED.passes([], 10) == []
