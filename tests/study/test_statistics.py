"""Estimates over seeds and tasks: numbers by hand, and what their intervals promise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_1samp

from evolve_dag.evaluation.intervals import paired_difference
from evolve_dag.study.results import Column
from evolve_dag.study.statistics import against_best, difference, mean


def column(*seeds: list[float]) -> Column:
    return {seed: {f"t{n:03d}": float(v) for n, v in enumerate(values)} for seed, values in enumerate(seeds, 1)}


def drawn(rng: np.random.Generator, *shares: float, tasks: int = 200) -> Column:
    return column(*(list((rng.random(tasks) < share).astype(float)) for share in shares))


def test_every_seed_counts_alike() -> None:
    found = mean(column([1, 1, 1, 1] * 10, [0] * 10))
    assert found is not None
    assert (found.value, found.n) == (0.5, 50)
    assert dict(found.by_seed) == {1: 1.0, 2: 0.0}


def test_the_interval_over_seeds_is_students() -> None:
    rng = np.random.default_rng(1)
    found = mean(drawn(rng, 0.4, 0.5, 0.7))
    assert found is not None
    low, high = ttest_1samp(list(found.by_seed.values()), 0).confidence_interval(0.95)
    assert found.seeds == pytest.approx((low, high))
    assert mean(drawn(rng, 0.05, 0.5)).seeds == (0, 1), "a share stays one"
    assert mean(drawn(rng, 0.4)).seeds is None, "one seed says nothing of others"
    [one] = drawn(rng, 0.4).values()
    agreeing = mean(dict.fromkeys((1, 2, 3), one))
    assert agreeing is not None
    assert agreeing.seeds == agreeing.tasks, "three seeds that agree are no certainty about a fourth"


def test_tasks_that_seeds_share_are_no_new_ones() -> None:
    """Three seeds with the same results know no more of other tasks than one of them."""
    rng = np.random.default_rng(3)
    a, b = drawn(rng, 0.6), drawn(rng, 0.5)
    many = [dict.fromkeys((1, 2, 3), one[1]) for one in (a, b)]
    for alone, together, apart in (
        (mean(a, shared=True), mean(many[0], shared=True), mean(many[0])),
        (difference(a, b, shared=True), difference(*many, shared=True), difference(*many)),
        (
            against_best(a, {"b": b}, shared=True).honest,
            against_best(many[0], {"b": many[1]}, shared=True).honest,
            against_best(many[0], {"b": many[1]}).honest,
        ),
    ):
        assert together.n == alone.n == 200
        assert apart.n == 600
        assert together.tasks == pytest.approx(alone.tasks)
        assert together.seeds == pytest.approx(alone.tasks)
        assert apart.tasks[1] - apart.tasks[0] < 0.7 * (together.tasks[1] - together.tasks[0])


def test_intervals_over_shared_tasks_hold_the_truth() -> None:
    """Tasks differ in how hard they are, whatever the seed: of 200 studies some ten may miss."""
    rng = np.random.default_rng(4)
    missed = {True: [0, 0], False: [0, 0]}
    for _ in range(200):
        chances = rng.beta(0.3, 0.3, 100)
        rewards = column(*((rng.random(100) < chances).astype(float).tolist() for _ in range(5)))
        for shared, count in missed.items():
            found = mean(rewards, shared=shared)
            for n, (low, high) in enumerate((found.tasks, found.seeds)):
                count[n] += not low <= 0.5 <= high
    assert max(missed[True]) <= 20
    assert min(missed[False]) >= 30, "as if they were 500 tasks"


def test_a_seed_that_knows_fewer_of_the_shared_tasks() -> None:
    found = difference({1: {"x": 1.0, "y": 0.0}, 2: {"y": 1.0}}, {1: {"x": 0.0, "y": 0.0}, 2: {"y": 0.0}}, shared=True)
    assert (found.value, found.n, dict(found.by_seed)) == (0.75, 2, {1: 0.5, 2: 1.0})
    assert found.tasks[0] <= 0.75 <= found.tasks[1]


def test_one_seed_is_the_paired_difference_of_the_gate() -> None:
    rng = np.random.default_rng(2)
    a, b = drawn(rng, 0.6), drawn(rng, 0.5)
    found = difference(a, b)
    value, (low, high) = paired_difference(*({t: [v] for t, v in side[1].items()} for side in (a, b)))
    assert found is not None
    assert found.value == pytest.approx(value)
    assert found.tasks == pytest.approx((low, high), abs=0.01)


def test_pairing_is_by_seed_and_task() -> None:
    a = {1: {"x": 1.0, "only here": 0.0}, 2: {"x": 0.0}, 3: {"x": 1.0}}
    b = {1: {"x": 0.0}, 2: {"x": 0.0, "only there": 1.0}}
    found = difference(a, b)
    assert found is not None
    assert (found.value, found.n, dict(found.by_seed)) == (0.5, 2, {1: 1.0, 2: 0.0})
    assert difference(a, {9: {"x": 1.0}}) is None
    assert difference({}, {}) is None


@settings(max_examples=30)
@given(st.lists(st.booleans(), min_size=1, max_size=40), st.integers(1, 4))
def test_equal_results_are_not_certain_ones(values: list[bool], seeds: int) -> None:
    same = column(*([float(v) for v in values] for _ in range(seeds)))
    found = difference(same, same)
    assert found is not None
    assert found.value == 0
    assert found.tasks[0] < 0 < found.tasks[1]
    assert found.verdict == "open"


@settings(max_examples=30)
@given(st.lists(st.lists(st.booleans(), min_size=2, max_size=30), min_size=1, max_size=3))
def test_an_estimate_lies_in_its_intervals_and_turns_with_its_sides(values: list[list[bool]]) -> None:
    a = column(*([float(v) for v in seed] for seed in values))
    b = column(*([float(v) for v in seed[::-1]] for seed in values))
    there, back = difference(a, b), difference(b, a)
    assert there is not None
    assert back is not None
    assert there.tasks[0] < there.value < there.tasks[1]
    assert there.value == pytest.approx(-back.value)
    shown = mean(a)
    assert shown is not None
    assert 0 <= shown.tasks[0] <= shown.value + 1e-12
    assert shown.value - 1e-12 <= shown.tasks[1] <= 1


@settings(max_examples=40)
@given(
    st.lists(st.tuples(st.integers(2, 30), st.sampled_from([0.0, 0.02, 0.5, 0.98, 1.0])), min_size=1, max_size=10),
    st.integers(0, 99),
    st.booleans(),
)
def test_of_however_many_seeds_no_estimate_lies_outside(seeds: list[tuple[int, float]], draw: int, shared: bool) -> None:
    rng = np.random.default_rng(draw)
    a = column(*((rng.random(tasks) < share).astype(float).tolist() for tasks, share in seeds))
    b = column(*([0.0] * tasks for tasks, _ in seeds))
    estimates = [difference(a, b, shared=shared)]
    if (best := against_best(a, {"b": b, "c": b}, shared=shared)) is not None:
        estimates.append(best.honest)
    for found in estimates:
        assert found is not None
        assert found.tasks[0] <= found.value <= found.tasks[1]
        assert found.tasks[0] < found.tasks[1]
        if found.seeds is not None:
            assert found.seeds[0] <= found.value <= found.seeds[1]


def test_intervals_of_many_seeds_hold_a_large_difference() -> None:
    """Of 100 studies some five may miss; with two invented tasks for every seed it was 87."""
    rng = np.random.default_rng(9)
    missed = 0
    for _ in range(100):
        a, b = (drawn(rng, *[share] * 8, tasks=20) for share in (0.95, 0.02))
        low, high = difference(a, b).tasks
        missed += not low <= 0.93 <= high
    assert missed <= 12


def test_none_right_is_no_proof_of_a_rate_of_zero() -> None:
    found = mean(column([0.0] * 100))
    assert found is not None
    assert found.tasks[0] == 0 < found.tasks[1]


def test_the_luck_of_the_chosen_one_is_not_held_against_the_last() -> None:
    """Ten policies that are equally good: the best by luck is above the last, the honest difference is not."""
    naive, honest = [], []
    for trial in range(40):
        rng = np.random.default_rng(trial)
        nights = {str(k): drawn(rng, 0.4, 0.4, tasks=100) for k in range(1, 11)}
        found = against_best(nights["10"], nights)
        assert found is not None
        naive.append(found.naive.value)
        honest.append(found.honest.value)
    assert np.mean(naive) < -0.03
    assert abs(np.mean(honest)) < 0.015
    assert np.mean([value > 0 for value in honest]) > 0.1, "it may be above by luck, as a fair measure must"


def test_a_real_decline_is_seen() -> None:
    rng = np.random.default_rng(5)
    nights = {"1": drawn(rng, 0.3), "2": drawn(rng, 0.8, tasks=200), "3": drawn(rng, 0.4)}
    nights = {k: {1: c[1]} for k, c in nights.items()}
    found = against_best(nights["3"], nights)
    assert found is not None
    assert (found.best, found.chosen) == ("2", ("2", "2"))
    assert found.honest.verdict == "below"
    assert found.honest.value == pytest.approx(found.naive.value, abs=0.05)
    assert found.honest.tasks[0] <= found.honest.value <= found.honest.tasks[1]


def test_the_best_itself_is_not_below_the_best() -> None:
    rng = np.random.default_rng(6)
    nights = {"1": drawn(rng, 0.2, 0.3), "2": drawn(rng, 0.9, 0.8)}
    found = against_best(nights["2"], nights)
    assert found is not None
    assert found.honest.value == 0
    assert found.honest.tasks[0] < 0 < found.honest.tasks[1]
    assert found.best == "2"


def test_the_best_of_one_is_that_one() -> None:
    rng = np.random.default_rng(7)
    a, b = drawn(rng, 0.5, 0.6), drawn(rng, 0.4, 0.4)
    found = against_best(a, {"b": b})
    assert found is not None
    assert found.honest == found.naive == difference(a, b)
    assert (found.best, found.chosen) == ("b", ("b", "b"))
    assert against_best(a, {"b": {9: {"x": 1.0}}}) is None


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("others", [1, 2, 4])
def test_results_that_equal_the_best_are_not_certain_ones(others: int, shared: bool) -> None:
    same = drawn(np.random.default_rng(8), 0.5, 0.5)
    same[2] = same[1]
    found = against_best(same, {str(k): same for k in range(others)}, shared=shared)
    plain = difference(same, same, shared=shared)
    assert found is not None
    assert plain is not None
    assert found.honest.value == 0
    for ours, widths in ((found.honest.tasks, plain.tasks), (found.honest.seeds, plain.seeds)):
        assert ours[0] < 0 < ours[1]
        assert ours[1] - ours[0] == pytest.approx((widths[1] - widths[0]) * (1 if others == 1 else 2**0.5), rel=0.25)


def test_too_few_tasks_to_choose_by_one_half_and_measure_on_the_other() -> None:
    assert against_best(column([1.0]), {"1": column([1.0]), "2": column([0.0])}) is None
    assert against_best({}, {"1": column([1.0])}) is None
