"""Lineages in milliseconds: the real digest chain, store and policies, with bodies that write one line instead of working."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evolve_dag.config.schema import Experiment
from evolve_dag.steps import base
from evolve_dag.steps.base import STEP_ORDER, run_step
from evolve_dag.steps.body import StepContext
from evolve_dag.store.artifacts import Store

WORLDS = {
    "train": {"count": 10, "world": 12},
    "development": {"count": 6, "world": 22},
    "held_out": {"count": 6, "world": 32},
}


def experiment(name: str = "quick", **changes: Any) -> Experiment:
    return Experiment.model_validate({"experiment": name, "iterations": 3, "tasks": WORLDS} | changes)


def fake_steps(monkeypatch: pytest.MonkeyPatch, decide: Callable[[int], str] = lambda k: "promote") -> None:
    """From now on a step writes a file that names its inputs; ``decide`` says what becomes of iteration k."""

    def body(name: str) -> Callable[[StepContext], None]:
        def run(context: StepContext) -> None:
            inputs = {kind: artifact.digest for kind, artifact in context.inputs.items()}
            (context.build.path / "made.json").write_text(json.dumps({"of": inputs}))
            if name == "policy":
                context.build.note(adapter=context.entering.adapter, experience=context.entering.experience)
            if name == "promotion":
                promoted = decide(context.iteration) == "promote"
                policy = {
                    "base": context.entering.base,
                    "adapter": inputs["adapter"] if promoted else context.entering.adapter,
                    "experience": inputs["experience"] if promoted else context.entering.experience,
                    "next_item": context.iteration + 1,
                }
                decision = {"decision": decide(context.iteration), "reasons": ["x"], "evidence": {}, "policy": policy}
                (context.build.path / "decision.json").write_text(json.dumps(decision))

        return run

    monkeypatch.setattr(base, "_body", body)


def run(e: Experiment, store: Store, iterations: int | None = None) -> set[tuple[int, str]]:
    """Bring iterations 1..K up to date, as ``evolve run`` does; returns what had to be made."""
    made = set()
    for k in range(1, (iterations or e.iterations) + 1):
        for step in STEP_ORDER:
            if run_step(step, e, k, store).recomputed:
                made.add((k, step))
    return made


def everything_below(root: Path) -> dict[str, tuple[int, int]]:
    """Path -> (modified, size) of every file and folder."""
    return {str(p.relative_to(root)): (p.stat().st_mtime_ns, p.stat().st_size) for p in root.rglob("*")}
