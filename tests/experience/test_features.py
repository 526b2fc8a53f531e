from __future__ import annotations

from dataclasses import replace

import pytest
from experience_builders import QUESTION, answer, malformed, search, trajectory, visit
from hypothesis import given, settings
from hypothesis import strategies as st

from evolve_dag.experience.features import (
    ACTIONS,
    FEATURES,
    HISTORY,
    OBSERVATIONS,
    Tracker,
    action,
    answer_demanded,
    choices,
    features,
    normalised,
    parse_observation,
    parse_question,
    strip_last_step,
    walk,
)
from evolve_dag.plain import plain
from evolve_dag.records import Step, ToolCall

ONE = "1 result\n1. person Bado Keli: home: city Zano Pile"
SHARED = "2 results\n1. river Bado Keli: mouth: city Zano Pile\n2. person Bado Keli: home: city Zano Pile"
DIFFERENT = "2 results\n1. city Bado Keli: mayor: person Rato Miku\n2. city Bado Miro: mayor: person Sito Lan"
HOME_PAGE = "page: person Bado Keli\nhome: city Zano Pile\nmate: person Sito Lan"
MAYOR_PAGE = "page: city Zano Pile\nmayor: person Rato Miku\nstream: river Bado Keli"
WRONG_PAGE = "page: river Bado Keli\nmouth: city Zano Pile\nkeeper: person Rato Miku"
REDIRECT = "page: person Bado Keli\nsee: person Sito Lan"
ROWS = (
    "page: mayor of city Zano Pile\n"
    "mayor: year 4 person Zano Pile\nmayor: year 7 person Rato Miku\nmayor: year 2 person Sito Lan"
)

MARKS = [
    ("mayor: person Rato Miku", "none"),
    ("mayor: person Rato Miku old", "old"),
    ("mayor: person Rato Miku (old, disputed)", "none"),  # no plain words
    ("mayor: person Rato Miku old disputed", "disputed old"),
    ("mayor: a person of some note in the town", "none"),  # a sentence
    ("mayor: year 3 person Rato Miku\nmayor: year 4 person Sito Lan", "year"),
    ("stream: river Bado Keli old", "none"),  # another field's mark
]


@pytest.mark.parametrize(("lines", "mark"), MARKS)
def test_marks_stand_with_the_asked_value_alone(lines: str, mark: str) -> None:
    assert features(QUESTION, [visit("x", f"page: city Zano Pile\n{lines}")])["mark"] == mark


def test_rows_have_one_number_each() -> None:
    assert parse_observation(ROWS).rows("mayor") == [(4, " year 4 person zano pile "), (7, " year 7 person rato miku "),
                                                     (2, " year 2 person sito lan ")]  # fmt: skip
    assert parse_observation(MAYOR_PAGE).rows("mayor") == []
    assert parse_observation(f"{ROWS}\nmayor: person Gani Tol").rows("mayor") == []


STATES = [
    ("start", [], {"tool": "none", "observation": "none", "listed": "none", "evidence": "none", "depth": "early"}),
    ("search empty", [search("x", "no results")], {"tool": "search", "observation": "empty"}),
    ("blank", [search("x", "  \n")], {"observation": "empty"}),
    ("zero results", [search("x", "0 results")], {"observation": "empty", "listed": "none"}),
    ("one listed", [search("x", ONE)], {"observation": "listing", "listed": "one", "shared_name": "no", "evidence": "part"}),
    ("sharing a name", [search("x", SHARED)], {"observation": "listing", "listed": "several", "shared_name": "yes"}),
    # two of a kind whose names have one word in common: the kind word is no part of the name
    ("other names", [search("x", DIFFERENT)], {"listed": "several", "shared_name": "no", "evidence": "asked"}),
    ("redirect", [visit("person Bado Keli", REDIRECT)], {"tool": "visit", "observation": "redirect", "evidence": "none"}),
    ("middle of the chain", [visit("person Bado Keli", HOME_PAGE)], {"observation": "page", "evidence": "part"}),
    ("asked word", [visit("city Zano Pile", MAYOR_PAGE)], {"observation": "page", "evidence": "asked"}),
    # 'person' is on it, as a value: a kind word is no evidence
    ("wrong page", [visit("river Bado Keli", WRONG_PAGE)], {"observation": "page", "evidence": "none", "listed": "none"}),
    ("no such page", [visit("city Bado Kela", "no page named city Bado Kela")], {"observation": "missing", "evidence": "none"}),
    ("refused", [malformed()], {"tool": "none", "observation": "problem"}),
    ("repeated", [search("Bado Keli", ONE), search("bado  keli", ONE)], {"repeat": "yes"}),
    ("not repeated", [search("Bado Keli", ONE), visit("person Bado Keli", HOME_PAGE)], {"repeat": "no"}),
    ("middle", [search(str(n), "no results") for n in range(3)], {"depth": "middle"}),
    ("late", [search(str(n), "no results") for n in range(6)], {"depth": "late"}),
    ("last step", [search("x", f"{ONE}\nlast step: answer now")], {"observation": "listing", "listed": "one"}),
    ("empty and last step", [search("x", "no results\nlast step: answer now")], {"observation": "empty"}),
]


@pytest.mark.parametrize(("steps", "expected"), [case[1:] for case in STATES], ids=[case[0] for case in STATES])
def test_situations_of_the_pocket_world(steps: list[Step], expected: dict[str, str]) -> None:
    state = features(QUESTION, steps)
    assert tuple(state) == FEATURES
    assert {name: state[name] for name in expected} == expected


def test_the_pocket_states_differ_pairwise() -> None:
    seen = {
        name: tuple(features(QUESTION, steps).items())
        for name, steps, _ in STATES[:12]
        if name not in ("blank", "zero results")
    }
    assert len(set(seen.values())) == len(seen)


PYTHON = Step(0, "run", (), (), ToolCall("python", {"code": "1+1"}), observation="2")
UNKNOWN_OPEN = Step(0, "go", (), (), ToolCall("consult", {"x": "river Bado Keli"}), observation="...")
UNKNOWN_SEARCH = Step(0, "go", (), (), ToolCall("consult", {"x": "Bado Keli"}), observation="...")
LISTED = "2 results\n1. Rato Miku: mayor (https://a.example/rato)\n2. Other: x (https://b.example/)"
BY_ADDRESS = Step(0, "go", (), (), ToolCall("visit", {"goal": "who is it", "url": "https://b.example/"}), observation="...")
SEARCH_PAGE = Step(0, "go", (), (), ToolCall("web_search", {"page": "2", "query": "mayor of Bado"}), observation="...")
CLICK = Step(0, "go", (), (), ToolCall("move", {"x": "1", "y": "2"}), observation="...")
READ = [search("Bado Keli home", SHARED), visit("person Bado Keli", HOME_PAGE)]
WRONG = [search("x", SHARED), visit("river Bado Keli", WRONG_PAGE)]
SECOND = "2 results\n1. river Zano Pile: mouth: city Kalo Ne\n2. city Zano Pile: mayor: person Old Mayor"

ACTION_CASES = [
    ("short", [], search("Bado Keli home", ""), "search_short"),
    ("four words are short", [], search("Bado Keli home now", ""), "search_short"),
    ("long", [], search("mayor of the home of person Bado Keli", ""), "search_long"),
    ("search for a listed title", [search("x", SHARED)], search("person Bado Keli", ""), "search_short"),
    ("first, does not fit", [search("x", SHARED)], visit("river Bado Keli", ""), "open_first"),
    ("fits the question", [search("x", SHARED)], visit("person Bado Keli", ""), "open_fitting"),
    ("fits, rank 1", [search("x", ONE)], visit("Person  BADO Keli", ""), "open_fitting"),
    ("markup of titles", [search("x", SHARED)], visit('**"person Bado Keli"**', ""), "open_fitting"),
    ("other", [search("x", DIFFERENT)], visit("city Bado Miro", ""), "open_other"),
    ("second hop, named by the page", [*READ, search("Zano Pile mayor", SECOND)], visit("city Zano Pile", ""), "open_fitting"),
    ("second hop, first", [*READ, search("Zano Pile mayor", SECOND)], visit("river Zano Pile", ""), "open_first"),
    ("named by the step before", [search("x", SECOND, "need city Zano Pile")], visit("city Zano Pile", ""), "open_fitting"),
    ("own thought does not count", [search("x", SECOND)], visit("river Zano Pile", "", "open river Zano Pile"), "open_first"),
    ("back to an earlier listing", WRONG, visit("person Bado Keli", ""), "open_fitting"),
    ("pointed", [visit("person Bado Keli", REDIRECT)], visit("person Sito Lan", ""), "open_pointed"),
    ("linked", READ, visit("city Zano Pile", ""), "open_linked"),
    ("unlisted", READ, visit("city Nowhere Atall", ""), "open_unlisted"),
    ("repeat", [search("x", SHARED)], search("X", ""), "repeat"),
    ("back to an earlier search", WRONG, search("X", ""), "search_short"),
    ("after a refusal nothing is repeated", [search("x", SHARED), malformed()], search("X", ""), "search_short"),
    ("same argument, other tool", [search("person Bado Keli", ONE)], visit("person Bado Keli", ""), "open_fitting"),
    ("run", [], PYTHON, "use_tool"),
    ("an address beside a goal", [search("x", LISTED)], BY_ADDRESS, "open_other"),
    ("words beside a number", [], SEARCH_PAGE, "search_short"),
    ("several arguments that tell nothing", [], CLICK, "use_tool"),
    ("unknown tool opens a listed title", [search("x", SHARED)], UNKNOWN_OPEN, "open_first"),
    ("told by the environment", [], replace(search("x", SHARED), features={"did": "go on"}), "did:go on"),
    ("unknown tool", [search("x", SHARED)], UNKNOWN_SEARCH, "use:consult"),
    ("highest row", [visit("x", ROWS)], answer("Rato Miku"), "answer_highest"),
    ("lowest row", [visit("x", ROWS)], answer("Sito Lan"), "answer_lowest"),
    ("first row", [visit("x", ROWS)], answer("Zano Pile"), "answer_top"),
    ("another row", [visit("x", f"{ROWS}\nmayor: year 5 person Gani Tol")], answer("Gani Tol"), "answer_bottom"),
    ("from listing", [search("x", SHARED)], answer("Zano Pile"), "answer_listed"),
    ("from page", READ, answer("zano pile"), "answer_page"),
    ("from an earlier page", [*READ, search("y", "no results")], answer("Sito Lan"), "answer_page"),
    ("on a page and in the last listing", [*READ, search("y", SECOND)], answer("Zano Pile"), "answer_listed"),
    ("from an earlier listing", [search("x", DIFFERENT), search("y", "no results")], answer("Rato Miku"), "answer_listed"),
    ("unseen", READ, answer("Rato Miku"), "answer_unseen"),
    ("part of a word is not seen", READ, answer("Zano Pil"), "answer_unseen"),
    ("name of a missing page", [visit("city Bado Kela", "no page named city Bado Kela")], answer("Bado Kela"), "answer_unseen"),
    ("empty", READ, answer(" "), "answer_unseen"),
    ("malformed", [], malformed(), "malformed"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("before", "step", "expected"), [case[1:] for case in ACTION_CASES], ids=[case[0] for case in ACTION_CASES]
)
def test_actions(before: list[Step], step: Step, expected: str) -> None:
    assert action(QUESTION, before, step) == expected


def test_every_action_value_has_a_case() -> None:
    assert {case[3].split(":")[0] for case in ACTION_CASES} == {name.split(":")[0] for name in ACTIONS}


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("No results", "empty"),
        ("nothing found", "empty"),
        ("no matches for 'x'", "empty"),
        ("404 page not found", "missing"),
        ("Error: connection refused", "missing"),
        ("HTTPError 500", "missing"),
        ("request timed out", "missing"),
        ("- Alpha\n- Beta\n- Gamma", "listing"),
        ("* Alpha\n* Beta", "listing"),
        ("[1] Alpha\n[2] Beta", "listing"),
        ("10 results for 'x'\n1. Alpha - a letter\nhttp://a.b/c\n2. Beta - another\nhttp://a.b/d", "listing"),
        ("page: Alpha\n- one\n- two\n- three", "page"),
        ("Alpha is a letter. The error was not found until later, so it stands in this text.\nMore.\nMore.", "page"),
        ("Redirect to: Alpha", "redirect"),
        ("moved permanently to Alpha", "redirect"),
        ("page: Alpha\nSee also: Beta", "redirect"),
        ("page: Alpha\nfounded: long ago\nSee also: Beta", "page"),
        ("page: Alpha\nsee: Beta\nlast step: answer now", "redirect"),
    ],
)
def test_observation_kinds(text: str, kind: str) -> None:
    assert parse_observation(text).kind == kind


def test_entries_are_matched_by_title_beginning_and_address() -> None:
    first, second = parse_observation(
        "2 results\n1. [Alpha: a history](https://a.org/x) old\n2. **Beta** - another\nhttps://b.org/y?z=1"
    ).entries
    assert first.matches("alpha")
    assert first.matches("Alpha: a history")
    assert not first.matches("Alp")
    assert first.matches("https://a.org/x")
    assert second.matches("beta")
    assert second.matches("https://b.org/y?z=1")
    assert not second.matches("")


@pytest.mark.parametrize(
    ("question", "head", "relations"),
    [
        (QUESTION, "mayor", {"home"}),
        ("What is the home of person Bado Keli?", "home", set()),
        ("What is the stream of the home of the mate of person X Y?", "stream", {"home", "mate"}),
        ("Who founded the company that owns Acme?", "founded", {"company"}),
        ("Which rivers cross Paris?", "river", set()),
        ("Which rivers flow through Old Town of Paris?", "river", {"flow"}),
        ("What?", "", set()),
        ("", "", set()),
    ],
)
def test_head_and_relation_words(question: str, head: str, relations: set[str]) -> None:
    parsed = parse_question(question)
    assert parsed.head == head
    assert relations <= parsed.relations
    assert head not in parsed.relations
    assert not parsed.relations & {"bado", "keli", "person"}


def test_evidence_in_prose_and_not_in_titles_or_values() -> None:
    prose = visit("a", "page: Zano Pile\nZano Pile is a town. Its mayor since spring is Rato Miku, who lives there.")
    assert features(QUESTION, [prose])["evidence"] == "asked"
    title = visit("a", "page: the mayor of Zano Pile\nfounded: long ago")
    assert features(QUESTION, [title])["evidence"] == "none"
    value = visit("a", "page: Zano Pile\nrole: mayor")
    assert features(QUESTION, [value])["evidence"] == "none"
    statement = visit("a", "page: Zano Pile\nnote: since last spring the mayor of the town is Rato Miku")
    assert features(QUESTION, [statement])["evidence"] == "asked"
    one_line = search("a", "1 result\n1. city Zano Pile: stream: river Bado Keli mayor: person Rato Miku")
    assert features(QUESTION, [one_line])["evidence"] == "asked"


def test_walk_leaves_out_the_step_without_a_choice() -> None:
    steps = [search("Bado Keli", ONE), search("Bado Keli home", f"{ONE}\nlast step: answer now"), answer("Zano Pile")]
    found = walk(trajectory("t", 0, steps, 1.0))
    assert [name for _, name in found] == ["search_short", "search_short"]
    assert answer_demanded(QUESTION, steps[:2])
    assert not answer_demanded(QUESTION, steps[:1])
    assert answer_demanded(f"{QUESTION}\nlast step: answer now", [])
    assert strip_last_step(f"{QUESTION}\nlast step: answer now") == QUESTION
    assert strip_last_step("the last step: was hard\nmore") == "the last step: was hard\nmore"


@pytest.mark.parametrize(
    "line",
    ["Last step: let it cool for an hour.", "last step: answer nowhere", "Last step: answer now", "> last step: answer now"],
)
def test_a_page_that_speaks_of_a_last_step_demands_no_answer(line: str) -> None:
    page = visit("pie", plain(f"page: pie\nmayor: Rato Miku\n{line}"))
    assert not answer_demanded(QUESTION, [page])
    assert not answer_demanded(f"{QUESTION}\n{plain(line)}", [])
    assert strip_last_step(page.observation or "") == page.observation
    assert [choice.step for choice in choices(trajectory("t", 0, [page, replace(answer("Rato Miku"), index=1)], 1.0))] == [0, 1]


TEXT = st.text(alphabet=st.sampled_from("ab AB:.\n1-*[]() noresult page see"), max_size=60)
STEPS = st.lists(
    st.one_of(
        st.builds(search, TEXT, TEXT, TEXT),
        st.builds(visit, TEXT, TEXT, TEXT),
        st.builds(malformed, TEXT),
        st.builds(answer, TEXT),
    ),
    max_size=6,
)


@settings(deadline=None)
@given(st.one_of(TEXT, st.just(QUESTION)), STEPS)
def test_any_transcript_has_features_and_the_transcript_agrees_with_the_function(question: str, steps: list[Step]) -> None:
    transcript = Tracker(question)
    for place, step in enumerate(steps):
        state = transcript.features()
        assert state == features(question, steps[:place])
        assert state["observation"] in OBSERVATIONS
        assert (state["listed"] == "none") == (state["observation"] != "listing")
        assert transcript.action(step) == action(question, steps[:place], step)
        transcript.append(step)


@settings(deadline=None)
@given(st.just(QUESTION), STEPS)
def test_what_is_longer_ago_is_told_on_top_of_the_rest(question: str, steps: list[Step]) -> None:
    told = features(question, steps, history=True)
    assert {name: told[name] for name in FEATURES} == features(question, steps)
    assert tuple(told) == (*FEATURES, *HISTORY)
    assert told["led"] == (action(question, steps[:-1], steps[-1]) if steps else "none")


@pytest.mark.parametrize(
    ("steps", "led", "in_row", "shown"),
    [
        ([], "none", "none", "no"),
        ([search("x", "no results")], "search_short", "once", "no"),
        ([search("x", "no results"), search("a b c d e", "nothing found")], "search_long", "twice", "no"),
        ([search(str(n), "no results") for n in range(3)], "search_short", "more", "no"),
        ([search(str(n), "no results") for n in range(5)], "search_short", "more", "no"),
        ([search("x", "no results"), search("y", ONE), search("z", "no results")], "search_short", "once", "no"),
        ([search("x", "no results"), malformed(), search("y", "no results")], "search_short", "once", "no"),
        ([search("x", "no results"), search("x", "no results")], "repeat", "twice", "no"),
        ([malformed(), malformed()], "malformed", "twice", "no"),
        ([visit("city Zano Pile", MAYOR_PAGE)], "open_unlisted", "once", "no"),  # the last observation is told by `evidence`
        ([visit("city Zano Pile", MAYOR_PAGE), search("x", "no results")], "search_short", "once", "yes"),
    ],
)  # fmt: skip
def test_a_sequence_a_count_and_what_was_shown(steps: list[Step], led: str, in_row: str, shown: str) -> None:
    state = features(QUESTION, steps, history=True)
    assert (state["led"], state["in_row"], state["shown"]) == (led, in_row, shown)


def test_the_same_in_a_row_is_all_that_the_environment_says() -> None:
    room = {"did": "go on", "exits": "one"}
    rooms = [replace(search("go", "a room"), features=own) for own in (room, room, room | {"exits": "two"})]
    assert [features(QUESTION, rooms[:n], history=True)["in_row"] for n in (1, 2, 3)] == ["once", "twice", "once"]
    assert features(QUESTION, rooms, history=True)["led"] == "did:go on"


@settings(deadline=None)
@given(st.text(max_size=80))
def test_normalised_is_idempotent(text: str) -> None:
    assert normalised(normalised(text)) == normalised(text)


FAILED = {"result": "an error"}


def test_what_the_environment_says_takes_the_place_of_what_the_text_looks_like() -> None:
    listed = replace(search("Bado Keli", SHARED), features=FAILED)
    state = features(QUESTION, [listed])
    assert state["env:result"] == "an error"
    assert (state["observation"], state["listed"], state["shared_name"], state["evidence"]) == (
        "described",
        "none",
        "no",
        "none",
    )
    assert "env:result" not in features(QUESTION, [search("Bado Keli", SHARED)])
    assert "env:result" not in features(QUESTION, [listed, malformed()])


def test_calls_in_a_described_environment_are_told_by_their_tool() -> None:
    first = replace(search("Bado Keli", SHARED), features=FAILED)
    assert action(QUESTION, [], first) == "use:search"
    refused = replace(visit("person Bado Keli", ""), problem="there is no tool visit")
    assert action(QUESTION, [first], refused) == "malformed"
    assert action(QUESTION, [first], visit("person Bado Keli", "")) == "use:visit"
    assert action(QUESTION, [first], first) == "repeat"
    assert action(QUESTION, [replace(first, observation="rows\nRato Miku")], answer("Rato Miku")) == "answer_page"


def test_a_call_is_told_by_what_the_environment_says_that_it_did() -> None:
    first = replace(search("go north", "a room"), features={"did": "go on", "exits": "one"})
    assert action(QUESTION, [], first) == action(QUESTION, [first], first) == "did:go on"
    assert action(QUESTION, [first], replace(first, problem="no")) == "malformed"
    assert {name for name in features(QUESTION, [first]) if name.startswith("env:")} == {"env:exits"}


def test_what_could_be_done_is_told_by_the_step_before_and_is_no_situation() -> None:
    first = replace(search("go north", "a room"), features={"did": "go on", "can": "go on; take it"})
    last = replace(search("take it", "won"), features={"did": "take it", "can": ""})
    walked = choices(trajectory("t", 0, [first, last, last], 1.0))
    assert [choice.possible for choice in walked] == [None, {"did:go on", "did:take it"}, {"did:"}]
    assert [choice.action for choice in walked] == ["did:go on", "did:take it", "did:take it"]
    assert not any("can" in name for choice in walked for name in choice.state)
    assert [walked[1].allows(one) for one in ("did:take it", "did:fly", "use:act")] == [True, False, True]
    assert walked[0].allows("did:fly")  # nothing is known


def test_calls_with_numbers_and_lists_are_compared_as_text() -> None:
    step = Step(0, "", (), (), ToolCall("move", {"by": 2, "path": ["a", 1]}), observation="moved")
    again = replace(step, call=ToolCall("move", {"path": ["a", 1], "by": 2}))
    assert features(QUESTION, [step, again])["repeat"] == "yes"
    assert features(QUESTION, [step, replace(step, call=ToolCall("move", {"by": 3, "path": ["a", 1]}))])["repeat"] == "no"
