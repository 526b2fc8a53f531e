"""The experience pool: capped, versioned, with ids that never change.

A pool is a value. :meth:`Pool.apply` takes proposals (from a miner, an LLM or a hand) and gives back a new pool, the
edits that led there and the proposals it refused, with the reason. Nothing is lost silently: :func:`replay` of all
edits rebuilds the pool's ids, texts and provenance.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from evolve_dag.errors import DataError
from evolve_dag.experience.phrases import MAX_WORDS, split
from evolve_dag.records import ExperienceItem, Granularity, PoolEdit, PoolOperation

_NUMBERED = re.compile(r"p(\d{4,})")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
_URL = re.compile(r"https?://|www\.|(?<![\w-])-*+\w[\w-]*+\.(?:com|org|net|edu|gov|io|ai|cn|de|uk|info)\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Proposal:
    """A change that somebody wants. What it needs depends on the operation: ``add``: text and granularity; ``update``:
    item_id and text; ``delete``: item_id alone; ``merge``: item_id and into."""

    operation: PoolOperation
    item_id: str | None = None
    text: str | None = None
    granularity: Granularity = "principle"
    condition: Mapping[str, str] = field(default_factory=dict)
    evidence: Mapping[str, float] = field(default_factory=dict)
    """For ``update``: replaces the item's evidence unless empty."""
    trajectory_ids: tuple[str, ...] = ()
    reason: str = ""
    into: str | None = None
    """For ``merge``: id of the item that absorbs ``item_id``."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """A proposal that was not carried out."""

    proposal: Proposal
    why: str


class Applied(NamedTuple):
    """Result of :meth:`Pool.apply`."""

    pool: Pool
    edits: list[PoolEdit]
    refused: list[Refusal]


class Outline(NamedTuple):
    """What the edits know of an item."""

    id: str
    text: str
    created: int
    updated: int
    trajectory_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Pool:
    """An ordered, immutable set of experience items."""

    items: tuple[ExperienceItem, ...] = ()
    """In the order in which they were added."""
    version: int = 0
    """Grows by one with every :meth:`apply` that changed something."""
    next_number: int = 1
    """Number of the next id. Only grows, so an id is never used again, not even after its item was deleted."""

    def __post_init__(self) -> None:
        seen: set[str] = set()
        highest = 0
        for item in self.items:
            if item.id in seen:
                raise DataError(f"pool: two items have the id {item.id}", "give one of them an id that was never used")
            seen.add(item.id)
            if match := _NUMBERED.fullmatch(item.id):
                highest = max(highest, int(match[1]))
        object.__setattr__(self, "items", tuple(self.items))
        object.__setattr__(self, "next_number", max(self.next_number, highest + 1))

    def __len__(self) -> int:
        return len(self.items)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(item.id for item in self.items)

    def get(self, item_id: str) -> ExperienceItem:
        """The item.

        Raises:
            DataError: no such id.
        """
        for item in self.items:
            if item.id == item_id:
                return item
        raise DataError(f"pool version {self.version}: no item {item_id!r}", f"ids here: {', '.join(self.ids) or 'none'}")

    def outline(self) -> tuple[Outline, ...]:
        """What :func:`replay` must reproduce."""
        return tuple(Outline(i.id, i.text, i.created, i.updated, i.trajectory_ids) for i in self.items)

    def apply(self, proposals: Iterable[Proposal], *, iteration: int, cap: int | None = None, strict: bool = False) -> Applied:
        """Carry out ``proposals`` in order, then enforce ``cap`` by deleting the items of lowest lift (of equals the
        newest).

        An update keeps the id, the granularity and the condition; its trajectories replace the item's (trajectory ids
        are unique within one iteration only, and ``updated`` names it; the earlier ones stay in the edits).

        Raises:
            DataError: with ``strict``, when a proposal is refused; lists all refusals.
        """
        items = {item.id: item for item in self.items}
        number = self.next_number
        edits: list[PoolEdit] = []
        refused: list[Refusal] = []
        for proposal in proposals:
            why = _objection(proposal, items)
            if why:
                refused.append(Refusal(proposal, why))
                continue
            operation, text = proposal.operation, (proposal.text or "").strip()
            if operation == "add":
                item = ExperienceItem(
                    id=f"p{number:04d}", text=text, granularity=proposal.granularity, condition=dict(proposal.condition),
                    evidence=dict(proposal.evidence), trajectory_ids=tuple(proposal.trajectory_ids),
                    created=iteration, updated=iteration,
                )  # fmt: skip
                number += 1
                items[item.id] = item
                edits.append(PoolEdit("add", item.id, iteration, None, text, proposal.reason, item.trajectory_ids))
                continue
            before = items[proposal.item_id or ""]
            if operation == "update":
                after = replace(
                    before, text=text, evidence=dict(proposal.evidence) or before.evidence,
                    trajectory_ids=tuple(proposal.trajectory_ids), updated=iteration,
                )  # fmt: skip
                items[before.id] = after
                edits.append(PoolEdit("update", before.id, iteration, before.text, text, proposal.reason, after.trajectory_ids))
            else:
                del items[before.id]
                into = proposal.into if operation == "merge" else None
                after_text = items[into].text if into else None
                edits.append(
                    PoolEdit(operation, before.id, iteration, before.text, after_text, proposal.reason,
                             tuple(proposal.trajectory_ids), into)
                )  # fmt: skip
        if strict and refused:
            lines = _numbered([f"{r.proposal.operation} {r.proposal.item_id or 'new item'}: {r.why}" for r in refused])
            raise DataError(f"pool: {len(refused)} proposals refused\n{lines}", "mend them; the pool is unchanged")
        if cap is not None:
            surplus = max(0, len(items) - cap)
            place = {item_id: n for n, item_id in enumerate(items)}
            for item in sorted(items.values(), key=lambda i: (lift(i), -place[i.id]))[:surplus]:
                del items[item.id]
                reason = f"over the cap of {cap}: lowest lift ({lift(item):+.2f})"
                edits.append(PoolEdit("delete", item.id, iteration, item.text, None, reason))
        pool = Pool(tuple(items.values()), self.version + bool(edits), number)
        return Applied(pool, edits, refused)

    def to_json(self) -> str:
        """As JSON text; :meth:`from_json` gives an equal pool back."""
        items = [
            {
                "id": i.id, "text": i.text, "granularity": i.granularity, "condition": dict(i.condition),
                "evidence": dict(i.evidence), "trajectory_ids": list(i.trajectory_ids),
                "created": i.created, "updated": i.updated,
            }
            for i in self.items
        ]  # fmt: skip
        content = {"version": self.version, "next_number": self.next_number, "items": items}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "pool file") -> Pool:
        """Read what :meth:`to_json` wrote, or what a hand made of it.

        Raises:
            DataError: lists every mistake with its item and field; ``source`` is named in front.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            remedy = "mend the place above, or remake the pool by its extraction"
            raise DataError(f"{source}: not valid JSON: {error}", remedy) from None
        mistakes: list[str] = []
        if not isinstance(content, dict) or not isinstance(content.get("items"), list):
            remedy = 'start with {"version": 0, "next_number": 1, "items": []}'
            raise DataError(f"{source}: must be an object with a list `items`", remedy)
        for key in sorted(content.keys() - {"version", "next_number", "items"}):
            mistakes.append(f"{key}: unknown field (known: version, next_number, items)")
        version = _whole(content.get("version", 0), "version", mistakes)
        next_number = _whole(content.get("next_number", 1), "next_number", mistakes)
        items: list[ExperienceItem] = []
        seen: dict[str, int] = {}
        for place, raw in enumerate(content["items"], 1):
            item = _read_item(raw, f"item {place}", mistakes)
            if item is None:
                continue
            if item.id in seen:
                mistakes.append(f"item {place} ({item.id}): id: already used by item {seen[item.id]}")
            seen.setdefault(item.id, place)
            match = _NUMBERED.fullmatch(item.id)
            if match and "next_number" in content and int(match[1]) >= next_number:
                mistakes.append(f"item {place} ({item.id}): id: not below next_number {next_number}: it would be given twice")
            items.append(item)
        if mistakes:
            count = f"{len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}"
            raise DataError(f"{source}: {count}\n{_numbered(mistakes)}", "mend the fields above")
        return cls(tuple(items), version, next_number)


def _numbered(lines: Sequence[str]) -> str:
    return "\n".join(f"  {number}. {line}" for number, line in enumerate(lines, 1))


def _finite(value: object) -> bool:
    # compared, not converted: float() of a whole number with 400 digits raises
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def lift(item: ExperienceItem) -> float:
    """The item's measured lift; 0 for one that was never measured."""
    return item.evidence.get("lift", 0.0)


def check_principle_form(text: str) -> list[str]:
    """What keeps ``text`` from being a principle: ``Name: when <situation>, <strategy>.`` of at most 32 words, free of
    URLs, numbers and entity names (METHOD: granularity). Empty when nothing does. A capitalised word after the name
    counts as an entity; an acronym ('JSON') does not."""
    problems = []
    if split(text) is None:
        problems.append("not of the form `Name: when <situation>, <strategy>.` with a name of one or two words")
    words = len(text.split())
    if words > MAX_WORDS:
        problems.append(f"{words} words, more than {MAX_WORDS}")
    if "\n" in text.strip():
        problems.append("more than one line")
    if match := _URL.search(text):
        problems.append(f"holds a URL or domain ({match[0]})")
    if match := re.search(r"\d\S*", text):
        problems.append(f"holds a number ({match[0]})")
    rest = text.partition(":")[2] if split(text) else text
    if match := re.search(r"(?<![.!?] )(?<!\A)\b(?!I\b)[A-Z][a-z][\w'-]*(?: [A-Z][\w'-]+)*", rest):
        problems.append(f"holds an entity name ({match[0]})")
    return problems


def _objection(proposal: Proposal, items: Mapping[str, ExperienceItem]) -> str | None:
    """Why a proposal cannot be carried out, or None."""
    operation = proposal.operation
    if operation not in ("add", "update", "delete", "merge"):
        return f"unknown operation {operation!r}: one of add, update, delete, merge"
    granularity = proposal.granularity
    if operation != "add":
        if not proposal.item_id:
            return "names no item"
        if proposal.item_id not in items:
            return f"no item {proposal.item_id!r} in the pool"
        granularity = items[proposal.item_id].granularity
    elif proposal.item_id is not None:
        return f"an added item gets its id from the pool, not {proposal.item_id!r}"
    if operation == "merge":
        if not proposal.into:
            return "does not say which item to merge into"
        if proposal.into == proposal.item_id:
            return "an item cannot be merged into itself"
        if proposal.into not in items:
            return f"no item {proposal.into!r} in the pool to merge into"
    if operation in ("add", "update"):
        text = proposal.text
        if not isinstance(text, str) or not text.strip():
            return "empty text"
        if granularity == "principle" and (problems := check_principle_form(text.strip())):
            return "; ".join(problems)
        for other in items.values():
            if other.id != proposal.item_id and " ".join(other.text.split()).lower() == " ".join(text.split()).lower():
                return f"the same text is in the pool as {other.id}"
        if bad := [name for name, value in proposal.evidence.items() if not _finite(value)]:
            return f"evidence is not a finite number: {', '.join(bad)}"
    return None


_FIELDS: Mapping[str, str] = {
    "id": "text", "text": "text", "granularity": "`principle` or `instance`", "condition": "an object of texts",
    "evidence": "an object of finite numbers", "trajectory_ids": "a list of texts",
    "created": "a whole number", "updated": "a whole number",
}  # fmt: skip


def _whole(value: Any, where: str, mistakes: list[str]) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        mistakes.append(f"{where}: must be a whole number of at least 0, not {value!r}")
        return 0
    return value


def _read_item(raw: Any, where: str, mistakes: list[str]) -> ExperienceItem | None:
    if not isinstance(raw, dict):
        mistakes.append(f"{where}: must be an object, not {type(raw).__name__}")
        return None
    if isinstance(raw.get("id"), str):
        where = f"{where} ({raw['id']})"
    count = len(mistakes)
    mistakes += [f"{where}: {name}: unknown field (known: {', '.join(_FIELDS)})" for name in raw if name not in _FIELDS]
    mistakes += [f"{where}: {name}: missing" for name in ("id", "text", "granularity") if name not in raw]
    condition, evidence, ids = raw.get("condition", {}), raw.get("evidence", {}), raw.get("trajectory_ids", [])
    checks = {
        "id": isinstance(raw.get("id"), str) and _ID.fullmatch(raw["id"]) is not None,
        "text": isinstance(raw.get("text"), str) and bool(raw["text"].strip()),
        "granularity": raw.get("granularity") in ("principle", "instance"),
        "condition": isinstance(condition, dict) and all(isinstance(v, str) for v in condition.values()),
        "evidence": isinstance(evidence, dict) and all(_finite(v) for v in evidence.values()),
        "trajectory_ids": isinstance(ids, list) and all(isinstance(v, str) for v in ids),
    }
    for name, fine in checks.items():
        if not fine and (name in raw or name not in ("id", "text", "granularity")):
            shown = "empty" if raw.get(name) in ("", None) else repr(raw.get(name))[:60]
            mistakes.append(f"{where}: {name}: must be {_FIELDS[name]}, not {shown}")
    created = _whole(raw.get("created", 0), f"{where}: created", mistakes)
    updated = _whole(raw.get("updated", created), f"{where}: updated", mistakes)
    if len(mistakes) == count and raw["granularity"] == "principle":
        mistakes += [f"{where}: text: {problem}" for problem in check_principle_form(raw["text"].strip())]
    if len(mistakes) > count:
        return None
    numbers = {name: float(value) for name, value in evidence.items()}
    return ExperienceItem(raw["id"], raw["text"], raw["granularity"], dict(condition), numbers, tuple(ids), created, updated)


_REPLAY = "replay all edits of the lineage, oldest first"


def replay(edits: Iterable[PoolEdit]) -> tuple[Outline, ...]:
    """Rebuild ids, texts and provenance of a pool from all its edits, oldest first.

    Raises:
        DataError: the edits contradict each other (an id given twice, a change of an unknown item, a wrong ``before``).
    """
    items: dict[str, Outline] = {}
    ever: set[str] = set()
    for place, edit in enumerate(edits, 1):
        where = f"edit {place} ({edit.operation} {edit.item_id})"
        if edit.operation == "add":
            if edit.item_id in ever or edit.after is None:
                raise DataError(f"{where}: the id was given before, or there is no text", "the edits are not of one lineage")
            ever.add(edit.item_id)
            items[edit.item_id] = Outline(edit.item_id, edit.after, edit.iteration, edit.iteration, edit.trajectory_ids)
            continue
        item = items.get(edit.item_id)
        if item is None or item.text != edit.before:
            raise DataError(f"{where}: the item is unknown here or reads otherwise", _REPLAY)
        if edit.operation == "update":
            if edit.after is None:
                raise DataError(f"{where}: no text after the update", "the edits are damaged: open them from the store again")
            items[edit.item_id] = item._replace(text=edit.after, updated=edit.iteration, trajectory_ids=edit.trajectory_ids)
            continue
        if edit.operation == "merge" and (edit.into is None or edit.into not in items or edit.into == edit.item_id):
            raise DataError(f"{where}: merged into {edit.into!r}, which is not there", _REPLAY)
        del items[edit.item_id]
    return tuple(items.values())
