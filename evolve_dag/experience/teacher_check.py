"""The teacher is checked before it teaches: does experience in its context help or harm on the training tasks?

The teacher's rollouts (with experience) are compared with the student's (without) on the same tasks, paired by task. An item is
judged by the rollouts that it *concerns*: those of the teacher in which it stood in the context, and those of the student in
which the selector would have chosen it. What comes before an item's first appearance owes nothing to the item; to take the
student's average instead would blame an item for the situations that it is about. It may owe something to *other* items: where
good advice has helped the easy episodes to their end, only hard ones come to what stands later. So where the teacher as a whole
is established to help, an item is judged only by the rollouts in which no advice stood before it: they are alike on both sides.

Items that stand in the context together share what they cause. So an item is withdrawn one at a time, the one whose rollouts
lost most in all first, and the others are judged again by the rollouts in which it did not stand. Items that always stand
together cannot be told apart: of those the new ones go, since a teacher without them has been checked before; all of them where
none is new. Of a teacher that harms though no item is established to, the new ones go that are not seen to help; where none is
new, the one whose rollouts lost most. Such a teacher is asked again without what was withdrawn, and checked again: an attempt
each, as often as the experiment says. (docs/adr/0021-teacher-check.md)
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from evolve_dag.evaluation.intervals import by_task, paired, sign_interval
from evolve_dag.experience.pool import Pool
from evolve_dag.records import Finding, PoolEdit, Trajectory

RESAMPLES = 10_000
"""Of an interval: with many items the level of each is high."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """Success of the teacher and of the student on the same tasks."""

    tasks: int
    """On which both sides have judged rollouts."""
    teacher: float
    """Mean over these tasks, 0..1."""
    student: float
    difference: float
    """Teacher less student."""
    low: float
    """Of the interval of ``difference``."""
    high: float

    @property
    def harmful(self) -> bool:
        """Whether the teacher is established to be below the student."""
        return self.high < 0

    @property
    def helpful(self) -> bool:
        """Whether it is established to be above."""
        return self.low > 0

    @property
    def lost(self) -> float:
        """Rewards, over all tasks, that the teacher has less."""
        return -self.difference * self.tasks

    def __str__(self) -> str:
        points = f"{100 * self.difference:+.1f} points ({100 * self.low:+.1f} to {100 * self.high:+.1f})"
        return f"{points} on {self.tasks} training tasks"


@dataclass(frozen=True, slots=True)
class CheckedItem:
    """What an item did to the teacher."""

    item: str
    comparison: Comparison | None
    """By the rollouts by which it is judged and in which no item stood that was withdrawn before it; None where there are none
    on both sides of a task."""
    together: tuple[str, ...] = ()
    """Items that stood in exactly the same rollouts."""
    withdrawn: str = ""
    """Why it was withdrawn; '' when it was not."""
    attempt: int = 1
    """Which one found this: the last in which the item stood."""


@dataclass(frozen=True, slots=True)
class TeacherCheck:
    """What came of a night's check: of its last attempt, and of the refused ones before."""

    whole: Comparison | None
    """All rollouts of the last attempt; None where nothing could be compared."""
    items: tuple[CheckedItem, ...] = ()
    """In the order of the pool, what stood in a context of a later attempt alone behind the others; those that stood in none
    are left out."""
    confidence: float = 0.95
    """Of the interval of ``whole``, and of those of the items all together."""
    note: str = ""
    """Why nothing was compared; '' when something was."""
    earlier: tuple[Comparison, ...] = ()
    """``whole`` of the attempts before the last, oldest first: each was refused."""
    must_help: bool = False
    """Whether a teacher is refused that is not established to be better."""

    def after(self, before: TeacherCheck) -> TeacherCheck:
        """This first check as that of the attempt after ``before``, which was refused."""
        assert before.whole is not None  # else it was not refused
        attempt = before.attempts + 1
        items = {one.item: one for one in (*before.items, *(replace(one, attempt=attempt) for one in self.items))}
        return replace(self, items=tuple(items.values()), earlier=(*before.earlier, before.whole))

    @property
    def attempts(self) -> int:
        """How often the teacher was asked."""
        return len(self.earlier) + 1

    @property
    def withdrew(self) -> bool:
        """Whether the last attempt withdrew anything."""
        return any(one.withdrawn and one.attempt == self.attempts for one in self.items)

    @property
    def withdrawn(self) -> dict[str, str]:
        """Item -> why it was withdrawn."""
        return {one.item: one.withdrawn for one in self.items if one.withdrawn}

    @property
    def helpful(self) -> frozenset[str]:
        """Items that are established to raise the teacher's success."""
        return frozenset(one.item for one in self.items if one.comparison is not None and one.comparison.helpful)

    @property
    def refusal(self) -> str:
        """Why nothing is taught by the last attempt; '' when it may teach."""
        if self.whole is None:
            return f"nothing says that the teacher is better than the student: {self.note}" if self.must_help else ""
        return _refused(self.whole) if self.whole.harmful or (self.must_help and not self.whole.helpful) else ""

    @property
    def told(self) -> tuple[str, ...]:
        """What a person must know of it, a sentence each; none where all is well."""
        last = f"nothing is taught: {self.refusal}" if self.refusal else ""
        if not self.earlier:
            return (*filter(None, [last]), *(f"{item} is withdrawn: {why}" for item, why in self.withdrawn.items()))
        left_out = ", ".join(one.item for one in self.items if one.withdrawn and one.attempt < self.attempts)
        said = (*map(_refused, self.earlier), last or f"the teacher may teach, without {left_out}: {self.whole or self.note}")
        return (
            *(f"attempt {n} of {self.attempts}: {one}" for n, one in enumerate(said, 1)),
            *(f"{one.item} is withdrawn by attempt {one.attempt}: {one.withdrawn}" for one in self.items if one.withdrawn),
        )

    @property
    def findings(self) -> tuple[Finding, ...]:
        """For the next extraction."""
        return tuple(Finding("withdraw", item, why) for item, why in self.withdrawn.items())


def new_items(edits: Iterable[PoolEdit]) -> frozenset[str]:
    """Items that read otherwise after a night's edits than before; new evidence for the same words makes none new."""
    return frozenset(edit.item_id for edit in edits if edit.operation in ("add", "update") and edit.before != edit.after)


def _refused(whole: Comparison) -> str:
    than = "below the student" if whole.harmful else "not established to be better than the student"
    return f"the teacher with experience is {than} without it: {whole}"


class _Rollout(NamedTuple):
    task: str
    reward: float | None
    items: frozenset[str]
    """That stood in its context, or would have."""
    first: frozenset[str]
    """Those of them before which no other stood."""


class _Sides(NamedTuple):
    teacher: Sequence[_Rollout]
    student: Sequence[_Rollout]

    def compared(self, level: float) -> Comparison | None:
        """The two on the tasks of both; None where there are none."""
        known = [by_task([r.task for r in side], [r.reward for r in side]) for side in self]
        teacher_T, student_T = paired(*known)
        if not len(teacher_T):
            return None
        low, high = sign_interval(teacher_T - student_T, resamples=RESAMPLES, confidence=level)
        teacher, student = float(teacher_T.mean()), float(student_T.mean())
        return Comparison(len(teacher_T), teacher, student, teacher - student, low, high)

    def concerning(self, item: str, gone: Collection[str]) -> _Sides:
        """The rollouts that an item concerns and in which none of ``gone`` stood."""
        return _Sides(*([r for r in side if item in r.items and not r.items & set(gone)] for side in self))

    def bundles(self, pool: Pool) -> list[tuple[str, ...]]:
        """The items that stood in a context; those that concern exactly the same rollouts together."""
        found: dict[tuple[tuple[int, ...], ...], list[str]] = {}
        for item in pool.ids:
            places = tuple(tuple(n for n, rollout in enumerate(side) if item in rollout.items) for side in self)
            if places[0]:
                found.setdefault(places, []).append(item)
        return [tuple(bundle) for bundle in found.values()]


def check_teacher(
    pool: Pool,
    teacher: Sequence[Trajectory],
    student: Sequence[Trajectory],
    *,
    new: Collection[str],
    confidence: float = 0.95,
    must_help: bool = False,
) -> TeacherCheck:
    """Compare the two sides.

    Args:
        pool: the items that may have stood in the context.
        teacher: rollouts with experience; their steps say which items stood in the context (``selected``).
        student: rollouts of the same tasks without experience, whose steps say what would have stood there.
        new: items that no teacher has had in its context before, as they read now.
        confidence: level at which an interval must lie below zero; for items it holds for all of them together (Bonferroni).
        must_help: refuse a teacher that is not established to be better.
    """
    sides = _Sides(_rollouts(teacher), _rollouts(student))
    whole = sides.compared(confidence)
    if whole is None:
        return TeacherCheck(None, confidence=confidence, note="no task was judged on both sides", must_help=must_help)
    if whole.helpful:
        sides = _Sides(*([r._replace(items=r.first) for r in side] for side in sides))
    bundles = sides.bundles(pool)
    measured, why = _withdrawals(sides, bundles, new, 1 - (1 - confidence) / max(1, len(bundles)))
    if whole.harmful and not why:
        told = f"the teacher with experience does worse, {whole}, and no item alone accounts for it"
        why = dict.fromkeys(_suspects(bundles, measured, new), told)
    together = {item: tuple(other for other in bundle if other != item) for bundle in bundles for item in bundle}
    checked = (CheckedItem(i, measured[i], together[i], why.get(i, "")) for i in pool.ids if i in together)
    return TeacherCheck(whole, tuple(checked), confidence, must_help=must_help)


def _withdrawals(
    sides: _Sides, bundles: Sequence[tuple[str, ...]], new: Collection[str], level: float
) -> tuple[dict[str, Comparison | None], dict[str, str]]:
    """Item -> what it did; item -> why it goes. One bundle after the other, the one whose rollouts lost most in all first."""
    measured: dict[str, Comparison | None] = {}
    why: dict[str, str] = {}
    while True:
        left = [bundle for bundle in bundles if not why.keys() & set(bundle)]
        found = {bundle: sides.concerning(bundle[0], why.keys()).compared(level) for bundle in left}
        measured |= {item: comparison for bundle, comparison in found.items() for item in bundle}
        lost = {bundle: c.lost for bundle, c in found.items() if c is not None and c.harmful}
        if not lost:
            return measured, why
        worst = max(lost, key=lambda bundle: lost[bundle])
        blamed = _blamed(worst, new)
        told = f"; these always stood together: {', '.join(worst)}" if len(worst) > 1 else ""
        why |= dict.fromkeys(blamed, f"the teacher does worse with it: {found[worst]}{told}")


def _suspects(bundles: Sequence[tuple[str, ...]], measured: dict[str, Comparison | None], new: Collection[str]) -> list[str]:
    """Whom to blame for a harm that is no item's: the new ones that are not seen to help; else those that lost most."""
    found = {bundle: measured[bundle[0]] for bundle in bundles}
    lost = {bundle: 0.0 if one is None else one.lost for bundle, one in found.items()}
    seen_to_help = {item for bundle in bundles if lost[bundle] < 0 for item in bundle}
    fresh = [item for bundle in bundles for item in bundle if item in new and item not in seen_to_help]
    worst: tuple[str, ...] = max(lost, key=lost.__getitem__, default=())
    return fresh or list(worst)


def _rollouts(trajectories: Iterable[Trajectory]) -> list[_Rollout]:
    return [_Rollout(t.task_id, t.reward, *_stood(t)) for t in trajectories]


def _stood(trajectory: Trajectory) -> tuple[frozenset[str], frozenset[str]]:
    """All items in its context, and those of the first step that had any."""
    chosen = [frozenset(step.selected) for step in trajectory.steps if step.selected]
    return frozenset().union(*chosen), chosen[0] if chosen else frozenset()


def _blamed(items: Sequence[str], new: Collection[str]) -> list[str]:
    """The new ones; all of them where none is."""
    return [item for item in items if item in new] or list(items)
