from __future__ import annotations

from itertools import product

import pytest

from evolve_dag.errors import DataError
from evolve_dag.experience.features import ACTIONS
from evolve_dag.experience.phrases import (
    ADDITIONS,
    LONGER_AGO,
    SITUATIONS,
    STRATEGIES,
    action_of,
    all_phrases,
    render,
    situation_text,
    split,
)
from evolve_dag.experience.pool import principle_problems

TOOLS = ["use:archive", "use:web_lookup-b", "use:base64_decode", "use:Search", "use:lookup_v2"]


def test_every_action_that_can_be_advised_has_one_strategy() -> None:
    assert set(STRATEGIES) == set(ACTIONS) - {"malformed", "use:<tool>", "did:<words>"}
    assert len({name for name, _ in STRATEGIES.values()}) == len(STRATEGIES)
    assert len({strategy for _, strategy in STRATEGIES.values()}) == len(STRATEGIES)


def test_every_rendering_is_in_principle_form_and_can_be_read_back() -> None:
    conditions = [dict(predicates) for predicates, _ in SITUATIONS]
    conditions += [{**c, "tool": "search", "repeat": "no", "depth": "late"} for c in conditions]
    conditions += [{"observation": "listing", "shared_name": "yes", "evidence": "part", "repeat": "yes"}]
    conditions += [{"observation": "page", "evidence": "asked", "mark": "old"}]
    conditions += [{"observation": "listing", "shared_name": "yes", name: value} for name, value in LONGER_AGO]
    conditions += [{"observation": "page", "evidence": "asked", "mark": "old", "led": "use:archive"}]
    conditions += [{"observation": "described", "env:result": "an error", "env:cursor": "at its end", "repeat": "yes"}]
    for condition, action in product(conditions, [*STRATEGIES, *TOOLS, "did:go back"]):
        text = render(condition, action)
        assert principle_problems(text) == []
        assert action_of(text) == action
        parts = split(text)
        assert parts is not None
        assert parts[1] == situation_text(condition)


@pytest.mark.parametrize(
    ("condition", "expected"),
    [
        ({"tool": "none", "observation": "none"}, "nothing is known yet"),
        ({"tool": "search", "observation": "empty", "repeat": "yes"},
         "a search returns no results and the same call was made before"),
        ({"tool": "search", "observation": "listing", "listed": "one"}, "the search shows one result"),
        ({"observation": "listing", "shared_name": "yes"}, "several results share one name"),
        ({"observation": "redirect"}, "the page only points to another page"),
        ({"observation": "described", "env:result": "an error", "repeat": "no"},
         "the result is an error and the last call was new"),
        ({"observation": "page", "evidence": "part"}, "the page answers only part of the question"),
        ({"observation": "page", "evidence": "asked"}, "the page shows the asked value"),
        ({"observation": "page", "evidence": "none"}, "the page lacks the asked part"),
        ({"observation": "page", "evidence": "asked", "mark": "none"}, "the page shows the asked value"),
        ({"observation": "page", "evidence": "asked", "mark": "old"}, "its value is marked old"),
        ({"observation": "missing"}, "no page has that name"),
        ({"observation": "empty", "in_row": "more"}, "a search returns no results and three times or more in a row"),
        ({"observation": "page", "evidence": "none", "led": "open_first"},
         "the page lacks the asked part and that after you open the first result"),
        ({"observation": "described", "env:exits": "one", "led": "did:go on"},
         "the exits is one and that after you go on"),
        ({"observation": "listing", "evidence": "asked"}, "the search shows results and the asked value is listed"),
    ],
)  # fmt: skip
def test_agreed_phrases(condition: dict[str, str], expected: str) -> None:
    assert situation_text(condition) == expected


def test_a_tools_name_is_no_detail_and_what_stands_beside_it_is() -> None:
    assert principle_problems("Source: when a table is shown, call base64_decode.") == []
    assert principle_problems("Source: when table 7 is shown, call base64_decode.") == ["holds a number (7)"]
    assert principle_problems("Source: when Bado Keli is shown, call Search.") == ["holds an entity name (Bado Keli)"]
    assert principle_problems("Source: when a table is shown, call Search for Rato Miku.") != []
    assert principle_problems("Decode: when a table is shown, ask base64_decode.") != [], "other words name no tool"


def test_what_has_no_phrase_is_an_error() -> None:
    with pytest.raises(DataError, match="no phrase for the condition"):
        situation_text({"tool": "search"})
    with pytest.raises(DataError, match="colour=red"):
        situation_text({"observation": "page", "colour": "red"})
    with pytest.raises(DataError, match="led=malformed"):
        situation_text({"observation": "page", "led": "malformed"})
    with pytest.raises(DataError, match="malformed"):
        render({"observation": "page"}, "malformed")


def test_reading_back_other_words() -> None:
    assert split("No principle at all") is None
    assert action_of("Care: when a list is long, read it twice.") is None
    assert action_of("Broad: when a page is shown, search only the short name.") is None  # name and strategy must agree
    assert split("Two words: when a, b, and c, do d.") == ("Two words", "a", "b, and c, do d")


def test_all_phrases_lists_every_table_once() -> None:
    phrases = all_phrases()
    assert len(phrases) == len(set(phrases)) == len(SITUATIONS) + len(ADDITIONS) + 2 * len(STRATEGIES) + 3
