"""A pool's edits done again, oldest first: the oracle that no edit is lost and none contradicts another."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from evolve_dag.experience.pool import STANDS, Pool
from evolve_dag.records import PoolEdit


class Outline(NamedTuple):
    """What the edits know of an item."""

    id: str
    text: str
    created: int
    updated: int
    trajectory_ids: tuple[str, ...]


def outline(pool: Pool) -> tuple[Outline, ...]:
    """What :func:`replay` must reproduce."""
    return tuple(Outline(i.id, i.text, i.created, i.updated, i.trajectory_ids) for i in pool.items)


def replay(edits: Iterable[PoolEdit]) -> tuple[Outline, ...]:
    """Ids, texts and provenance of a pool, rebuilt from all its edits."""
    items: dict[str, Outline] = {}
    ever: set[str] = set()
    for edit in edits:
        if edit.operation == "add":
            assert edit.item_id not in ever, edit
            assert edit.after is not None, edit
            ever.add(edit.item_id)
            items[edit.item_id] = Outline(edit.item_id, edit.after, edit.iteration, edit.iteration, edit.trajectory_ids)
            continue
        item = items[edit.item_id]
        assert item.text == edit.before, edit
        if edit.operation in STANDS:
            assert edit.after == edit.before, edit
            continue
        if edit.operation == "update":
            assert edit.after is not None, edit
            items[edit.item_id] = item._replace(text=edit.after, updated=edit.iteration, trajectory_ids=edit.trajectory_ids)
            continue
        assert edit.operation == "delete" or (edit.into in items and edit.into != edit.item_id), edit
        del items[edit.item_id]
    return tuple(items.values())
