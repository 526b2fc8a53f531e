"""``evolve warmup``: a folder that is there whole or not at all, under a digest, made once."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from evolve_dag import cli
from evolve_dag.config import registry
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import ConfigError, ModelError
from evolve_dag.inference.folders import model_folder
from evolve_dag.steps import base
from evolve_dag.store.artifacts import Store
from evolve_dag.warmup import folder, training
from evolve_dag.warmup.training import warm_up

Load = Callable[..., Experiment]


class Killed(BaseException):
    """The process ends here."""


def weights(path: Path) -> bytes:
    return (path / "model.safetensors").read_bytes()


def test_it_makes_a_model_once_and_says_when_it_must_be_made(experiment: Load, tmp_path: Path, tiny: Path) -> None:
    store, asked = Store(tmp_path / "store"), experiment()
    with pytest.raises(ModelError, match=r"(?s)no warmed-up model yet.*evolve warmup"):
        base.first_policy(asked)
    seen: list[str] = []
    made = warm_up(asked, store, lambda what, done, total: seen.append(what), lambda tokens: seen.append(f"{tokens > 0}"))
    assert made.made
    assert [one.round for one in made.rounds] == [1, 2]
    assert {"scripted episodes", "True", "round 1: training", "round 2: episodes with advice"} <= set(seen)
    out = model_folder(asked.models.policy)
    assert weights(out) != weights(tiny)
    identity = base.first_policy(asked).base
    assert identity.startswith("sha256:")
    # What the note says of seconds is no part of the model: the same weights are the same base on every machine.
    note = (out / folder.NOTE).read_text()
    slower = json.loads(note) | {"rounds": [one | {"seconds": 1e6} for one in json.loads(note)["rounds"]]}
    (out / folder.NOTE).write_text(json.dumps(slower))
    assert base.first_policy(asked).base == identity
    (out / folder.NOTE).write_text(note)
    # Another seed or another injection shares it; another script or another limit does not.
    assert folder.outdated(experiment(seed=7, injection="global")) is None
    assert "other settings" in (folder.outdated(experiment({"skill": 0.5})) or "")
    again = warm_up(experiment(), store)
    assert (again.made, again.rounds, again.digest) == (False, made.rounds, made.digest)
    gone = warm_up(experiment({"base": str(tmp_path / "gone")}), store)  # what it was made from may go
    assert (gone.made, gone.rounds, gone.digest) == (False, made.rounds, made.digest)


def test_a_kill_costs_the_round_it_was_in_and_nothing_shows(experiment: Load, tmp_path: Path) -> None:
    asked, seen = experiment(), list[str]()
    expected = warm_up(asked, Store(tmp_path / "one"), lambda what, done, total: seen.append(what))
    before = weights(expected.folder)
    for path in expected.folder.iterdir():
        path.unlink()
    expected.folder.rmdir()
    store, trained = Store(tmp_path / "two"), list[str]()

    def kill(what: str, done: int, total: int) -> None:
        trained.append(what)
        if what == "round 2: training" and trained.count(what) == 1:
            raise Killed

    with pytest.raises(Killed):
        warm_up(asked, store, kill)
    assert not expected.folder.exists()
    made = warm_up(asked, store, kill)
    assert trained.count("round 1: training") == seen.count("round 1: training")
    assert [(one.reward, one.loss) for one in made.rounds] == [(one.reward, one.loss) for one in expected.rounds]
    assert weights(made.folder) == before


def test_the_command_puts_the_experiment_on_record_first(
    experiment: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`evolve gc` goes by that: what a killed warm-up has done stays."""

    def made(asked: Experiment, store: Store, *_: object) -> training.WarmedUp:
        assert registry.load(store.root, "warmed") == asked
        return training.WarmedUp(tmp_path / "warm", folder.digest(asked), (), made=True)

    experiment()
    monkeypatch.setattr(training, "warm_up", made)
    result = CliRunner().invoke(cli.app, ["warmup", str(tmp_path / "warmed.yaml"), "--store", str(tmp_path / "store")])
    assert result.exit_code == 0, result.exception


def test_it_ends_where_the_target_is_reached(experiment: Load, tmp_path: Path) -> None:
    made = warm_up(experiment({"target": 0.0}), Store(tmp_path / "store"))
    assert len(made.rounds) == 1
    told = json.loads((made.folder / folder.NOTE).read_text())
    assert told["digest"] == made.digest


def test_an_episode_that_breaks_is_not_a_lost_one(experiment: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = experiment()  # its world can be imported from now on
    monkeypatch.setattr("guided_world.Steps.call", lambda self, call: 1 / 0)
    with pytest.raises(ModelError, match=r"scripted episodes: 4 of 4 broke, the first: .*ZeroDivisionError"):
        warm_up(asked, Store(tmp_path / "store"))


def test_what_somebody_else_put_there_stays(experiment: Load, tmp_path: Path) -> None:
    (tmp_path / "warm").mkdir()
    (tmp_path / "warm" / "mine.txt").write_text("a model of mine")
    with pytest.raises(ConfigError, match="no warm-up made it"):
        warm_up(experiment(), Store(tmp_path / "store"))
    assert (tmp_path / "warm" / "mine.txt").exists()


@pytest.mark.parametrize(
    ("warmup", "changes", "error", "told"),
    [
        ({"world": 10}, {}, ConfigError, r"tasks.train.world: 11 is a world of the warm-up"),
        (None, {}, ConfigError, "no section `warmup`"),
        ({}, {"models": {}}, ConfigError, "cannot write there"),
        ({}, {"models": {"policy": {"path": "pocket-cases"}}}, ConfigError, "cannot write there"),
        ({"base": "/nowhere"}, {}, ModelError, "warmup.base: /nowhere: no model there"),
        ({}, {"environment": {"kind": "pocket"}}, ConfigError, "with a state"),
    ],
)
def test_what_cannot_be_warmed_up(
    experiment: Load, tmp_path: Path, warmup: dict[str, Any] | None, changes: dict[str, Any], error: type[Exception], told: str
) -> None:
    if "models" not in changes:
        changes = {
            **changes,
            "tasks": {s: {"world": w, "count": 4} for s, w in (("train", 11), ("development", 21), ("held_out", 31))},
        }
    with pytest.raises(error, match=told):
        warm_up(experiment(warmup, **changes), Store(tmp_path / "store"))
