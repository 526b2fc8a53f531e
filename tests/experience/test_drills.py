"""Drills: random advice about the situation of a step."""

from __future__ import annotations

from dataclasses import replace

from evolve_dag.experience.drills import drills
from evolve_dag.experience.phrases import action_of, split
from evolve_dag.records import Step, ToolCall, Trajectory

QUESTION = "What is the mayor of city Bado Keli?"


def episode(name: str, calls: list[ToolCall | None]) -> Trajectory:
    steps = tuple(
        Step(n, "", (1,), (), call, observation="no results") if call else Step(n, "", (1,), (), answer="x")
        for n, call in enumerate(calls)
    )
    return Trajectory(f"{name}#0", name, 0, 0, "", QUESTION, steps, "answered")


SHORT, LONG = ToolCall("search", {"query": "Bado"}), ToolCall("search", {"query": "the mayor of the city Bado Keli please"})
EPISODES = [episode("a", [SHORT, LONG, None]), episode("b", [LONG, SHORT, None]), episode("c", [SHORT, None])]


def test_none_without_a_share():
    assert drills(EPISODES, 0.0, 1) == {}


def test_every_step_is_advised_something_that_somebody_did_there():
    texts = drills(EPISODES, 1.0, 1)
    assert set(texts) == {(t.id, s.index) for t in EPISODES for s in t.steps}
    first = {action_of(texts[t.id, 0]) for t in EPISODES}
    assert first <= {"search_short", "search_long"}
    assert {split(texts["a#0", 1])[1]} == {"a search returns no results"}


def test_a_share_is_a_part_of_all_and_does_not_depend_on_the_order():
    some = drills(EPISODES, 0.5, 3)
    assert 0 < len(some) < 8
    assert some.items() <= drills(EPISODES, 1.0, 3).items()
    assert drills(EPISODES[::-1], 0.5, 3) == some
    assert drills(EPISODES, 0.5, 4) != some


def test_where_only_one_thing_was_done_there_is_nothing_to_choose():
    assert drills([episode("a", [SHORT, None]), episode("b", [SHORT, None])], 1.0, 1) == {}


def test_the_call_that_is_announced_as_the_last_has_no_drill():
    told = episode("e", [SHORT, None])
    last = Trajectory(
        "d#0", "d", 0, 0, "", QUESTION,
        (Step(0, "", (1,), (), LONG, observation="no results\nlast step: answer now"), Step(1, "", (1,), (), answer="x")),
        "forced",
    )  # fmt: skip
    assert ("d#0", 1) not in drills([told, last, *EPISODES], 1.0, 1)


def test_a_step_without_a_choice_moves_no_drill_to_another_step():
    steps = [
        Step(0, "", (1,), (), SHORT, observation="no results\nlast step: answer now"),
        Step(1, "", (1,), (), SHORT, observation="page: a\nmayor: person X"),
    ]
    ends = [Step(2, "", (1,), (), answer="X"), replace(steps[1], index=2)]
    told = [replace(EPISODES[0], id=f"{n}#0", steps=(*steps, end)) for n, end in enumerate(ends)]
    texts = drills([*told, *EPISODES], 1.0, 1)
    assert ("0#0", 1) not in texts
    assert split(texts["0#0", 2])[1] == "the page shows the asked value"


def test_a_step_after_which_an_environment_says_nothing_of_its_state_is_left_out():
    """``{"did": ...}`` alone is allowed (docs/extending.md), and describes no situation."""
    calls = [Step(n, "", (1,), (), SHORT, observation="ok", features={"did": did}) for n, did in enumerate(("look", "go on"))]
    game = Trajectory("g#0", "g", 0, 0, "", QUESTION, (*calls, Step(2, "", (1,), (), answer="x")), "answered")
    assert drills([*EPISODES, game], 1.0, 1).keys() == drills(EPISODES, 1.0, 1).keys() | {("g#0", 0)}
