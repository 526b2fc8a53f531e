"""Task suites from your own JSONL files."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evolve_dag.errors import DataError
from evolve_dag.jsonlines import SHOWN, Mistake, kind_of, refuse, text_mistakes
from evolve_dag.records import Task

ALIAS_SEPARATOR = "|"
"""Between the texts of one metadata field that holds several, e.g. ``aliases``."""


def tasks_from(
    path: str | Path,
    objects: Sequence[tuple[int, Mapping[str, Any]]],
    mistakes: list[Mistake],
    *,
    suite: str,
    count: int | None,
    seed: int = 0,
    skip: int = 0,
    earlier: Sequence[tuple[int, Mapping[str, Any]]] = (),
) -> list[Task]:
    """The tasks of a file's rows, in the order of the file.

    A row reads ``{"question": ..., "answer": ...}``. ``"id"`` is optional: without it the id is a hash of the question,
    so that adding or moving rows renames nothing. Any other field goes to the task's metadata as text; a list of texts
    is joined with ``|`` (``"aliases": ["US", "USA"]`` are further right answers, see ExactVerifier).

    Args:
        path: the file.
        objects: line or row number and the row.
        mistakes: what is wrong with the rows that are not in ``objects``.
        suite: name of the suite, kept in every task.
        count: take a sample of this many tasks; None takes all. The sample depends on ``seed`` and the ids alone: a
            smaller count is part of a larger one, and a row more moves at most one task in or out.
        seed: decides the sample.
        skip: tasks to pass over in the order of the draw, so that two splits of one file share none.
        earlier: rows that came before and were looked through then; a row that repeats one of them is a mistake.

    Raises:
        DataError: lists every broken row with its number; or says how many tasks there are when ``count`` is larger.
    """
    tasks, wrong = _read(objects, suite)
    before, _ = _read(earlier, suite)
    mistakes.extend([*wrong, *_repeats(tasks, before)])
    if mistakes:
        refuse(path, mistakes, 'one task a line: {"question": "...", "answer": "..."}, and "id" if you like')
    chosen = [task for _, task in tasks]
    if count is None and not skip:
        return chosen
    if count is not None and count < 1:
        raise ValueError(f"count must be at least 1, not {count}")
    wanted = skip + (count or 1)
    if wanted > len(chosen):
        asked = f"{count} after the first {skip}" if skip else f"{count}"
        raise DataError(
            f"{path}: holds {len(chosen)} task{'s' if len(chosen) > 1 else ''}, but the experiment asks for {asked}",
            f"set count to at most {max(0, len(chosen) - skip)}, or leave it out to take all",
        )
    drawn = sorted(chosen, key=lambda task: _draw(seed, task.id))
    kept = {task.id for task in drawn[skip : None if count is None else skip + count]}
    return [task for task in chosen if task.id in kept]


def refuse_shared_questions(splits: Mapping[str, Sequence[Task]]) -> None:
    """Refuse splits that ask the same question: a task that was trained on says nothing about new ones.

    Raises:
        DataError: names the questions and the two splits of each.
    """
    seen: dict[str, str] = {}
    shared: list[str] = []
    for name, tasks in splits.items():
        for task in tasks:
            other = seen.setdefault(folded(task.question), name)
            if other != name:
                shared.append(f"  {name} and {other}: {task.question}")
    if shared:
        more = f"\n  ... and {len(shared) - SHOWN} more" if len(shared) > SHOWN else ""
        listing = "\n".join(shared[:SHOWN])
        raise DataError(
            f"{len(shared)} question{'s stand' if len(shared) > 1 else ' stands'} in more than one split\n{listing}{more}",
            "keep each question in one of the files only",
        )


def question_id(question: str) -> str:
    """16 hex digits that stand for a question, whatever its white space."""
    return hashlib.sha256(" ".join(question.split()).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def in_percent(question: object, low: int, high: int) -> bool:
    """Whether a question hashes into ``low`` to ``high`` of a hundred; what is no question is in every part, as a mistake."""
    if not isinstance(question, str):
        return True
    return low <= int(hashlib.sha256(folded(question).encode("utf-8", "surrogatepass")).hexdigest()[:16], 16) % 100 < high


def folded(question: str) -> str:
    """A question by which two are the same, whatever their white space, their case and the encoding of accents (NFC, NFD)."""
    return " ".join(unicodedata.normalize("NFC", question).split()).casefold()


def _draw(seed: int, identifier: str) -> str:
    return hashlib.sha256(json.dumps([seed, identifier]).encode()).hexdigest()


def _read(objects: Sequence[tuple[int, Mapping[str, Any]]], suite: str) -> tuple[list[tuple[int, Task]], list[Mistake]]:
    """The tasks of rows, and what is wrong with the other rows."""
    tasks: list[tuple[int, Task]] = []
    mistakes: list[Mistake] = []
    for number, value in objects:
        wrong, metadata = _check(value)
        mistakes.extend((number, what) for what in wrong)
        if not wrong:
            question = value["question"].strip()
            identifier = value["id"].strip() if value.get("id") is not None else question_id(question)
            tasks.append((number, Task(identifier, question, value["answer"].strip(), suite, metadata)))
    return tasks, mistakes


def _check(value: Mapping[str, Any]) -> tuple[list[str], dict[str, str]]:
    """What is wrong with one line, and its metadata."""
    wrong = text_mistakes(value, "question")
    if value.get("answer") is None:
        wrong.append("no reference answer: 'answer' is missing")
    else:
        wrong += text_mistakes(value, "answer")
    if value.get("id") is not None:
        wrong += text_mistakes(value, "id")
    metadata: dict[str, str] = {}
    for key, inner in value.items():
        if key in ("id", "question", "answer") or inner is None:
            continue
        if isinstance(inner, str):
            metadata[key] = inner
        elif isinstance(inner, (bool, int, float)):
            metadata[key] = json.dumps(inner)
        elif isinstance(inner, list) and all(isinstance(text, str) and ALIAS_SEPARATOR not in text for text in inner):
            metadata[key] = ALIAS_SEPARATOR.join(inner)
        else:
            wrong.append(f"{key!r} must be text, a number or a list of texts without {ALIAS_SEPARATOR!r}, not {kind_of(inner)}")
    return wrong, metadata


def _repeats(tasks: list[tuple[int, Task]], before: list[tuple[int, Task]]) -> list[Mistake]:
    """Lines whose question or id an earlier line has too, or one of those ``before``."""
    found: list[Mistake] = []
    questions = {folded(task.question): number for number, task in reversed(before)}
    ids = {task.id: number for number, task in reversed(before)}
    for number, task in tasks:
        asked = folded(task.question)
        if asked in questions:
            found.append((number, f"the same question as on line {questions[asked]}"))
        elif task.id in ids:
            found.append((number, f"the same id {task.id!r} as on line {ids[task.id]}"))
        questions.setdefault(asked, number)
        ids.setdefault(task.id, number)
    return found
