"""What contrast rests on: sums over trajectories that show a situation, or an action in it, and what follows from them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from evolve_dag.errors import DataError
from evolve_dag.experience.extraction.situations import Condition

Key = TypeVar("Key")

LEAST_COUNT = 0.05
"""Faded trajectories below which a sum is dropped."""


@dataclass(frozen=True, slots=True)
class Effect:
    """What one action is worth in one situation, against the other actions there."""

    support: int
    """Trajectories that show the action in the situation."""
    others: int
    """Trajectories that show the situation, but never the action in it."""
    lift: float
    """Difference of mean group-centred reward."""
    low: float
    """Lower end of the interval of ``lift``."""
    high: float
    """Upper end."""

    p: float = 0.0
    """One-sided p-value of Welch's test that the lift is not above 0."""

    def evidence(self) -> dict[str, float]:
        """As it stands in an item."""
        return {
            "support": float(self.support),
            "others": float(self.others),
            "lift": round(self.lift, 4),
            "low": round(self.low, 4),
            "high": round(self.high, 4),
        }


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over a set of trajectories."""

    count: float
    """Trajectories; those of earlier iterations count less (:class:`Evidence`)."""
    centred: float
    """Sum of centred rewards."""
    scaled: float
    """Sum of centred rewards times sqrt(G/(G-1))."""
    squares: float
    """Sum of squares of the latter."""

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            self.count + other.count, self.centred + other.centred, self.scaled + other.scaled, self.squares + other.squares
        )

    def faded(self, share: float) -> Moments:
        """The same sums, of which every trajectory counts ``share``."""
        return Moments(self.count * share, self.centred * share, self.scaled * share, self.squares * share)

    def __sub__(self, other: Moments) -> Moments:
        return Moments(
            self.count - other.count, self.centred - other.centred, self.scaled - other.scaled, self.squares - other.squares
        )

    @property
    def mean(self) -> float:
        return self.centred / self.count

    @property
    def variance(self) -> float:
        """Sample variance of the scaled rewards; 0 for fewer than two."""
        if self.count < 2:
            return 0.0
        return max(0.0, (self.squares - self.scaled**2 / self.count) / (self.count - 1))


@dataclass(frozen=True, slots=True)
class Evidence:
    """What was seen so far, as sums, so that nights add up: what is rare in one night is seen in three.

    Rewards are centred within their own groups, so sums of different nights, and of policies of different success, can be
    added. They fade, since the policy that made them is no longer the one that acts.
    """

    situations: Mapping[Condition, Moments]
    """Of the trajectories that show a situation."""
    actions: Mapping[tuple[Condition, str], Moments]
    """Of those among them that show an action in it."""
    barred: Mapping[tuple[Condition, str], Moments] = field(default_factory=dict)
    """Of those among them that could not act so in it: they tell nothing of what it is worth to leave that."""
    told: Mapping[Condition, Moments] = field(default_factory=dict)
    """Of those among them that were always told in it what could be done."""
    named: frozenset[str] = frozenset()
    """What was done or told of. Whoever was told what could be done could do nothing else."""

    def others(self, condition: Condition, action: str) -> Moments:
        """Of the trajectories that show the situation and never the action in it, though it was possible."""
        return self.free(condition, action) - self.actions[condition, action]

    def free(self, condition: Condition, action: str) -> Moments:
        """Of the trajectories that show the situation and could act so in it."""
        barred = self.barred.get((condition, action))
        return self.situations[condition] - barred if barred is not None else self.situations[condition]

    def faded(self, share: float) -> Evidence:
        """Every trajectory counts ``share`` of what it did; what counts next to nothing is dropped."""
        kept = {c: m.faded(share) for c, m in self.situations.items() if m.count * share >= LEAST_COUNT}

        def left(rows: Mapping[tuple[Condition, str], Moments]) -> dict[tuple[Condition, str], Moments]:
            return {k: m.faded(share) for k, m in rows.items() if k[0] in kept and m.count * share >= LEAST_COUNT}

        told = {c: m.faded(share) for c, m in self.told.items() if c in kept}
        return Evidence(kept, left(self.actions), left(self.barred), told, self.named)

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(
            _summed(self.situations, other.situations),
            _summed(self.actions, other.actions),
            _summed(self._barred_from(other.named), other._barred_from(self.named)),
            _summed(self.told, other.told),
            self.named | other.named,
        )

    def _barred_from(self, actions: frozenset[str]) -> Mapping[tuple[Condition, str], Moments]:
        """:attr:`barred`, also from those of ``actions`` that nobody was told of here."""
        unheard = sorted(actions - self.named)
        return {**self.barred, **{(c, action): moments for c, moments in self.told.items() for action in unheard}}

    def to_json(self) -> str:
        """Rows of condition, action or null, and the four sums."""
        rows: list[list[object]] = [[c, None, *_sums(m)] for c, m in self.situations.items()]
        rows += [[c, action, *_sums(m)] for (c, action), m in self.actions.items()]
        whole: dict[str, object] = {"format": 1, "rows": rows}
        if self.named:
            whole["barred"] = [[c, action, *_sums(m)] for (c, action), m in self.barred.items()]
            whole["told"] = [[c, *_sums(m)] for c, m in self.told.items()]
            whole["named"] = sorted(self.named)
        return json.dumps(whole, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Evidence:
        """Read what :meth:`to_json` wrote.

        Raises:
            DataError: it is something else.
        """
        try:
            whole = json.loads(text)
            rows = [(_condition(c), action, Moments(*map(float, sums))) for c, action, *sums in whole["rows"]]
            barred = {(_condition(c), str(action)): Moments(*map(float, sums)) for c, action, *sums in whole.get("barred", ())}
            told = {_condition(c): Moments(*map(float, sums)) for c, *sums in whole.get("told", ())}
            named = frozenset(map(str, whole.get("named", ())))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"evidence of an experience pool: {error}", "materialize experience anew") from error
        situations = {condition: sums for condition, action, sums in rows if action is None}
        actions = {(c, str(action)): sums for c, action, sums in rows if action is not None}
        return cls(situations, actions, barred, told, named)


def _condition(pairs: Sequence[Sequence[object]]) -> Condition:
    return tuple((str(feature), str(value)) for feature, value in pairs)


def _summed(a: Mapping[Key, Moments], b: Mapping[Key, Moments]) -> dict[Key, Moments]:
    return {key: a[key] + b[key] if key in a and key in b else a.get(key) or b[key] for key in dict.fromkeys([*a, *b])}


def _sums(moments: Moments) -> list[float]:
    return [round(value, 6) for value in (moments.count, moments.centred, moments.scaled, moments.squares)]


def welch(a: Moments, b: Moments, spread: float, confidence: float) -> tuple[float, float, float, float]:
    """(difference of means, lower end, upper end, one-sided p-value that it is not above 0). ``spread`` is the variance of
    both sets together: it bounds the variance of a set without failures from below by ``spread / n``, else ten successes
    would look certain."""
    from scipy.special import stdtr, stdtrit

    difference = a.mean - b.mean
    va = max(a.variance, spread / a.count) / a.count
    vb = max(b.variance, spread / b.count) / b.count
    error = va + vb
    if error <= 0:
        return difference, difference, difference, float(difference <= 0)
    degrees = error**2 / (va**2 / max(a.count - 1, 1) + vb**2 / max(b.count - 1, 1))
    half = float(stdtrit(degrees, (1 + confidence) / 2)) * math.sqrt(error)
    return difference, difference - half, difference + half, float(stdtr(degrees, -difference / math.sqrt(error)))


def effect_of(evidence: Evidence, condition: Condition, action: str, confidence: float) -> Effect | None:
    a = evidence.actions.get((condition, action))
    if a is None or a.count < 2:
        return None
    b = evidence.others(condition, action)
    if b.count < 2:
        return None
    return Effect(round(a.count), round(b.count), *welch(a, b, evidence.free(condition, action).variance, confidence))


def discoveries(tested: Mapping[tuple[Condition, str], Effect], rate: float) -> dict[tuple[Condition, str], Effect]:
    """Of all patterns that were tested, those with an effect above 0, at an expected share of false ones of ``rate``.

    Source: Benjamini and Hochberg, "Controlling the False Discovery Rate", JRSS B 57 (1995), the step-up procedure; it holds
    for the positive dependence of situations that contain each other (Benjamini and Yekutieli 2001).
    """
    ranked = sorted(tested.items(), key=lambda entry: (entry[1].p, entry[0]))
    last = max((place for place, (_, e) in enumerate(ranked, 1) if e.p <= rate * place / len(ranked)), default=0)
    return dict(ranked[:last])
