"""Contrast mining: which action separates success from failure in which situation (METHOD step 3, no LLM needed).

Only groups with mixed outcomes teach (0 < mean reward < 1); trajectories that were not judged are left out, they
are not failures. For a situation ``s`` and an action ``a``

    lift(s, a) = mean group-centred reward of the trajectories that show a in s
               - mean group-centred reward of the trajectories that show s, but never a in it

A trajectory counts once per pattern, however often it shows it. The interval is Welch's, two-sided at the configured
confidence. Rewards are centred by the mean of their own group, which makes the members of a group depend on each
other and shrinks the variance by (G-1)/G; the variances are scaled back by G/(G-1).

Situations are conjunctions from a small lattice: the base (tool and kind of observation) alone, or with one or two of
``listed``/``shared_name``, ``evidence`` and ``repeat``. Per situation the best action is kept (highest lower end). Then
a general situation goes when a special case of it clearly asks for something else, and a special case goes when it adds
nothing to a general one that stays.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from statistics import NormalDist

from evolve_dag.experience.features import FEATURES, walk
from evolve_dag.experience.phrases import STRATEGIES, action_of, render
from evolve_dag.experience.pool import Pool, Proposal
from evolve_dag.records import ExperienceItem, Trajectory

Condition = tuple[tuple[str, str], ...]
"""(feature, value) pairs in the order of ``features.FEATURES``: a hashable conjunction."""

MIN_OTHERS = 5
"""Trajectories that must stand on either side of a comparison: fewer are no contrast."""

MAX_TRAJECTORY_IDS = 50
"""Provenance kept per pattern."""


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
class Pattern:
    """A situation with the action that pays there."""

    condition: Condition
    action: str
    effect: Effect
    trajectory_ids: tuple[str, ...]
    """All supporting trajectories; beyond 50, 50 drawn (seeded) from the successful ones."""

    @property
    def text(self) -> str:
        return render(dict(self.condition), self.action)


@dataclass(frozen=True, slots=True)
class Moments:
    """Sums over a set of trajectories."""

    count: int
    centred: float
    """Sum of centred rewards."""
    scaled: float
    """Sum of centred rewards times sqrt(G/(G-1))."""
    squares: float
    """Sum of squares of the latter."""

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


class Mined:
    """The result of one mining: the kept patterns, and the evidence to ask about any other."""

    def __init__(
        self,
        patterns: tuple[Pattern, ...],
        actions: Mapping[tuple[Condition, str], Moments],
        situations: Mapping[Condition, Moments],
        confidence: float,
        statistics: Mapping[str, float],
    ) -> None:
        self.patterns = patterns
        """Kept patterns, highest lift first."""
        self.statistics = statistics
        """Counts of what was read, left out and found."""
        self._actions = actions
        self._situations = situations
        self._confidence = confidence

    def effect(self, condition: Condition, action: str) -> Effect | None:
        """Evidence for one pattern; None without two trajectories on either side."""
        return _effect(self._actions, self._situations, condition, action, self._confidence)

    def clearly_better(self, condition: Condition, better: str, worse: str, *, measured: bool = False) -> bool:
        """Whether ``better`` beats ``worse`` in the situation at the configured confidence.

        When (almost) nobody did ``worse`` there, its advice has no ground in this situation: true, unless the
        comparison must be ``measured``.
        """
        a, b = self._actions.get((condition, better)), self._actions.get((condition, worse))
        if a is None or (measured and a.count < MIN_OTHERS):
            return False
        if b is None or b.count < MIN_OTHERS:
            return not measured
        return _welch(a, b, self._situations[condition].variance, self._confidence)[1] > 0


def condition_of(mapping: Mapping[str, str]) -> Condition:
    """A condition as a sorted tuple, so that equal conditions are equal keys."""
    order = {name: place for place, name in enumerate(FEATURES)}
    return tuple(sorted(mapping.items(), key=lambda pair: (order.get(pair[0], len(order)), pair[0])))


def situations_of(state: Mapping[str, str]) -> Iterator[Condition]:
    """Every situation of the lattice that holds in ``state``, the base first."""
    base = {"tool": state["tool"], "observation": state["observation"]}
    options: list[list[dict[str, str]]] = []
    if state["observation"] == "listing":
        if state["listed"] == "one":
            options.append([{"listed": "one"}])
        else:
            options.append([{"listed": "several"}, {"listed": "several", "shared_name": state["shared_name"]}])
    if state["observation"] in ("listing", "page"):
        options.append([{"evidence": state["evidence"]}])
    if state["observation"] != "none":
        options.append([{"repeat": state["repeat"]}])
    yield condition_of(base)
    for first in options:
        for one in first:
            yield condition_of({**base, **one})
    for first, second in combinations(options, 2):
        for one in first:
            for two in second:
                yield condition_of({**base, **one, **two})


def t_quantile(probability: float, degrees: float) -> float:
    """Quantile of Student's t for ``probability`` > 0.5 (G. W. Hill, Algorithm 396, CACM 1970; five digits for
    at least two degrees of freedom)."""
    if not 0.5 < probability < 1:
        raise ValueError(f"probability {probability} is not between 0.5 and 1")
    tail = 2 * (1 - probability)
    if degrees < 2:  # no exact formula between 1 and 2: the wider one
        return 1 / math.tan(tail * math.pi / 2)
    if degrees < 3:
        return math.sqrt(2 / (tail * (2 - tail)) - 2)
    a = 1 / (degrees - 0.5)
    b = 48 / a**2
    c = ((20700 * a / b - 98) * a - 16) * a + 96.36
    d = ((94.5 / (b + c) - 3) / b + 1) * math.sqrt(a * math.pi / 2) * degrees
    y = (d * tail) ** (2 / degrees)
    if y > 0.05 + a:
        x = NormalDist().inv_cdf(tail / 2)
        y = x**2
        if degrees < 5:
            c += 0.3 * (degrees - 4.5) * (x + 0.6)
        c += (((0.05 * d * x - 5) * x - 7) * x - 2) * x + b
        y = (((((0.4 * y + 6.3) * y + 36) * y + 94.5) / c - y - 3) / b + 1) * x
        y = a * y**2
        y = math.expm1(y)
    else:
        y = ((1 / (((degrees + 6) / (degrees * y) - 0.089 * d - 0.822) * (degrees + 2) * 3) + 0.5 / (degrees + 4)) * y - 1) * (
            degrees + 1
        ) / (degrees + 2) + 1 / y
    return math.sqrt(degrees * y)


def _welch(a: Moments, b: Moments, spread: float, confidence: float) -> tuple[float, float, float]:
    """(difference of means, lower end, upper end). ``spread`` is the variance of both sets together: it bounds the
    variance of a set without failures from below by ``spread / n``, else ten successes would look certain."""
    difference = a.mean - b.mean
    va = max(a.variance, spread / a.count) / a.count
    vb = max(b.variance, spread / b.count) / b.count
    error = va + vb
    if error <= 0:
        return difference, difference, difference
    degrees = error**2 / (va**2 / max(a.count - 1, 1) + vb**2 / max(b.count - 1, 1))
    half = t_quantile((1 + confidence) / 2, degrees) * math.sqrt(error)
    return difference, difference - half, difference + half


def _effect(
    actions: Mapping[tuple[Condition, str], Moments],
    situations: Mapping[Condition, Moments],
    condition: Condition,
    action: str,
    confidence: float,
) -> Effect | None:
    a = actions.get((condition, action))
    if a is None or a.count < 2:
        return None
    b = situations[condition] - a
    if b.count < 2:
        return None
    return Effect(a.count, b.count, *_welch(a, b, situations[condition].variance, confidence))


def mine(
    trajectories: Sequence[Trajectory],
    *,
    min_support: int = 10,
    min_lift: float = 0.05,
    confidence: float = 0.95,
    seed: int = 0,
) -> Mined:
    """Mine ``trajectories`` (any order: the result does not depend on it).

    Args:
        min_support: trajectories that must show a pattern.
        min_lift: least lift.
        confidence: level of the interval whose lower end must be above zero.
        seed: decides which 50 trajectories stand for a pattern that has more.
    """
    import numpy as np

    kept, statistics = _mixed_groups(trajectories)
    n = len(kept)
    centred = np.array([c for _, c, _ in kept])
    scaled = centred * np.sqrt(np.array([g / (g - 1) for _, _, g in kept])) if n else centred
    situation_ids: dict[Condition, int] = {}
    pattern_ids: dict[tuple[Condition, str], int] = {}
    situation_rows: set[tuple[int, int]] = set()
    pattern_rows: set[tuple[int, int]] = set()
    for place, (trajectory, _, _) in enumerate(kept):
        for state, action in dict.fromkeys((tuple(state.items()), action) for state, action in walk(trajectory)):
            for condition in situations_of(dict(state)):
                situation_rows.add((situation_ids.setdefault(condition, len(situation_ids)), place))
                pattern_rows.add((pattern_ids.setdefault((condition, action), len(pattern_ids)), place))

    def moments(rows: set[tuple[int, int]], size: int) -> list[Moments]:
        table = np.array(sorted(rows), dtype=np.int64).reshape(-1, 2)
        ids, members = table[:, 0], table[:, 1]
        columns = [
            np.bincount(ids, weights, size) for weights in (None, centred[members], scaled[members], scaled[members] ** 2)
        ]
        return [Moments(int(c), float(s), float(z), float(q)) for c, s, z, q in zip(*columns, strict=True)]

    situations = dict(zip(situation_ids, moments(situation_rows, len(situation_ids)), strict=True))
    actions = dict(zip(pattern_ids, moments(pattern_rows, len(pattern_ids)), strict=True))
    members: dict[int, list[int]] = {}
    for number, place in sorted(pattern_rows):
        members.setdefault(number, []).append(place)

    effects: dict[Condition, dict[str, Effect]] = {}
    for (condition, action), sums in actions.items():
        if action not in STRATEGIES or sums.count < min_support or situations[condition].count - sums.count < MIN_OTHERS:
            continue
        effect = _effect(actions, situations, condition, action, confidence)
        if effect is not None and effect.lift >= min_lift and effect.low > 0:
            effects.setdefault(condition, {})[action] = effect
    best = {c: min(found.items(), key=lambda item: (-item[1].low, item[0])) for c, found in effects.items()}

    mined = Mined((), actions, situations, confidence, {})
    chosen = _prune(best, mined)
    patterns: dict[str, Pattern] = {}
    for condition in chosen:
        action, effect = best[condition]
        taught = [kept[place][0] for place in members[pattern_ids[(condition, action)]]]
        pattern = Pattern(condition, action, effect, _provenance(taught, f"{seed}:{condition}:{action}"))
        twin = patterns.get(pattern.text)  # the same words for another tool: one item is enough
        if twin is None or effect.support > twin.effect.support:
            patterns[pattern.text] = pattern
    ordered = tuple(sorted(patterns.values(), key=lambda p: (-p.effect.lift, p.condition, p.action)))
    statistics |= {
        "situations": float(len(situations)),
        "patterns_seen": float(len(actions)),
        "patterns_significant": float(sum(len(found) for found in effects.values())),
        "patterns_kept": float(len(ordered)),
    }
    return Mined(ordered, actions, situations, confidence, statistics)


def _mixed_groups(trajectories: Sequence[Trajectory]) -> tuple[list[tuple[Trajectory, float, int]], dict[str, float]]:
    """(trajectory, centred reward, judged members of its group) of the mixed groups, and counts."""
    groups: dict[str, list[Trajectory]] = {}
    judged = 0
    for trajectory in sorted(trajectories, key=lambda t: t.id):
        group = groups.setdefault(trajectory.task_id, [])
        if trajectory.reward is not None:
            group.append(trajectory)
            judged += 1
    found = []
    mixed = 0
    for group in groups.values():
        rewards = [t.reward for t in group if t.reward is not None]
        mean = sum(rewards) / len(rewards) if rewards else 0.0
        if len(rewards) < 2 or not 0 < mean < 1:
            continue
        mixed += 1
        found += [(t, r - mean, len(rewards)) for t, r in zip(group, rewards, strict=True)]
    counts = {
        "trajectories": len(trajectories),
        "judged": judged,
        "not_judged": len(trajectories) - judged,
        "groups": len(groups),
        "mixed_groups": mixed,
        "mixed_trajectories": len(found),
    }
    return found, {name: float(value) for name, value in counts.items()}


def _prune(best: Mapping[Condition, tuple[str, Effect]], mined: Mined) -> list[Condition]:
    """Situations worth an item, general ones first."""
    ordered = sorted(best, key=lambda c: (len(c), c))
    chosen: list[Condition] = []
    for condition in ordered:
        action, effect = best[condition]
        special = [c for c in ordered if set(c) > set(condition)]
        if any(best[c][0] != action and mined.clearly_better(c, best[c][0], action) for c in special):
            continue
        general = [c for c in chosen if set(c) < set(condition)]
        # No general situation that stays is contradicted here (it would have gone), so only more lift can justify this one.
        if any(best[c][0] != action or effect.low <= best[c][1].lift for c in general):
            continue
        chosen.append(condition)
    return chosen


def _provenance(trajectories: Sequence[Trajectory], key: str) -> tuple[str, ...]:
    if len(trajectories) <= MAX_TRAJECTORY_IDS:
        return tuple(t.id for t in trajectories)
    successful = [t.id for t in trajectories if t.reward is not None and t.reward > 0.5]
    if len(successful) <= MAX_TRAJECTORY_IDS:
        return tuple(successful)
    return tuple(sorted(random.Random(key).sample(successful, MAX_TRAJECTORY_IDS)))


def reconcile(mined: Mined, pool: Pool) -> list[Proposal]:
    """What the new evidence changes in the pool. Items that it says nothing about stay: an internalized lesson leaves
    no contrast behind, and that does not refute it.

    - same situation, same action: ``update`` of the evidence (the text stays, the reason tells the old and new lift);
    - same situation, another action clearly better: ``delete`` and ``add``. An id means one lesson, so it is not rewritten;
    - a general item that a new special case clearly contradicts: ``delete``, and ``add`` of the special case;
    - an item whose lift is now clearly below zero: ``delete``;
    - everything else that is new: ``add``, strongest first, unless a general item already says the same, or an item that
      stands says otherwise about a situation that overlaps: some states would get two contrary pieces of advice, and a
      teacher that is told two things does worse than one that is told either.
    """
    proposals: list[Proposal] = []
    gone: set[str] = set()

    def delete(item: ExperienceItem, reason: str, trajectory_ids: tuple[str, ...] = ()) -> None:
        if item.id not in gone:
            gone.add(item.id)
            proposals.append(Proposal("delete", item_id=item.id, reason=reason, trajectory_ids=trajectory_ids))

    known = [
        (item, condition_of(item.condition), action)
        for item in pool.items
        if item.granularity == "principle" and item.condition and (action := action_of(item.text)) is not None
    ]
    for item, condition, action in known:
        effect = mined.effect(condition, action)
        if effect is not None and effect.high < 0 and min(effect.support, effect.others) >= MIN_OTHERS:
            delete(item, f"refuted: lift {_show(effect)}")
    # All contradictions first: an item that goes must not keep out the special cases that it covered until now.
    for pattern in mined.patterns:
        for item, condition, action in known:
            if action == pattern.action:
                continue
            if set(condition) <= set(pattern.condition):
                beaten = mined.clearly_better(pattern.condition, pattern.action, action)
            else:  # a special case of the pattern goes only if it was put to the test again, and lost
                special = set(condition) > set(pattern.condition)
                beaten = special and mined.clearly_better(condition, pattern.action, action, measured=True)
            if beaten:
                delete(item, f"contradicted by: {pattern.text} (lift {_show(pattern.effect)})", pattern.trajectory_ids)
    standing = [entry for entry in known if entry[0].id not in gone]
    held = [(condition, action) for _, condition, action in standing]
    for pattern in sorted(mined.patterns, key=lambda p: (-p.effect.low, p.condition)):
        effect, ids = pattern.effect, pattern.trajectory_ids
        same = next(
            (i for i, condition, action in standing if (condition, action) == (pattern.condition, pattern.action)), None
        )
        if same is not None:
            before = same.evidence.get("lift")
            was = f"; was {before:+.2f}" if before is not None else ""
            proposals.append(
                Proposal("update", item_id=same.id, text=same.text, evidence=effect.evidence(), trajectory_ids=ids,
                         reason=f"new evidence: lift {_show(effect)}{was}")
            )  # fmt: skip
            continue
        # Standing items with another action are not clearly worse here (they would be gone): they keep their place.
        if any(
            set(condition) <= set(pattern.condition) if action == pattern.action else compatible(condition, pattern.condition)
            for condition, action in held
        ):
            continue
        held.append((pattern.condition, pattern.action))
        proposals.append(
            Proposal("add", text=pattern.text, granularity="principle", condition=dict(pattern.condition),
                     evidence=effect.evidence(), trajectory_ids=ids, reason=f"lift {_show(effect)}")
        )  # fmt: skip
    return proposals


def compatible(a: Condition, b: Condition) -> bool:
    """Can a state meet both conditions?"""
    values = dict(a)
    return all(values.get(feature, value) == value for feature, value in b)


def subsumed(pool: Pool) -> list[Proposal]:
    """Merges of items into a more general one with the same advice that is not clearly weaker."""
    proposals = []
    known = [
        (i, set(i.condition.items()), action_of(i.text)) for i in pool.items if i.granularity == "principle" and i.condition
    ]
    for item, condition, action in known:
        general = [
            other
            for other, wider, advice in known
            if action is not None and advice == action and wider < condition
            and item.evidence.get("low", 0.0) <= other.evidence.get("lift", 0.0)
        ]  # fmt: skip
        if general:
            into = min(general, key=lambda other: (len(other.condition), other.id))
            proposals.append(
                Proposal("merge", item_id=item.id, into=into.id, reason=f"{into.id} gives the same advice more generally",
                         trajectory_ids=item.trajectory_ids)
            )  # fmt: skip
    return proposals


def _show(effect: Effect) -> str:
    return (
        f"{effect.lift:+.2f} ({effect.low:+.2f} to {effect.high:+.2f}), {effect.support} against {effect.others} trajectories"
    )
