from __future__ import annotations

from dataclasses import replace

import pytest
from distillation_fakes import HINTS, TinyChat, global_injection, make_trajectory
from hypothesis import given, settings
from hypothesis import strategies as st

from evolve_dag.distillation.alignment import (
    TeacherContext,
    align,
    align_all,
    holds_experience,
    no_injection,
    replay_injection,
    select_rows,
    student_row,
    without_problems,
)
from evolve_dag.errors import AlignmentError
from evolve_dag.records import Message, Step, Trajectory

STEP_WISE = replay_injection("step_wise")

TEXTS = st.text(alphabet="abcxyz\n ", max_size=6)


@st.composite
def trajectories(draw: st.DrawFn) -> Trajectory:
    chat = TinyChat()
    count = draw(st.integers(1, 5))
    steps = []
    for index in range(count):
        action = draw(TEXTS)
        ended = draw(st.booleans())
        hint = draw(st.sampled_from(["", "\nhint:\nA", "\nhint:\nAB\nC"]))
        steps.append(
            Step(
                index=index,
                text=action,
                token_ids=chat.action(action) if ended or not action else tuple(chat.text(action)),
                logprobs=(),
                observation=None if index == count - 1 else draw(TEXTS),
                problem=draw(st.sampled_from([None, "malformed"])),
                selected=("p1",) if hint else (),
                injected=hint,
            )
        )
    return Trajectory("t#0", "t", 0, 0, draw(TEXTS), draw(TEXTS), tuple(steps), "answered", reward=1.0)


@settings(max_examples=150, deadline=None)
@given(trajectories(), st.sampled_from(["none", "global", "step_wise"]), st.booleans(), st.booleans())
def test_both_views_hold_the_sampled_ids_and_the_student_no_experience(
    trajectory: Trajectory, pattern: str, merges: bool, drop_problems: bool
) -> None:
    chat = TinyChat(merges)
    inject = {"none": no_injection, "global": global_injection, "step_wise": STEP_WISE}[pattern]
    aligned = align(trajectory, chat, inject, without_problems if drop_problems else None)
    kept = [step for step in trajectory.steps if not drop_problems or step.problem is None]
    assert aligned.row.steps == tuple(step.index for step in kept)
    for step, view, (start, end) in zip(kept, aligned.views, aligned.row.spans, strict=True):
        assert aligned.row.ids[start:end] == view.action_ids == step.token_ids
        assert list(aligned.row.ids[:start]) == chat.encode(trajectory.history(step.index))
        assert list(view.ids[: view.start]) == chat.encode(inject(trajectory, step.index).messages)
    if kept:
        # No capital letter stands in any text but the experience's.
        capitals = {chat.text(letter)[0] for letter in HINTS}
        assert capitals.isdisjoint(aligned.row.ids)
        assert aligned.row.spans[-1][1] == len(aligned.row.ids)


def test_history_that_holds_experience_is_refused(chat: TinyChat) -> None:
    clean = make_trajectory(chat, 3)
    leaked = replace(clean, question=clean.question + clean.steps[0].injected)
    with pytest.raises(AlignmentError, match=r"trajectory t3#0, step 0: the clean history holds experience: its user message"):
        align(leaked, chat, STEP_WISE)
    steps = (replace(clean.steps[0], observation=f"see{clean.steps[1].injected}"), *clean.steps[1:])
    with pytest.raises(AlignmentError, match=r"step 1: .* its tool message"):
        align(replace(clean, steps=steps), chat, STEP_WISE)


@pytest.mark.parametrize("said", ["you said: {}", "> {}", "{}, and more"])
def test_an_environment_may_repeat_what_was_said(chat: TinyChat, said: str) -> None:
    clean = make_trajectory(chat, 3)
    hint = clean.steps[1].injected.strip()
    first = replace(clean.steps[0], observation=said.format(hint))
    align(replace(clean, steps=(first, *clean.steps[1:])), chat, STEP_WISE)
    assert not holds_experience(Message("tool", said.format(hint)), hint)
    assert not holds_experience(Message("assistant", hint), hint)
    assert holds_experience(Message("tool", f"the page\n{hint}"), f"\n{hint}")


def test_an_action_may_quote_its_hint(chat: TinyChat) -> None:
    clean = make_trajectory(chat, 3)
    quoting = "hint:\n" + clean.steps[0].injected.split("\n")[-1]
    first = replace(clean.steps[0], text=quoting, token_ids=chat.action(quoting))
    align(replace(clean, steps=(first, *clean.steps[1:])), chat, STEP_WISE)


@pytest.mark.parametrize(
    ("messages", "culprit"),
    [
        (lambda h: (*h, Message("user", "hint:\nA")), "3 messages, the clean one 2"),
        (lambda h: h, "0 messages differ"),
        (lambda h: (replace(h[0], content="x"), replace(h[1], content=h[1].content + "\nhint:\nA")), "2 messages differ"),
        (lambda h: (h[0], replace(h[1], content="hint:\nA" + h[1].content)), "differs by"),
        (lambda h: (h[0], replace(h[1], content=h[1].content + "\nhint:\nB")), "not by 'hint:"),
        (lambda h: (h[0], Message("tool", h[1].content + "\nhint:\nA")), "changed the role"),
    ],
)
def test_an_injection_that_does_more_than_it_says_is_refused(chat: TinyChat, messages: object, culprit: str) -> None:
    def inject(trajectory: Trajectory, step: int) -> TeacherContext:
        return TeacherContext(messages(trajectory.history(step)), ("p1",), "\nhint:\nA")  # type: ignore[operator]

    with pytest.raises(AlignmentError, match=culprit):
        align(make_trajectory(chat, 4), chat, inject)


def test_a_view_without_text_must_be_the_clean_history(chat: TinyChat) -> None:
    def inject(trajectory: Trajectory, step: int) -> TeacherContext:
        history = trajectory.history(step)
        return TeacherContext((replace(history[0], content="other"), *history[1:]))

    with pytest.raises(AlignmentError, match="1 messages differ from the clean history, expected 0"):
        align(make_trajectory(chat, 4), chat, inject)


def test_a_chat_format_that_reencodes_actions_is_refused(chat: TinyChat) -> None:
    class Reencoding(TinyChat):
        def encode(self, messages: object, *, generation_prompt: bool = True) -> list[int]:
            return super().encode(
                [replace(message, token_ids=()) for message in messages],  # type: ignore[attr-defined]
                generation_prompt=generation_prompt,
            )

    trajectory = make_trajectory(chat, 5)
    odd = replace(trajectory.steps[0], token_ids=(9, 10, 5))
    with pytest.raises(AlignmentError, match=r"step 0: tokens .* are not the sampled action ids"):
        student_row(replace(trajectory, steps=(odd, *trajectory.steps[1:])), Reencoding())


def test_a_chat_format_that_rewrites_history_is_refused(chat: TinyChat) -> None:
    class Rewriting(TinyChat):
        def encode(self, messages: object, *, generation_prompt: bool = True) -> list[int]:
            ids = super().encode(messages, generation_prompt=generation_prompt)  # type: ignore[arg-type]
            return [6, *ids] if len(messages) > 2 else ids  # type: ignore[arg-type]

    with pytest.raises(AlignmentError, match="changes its tokens as it grows"):
        student_row(make_trajectory(chat, 5), Rewriting())


def test_steps_without_ids_are_refused(chat: TinyChat) -> None:
    trajectory = make_trajectory(chat, 6)
    hidden = replace(trajectory.steps[2], token_ids=())
    with pytest.raises(AlignmentError, match="trajectory t6#0, step 2: the action has no token ids"):
        student_row(replace(trajectory, steps=(*trajectory.steps[:2], hidden)), chat)


def test_rejection_keeps_right_ones_only_and_counts_the_unjudged_apart(chat: TinyChat) -> None:
    right, wrong = make_trajectory(chat, 1), make_trajectory(chat, 2, reward=0.0)
    unjudged, partly = make_trajectory(chat, 3, reward=None), make_trajectory(chat, 4, reward=0.5)
    failed = replace(make_trajectory(chat, 5), status="failed")
    empty = replace(make_trajectory(chat, 6), steps=())
    everything = [right, wrong, unjudged, partly, failed, empty]
    chosen = select_rows(everything, rejection=True)
    assert chosen.kept == (right,)
    assert chosen.counts == {"kept": 1, "failed": 2, "wrong": 2, "unjudged": 1}
    chosen = select_rows(everything, rejection=False)
    assert chosen.kept == (right, wrong, unjudged, partly)
    assert chosen.counts == {"kept": 4, "failed": 2, "wrong": 0, "unjudged": 0}


def test_steps_that_are_filtered_stay_in_the_history(chat: TinyChat) -> None:
    trajectory = make_trajectory(chat, 7)
    refused = replace(trajectory.steps[1], problem="unknown tool")
    trajectory = replace(trajectory, steps=(trajectory.steps[0], refused, trajectory.steps[2]))
    row = student_row(trajectory, chat, without_problems)
    assert row.steps == (0, 2)
    assert row.ids == student_row(trajectory, chat).ids
    only_first = student_row(trajectory, chat, lambda _, step: step.index == 0)
    assert only_first.ids == row.ids[: row.spans[0][1]]
    assert align_all([trajectory], chat, STEP_WISE, lambda *_: False) == []
