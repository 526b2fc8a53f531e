"""Student's and teacher's view of the same action, aligned by span (METHOD steps 4 and 5; DESIGN: Alignment).

The student sees the clean history, the teacher the same with experience added to one message of a copy.
The sampled action ids stand in both views, so an action token is found by its offset in the span and
never by searching. The clean history only grows: a whole trajectory is one :class:`StudentRow` with the
loss on its action spans, and the teacher's views share most of their tokens with it and with each other.

Everything that can go wrong here would corrupt training silently, so all of it is checked, and an
``AlignmentError`` names trajectory and step.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from evolve_dag.errors import AlignmentError
from evolve_dag.records import Message, Step, Trajectory


class Chat(Protocol):
    """The part of the chat format that alignment needs."""

    def encode(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> list[int]: ...


class Injection(Protocol):
    """The teacher's view of the history that precedes one step."""

    @property
    def messages(self) -> Sequence[Message]:
        """Copy of the clean history with the experience added."""
        ...

    @property
    def selected(self) -> Sequence[str]:
        """Ids of the experience items."""
        ...

    @property
    def text(self) -> str:
        """Exact text that was added; '' when nothing was."""
        ...


@dataclass(frozen=True, slots=True)
class TeacherContext:
    """A plain :class:`Injection`."""

    messages: tuple[Message, ...]
    selected: tuple[str, ...] = ()
    text: str = ""


Inject = Callable[[Trajectory, int], Injection]
"""(trajectory, step index) -> the teacher's messages before that step."""

KeepStep = Callable[[Trajectory, Step], bool]
"""Whether a step's action is learned from; a step that is not stays in the history."""


@dataclass(frozen=True, slots=True)
class StudentRow:
    """The clean trajectory as one row of token ids."""

    trajectory_id: str
    ids: tuple[int, ...]
    """Clean history up to and including the last kept action; no experience anywhere."""
    steps: tuple[int, ...]
    """Indices of the kept steps, ascending."""
    spans: tuple[tuple[int, int], ...]
    """``[start, end)`` of each kept step's action in ``ids``; same order as ``steps``, never overlapping."""

    @property
    def positions(self) -> tuple[int, ...]:
        """Positions of all action tokens in ``ids``, ascending."""
        return tuple(position for start, end in self.spans for position in range(start, end))

    @property
    def action_ids(self) -> tuple[int, ...]:
        """The N sampled ids that the loss is on, in order."""
        return tuple(self.ids[position] for position in self.positions)


@dataclass(frozen=True, slots=True)
class TeacherView:
    """What the teacher reads before one step, and the student's or teacher's action after it."""

    trajectory_id: str
    step: int
    ids: tuple[int, ...]
    """Context with experience, then the action."""
    start: int
    """Where the action begins in ``ids``; it ends where ``ids`` ends."""
    selected: tuple[str, ...] = ()
    """Ids of the experience items in the context."""
    injected: str = ""
    """Text that was added to the clean history."""

    @property
    def action_ids(self) -> tuple[int, ...]:
        return self.ids[self.start :]


@dataclass(frozen=True, slots=True)
class Aligned:
    """One trajectory, ready for teacher scoring and training."""

    row: StudentRow
    views: tuple[TeacherView, ...]
    """One per kept step, same order as ``row.steps``."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Which trajectories are learned from, and why the others are not."""

    kept: tuple[Trajectory, ...]
    failed: int
    """Dropped: the rollout itself failed, or has no step."""
    wrong: int
    """Dropped by rejection sampling: judged, and not right."""
    unjudged: int
    """Dropped by rejection sampling: no verdict. Not the same as wrong."""

    @property
    def counts(self) -> dict[str, int]:
        """``kept, failed, wrong, unjudged``; they add up to the trajectories given."""
        return {"kept": len(self.kept), "failed": self.failed, "wrong": self.wrong, "unjudged": self.unjudged}


def select_rows(trajectories: Sequence[Trajectory], rejection: bool) -> Kept:
    """Drop failed trajectories; with ``rejection``, keep those with reward 1.0 only (METHOD: off_policy)."""
    kept: list[Trajectory] = []
    failed = wrong = unjudged = 0
    for trajectory in trajectories:
        if trajectory.status == "failed" or not trajectory.steps:
            failed += 1
        elif not rejection or trajectory.reward == 1.0:
            kept.append(trajectory)
        elif trajectory.reward is None:
            unjudged += 1
        else:
            wrong += 1
    return Kept(tuple(kept), failed, wrong, unjudged)


def without_problems(trajectory: Trajectory, step: Step) -> bool:
    """A :data:`KeepStep`: learn from actions that the environment accepted only."""
    return step.problem is None


def no_injection(trajectory: Trajectory, step: int) -> TeacherContext:
    """An :data:`Inject`: the teacher sees what the student sees (injection ``none``)."""
    return TeacherContext(trajectory.history(step))


def replay_injection(pattern: Literal["global", "step_wise"]) -> Inject:
    """An :data:`Inject` that restores the context in which a teacher's trajectory was sampled.

    It adds the recorded ``step.injected`` again: to the last user or tool message (``step_wise``) or to the
    system message (``global``). Whatever the pool is now, this is what the teacher read.
    """

    def inject(trajectory: Trajectory, step: int) -> TeacherContext:
        record = trajectory.steps[step]
        messages = list(trajectory.history(step))
        if record.injected:
            at = 0 if pattern == "global" else len(messages) - 1
            old = messages[at]
            messages[at] = Message(old.role, old.content + record.injected, old.token_ids)
        return TeacherContext(tuple(messages), record.selected, record.injected)

    return inject


def student_row(trajectory: Trajectory, chat: Chat, keep_step: KeepStep | None = None) -> StudentRow:
    """The student's view of a trajectory. ``spans`` is empty when ``keep_step`` keeps nothing.

    Raises:
        AlignmentError: a step has no token ids, or the rendered history does not hold the sampled ids, or
            rendering a longer history changes the tokens of a shorter one.
    """
    kept = [step for step in trajectory.steps if keep_step is None or keep_step(trajectory, step)]
    if not kept:
        return StudentRow(trajectory.id, (), (), ())
    last = kept[-1]
    row = chat.encode(trajectory.history(last.index), generation_prompt=True) + list(last.token_ids)
    spans: list[tuple[int, int]] = []
    for step in kept:
        if not step.token_ids:
            raise _error(
                trajectory.id,
                step.index,
                "the action has no token ids",
                "distillation needs the sampled ids: roll out with a backend that reports them (transformers)",
            )
        context = chat.encode(trajectory.history(step.index), generation_prompt=True)
        start, end = len(context), len(context) + len(step.token_ids)
        if row[:start] != context:
            raise _error(
                trajectory.id,
                step.index,
                f"the clean history changes its tokens as it grows (first difference at token {_common(row, context)})",
                "the chat format must render each message independently of what follows it",
            )
        if tuple(row[start:end]) != step.token_ids:
            raise _error(
                trajectory.id,
                step.index,
                f"tokens {start}..{end} of the row are not the sampled action ids",
                _VERBATIM,
            )
        spans.append((start, end))
    return StudentRow(trajectory.id, tuple(row), tuple(step.index for step in kept), tuple(spans))


def teacher_view(trajectory: Trajectory, step: int, injection: Injection, chat: Chat) -> TeacherView:
    """The teacher's view of one step: the same action ids behind the injected history.

    Raises:
        AlignmentError: the clean history already holds the experience, or the injected messages differ from the
            clean ones by anything but ``injection.text`` at the end of one message that is not the assistant's.
    """
    clean = trajectory.history(step)
    _check_injection(trajectory.id, step, clean, injection)
    context = chat.encode(tuple(injection.messages), generation_prompt=True)
    action = trajectory.steps[step].token_ids
    return TeacherView(trajectory.id, step, (*context, *action), len(context), tuple(injection.selected), injection.text)


def align(trajectory: Trajectory, chat: Chat, inject: Inject, keep_step: KeepStep | None = None) -> Aligned:
    """Student's row and the teacher's view of every kept step of one trajectory.

    Raises:
        AlignmentError: see :func:`student_row` and :func:`teacher_view`.
    """
    row = student_row(trajectory, chat, keep_step)
    views = tuple(teacher_view(trajectory, step, inject(trajectory, step), chat) for step in row.steps)
    for view, (start, end) in zip(views, row.spans, strict=True):
        if view.action_ids != row.ids[start:end]:
            raise _error(trajectory.id, view.step, "teacher and student views hold different action ids", _VERBATIM)
    return Aligned(row, views)


def align_all(
    trajectories: Sequence[Trajectory], chat: Chat, inject: Inject, keep_step: KeepStep | None = None
) -> list[Aligned]:
    """:func:`align` for many; a trajectory without a kept step is left out."""
    aligned = (align(trajectory, chat, inject, keep_step) for trajectory in trajectories)
    return [one for one in aligned if one.row.spans]


_VERBATIM = "the chat format must copy token_ids verbatim behind the generation prompt"

_ONLY_THE_TEXT = "the teacher's view is the clean history plus the recorded text; anything else would be distilled too"


def holds_experience(message: Message, text: str) -> bool:
    """Whether injected text stands in a message, as lines of its own. The policy's turns are its own words, whatever it
    repeats; and what an environment says within a line, or quotes, is no injection."""
    return message.role != "assistant" and f"\n{text.strip()}\n" in f"\n{message.content.strip()}\n"


def _check_injection(trajectory_id: str, step: int, clean: Sequence[Message], injection: Injection) -> None:
    text = injection.text.strip()
    if text:
        for message in clean:
            if holds_experience(message, text):
                raise _error(
                    trajectory_id,
                    step,
                    f"the clean history holds experience: its {message.role} message contains {text[:60]!r}",
                    "inject into a copy; the stored system, question and observations must stay clean",
                )
    given = tuple(injection.messages)
    if len(given) != len(clean):
        raise _error(
            trajectory_id,
            step,
            f"the injected history has {len(given)} messages, the clean one {len(clean)}",
            "experience is added to an existing message, never as a message of its own",
        )
    changed = [(old, new) for old, new in zip(clean, given, strict=True) if old != new]
    expected = 1 if text else 0
    if len(changed) != expected:
        what = f"{len(changed)} messages differ from the clean history, expected {expected}"
        raise _error(trajectory_id, step, what, _ONLY_THE_TEXT)
    for old, new in changed:
        added = new.content[len(old.content) :]
        if old.role == "assistant" or new.role != old.role or new.token_ids != old.token_ids:
            what = f"the injection changed the role or the tokens of the {old.role} message"
            raise _error(trajectory_id, step, what, _ONLY_THE_TEXT)
        if not new.content.startswith(old.content) or added.strip() != text:
            what = f"the {old.role} message differs by {added[:60]!r}, not by {text[:60]!r}"
            raise _error(trajectory_id, step, what, _ONLY_THE_TEXT)


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common beginning."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def _error(trajectory_id: str, step: int, what: str, remedy: str) -> AlignmentError:
    return AlignmentError(f"trajectory {trajectory_id}, step {step}: {what}", remedy)
