"""Intervals: oracles, coverage by simulation, degenerate cases."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolve_dag.evaluation.intervals import (
    by_task,
    detectable,
    mean_interval,
    paired,
    paired_difference,
    share_interval,
    sign_interval,
    spread,
    spread_alone,
    tasks_for,
    wilson,
)

SIMULATIONS = 500


def _ids(tasks: int, rollouts: int = 1) -> list[str]:
    return [f"t{i:03d}" for i in range(tasks) for _ in range(rollouts)]


def _covered(hits: int) -> None:
    assert 0.92 <= hits / SIMULATIONS <= 0.98, f"a 95% interval held the truth in {hits / SIMULATIONS:.1%} of the simulations"


def test_coverage_of_the_cluster_bootstrap_with_several_rollouts_a_task() -> None:
    """Difficulty varies between tasks, so rollouts of a task are not independent."""
    rng = np.random.default_rng(7)
    ids, hits, naive = _ids(80, 4), 0, 0
    for simulation in range(SIMULATIONS):
        difficulty = rng.beta(0.6, 0.9, size=80)  # mean 0.4
        rewards = (rng.random((80, 4)) < difficulty[:, None]).astype(float).ravel()
        low, high = mean_interval(ids, list(rewards), resamples=400, seed=simulation) or (1.0, 0.0)
        hits += low <= 0.4 <= high
        half = 1.96 * rewards.std() / len(rewards) ** 0.5
        naive += abs(rewards.mean() - 0.4) <= half
    _covered(hits)
    assert naive / SIMULATIONS < 0.88, "the simulation must be one in which ignoring the clusters is wrong"


def test_coverage_of_small_shares() -> None:
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(SIMULATIONS):
        values = list((rng.random(20) < 0.3).astype(float))
        low, high = share_interval(_ids(20), values) or (1.0, 0.0)
        hits += low <= 0.3 <= high
    _covered(hits)


def test_coverage_of_paired_differences() -> None:
    rng = np.random.default_rng(13)
    hits = 0
    for simulation in range(SIMULATIONS):
        a = {f"t{i}": [float(rng.random() < 0.5)] for i in range(100)}
        b = {task: [value if rng.random() < 0.7 else float(rng.random() < 0.3)] for task, (value,) in a.items()}
        found = paired_difference(a, b, resamples=400, seed=simulation)
        assert found is not None
        # E[b] = 0.7 * 0.5 + 0.3 * 0.3
        hits += found[1][0] <= 0.5 - 0.44 <= found[1][1]
    _covered(hits)


def test_one_rollout_a_task_agrees_with_the_normal_approximation() -> None:
    values = [1.0] * 300 + [0.0] * 700
    low, high = mean_interval(_ids(1000), values, resamples=4000) or (0.0, 0.0)
    half = 1.96 * (0.3 * 0.7 / 1000) ** 0.5
    assert low == pytest.approx(0.3 - half, abs=0.003)
    assert high == pytest.approx(0.3 + half, abs=0.003)


def test_rollouts_that_repeat_each_other_do_not_narrow_the_interval() -> None:
    once = [1.0, 0.0] * 50
    four_times = [v for v in once for _ in range(4)]
    assert mean_interval(_ids(100, 4), four_times) == mean_interval(_ids(100), once)


@pytest.mark.parametrize(
    ("share", "n", "expected"),
    [
        (0.5, 10, (0.2366, 0.7634)),  # textbook value
        (0.0, 10, (0.0, 0.2775)),
        (1.0, 10, (0.7225, 1.0)),
    ],
)
def test_wilson_oracle(share: float, n: int, expected: tuple[float, float]) -> None:
    assert wilson(share, n) == pytest.approx(expected, abs=1e-4)


def test_no_known_value_gives_no_interval() -> None:
    assert mean_interval([], []) is None
    assert share_interval(["a", "b"], [None, None]) is None
    assert wilson(0.0, 0) is None
    assert paired_difference({}, {}) is None
    assert paired_difference({"a": [1.0]}, {"b": [1.0]}) is None


def test_unknown_is_left_out_and_not_zero() -> None:
    assert by_task(["b", "a", "a"], [1.0, None, 0.5]) == {"a": [0.5], "b": [1.0]}
    with_gaps = mean_interval([*_ids(40), "x", "y"], [*([1.0, 0.0] * 20), None, None])
    assert with_gaps == mean_interval(_ids(40), [1.0, 0.0] * 20)


def test_equal_values() -> None:
    assert mean_interval(_ids(50), [3.0] * 50) == (3.0, 3.0)
    low, high = share_interval(_ids(50), [0.0] * 50) or (1.0, 0.0)
    assert low == 0.0
    assert 0.02 < high < 0.1, "none of 50 is no proof of a rate of 0"


def test_memory_chunks_change_no_draw(monkeypatch: pytest.MonkeyPatch) -> None:
    values = list(np.random.default_rng(0).random(60))
    whole = mean_interval(_ids(60), values, resamples=501)
    monkeypatch.setattr("evolve_dag.evaluation.intervals._CHUNK", 60 * 7)
    assert mean_interval(_ids(60), values, resamples=501) == whole


@pytest.mark.parametrize(
    ("lost", "won", "tasks", "certain"),
    [
        (1, 0, 1, False),
        (4, 0, 128, False),  # the plain bootstrap calls this a certain loss; an exact sign test says p = 0.125
        (8, 0, 128, True),  # p = 0.008
        (20, 3, 128, True),
        (0, 20, 128, False),
    ],
)
def test_a_few_lost_tasks_are_no_certain_loss(lost: int, won: int, tasks: int, certain: bool) -> None:
    champion = {f"t{i:03d}": [0.0 if lost <= i < lost + won else 1.0] for i in range(tasks)}
    candidate = {f"t{i:03d}": [0.0 if i < lost else 1.0] for i in range(tasks)}
    found = paired_difference(candidate, champion)
    assert found is not None
    difference, (_, high) = found
    assert difference == pytest.approx((won - lost) / tasks)
    assert (high < 0) is certain


def test_pairing_is_narrower_than_two_separate_intervals() -> None:
    rng = np.random.default_rng(3)
    b = {f"t{i}": [float(rng.random() < 0.5)] for i in range(200)}
    a = {task: [1.0 if i < 12 else value[0]] for i, (task, value) in enumerate(b.items())}
    found = paired_difference(a, b)
    assert found is not None
    separate = mean_interval(list(b), [v[0] for v in b.values()])
    assert separate is not None
    assert found[1][1] - found[1][0] < 0.6 * (separate[1] - separate[0])


rewards = st.lists(st.tuples(st.integers(0, 12), st.sampled_from([0.0, 0.5, 1.0, None])), max_size=40)


@settings(deadline=None, max_examples=60)
@given(rewards, st.randoms(use_true_random=False))
def test_order_of_rows_does_not_matter_and_bounds_hold_the_mean(rows: list[tuple[int, float | None]], random) -> None:
    def interval(pairs: list[tuple[int, float | None]]) -> tuple[float, float] | None:
        return share_interval([f"t{t}" for t, _ in pairs], [v for _, v in pairs], resamples=200)

    shuffled = sorted(rows, key=lambda row: (row[0], str(row[1])))
    random.shuffle(shuffled)
    found, again = interval(sorted(rows, key=lambda row: (row[0], str(row[1])))), interval(shuffled)
    known = [v for _, v in rows if v is not None]
    if not known:
        assert found is None
        assert again is None
        return
    assert found is not None
    assert again is not None
    assert again == pytest.approx(found)
    assert 0.0 <= found[0] <= sum(known) / len(known) <= found[1] <= 1.0


@settings(deadline=None, max_examples=60)
@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), st.lists(st.floats(0, 1), min_size=1, max_size=3), min_size=1))
def test_a_policy_does_not_differ_from_itself(values: dict[str, list[float]]) -> None:
    found = paired_difference(values, values, resamples=200)
    assert found is not None
    assert found[0] == 0.0
    assert found[1][0] <= 0.0 <= found[1][1]


@given(values=st.lists(st.sampled_from([-1.0, -0.5, 0.0, 0.25, 1.0]), min_size=1, max_size=40))
def test_the_invented_tasks_can_be_taken_out_of_a_spread(values: list[float]) -> None:
    differences_T = np.array(values)
    assert spread_alone(spread(differences_T), float(differences_T.mean()), len(values)) == pytest.approx(
        float(differences_T.std())
    )


def test_what_is_detectable_by_hand_and_back() -> None:
    assert detectable(0.5, 400) == pytest.approx((1.959964 + 0.841621) * 0.5 / 20, rel=1e-6)
    assert tasks_for(0.05, 0.5) == 785
    assert detectable(0.5, 785) <= 0.05 < detectable(0.5, 784)


def test_a_detectable_loss_is_significant_in_four_of_five() -> None:
    rng, tasks, sd = np.random.default_rng(9), 200, 0.4
    loss, seen = detectable(sd, tasks), 0
    for _ in range(200):
        u = rng.random(tasks)
        drawn = (u < (sd**2 - loss) / 2).astype(float) - (u > 1 - (sd**2 + loss) / 2)
        found = paired_difference({str(t): [d] for t, d in enumerate(drawn)}, {str(t): [0.0] for t in range(tasks)})
        assert found is not None
        seen += found[1][1] < 0
    assert 0.7 < seen / 200 < 0.9


@pytest.mark.parametrize(
    ("lost", "won", "same", "sure"),
    [
        (5, 0, 60, False),
        (6, 0, 60, True),
        (6, 0, 0, True),
        (14, 3, 40, True),
        (14, 9, 40, False),
        (0, 0, 9, False),
        (1, 0, 0, False),
    ],
)
def test_a_loss_is_sure_where_the_sign_test_says_so_too(lost: int, won: int, same: int, sure: bool) -> None:
    """The one-sided sign test at 2.5%: 6 of 6 (1.6%) and 14 of 17 (0.6%), not 5 of 5 (3.1%) or 14 of 23 (20%)."""
    differences = np.array([-0.2] * lost + [0.2] * won + [0.0] * same)
    low, high = sign_interval(differences)
    assert low <= differences.mean() <= high
    assert (high < 0) is sure
    mirrored = sign_interval(-differences)
    assert (mirrored[0] > 0) is sure


def test_the_same_rewards_in_another_order_are_a_tie() -> None:
    """Half of 90 such tasks would count as won or lost by rounding, and hide ten that lost."""
    rng = random.Random(3)
    rewards = {f"t{n}": [rng.randrange(11) / 10 for _ in range(6)] for n in range(90)}
    a, b = paired(rewards, {task: rng.sample(own, 6) for task, own in rewards.items()})
    assert (a != b).any()
    assert sign_interval(np.append(a - b, [-0.6] * 10))[1] < 0
    assert sign_interval(a - b)[0] <= 0 <= sign_interval(a - b)[1]


def test_a_sure_loss_of_many_small_tasks_may_still_be_no_loss_of_the_mean() -> None:
    low, high = sign_interval(np.array([-0.01] * 30 + [1.0] * 3))
    assert low <= 0 <= high, "the signs say lost, the mean does not"


def test_how_often_no_difference_passes_for_a_loss() -> None:
    """Two equal policies, six rollouts a task, success 10%: at most the 2.5% of the level."""
    rng = np.random.default_rng(5)
    wrong = 0
    for _ in range(300):
        a, b = rng.binomial(6, 0.1, (2, 40)) / 6
        wrong += sign_interval(a - b, resamples=400)[1] < 0
    assert wrong <= 12
