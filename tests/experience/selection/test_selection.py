from __future__ import annotations

import asyncio
import math

import pytest
from experience_builders import QUESTION, answer, malformed, search, visit

from evolve_dag.config.parts import part_of
from evolve_dag.config.schema import Experiment
from evolve_dag.experience.phrases import render
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.base import Selector
from evolve_dag.experience.selection.lexical import LexicalSelection, LexicalSelector, bm25, describe
from evolve_dag.experience.selection.state import StateSelection, StateSelector
from evolve_dag.inference.roles import Roles
from evolve_dag.records import ExperienceItem, Step

SHARED = "2 results\n1. river Bado Keli: mouth: city Zano Pile\n2. person Bado Keli: home: city Zano Pile"

RULES: list[tuple[str, dict[str, str], str, float]] = [
    ("p0001", {"tool": "none", "observation": "none"}, "search_short", 0.2),
    ("p0002", {"tool": "search", "observation": "empty"}, "search_short", 0.3),
    ("p0003", {"tool": "search", "observation": "listing"}, "open_fitting", 0.2),
    ("p0004", {"tool": "search", "observation": "listing", "shared_name": "yes"}, "open_first", 0.1),
    ("p0005", {"tool": "visit", "observation": "page", "evidence": "part"}, "search_short", 0.4),
    ("p0006", {"tool": "visit", "observation": "page", "evidence": "asked"}, "answer_page", 0.3),
    ("p0007", {"tool": "visit", "observation": "page", "evidence": "none"}, "open_fitting", 0.3),
    ("p0008", {"tool": "visit", "observation": "redirect"}, "open_pointed", 0.3),
    ("p0009", {"tool": "visit", "observation": "missing"}, "search_long", 0.3),
    ("p0010", {"tool": "search", "observation": "listing", "evidence": "part"}, "open_fitting", 0.5),
]
POOL = Pool(tuple(ExperienceItem(i, render(c, a), "principle", c, {"lift": lift}) for i, c, a, lift in RULES))
CASES = Pool(
    tuple(
        ExperienceItem(f"p{n:04d}", f"Case: What is the {words}? answer Rato Miku.", "instance")
        for n, words in enumerate(
            ["mayor of city Alo Bem", "mayor of the home of person Bado Keli", "length of river Ceto Di"], 1
        )
    )
)
EMPTY, LISTING = [search("x", "no results")], [search("x", SHARED)]
PART = [visit("x", "page: person Bado Keli\nhome: city Zano Pile")]
REDIRECT = [visit("x", "page: person Bado Keli\nsee: person Sito Lan")]
MISSING = [visit("x", "no page named city Bado Kela")]
LAST = [search("x", "no results\nlast step: answer now")]


def select(selector: Selector, steps: list[Step], pool: Pool = POOL, question: str = QUESTION) -> tuple[str, ...]:
    chosen = asyncio.run(selector.select(question, steps, pool))
    assert chosen.rationale
    assert len(set(chosen.ids)) == len(chosen.ids)
    assert set(chosen.ids) <= set(pool.ids)
    return chosen.ids


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], ("p0001",)),
        (EMPTY, ("p0002",)),
        (PART, ("p0005",)),
        (REDIRECT, ("p0008",)),
        (MISSING, ("p0009",)),
        ([malformed()], ()),
        (LAST, ()),
        # both special cases hold, higher lift first; the general rule yields to its exceptions
        (LISTING, ("p0010", "p0004")),
    ],
)
def test_state_selector(steps: list[Step], expected: tuple[str, ...]) -> None:
    assert select(StateSelector(3), steps) == expected


def test_the_number_of_items_is_bounded() -> None:
    assert select(StateSelector(1), LISTING) == ("p0010",)
    assert len(select(LexicalSelector(2), LISTING)) <= 2
    assert select(StateSelector(3), [], Pool()) == ()
    assert select(LexicalSelector(3), [], Pool()) == ()


def test_cases_are_chosen_by_words_and_at_the_start_only() -> None:
    assert select(StateSelector(1), [], CASES) == ("p0002",)
    assert select(StateSelector(3), [], CASES) == ("p0002", "p0001")  # the third shares no word
    assert select(StateSelector(3), EMPTY, CASES) == ()
    assert select(LexicalSelector(1), [], CASES) == ("p0002",)


@pytest.mark.parametrize(
    ("steps", "expected"),
    [([], "p0001"), (EMPTY, "p0002"), (MISSING, "p0009"), (LISTING, "p0010")],
)
def test_lexical_selector_puts_the_right_item_first(steps: list[Step], expected: str) -> None:
    assert select(LexicalSelector(3), steps)[0] == expected


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("home: city Zano Pile", "p0005"),
        ("mayor: person Rato Miku\nhome: city Z", "p0006"),
        ("mouth: city Z", "p0007"),
        ("see: city Z", "p0008"),
    ],
)
def test_lexical_selector_has_the_right_item_among_its_choice_after_a_page(page: str, expected: str) -> None:
    assert expected in select(LexicalSelector(3), [visit("x", f"page: river Bado Keli\n{page}")])


def test_lexical_selector_knows_nothing_of_the_features(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {name: select(LexicalSelector(3), steps) for name, steps in (("a", []), ("b", EMPTY), ("c", LISTING), ("d", PART))}

    def broken(*_: object, **__: object) -> dict[str, str]:
        raise AssertionError("the lexical selector looked at the features")

    monkeypatch.setattr("evolve_dag.experience.features.Tracker", broken)  # every feature is read from one
    bare = Pool(tuple(ExperienceItem(i.id, i.text, i.granularity, evidence=i.evidence) for i in POOL.items))
    for name, steps in (("a", []), ("b", EMPTY), ("c", LISTING), ("d", PART)):
        assert select(LexicalSelector(3), steps, bare) == before[name]
    with pytest.raises(AssertionError, match="looked at"):
        select(StateSelector(3), [])


def test_an_item_without_a_shared_word_is_never_chosen() -> None:
    pool = Pool((ExperienceItem("p0001", "Calm: when rain falls, stay dry.", "principle"),))
    for steps in ([], EMPTY, LISTING, PART, MISSING):
        assert select(LexicalSelector(3), steps, pool) == ()
    assert select(LexicalSelector(3), LAST) == ()


def test_only_the_situation_clause_of_a_principle_is_compared() -> None:
    pool = Pool((ExperienceItem("p0001", "Results: when rain falls, search results again.", "principle"),))
    assert select(LexicalSelector(3), LISTING, pool) == ()


def test_a_negation_must_be_met_by_one() -> None:
    assert "p0002" in select(LexicalSelector(9), EMPTY)
    assert not {"p0001", "p0002", "p0009"} & set(select(LexicalSelector(9, keep=0.0), LISTING))


@pytest.mark.parametrize(
    ("steps", "expected"),
    [
        ([], f"step 1. no tool used yet, nothing is known. question: {QUESTION}"),
        (EMPTY, "step 2. last tool: search. it returned: no results."),
        ([search("x", "1 result\n1. person Bado Keli: home: city Z")],
         "step 2. last tool: search. it returned: one result person Bado Keli: home: city Z. "
         "of the question it shows: home. it lacks: mayor."),
        ([malformed()], "step 2. the last call was refused: no call and no answer"),
        ([answer("x")], "step 2. last tool: none. it returned: ."),
    ],
)  # fmt: skip
def test_describe(steps: list[Step], expected: str) -> None:
    assert describe(QUESTION, steps) == expected


def test_bm25_by_hand() -> None:
    documents = [["page", "lack"], ["page", "show", "value", "page"]]
    # N = 2; 'lack' in one: idf = ln(1 + 1.5/1.5) = ln 2; 'page' in both: ln(1 + 0.5/2.5) = ln 1.2; average length 3
    norm = [1.2 * (1 - 0.75 + 0.75 * n / 3) for n in (2, 4)]
    expected = [
        math.log(1.2) * 2.2 / (1 + norm[0]) + math.log(2) * 2.2 / (1 + norm[0]),
        math.log(1.2) * 2 * 2.2 / (2 + norm[1]),
    ]
    assert bm25({"page", "lack", "absent"}, documents) == pytest.approx(expected)
    assert bm25({"x"}, []) == []
    assert bm25({"x"}, [[]]) == [0.0]


def test_a_row_makes_its_selector() -> None:
    for settings, expected in (
        (StateSelection(max_items=5), StateSelector(5)),
        (LexicalSelection(max_items=2), LexicalSelector(2)),
    ):
        assert part_of("selector", settings).make(settings, Roles(Experiment(experiment="x")), 0) == expected


def test_an_item_that_looks_back_is_chosen_where_it_holds() -> None:
    condition = {"observation": "empty", "in_row": "twice"}
    pool = Pool((*POOL.items, ExperienceItem("p0011", render(condition, "search_long"), "principle", condition, {"lift": 0.2})))
    selector = StateSelector(3)
    assert select(selector, EMPTY, pool) == ("p0002",)
    assert select(selector, [search("x", "no results"), search("y", "no results")], pool) == ("p0002", "p0011")
    assert "in_row" not in asyncio.run(selector.select(QUESTION, EMPTY, POOL)).rationale, "nobody asks"
