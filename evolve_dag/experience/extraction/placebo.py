"""The placebo: situations as they were mined, each with another action (``extraction.placebo``).

A control for the whole loop: the same number of items, of the same form, read at the same steps, and wrong. What an
experiment gains with it, it does not owe to what its lessons say.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from evolve_dag.errors import DataError
from evolve_dag.experience.features import any_looks_back, walk
from evolve_dag.experience.phrases import STRATEGIES, action_of, split, strategy
from evolve_dag.experience.pool import Pool
from evolve_dag.records import PoolEdit, Trajectory
from evolve_dag.seeds import stable_hash


@dataclass(frozen=True, slots=True)
class Placebo:
    """A mined pool in disguise."""

    pool: Pool
    """The same items (ids, conditions, evidence of what was mined), each with another action in its text."""
    edits: tuple[PoolEdit, ...]
    """The same edits, about the texts that stand in the pool; the reason of an ``add`` tells what was mined."""


def placebo(mined: Pool, edits: Sequence[PoolEdit], trajectories: Sequence[Trajectory], *, before: Pool, seed: int) -> Placebo:
    """Give every mined principle another action in the same situation.

    The action is drawn among those that ``trajectories`` took in the situation, so that it can be followed there; where none
    is left, among all that they took. An item keeps the action that it got first.

    Args:
        before: the placebo pool of the iteration before.
        seed: decides the draw.

    Raises:
        DataError: an item was not mined: its text is not of the form of a principle.
    """
    history = any_looks_back(mined.items)
    walks = (walk(trajectory, history=history) for trajectory in trajectories)
    taken = list(dict.fromkeys((tuple(state.items()), action) for one in walks for state, action in one))
    known = {edit.item_id: edit.after for edit in edits if edit.operation == "add" and edit.after is not None}
    known |= {item.id: item.text for item in mined.items}
    conditions = {item.id: item.condition for item in mined.items}
    said = {item.id: item.text for item in before.items}
    for item_id, text in known.items():
        if item_id not in said:
            said[item_id] = _other(text, conditions.get(item_id, {}), taken, stable_hash("placebo", seed, item_id))
    items = tuple(replace(item, text=said[item.id]) for item in mined.items)
    return Placebo(Pool(items, mined.version, mined.next_number), tuple(_told(edit, said) for edit in edits))


def _other(text: str, condition: Mapping[str, str], taken: Sequence[tuple[tuple[tuple[str, str], ...], str]], draw: int) -> str:
    parts, own = split(text), action_of(text)
    if parts is None:
        raise DataError(f"placebo: {text!r} is not a mined principle", "start a placebo without a pool of others")
    here = {action for state, action in taken if set(condition.items()) <= set(state)}
    everywhere = {action for _, action in taken}
    for actions in (here, everywhere, set(STRATEGIES)):
        options = [advice for action in sorted(actions - {own}) if (advice := strategy(action)) is not None]
        if options:
            break
    name, what = options[draw % len(options)]
    return f"{name}: when {parts[1]}, {what}."


def _told(edit: PoolEdit, said: Mapping[str, str]) -> PoolEdit:
    reason = f"placebo for: {edit.after} {edit.reason}" if edit.operation == "add" else edit.reason
    after = None if edit.after is None else said[edit.into or edit.item_id]
    return replace(edit, before=None if edit.before is None else said[edit.item_id], after=after, reason=reason)
