"""Splits of the shipped experiments load, and tasks that are trained on are not scored."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from evolve_dag.config.loading import is_study, load_experiment
from evolve_dag.config.schema import Experiment, TaskSplit
from evolve_dag.environments.pocket import tools
from evolve_dag.environments.pocket.language import KINDS
from evolve_dag.errors import DataError
from evolve_dag.protocols import StatefulEnvironment
from evolve_dag.records import Task
from evolve_dag.steps.base import settings
from evolve_dag.tasks.suites import SPLITS, check_disjoint, check_files, left_out, load_split, load_tasks_of

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
    if experiment.environment.kind == "verifiers":  # its tasks are the library's
        pytest.importorskip("verifiers")
    check_disjoint(experiment)
    for name in SPLITS:
        split = load_split(experiment, name)
        assert split.tasks
        assert isinstance(split.environment, StatefulEnvironment) or split.environment.tools


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


def drawn(answered: bool = True) -> Callable[..., tuple[Task, ...]]:
    """Sums from the split's ``world`` on; every row is one of its own, whatever it asks."""

    def tasks(settings: object, split: TaskSplit, name: str) -> tuple[Task, ...]:
        first = split.world or 0
        numbers = range(first, first + (split.count or 0))
        return tuple(Task(f"{name}{n}", f"What is {n} + 1?", str(n + 1) if answered else "") for n in numbers)

    return tasks


def of_sums(train: int, development: int, held_out: int) -> Experiment:
    """Eight sums a split, from a number on."""
    worlds = {"train": train, "development": development, "held_out": held_out}
    tasks = {name: {"count": 8, "world": world} for name, world in worlds.items()}
    return Experiment.model_validate({"experiment": "sums", "tasks": tasks})


def test_what_is_scored_is_left_out_of_training_where_splits_are_drawn_from_one_world(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = replace(tools.POCKET, one_world=True, tasks=drawn())
    monkeypatch.setattr(tools, "POCKET", sums)
    experiment = of_sums(0, 6, 13)
    check_disjoint(experiment)
    assert [left_out(experiment, name) for name in SPLITS] == [{"train6", "train7"}, {"development13"}, frozenset()]
    assert [len(load_tasks_of(experiment, name)) for name in SPLITS] == [6, 7, 8]
    check_disjoint(of_sums(0, 4, 20))
    with pytest.raises(
        DataError, match=r"sums: 5 of the 8 tasks of tasks\.train are asked in .*development or tasks\.held_out"
    ):
        check_disjoint(of_sums(0, 3, 20))
    with pytest.raises(DataError, match=r"7 of the 8 tasks of tasks\.development are asked in tasks\.held_out too: too few"):
        check_disjoint(of_sums(30, 1, 2))
    # What is left out is decided by the other splits, so they are in the digest.
    assert {"tasks.development", "tasks.held_out"} <= settings("trajectories", experiment).keys()


@pytest.mark.parametrize("changes", [{"one_world": True, "tasks": drawn(answered=False)}, {"tasks": drawn()}])
def test_questions_without_an_answer_and_of_other_worlds_are_not_compared(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tools, "POCKET", replace(tools.POCKET, **changes))
    experiment = of_sums(0, 1, 2)
    check_disjoint(experiment)
    assert [len(load_tasks_of(experiment, name)) for name in SPLITS] == [8, 8, 8]
    assert ("tasks.held_out" in settings("trajectories", experiment)) is ("one_world" in changes)


def of_corpus(folder: Path) -> Experiment:
    """An experiment over files of its own, all right."""
    (folder / "pages.jsonl").write_text(json.dumps({"title": "city Beli Zuto", "text": "mayor: person Zali Zeto"}) + "\n")
    for name in SPLITS:
        (folder / f"{name}.jsonl").write_text(json.dumps({"question": f"What is {name}?", "answer": "x"}) + "\n")
    tasks = {name: {"path": str(folder / f"{name}.jsonl")} for name in SPLITS}
    corpus = {"kind": "corpus", "pages": str(folder / "pages.jsonl")}
    return Experiment.model_validate({"experiment": "x", "environment": corpus, "tasks": tasks})


@pytest.mark.parametrize("split", SPLITS)
def test_a_world_with_fewer_questions_than_are_asked_for_is_told_before_anything_is_made(
    split: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evolve_dag.environments.pocket.world.COUNTS", dict.fromkeys(KINDS, 2))
    counts = {name: {"count": 300 if name == split else 4} for name in SPLITS}
    experiment = Experiment.model_validate({"experiment": "x", "tasks": counts})
    with pytest.raises(DataError, match=rf"pocket/{split}: pocket world 0 has fewer than 300 distinct questions \("):
        check_files(experiment)


def test_mistakes_in_pages_show_as_those_in_tasks_do(tmp_path: Path) -> None:
    experiment = of_corpus(tmp_path)
    check_files(experiment)
    (tmp_path / "pages.jsonl").write_text('{"title": "a", "text": "b"}\n{"title": "c"}\n')
    with pytest.raises(DataError, match=r"pages\.jsonl: 1 mistake\n  line 2: 'text' is missing"):
        check_files(experiment)


@pytest.mark.parametrize("file", ["pages", *SPLITS])
@pytest.mark.parametrize(
    ("make", "what"),
    [
        (os.mkfifo, "it is a pipe"),
        (lambda path: path.symlink_to("/dev/zero"), "it is a device"),
        (lambda path: path.mkdir(), "it is a folder"),
        (lambda path: path.symlink_to(path.name), "cannot be read"),
    ],
    ids=["pipe", "device", "folder", "circle"],
)
def test_what_is_no_file_is_not_even_opened(tmp_path: Path, file: str, make: object, what: str) -> None:
    experiment = of_corpus(tmp_path)
    (tmp_path / f"{file}.jsonl").unlink()
    make(tmp_path / f"{file}.jsonl")  # type: ignore[operator]
    with pytest.raises(DataError, match=what) as caught:
        settings("scores" if file in ("development", "held_out") else "trajectories", experiment)
    assert "in the experiment file" in caught.value.remedy
    with pytest.raises(DataError):
        check_files(experiment)


def test_a_folder_of_files_that_is_not_there_is_named(tmp_path: Path) -> None:
    tools = {"kind": "tools", "tools": ["file"], "files": str(tmp_path / "nowhere")}
    experiment = of_corpus(tmp_path).model_dump() | {"environment": tools}
    with pytest.raises(DataError, match="no such folder") as caught:
        settings("trajectories", Experiment.model_validate(experiment))
    assert "environment.files" in caught.value.remedy
