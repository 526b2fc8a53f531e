"""What is known of a taskset without importing the library: whether it is there, and what stands in the digest."""

from __future__ import annotations

import importlib.util
from functools import reduce
from importlib import metadata
from operator import add
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from evolve_dag.config.loading import check_iterations, load_experiment
from evolve_dag.config.parts import identity, part_of
from evolve_dag.environments.verifiers import tasksets
from evolve_dag.environments.verifiers.conversation import Talk
from evolve_dag.environments.verifiers.environment import VerifiersEnvironment
from evolve_dag.errors import ConfigError, PartError, SessionError
from evolve_dag.steps.preflight import preflight
from evolve_dag.store.artifacts import Store
from evolve_dag.tasks.streams import of_iteration

EXPERIMENT = """
environment: {{kind: verifiers, id: my-set{environment}}}
iterations: 3
tasks:
  train: {{count: 8, stream: true{train}}}
  development: {{count: 8, skip: 24}}
  held_out: {{count: 8, skip: 32}}
"""


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Module -> its spec, in place of what is installed; nothing is imported."""
    (tmp_path / "my_set.py").write_text("one")
    (tmp_path / "verifiers/v1/tasksets/shipped").mkdir(parents=True)
    (tmp_path / "verifiers/v1/tasksets/shipped/__init__.py").write_text("two")
    found = {
        "verifiers": SimpleNamespace(submodule_search_locations=[str(tmp_path / "verifiers")], origin=None),
        "my_set": SimpleNamespace(submodule_search_locations=None, origin=str(tmp_path / "my_set.py")),
    }
    monkeypatch.setattr(importlib.util, "find_spec", found.get)
    monkeypatch.setattr(metadata, "version", lambda name: "0.4.0")
    return found


def experiment(tmp_path: Path, environment: str = "", train: str = "") -> Any:
    path = tmp_path / "mine.yaml"
    path.write_text(EXPERIMENT.format(environment=environment, train=train))
    return load_experiment(path)


def test_the_code_of_a_taskset_is_in_the_digest(places: dict[str, Any], tmp_path: Path) -> None:
    settings = VerifiersEnvironment(id="owner/my-set@1.2")
    before = identity("environment", "verifiers", settings)
    assert before.startswith("verifiers verifiers 0.4.0, sha256:")
    (tmp_path / "my_set.py").write_text("another")
    assert identity("environment", "verifiers", settings) != before
    assert tasksets.code_digest("shipped") != tasksets.code_digest("my-set")


@pytest.mark.parametrize("id", ["nothing", "a.b", "a/b c", "-", ".."])
def test_a_taskset_that_is_not_there_is_a_mistake(places: dict[str, Any], tmp_path: Path, id: str) -> None:
    with pytest.raises(PartError, match="no taskset"):
        tasksets.code_digest(id)


@pytest.mark.parametrize(("gone", "told"), [("verifiers", "needs the library .* pip install"), ("my_set", "no taskset")])
def test_an_experiment_is_read_without_them_but_not_run(places: dict[str, Any], tmp_path: Path, gone: str, told: str) -> None:
    places[gone] = None
    loaded = experiment(tmp_path)
    assert identity("environment", "verifiers", loaded.environment) == "verifiers not installed"
    with pytest.raises(PartError, match=f"(?s){told}"):
        preflight(loaded, 1, Store(tmp_path))


def test_a_stream_goes_on_through_the_rows_and_splits_share_none(places: dict[str, Any], tmp_path: Path) -> None:
    loaded = experiment(tmp_path)
    assert [of_iteration(loaded, k).tasks.train.skip for k in (1, 2, 3)] == [0, 8, 16]
    with pytest.raises(ConfigError, match=r"tasks\.development\.skip: shares rows with tasks\.train"):
        experiment(tmp_path, train=", skip: 1")


def test_a_stream_that_goes_on_comes_to_no_rows_of_another_split(places: dict[str, Any], tmp_path: Path) -> None:
    loaded = experiment(tmp_path)
    check_iterations(loaded, 3)
    with pytest.raises(
        ConfigError, match=r"with 4 iterations.*\n  1\. tasks\.development\.skip: shares rows with tasks\.train"
    ):
        check_iterations(loaded, 4)


def test_what_is_for_files_is_refused(places: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("{}\n")
    with pytest.raises(ConfigError, match=r"tasks\.train: path, suite and fields are for files"):
        experiment(tmp_path, train=", path: t.jsonl")


def test_the_row_names_its_extra(places: dict[str, Any]) -> None:
    assert part_of("environment", VerifiersEnvironment(id="x")).libraries == {"verifiers": "verifiers"}


class Judged(Talk):
    """A conversation that has ended, with every part of its rubric full."""

    def __init__(self, *weights: float) -> None:
        self._part = ""
        parts = {f"part {number}": SimpleNamespace(score=1.0, weight=weight) for number, weight in enumerate(weights)}
        self._trace = SimpleNamespace(rewards=parts, reward=reduce(add, weights))

    def _judged(self) -> Any:
        return self._trace


def test_a_full_rubric_is_the_whole_reward_whatever_its_weights_add_up_to() -> None:
    assert [Judged(0.7, 0.2, 0.1).reward(None), Judged(0.8, 0.05, 0.05, 0.1).reward(None)] == [1.0, 1.0]
    with pytest.raises(SessionError, match=r"gave 1.1, which is not from 0 to 1 \(part 0 1 x 0.6, part 1 1 x 0.5\)"):
        Judged(0.6, 0.5).reward(None)
