"""The teacher at another temperature, where it reads experience."""

from __future__ import annotations

import numpy as np
import pytest

from evolve_dag.distillation.alignment import StudentRow
from evolve_dag.distillation.dataset import DistillationRow, StepView, sharpened
from evolve_dag.distillation.teacher import TeacherTargets


def targets(vocabulary: int = 7, tokens: int = 4, top_k: int | None = None) -> TeacherTargets:
    logits = np.random.default_rng(3).normal(size=(tokens, vocabulary))
    logprobs = np.sort(logits - np.logaddexp.reduce(logits, axis=1, keepdims=True), axis=1)[:, ::-1].astype(np.float32)
    if top_k is None:
        return TeacherTargets(logprobs)
    ids = np.tile(np.arange(top_k, dtype=np.int32), (tokens, 1))
    return TeacherTargets(logprobs[:, :top_k], ids, np.logaddexp.reduce(logprobs[:, top_k:], axis=1))


def row(teacher: TeacherTargets) -> DistillationRow:
    views = (StepView(0, (), "", 2), StepView(1, ("E1",), "Experience: ...", 9))
    return DistillationRow(StudentRow("t#0", (1, 2, 3, 4, 5, 6), (0, 1), ((1, 3), (4, 6))), views, teacher)


@pytest.mark.parametrize("temperature", [0.3, 0.5, 2.0])
def test_the_whole_distribution_is_that_of_divided_logits(temperature: float) -> None:
    given = targets()
    found = given.sharpened(temperature, np.ones(4, dtype=bool)).logprobs
    expected = np.exp(given.logprobs) ** (1 / temperature)
    np.testing.assert_allclose(np.exp(found), expected / expected.sum(1, keepdims=True), rtol=1e-5)


def test_the_tail_is_one_class() -> None:
    found = targets(top_k=3).sharpened(0.5, np.ones(4, dtype=bool))
    assert found.tail is not None
    np.testing.assert_allclose(np.exp(found.logprobs).sum(1) + np.exp(found.tail), 1.0, rtol=1e-5)
    assert (found.logprobs[:, 0] > targets(top_k=3).logprobs[:, 0]).all()


def test_only_steps_with_experience_change() -> None:
    given = targets(top_k=3)
    (found,) = sharpened([row(given)], 0.5)
    assert found.teacher is not None
    np.testing.assert_array_equal(found.teacher.logprobs[:2], given.logprobs[:2])
    assert (found.teacher.logprobs[2:, 0] > given.logprobs[2:, 0]).all()


def test_impossible_tokens_stay_impossible() -> None:
    given = TeacherTargets(np.array([[0.0, -np.inf]], dtype=np.float32))
    np.testing.assert_array_equal(given.sharpened(0.5, np.array([True])).logprobs, given.logprobs)


def test_temperature_one_is_the_loss_of_the_paper() -> None:
    rows = [row(targets())]
    assert sharpened(rows, 1.0) == rows
