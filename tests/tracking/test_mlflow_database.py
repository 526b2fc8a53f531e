"""The store's own MLflow database: made whole or not at all, and named when it is of no use."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evolve_dag.errors import StoreError
from evolve_dag.tracking import mlflow_server
from evolve_dag.tracking.mlflow_server import TrackingError, connect, mlflow_errors, own_database, prepare_database

MAKE = """
import os, signal, sys
from pathlib import Path
from sqlalchemy import Engine, event
from evolve_dag.tracking.mlflow_server import prepare_database
left = int(sys.argv[2])

@event.listens_for(Engine, "before_cursor_execute")
def count(connection, cursor, statement, *rest):
    global left
    if statement.lstrip().upper().startswith(("CREATE", "ALTER", "DROP")):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

prepare_database(Path(sys.argv[1]))
"""


def uri(root: Path) -> str:
    return f"sqlite:///{own_database(root)}"


@pytest.fixture(scope="module")
def making(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bool]]:
    """A store with a database, and whether that was there at every statement that a kill could have come before."""
    from sqlalchemy import Engine, event

    root = tmp_path_factory.mktemp("made")
    seen: list[bool] = []

    def look(*_: Any) -> None:
        seen.append(own_database(root).exists())

    event.listen(Engine, "before_cursor_execute", look)
    try:
        prepare_database(root)
    finally:
        event.remove(Engine, "before_cursor_execute", look)
    return root, seen


def test_it_is_not_there_before_its_last_table_is(making: tuple[Path, list[bool]]) -> None:
    root, seen = making
    assert len(seen) > 200
    assert not any(seen)
    assert [path.name for path in own_database(root).parent.iterdir()] == ["mlflow.db"]
    assert connect(root, uri(root)).search_experiments() != []


def test_killed_while_it_is_made_then_made(tmp_path: Path, making: tuple[Path, list[bool]]) -> None:
    path = own_database(tmp_path)
    path.parent.mkdir(parents=True)
    path.touch()  # nothing in it: not a database, and what lies beside it as its journal must not be played back
    path.with_name("mlflow.db-journal").write_bytes(os.urandom(4096))
    killed = subprocess.run([sys.executable, "-c", MAKE, str(tmp_path), "60"], capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert path.stat().st_size == 0
    assert path.with_name("mlflow.db.new").exists(), "killed before it had begun"
    prepare_database(tmp_path)
    assert [found.name for found in path.parent.iterdir()] == ["mlflow.db"]
    assert columns(tmp_path) == columns(making[0])


def columns(root: Path) -> set[tuple[str, str]]:
    with sqlite3.connect(own_database(root)) as connection:
        every = "SELECT t.name, c.name FROM sqlite_master t, pragma_table_info(t.name) c WHERE t.type = 'table'"
        return set(connection.execute(every).fetchall())


def half_made(path: Path) -> None:
    """As a kill left it before databases were made beside."""
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE experiments (experiment_id INTEGER)")


def no_revision(path: Path) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num TEXT)")


def a_revision_alone(path: Path) -> None:
    no_revision(path)
    with sqlite3.connect(path) as connection:
        connection.execute("INSERT INTO alembic_version VALUES ('451aebb31d03')")
        connection.execute("CREATE TABLE metrics (key TEXT)")


@pytest.mark.parametrize(
    "write",
    [half_made, no_revision, a_revision_alone, lambda path: path.write_bytes(os.urandom(9000)), lambda path: path.mkdir()],
    ids=["half made", "no revision", "tables missing", "noise", "folder"],
)
def test_one_of_no_use_is_named_with_the_command_that_sends_everything_anew(
    tmp_path: Path, write: Callable[[Path], Any]
) -> None:
    path = own_database(tmp_path)
    path.parent.mkdir(parents=True)
    write(path)
    with pytest.raises(TrackingError) as caught:
        connect(tmp_path, uri(tmp_path))
    assert str(path) in caught.value.what
    assert f"move {path} away" in caught.value.remedy
    assert "evolve sync-mlflow --again" in caught.value.remedy


def test_pages_that_are_damaged_are_found_at_work(tmp_path: Path) -> None:
    def reads() -> None:
        with sqlite3.connect(tmp_path / "mlflow.db") as connection:
            connection.execute("CREATE TABLE runs (x TEXT)")
            connection.executemany("INSERT INTO runs VALUES (?)", [("x" * 900,)] * 40)
        content = bytearray((tmp_path / "mlflow.db").read_bytes())
        content[8192:] = b"\xff" * len(content[8192:])
        (tmp_path / "mlflow.db").write_bytes(content)
        with sqlite3.connect(tmp_path / "mlflow.db") as connection:
            connection.execute("SELECT count(x) FROM runs").fetchall()

    with pytest.raises(TrackingError, match="malformed") as caught, mlflow_errors(f"sqlite:///{tmp_path}/mlflow.db"):
        reads()
    assert f"move {tmp_path}/mlflow.db away" in caught.value.remedy


def test_a_disk_that_is_full_is_said_to_be_full(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(mlflow_server, "_make_tables", full)
    with pytest.raises(TrackingError, match="full") as caught:
        connect(tmp_path, uri(tmp_path))
    assert "free room" in caught.value.remedy


def test_a_folder_that_cannot_be_made_is_a_matter_of_the_disk(tmp_path: Path) -> None:
    (tmp_path / "mlflow").touch()
    with pytest.raises(StoreError) as caught:
        connect(tmp_path, uri(tmp_path))
    assert caught.value.remedy


def test_a_path_that_mlflow_takes_for_another_is_told(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"a\?b/mlflow/mlflow.db: .* in a path for another file"):
        prepare_database(tmp_path / "a?b")
    assert not list(tmp_path.iterdir())
    prepare_database(tmp_path / "a#b")
    assert own_database(tmp_path / "a#b").is_file()
