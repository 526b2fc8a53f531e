"""Which tasks get more rollouts."""

from __future__ import annotations

from random import Random

import pytest

from evolve_dag.agent.frontier import MOST, more_rollouts


@pytest.mark.parametrize(
    ("groups", "budget", "more"),
    [
        ([[0, 1], [0, 0], [1, 1]], 6, [6, 0, 0]),
        ([[0, 1], [0, 0], [1, 1]], 11, [8, 2, 1]),  # four times what it had, then the others in turn
        ([[0, 0.5], [0.5, 0.5]], 2, [2, 0]),  # partial rewards are mixed where they differ
        ([[0, 1], [1, 0], [0, 0]], 3, [2, 1, 0]),
        ([[0, 0], [1, 1]], 3, [2, 1]),  # nothing is mixed: as many of each, as nearly as it goes
        ([[None, 1], [0, None], [None, None]], 4, [2, 2, 0]),  # of one that cannot be judged there is nothing to learn
        ([[0, 1], [None, None]], 20, [20, 0]),
        ([[None, None]], 2, [2]),
        ([], 0, []),
        ([[0, 1]], 0, [0]),
    ],
)
def test_what_is_left_goes_where_outcomes_are_mixed(groups: list[list[float | None]], budget: int, more: list[int]) -> None:
    assert more_rollouts(groups, budget) == more


def test_the_budget_is_spent_whatever_came_out() -> None:
    rng = Random(4)
    for _ in range(300):
        size, tasks = rng.randint(2, 5), rng.randint(1, 12)
        groups = [[rng.choice((0.0, 0.5, 1.0, None)) for _ in range(size)] for _ in range(tasks)]
        budget = rng.randint(0, 3 * size * tasks)
        more = more_rollouts(groups, budget)
        assert sum(more) == budget
        mixed = [n for n, group in enumerate(groups) if len(set(group) - {None}) > 1]
        alike = [n for n in range(tasks) if n not in mixed]
        if any(more[n] for n in alike):  # the frontier has had its due
            assert all(more[n] >= MOST * size for n in mixed)
