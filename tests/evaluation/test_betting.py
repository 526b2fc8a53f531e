"""Betting on a loss: the capital by hand, the level by simulation, and what the numbers promise."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_dag.evaluation.betting import LEAST, STAKES, Capital, detectable

losses = st.lists(st.floats(-1, 1), min_size=1, max_size=30)


def test_the_capital_by_hand() -> None:
    after = Capital().after([1.0, -1.0, 0.0], margin=0.1)
    assert after.logs[0] == pytest.approx(math.log(1.045 * 0.945 * 0.995))
    assert after.logs[-1] == pytest.approx(math.log(1.72 * 0.12 * 0.92))
    assert after.total == pytest.approx(sum(math.exp(log) for log in after.logs) / len(STAKES))
    assert Capital().total == 1.0


@given(losses, st.randoms())
def test_nights_and_the_order_of_tasks_do_not_matter(values: list[float], random) -> None:
    whole = Capital().after(values, 0.02)
    shuffled = random.sample(values, len(values))
    at = random.randrange(len(values) + 1)
    assert Capital().after(shuffled[:at], 0.02).after(shuffled[at:], 0.02).logs == pytest.approx(whole.logs)


@given(losses)
def test_nobody_loses_more_than_he_has(values: list[float]) -> None:
    for margin in (0.0, 0.249):
        assert 0 < Capital().after(values, margin).total < math.inf


@given(losses, st.floats(0.01, 50))
def test_giving_away_makes_no_money_and_beginning_anew_little(values: list[float], limit: float) -> None:
    capital = Capital().after(values)
    assert capital.at_most(limit).total == pytest.approx(min(limit, capital.total))
    assert capital.restarted().total == pytest.approx(min(1.0, max(LEAST, capital.total)))


@given(losses, st.floats(0.01, 50))
def test_the_richest_give_away_first(values: list[float], limit: float) -> None:
    before = Capital().after(values)
    after = before.at_most(limit)
    most = max(after.logs)
    assert after.logs == pytest.approx([min(log, most) for log in before.logs])


def test_what_no_number_can_hold_is_given_away_too() -> None:
    lost = Capital().after([1.0] * 2000)
    assert math.isfinite(lost.total)
    assert lost.at_most(4.0).logs == pytest.approx([math.log(4.0)] * len(STAKES))


def _ever(means_R_T: np.ndarray, nights: int, seed: int, margin: float = 0.0) -> float:
    """Share of runs in which the capital ever reaches 20, tasks with these mean losses, fresh draws every night."""
    rng = np.random.default_rng(seed)
    runs, found = means_R_T.shape[0], np.zeros(means_R_T.shape[0], dtype=bool)
    for run in range(runs):
        capital = Capital()
        for _ in range(nights):
            won = rng.random(means_R_T.shape[1]) < (1 + means_R_T[run]) / 2
            capital = capital.after(np.where(won, 1.0, -1.0), margin)
            found[run] |= capital.total >= 20
    return float(found.mean())


def test_false_findings_over_thirty_nights_are_rarer_than_one_in_twenty() -> None:
    """The hardest case: coin flips, tasks with different means whose average is exactly the margin."""
    rng = np.random.default_rng(3)
    means = rng.uniform(-0.6, 0.6, (400, 40))
    means += 0.1 - means.mean(axis=1, keepdims=True)
    assert _ever(means, 30, seed=4, margin=0.1) <= 0.05 + 3 * (0.05 * 0.95 / 400) ** 0.5


@pytest.mark.parametrize(("tasks", "nights", "sd"), [(128, 1, 0.5), (128, 10, 0.3), (320, 6, 0.5)])
def test_what_is_called_detectable_is_found_in_about_four_of_five(tasks: int, nights: int, sd: float) -> None:
    rng, runs = np.random.default_rng(6), 400
    loss = detectable(sd, tasks * nights, level=0.05)
    discordant = sd**2 + loss**2  # losses of -1, 0 and 1 with this spread
    found = 0
    for _ in range(runs):
        u = rng.random(tasks * nights)
        worse, better = (discordant + loss) / 2, (discordant - loss) / 2
        found += Capital().after((u < worse).astype(float) - ((u >= worse) & (u < worse + better))).total >= 20
    assert 0.7 < found / runs < 0.9
