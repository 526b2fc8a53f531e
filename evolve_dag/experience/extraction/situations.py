"""Situations of the lattice: what holds before a step, in conjunctions that a principle can say.

They are the base (kind of observation; for a page with ``evidence``, and where the asked value is shown with its ``mark``, so
the lattice grows with what pages say) alone, or with one or two of ``listed``/``shared_name``, ``evidence``, ``repeat`` and
what the environment says itself (``env:...``).

The language grows where it is asked to (:func:`grown`): each of them with what is longer ago.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import combinations

from evolve_dag.experience.features import FEATURES, HISTORY, OWN, looks_back

Condition = tuple[tuple[str, str], ...]
"""(feature, value) pairs in the order of ``features.FEATURES``: a hashable conjunction."""

LATTICE = ("listed", "shared_name", "evidence", "mark", "repeat")
"""Features that situations are told apart by, beside the kind of observation."""


def condition_of(mapping: Mapping[str, str]) -> Condition:
    """A condition as a sorted tuple, so that equal conditions are equal keys."""
    order = {name: place for place, name in enumerate((*FEATURES, *HISTORY))}
    return tuple(sorted(mapping.items(), key=lambda pair: (order.get(pair[0], len(order)), pair[0])))


def situations_of(state: Mapping[str, str]) -> Iterator[Condition]:
    """Every situation of the lattice that holds in ``state``, the most general first."""
    for condition in _lattice(state):
        # That something was answered is no situation: what the environment says of it is never left open altogether.
        if state["observation"] != "described" or any(name.startswith(OWN) for name, _ in condition):
            yield condition


def grown(state: Mapping[str, str]) -> Iterator[Condition]:
    """Situations of ``state`` that tell of what is longer ago (:data:`~evolve_dag.experience.features.HISTORY`) as well; none
    where the state does not. A step that was refused is nothing that a principle can say."""
    ago = [(name, state[name]) for name in HISTORY if state.get(name, "none") not in ("none", "malformed")]
    for condition in situations_of(state) if ago else ():
        for count in range(1, len(ago) + 1):
            yield from (condition_of(dict((*condition, *told))) for told in combinations(ago, count))


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


def described(condition: Condition) -> bool:
    """Whether it speaks of what an environment says itself."""
    return ("observation", "described") in condition


def entangled(condition: Condition) -> bool:
    """Whether it speaks of what goes together with much else, so that the same moments can be told in several words: what an
    environment says itself, what is longer ago."""
    return described(condition) or looks_back(dict(condition))


def compatible(a: Condition, b: Condition) -> bool:
    """Can a state meet both conditions?"""
    values = dict(a)
    return all(values.get(feature, value) == value for feature, value in b)
