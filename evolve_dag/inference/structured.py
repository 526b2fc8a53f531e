"""Answers in JSON from any model: found in what it wrote, checked, and asked for once more when they are wrong.

Models wrap JSON in code fences, prose and reasoning, and endpoints with structured outputs cut it off at the token limit.
A bad answer is data here, not an exception: it comes back as a problem in words.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from evolve_dag.inference.reasoning import CLOSED, OPENED
from evolve_dag.protocols import LanguageModel, Request, Sampling
from evolve_dag.records import Message

Check = Callable[[Any], str | None]
"""What is wrong with a value that fits the schema, in words the model reads; None when nothing is."""

_OPENED = re.compile(r"[ \t]*+(?:json5?|jsonc)?+[ \t]*+\r?+\n?+", re.I)
"""What stands between the opening of a code fence and its content."""
_OPENING = re.compile(r'\{(?=\s*["}])|\[(?=\s*(?:[\[{"\]\d-]|true|false|null))')
"""A brace or bracket with what JSON may have behind it: ``{name}`` and ``[see below]`` in prose are none."""
_MARK = re.compile(r'"[^"\\]*+(?:\\.?[^"\\]*+)*+(?:"|\Z)|[{}\[\]]', re.S)
"""A string, which the end of the text may cut off, or a bracket."""
_REASONING_OR_JSON = re.compile(rf"</?think>|{_OPENING.pattern}")
_BEGINS = re.compile(r"\s*+(?:```\w*+\s*+)?+")
"""What stands between reasoning and an answer that is JSON alone."""
_MOST_DRAFTS = 20
"""Beginnings of what is no JSON, in reasoning that no tag opens, that are looked at to their ends."""
_SHOWN = 6_000
"""Characters of a wrong answer that the repair shows to the model."""
_MISTAKES = 5
"""Mistakes that one repair names."""


@dataclass(frozen=True, slots=True)
class JsonAnswer:
    """What came of asking for JSON."""

    value: Any
    """The answer, checked; None when there is none."""
    problem: str | None
    """What was wrong with the last answer; None when ``value`` holds."""
    attempts: int
    """Model calls: 1, or 2 after a repair."""
    text: str = ""
    """What the model wrote last."""

    @property
    def ok(self) -> bool:
        return self.problem is None


def extract_json(text: str) -> Any | None:
    """The first JSON object or array in ``text``, or None; never raises.

    Code fences are looked at first, then the whole text; ``<think>`` blocks are left out. Only valid JSON counts (no
    trailing commas, no ``NaN``, no comments), and nothing is taken out of the inside of something broken: the one good
    element of a list that was cut off is not the answer. A list of bare numbers, as in "see [1]", is taken only where
    there is nothing else.
    """
    marker = None
    for value in _candidates(text):
        if not _is_marker(value):
            return value
        marker = value if marker is None else marker
    return marker


def every_json(text: str, schema: Mapping[str, Any]) -> list[Any]:
    """All JSON values in ``text`` that fit ``schema``; those in closed code fences stand in it twice."""
    validator = _validator(json.dumps(schema, sort_keys=True))
    return [value for value in _candidates(text) if validator.is_valid(value)]


async def ask_json(
    model: LanguageModel,
    messages: Sequence[Message],
    schema: Mapping[str, Any],
    sampling: Sampling,
    *,
    check: Check | None = None,
    repairs: int = 1,
    session: str = "",
    guide: Mapping[str, Any] | None = None,
) -> JsonAnswer:
    """Ask for an answer that fits ``schema``.

    The schema goes with the request; endpoints with structured outputs enforce it. Whatever comes is parsed, validated
    against the schema and then given to ``check``. On a fault the model sees its answer and what was wrong with it, at
    most ``repairs`` times.

    Args:
        schema: JSON schema (draft 2020-12) of the answer.
        guide: goes with the request instead of ``schema``, where a decoder should be held to more than an answer is judged
            by: bounds, so that it comes to an end, and patterns. What fits it must fit ``schema``.

    Returns:
        The value, or the last problem. A bad answer is never an exception.

    Raises:
        ModelError: the model could not be asked.
        jsonschema.SchemaError: ``schema`` itself is wrong.
    """
    validator = _validator(json.dumps(schema, sort_keys=True))
    conversation = tuple(messages)
    attempts = 0
    while True:
        request = Request(conversation, sampling, session, answer_schema=schema if guide is None else guide)
        completion = await model.generate(request)
        attempts += 1
        value, problem = _judge(completion.text, completion.finish_reason == "length", validator, check)
        if problem is None:
            return JsonAnswer(value, None, attempts, completion.text)
        if attempts > repairs:
            return JsonAnswer(None, problem, attempts, completion.text)
        # Another seed: the same one would make the same mistake where the conversation weighs little.
        sampling = replace(sampling, seed=sampling.seed + 1)
        conversation = (*messages, Message("assistant", _shown(completion.text)), Message("user", _repair(problem, schema)))


def _judge(text: str, cut_off: bool, validator: Any, check: Check | None) -> tuple[Any, str | None]:
    value = next((found for found in _candidates(text) if validator.is_valid(found)), None)
    if value is not None:
        return value, check(value) if check is not None else None
    value = extract_json(text)
    if value is None:
        if cut_off:
            return None, "the answer ends before its JSON does; write less"
        return None, "there is no valid JSON object or array in it" if text.strip() else "it is empty"
    mistakes = sorted(validator.iter_errors(value), key=lambda error: list(map(str, error.absolute_path)))
    lines = [f"{_place(error.absolute_path)}: {error.message[:200]}" for error in mistakes[:_MISTAKES]]
    if len(mistakes) > _MISTAKES:
        lines.append(f"and {len(mistakes) - _MISTAKES} more")
    return None, "; ".join(lines)


def _repair(problem: str, schema: Mapping[str, Any]) -> str:
    return (
        f"That answer cannot be used: {problem}.\n"
        f"Answer again, with the corrected JSON alone. It must fit this JSON schema:\n{json.dumps(schema, ensure_ascii=False)}"
    )


def _shown(text: str) -> str:
    """A model's answer as a turn of its own; one without text would be refused by many endpoints."""
    shown = text if len(text) <= _SHOWN else f"{text[: _SHOWN // 2]}\n[...]\n{text[-_SHOWN // 2 :]}"
    return shown if shown.strip() else "(nothing)"


def _place(path: Sequence[str | int]) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".") or "the answer"


def _candidates(text: str) -> Iterator[Any]:
    """Outermost JSON objects and arrays in order, those in code fences first."""
    body = text.strip()
    if not body.startswith(("{", "[", "`")):  # else such a tag stands inside of the answer
        body = _after_reasoning(body)
    return (value for part in (*_fenced(body), body) for value in _values(part))


def _after_reasoning(text: str) -> str:
    """What follows the last closing tag that stands outside of JSON: a string may speak of such tags. Where reasoning was
    opened and never ended, what comes before it."""
    start = place = failed = 0
    if CLOSED not in text and OPENED not in text:
        return text
    while (mark := _REASONING_OR_JSON.search(text, place)) is not None:
        place = mark.end()
        if mark[0] == CLOSED:
            start = place
        elif mark[0] == OPENED:
            end = text.find(CLOSED, place)
            if end < 0:
                return text[start : mark.start()]
            start = place = end + len(CLOSED)
        elif failed < _MOST_DRAFTS:
            closing = _closing(text, mark.start())
            if closing is None and start and _BEGINS.fullmatch(text, start, mark.start()):
                return text[start:]  # the answer itself, cut off
            if closing is not None and _loaded(text[mark.start() : closing]) is not None:
                place = closing
            else:
                failed += 1
    return text[start:]


def _fenced(text: str) -> list[str]:
    """The contents of code fences that are closed."""
    return [_OPENED.sub("", part, count=1) for part in text.split("```")[1:-1:2]]


def _values(text: str) -> Iterator[Any]:
    position = 0
    while (start := _OPENING.search(text, position)) is not None:
        end = _closing(text, start.start())
        if end is None:  # cut off
            return
        position = end
        value = _loaded(text[start.start() : end])
        if value is not None:
            yield value


def _loaded(text: str) -> Any | None:
    """The object or array, or None: it is none."""
    try:
        value = json.loads(text, parse_constant=_refuse_constant)
        json.dumps(value, ensure_ascii=False).encode("utf-8")  # half of a surrogate pair is no text
    except (ValueError, RecursionError):
        return None
    return value


def _closing(text: str, start: int) -> int | None:
    """Position after the bracket that closes the one at ``start``; None when nothing does."""
    depth = 0
    for mark in _MARK.finditer(text, start):
        if mark.group() in ("{", "["):
            depth += 1
        elif mark.group() in ("}", "]"):
            depth -= 1
            if depth == 0:
                return mark.end()
    return None


def _is_marker(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(part, int) for part in value)


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


@lru_cache(maxsize=64)
def _validator(schema: str) -> Any:
    from jsonschema import Draft202012Validator

    content = json.loads(schema)
    Draft202012Validator.check_schema(content)
    return Draft202012Validator(content)
