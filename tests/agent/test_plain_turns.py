"""Plain turns: each is a call of the tool that takes them; what is said is the answer where the episode ends with it."""

from __future__ import annotations

import pytest
from stateful_worlds import Guesses
from test_sessions import run

from evolve_dag.agent.actions import parse_action
from evolve_dag.plain import LAST_STEP
from evolve_dag.protocols import TALK, ToolSpec
from evolve_dag.records import REPLY, Message, ToolCall

PEEK = ToolSpec("peek", "A hint.")
ACT = ToolSpec("act", "A command.", {"command": "what to do"}, plain="command")
CALL = 'let me see\n<tool_call>{"name": "peek", "arguments": {}}</tool_call>'


def test_what_is_said_goes_to_the_environment_whole_and_the_last_word_is_the_answer() -> None:
    world = Guesses()
    t = run(["<think>hm</think> 3", "<answer>4</answer>", "7"], world)
    assert (t.status, t.answer, t.reward, t.question) == ("answered", "7", 1.0, "Which number from 1 to 9?")
    assert world.opened[0].heard == [ToolCall(REPLY, {"text": said}) for said in ("3", "<answer>4</answer>", "7")]
    assert [step.call and step.call.name for step in t.steps] == [REPLY, REPLY, None]
    assert world.opened[0].turns == [step.text for step in t.steps]
    assert not t.offers_tools
    assert t.history(2)[2:] == (
        Message("assistant", "<think>hm</think> 3"),
        Message("user", "no"),
        Message("assistant", "<answer>4</answer>"),
        Message("user", "no"),
    )


def test_tools_are_called_beside_the_talk() -> None:
    world = Guesses((PEEK, TALK))
    wrong = ['{"name": "look"}', '{"name": "look", "arguments": {}}', '{"name": "reply", "arguments": {}}']
    t = run([CALL, *(f"<tool_call>{call}</tool_call>" for call in wrong), "it is 7"], world)
    assert [call.name for call in world.opened[0].heard] == ["peek", REPLY]
    assert world.opened[0].turns == [CALL, "it is 7"]
    assert t.offers_tools
    assert [step.problem for step in t.steps[1:4]] == [
        "the tool call has no arguments",
        "there is no tool look; the tools are: peek",
        "the argument text is missing; reply takes text",
    ]
    assert [m.role for m in t.history(2)[2:]] == ["assistant", "tool", "assistant", "tool"]
    assert (t.status, t.answer, t.reward) == ("answered", "it is 7", 1.0)


@pytest.mark.parametrize(("last", "status", "answer"), [("7", "forced", "7"), ("8", "unanswered", None)])
def test_the_last_turn_is_heard_too(last: str, status: str, answer: str | None) -> None:
    t = run(["1", last], Guesses(), max_steps=2)
    assert (t.status, t.answer, t.reward, t.turns) == (status, answer, float(last == "7"), 2)
    assert (t.steps[0].observation or "").splitlines() == ["no", LAST_STEP]
    assert t.steps[1].observation is None


@pytest.mark.parametrize("text", ["go east", "", "<answer>east</answer>", CALL, "<tool_call> go"])
def test_where_no_other_tool_is_there_everything_is_a_plain_turn(text: str) -> None:
    assert parse_action(f"<think>hm</think> {text}\n", (ACT,)).call == ToolCall("act", {"command": text})


def test_reasoning_that_was_cut_off_is_no_command() -> None:
    assert parse_action("<think>go north or", (ACT,)).call == ToolCall("act", {"command": ""})


def test_beside_other_tools_only_what_calls_one_is_no_plain_turn() -> None:
    for tools in ((PEEK, ACT), (ACT, PEEK)):
        assert parse_action(CALL, tools).thought == "let me see"
        assert parse_action(CALL, tools).call == ToolCall("peek", {})
        assert parse_action("<tool_call> go", tools).problem == "the tool call is not closed"
        for text in ("go east", "<answer><tool_call></answer>"):
            assert parse_action(text, tools).call == ToolCall("act", {"command": text})
