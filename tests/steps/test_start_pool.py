"""An experiment that starts from a pool that others wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from evolve_dag.config.schema import Experiment
from evolve_dag.errors import DataError
from evolve_dag.steps.base import entering_policy, resolve, run_step
from evolve_dag.steps.policies import open_pool
from evolve_dag.store.artifacts import Store

POOL = {"G0": "Verify: when a search lists a page, visit it before you answer.", "G7": "Stop: when the page says it, answer."}


def experiment(path: Path | str) -> Experiment:
    return Experiment.model_validate({"experiment": "from-pool", "start_pool": str(path)})


def test_the_pool_enters_the_first_iteration(tmp_path: Path) -> None:
    path = tmp_path / "experiences.json"
    path.write_text(json.dumps(POOL))
    store = Store(tmp_path / "store")
    run_step("policy", experiment(path), 1, store)
    entering = entering_policy(experiment(path), 1, store)
    assert entering.experience is not None
    pool = open_pool(store.open("experience", entering.experience))
    assert [item.text for item in pool.items] == list(POOL.values())
    assert [item.id for item in pool.items] == list(POOL)
    assert f"p{entering.next_item:04d}" not in POOL


def test_another_pool_is_another_policy(tmp_path: Path) -> None:
    store, path = Store(tmp_path / "store"), tmp_path / "experiences.json"
    digests = []
    for texts in (POOL, {**POOL, "G7": "Stop: when the page says it, answer at once."}):
        path.write_text(json.dumps(texts))
        digests.append(resolve("policy", experiment(path), 1, store).digest)
    digests.append(resolve("policy", experiment(""), 1, store).digest)
    assert len(set(digests)) == 3


def test_a_pool_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.json"):
        resolve("policy", experiment(tmp_path / "gone.json"), 1, Store(tmp_path))
