"""Answers that are programs, judged by what they do; and what a policy may try to be judged right."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from evolve_unit_tests import UNIT_TESTS, UnitTestVerification

from evolve_dag.config.schema import Experiment
from evolve_dag.environments.web.sandbox import sandbox_report
from evolve_dag.records import Task

TESTS = """
def test_it_doubles(answer, reference):
    space = {}
    exec(answer, space)
    assert [space["double"](n) for n in range(3)] == eval(reference)
"""
ANSWERS = {
    "def double(n): return 2 * n": 1.0,
    "def double(n): return n + 2": 0.0,
    "def double(n): return": 0.0,
    "double(": 0.0,
    "while True: pass": 0.0,
    "import os; os._exit(0)": 0.0,
    "raise SystemExit(0)": 0.0,
}


@pytest.mark.skipif(": " in sandbox_report() and "holds" not in sandbox_report(), reason="no sandbox on this machine")
def test_an_answer_is_right_when_every_test_passes(tmp_path: Path) -> None:
    (tmp_path / "tests.py").write_text(TESTS)
    settings = UnitTestVerification(kind="unit_tests", tests=str(tmp_path / "tests.py"), seconds=2.0)
    verifier = UNIT_TESTS.make(settings, None)
    task = Task("t", "write double(n)", "[0, 2, 4]")
    found = {answer: asyncio.run(verifier.verify(task, answer)) for answer in ANSWERS}
    assert found == ANSWERS
    assert asyncio.run(verifier.verify(task, None)) == 0.0


def test_a_file_without_tests_is_a_mistake_before_the_run(tmp_path: Path) -> None:
    for text, wrong in (("x = 1", "has no function"), ("def (", "cannot be read"), (None, "cannot be read")):
        if text is not None:
            (tmp_path / "tests.py").write_text(text)
        name = "tests.py" if text is not None else "nowhere.py"
        settings = UnitTestVerification(kind="unit_tests", tests=str(tmp_path / name))
        [(key, what)] = UNIT_TESTS.mistakes(settings, Experiment(experiment="x"))
        assert key == "verification.tests"
        assert wrong in what
