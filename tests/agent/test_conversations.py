"""Episodes that are a conversation: text is a turn, and an answer only where the environment ends with it."""

from __future__ import annotations

import pytest
from stateful_worlds import Guesses
from test_sessions import run

from evolve_dag.agent.actions import parse_turn
from evolve_dag.plain import LAST_STEP
from evolve_dag.protocols import ToolSpec
from evolve_dag.records import REPLY, Message

PEEK = ToolSpec("peek", "A hint.")
CALL = 'let me see\n<tool_call>{"name": "peek", "arguments": {}}</tool_call>'


def test_what_is_said_goes_to_the_environment_whole_and_the_last_word_is_the_answer() -> None:
    world = Guesses()
    t = run(["<think>hm</think> 3", "<answer>4</answer>", "7"], world)
    assert (t.status, t.answer, t.reward, t.question) == ("answered", "7", 1.0, "Which number from 1 to 9?")
    assert [(name, text) for name, text, _ in world.opened[0].heard] == [
        (REPLY, "3"),
        (REPLY, "<answer>4</answer>"),
        (REPLY, "7"),
    ]
    assert [step.call and step.call.name for step in t.steps] == [REPLY, REPLY, None]
    assert not t.offers_tools
    assert [c.text for *_, c in world.opened[0].heard] == [step.text for step in t.steps]
    assert t.history(2)[2:] == (
        Message("assistant", "<think>hm</think> 3"),
        Message("user", "no"),
        Message("assistant", "<answer>4</answer>"),
        Message("user", "no"),
    )


def test_tools_are_called_beside_the_talk() -> None:
    world = Guesses((PEEK,))
    t = run([CALL, '<tool_call>{"name": "look"}</tool_call>', "it is 7"], world)
    assert [name for name, *_ in world.opened[0].heard] == ["peek", REPLY]
    assert t.steps[1].problem == "the tool call has no arguments"
    assert t.offers_tools
    assert [m.role for m in t.history(2)[2:]] == ["assistant", "tool", "assistant", "tool"]
    assert (t.status, t.answer, t.reward) == ("answered", "it is 7", 1.0)


@pytest.mark.parametrize(("last", "status", "answer"), [("7", "forced", "7"), ("8", "unanswered", None)])
def test_the_last_turn_is_heard_too(last: str, status: str, answer: str | None) -> None:
    t = run(["1", last], Guesses(), max_steps=2)
    assert (t.status, t.answer, t.reward, t.turns) == (status, answer, float(last == "7"), 2)
    assert (t.steps[0].observation or "").splitlines() == ["no", LAST_STEP]
    assert t.steps[1].observation is None


def test_tags_are_text_where_there_are_no_tools() -> None:
    assert parse_turn(CALL, ()).call == parse_turn(f" {CALL}\n", ()).call
    assert parse_turn(CALL, (PEEK,)).thought == "let me see"
    assert parse_turn("<answer><tool_call></answer>", (PEEK,)).call is not None
