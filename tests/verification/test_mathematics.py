"""Equal as mathematics, whatever the spelling."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import BrokenExecutor, CancelledError

import pytest

from evolve_dag.records import Task
from evolve_dag.verification import mathematics
from evolve_dag.verification.equality import _spelled
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
        ("3", "**3**", 1.0),
        ("5", "The answer is\n\\[5\\]", 1.0),
        ("1/2", "The answer is \\frac{1}{2}.", 1.0),
        ("1234", "1 234", 1.0),
        ("73", "72 or 73", 1.0),  # lenient in prose
        ("25", "25\\pi", 0.0),
        ("70", "70\\sqrt{2}", 0.0),
        ("5", "\\sqrt 5", 0.0),
        ("15", "3 \\cdot 15", 0.0),
        ("12", "\\gcd(8, 12)", 0.0),
        ("6", "6!", 0.0),
        ("60", "\\sin 60", 0.0),
        ("3", "3i", 0.0),
        ("5", "1, 2, 3, 4, 5", 0.0),
        ("13", "12 \\text{ or } 13", 0.0),
        ("18", "\\$18", 1.0),
        ("18", "\\boxed{\\$18}", 1.0),
        ("18", "$\\$18$", 1.0),
        ("18.90", "The total is \\$18.90.", 1.0),
        ("18.90", "\\(\\$18.90\\)", 1.0),
        ("\\$18", "18", 1.0),
        ("\\$18", "$18", 1.0),
        ("18", "\\$19", 0.0),
        ("25", "\\$25\\pi", 0.0),
        ("7", "答案是7", 1.0),
        ("7", "答案是7。", 1.0),
        ("-7", "答案是-7。", 1.0),
        ("7", "答えは7です", 1.0),
        ("7", "คำตอบคือ7ครับ", 1.0),
        ("7", "답은 7입니다", 1.0),
        ("7", "答案：7", 1.0),
        ("17", "答案是１７", 1.0),
        ("7", "答案是17", 0.0),
        ("\\sqrt{2}", "√2", 1.0),
        ("\\frac{\\sqrt{3}}{2}", "√3/2", 1.0),
        ("2\\sqrt{x+1}", "2√(x+1)", 1.0),
        ("3", "2√3", 0.0),
        ("x^2+1", "x²+1", 1.0),
        ("x^{10}", "x¹⁰", 1.0),
        ("2.5\\times 10^{-3}", "2.5×10⁻³", 1.0),
        ("16", "It is 4².", 1.0),
        ("4", "It is 4².", 0.0),
        ("10", "10 m²", 1.0),
        ("10", "The area is 10 cm².", 1.0),
        ("2", "The area is 10 cm².", 0.0),
        ("0.5", "½", 1.0),
        ("5.5", "5½ cups", 1.0),
        ("5", "5½ cups", 0.0),
        ("1000", "1e3", 1.0),
        ("1e-5", "0.00001", 1.0),
        ("x^2+y^2", "x**2 + y**2", 1.0),
        ("5", "2**5", 0.0),
        ("[0,\\infty)", "[0,∞)", 1.0),
        ("12", "3·4", 1.0),
        ("3", "３", 1.0),
        ("25", "٢٥", 1.0),
        ("7", "答案是1/7", 0.0),
    ],
)
def test_cases(reference: str, answer: str | None, expected: float) -> None:
    assert reward(reference, answer) == expected


@pytest.mark.parametrize(("answer", "expected"), [("0.5", 1.0), ("1/3", 0.0)])
def test_aliases_are_compared_too(answer: str, expected: float) -> None:
    task = Task("t", "?", "one half", metadata={"aliases": "half|1/2"})
    assert asyncio.run(MathematicsVerifier().verify(task, answer)) == expected


def test_signs_are_spelled_in_linear_time() -> None:
    """Quadratic, this would take minutes."""
    for text in ("1", "1√(", "√(", "1²", "½", "1·", "1e1", "1**", "1 m²."):
        assert _spelled(text * 50_000)


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


class Worker:
    """A pool of processes that is slow, and breaks where it is told to."""

    def __init__(self, broken: type[Exception] | None = None) -> None:
        self.broken, self.waiting, self.most = broken, 0, 0

    def submit(self, *work: object) -> Worker:
        self.waiting += 1
        self.most = max(self.most, self.waiting)
        return self

    def result(self, seconds: float) -> float:
        time.sleep(0.01)
        self.waiting -= 1
        if self.broken is not None:
            raise self.broken
        return 1.0

    def shutdown(self, **how: object) -> None: ...


def of_six(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> list[float | None]:
    monkeypatch.setattr(mathematics, "_pool", lambda: worker)

    async def all_at_once() -> list[float | None]:
        verifier = MathematicsVerifier()
        return await asyncio.gather(*(verifier.verify(Task("t", "?", "1"), f"x={n}") for n in range(6)))

    return asyncio.run(all_at_once())


def test_a_comparison_waits_for_its_turn_before_its_clock_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker()
    assert of_six(worker, monkeypatch) == [1.0] * 6
    assert worker.most == 1


@pytest.mark.parametrize("broken", [TimeoutError, BrokenExecutor, CancelledError])
def test_what_ends_a_worker_ends_no_step(broken: type[Exception], monkeypatch: pytest.MonkeyPatch) -> None:
    assert of_six(Worker(broken), monkeypatch) == [None] * 6
