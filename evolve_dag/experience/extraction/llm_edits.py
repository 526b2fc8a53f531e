"""The second half of the extraction chain: what the critiques propose becomes edits of the pool.

Decisions against the pool, reconciliation of a batch, consolidation at the cap. A model's answer is a proposal; what is
wrong with it is counted, and the pool stays valid whatever it says.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from evolve_dag.errors import ModelError
from evolve_dag.experience.extraction import llm_plans as plans
from evolve_dag.experience.extraction.llm_calls import Asker, in_order
from evolve_dag.experience.extraction.llm_form import Form
from evolve_dag.experience.extraction.llm_plans import Candidate, Tally
from evolve_dag.experience.llm_text import pool_text
from evolve_dag.experience.pool import Pool, Proposal, same_words
from evolve_dag.plain import one_line
from evolve_dag.prompts import fence
from evolve_dag.records import Granularity, PoolEdit


@dataclass(frozen=True, slots=True)
class Lesson:
    """What a critique made of one group."""

    task_id: str
    trajectory_ids: tuple[str, ...]
    """The judged trajectories of the group."""
    candidates: tuple[Candidate, ...]
    """Each has the form of an item."""
    names: frozenset[str]
    """Entities of the task."""


@dataclass(frozen=True, slots=True)
class Draft:
    """A change that one or several groups want."""

    operation: Literal["add", "update", "delete"]
    item_id: str | None
    text: str | None
    """None for a deletion, and for an update that changes no word: what the item says was found again."""
    reason: str
    trajectory_ids: tuple[str, ...]
    groups: frozenset[str]

    def joined(self, other: Draft) -> Draft:
        """This change, wanted by the other's groups too."""
        reason = self.reason if other.reason in self.reason else one_line(f"{self.reason}; {other.reason}", 400)
        ids = tuple(dict.fromkeys((*self.trajectory_ids, *other.trajectory_ids)))
        return replace(self, reason=reason, trajectory_ids=ids, groups=self.groups | other.groups)


class PoolEditor:
    """The pool while an extraction works on it.

    Args:
        cap: most items.
        tally: gets what :func:`evolve_dag.experience.extraction.llm.extract_with_llm` counts.
    """

    def __init__(
        self, pool: Pool, asker: Asker, form: Form, *, granularity: Granularity, cap: int, iteration: int, tally: Tally
    ) -> None:
        self.pool = pool
        self.edits: list[PoolEdit] = []
        """All of this extraction, in order."""
        self._asker, self._form, self._tally = asker, form, tally
        self._granularity, self._cap, self._iteration = granularity, cap, iteration

    async def take_in(self, batch: Sequence[Lesson]) -> None:
        """Decisions of a batch of tasks, reconciled and applied; then the cap."""
        drafts = [draft for found in await in_order(self._decide(lesson) for lesson in batch) for draft in found]
        if not drafts:
            return
        names = union(lesson.names for lesson in batch)
        wanted = await self._reconcile(drafts, names)
        self._apply([self._proposal(draft) for draft in wanted])
        caused = tuple(dict.fromkeys(id_ for draft in wanted for id_ in draft.trajectory_ids))
        await self.consolidate(caused, names)

    def _proposal(self, draft: Draft) -> Proposal:
        item = self.pool.get(draft.item_id) if draft.item_id is not None else None
        text, evidence, taught = draft.text, dict[str, float](), draft.trajectory_ids
        if item is not None and draft.operation == "update":
            text = item.text if text is None else text
            evidence = dict(item.evidence) if same_words(text) == same_words(item.text) else evidence
            if any(edit.item_id == item.id for edit in self.edits):  # an earlier batch of this night had it already
                taught = tuple(dict.fromkeys((*item.trajectory_ids, *taught)))
        support = item.evidence.get("support", 0.0) if item is not None else 0.0
        return Proposal(
            draft.operation,
            item_id=draft.item_id,
            text=text,
            granularity=self._granularity,
            evidence={**evidence, "support": support + len(draft.groups)},
            trajectory_ids=taught,
            reason=draft.reason,
        )

    def _apply(self, proposals: Iterable[Proposal]) -> None:
        applied = self.pool.apply(proposals, iteration=self._iteration)
        self.pool = applied.pool
        self.edits += applied.edits
        self._tally["refused"] += len(applied.refused)

    async def _decide(self, lesson: Lesson) -> list[Draft]:
        """What the candidates of one group do to the pool; none when the call fails. Against an empty pool there is
        nothing to decide: all are added. What the pool says already, by the model's word or in the same words, is an item found
        again: a task more that asks for it."""
        pool, candidates = self.pool, lesson.candidates
        decisions: list[plans.PoolDecision] | None = None
        if pool.items and candidates:
            listed = "\n".join(f"{n}. {candidate.text}" for n, candidate in enumerate(candidates, 1))
            blanks = {
                "pool": fence("pool", pool_text(pool)),
                "candidates": fence("candidates", listed),
                "form": self._form.prompt,
            }
            count, ids = len(candidates), frozenset(pool.ids)
            closed = frozenset(item.id for item in pool.items if item.withdrawn)
            try:
                value = await self._asker.json(
                    "decide", (lesson.task_id,), blanks, plans.DECISIONS_SCHEMA,
                    lambda v: plans.read_decisions(v, count, ids, Counter(), closed) is not None,
                    guide=self._form.guides.decisions(count, pool.ids),
                )  # fmt: skip
            except ModelError:
                return []
            if value is None:
                self._tally["undecided"] += count
            else:
                decisions = plans.read_decisions(value, count, ids, self._tally, closed)
        drafts = []
        for place, candidate in enumerate(candidates):
            decision = decisions[place] if decisions is not None else plans.PoolDecision("ADD")
            reason = decision.reason or candidate.why or f"learned from {lesson.task_id}"
            provenance = (reason, lesson.trajectory_ids, frozenset({lesson.task_id}))
            if decision.operation == "DELETE":
                drafts.append(Draft("delete", decision.item_id, None, *provenance))
            elif decision.operation == "UPDATE":
                text: str | None = candidate.text
                if decision.text is not None:
                    text = await self._form.written(decision.text, lesson.names, (lesson.task_id, "update", place))
                if text is not None:
                    drafts.append(Draft("update", decision.item_id, text, *provenance))
            elif decision.operation == "ADD":
                text = self._form.tidy(decision.text or candidate.text)
                if self._form.problems(text, lesson.names):
                    text = candidate.text  # it has the form
                said = next((i.id for i in pool.items if not i.withdrawn and same_words(i.text) == same_words(text)), None)
                drafts.append(Draft("update", said, None, *provenance) if said else Draft("add", None, text, *provenance))
            elif decision.item_id is not None:
                drafts.append(Draft("update", decision.item_id, None, *provenance))
        return drafts

    async def _reconcile(self, drafts: Sequence[Draft], names: frozenset[str]) -> list[Draft]:
        """One change per item and lesson: DELETE beats UPDATE, UPDATE beats an ADD of the same text, similar ones are
        joined as the model says. Deletes come first, then updates, then additions. That an item was found again changes no
        word, so it gives way to whatever does, and lends it its groups."""
        deletes: dict[str, Draft] = {}
        for draft in drafts:
            if draft.operation == "delete" and draft.item_id is not None:
                _gather(deletes, draft.item_id, draft)
        texts: list[Draft] = []
        again: list[Draft] = []
        for draft in sorted((d for d in drafts if d.operation != "delete"), key=lambda d: d.operation != "update"):
            if draft.item_id in deletes:  # what one group found to be wrong does not stay since another found it
                self._tally["overruled"] += 1
                continue
            if draft.text is None:
                again.append(draft)
                continue
            twin = next((n for n, d in enumerate(texts) if same_words(d.text or "") == same_words(draft.text or "")
                         and draft.item_id in (None, d.item_id)), None)  # fmt: skip
            if twin is None:
                texts.append(draft)
            else:
                self._tally["joined"] += 1
                texts[twin] = texts[twin].joined(draft)
        texts = await self._join_similar(texts, names)
        updates: dict[str, Draft] = {}
        for draft in texts:
            if draft.item_id is not None:
                self._tally["overruled"] += _gather(updates, draft.item_id, draft)  # of several texts the first stands
        for draft in again:
            assert draft.item_id is not None
            self._tally["joined"] += _gather(updates, draft.item_id, draft)
        return [*deletes.values(), *updates.values(), *(d for d in texts if d.item_id is None)]

    async def _join_similar(self, texts: list[Draft], names: frozenset[str]) -> list[Draft]:
        """Proposals that the model finds to be one are joined; without a readable plan all stay as they are."""
        if len({group for draft in texts for group in draft.groups}) < 2 or len(texts) < 2:
            return texts  # one critique wrote them side by side
        listed = "\n".join(
            f"{n}. {f'UPDATE {draft.item_id}' if draft.item_id else 'ADD'}: {draft.text}" for n, draft in enumerate(texts, 1)
        )
        blanks = {"proposals": fence("proposals", listed), "form": self._form.prompt}
        try:
            value = await self._asker.json(
                "reconcile", (), blanks, plans.RECONCILE_SCHEMA,
                lambda v: plans.read_reconciliation(v, len(texts), Counter()) is not None,
                guide=self._form.guides.reconciliation(len(texts)),
            )  # fmt: skip
        except ModelError:
            return texts
        left: list[Draft | None] = list(texts)
        for places, text, reason in plans.read_reconciliation(value, len(texts), self._tally) or []:
            first_id = next((texts[n].item_id for n in sorted(places) if texts[n].item_id), None)
            members = [n for n in sorted(places) if texts[n].item_id in (None, first_id)]
            if len(members) < 2:
                continue
            lead = next(n for n in members if texts[n].item_id == first_id)  # an UPDATE speaks for the ADDs it takes in
            formed = await self._form.written(text, names, ("reconcile", *members)) if text else None
            one = replace(texts[lead], text=formed or texts[lead].text, reason=reason or texts[lead].reason)
            for n in members:
                if n != lead:
                    one = one.joined(texts[n])
                left[n] = None
            left[lead] = one
            self._tally["joined"] += len(members) - 1
        return [draft for draft in left if draft is not None]

    async def consolidate(self, caused: tuple[str, ...], names: frozenset[str]) -> None:
        """Bring what may stand in a context down to the cap: by the model's plan, followed only as far as the cap asks; what is
        still over it goes by a rule: the least supported first, of equals the least recently updated, of those the oldest."""
        cap = self._cap
        if len(self.pool.active) <= cap:
            return
        self._tally["consolidations"] += 1
        self._apply(await self._plan(caused, names))
        active = self.pool.active
        surplus = max(0, len(active) - cap)
        place = {item_id: n for n, item_id in enumerate(active.ids)}
        weakest = sorted(active.items, key=lambda i: (i.evidence.get("support", 0.0), i.updated, place[i.id]))[:surplus]
        self._tally["over_cap"] += len(weakest)
        self._apply(
            Proposal(
                "delete",
                item_id=item.id,
                trajectory_ids=caused,
                reason=f"over the cap of {cap}: least supported ({item.evidence.get('support', 0.0):g} tasks), "
                f"last updated in iteration {item.updated}",
            )
            for item in weakest
        )

    async def _plan(self, caused: tuple[str, ...], names: frozenset[str]) -> list[Proposal]:
        """The model's plan as proposals; none when it fails."""
        pool, cap = self.pool.active, self._cap
        blanks = {
            "items": len(pool),
            "cap": cap,
            "surplus": len(pool) - cap,
            "pool": fence("pool", pool_text(pool, support=True)),
            "form": self._form.prompt,
        }

        def read(value: Any, tally: Tally) -> tuple[list[plans.Merge], list[tuple[str, str]]] | None:
            return plans.read_consolidation(value, pool.ids, tally)

        try:
            value = await self._asker.json(
                "consolidate",
                (),
                blanks,
                plans.CONSOLIDATE_SCHEMA,
                lambda v: read(v, Counter()) is not None,
                guide=self._form.guides.consolidation(pool.ids),
            )
        except ModelError:
            return []
        merges, deletes = read(value, self._tally) or ([], [])
        proposals: list[Proposal] = []
        left, needed = self.pool, set[str]()
        for merge in merges:
            text = (
                await self._form.written(merge.text, names, ("consolidate", *merge.members))
                if len(left.active) > cap and merge.text
                else None
            )
            if text is None:
                continue
            joined = self._joined(left, merge, text, caused)
            applied = left.apply(joined, iteration=self._iteration)
            if applied.refused:  # nothing goes into a text that is not taken
                self._tally["refused"] += len(applied.refused)
                continue
            proposals += joined
            left = applied.pool
            needed.update(proposal.item_id for proposal in joined if proposal.item_id)
        deletes = [(item_id, reason) for item_id, reason in deletes if item_id not in needed]
        # A model that is asked for two deletions gives ten: more than the cap asks would be lost for nothing.
        for item_id, reason in deletes[: max(0, len(left.active) - cap)]:
            why = f"over the cap of {cap}: {reason or 'least useful'}"
            proposals.append(Proposal("delete", item_id=item_id, trajectory_ids=caused, reason=why))
        return proposals

    def _joined(self, pool: Pool, merge: plans.Merge, text: str, caused: tuple[str, ...]) -> list[Proposal]:
        """The members into the best supported of them, which gets the text; or into the item that has the text already."""
        members = [pool.get(item_id) for item_id in merge.members]
        twin = next((i for i in pool.active.items if i not in members and same_words(i.text) == same_words(text)), None)
        kept = twin or max(members, key=lambda item: item.evidence.get("support", 0.0))  # of equals the first named
        joined = [*members, twin] if twin else members
        reason = merge.reason or "says the same"
        # A trajectory's id means something within its iteration only; what earlier ones taught stays in the edits.
        taught = dict.fromkeys(id_ for i in joined if i.updated == self._iteration for id_ in i.trajectory_ids)
        return [
            *(
                Proposal("merge", item_id=item.id, into=kept.id, trajectory_ids=caused, reason=reason)
                for item in members
                if item is not kept
            ),
            Proposal(
                "update",
                item_id=kept.id,
                text=text,
                evidence={"support": sum(item.evidence.get("support", 0.0) for item in joined)},
                trajectory_ids=tuple(taught) or caused,
                reason=f"joins {', '.join(item.id for item in joined)}: {reason}",
            ),
        ]


def _gather(found: dict[str, Draft], item_id: str, draft: Draft) -> bool:
    """Join ``draft`` to what is found for the item; whether there was something."""
    known = found.get(item_id)
    found[item_id] = known.joined(draft) if known else draft
    return known is not None


def union(sets: Iterable[frozenset[str]]) -> frozenset[str]:
    return frozenset[str]().union(*sets)
