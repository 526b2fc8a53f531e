"""Contrast mining: which action separates success from failure in which situation (METHOD step 3, no LLM needed).

Only groups with mixed outcomes teach (different rewards); trajectories that were not judged are left out, they
are not failures. For a situation ``s`` and an action ``a``

    lift(s, a) = mean group-centred reward of the trajectories that show a in s
               - mean group-centred reward of the trajectories that show s, but never a in it

A trajectory counts once per pattern, however often it shows it. The interval is Welch's, two-sided at the configured
confidence. Rewards are centred by the mean of their own group, which makes the members of a group depend on each
other and shrinks the variance by (G-1)/G; the variances are scaled back by G/(G-1).

Situations are conjunctions from a lattice: the base (kind of observation; for a page with ``evidence``, and where the asked
value is shown with its ``mark``, so the lattice grows with what pages say) alone, or with one or two of
``listed``/``shared_name``, ``evidence``, ``repeat`` and what the environment says itself (``env:...``). Per situation the best
action is kept (highest lower end). Then a general situation goes when a special case of it clearly asks for something else,
and a special case goes when it adds nothing to a general one that stays.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING, TypeVar

from evolve_dag.errors import DataError
from evolve_dag.experience.features import DID, FEATURES, OWN, Choice, choices
from evolve_dag.experience.phrases import action_of, render, strategy
from evolve_dag.experience.pool import Pool, Proposal
from evolve_dag.records import ExperienceItem, Trajectory

if TYPE_CHECKING:
    import numpy as np

Key = TypeVar("Key")
Condition = tuple[tuple[str, str], ...]
"""(feature, value) pairs in the order of ``features.FEATURES``: a hashable conjunction."""

MIN_OTHERS = 5
"""Trajectories that must stand on either side of a comparison: fewer are no contrast."""

LATTICE = ("listed", "shared_name", "evidence", "mark", "repeat")
"""Features that situations are told apart by, beside the kind of observation."""

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

        return Evidence(kept, left(self.actions), left(self.barred))

    def __add__(self, other: Evidence) -> Evidence:
        return Evidence(
            _summed(self.situations, other.situations),
            _summed(self.actions, other.actions),
            _summed(self.barred, other.barred),
        )

    def to_json(self) -> str:
        """Rows of condition, action or null, and the four sums."""
        rows: list[list[object]] = [[c, None, *_sums(m)] for c, m in self.situations.items()]
        rows += [[c, action, *_sums(m)] for (c, action), m in self.actions.items()]
        whole: dict[str, object] = {"format": 1, "rows": rows}
        if self.barred:
            whole["barred"] = [[c, action, *_sums(m)] for (c, action), m in self.barred.items()]
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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"evidence of an experience pool: {error}", "materialize experience anew") from error
        situations = {condition: sums for condition, action, sums in rows if action is None}
        return cls(situations, {(c, str(action)): sums for c, action, sums in rows if action is not None}, barred)


def _condition(pairs: Sequence[Sequence[object]]) -> Condition:
    return tuple((str(feature), str(value)) for feature, value in pairs)


LEAST_COUNT = 0.05
"""Faded trajectories below which a sum is dropped."""


def _summed(a: Mapping[Key, Moments], b: Mapping[Key, Moments]) -> dict[Key, Moments]:
    return {key: a[key] + b[key] if key in a and key in b else a.get(key) or b[key] for key in dict.fromkeys([*a, *b])}


def _sums(moments: Moments) -> list[float]:
    return [round(value, 6) for value in (moments.count, moments.centred, moments.scaled, moments.squares)]


class Mined:
    """The result of one mining: the kept patterns, and the evidence to ask about any other."""

    def __init__(
        self,
        patterns: tuple[Pattern, ...],
        evidence: Evidence,
        confidence: float,
        statistics: Mapping[str, float],
        states: Collection[Condition] = (),
    ) -> None:
        self.states = states
        """All states that were seen, with every feature."""
        self.evidence = evidence
        """All that the patterns rest on, of this night and of the nights before."""
        self.patterns = patterns
        """Kept patterns, highest lift first."""
        self.statistics = statistics
        """Counts of what was read, left out and found."""
        self._confidence = confidence

    def effect(self, condition: Condition, action: str, among: int = 1) -> Effect | None:
        """Evidence for one pattern; None without two trajectories on either side.

        Args:
            among: questions that are asked at once; the interval holds for all of them together (Bonferroni).
        """
        return _effect(self.evidence, condition, action, self._level(among))

    def _level(self, among: int) -> float:
        return 1 - (1 - self._confidence) / max(1, among)

    def meet(self, a: Condition, b: Condition) -> bool:
        """Whether a state can meet both conditions. Which features of an environment exclude each other is not known here: what
        was never seen together does not meet."""
        both = set(a) | set(b)
        return compatible(a, b) and (
            ("observation", "described") not in both or any(both <= set(state) for state in self.states)
        )

    def clearly_better(self, condition: Condition, better: str, worse: str, *, measured: bool = False, among: int = 1) -> bool:
        """Whether ``better`` beats ``worse`` in the situation at the configured confidence, ``among`` as in :meth:`effect`.

        When (almost) nobody did ``worse`` there, its advice has no ground in this situation: true, unless the
        comparison must be ``measured``.
        """
        a, b = self.evidence.actions.get((condition, better)), self.evidence.actions.get((condition, worse))
        if a is None or (measured and a.count < MIN_OTHERS):
            return False
        if b is None or b.count < MIN_OTHERS:
            return not measured
        return _welch(a, b, self.evidence.situations[condition].variance, self._level(among))[1] > 0


def condition_of(mapping: Mapping[str, str]) -> Condition:
    """A condition as a sorted tuple, so that equal conditions are equal keys."""
    order = {name: place for place, name in enumerate(FEATURES)}
    return tuple(sorted(mapping.items(), key=lambda pair: (order.get(pair[0], len(order)), pair[0])))


def situations_of(state: Mapping[str, str]) -> Iterator[Condition]:
    """Every situation of the lattice that holds in ``state``, the most general first."""
    for condition in _lattice(state):
        # That something was answered is no situation: what the environment says of it is never left open altogether.
        if state["observation"] != "described" or any(name.startswith(OWN) for name, _ in condition):
            yield condition


def _lattice(state: Mapping[str, str]) -> Iterator[Condition]:
    base = {"observation": state["observation"]}
    if state["observation"] == "page":
        # What a page shows of the question is never left open: advice for any page would also hold under a mark that no one
        # has understood yet.
        base |= {"evidence": state["evidence"]} | ({"mark": state["mark"]} if state["evidence"] == "asked" else {})
    options: list[list[dict[str, str]]] = []
    if state["observation"] == "listing":
        if state["listed"] == "one":
            options.append([{"listed": "one"}])
        else:
            options.append([{"listed": "several"}, {"listed": "several", "shared_name": state["shared_name"]}])
    options += [[{name: value}] for name, value in state.items() if name.startswith(OWN)]
    if state["observation"] == "listing":
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


def _welch(a: Moments, b: Moments, spread: float, confidence: float) -> tuple[float, float, float, float]:
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


def discoveries(tested: Mapping[tuple[Condition, str], Effect], rate: float) -> dict[tuple[Condition, str], Effect]:
    """Of all patterns that were tested, those with an effect above 0, at an expected share of false ones of ``rate``.

    Source: Benjamini and Hochberg, "Controlling the False Discovery Rate", JRSS B 57 (1995), the step-up procedure; it holds
    for the positive dependence of situations that contain each other (Benjamini and Yekutieli 2001).
    """
    ranked = sorted(tested.items(), key=lambda entry: (entry[1].p, entry[0]))
    last = max((place for place, (_, e) in enumerate(ranked, 1) if e.p <= rate * place / len(ranked)), default=0)
    return dict(ranked[:last])


def _effect(evidence: Evidence, condition: Condition, action: str, confidence: float) -> Effect | None:
    a = evidence.actions.get((condition, action))
    if a is None or a.count < 2:
        return None
    b = evidence.others(condition, action)
    if b.count < 2:
        return None
    return Effect(round(a.count), round(b.count), *_welch(a, b, evidence.free(condition, action).variance, confidence))


def mine(
    trajectories: Sequence[Trajectory],
    *,
    min_support: int = 10,
    min_lift: float = 0.05,
    confidence: float = 0.95,
    seed: int = 0,
    before: Evidence | None = None,
) -> Mined:
    """Mine ``trajectories`` (any order: the result does not depend on it).

    Args:
        before: evidence of earlier iterations, faded; what nobody did in ``trajectories`` is not found from it alone.
        min_support: trajectories that must show a pattern.
        min_lift: least lift.
        confidence: level of the interval whose lower end must be above zero.
        seed: decides which 50 trajectories stand for a pattern that has more.
    """
    import numpy as np

    judged, statistics = _centred(trajectories)
    rewards = [t.reward or 0.0 for t, _, _ in judged]
    centred = np.array([c for _, c, _ in judged])
    mixed = [size > 0 for _, _, size in judged]
    scaled = np.array([c * math.sqrt(size / (size - 1)) if size else 0.0 for _, c, size in judged])
    seen = _Seen([choices(trajectory) for trajectory, _, _ in judged], mixed)
    night = seen.evidence(centred, scaled)
    evidence = night if before is None else night + before
    tested: dict[tuple[Condition, str], Effect] = {}
    effects: dict[Condition, dict[str, Effect]] = {}
    refused: list[tuple[Condition, str]] = []
    for condition, action in night.actions:
        support, others = evidence.actions[condition, action].count, evidence.others(condition, action).count
        if strategy(action) is None or support < min_support or others < MIN_OTHERS:
            continue
        effect = _effect(evidence, condition, action, confidence)
        if effect is not None:
            tested[condition, action] = effect
    for (condition, action), effect in discoveries(tested, 1 - confidence).items():
        if effect.lift < min_lift:
            continue
        shown, able, named = seen.shown[action], seen.able.get(action, {}), _unsaid(condition, action, seen.own)
        if fails_in(condition, shown, able, rewards, confidence, named) or untried_in(condition, shown, able, named):
            refused.append((condition, action))
            continue
        for said in seen.said(condition, action, named) if named else [condition]:
            own = _effect(evidence, said, action, confidence)
            if own is None or own.high >= 0:
                effects.setdefault(said, {}).setdefault(action, effect)
    best = {c: min(found.items(), key=lambda item: (-item[1].low, item[0])) for c, found in effects.items()}

    mined = Mined((), evidence, confidence, {}, seen.states)
    chosen = seen.distinct(_agreeing([(condition, *best[condition]) for condition in _prune(best, mined)], mined))
    patterns: dict[str, Pattern] = {}
    for condition, action in chosen:
        effect = best[condition][1]
        taught = [judged[place][0] for place in sorted(seen.actions[condition, action])]
        pattern = Pattern(condition, action, effect, _provenance(taught, f"{seed}:{condition}:{action}"))
        twin = patterns.get(pattern.text)  # the same words for another tool: one item is enough
        if twin is None or effect.support > twin.effect.support:
            patterns[pattern.text] = pattern
    ordered = tuple(sorted(patterns.values(), key=lambda p: (-p.effect.lift, p.condition, p.action)))
    statistics |= {
        "situations": float(len(evidence.situations)),
        "patterns_seen": float(len(evidence.actions)),
        "patterns_tested": float(len(tested)),
        "patterns_significant": float(sum(len(found) for found in effects.values())),
        "patterns_too_general": float(len(refused)),
        "patterns_kept": float(len(ordered)),
    }
    return Mined(ordered, evidence, confidence, statistics, seen.states)


class _Seen:
    """What the judged trajectories of a night show; one counts once, however often it shows it.

    Args:
        taken: of each of them the steps where there was a choice.
        mixed: whether its group has mixed outcomes.
    """

    def __init__(self, taken: Sequence[Sequence[Choice]], mixed: Sequence[bool]) -> None:
        self.situations: dict[Condition, set[int]] = {}
        """Places of the trajectories of mixed groups that show a situation."""
        self.actions: dict[tuple[Condition, str], set[int]] = {}
        """Of those that show an action in it."""
        self.barred: dict[tuple[Condition, str], set[int]] = {}
        """Of those that never could do it in it."""
        self.shown: dict[str, dict[Condition, set[int]]] = {}
        """Action -> state -> places of all trajectories that show it there."""
        self.able: dict[str, dict[Condition, set[int]]] = {}
        """The same of those that could have shown it, where the environment says so."""
        self.own = {name for own in taken for choice in own for name in choice.state if name.startswith(OWN)}
        """Features that the environment gave."""
        self.states = {tuple(choice.state.items()) for own in taken for choice in own}
        self._told = sorted({c.action for own in taken for c in own if c.action.startswith(f"{DID}:")})
        for place, own in enumerate(taken):
            self._read(place, own, mixed[place])

    def _read(self, place: int, taken: Sequence[Choice], mixed: bool) -> None:
        can: dict[Condition, set[str]] = {}
        for state, action, possible in dict.fromkeys((tuple(c.state.items()), c.action, c.possible) for c in taken):
            self.shown.setdefault(action, {}).setdefault(state, set()).add(place)
            for one in possible or ():
                self.able.setdefault(one, {}).setdefault(state, set()).add(place)
            if not mixed:
                continue
            for condition in situations_of(dict(state)):
                self.situations.setdefault(condition, set()).add(place)
                self.actions.setdefault((condition, action), set()).add(place)
                can.setdefault(condition, set()).update((action,), self._told if possible is None else possible)
        for condition, able in can.items():
            for action in self._told:
                if action not in able:
                    self.barred.setdefault((condition, action), set()).add(place)

    def said(self, condition: Condition, action: str, named: frozenset[str]) -> list[Condition]:
        """``condition`` with every value of the features ``named`` that the action was taken at: the evidence of all of them
        together speaks for each, since what the action does is the same."""
        given = {feature for feature, _ in condition}
        cases = (c for c, done in self.actions if done == action and set(condition) < set(c))
        return [c for c in cases if {feature for feature, _ in c} == given | named]

    def distinct(self, patterns: Sequence[tuple[Condition, str]]) -> list[tuple[Condition, str]]:
        """Of ``patterns`` those that say something of their own. Where an environment describes itself, features go together
        (who has cooked nothing holds no meal), so the same advice about the same moments comes in several words: the one that
        most show stays."""
        kept: dict[tuple[Condition, str], set[tuple[Condition, int]]] = {}
        for condition, action in sorted(patterns, key=lambda p: -len(self.actions[p])):
            steps = {
                (state, at) for state, places in self.shown[action].items() if set(condition) <= set(state) for at in places
            }
            told = set().union(*(those for (_, other), those in kept.items() if other == action))
            if not _described(condition) or len(steps & told) < COVERED * len(steps):
                kept[condition, action] = steps
        return [pattern for pattern in patterns if pattern in kept]

    def evidence(self, centred: np.ndarray, scaled: np.ndarray) -> Evidence:
        """The sums. ``centred`` and ``scaled``: rewards of the trajectories, see :class:`Moments`."""
        return Evidence(*(_moments(rows, centred, scaled) for rows in (self.situations, self.actions, self.barred)))


def _moments(rows: Mapping[Key, set[int]], centred: np.ndarray, scaled: np.ndarray) -> dict[Key, Moments]:
    import numpy as np

    table = np.array(
        [(number, place) for number, places in enumerate(rows.values()) for place in sorted(places)], dtype=np.int64
    ).reshape(-1, 2)
    ids, members = table[:, 0], table[:, 1]
    columns = [
        np.bincount(ids, weights, len(rows)) for weights in (None, centred[members], scaled[members], scaled[members] ** 2)
    ]
    sums = (Moments(int(c), float(s), float(z), float(q)) for c, s, z, q in zip(*columns, strict=True))
    return dict(zip(rows, sums, strict=True))


def _unsaid(condition: Condition, action: str, own: Collection[str]) -> frozenset[str]:
    """Features of the environment that ``action`` speaks of and ``condition`` leaves open: whoever is told to go onward must be
    told where onward is."""
    if not action.startswith(f"{DID}:"):
        return frozenset()
    words, given = f" {action.removeprefix(f'{DID}:')} ", {feature for feature, _ in condition}
    return frozenset(one for one in own if one not in given and f" {one.removeprefix(OWN)} " in words)


COVERED = 0.9
"""Share of a pattern's moments to which others that stay give the same advice, from which on it says nothing new."""
TRIED = 0.25
"""Share of how often an action is taken elsewhere in a situation below which a part of it counts as one where nobody tried."""


def _splits(feature: str, named: Collection[str]) -> bool:
    return (feature in LATTICE or feature.startswith(OWN)) and feature not in named


def untried_in(
    condition: Condition,
    shown: Mapping[Condition, set[int]],
    able: Mapping[Condition, set[int]],
    named: Collection[str] = (),
) -> tuple[str, str] | None:
    """A feature value that splits off a part of ``condition`` in which hardly anybody who could take an action took it, since
    better is to be done there; or None. What is said of the whole rests on the rest alone (no overlap, no contrast), and as
    advice for this part it would do harm: who stands before the coin need not go on.

    Args:
        shown: state -> places of the trajectories that show the action in it.
        able: the same of those that could have shown it; empty where the environment does not say.
    """
    inside = [state for state in able if set(condition) <= set(state)]
    atoms = {atom for state in inside for atom in set(state) - set(condition) if _splits(atom[0], named)}
    for atom in sorted(atoms):
        (tried, could), (tried_rest, could_rest) = (
            [
                len(set().union(*(rows.get(state, set()) for state in inside if (atom in state) is part)))
                for rows in (shown, able)
            ]
            for part in (True, False)
        )
        if min(could, could_rest) >= MIN_OTHERS and tried * could_rest < TRIED * tried_rest * could:
            return atom
    return None


def fails_in(
    condition: Condition,
    shown: Mapping[Condition, set[int]],
    able: Mapping[Condition, set[int]],
    rewards: Sequence[float],
    confidence: float,
    named: Collection[str] = (),
) -> tuple[str, str] | None:
    """A feature value that splits off a part of ``condition`` in which an action succeeds clearly less often than in the
    rest of it, or None.

    Contrast alone cannot see it. Where the action never pays, no group has mixed outcomes, so that part has no voice in the
    lift of the whole; and a policy that was taught the general advice no longer tries what would pay there. So all judged
    trajectories are asked here, not only those of mixed groups. Where it is known who could have acted so and did not, and they
    did worse still, that part is hard and the advice is not to blame.

    Args:
        shown: state -> places of the judged trajectories that show the action in it.
        able: the same of those that could have shown it; empty where the environment does not say.
        named: features that will be told by value, each judged by itself.
        rewards: of the judged trajectories, 0..1.
    """
    matching = {state: places for state, places in shown.items() if set(condition) <= set(state)}
    whole = frozenset().union(*matching.values())
    splits: dict[tuple[str, str], set[int]] = {}
    for state, places in matching.items():
        for atom in set(state) - set(condition):
            if _splits(atom[0], named):
                splits.setdefault(atom, set()).update(places)
    for atom, places in sorted(splits.items()):
        part, rest = (_plain([rewards[place] for place in some]) for some in (places, whole - places))
        spread = _plain([rewards[place] for place in whole]).variance
        if min(part.count, rest.count) >= MIN_OTHERS and _welch(rest, part, spread, confidence)[1] > 0:
            left = set().union(*(rows for state, rows in able.items() if {*condition, atom} <= set(state))) - places
            if not left or part.mean <= _plain([rewards[place] for place in left]).mean:
                return atom
    return None


def _plain(values: Sequence[float]) -> Moments:
    return Moments(len(values), sum(values), sum(values), sum(v * v for v in values))


def _centred(trajectories: Sequence[Trajectory]) -> tuple[list[tuple[Trajectory, float, int]], dict[str, float]]:
    """(trajectory, centred reward, judged members of its group) of all that were judged, and counts. A group without mixed
    outcomes has no contrast: its members count as 0."""
    groups: dict[str, list[tuple[Trajectory, float]]] = {}
    for trajectory in sorted(trajectories, key=lambda t: t.id):
        group = groups.setdefault(trajectory.task_id, [])
        if trajectory.reward is not None:
            group.append((trajectory, trajectory.reward))
    found: list[tuple[Trajectory, float, int]] = []
    mixed = members = 0
    for group in groups.values():
        mean = sum(reward for _, reward in group) / len(group) if group else 0.0
        size = len(group) if len({reward for _, reward in group}) > 1 else 0
        mixed += size > 0
        members += size
        found += [(t, reward - mean if size else 0.0, size) for t, reward in group]
    counts = {
        "trajectories": len(trajectories),
        "judged": len(found),
        "not_judged": len(trajectories) - len(found),
        "groups": len(groups),
        "mixed_groups": mixed,
        "mixed_trajectories": members,
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
        # Better advice reaches into this situation: a part of it that keeps clear of that is worth more than nothing.
        better = [c for c in ordered if best[c][0] != action and best[c][1].low > effect.low and mined.meet(c, condition)]
        if _described(condition) and better:
            clear = [c for c in special if best[c][0] == action and not any(mined.meet(c, other) for other in better)]
            if clear:
                continue
        general = [c for c in chosen if set(c) < set(condition)]
        # No general situation that stays is contradicted here (it would have gone), so only more lift can justify this one.
        if any(best[c][0] != action or effect.low <= best[c][1].lift for c in general):
            continue
        chosen.append(condition)
    return chosen


def _agreeing(patterns: Sequence[tuple[Condition, str, Effect]], mined: Mined) -> list[tuple[Condition, str]]:
    """Of what an environment says itself: the strongest first, and none that says otherwise where a stronger one holds."""
    kept: list[tuple[Condition, str]] = []
    for condition, action, _ in sorted(patterns, key=lambda p: -p[2].low):
        if not _described(condition) or all(a == action or not mined.meet(c, condition) for c, a in kept):
            kept.append((condition, action))
    return [(condition, action) for condition, action, _ in patterns if (condition, action) in kept]


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

    An item that was withdrawn is no longer advice: it keeps nothing out but what says the same about the same situation.
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
    withdrawn = {(condition, action) for item, condition, action in known if item.withdrawn}
    known = [entry for entry in known if not entry[0].withdrawn]
    # Every night asks every item again: without a level for all of them together, a good one would fall sooner or later.
    for item, condition, action in known:
        effect = mined.effect(condition, action, among=len(known))
        if effect is not None and effect.high < 0 and min(effect.support, effect.others) >= MIN_OTHERS:
            delete(item, f"refuted: lift {_show(effect)}")
    # All contradictions first: an item that goes must not keep out the special cases that it covered until now.
    for pattern in mined.patterns:
        for item, condition, action in known:
            if action == pattern.action:
                continue
            if set(condition) <= set(pattern.condition):
                beaten = mined.clearly_better(pattern.condition, pattern.action, action, among=len(known))
            else:  # a special case of the pattern goes only if it was put to the test again, and lost
                special = set(condition) > set(pattern.condition)
                beaten = special and mined.clearly_better(condition, pattern.action, action, measured=True, among=len(known))
            if beaten:
                delete(item, f"contradicted by: {pattern.text} (lift {_show(pattern.effect)})", pattern.trajectory_ids)
    standing = [entry for entry in known if entry[0].id not in gone]
    held = [(condition, action) for _, condition, action in standing]
    for pattern in sorted(mined.patterns, key=lambda p: (-p.effect.low, p.condition)):
        if (pattern.condition, pattern.action) in withdrawn:
            continue
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
            set(condition) <= set(pattern.condition) if action == pattern.action else mined.meet(condition, pattern.condition)
            for condition, action in held
        ):
            continue
        held.append((pattern.condition, pattern.action))
        proposals.append(
            Proposal("add", text=pattern.text, granularity="principle", condition=dict(pattern.condition),
                     evidence=effect.evidence(), trajectory_ids=ids, reason=f"lift {_show(effect)}")
        )  # fmt: skip
    return proposals


def _described(condition: Condition) -> bool:
    """Whether it speaks of what an environment says itself."""
    return ("observation", "described") in condition


def compatible(a: Condition, b: Condition) -> bool:
    """Can a state meet both conditions?"""
    values = dict(a)
    return all(values.get(feature, value) == value for feature, value in b)


def subsumed(pool: Pool) -> list[Proposal]:
    """Merges of items into a more general one with the same advice that is not clearly weaker."""
    proposals = []
    known = [
        (i, set(i.condition.items()), action_of(i.text))
        for i in pool.items
        if i.granularity == "principle" and i.condition and not i.withdrawn
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
