"""One real iteration in the small world, made once for all tests that need one; who wants other settings completes a copy."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from evolve_dag.config.schema import Experiment
from evolve_dag.inference.chat import ChatFormat
from evolve_dag.inference.scripted import ScriptedModel
from evolve_dag.records import Message
from evolve_dag.steps import contexts, scores, teacher_check, trajectories
from evolve_dag.steps.base import STEP_ORDER, run_step
from evolve_dag.store.artifacts import Store

SMALL: dict[str, Any] = {
    "experiment": "small",
    "seed": 4,
    "iterations": 3,
    "tasks": {
        "train": {"count": 12, "world": 13},
        "development": {"count": 6, "world": 22},
        "held_out": {"count": 6, "world": 32},
    },
    "extraction": {"min_support": 3, "confidence": 0.6},
    "distillation": {"epochs": 1},
    "evaluation": {"bootstrap": 200, "base_temperatures": [0, 0.5, 1.0, 0.5], "ceiling": True},
    "runtime": {"threads": 1, "concurrency": 64},
}
"""A world in which experience is found with few tasks."""


def small(**changes: Any) -> Experiment:
    return Experiment.model_validate(SMALL | changes)


def iterate(store: Store, experiment: Experiment) -> Store:
    """The first iteration; what the store holds already is not made again."""
    for step in STEP_ORDER:
        run_step(step, experiment, 1, store)
    return store


def copy_of(store: Store, folder: Path) -> Store:
    """A store of one's own to change."""
    shutil.copytree(store.root, folder)
    return Store(folder)


def play_by(act: Callable[[Sequence[Message]], str], chat: ChatFormat, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script takes the place of the policy in every step that rolls out."""

    @contextmanager
    def policy(*_: Any) -> Iterator[ScriptedModel]:
        yield ScriptedModel(act, chat=chat)

    for step in (trajectories, contexts, teacher_check, scores):
        monkeypatch.setattr(step, "open_policy", policy)
