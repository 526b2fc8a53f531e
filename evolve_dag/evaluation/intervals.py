"""Intervals of means and of paired differences, by resampling tasks.

The task is the unit that was drawn at random, so it is the unit that is resampled: rollouts of one task are
not independent of each other (a cluster bootstrap). The weights of a resample depend on the seed and the
number of tasks alone, so two policies measured on the same tasks see the same resamples.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from math import ceil
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

Interval = tuple[float, float]
Floats = NDArray[np.float64]

SMALL = 30
"""Below so many tasks a percentile interval of a share is too narrow; Wilson's is used."""

INVENTED = (1.0, -1.0)
"""Differences of two tasks that are added before resampling, see :func:`paired_difference`."""

SAME = 1e-9
"""Difference of two means up to which they are equal: the same rewards, summed in another order, differ in the last digit."""

POWER = 0.8
"""Chance with which a loss that is called detectable would be seen."""

_CHUNK = 4_000_000
"""Weights held at once; bounds memory on large suites without changing a single draw."""


def by_task(tasks: Sequence[str], values: Sequence[float | None]) -> dict[str, list[float]]:
    """Known values of each task, tasks in sorted order so that no result depends on the order of rows.

    Args:
        tasks: task id of each value.
        values: one value per rollout; None (not judged) is left out, never counted as 0.
    """
    found: dict[str, list[float]] = {}
    for task, value in zip(tasks, values, strict=True):
        if value is not None:
            found.setdefault(task, []).append(float(value))
    return dict(sorted(found.items()))


def mean_interval(
    tasks: Sequence[str], values: Sequence[float | None], *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval | None:
    """Percentile interval of the mean over rollouts, by a bootstrap over tasks.

    Args:
        tasks: task id of each value.
        values: one value per rollout; None is left out.
        resamples: bootstrap resamples.
        confidence: e.g. 0.95.
        seed: decides the resamples.

    Returns:
        ``(low, high)``, or None without a single known value. One task, or equal values, give an interval of
        width 0: a bootstrap cannot see what it was not shown. For shares use :func:`share_interval`.
    """
    known = by_task(tasks, values)
    if not known:
        return None
    sums_T = np.array([sum(row) for row in known.values()])
    counts_T = np.array([len(row) for row in known.values()], dtype=np.float64)
    return _percentiles(_resampled_ratio(sums_T, counts_T, resamples, seed), confidence)


def share_interval(
    tasks: Sequence[str], values: Sequence[float | None], *, resamples: int = 2000, confidence: float = 0.95, seed: int = 0
) -> Interval | None:
    """Interval of a share (values in 0..1): the bootstrap over tasks, or Wilson's where that would mislead.

    With fewer than :data:`SMALL` tasks, or when all values are equal, the bootstrap's interval is too narrow
    (none of 20 right is no proof of a rate of 0). Wilson's interval then takes the number of *tasks* for n, as if the
    rollouts of a task told nothing new: wide rather than wrong.

    Returns:
        ``(low, high)`` inside 0..1, or None without a single known value.
    """
    known = by_task(tasks, values)
    if not known:
        return None
    flat = [value for row in known.values() for value in row]
    if len(known) < SMALL or min(flat) == max(flat):
        return wilson(sum(flat) / len(flat), len(known), confidence=confidence)
    return mean_interval(tasks, values, resamples=resamples, confidence=confidence, seed=seed)


def wilson(share: float, n: float, *, confidence: float = 0.95) -> Interval | None:
    """Wilson's score interval of a share.

    Args:
        share: observed share, 0..1. A mean of partial rewards may be given: 0/1 values have the largest variance
            of all values in 0..1 with that mean, so the interval is then at least wide enough.
        n: independent observations; a fraction where dependent ones are worth so many.
        confidence: e.g. 0.95.

    Returns:
        ``(low, high)`` inside 0..1, or None for n = 0.

    Source: Wilson (1927), J. Am. Stat. Assoc. 22, 209-212.
    """
    if n == 0:
        return None
    z = NormalDist().inv_cdf(0.5 + confidence / 2)
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    # the bounds meet the observed share exactly at 0 and 1; rounding must not put it outside
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def paired_difference(
    a: Mapping[str, Sequence[float]],
    b: Mapping[str, Sequence[float]],
    *,
    share: bool = True,
    resamples: int = 4000,
    confidence: float = 0.95,
    seed: int = 0,
) -> tuple[float, Interval] | None:
    """Mean difference ``a - b`` over the tasks that both sides know, with its interval.

    Pairing takes the difficulty of the tasks out of the comparison. A task counts once: its difference is the difference of
    its mean values.

    Args:
        a: task id -> values of one side (see :func:`by_task`).
        b: the other side.
        share: the values lie in 0..1. Two invented tasks, one won and one lost, are then added before resampling: without
            them one lost task of one, or four of a hundred and none won, would pass for a certain loss. It is the
            adjustment of Bonett and Price (2012), J. Educ. Behav. Stat. 37, 479-488, as a bootstrap.
        resamples: bootstrap resamples.
        confidence: e.g. 0.95.
        seed: decides the resamples.

    Returns:
        ``(difference, (low, high))``, the difference always inside; None when no task is known to both.
    """
    a_T, b_T = paired(a, b)
    if not len(a_T):
        return None
    differences_T = a_T - b_T
    interval = difference_interval(differences_T, share=share, resamples=resamples, confidence=confidence, seed=seed)
    return float(differences_T.mean()), interval


def difference_interval(
    differences_T: Floats, *, share: bool = True, resamples: int = 4000, confidence: float = 0.95, seed: int = 0
) -> Interval:
    """Interval of :func:`paired_difference`, from one difference a task; at least one."""
    difference = float(differences_T.mean())
    drawn_T = np.append(differences_T, INVENTED) if share else differences_T
    means = [weights_R_T @ drawn_T / len(drawn_T) for weights_R_T in _draws(len(drawn_T), resamples, seed)]
    low, high = _percentiles(np.concatenate(means), confidence)
    return min(low, difference), max(high, difference)


def sign_interval(differences_T: Floats, *, resamples: int = 4000, confidence: float = 0.95, seed: int = 0) -> Interval:
    """Interval of the mean of differences, one a task, that excludes zero only where the exact sign test over the tasks that
    differ at all does too. At least one difference.

    A bootstrap of few tasks that differ is too sure of itself; the two invented tasks of :func:`paired_difference` make it too
    unsure where each side is the mean of several rollouts and success is rare: a fall from 8% to nothing would not be seen.
    """
    from scipy.special import bdtrc

    low, high = difference_interval(differences_T, share=False, resamples=resamples, confidence=confidence, seed=seed)
    won, lost = int((differences_T > SAME).sum()), int((differences_T < -SAME).sum())
    level = (1 - confidence) / 2
    if lost == 0 or bdtrc(lost - 1, won + lost, 0.5) > level:
        high = max(high, 0.0)
    if won == 0 or bdtrc(won - 1, won + lost, 0.5) > level:
        low = min(low, 0.0)
    return low, high


def paired(a: Mapping[str, Sequence[float]], b: Mapping[str, Sequence[float]]) -> tuple[Floats, Floats]:
    """Mean of each side for every task that both know, tasks in sorted order. Returns (T,), (T,)."""
    common = sorted(task for task in a if task in b and len(a[task]) and len(b[task]))
    a_T, b_T = (np.array([sum(side[task]) / len(side[task]) for task in common], dtype=np.float64) for side in (a, b))
    return a_T, b_T


def spread(differences_T: Floats) -> float:
    """Standard deviation of one task's difference, with the two invented tasks of :func:`paired_difference`: never 0."""
    return float(np.append(differences_T, INVENTED).std())


def spread_alone(spread: float, difference: float, tasks: int) -> float:
    """Standard deviation of one task's difference without the two invented tasks, of a :func:`spread` with them; 0 where no
    task differs from another.

    Args:
        spread: with the invented tasks.
        difference: mean difference of the tasks.
        tasks: without the invented ones, at least 1.
    """
    drawn = tasks + len(INVENTED)
    variance = (spread**2 * drawn - len(INVENTED)) / tasks - len(INVENTED) * difference**2 / drawn
    return variance**0.5 if variance > SAME else 0.0


def detectable(sd: float, tasks: int, *, confidence: float = 0.95, power: float = POWER) -> float:
    """Smallest loss whose interval lies below zero in ``power`` of the cases (normal approximation).

    Args:
        sd: standard deviation of one task's difference.
        tasks: how many are compared, at least 1.
    """
    return _reach(confidence, power) * sd / tasks**0.5


def tasks_for(loss: float, sd: float, *, confidence: float = 0.95, power: float = POWER) -> int:
    """How many tasks make ``loss`` :func:`detectable`."""
    return ceil((_reach(confidence, power) * sd / loss) ** 2)


def _reach(confidence: float, power: float) -> float:
    normal = NormalDist()
    return normal.inv_cdf(0.5 + confidence / 2) + normal.inv_cdf(power)


def _resampled_ratio(sums_T: Floats, counts_T: Floats, resamples: int, seed: int) -> Floats:
    """Mean of each resample: drawn tasks' sums over drawn tasks' counts. Returns (resamples,)."""
    both_T_2 = np.stack([sums_T, counts_T], axis=1)
    drawn_R_2 = np.concatenate([weights_R_T @ both_T_2 for weights_R_T in _draws(len(sums_T), resamples, seed)])
    return drawn_R_2[:, 0] / drawn_R_2[:, 1]


def _draws(tasks: int, resamples: int, seed: int) -> Iterator[Floats]:
    """How often each task is drawn, in chunks of (rows, T); a single chunk is kept, since many numbers are asked about the same
    tasks."""
    if resamples * tasks <= _CHUNK:
        yield _drawn_at_once(tasks, resamples, seed)
        return
    generator, rows = np.random.default_rng(seed), max(1, _CHUNK // tasks)
    for start in range(0, resamples, rows):  # rows are drawn one after the other, so chunks change nothing
        yield _draw(generator, tasks, min(rows, resamples - start))


@lru_cache(maxsize=4)
def _drawn_at_once(tasks: int, resamples: int, seed: int) -> Floats:
    return _draw(np.random.default_rng(seed), tasks, resamples)


def _draw(generator: np.random.Generator, tasks: int, rows: int) -> Floats:
    return generator.multinomial(tasks, np.full(tasks, 1 / tasks), size=rows).astype(np.float64)


def _percentiles(means_R: Floats, confidence: float) -> Interval:
    low, high = np.quantile(means_R, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)
