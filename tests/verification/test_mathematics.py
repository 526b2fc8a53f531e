"""Equal as mathematics, whatever the spelling."""

from __future__ import annotations

import asyncio

import pytest

from evolve_dag.records import Task
from evolve_dag.verification import mathematics
from evolve_dag.verification.mathematics import MathematicsVerifier


def reward(reference: str, answer: str | None) -> float | None:
    return asyncio.run(MathematicsVerifier().verify(Task("t", "?", reference), answer))


@pytest.mark.parametrize(
    ("reference", "answer", "expected"),
    [
        ("1/2", "0.5", 1.0),
        ("\\frac{1}{2}", "$\\frac{2}{4}$", 1.0),
        ("42", "The answer is 42.", 1.0),
        ("42", "\\boxed{42}", 1.0),
        ("1,234", "1234", 1.0),
        ("x^2+2x+1", "(x+1)^2", 1.0),
        ("\\sqrt{8}", "2\\sqrt{2}", 1.0),
        ("(1,2)", "(1, 2)", 1.0),
        ("42", "43", 0.0),
        ("1/3", "0.33", 0.0),
        ("42", "I do not know", 0.0),
        ("42", None, 0.0),
        ("42", "", 0.0),
        ("blue", "Blue.", 1.0),
        ("blue", "red", 0.0),
    ],
)
def test_cases(reference: str, answer: str | None, expected: float) -> None:
    assert reward(reference, answer) == expected


def test_a_comparison_that_never_ends_is_not_judged_and_the_next_one_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mathematics, "SECONDS", 0.0)
    assert reward("x^2+2x+1", "(x+1)^2+0") is None
    monkeypatch.setattr(mathematics, "SECONDS", 60.0)
    assert reward("x^2+2x+1", "(x+1)^2+0") == 1.0


def test_many_threads_share_the_worker() -> None:
    async def all_at_once() -> list[float | None]:
        verifier = MathematicsVerifier()
        return await asyncio.gather(*(verifier.verify(Task("t", "?", f"{n}/2"), f"{2 * n}/4") for n in range(1, 9)))

    assert asyncio.run(all_at_once()) == [1.0] * 8
