"""Splits of the shipped experiments load, and tasks that are trained on are not scored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evolve_dag.config.loading import is_study, load_experiment
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import DataError
from evolve_dag.tasks.suites import SPLITS, check_disjoint, load_split

CONFIGS = Path(__file__).parents[2] / "configs"


USERS_DATA = {"qwen3_4b_web", "qwen3_8b_web", "math"}
"""Experiments whose tasks the user must fetch (docs/benchmarks.md)."""
SHIPPED = [p for p in sorted(CONFIGS.glob("*.yaml")) if p.stem not in USERS_DATA and not is_study(p)]


@pytest.mark.parametrize("name", sorted(USERS_DATA))
def test_tasks_that_must_be_fetched_are_asked_for(name: str) -> None:
    with pytest.raises(DataError, match=r"no such file\n.*docs/benchmarks\.md"):
        check_disjoint(load_experiment(CONFIGS / f"{name}.yaml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_experiment_has_its_tasks(path: Path) -> None:
    experiment = load_experiment(path)
    check_disjoint(experiment)
    for name in SPLITS:
        split = load_split(experiment, name)
        assert split.tasks
        assert split.environment.tools


def test_a_shared_question_of_a_corpus_is_refused(tmp_path: Path) -> None:
    line = json.dumps({"question": "What is the mayor of city Beli Zuto?", "answer": "Zali Zeto"}) + "\n"
    (tmp_path / "pages.jsonl").write_text(json.dumps({"title": "city Beli Zuto", "text": "mayor: person Zali Zeto"}) + "\n")
    tasks = {}
    for name in SPLITS:
        (tmp_path / f"{name}.jsonl").write_text(line if name != "train" else line.replace("mayor", "patron"))
        tasks[name] = {"path": str(tmp_path / f"{name}.jsonl")}
    corpus = {"kind": "corpus", "pages": str(tmp_path / "pages.jsonl")}
    with pytest.raises(DataError, match="development"):
        check_disjoint(Experiment.model_validate({"experiment": "x", "environment": corpus, "tasks": tasks}))
