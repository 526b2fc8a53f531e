"""Dagster's databases: a kill while they are made costs nothing, and one that was half made before is named."""

from __future__ import annotations

import shutil
import sqlite3
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.remote_origin import RemoteInstigatorOrigin, RemoteRepositoryOrigin
from dagster._core.scheduler.instigation import InstigatorState, InstigatorStatus, SensorInstigatorData
from dagster._core.workspace.load import location_origins_from_config
from evolve_dag.assets import databases, launch

from evolve_dag.definitions import defs
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
    assert f"move {(home / name).parent} away" in raised.value.remedy
    assert databases.DATABASES[name] in raised.value.remedy


def read_all(root: Path) -> None:
    with launch.open_instance(root) as instance:
        instance.get_runs()
        instance.get_asset_keys()
        instance.all_instigator_state()


@pytest.mark.parametrize("name", databases.DATABASES)
def test_the_remedy_for_a_damaged_one_says_what_is_lost_and_no_more(whole: Path, tmp_path: Path, name: str) -> None:
    home = Path(shutil.copytree(whole, tmp_path / "store" / "dagster"))
    (home / name).write_bytes(b"no database" * 1000)
    with pytest.raises(StoreError) as raised:
        read_all(tmp_path / "store")
    assert f"move {home / name} away (lost with it: {databases.DATABASES[name]})" in raised.value.remedy


def sensor_states(instance: dg.DagsterInstance) -> dict[str, tuple[bool, str | None]]:
    """Name -> whether it is on, and its cursor."""
    states = instance.all_instigator_state(instigator_type=InstigatorType.SENSOR)
    return {
        s.name: (s.is_running, s.instigator_data.cursor) for s in states if isinstance(s.instigator_data, SensorInstigatorData)
    }


def test_a_new_index_is_watched_from_its_beginning(whole: Path, tmp_path: Path) -> None:
    """Its events are counted from 1: alerts that wait for the number that the old one had come to would be silent for weeks."""
    home = Path(shutil.copytree(whole, tmp_path / "store" / "dagster"))
    origin = location_origins_from_config(launch.own_workspace(), "")[launch.LOCATION]
    with launch.open_instance(tmp_path / "store") as instance:
        for name in (*databases.COUNTING, "config_watch"):
            where = RemoteInstigatorOrigin(RemoteRepositoryOrigin(origin, "__repository__"), name)
            data = SensorInstigatorData(cursor="3000")
            instance.add_instigator_state(InstigatorState(where, InstigatorType.SENSOR, InstigatorStatus.RUNNING, data))
    (home / databases.INDEX).unlink()
    with launch.open_instance(tmp_path / "store") as instance:
        assert sensor_states(instance) == {
            **dict.fromkeys(databases.COUNTING, (True, None)),
            "config_watch": (True, "3000"),
        }


def test_the_sensors_that_count_events_are_the_ones_there_are() -> None:
    assert set(databases.COUNTING) <= {sensor.name for sensor in defs.sensors or []}


def test_a_home_that_keeps_them_elsewhere_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "dagster.yaml").write_text("storage: {postgres: {postgres_db: {}}}")
    databases.prepare(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dagster.yaml"]


@pytest.mark.parametrize("sign", ["?", "%20"])
def test_a_path_that_dagster_takes_for_another_is_told_and_nothing_is_made_elsewhere(tmp_path: Path, sign: str) -> None:
    """``a?b/history/runs.db`` was made as the file ``a``."""
    from sqlalchemy.engine import make_url

    if make_url(f"sqlite:////a{sign}b").database == f"/a{sign}b":
        pytest.skip("this version of SQLAlchemy takes the sign as it is")
    home = tmp_path / f"a{sign}b"
    home.mkdir()
    with pytest.raises(StoreError, match="in a path for another file"):
        databases.prepare(home)
    assert [path.name for path in tmp_path.iterdir()] == [home.name]
    assert not list(home.iterdir())


def test_a_home_with_a_server_for_its_databases_may_lie_anywhere(tmp_path: Path) -> None:
    home = tmp_path / "what?"
    home.mkdir()
    (home / "dagster.yaml").write_text("storage: {postgres: {}}\n")
    databases.prepare(home)
