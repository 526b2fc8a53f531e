"""A pool in disguise: the same situations, other actions, for good."""

from __future__ import annotations

from dataclasses import replace

import pytest
from experience_builders import answer, search, trajectory, visit
from hypothesis import given
from hypothesis import strategies as st
from pool_replay import replay

from evolve_dag.errors import DataError
from evolve_dag.experience.extraction.placebo import placebo
from evolve_dag.experience.features import walk
from evolve_dag.experience.phrases import action_of, render, split
from evolve_dag.experience.pool import Pool, Proposal, principle_problems

LISTING = "2 results\n1. river Bado Keli: mouth: city Zano Pile\n2. person Bado Keli: home: city Zano Pile"
PAGE = "page: person Bado Keli\nhome: city Zano Pile"
SEEN = [
    trajectory("t", 0, [search("Bado Keli", LISTING), visit("person Bado Keli", PAGE), answer("Rato Miku")], 1.0),
    trajectory("t", 1, [search("Bado Keli", LISTING), visit("river Bado Keli", PAGE), answer("Rato Miku")], 0.0),
]
LISTED = {"observation": "listing"}
TRUE = render(LISTED, "open_fitting")


def mined(*texts: tuple[str, dict[str, str]], cap: int | None = None) -> tuple[Pool, list]:
    proposals = [Proposal("add", text=text, condition=condition, reason="lift +0.50") for text, condition in texts]
    applied = Pool().apply(proposals, iteration=1, cap=cap)
    assert not applied.refused
    return applied.pool, applied.edits


def test_the_situation_stays_and_the_action_is_another_one_that_was_taken_there() -> None:
    pool, edits = mined((TRUE, LISTED))
    found = placebo(pool, edits, SEEN, before=Pool(), seed=3)
    [item] = found.pool.items
    assert split(item.text)[1] == split(TRUE)[1]
    taken = {action for t in SEEN for state, action in walk(t) if state["observation"] == "listing"}
    assert action_of(item.text) in taken - {"open_fitting"}
    assert (item.id, item.condition, found.pool.next_number) == ("p0001", LISTED, pool.next_number)
    assert not principle_problems(item.text)


@given(st.integers(0, 10_000))
def test_no_seed_leaves_the_lesson_as_it_was_and_each_draws_the_same_again(seed: int) -> None:
    pool, edits = mined((TRUE, LISTED), (render({"observation": "none"}, "search_short"), {"observation": "none"}))
    found = placebo(pool, edits, SEEN, before=Pool(), seed=seed)
    for item, true in zip(found.pool.items, pool.items, strict=True):
        assert action_of(item.text) not in (None, action_of(true.text))
    assert placebo(pool, edits, SEEN[::-1], before=Pool(), seed=seed) == found, "the order of trajectories decides nothing"


def test_an_item_keeps_the_action_that_it_got_first() -> None:
    pool, edits = mined((TRUE, LISTED))
    first = placebo(pool, edits, SEEN, before=Pool(), seed=3)
    other_night = [trajectory("u", 0, [search("Bado Keli", LISTING), answer("Zano Pile")], 0.0)]
    update = Proposal("update", item_id="p0001", text=TRUE, evidence={"lift": 0.4}, reason="new evidence")
    later = pool.apply([update], iteration=2)
    second = placebo(later.pool, later.edits, other_night, before=first.pool, seed=3)
    assert second.pool.items[0].text == first.pool.items[0].text
    assert second.pool.items[0].evidence == {"lift": 0.4}
    assert replay([*first.edits, *second.edits])[0].text == first.pool.items[0].text, "the edits tell the pool as it is"


def test_the_record_tells_what_was_mined() -> None:
    pool, edits = mined((TRUE, LISTED))
    [added] = placebo(pool, edits, SEEN, before=Pool(), seed=3).edits
    assert added.reason == f"placebo for: {TRUE} lift +0.50"
    assert added.after != TRUE


def test_an_item_that_came_and_went_at_once_is_told_too() -> None:
    pool, edits = mined((TRUE, LISTED), (render({"observation": "page"}, "answer_page"), {"observation": "page"}), cap=1)
    found = placebo(pool, edits, SEEN, before=Pool(), seed=3)
    assert [outline.id for outline in replay(found.edits)] == list(found.pool.ids)


def test_where_nobody_did_anything_else_the_action_comes_from_elsewhere() -> None:
    alone = [replace(SEEN[0], steps=SEEN[0].steps[:2])]
    pool, edits = mined((TRUE, LISTED))
    [item] = placebo(pool, edits, alone, before=Pool(), seed=3).pool.items
    assert action_of(item.text) == "search_short"
    [item] = placebo(pool, edits, [], before=Pool(), seed=3).pool.items
    assert action_of(item.text) not in (None, "open_fitting")


def test_a_text_that_was_not_mined_is_refused() -> None:
    pool = Pool((replace(mined((TRUE, LISTED))[0].items[0], text="Search twice."),))
    with pytest.raises(DataError, match="Search twice"):
        placebo(pool, [], SEEN, before=Pool(), seed=0)
