"""One episode as a person sees it."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from evolve_dag.records import Step, ToolCall, Trajectory
from evolve_dag.steps.play import show


@pytest.mark.parametrize(
    ("reward", "told"), [(1.0, "right: 'x'"), (0.0, "wrong: 'x'"), (0.25, "0.25 of 1: 'x'"), (None, "not judged: 'x'")]
)
def test_the_reward_is_told_whatever_it_is(reward: float | None, told: str) -> None:
    steps = (
        Step(0, "Look.", (), (), ToolCall("go", {"where": "north"}), observation="A [bold]wall."),
        Step(1, "x", (), (), answer="x"),
    )
    trajectory = Trajectory("t#0", "t", 0, 0, "", "Where?", steps, "answered", "x", reward)
    console = Console(file=io.StringIO(), width=100)
    show(trajectory, "y", {}, "title", console)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    assert told in text
    assert "A [bold]wall." in text
