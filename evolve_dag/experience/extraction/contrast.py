"""Contrast mining: which action separates success from failure in which situation (METHOD step 3, no LLM needed).

Only groups with mixed outcomes teach (different rewards); trajectories that were not judged are left out, they
are not failures. For a situation ``s`` and an action ``a``

    lift(s, a) = mean group-centred reward of the trajectories that show a in s
               - mean group-centred reward of the trajectories that show s, but never a in it

A trajectory counts once per pattern, however often it shows it. The interval is Welch's, two-sided at the configured
confidence. Rewards are centred by the mean of their own group, which makes the members of a group depend on each
other and shrinks the variance by (G-1)/G; the variances are scaled back by G/(G-1).

Where the environment says what could be done (:data:`~evolve_dag.protocols.CAN`), "never a in it" means that a was possible
there. Else what is possible in good places alone looks like a good action.

Per situation (:mod:`~evolve_dag.experience.extraction.situations`) the best action is kept (highest lower end). Then a general
situation goes when a special case of it clearly asks for something else, and a special case goes when it adds nothing to a
general one that stays.

Where it is asked for, situations also tell of what is longer ago. They are a family of their own for the rate of false
discoveries, so that what is significant without them is so with them. Of these only what can be said in a principle is asked,
and nothing twice: not what the same trajectories show as a more general situation.
"""

from __future__ import annotations

import math
import random
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from evolve_dag.experience.extraction.evidence import Effect, Evidence, Moments, discoveries, effect_of, welch
from evolve_dag.experience.extraction.seen import Seen
from evolve_dag.experience.extraction.situations import LATTICE, Condition, compatible, condition_of, described, entangled
from evolve_dag.experience.features import DID, OWN, choices, looks_back
from evolve_dag.experience.phrases import render, strategy
from evolve_dag.experience.pool import principle_problems
from evolve_dag.records import Trajectory

MIN_OTHERS = 5
"""Trajectories that must stand on either side of a comparison: fewer are no contrast."""

MAX_TRAJECTORY_IDS = 50
"""Provenance kept per pattern."""


@dataclass(frozen=True, slots=True)
class Pattern:
    """A situation with the action that pays there."""

    condition: Condition
    action: str
    effect: Effect
    trajectory_ids: tuple[str, ...]
    """All supporting trajectories; beyond 50, 50 drawn (seeded) from those that did better than their group."""

    @property
    def text(self) -> str:
        return render(dict(self.condition), self.action)


class Mined:
    """The result of one mining: the kept patterns, and the evidence to ask about any other."""

    def __init__(
        self,
        patterns: tuple[Pattern, ...],
        evidence: Evidence,
        confidence: float,
        statistics: Mapping[str, float],
        seen: Seen,
    ) -> None:
        self.seen = seen
        """What the trajectories of this night show."""
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
        return effect_of(self.evidence, condition, action, self._level(among))

    def _level(self, among: int) -> float:
        return 1 - (1 - self._confidence) / max(1, among)

    def meet(self, a: Condition, b: Condition) -> bool:
        """Whether a state can meet both conditions. Which features of an environment exclude each other is not known here: what
        was never seen together, tonight or before, does not meet."""
        both = condition_of(dict((*a, *b)))
        if not compatible(a, b) or not described(both):
            return compatible(a, b)
        return both in self.evidence.situations or any(state.issuperset(both) for state in self.seen.states)

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
        return welch(a, b, self.evidence.situations[condition].variance, self._level(among))[1] > 0


def mine(
    trajectories: Sequence[Trajectory],
    *,
    min_support: int = 10,
    min_lift: float = 0.05,
    confidence: float = 0.95,
    seed: int = 0,
    before: Evidence | None = None,
    history: bool = False,
) -> Mined:
    """Mine ``trajectories`` (any order: the result does not depend on it).

    Args:
        before: evidence of earlier iterations, faded; what nobody did in ``trajectories`` is not found from it alone.
        min_support: trajectories that must show a pattern.
        min_lift: least lift.
        confidence: 1 less the share of false ones that is expected at most among what one-sided tests find
            (:func:`~evolve_dag.experience.extraction.evidence.discoveries`). Also the level of the two-sided intervals, which
            may just include zero where more than half of what is tested is found.
        seed: decides which 50 trajectories stand for a pattern that has more.
        history: situations may tell of what is longer ago (:func:`~evolve_dag.experience.extraction.situations.grown`).
    """
    import numpy as np

    judged, statistics = _centred(trajectories)
    rewards = [t.reward or 0.0 for t, _, _ in judged]
    centred = np.array([c for _, c, _ in judged])
    mixed = [size > 0 for _, _, size in judged]
    scaled = np.array([c * math.sqrt(size / (size - 1)) if size else 0.0 for _, c, size in judged])
    seen = Seen([choices(trajectory, history=history) for trajectory, _, _ in judged], mixed)
    night = seen.evidence(centred, scaled)
    evidence = night if before is None else night + before
    tested: dict[tuple[Condition, str], Effect] = {}
    effects: dict[Condition, dict[str, Effect]] = {}
    refused: list[tuple[Condition, str]] = []
    for condition, action in night.actions:
        support, others = evidence.actions[condition, action].count, evidence.others(condition, action).count
        if strategy(action) is None or support < min_support or others < MIN_OTHERS:
            continue
        if looks_back(dict(condition)) and (
            seen.copies(condition, action) or principle_problems(render(dict(condition), action))
        ):
            continue
        effect = effect_of(evidence, condition, action, confidence)
        if effect is not None:
            tested[condition, action] = effect
    for (condition, action), effect in _found(tested, 1 - confidence).items():
        if effect.lift < min_lift:
            continue
        shown, able, named = seen.shown[action], seen.able.get(action, {}), _unsaid(condition, action, seen.own)
        if fails_in(condition, shown, able, rewards, confidence, named) or untried_in(condition, shown, able, named):
            refused.append((condition, action))
            continue
        for said in seen.said(condition, action, named) if named else [condition]:
            own = effect_of(evidence, said, action, confidence)
            if own is None or own.high >= 0:
                effects.setdefault(said, {}).setdefault(action, effect)
    best = {c: min(found.items(), key=lambda item: (-item[1].low, item[0])) for c, found in effects.items()}

    mined = Mined((), evidence, confidence, {}, seen)
    chosen = seen.distinct(_agreeing([(condition, *best[condition]) for condition in _prune(best, mined)], mined))
    patterns: dict[str, Pattern] = {}
    for condition, action in chosen:
        effect = best[condition][1]
        taught = [judged[place][:2] for place in sorted(seen.actions[condition, action])]
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
    return Mined(ordered, evidence, confidence, statistics, seen)


def _found(tested: Mapping[tuple[Condition, str], Effect], rate: float) -> dict[tuple[Condition, str], Effect]:
    """Discoveries at ``rate`` among the situations that tell of what is longer ago, and among the others."""
    back = {key: effect for key, effect in tested.items() if looks_back(dict(key[0]))}
    plain = {key: effect for key, effect in tested.items() if key not in back}
    return discoveries(plain, rate) | discoveries(back, rate)


def _unsaid(condition: Condition, action: str, own: Collection[str]) -> frozenset[str]:
    """Features of the environment that ``action`` speaks of and ``condition`` leaves open: whoever is told to go onward must be
    told where onward is."""
    if not action.startswith(f"{DID}:"):
        return frozenset()
    words, given = f" {action.removeprefix(f'{DID}:')} ", {feature for feature, _ in condition}
    return frozenset(one for one in own if one not in given and f" {one.removeprefix(OWN)} " in words)


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
        named: features that will be told by value, each judged by itself.
    """
    inside = [state for state in able if set(condition) <= set(state)]
    atoms = {atom for state in inside for atom in set(state) - set(condition) if _splits(atom[0], named)}
    for atom in sorted(atoms):
        part, rest = [state for state in inside if atom in state], [state for state in inside if atom not in state]
        tried, could = _count(shown, part), _count(able, part)
        tried_rest, could_rest = _count(shown, rest), _count(able, rest)
        if min(could, could_rest) >= MIN_OTHERS and tried * could_rest < TRIED * tried_rest * could:
            return atom
    return None


def _count(rows: Mapping[Condition, set[int]], states: Sequence[Condition]) -> int:
    """Trajectories that stand in one of the states at least."""
    return len(set().union(*(rows.get(state, ()) for state in states)))


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
        if min(part.count, rest.count) >= MIN_OTHERS and welch(rest, part, spread, confidence)[1] > 0:
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
        if described(condition) and _keeps_clear(condition, special, best, mined):
            continue
        general = [c for c in chosen if set(c) < set(condition)]
        # No general situation that stays is contradicted here (it would have gone), so only more lift can justify this one.
        if any(best[c][0] != action or effect.low <= best[c][1].lift for c in general):
            continue
        chosen.append(condition)
    return chosen


def _keeps_clear(
    condition: Condition, special: Sequence[Condition], best: Mapping[Condition, tuple[str, Effect]], mined: Mined
) -> bool:
    """Whether better advice reaches into ``condition``, and one of its ``special`` cases that says the same keeps clear of it:
    that case is worth more than the whole, which could not stand beside the better advice."""
    action, effect = best[condition]
    better = [c for c, (a, e) in best.items() if a != action and e.low > effect.low and mined.meet(c, condition)]
    same = [c for c in special if best[c][0] == action]
    return bool(better) and any(not any(mined.meet(c, other) for other in better) for c in same)


def _agreeing(patterns: Sequence[tuple[Condition, str, Effect]], mined: Mined) -> list[tuple[Condition, str]]:
    """Of what goes together with much else: the strongest first, and none that says otherwise where a stronger one holds."""
    kept: list[tuple[Condition, str]] = []
    for condition, action, _ in sorted(patterns, key=lambda p: -p[2].low):
        others = [c for c, a in kept if a != action and (entangled(c) or entangled(condition))]
        if not any(mined.meet(c, condition) for c in others):
            kept.append((condition, action))
    return [(condition, action) for condition, action, _ in patterns if (condition, action) in kept]


def _provenance(taught: Sequence[tuple[Trajectory, float]], key: str) -> tuple[str, ...]:
    """Of trajectories with their centred rewards; beyond 50, of those that did better than their group."""
    if len(taught) <= MAX_TRAJECTORY_IDS:
        return tuple(trajectory.id for trajectory, _ in taught)
    better = [trajectory.id for trajectory, centred in taught if centred > 0]
    if len(better) <= MAX_TRAJECTORY_IDS:
        return tuple(better)
    return tuple(sorted(random.Random(key).sample(better, MAX_TRAJECTORY_IDS)))
