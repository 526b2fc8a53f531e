from __future__ import annotations

import json
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pool_replay import outline, replay

from evolve_dag.errors import DataError
from evolve_dag.experience.pool import Pool, Proposal, lift, principle_problems
from evolve_dag.records import ExperienceItem, PoolEdit

GOOD = "Narrow: when a search returns no results, search only the short name."


def add(word: str, value: float = 0.1, **more: Any) -> Proposal:
    text = f"Narrow: when {word} is shown, search only the short name."
    return Proposal("add", text=text, evidence={"lift": value}, trajectory_ids=(f"{word}#0",), reason="test", **more)


def pool_of(*words: str) -> Pool:
    return Pool().apply([add(word, 0.1 * (n + 1)) for n, word in enumerate(words)], iteration=1, strict=True).pool


def test_ids_count_up_and_are_never_used_again() -> None:
    pool = pool_of("a", "b")
    assert pool.ids == ("p0001", "p0002")
    emptied = pool.apply([Proposal("delete", item_id="p0001"), Proposal("delete", item_id="p0002")], iteration=2).pool
    assert len(emptied) == 0
    assert emptied.apply([add("a")], iteration=3).pool.ids == ("p0003",)
    # also through the file, and for a pool made by hand from items alone
    assert Pool.from_json(emptied.to_json()).apply([add("a")], iteration=3).pool.ids == ("p0003",)
    assert Pool(pool.items).apply([add("c")], iteration=3).pool.ids[-1] == "p0003"


def test_a_pool_is_a_value() -> None:
    pool = pool_of("a")
    pool.apply([add("b"), Proposal("delete", item_id="p0001")], iteration=2)
    assert pool.ids == ("p0001",)
    with pytest.raises(FrozenInstanceError):
        pool.version = 9  # type: ignore[misc]


def test_delete_needs_no_content() -> None:
    """The released code asks for ``content: null`` and then skips such decisions: no delete ever happens there."""
    applied = pool_of("a", "b").apply([Proposal("delete", item_id="p0001", text=None, reason="why")], iteration=2)
    assert applied.pool.ids == ("p0002",)
    assert applied.refused == []
    edit = applied.edits[0]
    assert (edit.operation, edit.after, edit.reason) == ("delete", None, "why")
    assert edit.before is not None


def test_update_keeps_the_id_and_tells_both_texts() -> None:
    pool = pool_of("a")
    applied = pool.apply([Proposal("update", item_id="p0001", text=GOOD, trajectory_ids=("t#1",))], iteration=4)
    item = applied.pool.get("p0001")
    assert (item.text, item.created, item.updated, item.trajectory_ids) == (GOOD, 1, 4, ("t#1",))
    assert item.evidence == pool.items[0].evidence
    assert (applied.edits[0].before, applied.edits[0].after) == (pool.items[0].text, GOOD)


def test_merge_removes_one_and_names_the_other() -> None:
    pool = pool_of("a", "b")
    applied = pool.apply([Proposal("merge", item_id="p0001", into="p0002")], iteration=2)
    assert applied.pool.ids == ("p0002",)
    edit = applied.edits[0]
    assert (edit.into, edit.before, edit.after) == ("p0002", pool.items[0].text, pool.items[1].text)


LONG = f"Long: when a page is shown, {'search again and ' * 20}answer."

REFUSED = [
    (Proposal("delete"), "names no item"),
    (Proposal("delete", item_id="p0099"), "no item 'p0099'"),
    (Proposal("update", item_id="G7", text=GOOD), "no item 'G7'"),
    (Proposal("update", item_id="p0001", text=None), "empty text"),
    (Proposal("update", item_id="p0001", text=" \n"), "empty text"),
    (Proposal("add"), "empty text"),
    (Proposal("add", text={"content": "x"}), "empty text"),  # type: ignore[arg-type]
    (Proposal("add", item_id="p0001", text=GOOD), "gets its id from the pool"),
    (Proposal("add", text=LONG), "more than 32"),
    (Proposal("add", text="be careful"), "2 words say no strategy"),
    (Proposal("add", text="Narrow: when A is shown, search only the short NAME.".lower().capitalize()), "same text"),
    (Proposal("add", text=GOOD, evidence={"lift": float("nan")}), "not a finite number: lift"),
    (Proposal("merge", item_id="p0001"), "which item to merge into"),
    (Proposal("merge", item_id="p0001", into="p0001"), "into itself"),
    (Proposal("merge", item_id="p0001", into="p0099"), "no item 'p0099'"),
    (Proposal("rename", item_id="p0001"), "unknown operation 'rename'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("proposal", "why"), REFUSED, ids=[why for _, why in REFUSED])
def test_nothing_vanishes_a_bad_proposal_is_refused_with_its_reason(proposal: Proposal, why: str) -> None:
    pool = pool_of("a", "b")
    applied = pool.apply([proposal, add("c")], iteration=2)
    assert [why in refusal.why for refusal in applied.refused] == [True]
    assert applied.refused[0].proposal is proposal
    assert applied.pool.ids == ("p0001", "p0002", "p0003")  # the others are carried out
    with pytest.raises(DataError, match="1 proposals refused"):
        pool.apply([proposal, add("c")], iteration=2, strict=True)


def test_a_later_proposal_sees_what_an_earlier_one_did() -> None:
    applied = pool_of("a").apply(
        [Proposal("delete", item_id="p0001"), Proposal("update", item_id="p0001", text=GOOD)], iteration=2
    )
    assert len(applied.refused) == 1
    assert applied.pool.ids == ()


def test_the_cap_drops_the_lowest_lift_not_the_newest() -> None:
    pool = pool_of("a", "b", "c")  # lifts 0.1, 0.2, 0.3
    applied = pool.apply([add("d", 0.25), add("e", 0.1)], iteration=2, cap=3)
    assert [round(lift(i), 2) for i in applied.pool.items] == [0.2, 0.3, 0.25]
    deletes = [e for e in applied.edits if e.operation == "delete"]
    assert [e.item_id for e in deletes] == ["p0005", "p0001"]  # of equals the newest first
    assert all("over the cap of 3: lowest lift (+0.10)" in e.reason for e in deletes)
    assert pool.apply([], iteration=2, cap=3) == (pool, [], [])


def test_a_withdrawn_item_stays_in_the_record_and_cannot_come_back_under_another_text() -> None:
    text = "Verify: when a page is shown, read it to its end."
    pool = (
        Pool()
        .apply([Proposal("add", text=text), Proposal("add", text="Search: when nothing is known, search.")], iteration=1)
        .pool
    )
    after, [edit], _ = pool.apply([Proposal("withdraw", item_id="p0001", reason="worse with it")], iteration=2)
    assert (after.get("p0001").withdrawn, after.active.ids, edit.reason) == (2, ("p0002",), "worse with it")
    assert Pool.from_json(after.to_json()) == after
    wanted = [
        Proposal("add", text=text.upper().capitalize()),
        Proposal("update", item_id="p0001", text="Verify: when a page is shown, read on."),
        Proposal("merge", item_id="p0001", into="p0002"),
        Proposal("merge", item_id="p0002", into="p0001"),
        *(Proposal(operation, item_id="p0001") for operation in ("withdraw", "graduate", "recall", "delete")),
    ]
    applied = after.apply(wanted, iteration=3)
    assert (applied.pool, len(applied.refused)) == (after, len(wanted))
    assert applied.refused[1].why == (
        "p0001 was withdrawn: the teacher did worse with it; it stays as the record of that: add another item"
    )


def test_versions_grow_with_changes_only() -> None:
    pool = pool_of("a")
    assert pool.version == 1
    assert pool.apply([], iteration=2).pool.version == 1
    assert pool.apply([Proposal("delete", item_id="nope")], iteration=2).pool.version == 1
    assert pool.apply([add("b"), add("c")], iteration=2).pool.version == 2


def test_get_names_the_ids_that_exist() -> None:
    with pytest.raises(DataError, match="'p9'") as caught:
        pool_of("a").get("p9")
    assert "p0001" in caught.value.remedy


def test_two_items_with_one_id_are_refused() -> None:
    item = pool_of("a").items[0]
    with pytest.raises(DataError, match="two items have the id p0001"):
        Pool((item, item))


def test_other_words_bring_back_an_item_that_has_graduated():
    """That the policy follows the new words nobody has seen."""
    pool = Pool().apply([add("a"), Proposal("graduate", item_id="p0001")], iteration=1).pool
    text = pool.items[0].text
    same = pool.apply([Proposal("update", item_id="p0001", text=f" {text.upper()}", evidence={"lift": 0.2})], iteration=2).pool
    assert same.items[0].graduated == 1
    other = pool.apply([Proposal("update", item_id="p0001", text=add("b").text)], iteration=2).pool
    assert other.active.ids == ("p0001",)


IDS = st.one_of(st.none(), st.sampled_from([f"p{n:04d}" for n in range(1, 9)] + ["x"]))
PROPOSALS = st.builds(
    Proposal,
    operation=st.sampled_from(["add", "update", "delete", "merge"]),
    item_id=IDS,
    text=st.one_of(st.none(), st.sampled_from([GOOD, "", "nonsense"] + [add(w).text for w in "abcde"])),
    granularity=st.sampled_from(["principle", "instance"]),
    evidence=st.dictionaries(st.just("lift"), st.floats(-1, 1), max_size=1),
    trajectory_ids=st.lists(st.sampled_from(["t#0", "t#1"]), max_size=2, unique=True).map(tuple),
    reason=st.just("r"),
    into=IDS,
)
ADDS = st.builds(add, st.sampled_from(list("abcdefgh")), st.floats(-1, 1))


CAPS = st.one_of(st.none(), st.integers(1, 4))
BATCHES = st.lists(st.tuples(st.lists(st.one_of(ADDS, PROPOSALS), max_size=6), CAPS), max_size=6)


@settings(deadline=None)
@given(BATCHES)
def test_replay_of_all_edits_rebuilds_the_pool(batches: list[tuple[list[Proposal], int | None]]) -> None:
    pool, edits = Pool(), list[PoolEdit]()
    given_ids: list[str] = []
    for iteration, (proposals, cap) in enumerate(batches, 1):
        applied = pool.apply(proposals, iteration=iteration, cap=cap)
        carried_out = [e for e in applied.edits if "over the cap" not in e.reason]
        assert len(carried_out) + len(applied.refused) == len(proposals)  # nothing lost silently
        assert applied.pool.version == pool.version + bool(applied.edits)
        pool = applied.pool
        edits += applied.edits
        given_ids += [e.item_id for e in applied.edits if e.operation == "add"]
        if cap is not None:
            assert len(pool) <= cap
        # what an id means can change only by an edit that names it
        assert Pool.from_json(pool.to_json()) == pool
    assert replay(edits) == outline(pool)
    assert len(set(given_ids)) == len(given_ids)
    assert all(e.iteration >= 1 for e in edits)


def item(**changes: Any) -> dict[str, Any]:
    return {"id": "p0001", "text": GOOD, "granularity": "principle"} | changes


NONSENSE = [
    ("{", "not valid JSON"),
    ("[]", "must be an object with a list `items`"),
    ('{"items": {}}', "must be an object with a list `items`"),  # the released code writes a dict and reads a list
    ({"items": [], "extra": 1}, "extra: unknown field"),
    ({"items": [], "version": "1"}, "version: should be a valid integer, not '1'"),
    ({"items": [], "next_number": -1}, "next_number: should be greater than or equal to 0, not -1"),
    ({"items": ["text"]}, "item 1: should be an object"),
    ({"items": [{"id": "p0001"}]}, r"item 1 \(p0001\): text: missing"),
    ({"items": [item(text="  ")]}, "text: should be text, not '  '"),
    ({"items": [item(text=3)]}, "text: should be a valid string, not 3"),
    ({"items": [item(id="")]}, "id: should be letters, digits, `_.-`, not empty"),
    ({"items": [item(id="a b")]}, "id: should be letters, digits, `_.-`, not 'a b'"),
    ({"items": [item(granularity="global")]}, "granularity: should be 'principle' or 'instance', not 'global'"),
    ({"items": [item(granularity=[])]}, "granularity: should be"),
    ({"items": [item(condition=["tool"])]}, "condition: should be a valid dictionary"),
    ({"items": [item(condition={"tool": 1})]}, "condition.tool: should be a valid string, not 1"),
    ({"items": [item(evidence={"lift": "high"})]}, "evidence.lift: should be a valid number, not 'high'"),
    ({"items": [item(evidence={"lift": float("nan")})]}, "evidence.lift: should be a finite number, not nan"),
    ({"items": [item(evidence={"lift": 10**400})]}, "evidence.lift: should be a valid number, not 1000"),
    ({"items": [item(trajectory_ids="t#0")]}, "trajectory_ids: should be a valid list, not 't#0'"),
    ({"items": [item(created=1.5)]}, "created: should be a valid integer, not 1.5"),
    ({"items": [item(colour="red")]}, "colour: unknown field"),
    ({"items": [item(), item()]}, r"item 2 \(p0001\): id: already used by item 1"),
    ({"items": [item(id="p0007")], "next_number": 3}, "not below next_number 3"),
]


@pytest.mark.parametrize(("content", "what"), NONSENSE, ids=[what[:40] + str(n) for n, (_, what) in enumerate(NONSENSE)])
def test_a_pool_file_edited_into_nonsense_is_refused_by_item_and_field(content: object, what: str) -> None:
    text = content if isinstance(content, str) else json.dumps(content)
    with pytest.raises(DataError, match=what) as caught:
        Pool.from_json(text, "pool.json")
    assert caught.value.what.startswith("pool.json: ")
    assert caught.value.remedy


def test_what_a_file_states_is_not_questioned() -> None:
    stated = [item(text=LONG), item(id="p0002", text="See https://example.org.")]
    pool = Pool.from_json(json.dumps({"items": stated}))
    assert [i.granularity for i in pool.items] == ["principle", "principle"]
    refused = pool.apply([Proposal("update", item_id="p0001", text=f"{LONG} Again.")], iteration=1).refused
    assert "more than 32" in refused[0].why  # a new text is another matter


def test_all_mistakes_of_a_file_are_listed_at_once() -> None:
    with pytest.raises(DataError, match="3 mistakes"):
        Pool.from_json(json.dumps({"items": [item(text=""), item(granularity="x", created=-1)]}))


def test_a_pool_written_by_hand_needs_three_fields() -> None:
    pool = Pool.from_json(json.dumps({"items": [item()]}))
    assert pool.items == (ExperienceItem("p0001", GOOD, "principle"),)
    assert pool.next_number == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (GOOD, None),
        ("Two words: when a JSON reply is broken, ask again.", None),
        ("Three whole words: when a, b.", None),
        ("Targeted retrieval: Construct queries from the rarest terms", None),
        ("Verify before answering.", None),
        ("Narrow: search.", "2 words say no strategy"),
        ("", "0 words say no strategy"),
        (LONG, "more than 32"),
        ("Go: when a page is shown,\ncopy it.", "line"),
        ("Go: when example.com is listed, open it.", "URL or domain"),
        ("Go: when a page is shown, open https://x.y/z now.", "URL or domain"),
        ("Go: when 3 results are shown, stop.", "number"),
        ("Go: when a page is about Bado Keli, stop.", "entity name (Bado Keli)"),
    ],
)
def test_principles_are_refused_for_length_and_detail_alone(text: str, problem: str | None) -> None:
    problems = principle_problems(text)
    assert (problems == []) if problem is None else any(problem in p for p in problems)
