"""Means and paired differences over seeds and tasks, with two intervals each.

``tasks`` holds for the seeds that were run: tasks are resampled within each seed. ``seeds`` holds for another seed as well:
Student's t over the seeds' own means (task noise is in them). A bootstrap over three to five seeds was tried and is too narrow
(docs/adr/0018-studies.md). Every seed counts alike.

Where every seed is asked the same tasks (``shared``: those of a file) they are no new ones with each seed: one draw of tasks
serves all seeds, and over seeds its noise is added to theirs, since it is not in the differences between seeds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from math import hypot
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evolve_dag.evaluation.intervals import SMALL, Interval, wilson
from evolve_dag.seeds import stable_hash
from evolve_dag.study.results import Column

Floats = NDArray[np.float64]
RESAMPLES = 2000
CONFIDENCE = 0.95


@dataclass(frozen=True, slots=True)
class Estimate:
    """A mean over seeds of means over tasks."""

    value: float
    tasks: Interval
    """95%: other tasks, these seeds."""
    seeds: Interval | None
    """95%: other seeds and tasks; None with one seed."""
    by_seed: Mapping[int, float]
    n: int
    """Tasks, of all seeds together; one that several seeds share counts once."""

    @property
    def verdict(self) -> str:
        """``above``, ``below`` or ``open``: where the interval over tasks lies from 0."""
        return "above" if self.tasks[0] > 0 else "below" if self.tasks[1] < 0 else "open"


@dataclass(frozen=True, slots=True)
class AgainstBest:
    """A policy against the best of several, the best being chosen by the same kind of results."""

    chosen: tuple[str, str]
    """Which one was chosen for either half, by the other half."""
    honest: Estimate
    """Chosen on one half of the tasks and measured on the other, both ways: the luck of the choice stays out."""
    naive: Estimate
    """Chosen and measured on all tasks: too low, by the luck of the one that was chosen."""
    best: str
    """The best on all tasks."""


def mean(column: Column, *, shared: bool = False) -> Estimate | None:
    """Mean reward, 0..1; None without a task. Below 30 tasks, or when all are equal, the first interval is Wilson's."""
    values = {seed: _Values(sorted(tasks), np.array([tasks[t] for t in sorted(tasks)])) for seed, tasks in _known(column)}
    if not values:
        return None
    draws = _Draws(values, shared)
    flat = np.concatenate([own.rewards for own in values.values()])
    if draws.tasks < SMALL or flat.min() == flat.max():
        found = _estimate(values, wilson(_mean(values), draws.tasks, confidence=CONFIDENCE), draws)
    else:
        found = _estimate(values, _percentiles(np.mean([draws.means(v, seed) for seed, v in values.items()], axis=0)), draws)
    return found if found.seeds is None else replace(found, seeds=(max(0.0, found.seeds[0]), min(1.0, found.seeds[1])))


def difference(a: Column, b: Column, *, shared: bool = False) -> Estimate | None:
    """Mean of ``a - b`` over the tasks that both know, paired by seed and task; None when there is none.

    As in :func:`evolve_dag.evaluation.intervals.paired_difference`, two invented tasks are added before resampling, one won and
    one lost: without them equal results would pass for certain ones. They are two of all tasks of the study, however many
    seeds it has, and the estimate always lies in its interval.
    """
    values = {}
    for seed in sorted(a.keys() & b.keys()):
        common = sorted(a[seed].keys() & b[seed].keys())
        if common:
            values[seed] = _Values(common, np.array([a[seed][t] - b[seed][t] for t in common]))
    if not values:
        return None
    beside = {seed: _Values(own.tasks, np.stack([own.rewards, np.zeros(len(own.tasks))])) for seed, own in values.items()}
    drawn_R_C = _drawn(beside, shared)
    return _estimate(values, _around(_mean(values), drawn_R_C[:, 0] - drawn_R_C[:, 1]), _Draws(values, shared))


def against_best(policy: Column, others: Mapping[str, Column], *, shared: bool = False) -> AgainstBest | None:
    """``policy`` against the best of ``others``, which may hold it too; None where they share no task.

    Tasks are split into two fixed halves. The choice is made anew in every resample, so its own uncertainty is in the interval;
    each half gets two invented tasks. Of a single other nothing is chosen: that is :func:`difference`.
    """
    if len(others) == 1:
        [(only, other)] = others.items()
        found = difference(policy, other, shared=shared)
        return None if found is None else AgainstBest((only, only), found, found, only)
    stacked = _aligned(policy, others)
    halves = {seed: _halved(whole) for seed, whole in stacked.items()}
    if not halves or any(len(half.tasks) == 0 for pair in halves.values() for half in pair):
        return None
    names = list(others)
    means_S_H_C = np.array([[half.rewards.mean(axis=1) for half in pair] for pair in halves.values()])
    drawn_H_R_C = [_drawn({seed: pair[h] for seed, pair in halves.items()}, shared, h) for h in (0, 1)]
    chosen = [int(means_S_H_C[:, 1 - h, 1:].mean(axis=0).argmax()) for h in (0, 1)]
    gaps_S = np.mean([means_S_H_C[:, h, 0] - means_S_H_C[:, h, 1 + chosen[h]] for h in (0, 1)], axis=0)
    drawn_R = np.mean([_gap(drawn_H_R_C[h], drawn_H_R_C[1 - h]) for h in (0, 1)], axis=0)
    by_seed = dict(zip(halves, map(float, gaps_S), strict=True))
    around = _around(float(gaps_S.mean()), drawn_R)
    whole = _Draws(stacked, shared)
    honest = Estimate(float(gaps_S.mean()), around, _student(by_seed, around, shared=shared), by_seed, whole.tasks)
    whole_C = np.mean([own.rewards.mean(axis=1) for own in stacked.values()], axis=0)
    best = names[int(whole_C[1:].argmax())]
    naive = difference(policy, others[best], shared=shared)
    assert naive is not None  # they share tasks
    return AgainstBest((names[chosen[0]], names[chosen[1]]), honest, naive, best)


# -- inside

_INVENTED = ("\0won", "\0lost")


class _Values(NamedTuple):
    """What one seed has."""

    tasks: list[str]
    rewards: Floats
    """(tasks,), or (columns, tasks)."""


class _Draws:
    """Resampled tasks: of every seed its own, or, where seeds share them, the same in all of them. Those of another ``half``
    are drawn for themselves."""

    def __init__(self, values: Mapping[int, _Values], shared: bool, half: int = 0) -> None:
        named = [task for own in values.values() for task in own.tasks]
        self.shared, self.half = shared, half
        self.place = {task: i for i, task in enumerate(sorted(set(named)))} if shared else {}
        self.tasks = len(self.place) if shared else len(named)
        """Different ones."""

    def means(self, own: _Values, seed: int) -> Floats:
        """(RESAMPLES,) means of resampled tasks."""
        return self.columns(_Values(own.tasks, own.rewards[None, :]), seed)[:, 0]

    def columns(self, own: _Values, seed: int) -> Floats:
        """(RESAMPLES, C) means of the same resampled tasks in every column. Draws follow from the seed, the number of
        tasks and the half alone; a draw that holds none of a seed's tasks counts as all of them."""
        if not self.shared:
            count = len(own.tasks)
            return _weights(seed, count, RESAMPLES, self.half) @ own.rewards.T / count
        weights_R_T = _weights(0, len(self.place), RESAMPLES, self.half)[:, [self.place[task] for task in own.tasks]]
        weights_R_T = np.where(weights_R_T.any(axis=1, keepdims=True), weights_R_T, np.float32(1))
        return weights_R_T @ own.rewards.T / weights_R_T.sum(axis=1, keepdims=True)


def _known(column: Column) -> list[tuple[int, Mapping[str, float]]]:
    return [(seed, tasks) for seed, tasks in sorted(column.items()) if tasks]


def _estimate(values: Mapping[int, _Values], tasks: Interval | None, draws: _Draws) -> Estimate:
    assert tasks is not None  # there are values
    by_seed = {seed: float(own.rewards.mean()) for seed, own in values.items()}
    return Estimate(_mean(values), tasks, _student(by_seed, tasks, shared=draws.shared), by_seed, draws.tasks)


def _mean(values: Mapping[int, _Values]) -> float:
    return float(np.mean([own.rewards.mean() for own in values.values()]))


def _student(by_seed: Mapping[int, float], tasks: Interval, *, shared: bool) -> Interval | None:
    """Student's t over the seeds, and never narrower than for these seeds alone: three of them can agree by luck."""
    if len(by_seed) < 2:
        return None
    from scipy.stats import t

    values = np.array(list(by_seed.values()))
    middle = float(values.mean())
    half = float(t.ppf(0.5 + CONFIDENCE / 2, len(values) - 1)) * float(values.std(ddof=1)) / len(values) ** 0.5
    if shared:
        return middle - hypot(half, middle - tasks[0]), middle + hypot(half, tasks[1] - middle)
    return min(middle - half, tasks[0]), max(middle + half, tasks[1])


@lru_cache(maxsize=32)
def _weights(seed: int, count: int, resamples: int, half: int) -> NDArray[np.float32]:
    """(resamples, count) how often each task is drawn. A report asks for the same ones a thousand times."""
    generator = np.random.default_rng([seed, count, half])
    return generator.multinomial(count, np.full(count, 1 / count), size=resamples).astype(np.float32)


@lru_cache(maxsize=32)
def _pairs(count: int, resamples: int, half: int) -> Floats:
    """(resamples, 2) how often either of two tasks is drawn that stand beside ``count`` others."""
    generator = np.random.default_rng([0, count, half, 1])  # others than those of _weights
    shares = np.array([1, 1, count]) / (count + 2)
    return generator.multinomial(count + 2, shares, size=resamples)[:, :2].astype(np.float64)


def _around(value: float, drawn_R: Floats) -> Interval:
    """Percentiles, ``value`` always among them."""
    low, high = _percentiles(drawn_R)
    return min(low, value), max(high, value)


def _percentiles(means_R: Floats) -> Interval:
    low, high = np.quantile(means_R, [0.5 - CONFIDENCE / 2, 0.5 + CONFIDENCE / 2])
    return float(low), float(high)


def _aligned(policy: Column, others: Mapping[str, Column]) -> dict[int, _Values]:
    """Seed -> rewards (1 + others, tasks) with ``policy`` first, on the tasks that all of them know."""
    columns = [policy, *others.values()]
    found = {}
    for seed in sorted(set.intersection(*(set(column) for column in columns))):
        tasks = sorted(set.intersection(*(set(column[seed]) for column in columns)))
        if tasks:
            found[seed] = _Values(tasks, np.array([[column[seed][t] for t in tasks] for column in columns]))
    return found


def _halved(whole: _Values) -> tuple[_Values, _Values]:
    """The columns of either half of the tasks; which half a task is in follows from its name."""
    half_T = np.array([stable_hash("half", task) % 2 == 1 for task in whole.tasks])
    first, second = (
        _Values([task for task, own in zip(whole.tasks, mask_T, strict=True) if own], whole.rewards[:, mask_T])
        for mask_T in (~half_T, half_T)
    )
    return first, second


def _drawn(values: Mapping[int, _Values], shared: bool, half: int = 0) -> Floats:
    """(R, C) means over seeds of resampled tasks, two invented ones among them: one that the first column wins and one that it
    loses, whichever other it is laid beside.

    With a pair for every seed its pull towards 0 would not grow less with their number while the interval grows narrower, and
    the estimate would come to lie outside.
    """
    count = len(next(iter(values.values())).rewards)
    pair_C_2 = np.repeat([[0.0, 1.0]], count, axis=0)
    pair_C_2[0] = 1.0, 0.0
    if shared or len(values) == 1:
        values = {seed: _Values([*own.tasks, *_INVENTED], np.hstack([own.rewards, pair_C_2])) for seed, own in values.items()}
    draws = _Draws(values, shared, half)
    means_R_C: Floats = np.mean([draws.columns(own, seed) for seed, own in values.items()], axis=0)
    if shared or len(values) == 1:
        return means_R_C
    # Tasks of the study: as many as have the same noise where seeds that count alike have different numbers of them.
    tasks = round(len(values) ** 2 / sum(1 / len(own.tasks) for own in values.values()))
    pairs_R_2 = _pairs(tasks, RESAMPLES, half)
    own_R_1 = tasks + 2 - pairs_R_2.sum(axis=1, keepdims=True)
    mixed_R_C: Floats = (own_R_1 * means_R_C + pairs_R_2 @ pair_C_2.T) / (tasks + 2)
    return mixed_R_C


def _gap(measured_R_C: Floats, choosing_R_C: Floats) -> Floats:
    """(R,) first column minus the one of the others that ``choosing`` has the highest mean for."""
    choice_R = choosing_R_C[:, 1:].argmax(axis=1)
    return measured_R_C[:, 0] - np.take_along_axis(measured_R_C[:, 1:], choice_R[:, None], axis=1)[:, 0]
