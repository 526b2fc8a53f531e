"""ContainsVerifier: whole words of the reference in a short answer."""

from __future__ import annotations

import asyncio

import pytest

from evolve_dag.records import Task
from evolve_dag.verification.contains import ContainsVerifier


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("The mayor is Rato Miku.", 1.0),
        ("RATO  MIKU", 1.0),
        ("It is R. Miku, they say", 1.0),
        ("The mayor is Rato Mikus.", 0.0),
        ("Rato", 0.0),
        ("", 0.0),
        (None, 0.0),
        ("Rato Miku " + "or someone else " * 15, 0.0),
    ],
)
def test_cases(answer: str | None, reward: float) -> None:
    task = Task("t", "Who?", "Rato Miku", metadata={"aliases": "R. Miku"})
    assert asyncio.run(ContainsVerifier().verify(task, answer)) == reward


def test_signs_in_a_reference_are_text() -> None:
    assert asyncio.run(ContainsVerifier().verify(Task("t", "?", "3.5 (b)"), "It is 3.5 (b), no more")) == 1.0
    assert asyncio.run(ContainsVerifier().verify(Task("t", "?", "3.5"), "It is 325")) == 0.0
