"""The grammar of an action: a thought, then one tool call or the final answer.

The tool call is Qwen3's: a JSON object with ``name`` and ``arguments`` between ``<tool_call>`` tags. Nothing
here raises on what a policy wrote: a wrong action is data, and says what is wrong with it in words that the
policy reads as its observation. Those words hold no tags, because an observation cannot hold any.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evolve_dag.protocols import ToolSpec
from evolve_dag.records import ToolCall

_TAG = re.compile(r"</?(?:tool_call|answer)>")
_OPENING = re.compile(r"<(tool_call|answer)>")
_REASONING = re.compile(r"<(/?think|tool_call|answer)>")
_REASONED = "</think>"
_MAX_NAME = 40
"""Characters of a name that the policy made up and a message repeats."""
_MAX_ALLOWED = 200
"""Characters of what a schema allows, as a message repeats it."""
_MAX_DEPTH = 32
"""Levels of lists and objects in an argument; what writes a trajectory down takes some hundred."""


@dataclass(frozen=True, slots=True)
class ParsedAction:
    """What an action says. Exactly one of ``call``, ``answer`` and ``problem`` is set."""

    thought: str
    """Text before the call or the answer."""
    call: ToolCall | None = None
    answer: str | None = None
    problem: str | None = None
    """Why nothing can be done with it."""

    @property
    def plain(self) -> bool:
        """Text without any tag of the grammar: no attempt at a call or an answer."""
        return self.call is None and self.answer is None and self.problem == NO_ACTION


NO_ACTION = "there is no tool call and no answer"


def parse_action(text: str, tools: Sequence[ToolSpec] = (), *, typed: bool = False) -> ParsedAction:
    """Read one action; never raises.

    Args:
        tools: those with a schema get their arguments as JSON values; of any other, all arguments are text. Where one takes
            plain turns, what calls no other is a call of it, as it was written: tags of an answer are text then.
        typed: read the arguments of every tool as JSON values.
    """
    plain = next((tool for tool in tools if tool.plain), None)
    if plain is None:
        return _parse_tagged(text, tools, typed)
    turn = said(text)
    others = any(not tool.plain for tool in tools)
    if others and re.search(r"</?tool_call>", turn) and (action := _parse_tagged(text, tools, typed)).answer is None:
        return action
    return ParsedAction("", call=ToolCall(plain.name, {plain.plain: turn.strip()}))


def said(text: str) -> str:
    """What stands after the reasoning: nothing where that was cut off, whatever it drafts."""
    return _parted(text)[2]


def reasoned(text: str) -> tuple[str, str]:
    """The reasoning, and what stands after it."""
    reasoning, rest, _ = _parted(text)
    return reasoning, rest


def _parted(text: str) -> tuple[str, str, str]:
    """The reasoning, what stands after it, and as much of that as comes before further reasoning that was cut off.

    Reasoning may draft calls and answers, whole or not, and a template may have opened it before the text began; so it ends at
    the last closing tag. But one within a call or an answer is content: an argument, or an answer, may speak of such tags.
    """
    before = start = place = 0
    never_closed: set[str] = set()
    while (mark := _REASONING.search(text, place)) is not None:
        kind, place = mark[1], mark.end()
        if kind == "/think":
            before, start = mark.span()
        elif kind == "think":
            end = text.find(_REASONED, place)
            if end < 0:
                return text[:before], text[start:], text[start : mark.start()]
            before = end
            start = place = end + len(_REASONED)
        elif kind not in never_closed:
            end = text.find(f"</{kind}>", place)
            if end < 0:  # then no later one is closed either
                never_closed.add(kind)
            elif (drafted := _end_of_draft(text, kind, place, end)) >= 0:
                before = drafted
                start = place = drafted + len(_REASONED)
            else:
                place = end + len(f"</{kind}>")
    return text[:before], text[start:], text[start:]


def _end_of_draft(text: str, kind: str, start: int, end: int) -> int:
    """Where the reasoning ends within what reads as one call or answer, from ``start`` to ``end``; -1: that is content.

    It ends there where another is opened behind it: the first was a draft that was never closed. But in JSON, whatever tags it
    holds, nothing ends.
    """
    another = max(text.rfind(f"<{tag}>", start, end) for tag in ("tool_call", "answer"))
    closing = text.rfind(_REASONED, start, another) if another >= 0 else -1
    return -1 if closing >= 0 and kind == "tool_call" and _is_object(text[start:end]) else closing


def _is_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text, parse_int=str), dict)  # a number may have more digits than Python reads
    except (ValueError, RecursionError):
        return False


def _parse_tagged(text: str, tools: Sequence[ToolSpec], typed: bool) -> ParsedAction:
    reasoning, rest, body = _parted(text)
    first = _TAG.search(body)
    thought = (reasoning + rest[: first.start() if first else len(rest)]).replace("<think>", "").strip()

    calls, answers, outside = _enclosed(body)
    left_over = _TAG.search(outside)
    if calls and answers:
        problem: str | None = "there are both a tool call and an answer"
    elif len(calls) > 1:
        problem = f"there are {len(calls)} tool calls, none was made"
    elif len(answers) > 1:
        problem = f"there are {len(answers)} answers"
    elif left_over is not None:
        problem = _describe_left_over(left_over.group())
    elif not calls and not answers:
        problem = NO_ACTION
    else:
        problem = None
    if problem is not None:
        return ParsedAction(thought, problem=problem)
    if answers:
        answer = answers[0].strip()
        return ParsedAction(thought, answer=answer) if answer else ParsedAction(thought, problem="the answer is empty")
    call = _parse_call(calls[0], tools, typed)
    return ParsedAction(thought, problem=call) if isinstance(call, str) else ParsedAction(thought, call=call)


def validate_call(call: ToolCall, tools: Sequence[ToolSpec]) -> str | None:
    """What is wrong with the call, given the tools there are; None when it can be made."""
    spec = _find(call.name, tools)
    if spec is None:
        known = ", ".join(tool.name for tool in tools if not tool.plain) or "none"
        return f"there is no tool {_short(call.name)}; the tools are: {known}"
    if spec.schema is not None:
        return _breach(spec.schema, call.arguments, spec.name)
    missing = [name for name in spec.parameters if name not in call.arguments]
    unknown = [_short(name) for name in call.arguments if name not in spec.parameters]
    wants = f"{spec.name} takes {', '.join(spec.parameters) or 'no arguments'}"
    if missing:
        return f"the argument {', '.join(missing)} is missing; {wants}"
    if unknown:
        return f"the argument {', '.join(unknown)} is unknown; {wants}"
    return None


def _find(name: str, tools: Sequence[ToolSpec]) -> ToolSpec | None:
    return next((tool for tool in tools if tool.name == name), None)


def _breach(schema: Mapping[str, Any], arguments: Mapping[str, Any], tool: str) -> str | None:
    """How arguments break a schema, the most telling breach alone; it repeats names, no values."""
    from jsonschema import Draft202012Validator
    from jsonschema.exceptions import best_match
    from referencing import Registry

    # An empty registry: a schema that points to an address fetches nothing.
    error = best_match(Draft202012Validator(schema, registry=Registry()).iter_errors(dict(arguments)))
    if error is None:
        return None
    return f"{_describe_breach(error)}; {tool} takes {', '.join(schema.get('properties', ())) or 'no arguments'}"


def _describe_breach(error: Any) -> str:
    at, rule, bound = [str(part) for part in error.absolute_path], error.validator, error.validator_value
    if rule == "required":
        missing = [name for name in bound if name not in error.instance]
        return f"the argument {_short('.'.join([*at, missing[0]]))} is missing"
    if rule == "additionalProperties" and bound is False:
        known = error.schema.get("properties", {})
        unknown = [name for name in error.instance if name not in known]
        return f"the argument {_short('.'.join([*at, *unknown[:1]]))} is unknown"
    wanted = {"type": "be", "enum": "be one of", "const": "be"}.get(rule, f"keep to {rule}")
    allowed = ", ".join(map(str, bound)) if isinstance(bound, list) else str(bound)
    where = f"the argument {_short('.'.join(at))}" if at else "the arguments"
    return f"{where} must {wanted} {_short(allowed, _MAX_ALLOWED)}"


def explain(problem: str) -> str:
    """The observation that follows a refused action."""
    return f"error: {problem}. write one tool call, a json object with name and arguments, or one answer"


def _enclosed(text: str) -> tuple[list[str], list[str], str]:
    """What stands in calls, what in answers, and the text without them. A tag inside of either is its content, no second
    attempt: a program may print an answer's tags. Every character is looked at a few times, however many tags are never closed.
    """
    inside: dict[str, list[str]] = {"tool_call": [], "answer": []}
    outside, place, closed = [], 0, set(inside)
    for opening in _OPENING.finditer(text):
        tag = opening[1]
        if opening.start() < place or tag not in closed:
            continue
        end = text.find(f"</{tag}>", opening.end())
        if end < 0:  # then no later one is closed either
            closed.remove(tag)
            continue
        outside.append(text[place : opening.start()])
        inside[tag].append(text[opening.end() : end])
        place = end + len(f"</{tag}>")
    return inside["tool_call"], inside["answer"], "".join([*outside, text[place:]])


def _describe_left_over(tag: str) -> str:
    what = "tool call" if "tool_call" in tag else "answer"
    return f"the {what} is closed but never opened" if tag.startswith("</") else f"the {what} is not closed"


def _parse_call(text: str, tools: Sequence[ToolSpec], typed: bool) -> ToolCall | str:
    try:
        # Numbers stay as they were written: 1.0 is not 1, and 007 is refused by JSON, not turned into 7.
        content = json.loads(text, parse_int=str, parse_float=str, parse_constant=str)
    except (ValueError, RecursionError):
        return "the tool call is not valid json"
    if not isinstance(content, dict):
        return "the tool call is not a json object"
    name, arguments = content.get("name"), content.get("arguments")
    if not isinstance(name, str) or not name:
        return "the tool call has no name"
    if arguments is None:
        return "the tool call has no arguments"
    if not isinstance(arguments, dict):
        return "the arguments are not a json object"
    spec = _find(name, tools)
    typed = typed or (spec is not None and spec.schema is not None)
    values = _as_values(text) if typed else _as_text(arguments)
    if isinstance(values, str):
        return values
    if not _is_text(name + json.dumps(values, ensure_ascii=False)):
        return "the tool call holds characters that are not text"
    return ToolCall(name, values)


def _as_text(arguments: Mapping[str, Any]) -> dict[str, str] | str:
    values: dict[str, str] = {}
    for key, value in arguments.items():
        if isinstance(value, bool):
            values[key] = "true" if value else "false"
        elif isinstance(value, str):
            values[key] = value
        else:
            return f"the argument {_short(key)} is {_kind(value)}, it must be text"
    return values


def _as_values(text: str) -> dict[str, Any] | str:
    """The arguments of a call that was read before, its numbers as numbers now."""
    try:
        arguments: dict[str, Any] = json.loads(text, parse_float=_number, parse_constant=_number)["arguments"]
    except ValueError:
        return "the tool call holds a number that is out of range"
    return "the arguments are nested too deeply" if _deeper(arguments, _MAX_DEPTH) else arguments


def _deeper(value: Any, levels: int) -> bool:
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return levels == 0 or any(_deeper(part, levels - 1) for part in parts)


def _number(text: str) -> float:
    """Raises: ValueError, for what JSON does not know (NaN) or no float can hold."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _kind(value: Any) -> str:
    return "null" if value is None else "a list" if isinstance(value, list) else "an object"


def _is_text(value: str) -> bool:
    """JSON can spell half of a surrogate pair, which no file and no tokenizer takes."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _short(name: str, characters: int = _MAX_NAME) -> str:
    cleaned = " ".join(name.encode("utf-8", "replace").decode("utf-8").split())
    return cleaned if len(cleaned) <= characters else cleaned[: characters - 1] + "…"
