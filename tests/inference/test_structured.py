"""Answers in JSON: found in noise, validated, repaired once."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from evolve_dag.errors import ModelError
from evolve_dag.inference.scripted import ScriptedModel
from evolve_dag.inference.structured import JsonAnswer, _fenced, ask_json, extract_json
from evolve_dag.protocols import Completion, Request, Sampling
from evolve_dag.records import Message

SCHEMA = {
    "type": "object",
    "properties": {"ids": {"type": "array", "items": {"type": "string"}}, "rationale": {"type": "string"}},
    "required": ["ids"],
    "additionalProperties": False,
}
ASK = (Message("system", "You choose."), Message("user", "Choose, in JSON."))

texts = (st.text(max_size=20) | st.sampled_from(["</think>", "a <think> b"])).filter(lambda text: "```" not in text)
"""Such a fence opens code, in a string of the answer too."""
keys = texts.filter(bool).map(lambda text: text[:8])
scalars = st.none() | st.booleans() | st.integers(-(10**9), 10**9) | texts
inner = st.recursive(scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(keys, v, max_size=3), max_leaves=12)
objects = st.dictionaries(keys, inner, max_size=4)
lists_of_objects = st.lists(objects, min_size=1, max_size=3)
prose = st.text(st.characters(exclude_characters="{}[]`<", exclude_categories=["Cs"]), max_size=60)
"""Without what opens JSON, a fence or a reasoning block."""
placeholders = st.sampled_from(["", "{name}", "[see below]", "use {x} and [y, z]", "a {b", "[*] ", "{{blank}}"])


@given(
    value=objects | lists_of_objects,
    before=prose,
    mark=placeholders,
    after=st.text(max_size=60),
    indent=st.sampled_from([None, 2]),
)
def test_json_is_found_in_the_prose_around_it(value: Any, before: str, mark: str, after: str, indent: int | None) -> None:
    after = after.replace("```", "").replace("</think>", "")
    text = f"{before}\n{mark}\n{json.dumps(value, indent=indent)}\n{after}"
    assert extract_json(text) == value


@given(value=objects, before=prose, after=prose, language=st.sampled_from(["", "json", "JSON", "jsonc"]))
def test_json_is_found_in_a_code_fence(value: Any, before: str, after: str, language: str) -> None:
    assert extract_json(f"{before}\n```{language}\n{json.dumps(value)}\n```\n{after}") == value


@given(value=objects.filter(bool), cut=st.integers(1, 200), before=st.sampled_from(["Here: ", "hm</think>\n"]))
def test_nothing_is_made_of_an_answer_that_was_cut_off(value: Any, cut: int, before: str) -> None:
    text = json.dumps([value, {"more": [value]}])
    assume("think>" not in text or "think>" in before)  # in prose what is cut off may as well be a draft of the reasoning
    assert extract_json(before + text[: max(1, len(text) - cut)]) is None


@given(st.text(max_size=200) | st.text(alphabet='{}[]",:\\ abc1`\n', max_size=80))
def test_no_text_raises(text: str) -> None:
    value = extract_json(text)
    assert value is None or isinstance(value, (dict, list))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None),
        ("no json at all", None),
        ('{"a": 1,}', None),
        ('{"a": {"b": 1},}', None),
        ('[{"a": 1}, {"a": 2},]', None),
        ('{"a": NaN}', None),
        ("{'a': 1}", None),
        ('{"a": "\\ud800"}', None),
        ("[" * 200_000, None),
        ('{"a": ' * 50_000 + "1" + "}" * 50_000, None),
        ('"just text"', None),
        ("17", None),
        ("{}", {}),
        ("[]", []),
        ('{"a": "half {} [1]', None),
        ('{"a": "half\\', None),
        ('{} {"a": "half {"b": 1}', {}),
        ('{"a": "} ] ` {"}', {"a": "} ] ` {"}),
        ('{"a": "quote \\" brace {"}', {"a": 'quote " brace {'}),
        ('{"a": "</think> and <think>"}', {"a": "</think> and <think>"}),
        ('As [1] and [2, 3] say: {"a": 1}', {"a": 1}),
        ("The ids: [4, 5]", [4, 5]),
        ('["a", "b"]', ["a", "b"]),
        ('{"a": 1} and then {"b": 2}', {"a": 1}),
        ('<think>maybe {"a": 1}</think>\n{"a": 2}', {"a": 2}),
        ('maybe {"a": 1}</think>{"a": 2}', {"a": 2}),
        ('<think>still thinking {"a": 1}', None),
        ('hm</think>\n{"a": [{"b": "</think> <think>"}, {"b": 2}]}', {"a": [{"b": "</think> <think>"}, {"b": 2}]}),
        ('<think>{"a": "</think>```json\n{"a": "</think>"}\n```', {"a": "</think>"}),
        ('maybe {"a": "</think>"} or </think>{"a": 2}', {"a": 2}),
        ('hm</think>{"a": [{"b": "</think>"}, {"b": 2}, {"b', None),
        ('hm</think>{"a": 1} <think>or', {"a": 1}),
        ("x " + "[" * 200_000 + "</think>", None),
        ('```json\n{"a": 1,}\n```\nI mean {"a": 2}', {"a": 2}),
        ('```\n{"code": "```x```"}\n```', {"code": "```x```"}),
        ('{"a": 1}\n```json\n{"a": 2}\n```', {"a": 2}),
        ("{\n  \"a\": 1\n}\n\nHope that helps! :}", {"a": 1}),
    ],
)  # fmt: skip
def test_cases(text: str, value: Any) -> None:
    assert extract_json(text) == value


def ask(model: ScriptedModel, **arguments: Any) -> JsonAnswer:
    return asyncio.run(ask_json(model, ASK, SCHEMA, Sampling(seed=4), **arguments))


def test_a_good_answer_takes_one_call_and_the_schema_goes_with_it() -> None:
    model = ScriptedModel(['Sure!\n{"ids": ["a"], "rationale": "fits"}'])
    answer = ask(model)
    assert answer == JsonAnswer({"ids": ["a"], "rationale": "fits"}, None, 1, answer.text)
    assert answer.ok
    assert model.requests[0].answer_schema == SCHEMA
    assert model.requests[0].messages == ASK


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ("I choose a.", "no valid JSON"),
        ("", "empty"),
        ('{"id": ["a"]}', "'ids' is a required property"),
        ('{"ids": "a"}', "ids: 'a' is not of type 'array'"),
        ('{"ids": ["a", 7]}', "ids[1]: 7 is not of type 'string'"),
        ('["a"]', "is not of type 'object'"),
        ('{"ids": ["a", "b"', "no valid JSON"),
    ],
)
def test_a_wrong_answer_is_repaired_once_and_the_model_sees_what_was_wrong(wrong: str, named: str) -> None:
    model = ScriptedModel([wrong, '{"ids": ["b"]}'])
    answer = ask(model)
    assert (answer.value, answer.problem, answer.attempts) == ({"ids": ["b"]}, None, 2)
    repair = model.requests[1]
    assert repair.messages[:2] == ASK
    assert [m.role for m in repair.messages[2:]] == ["assistant", "user"]
    assert repair.messages[2].content == (wrong or "(nothing)")
    assert named in repair.messages[3].content
    assert '"required": ["ids"]' in repair.messages[3].content
    assert repair.answer_schema == SCHEMA


def test_after_the_repair_the_problem_comes_back_in_words() -> None:
    model = ScriptedModel(["nonsense", '{"ids": 1}', '{"ids": ["never asked"]}'])
    answer = ask(model)
    assert (answer.value, answer.attempts, answer.text) == (None, 2, '{"ids": 1}')
    assert answer.problem == "ids: 1 is not of type 'array'"
    assert not answer.ok
    assert ask(ScriptedModel(["nonsense"]), repairs=0).attempts == 1


def test_the_callers_check_is_a_fault_like_any_other() -> None:
    def known(value: Any) -> str | None:
        unknown = [name for name in value["ids"] if name not in ("a", "b")]
        return f"unknown ids: {', '.join(unknown)}" if unknown else None

    model = ScriptedModel(['{"ids": ["z"]}', '{"ids": ["b"]}'])
    assert ask(model, check=known).value == {"ids": ["b"]}
    assert "unknown ids: z" in model.requests[1].messages[3].content
    assert ask(ScriptedModel(['{"ids": ["z"]}'] * 2), check=known).problem == "unknown ids: z"


def test_what_fits_the_schema_is_preferred_to_what_comes_first() -> None:
    assert ask(ScriptedModel(['Not {"x": 1} but {"ids": ["a"]}.'])).value == {"ids": ["a"]}


def test_an_answer_at_the_token_limit_is_told_so() -> None:
    class Cut(ScriptedModel):
        async def generate(self, request: Request) -> Completion:
            done = await super().generate(request)
            return Completion(done.text, (), (), "length", 1)

    assert "ends before its JSON does" in (ask(Cut(['{"ids": ["a'] * 2)).problem or "")


def test_an_endpoint_that_is_down_is_the_callers_business() -> None:
    with pytest.raises(ModelError, match="down"):
        ask(ScriptedModel([ModelError("down")]))


def test_a_wrong_schema_is_a_programming_error() -> None:
    import jsonschema

    with pytest.raises(jsonschema.SchemaError):
        asyncio.run(ask_json(ScriptedModel(["{}"]), ASK, {"type": "no such type"}, Sampling()))


def test_a_guide_goes_with_the_request_and_judges_nothing() -> None:
    guide = {**SCHEMA, "properties": {**SCHEMA["properties"], "ids": {"type": "array", "maxItems": 1}}}  # type: ignore[dict-item]
    model = ScriptedModel(['{"ids": [1]}', '{"ids": ["a", "b"]}'])
    answer = asyncio.run(ask_json(model, ASK, SCHEMA, Sampling(), guide=guide))
    assert answer.value == {"ids": ["a", "b"]}  # more than the guide allows: an endpoint does not know its bounds
    assert [request.answer_schema for request in model.requests] == [guide, guide]
    assert "maxItems" not in model.requests[1].messages[-1].content


fences = st.lists(st.sampled_from(["```", "`", "json", "JSON5", " ", "\t", "\r\n", "\n", "x", "{}"]), max_size=14).map("".join)


@given(fences)
@settings(max_examples=300)
def test_fences_are_what_a_lazy_pattern_finds(text: str) -> None:
    lazy = re.compile(r"```[ \t]*(?:json5?|jsonc)?[ \t]*\r?\n?(.*?)```", re.S | re.I)  # takes cubic time on "```" and blanks
    assert _fenced(text) == lazy.findall(text)
