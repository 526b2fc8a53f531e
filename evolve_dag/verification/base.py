"""What judges a final answer."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from evolve_dag.records import Task


@runtime_checkable
class Verifier(Protocol):
    """Scores final answers (METHOD step 2). Safe to call from many episodes at once."""

    async def verify(self, task: Task, answer: str | None) -> float | None:
        """The reward of ``answer``.

        Args:
            task: the task with its reference answer.
            answer: what the policy gave; None when it gave nothing.

        Returns:
            1.0 right, 0.0 wrong, or None when it could not be judged. "Could not be judged" is never "wrong": a
            failing judge that returned 0.0 would move tasks in and out of the groups that extraction learns from.
        """
        ...
