"""The databases of Dagster's home: made whole, or not at all.

Dagster makes some thirty tables, one after the other, and takes a database whose file is there for a whole one: a kill in
between would leave a home that never works again.
"""

import os
import shutil
import sqlite3
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.instance.ref import InstanceRef
from dagster._core.scheduler.instigation import SensorInstigatorData
from sqlalchemy.exc import SQLAlchemyError

from evolve_dag.errors import StoreError
from evolve_dag.store.disk import fsync_folder, require_address
from evolve_dag.store.faults import alembic_revision, disk_error
from evolve_dag.store.locks import locked

INDEX = "history/runs/index.db"
SCHEDULES = "schedules/schedules.db"
DATABASES = {
    "history/runs.db": "the list of runs",
    INDEX: "what Dagster knows of assets and checks",
    SCHEDULES: "which schedules and sensors are on",
}
"""File -> what is lost with it, in a home whose ``dagster.yaml`` names no storage.

Each run's own ``history/runs/<id>.db`` goes on where a kill left it.
"""
COUNTING = ("failure_watch", "restore_watch", "continue_until")
"""Sensors that remember the last event that they have seen by its number in the index."""
BESIDE = ".databases.new"
"""Folder in the home that they are made in; whatever it holds is a killed maker's."""
_STORAGE = ("storage", "run_storage", "event_log_storage", "schedule_storage")
_SETTINGS: dict[str, Any] = {"telemetry": {"enabled": False}}
_MAKING_SECONDS = 120.0


def prepare(home: Path) -> None:
    """Make the databases of a home that are not there; a home that keeps its storage elsewhere is left alone.

    Raises:
        StoreError: one was not made to the end, by whoever made it, or it cannot be written; or Dagster would look for them
            elsewhere.
        ConcurrencyError: another process makes them and does not come to an end.
    """
    if _are_elsewhere(home / "dagster.yaml"):
        return
    require_address(home)
    paths = [home / name for name in DATABASES]
    if not all(map(Path.exists, paths)):
        with locked(home, "databases", "Dagster's databases are being made", _MAKING_SECONDS):
            missing = [path for path in paths if not path.exists()]
            if home / INDEX in missing and home / SCHEDULES not in missing:
                _forget_cursors(home)
            if missing:
                _make(home, missing)
    for path in paths:
        if not _is_whole(path):
            raise StoreError(f"{path}: Dagster did not make it to the end", remedy(home, [path.parent]))


def remedy(home: Path, broken: Sequence[Path]) -> str:
    """How to go on without files or folders of a home, and what is lost with them."""
    lost = [what for name, what in DATABASES.items() if any((home / name).is_relative_to(path) for path in broken)]
    return (
        f"move {' and '.join(map(str, broken))} away (lost with it: {', '.join(lost) or 'what single runs have logged'}); "
        "`evolve run` puts on record anew what the store holds"
    )


def _are_elsewhere(settings: Path) -> bool:
    try:
        found = yaml.safe_load(settings.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, yaml.YAMLError):
        return True  # Dagster says what is wrong with them
    return isinstance(found, dict) and not found.keys().isdisjoint(_STORAGE)


def _make(home: Path, missing: list[Path]) -> None:
    beside = home / BESIDE
    shutil.rmtree(beside, ignore_errors=True)
    try:
        beside.mkdir()
        with dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(beside), overrides=_SETTINGS)) as instance:
            _ = instance.run_storage, instance.event_log_storage, instance.schedule_storage
        for path in missing:
            made = beside / path.relative_to(home)
            _close(made)
            path.parent.mkdir(parents=True, exist_ok=True)
            made.replace(path)
            fsync_folder(path.parent)
        shutil.rmtree(beside)
    except OSError as error:
        raise disk_error(error, home) from error


def _forget_cursors(home: Path) -> None:
    """Events are counted from 1 in a new index: a sensor that waits for one beyond the old count would see nothing for long."""
    if not _is_whole(home / SCHEDULES):
        return
    settings = InstanceRef.from_dir(str(home), overrides=_SETTINGS)
    with (
        suppress(SQLAlchemyError),
        dg.DagsterInstance.from_ref(settings) as instance,
    ):  # a damaged one is told when it is opened
        for state in instance.all_instigator_state(instigator_type=InstigatorType.SENSOR):
            data = state.instigator_data
            if state.name in COUNTING and isinstance(data, SensorInstigatorData) and data.cursor is not None:
                instance.update_instigator_state(state.with_data(data._replace(cursor=None)))


def _close(path: Path) -> None:
    """Take a database's log of writes into its file, so that the file alone is all of it."""
    connection = sqlite3.connect(path)
    try:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    finally:
        connection.close()
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _is_whole(path: Path) -> bool:
    """Whether the revision is written down, which comes after the tables. What SQLite cannot read is Dagster's to say."""
    try:
        return alembic_revision(path) is not None
    except sqlite3.OperationalError as error:
        return "no such table" not in str(error)
    except sqlite3.DatabaseError:
        return True
