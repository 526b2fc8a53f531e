"""Every iteration takes tasks of its own, and nothing that comes later changes them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evolve_dag.config.loading import load_experiment
from evolve_dag.config.schema import Experiment
from evolve_dag.environments.pocket.tools import STREAM_WORLDS
from evolve_dag.errors import ConfigError, OrderError
from evolve_dag.steps.base import resolve, run_step, settings
from evolve_dag.store.artifacts import Store
from evolve_dag.tasks.streams import of_iteration
from evolve_dag.tasks.suites import load_tasks_of


def rows(start: int, count: int) -> str:
    return "".join(
        json.dumps({"question": f"Who is {n}?", "answer": f"person {n}"}) + "\n" for n in range(start, start + count)
    )


def experiment(folder: Path, train: str, kind: str = "corpus") -> Experiment:
    (folder / "pages.jsonl").write_text('{"title": "person A", "text": "home: city B"}\n')
    (folder / "other.jsonl").write_text(rows(900, 4))
    (folder / "held.jsonl").write_text(rows(950, 4))
    body = f"""
environment: {{kind: {kind}{", pages: pages.jsonl" if kind == "corpus" else ""}}}
tasks:
  train: {train}
  development: {{{"path: other.jsonl" if kind == "corpus" else "count: 4, world: 2"}}}
  held_out: {{{"path: held.jsonl" if kind == "corpus" else "count: 4, world: 3"}}}
"""
    path = folder / "experiment.yaml"
    path.write_text(body)
    return load_experiment(path)


def asked(found: Experiment, iteration: int) -> list[str]:
    return [task.question for task in load_tasks_of(of_iteration(found, iteration), "train")]


def test_the_pocket_world_is_a_new_one_every_iteration(tmp_path: Path) -> None:
    found = experiment(tmp_path, "{count: 5, world: 1, stream: true}", "pocket")
    assert of_iteration(found, 1).tasks.train.world == 1
    assert of_iteration(found, 4).tasks.train.world == 1 + 3 * STREAM_WORLDS
    assert not set(asked(found, 1)) & set(asked(found, 2))
    assert of_iteration(found, 4).tasks.held_out == found.tasks.held_out
    digests = [settings("trajectories", of_iteration(found, k)) for k in (1, 2)]
    assert digests[0] != digests[1]
    plain = experiment(tmp_path, "{count: 5, world: 1}", "pocket")
    assert of_iteration(plain, 7) is plain
    assert settings("trajectories", plain) == digests[0]  # the first night of a stream is the split itself


def test_worlds_of_a_stream_never_meet_another_split(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="below that"):
        experiment(tmp_path, "{count: 5, world: 20000, stream: true}", "pocket")
    (tmp_path / "x.yaml").write_text("tasks: {held_out: {count: 4, world: 3, stream: true}}\n")
    with pytest.raises(ConfigError, match="must stay the same"):
        load_experiment(tmp_path / "x.yaml")


def test_a_long_file_gives_its_next_rows_and_an_appended_row_changes_no_earlier_night(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(rows(0, 7))
    found = experiment(tmp_path, "{path: train.jsonl, count: 3, stream: true}")
    assert asked(found, 1) == ["Who is 0?", "Who is 1?", "Who is 2?"]
    assert asked(found, 3) == ["Who is 6?"]  # what is left of the last night
    before = [settings("trajectories", of_iteration(found, k)) for k in (1, 2, 3)]
    with pytest.raises(OrderError, match="no tasks left: it holds 7 rows, and this iteration begins with row 10"):
        asked(found, 4)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(rows(7, 3))
    after = [settings("trajectories", of_iteration(found, k)) for k in (1, 2, 3)]
    assert after[:2] == before[:2]
    assert after[2] != before[2]  # a night that was cut short by the file's end is a longer one now
    assert asked(found, 4) == ["Who is 9?"]


def test_an_edited_row_makes_just_its_own_night_out_of_date(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(rows(0, 6))
    found = experiment(tmp_path, "{path: train.jsonl, count: 3, stream: true}")
    before = [settings("trajectories", of_iteration(found, k)) for k in (1, 2)]
    (tmp_path / "train.jsonl").write_text(rows(0, 3) + rows(30, 3))
    assert [settings("trajectories", of_iteration(found, k)) == b for k, b in zip((1, 2), before, strict=True)] == [True, False]


def test_a_folder_gives_a_file_a_night(tmp_path: Path) -> None:
    days = tmp_path / "days"
    days.mkdir()
    (days / "2026-11-02.jsonl").write_text(rows(10, 2))
    (days / "2026-11-01.jsonl").write_text(rows(0, 3))
    (days / ".2026-11-03.jsonl.part").write_text("{")
    found = experiment(tmp_path, "{path: days, count: 2, stream: true}")
    assert asked(found, 1) == ["Who is 0?", "Who is 1?"]
    assert asked(found, 2) == ["Who is 10?", "Who is 11?"]
    store = Store(tmp_path / "store")
    assert resolve("trajectories", found, 3, store).missing == "promotion[experiment|01]"


def test_a_night_without_tasks_says_so_and_stores_nothing(tmp_path: Path) -> None:
    days = tmp_path / "days"
    days.mkdir()
    found = experiment(tmp_path, "{path: days, stream: true}")
    store = Store(tmp_path / "store")
    assert "holds 0 files" in (resolve("scores", found, 1, store).missing or "")
    with pytest.raises(OrderError, match="no tasks yet") as caught:
        run_step("trajectories", found, 1, store)
    assert "put the next file there" in str(caught.value)
    assert not list((tmp_path / "store").rglob("manifest.json"))


def test_a_stream_of_rows_needs_a_count(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(rows(0, 7))
    with pytest.raises(ConfigError, match="how many rows"):
        experiment(tmp_path, "{path: train.jsonl, stream: true}")
