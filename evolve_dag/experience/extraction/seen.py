"""What the trajectories of a night show, counted."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from evolve_dag.experience.extraction.evidence import Evidence, Key, Moments
from evolve_dag.experience.extraction.situations import Condition, entangled, grown, situations_of
from evolve_dag.experience.features import DID, OWN, Choice

if TYPE_CHECKING:
    import numpy as np


COVERED = 0.9
"""Share of a pattern's moments to which others that stay give the same advice, from which on it says nothing new."""


class Seen:
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
        self.told: dict[Condition, set[int]] = {}
        """Of those that were always told in it what could be done."""
        self.shown: dict[str, dict[Condition, set[int]]] = {}
        """Action -> state -> places of all trajectories that show it there."""
        self.able: dict[str, dict[Condition, set[int]]] = {}
        """The same of those that could have shown it, where the environment says so."""
        self.own = {name for own in taken for choice in own for name in choice.state if name.startswith(OWN)}
        """Features that the environment gave."""
        self.states = {frozenset(choice.state.items()) for own in taken for choice in own}
        """Every state, with all features."""
        named = {action for own in taken for choice in own for action in (choice.action, *(choice.possible or ()))}
        self._named = sorted(action for action in named if action.startswith(f"{DID}:"))
        for place, own in enumerate(taken):
            self._read(place, own, mixed[place])

    def _read(self, place: int, taken: Sequence[Choice], mixed: bool) -> None:
        can: dict[Condition, set[str]] = {}
        unsure: set[Condition] = set()
        for state, action, possible in dict.fromkeys((tuple(c.state.items()), c.action, c.possible) for c in taken):
            self.shown.setdefault(action, {}).setdefault(state, set()).add(place)
            for one in possible or ():
                self.able.setdefault(one, {}).setdefault(state, set()).add(place)
            if not mixed:
                continue
            for condition in (*situations_of(dict(state)), *grown(dict(state))):
                self.situations.setdefault(condition, set()).add(place)
                self.actions.setdefault((condition, action), set()).add(place)
                can.setdefault(condition, set()).update((action,), possible or ())
                if possible is None:
                    unsure.add(condition)
        for condition, able in can.items():
            if condition in unsure:
                continue
            self.told.setdefault(condition, set()).add(place)
            for action in self._named:
                if action not in able:
                    self.barred.setdefault((condition, action), set()).add(place)

    def copies(self, condition: Condition, action: str) -> bool:
        """Whether tonight a more general situation is shown by the same trajectories, and so is the action in it."""
        stand, act = self.situations[condition], self.actions[condition, action]
        return any(
            self.situations[wider] == stand and self.actions.get((wider, action)) == act for wider in self._wider(condition)
        )

    def _wider(self, condition: Condition) -> Iterator[Condition]:
        """The situations that leave one more thing open."""
        for place in range(len(condition)):
            wider = (*condition[:place], *condition[place + 1 :])
            if wider in self.situations:
                yield wider

    def said(self, condition: Condition, action: str, named: frozenset[str]) -> list[Condition]:
        """``condition`` with every value of the features ``named`` that the action was taken at: the evidence of all of them
        together speaks for each, since what the action does is the same."""
        given = {feature for feature, _ in condition}
        cases = (c for c, done in self.actions if done == action and set(condition) < set(c))
        return [c for c in cases if {feature for feature, _ in c} == given | named]

    def moments(self, condition: Condition, action: str) -> set[tuple[Condition, int]]:
        """(state, place of the trajectory) wherever the action was taken in the situation."""
        states = self.shown.get(action, {})
        return {(state, at) for state, places in states.items() if set(condition) <= set(state) for at in places}

    def repeats(self, pattern: tuple[Condition, str], others: Collection[tuple[Condition, str]]) -> bool:
        """Whether ``others`` say the same already. Where an environment describes itself, features go together (who has cooked
        nothing holds no meal), and so they do with what is longer ago: the same advice about the same moments comes in several
        words."""
        condition, action = pattern
        if not entangled(condition):
            return False
        own = self.moments(condition, action)
        told = set().union(*(self.moments(c, a) for c, a in others if a == action))
        return len(own & told) >= COVERED * len(own)

    def alike(self, one: tuple[Condition, str], other: tuple[Condition, str]) -> bool:
        """Whether the two are the same in other words."""
        return self.repeats(one, [other]) and self.repeats(other, [one])

    def distinct(self, patterns: Sequence[tuple[Condition, str]]) -> list[tuple[Condition, str]]:
        """Of ``patterns`` those that say something of their own; of the same in several words, the one that most show."""
        kept: list[tuple[Condition, str]] = []
        for pattern in sorted(patterns, key=lambda p: -len(self.actions[p])):
            if not self.repeats(pattern, kept):
                kept.append(pattern)
        return [pattern for pattern in patterns if pattern in kept]

    def evidence(self, centred: np.ndarray, scaled: np.ndarray) -> Evidence:
        """The sums. ``centred`` and ``scaled``: rewards of the trajectories, see :class:`Moments`."""
        return Evidence(
            _moments(self.situations, centred, scaled),
            _moments(self.actions, centred, scaled),
            _moments(self.barred, centred, scaled),
            _moments(self.told, centred, scaled),
            frozenset(self._named),
        )


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
