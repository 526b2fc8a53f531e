"""The experience pool: capped, versioned, with ids that never change.

A pool is a value. :meth:`Pool.apply` takes proposals (from a miner, an LLM or a hand) and gives back a new pool, the
edits that led there and the proposals it refused, with the reason. Nothing is lost silently: the edits of a lineage, done again
in order, rebuild the pool's ids, texts and provenance (a test does).
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, NamedTuple, NoReturn, TypeVar

from pydantic import AfterValidator, BaseModel, FiniteFloat, NonNegativeInt, ValidationError

from evolve_dag.errors import DataError
from evolve_dag.experience.locality import trajectory_detail
from evolve_dag.experience.phrases import MAX_WORDS
from evolve_dag.records import ExperienceItem, Granularity, PoolEdit, PoolOperation
from evolve_dag.store.jsonvalues import is_finite, mistakes, to_values

_NUMBERED = re.compile(r"p(\d{4,})")
ITEM_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")
LEAST_WORDS = 3
"""Fewest words of a new principle: 'Verify before answering.'"""


@dataclass(frozen=True, slots=True)
class Proposal:
    """A change that somebody wants. What it needs depends on the operation: ``add``: text and granularity; ``update``:
    item_id and text; ``delete``, ``graduate``, ``recall`` and ``withdraw``: item_id alone; ``merge``: item_id and into."""

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
    def active(self) -> Pool:
        """What may stand in a context: the pool without the items that have graduated or were withdrawn."""
        return replace(self, items=tuple(item for item in self.items if item.active))

    def without(self, item_ids: Collection[str]) -> Pool:
        """The pool without some of its items, whose ids need not be in it."""
        return replace(self, items=tuple(item for item in self.items if item.id not in item_ids))

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

    def apply(self, proposals: Iterable[Proposal], *, iteration: int, cap: int | None = None, strict: bool = False) -> Applied:
        """Carry out ``proposals`` in order, then enforce ``cap`` by deleting the items of lowest lift (of equals the
        newest). Items that are not active do not count for the cap.

        An update keeps the id, the granularity and the condition; its trajectories replace the item's (trajectory ids
        are unique within one iteration only, and ``updated`` names it; the earlier ones stay in the edits). An item that
        has graduated comes back with other words: nobody has seen that the policy does what they say.

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
            if operation in ("graduate", "recall"):
                items[before.id] = replace(before, graduated=iteration if operation == "graduate" else 0)
            elif operation == "withdraw":
                items[before.id] = replace(before, withdrawn=iteration)
            if operation in STANDS:
                edits.append(PoolEdit(operation, before.id, iteration, before.text, before.text, proposal.reason))
                continue
            if operation == "update":
                after = replace(
                    before, text=text, evidence=dict(proposal.evidence) or before.evidence,
                    trajectory_ids=tuple(proposal.trajectory_ids), updated=iteration,
                    graduated=before.graduated if same_words(text) == same_words(before.text) else 0,
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
            active = [item for item in items.values() if item.active]
            surplus = max(0, len(active) - cap)
            place = {item_id: n for n, item_id in enumerate(items)}
            for item in sorted(active, key=lambda i: (lift(i), -place[i.id]))[:surplus]:
                del items[item.id]
                reason = f"over the cap of {cap}: lowest lift ({lift(item):+.2f})"
                edits.append(PoolEdit("delete", item.id, iteration, item.text, None, reason))
        pool = Pool(tuple(items.values()), self.version + bool(edits), number)
        return Applied(pool, edits, refused)

    def to_json(self) -> str:
        """As JSON text; :meth:`from_json` gives an equal pool back."""
        content = {"version": self.version, "next_number": self.next_number, "items": [to_values(i) for i in self.items]}
        return json.dumps(content, indent=1, ensure_ascii=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "pool file") -> Pool:
        """Read what :meth:`to_json` wrote, or what a hand made of it. The granularity that it states is not questioned: what a
        *new* text must be is the business of :meth:`apply`.

        Raises:
            DataError: lists every mistake with its item and field; ``source`` is named in front.
        """
        try:
            content = json.loads(text)
        except ValueError as error:
            remedy = "mend the place above, or remake the pool by its extraction"
            raise DataError(f"{source}: not valid JSON: {error}", remedy) from None
        if not isinstance(content, dict) or not isinstance(content.get("items"), list):
            remedy = 'start with {"version": 0, "next_number": 1, "items": []}'
            raise DataError(f"{source}: must be an object with a list `items`", remedy)
        wrong: list[str] = []
        file = _checked(_File, content, "", wrong) or _File(items=content["items"])
        items: list[ExperienceItem] = []
        seen: dict[str, int] = {}
        for place, raw in enumerate(file.items, 1):
            named = isinstance(raw, dict) and isinstance(raw.get("id"), str)
            where = f"item {place} ({raw['id']})" if named else f"item {place}"
            item = _checked(_Item, raw, f"{where}: ", wrong)
            if item is None:
                continue
            if item.id in seen:
                wrong.append(f"{where}: id: already used by item {seen[item.id]}")
            seen.setdefault(item.id, place)
            match = _NUMBERED.fullmatch(item.id)
            if match and "next_number" in content and int(match[1]) >= file.next_number:
                wrong.append(f"{where}: id: not below next_number {file.next_number}: it would be given twice")
            items.append(item.record())
        if wrong:
            count = f"{len(wrong)} mistake{'s' if len(wrong) > 1 else ''}"
            raise DataError(f"{source}: {count}\n{_numbered(wrong)}", "mend the fields above")
        return cls(tuple(items), file.version, file.next_number)


class _File(BaseModel, strict=True, extra="forbid"):
    """A pool file; its items are judged one by one, so that one broken item does not hide the next."""

    version: NonNegativeInt = 0
    next_number: NonNegativeInt = 1
    items: list[Any]


class _Item(BaseModel, strict=True, extra="forbid"):
    """An item as a hand may have written it."""

    id: Annotated[str, AfterValidator(lambda id: id if ITEM_ID.fullmatch(id) else _refused("should be letters, digits, `_.-`"))]
    text: Annotated[str, AfterValidator(lambda text: text if text.strip() else _refused("should be text"))]
    granularity: Granularity
    condition: dict[str, str] = {}
    evidence: dict[str, FiniteFloat] = {}
    trajectory_ids: list[str] = []
    created: NonNegativeInt = 0
    updated: NonNegativeInt | None = None
    graduated: NonNegativeInt = 0
    withdrawn: NonNegativeInt = 0

    def record(self) -> ExperienceItem:
        fields = self.model_dump() | {"trajectory_ids": tuple(self.trajectory_ids)}
        return ExperienceItem(**fields | {"updated": self.created if self.updated is None else self.updated})


Shape = TypeVar("Shape", bound=BaseModel)


def _checked(shape: type[Shape], raw: Any, where: str, wrong: list[str]) -> Shape | None:
    """``raw`` in its shape, or None; ``wrong`` gets what is wrong with it."""
    try:
        return shape.model_validate(raw)
    except ValidationError as error:
        wrong += [f"{where}{what}" for what in mistakes(error)]
    return None


def _refused(what: str) -> NoReturn:
    raise ValueError(what)


def _numbered(lines: Sequence[str]) -> str:
    return "\n".join(f"  {number}. {line}" for number, line in enumerate(lines, 1))


def lift(item: ExperienceItem) -> float:
    """The item's measured lift; 0 for one that was never measured."""
    return item.evidence.get("lift", 0.0)


def same_words(text: str) -> str:
    """Equal for texts that say the same words."""
    return " ".join(text.split()).lower()


def principle_problems(text: str) -> list[str]:
    """Why ``text`` is not taken into a pool as a new principle: its length, or the trajectory detail that it holds (METHOD:
    granularity). Empty when nothing is against it; it need not read as :mod:`evolve_dag.experience.phrases` writes."""
    problems = []
    words = len(text.split())
    if words < LEAST_WORDS:
        problems.append(f"{words} words say no strategy: at least {LEAST_WORDS}")
    if words > MAX_WORDS:
        problems.append(f"{words} words, more than {MAX_WORDS}")
    if "\n" in text.strip():
        problems.append("more than one line")
    return problems + trajectory_detail(text)


def _objection(proposal: Proposal, items: Mapping[str, ExperienceItem]) -> str | None:
    """Why a proposal cannot be carried out, or None."""
    operation = proposal.operation
    if operation not in EDITED:
        return f"unknown operation {operation!r}: one of {', '.join(EDITED)}"
    granularity = proposal.granularity
    if operation != "add":
        if not proposal.item_id:
            return "names no item"
        if proposal.item_id not in items:
            return f"no item {proposal.item_id!r} in the pool"
        item = items[proposal.item_id]
        granularity = item.granularity
        if item.withdrawn:
            return f"{item.id} was withdrawn: the teacher did worse with it; it stays as the record of that: add another item"
        done = bool(item.graduated)
        if (operation, done) in (("graduate", True), ("recall", False)):
            return f"{item.id} has {'graduated already' if done else 'not graduated'}"
    elif proposal.item_id is not None:
        return f"an added item gets its id from the pool, not {proposal.item_id!r}"
    if operation == "merge":
        if not proposal.into:
            return "does not say which item to merge into"
        if proposal.into == proposal.item_id:
            return "an item cannot be merged into itself"
        if proposal.into not in items:
            return f"no item {proposal.into!r} in the pool to merge into"
        if items[proposal.into].withdrawn:
            return f"{proposal.into} was withdrawn: nothing is merged into it"
    if operation in ("add", "update"):
        text = proposal.text
        if not isinstance(text, str) or not text.strip():
            return "empty text"
        if granularity == "principle" and (problems := principle_problems(text.strip())):
            return "; ".join(problems)
        for other in items.values():
            if other.id != proposal.item_id and same_words(other.text) == same_words(text):
                return f"the same text is in the pool as {other.id}"
        if bad := [name for name, value in proposal.evidence.items() if not is_finite(value)]:
            return f"evidence is not a finite number: {', '.join(bad)}"
    return None


STANDS = ("graduate", "recall", "withdraw")
"""Operations that decide whether an item may stand in a context, and leave it as it is."""
EDITED = {
    "add": "added",
    "update": "updated",
    "delete": "deleted",
    "merge": "merged",
    "graduate": "graduated",
    "recall": "recalled",
    "withdraw": "withdrawn",
}
"""Operation -> what was done to the item, as counts of edits are named."""


def counted(edits: Sequence[PoolEdit]) -> dict[str, int]:
    """``added``, ``updated``, ...: how many edits of each operation."""
    operations: list[str] = [edit.operation for edit in edits]
    return {name: operations.count(operation) for operation, name in EDITED.items()}
