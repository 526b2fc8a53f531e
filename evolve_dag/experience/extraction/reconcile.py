"""What new evidence changes in a pool."""

from __future__ import annotations

from evolve_dag.experience.extraction.contrast import MIN_OTHERS, Mined
from evolve_dag.experience.extraction.evidence import Effect
from evolve_dag.experience.extraction.seen import Seen
from evolve_dag.experience.extraction.situations import Condition, compatible, condition_of
from evolve_dag.experience.features import looks_back
from evolve_dag.experience.phrases import action_of
from evolve_dag.experience.pool import Pool, Proposal
from evolve_dag.records import ExperienceItem


def reconcile(mined: Mined, pool: Pool) -> list[Proposal]:
    """What the new evidence changes in the pool. Items that it says nothing about stay: an internalized lesson leaves
    no contrast behind, and that does not refute it.

    - same situation, same action: ``update`` of the evidence (the text stays, the reason tells the old and new lift);
    - same situation, another action clearly better: ``delete`` and ``add``. An id means one lesson, so it is not rewritten;
    - a general item that a new special case clearly contradicts, or one that tells of what is longer ago and loses where both
      hold: ``delete``, and ``add`` of the new one;
    - an item whose lift is now clearly below zero: ``delete``;
    - everything else that is new: ``add``, strongest first, unless a general item already says the same, or items that stand
      say so at the same moments in other words, or an item that stands says otherwise about a situation that overlaps: some
      states would get two contrary pieces of advice, and a teacher that is told two things does worse than one that is told
      either.

    An item that was withdrawn is no longer advice: it keeps nothing out but what says the same about the same situation. Nor
    does anybody read one that has graduated: it keeps out what is said of the very same situation, in whichever words. A
    special case of it in which the policy does otherwise is a lesson.
    """
    proposals: list[Proposal] = []
    gone: set[str] = set()

    def delete(item: ExperienceItem, reason: str, trajectory_ids: tuple[str, ...] = ()) -> None:
        if item.id not in gone:
            gone.add(item.id)
            proposals.append(Proposal("delete", item_id=item.id, reason=reason, trajectory_ids=trajectory_ids))

    known = _in_our_words(pool)
    withdrawn = {(condition, action) for item, condition, action in known if item.withdrawn}
    known = [entry for entry in known if not entry[0].withdrawn]
    # Every night asks every item again: without a level for all of them together, a good one would fall sooner or later.
    for item, condition, action in known:
        effect = mined.effect(condition, action, among=len(known))
        if effect is not None and effect.high < 0 and min(effect.support, effect.others) >= MIN_OTHERS:
            delete(item, f"refuted: lift {shown_as(effect)}")
    # All contradictions first: an item that goes must not keep out the special cases that it covered until now.
    for pattern in mined.patterns:
        for item, condition, action in known:
            if action == pattern.action:
                continue
            if set(condition) <= set(pattern.condition):
                beaten = mined.clearly_better(pattern.condition, pattern.action, action, among=len(known))
            else:  # what holds for a part of the pattern's moments goes only if it was put to the test there again, and lost
                part = condition_of(dict((*condition, *pattern.condition)))
                overlap = part == condition or (looks_back(dict(part)) and compatible(condition, pattern.condition))
                beaten = overlap and mined.clearly_better(part, pattern.action, action, measured=True, among=len(known))
            if beaten:
                delete(item, f"contradicted by: {pattern.text} (lift {shown_as(pattern.effect)})", pattern.trajectory_ids)
    standing = [entry for entry in known if entry[0].id not in gone]
    held = [(condition, action) for item, condition, action in standing if item.active]
    settled = [(condition, action) for item, condition, action in standing if item.graduated]
    for pattern in sorted(mined.patterns, key=lambda p: (-p.effect.low, p.condition)):
        if (pattern.condition, pattern.action) in withdrawn:
            continue
        effect, ids, own = pattern.effect, pattern.trajectory_ids, (pattern.condition, pattern.action)
        same = next((i for i, condition, action in standing if (condition, action) == own), None)
        if same is not None:
            before = same.evidence.get("lift")
            was = f"; was {before:+.2f}" if before is not None else ""
            proposals.append(
                Proposal("update", item_id=same.id, text=same.text, evidence=effect.evidence(), trajectory_ids=ids,
                         reason=f"new evidence: lift {shown_as(effect)}{was}")
            )  # fmt: skip
            continue
        # Standing items with another action are not clearly worse here (they would be gone): they keep their place.
        if any(
            set(condition) <= set(pattern.condition) if action == pattern.action else mined.meet(condition, pattern.condition)
            for condition, action in held
        ) or mined.seen.repeats(own, held):
            continue
        if any(other[0] == pattern.condition or mined.seen.alike(own, other) for other in settled):
            continue
        held.append(own)
        proposals.append(
            Proposal("add", text=pattern.text, granularity="principle", condition=dict(pattern.condition),
                     evidence=effect.evidence(), trajectory_ids=ids, reason=f"lift {shown_as(effect)}")
        )  # fmt: skip
    return proposals


def subsumed(pool: Pool, seen: Seen) -> list[Proposal]:
    """Merges of items into one with the same advice that is more general, or holds at all their moments of this night and at
    more, and is not clearly weaker. Only an active item takes in one that is active."""
    proposals = []
    known = [entry for entry in _in_our_words(pool) if not entry[0].withdrawn]
    into: dict[str, str] = {}
    for item, condition, action in known:
        general = [
            other
            for other, wider, advice in known
            if advice == action and (other.active or not item.active)
            and item.evidence.get("low", 0.0) <= other.evidence.get("lift", 0.0)
            and (set(wider) < set(condition) or _reaches_further(wider, condition, action, seen))
        ]  # fmt: skip
        if general:
            into[item.id] = min(general, key=lambda other: (len(other.condition), other.id)).id
    for item, _, _ in known:
        target = into.get(item.id)
        while target in into:  # that one goes as well; it ends, since each reaches further than the one before
            target = into[target]
        if target is not None:
            proposals.append(
                Proposal("merge", item_id=item.id, into=target, reason=f"{target} gives the same advice more generally",
                         trajectory_ids=item.trajectory_ids)
            )  # fmt: skip
    return proposals


def _in_our_words(pool: Pool) -> list[tuple[ExperienceItem, Condition, str]]:
    """Principles whose situation and advice the miner can read, with both."""
    return [
        (item, condition_of(item.condition), action)
        for item in pool.items
        if item.granularity == "principle" and item.condition and (action := action_of(item.text)) is not None
    ]


def _reaches_further(wider: Condition, condition: Condition, action: str, seen: Seen) -> bool:
    """Whether advice was taken ``wider`` nearly wherever it was in ``condition``, and at more moments."""
    more, own = seen.moments(wider, action), seen.moments(condition, action)
    return len(more) > len(own) >= MIN_OTHERS and seen.repeats((condition, action), [(wider, action)])


def shown_as(effect: Effect) -> str:
    return (
        f"{effect.lift:+.2f} ({effect.low:+.2f} to {effect.high:+.2f}), {effect.support} against {effect.others} trajectories"
    )
