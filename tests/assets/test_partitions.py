"""Partitions that several processes make known at the same time."""

from __future__ import annotations

from multiprocessing import get_context
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from evolve_dag.assets import partitions
from evolve_dag.assets.launch import open_instance


def announce(root: str, number: int, ready: Any) -> None:
    """Make forty iterations known, one after the other, as a study's worker does."""
    with open_instance(Path(root)) as instance:
        ready.wait()
        for k in range(1, 41):
            partitions.add_partitions(instance, [f"arm-{number}"], k)


def test_processes_side_by_side_make_the_same_iterations_known(tmp_path: Path) -> None:
    with open_instance(tmp_path) as instance:
        assert instance.get_dynamic_partitions(partitions.ITERATION) == []
    spawn = get_context("spawn")
    ready = spawn.Barrier(2)
    workers = [spawn.Process(target=announce, args=(str(tmp_path), number, ready)) for number in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    with open_instance(tmp_path) as instance:
        assert sorted(instance.get_dynamic_partitions(partitions.ITERATION)) == partitions.iteration_keys(40)


def test_another_error_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from sqlalchemy.exc import IntegrityError

    def fails(self: Any, definition: str, keys: list[str]) -> None:
        raise IntegrityError("insert", None, Exception("NOT NULL constraint failed"))

    monkeypatch.setattr(dg.DagsterInstance, "add_dynamic_partitions", fails)
    with dg.DagsterInstance.ephemeral() as instance, pytest.raises(IntegrityError, match="NOT NULL"):
        partitions.add_partitions(instance, ["arm"], 2)
