"""Dagster's databases: a kill while they are made costs nothing, and one that was half made before is named."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import pytest
from evolve_dag.assets import databases, launch

from evolve_dag.errors import StoreError


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("whole") / "dagster"
    home.mkdir()
    databases.prepare(home)
    return home


@pytest.mark.parametrize("at", ["_close", "replace"])
def test_a_kill_while_they_are_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str) -> None:
    def killed(path: Path, *others: Path) -> None:
        if path.suffix == ".db":  # not the lock's note
            calls.append(path)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(path, *others)

    calls: list[Path] = []
    holder = databases if at == "_close" else Path
    real = getattr(holder, at)
    home = tmp_path / "store" / "dagster"
    home.mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(holder, at, killed)
        with pytest.raises(KeyboardInterrupt):
            databases.prepare(home)
    assert sum((home / name).exists() for name in databases.DATABASES) == 1
    with launch.open_instance(tmp_path / "store") as instance:
        assert instance.get_dynamic_partitions("experiments") == []
        assert list(instance.get_runs()) == []
        assert instance.all_instigator_state() == []
    assert not (home / databases.BESIDE).exists()


@pytest.mark.parametrize("name", databases.DATABASES)
def test_one_that_was_not_made_to_the_end_is_named(whole: Path, tmp_path: Path, name: str) -> None:
    home = Path(shutil.copytree(whole, tmp_path / "store" / "dagster"))
    with sqlite3.connect(home / name) as connection:
        connection.execute("DROP TABLE alembic_version")
    with pytest.raises(StoreError, match="not make it to the end") as raised, launch.open_instance(tmp_path / "store"):
        pass
    assert str((home / name).parent) in raised.value.remedy


def test_a_home_that_keeps_them_elsewhere_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text("storage: {postgres: {postgres_db: {}}}")
    databases.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dagster.yaml"]
