"""The action grammar, by cases and by fuzzing."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolve_dag.agent.actions import NO_ACTION, ParsedAction, _enclosed, explain, parse_action, said, validate_call
from evolve_dag.errors import DataError
from evolve_dag.inference.chat import GRAMMAR_TAGS
from evolve_dag.protocols import ToolSpec
from evolve_dag.records import ToolCall

PLACES = ToolSpec(
    "go",
    "walk",
    schema={
        "type": "object",
        "properties": {
            "to": {"type": "array", "items": {"type": "string"}, "maxItems": 2},
            "how": {"enum": ["walk", "run"]},
            "far": {"type": "number"},
        },
        "minProperties": 1,
        "additionalProperties": False,
    },
)
TOOLS = (ToolSpec("search", "find pages", {"query": "words"}), ToolSpec("visit", "read a page", {"page": "title"}))


def called(body: str, before: str = "", after: str = "") -> str:
    return f"{before}<tool_call>\n{body}\n</tool_call>{after}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            called('{"name": "search", "arguments": {"query": "Bado Keli mayor"}}', "look it up\n"),
            ParsedAction("look it up", ToolCall("search", {"query": "Bado Keli mayor"})),
        ),
        ("<answer>Rato Miku</answer>", ParsedAction("", answer="Rato Miku")),
        ("seen it\n<answer>\n Rato Miku \n</answer>", ParsedAction("seen it", answer="Rato Miku")),
        (
            "<think>\nmaybe <answer>no</answer>\n</think>\n<answer>Rato</answer>",
            ParsedAction("maybe <answer>no</answer>", answer="Rato"),
        ),
        (
            called('{"name": "visit", "arguments": {"page": "a", "n": 1.50, "deep": true}, "id": 7}'),
            ParsedAction("", ToolCall("visit", {"page": "a", "n": "1.50", "deep": "true"})),
        ),
        (called('{"name": "now", "arguments": {}}', after=" and then"), ParsedAction("", ToolCall("now", {}))),
        (
            called('{"name": "search", "arguments": {"query": "what is <answer>?"}}'),
            ParsedAction("", ToolCall("search", {"query": "what is <answer>?"})),
        ),
        (
            called('{"name": "search", "arguments": {"query": "what is <think>?"}}'),
            ParsedAction("", ToolCall("search", {"query": "what is <think>?"})),
        ),
        ("<think>so <answer>Rato</answer> or", ParsedAction("so <answer>Rato</answer> or", problem=NO_ACTION)),
        ("<think>a</think>b <think>" + called("{}"), ParsedAction("ab " + called("{}"), problem=NO_ACTION)),
        ("", ParsedAction("", problem="there is no tool call and no answer")),
        ("Rato Miku", ParsedAction("Rato Miku", problem="there is no tool call and no answer")),
        ("<answer> </answer>", ParsedAction("", problem="the answer is empty")),
        ("<answer>a</answer><answer>b</answer>", ParsedAction("", problem="there are 2 answers")),
        ("so <answer>Rato", ParsedAction("so", problem="the answer is not closed")),
        ("Rato</answer>", ParsedAction("Rato", problem="the answer is closed but never opened")),
        ('<tool_call>{"name": "search"', ParsedAction("", problem="the tool call is not closed")),
        ("}</tool_call>", ParsedAction("}", problem="the tool call is closed but never opened")),
        (
            called('{"name": "a", "arguments": {}}') + called('{"name": "b", "arguments": {}}'),
            ParsedAction("", problem="there are 2 tool calls, none was made"),
        ),
        (
            called('{"name": "a", "arguments": {}}') + "<answer>x</answer>",
            ParsedAction("", problem="there are both a tool call and an answer"),
        ),
        (
            called('{"name": "a", "arguments": {}}') + "<tool_call>",
            ParsedAction("", problem="the tool call is not closed"),
        ),
        (called("search Bado"), ParsedAction("", problem="the tool call is not valid json")),
        (called("[1]"), ParsedAction("", problem="the tool call is not a json object")),
        (called("[" * 100_000), ParsedAction("", problem="the tool call is not valid json")),
        (called('{"arguments": {}}'), ParsedAction("", problem="the tool call has no name")),
        (called('{"name": null, "arguments": {}}'), ParsedAction("", problem="the tool call has no name")),
        (called('{"name": "search"}'), ParsedAction("", problem="the tool call has no arguments")),
        (called('{"name": "search", "arguments": "Bado"}'), ParsedAction("", problem="the arguments are not a json object")),
        (
            called('{"name": "search", "arguments": {"query": ["a"]}}'),
            ParsedAction("", problem="the argument query is a list, it must be text"),
        ),
        (
            called('{"name": "search", "arguments": {"query": {"a": 1}}}'),
            ParsedAction("", problem="the argument query is an object, it must be text"),
        ),
        (
            called('{"name": "search", "arguments": {"query": null}}'),
            ParsedAction("", problem="the argument query is null, it must be text"),
        ),
        (
            called('{"name": "search", "arguments": {"query": "\\ud800"}}'),
            ParsedAction("", problem="the tool call holds characters that are not text"),
        ),
    ],
)
def test_cases(text: str, expected: ParsedAction) -> None:
    assert parse_action(text) == expected


SPEAKS = '{"name": "search", "arguments": {"query": "what is </think>?"}}'
PRINTS = '{"name": "search", "arguments": {"query": "</think>\\n<tool_call> </think> <answer>5</answer>"}}'
FOUND = ToolCall("search", {"query": "what is </think>?"})
PLAIN = called('{"name": "now", "arguments": {}}')


@pytest.mark.parametrize("before", ["", "<think>hm</think>", "hm</think>", "<think>a</think>b <think>hm</think>"])
@pytest.mark.parametrize(
    ("text", "call", "answer"),
    [
        (called(SPEAKS), FOUND, None),
        (called(PRINTS), ToolCall("search", {"query": "</think>\n<tool_call> </think> <answer>5</answer>"}), None),
        ("<answer>it ends with </think></answer>", None, "it ends with </think>"),
        ("<answer>between <think> and </think></answer>", None, "between <think> and </think>"),
    ],
)
def test_a_call_and_an_answer_may_speak_of_the_end_of_reasoning(
    before: str, text: str, call: ToolCall | None, answer: str | None
) -> None:
    action = parse_action(before + text)
    assert (action.call, action.answer, action.problem) == (call, answer, None)
    assert action.thought == before.rpartition("</think>")[0].replace("<think>", "")
    assert said(before + text) == text


@pytest.mark.parametrize("opened", ["<think>", ""])  # a template may have opened it in the prompt
@pytest.mark.parametrize(
    "draft",
    [
        "maybe <answer>no</answer>",
        f"maybe {PLAIN}",
        f"maybe {called(SPEAKS)} or {called(PRINTS)}",
        "an <answer> perhaps",
        "a <tool_call> perhaps",
        "<answer>no</answer>, an <answer>",
        f"{PLAIN} or a <tool_call>",
        "both, <tool_call> and <answer>",
        "it ends with </tool_call> or </answer>",
        "one </think> and another",
    ],
)
def test_reasoning_may_draft_what_it_likes(opened: str, draft: str) -> None:
    for text, call, answer in (
        (called(SPEAKS), FOUND, None),
        (PLAIN, ToolCall("now", {}), None),
        ("<answer>5</answer>", None, "5"),
    ):
        action = parse_action(f"{opened}{draft}</think>\n{text}")
        assert (action.thought, action.call, action.answer) == (draft, call, answer)
    if "</think>" not in draft:
        assert parse_action(f"<think>a</think><think>{draft}").problem == NO_ACTION, "cut off"


fragments = st.sampled_from(
    [
        *GRAMMAR_TAGS,
        '{"name": "search", "arguments": {"query": "x"}}',
        '{"name":',
        "}",
        '"arguments"',
        "[[",
        "\\ud800",
        "1e999",
        "NaN",
        "\n",
    ]
)


@given(st.lists(fragments | st.text(max_size=8), max_size=10).map("".join))
@settings(max_examples=200, deadline=None)
def test_never_raises_and_says_exactly_one_thing(text: str) -> None:
    action = parse_action(text)
    assert sum(part is not None for part in (action.call, action.answer, action.problem)) == 1
    if action.call is not None:
        assert all(isinstance(value, str) for value in action.call.arguments.values())
        validate_call(action.call, TOOLS)
    if action.problem is not None:
        assert not any(tag in explain(action.problem) for tag in GRAMMAR_TAGS)
        assert len(explain(action.problem)) < 250


names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)


@given(name=names, arguments=st.dictionaries(names, st.text(st.characters(exclude_categories=["Cs"]), max_size=20), max_size=4))
@settings(max_examples=200, deadline=None)
def test_round_trip(name: str, arguments: dict[str, str]) -> None:
    body = json.dumps({"name": name, "arguments": arguments}).replace("<", "\\u003c")  # as a careful writer escapes tags
    assert parse_action(called(body, "because ")) == ParsedAction("because", ToolCall(name, arguments))


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (ToolCall("search", {"query": "a"}), None),
        (ToolCall("serach", {"query": "a"}), "there is no tool serach; the tools are: search, visit"),
        (ToolCall("search", {}), "the argument query is missing; search takes query"),
        (ToolCall("search", {"q": "a"}), "the argument query is missing; search takes query"),
        (ToolCall("search", {"query": "a", "limit": "3"}), "the argument limit is unknown; search takes query"),
    ],
)
def test_validate(call: ToolCall, expected: str | None) -> None:
    assert validate_call(call, TOOLS) == expected


def test_a_made_up_name_is_not_repeated_at_length() -> None:
    problem = validate_call(ToolCall("x\n" * 500, {}), TOOLS)
    assert problem is not None
    assert len(problem) < 120
    assert "\n" not in problem


tags = st.lists(st.sampled_from(["<tool_call>", "</tool_call>", "<answer>", "</answer>", "x", "<", "\n"]), max_size=14).map(
    "".join
)


@given(tags)
@settings(max_examples=300, deadline=None)
def test_what_is_enclosed_is_what_a_lazy_pattern_finds(text: str) -> None:
    lazy = re.compile(r"<(tool_call|answer)>(.*?)</\1>", re.S)  # takes quadratic time where tags are not closed
    calls, answers = ([inside for tag, inside in lazy.findall(text) if tag == wanted] for wanted in ("tool_call", "answer"))
    assert _enclosed(text) == (calls, answers, lazy.sub("", text))


def test_tags_inside_of_a_call_or_an_answer_are_its_content() -> None:
    program = "print('<answer>', 5, '</answer>')"
    call = json.dumps({"name": "python", "arguments": {"code": program}})
    assert parse_action(f"<tool_call>\n{call}\n</tool_call>").call == ToolCall("python", {"code": program})
    assert parse_action("<answer>It is <tool_call></tool_call></answer>").answer == "It is <tool_call></tool_call>"
    both = parse_action(f"<answer>5</answer><tool_call>\n{call}\n</tool_call>")
    assert both.problem == "there are both a tool call and an answer"


def test_arguments_of_a_tool_with_a_schema_keep_their_types() -> None:
    text = called('{"name": "go", "arguments": {"to": ["a", "b"], "far": 1.50}}')
    call = parse_action(text, (*TOOLS, PLACES)).call
    assert call == ToolCall("go", {"to": ["a", "b"], "far": 1.5})
    assert call.texts == {"to": '["a", "b"]', "far": "1.5"}
    assert validate_call(call, (*TOOLS, PLACES)) is None
    assert parse_action(text, TOOLS).problem == "the argument to is a list, it must be text"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ('{"to": "a"}', "the argument to must be array; go takes to, how, far"),
        ('{"to": ["a", 1]}', "the argument to.1 must be string"),
        ('{"to": ["a", "b", "c"]}', "the argument to must keep to maxItems 2"),
        ('{"how": "fly"}', "the argument how must be one of walk, run"),
        ('{"where": 1}', "the argument where is unknown"),
        ("{}", "the arguments must keep to minProperties 1"),
        ('{"far": 1e999}', "out of range"),
        ('{"far": NaN}', "out of range"),
        (f'{{"far": {"9" * 5000}}}', "out of range"),
        (f'{{"to": {"[" * 100}{"]" * 100}}}', "nested too deeply"),
        ('{"how": "\\ud83d"}', "characters that are not text"),
    ],
)
def test_a_breach_of_the_schema_is_said_in_words(arguments: str, says: str) -> None:
    action = parse_action(called(f'{{"name": "go", "arguments": {arguments}}}'), (PLACES,))
    problem = action.problem if action.call is None else validate_call(action.call, (PLACES,))
    assert problem is not None
    assert says in problem


@pytest.mark.parametrize(
    ("schema", "says"),
    [
        ({"type": "objekt"}, "tool go: its schema is wrong"),
        ({"type": "string"}, "not that of an object"),
        (
            {"type": "object", "properties": {"n": {"items": {"$ref": "#/$defs/N"}}}},
            r"tool go: its schema holds no '#/\$defs/N'",
        ),
        ({"type": "object", "properties": {"n": {"$ref": "https://example.org/n"}}}, "holds no 'https://example.org/n'"),
    ],
)
def test_a_tool_with_a_wrong_schema_is_refused_when_it_is_made(schema: dict[str, Any], says: str) -> None:
    with pytest.raises(DataError, match=says):
        ToolSpec("go", "walk", schema=schema)


def test_a_schema_may_name_its_own_parts() -> None:
    inner = {"$defs": {"N": {"enum": [1, {"$ref": "text"}]}}, "properties": {"$ref": {"$ref": "#/$defs/N"}}}
    assert validate_call(ToolCall("go", {"$ref": 1}), (ToolSpec("go", "walk", schema={"type": "object", **inner}),)) is None
