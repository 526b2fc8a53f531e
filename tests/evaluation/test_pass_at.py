"""pass@k against enumeration."""

from __future__ import annotations

from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_dag.evaluation.metrics import pass_at


@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=6), min_size=1, max_size=4))
def test_it_is_the_share_of_draws_that_hold_a_right_one(tasks: list[list[bool]]) -> None:
    ids = [str(n) for n, task in enumerate(tasks) for _ in task]
    found = pass_at(ids, [float(right) for task in tasks for right in task])
    most = min(len(task) for task in tasks)
    assert set(found) == {k for k in (1, 2, 4) if k <= most} | {most}
    for k, value in found.items():
        draws = [[any(draw) for draw in combinations(task, k)] for task in tasks]
        assert value == pytest.approx(sum(sum(d) / len(d) for d in draws) / len(draws))


def test_one_rollout_a_task_and_unjudged_ones() -> None:
    assert pass_at(["a", "b"], [1.0, 0.0]) == {}
    assert pass_at([], []) == {}
    assert pass_at(["a", "a", "a"], [1.0, None, 0.0]) == {1: 0.5, 2: 1.0}
    assert pass_at(["a", "a", "b"], [1.0, 1.0, None]) == {1: 1.0, 2: 1.0}


def test_a_part_of_a_reward_is_not_right() -> None:
    """As in ``solved``: pass@1 of tasks with equally many rollouts is the share of solved episodes."""
    assert pass_at(["a", "a", "b", "b"], [0.5, 0.99, 1.0, 0.75]) == {1: 0.25, 2: 0.5}
