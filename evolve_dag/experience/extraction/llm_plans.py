"""Reads what a language model answered: candidates, decisions, merge plans. Pure functions over any JSON value.

Models give a dict where a list was asked for, one entry alone, a decision twice, none for a candidate, numbers as text, ids
that do not exist. Whatever can be understood is; the rest is counted (:class:`Tally`), and nothing raises.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from evolve_dag.plain import one_line

Operation = Literal["ADD", "UPDATE", "DELETE", "NONE"]
Tally = Counter[str]
"""Name of a statistic -> count."""

_OPERATIONS: Mapping[str, Operation] = {
    "ADD": "ADD", "NEW": "ADD", "CREATE": "ADD",
    "UPDATE": "UPDATE", "MODIFY": "UPDATE", "EDIT": "UPDATE", "REVISE": "UPDATE",
    "DELETE": "DELETE", "REMOVE": "DELETE",
    "NONE": "NONE", "KEEP": "NONE", "SKIP": "NONE", "IGNORE": "NONE",
}  # fmt: skip
_TEXT = ("text", "content", "item", "principle", "lesson", "experience")
_ID = ("id", "item_id", "target", "target_id")


def object_of(properties: dict[str, Any]) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": list(properties), "additionalProperties": False}


def array_of(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_STRING, _MAYBE = {"type": "string"}, {"type": ["string", "null"]}
CANDIDATES_SCHEMA = object_of({"items": array_of(object_of({"text": _STRING, "why": _STRING}))})
DECISIONS_SCHEMA = object_of(
    {
        "decisions": array_of(
            object_of(
                {
                    "candidate": {"type": "integer"},
                    "operation": {"type": "string", "enum": ["ADD", "UPDATE", "DELETE", "NONE"]},
                    "id": _MAYBE,
                    "content": _MAYBE,
                    "reason": _STRING,
                }
            )
        )
    }
)
RECONCILE_SCHEMA = object_of(
    {"merges": array_of(object_of({"members": array_of({"type": "integer"}), "content": _STRING, "reason": _STRING}))}
)
CONSOLIDATE_SCHEMA = object_of(
    {
        "merges": array_of(object_of({"ids": array_of(_STRING), "content": _STRING, "reason": _STRING})),
        "deletes": array_of(object_of({"id": _STRING, "reason": _STRING})),
    }
)
REPAIR_SCHEMA = object_of({"text": _STRING})


@dataclass(frozen=True, slots=True)
class Candidate:
    """An item that a critique proposes."""

    text: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class PoolDecision:
    """What one candidate does to the pool."""

    operation: Operation
    item_id: str | None = None
    """An id of the pool; None for ADD, and for a NONE that does not say which item says it already."""
    text: str | None = None
    """As the model wrote it; None: the candidate's own."""
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Merge:
    """Members that are one, and the text for them."""

    members: tuple[str, ...]
    text: str
    reason: str = ""


def entries(value: Any, key: str, fields: Collection[str]) -> list[Any] | None:
    """The entries of an answer: a list; a list or dict under ``key`` or under the only key that holds one; one entry alone (a
    dict with one of ``fields``); or a dict of entries by number, whose keys become their ``key``. None: nothing of this."""
    if isinstance(value, dict):
        lower = {str(name).lower(): inner for name, inner in value.items()}
        lists = [inner for inner in lower.values() if isinstance(inner, list)]
        if key in lower:
            value = lower[key]
        elif len(lists) == 1 and (len(lower) == 1 or not any(name in fields for name in lower)):
            value = lists[0]
    if isinstance(value, dict):
        lower = {str(name).lower(): inner for name, inner in value.items()}
        if any(name in fields for name in lower):
            return [lower]
        return [{"key": name, **inner} if isinstance(inner, dict) else inner for name, inner in value.items()]
    return value if isinstance(value, list) else None


def _field(entry: Mapping[str, Any], *names: str) -> Any:
    lower = {str(name).lower(): value for name, value in entry.items()}
    return next((lower[name] for name in names if lower.get(name) is not None), None)


def _text(value: Any) -> str | None:
    return value.strip() if isinstance(value, str) and value.strip() else None


def _reason(entry: Mapping[str, Any]) -> str:
    value = _field(entry, "reason", "why", "rationale")
    return one_line(value, 200) if isinstance(value, str) else ""


def _number(value: Any) -> int | None:
    """3, '3', 'C3' and 'candidate 3' are 3."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = re.fullmatch(r"\D*?(\d{1,4})\D*", value) if isinstance(value, str) else None
    return int(match[1]) if match else None


def known_id(value: Any, ids: Collection[str]) -> str | None:
    """The id of the pool that ``value`` names ('p0003', '[p0003]', ['p0003']); None: none of it."""
    if isinstance(value, list):
        value = value[0] if len(value) == 1 else None
    if not isinstance(value, str):
        return None
    if value.strip() in ids:
        return value.strip()
    named = [word for word in re.findall(r"[A-Za-z0-9][\w.\-]*", value) if word.rstrip(".") in ids]
    return named[0].rstrip(".") if len(named) == 1 else None


def read_candidates(value: Any) -> list[Candidate] | None:
    """The candidate items, in order; None: the answer is none. An empty list is an answer."""
    found = entries(value, "items", _TEXT)
    if found is None:
        return None
    candidates = []
    for entry in found:
        text = _text(_field(entry, *_TEXT)) if isinstance(entry, dict) else _text(entry)
        if text is not None:
            candidates.append(Candidate(text, _reason(entry) if isinstance(entry, dict) else ""))
    return candidates if candidates or not found else None


def read_decisions(
    value: Any, count: int, ids: Collection[str], tally: Tally, closed: Collection[str] = ()
) -> list[PoolDecision] | None:
    """One decision per candidate, in order; None: the answer holds no decision at all.

    - A candidate without a decision is added (``undecided``): what a critique wrote is not lost by an omission.
    - The first of two decisions for a candidate stands (``duplicates``); one for no candidate is dropped (``surplus``).
    - An UPDATE of an unknown id becomes an ADD, a DELETE of one does nothing (``unknown_ids``).
    - A DELETE needs no content. A NONE may name the item that says it already.

    Args:
        closed: ids of the pool that are known, and that nobody may change: an UPDATE of one becomes an ADD, a DELETE does
            nothing.
    """
    found = entries(value, "decisions", ("operation", "candidate", "action", "decision"))
    if not found:
        return None
    decided: dict[int, PoolDecision] = {}
    counted: Tally = Counter()
    read = 0
    for place, entry in enumerate(found, 1):
        name = _field(entry, "operation", "action", "decision") if isinstance(entry, dict) else None
        operation = _OPERATIONS.get(name.strip().upper()) if isinstance(name, str) else None
        if operation is None:
            counted["unknown_operations"] += 1
            continue
        read += 1
        named = _field(entry, "candidate", "number", "key")
        number = place if named is None else _number(named)
        if number is None or not 1 <= number <= count:
            counted["surplus"] += 1
        elif number in decided:
            counted["duplicates"] += 1
        else:
            text, reason = _text(_field(entry, *_TEXT)), _reason(entry)
            item_id = known_id(_field(entry, *_ID), ids) if operation != "ADD" else None
            if operation in ("UPDATE", "DELETE") and item_id is None:
                counted["unknown_ids"] += 1
                operation = "ADD" if operation == "UPDATE" else "NONE"
            elif item_id in closed:
                operation, item_id = "ADD" if operation == "UPDATE" else "NONE", None
            decided[number] = PoolDecision(operation, item_id, text if operation in ("ADD", "UPDATE") else None, reason)
    if not read:
        return None
    counted["undecided"] += count - len(decided)
    tally.update(counted)
    undecided = PoolDecision("ADD", reason="no decision was given")
    return [decided.get(number, undecided) for number in range(1, count + 1)]


def _merges(value: Any, field: str, known: Collection[str], most: int | None, tally: Tally) -> list[Merge]:
    """Merges with at least two known members, each member once; ``unknown_ids`` counts the others."""
    merges, used = [], set[str]()
    for entry in entries(value, "merges", (field, "members", "ids")) or []:
        if not isinstance(entry, dict):
            continue
        listed = _field(entry, field, "members", "ids", "items")
        members: list[str] = []
        for one in listed if isinstance(listed, list) else []:
            number = _number(one)
            member = known_id(one, known) or (str(number) if number is not None and str(number) in known else None)
            if member is None:
                tally["unknown_ids"] += 1
            elif member not in used and member not in members:
                members.append(member)
        members = members[:most]
        if len(members) > 1:
            used.update(members)
            merges.append(Merge(tuple(members), _text(_field(entry, *_TEXT)) or "", _reason(entry)))
    return merges


def read_reconciliation(value: Any, count: int, tally: Tally) -> list[tuple[tuple[int, ...], str, str]] | None:
    """(places of the proposals that are one, 0-based; text; reason); None: the answer is no plan."""
    if entries(value, "merges", ("members", "ids")) is None:
        return None
    merges = _merges(value, "members", [str(n) for n in range(1, count + 1)], None, tally)
    return [(tuple(int(member) - 1 for member in merge.members), merge.text, merge.reason) for merge in merges]


MOST_MERGED = 4
"""Items that one merge of a consolidation may join: one text cannot hold more without losing what each says."""


def read_consolidation(value: Any, ids: Sequence[str], tally: Tally) -> tuple[list[Merge], list[tuple[str, str]]] | None:
    """(merges of items; deletes as (id, reason)); None: the answer is no plan."""
    if not isinstance(value, dict):
        value = {"merges": value} if isinstance(value, list) else {}
    lower = {str(name).lower(): inner for name, inner in value.items()}
    if "merges" not in lower and "deletes" not in lower:
        return None
    merges = _merges({"merges": lower.get("merges") or []}, "ids", ids, MOST_MERGED, tally)
    used = {member for merge in merges for member in merge.members}
    deletes: dict[str, str] = {}
    for entry in entries({"deletes": lower.get("deletes") or []}, "deletes", _ID) or []:
        item_id = known_id(_field(entry, *_ID, "key") if isinstance(entry, dict) else entry, ids)
        if item_id is None:
            tally["unknown_ids"] += 1
        elif item_id not in used:
            deletes.setdefault(item_id, _reason(entry) if isinstance(entry, dict) else "")
    return merges, list(deletes.items())


def read_text(value: Any) -> str | None:
    """The one text of a repair."""
    found = read_candidates(value if not isinstance(value, str) else [value])
    return found[0].text if found else None
