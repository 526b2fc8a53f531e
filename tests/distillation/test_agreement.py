"""How much alike the policy acts with and without an item."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from evolve_dag.distillation import agreement
from evolve_dag.distillation.agreement import overlaps
from evolve_dag.distillation.teacher import TeacherTargets
from evolve_dag.environments.pocket.tokenizer import build_tokenizer
from evolve_dag.inference.chat import ChatFormat
from evolve_dag.records import Step, Trajectory

CHAT = ChatFormat.from_tokenizer(build_tokenizer())
IDS = tuple(CHAT.encode_action("<answer>Rato Miku</answer>"))
N = len(IDS)


def step(index: int, logprob: float, *items: str) -> Step:
    """An action whose first token had this log-probability and whose others were certain."""
    hint = "\nhint:\nVerify." if items else ""
    return Step(index, "x", IDS, (logprob, *[0.0] * (N - 1)), observation="page", selected=items, injected=hint)


def scored(monkeypatch: pytest.MonkeyPatch, with_item: float, *, other: bool = False, full: bool = False) -> None:
    """With the item in its context the policy gives the first token this log-probability; ``other``: it is in the tail."""

    def score(self: Any, views: Any) -> list[TeacherTargets]:
        n = sum(len(own) for own in views[:1])
        ids = np.tile(np.array([[i, 0] for i in IDS], np.int32), (n, 1))
        logprobs = np.tile(np.array([[with_item, -9.0], *[[0.0, -9.0]] * (N - 1)], np.float32), (n, 1))
        tail = np.tile(np.array([-7.0, *[-9.0] * (N - 1)], np.float32), n)
        if other:
            ids[::N] = (1, 0)
            tail[::N] = with_item
        if full:
            wide = np.full((n * N, max(IDS) + 1), -9.0, np.float32)
            wide[np.arange(n * N), np.tile(IDS, n)] = logprobs[:, 0]
            return [TeacherTargets(wide)]
        return [TeacherTargets(logprobs, ids, tail)]

    monkeypatch.setattr(agreement, "TeacherScorer", type("Scorer", (), {"__init__": lambda *_, **__: None, "score": score}))


def asked(*steps: Step, items: tuple[str, ...] = ("a", "b")) -> dict[str, list[float]]:
    trajectory = Trajectory("t#0", "t", 0, 0, "s", "q", steps, "answered")
    model: Any = SimpleNamespace(chat=CHAT, model=None)
    found = overlaps([trajectory], items, model, pattern="step_wise", top_k=2)
    assert {task for steps in found.values() for task, _ in steps} == {"t"}
    return {item: [value for _, value in steps] for item, steps in found.items()}


@pytest.mark.parametrize("how", [{}, {"other": True}, {"full": True}], ids=str)
@pytest.mark.parametrize(
    ("without", "with_item", "expected"),
    [(0.5, 0.5, 1.0), (0.5, 0.9, 1.0), (0.8, 0.2, 0.25), (1.0, 0.1, 0.1)],
)
def test_it_is_the_part_of_what_was_done_that_would_be_done_with_the_item(
    monkeypatch: pytest.MonkeyPatch, how: dict[str, bool], without: float, with_item: float, expected: float
) -> None:
    scored(monkeypatch, float(np.log(with_item)), **how)
    assert asked(step(0, float(np.log(without)), "a"))["a"] == pytest.approx([expected], abs=1e-5)


def test_every_step_counts_for_each_of_its_items(monkeypatch: pytest.MonkeyPatch) -> None:
    scored(monkeypatch, float(np.log(0.4)))
    found = asked(step(0, float(np.log(0.8)), "a", "b"), step(1, 0.0), step(2, float(np.log(0.4)), "b", "c"))
    assert found.keys() == {"a", "b"}
    assert found["a"] == pytest.approx([0.5], abs=1e-5)
    assert found["b"] == pytest.approx([0.5, 1.0], abs=1e-5)


def test_a_step_whose_log_probabilities_are_not_known_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    scored(monkeypatch, 0.0)
    known = step(0, 0.0, "a")
    assert asked(Step(0, "x", IDS, (), selected=("a",), injected=known.injected), known)["a"] == [1.0]
