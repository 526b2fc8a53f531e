"""Whatever is raised ends in one message with a remedy that fits, and never in a circle."""

from __future__ import annotations

import errno
import sqlite3
from pathlib import Path

import pytest

from evolve_dag.errors import DataError, EvolveError, StoreError
from evolve_dag.store.faults import UnexpectedError, chain, damaged_databases, disk_error, explained


class WrapperError(Exception):
    """As Dagster wraps what a step raised."""

    def __init__(self, inner: BaseException) -> None:
        self.user_exception = inner
        super().__init__("wrapped")


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    try:
        raise error from cause
    except BaseException as caught:
        return caught


def test_links_in_a_circle_are_walked_once() -> None:
    inner = RuntimeError("boom")
    outer = WrapperError(inner)
    inner.__context__ = outer  # what Dagster leaves behind where a step raises without `from`
    assert list(chain(inner)) == [inner, outer]
    assert str(explained(raised(inner))).startswith("RuntimeError: boom (")
    assert "EVOLVE_DEBUG=1" in explained(inner).remedy


def test_our_own_error_behind_others_is_the_message() -> None:
    own = DataError("pages.jsonl: empty", "write pages")
    assert explained(raised(WrapperError(own))) is own
    assert explained(raised(RuntimeError("x"), own)) is own


def test_what_was_handled_before_is_not_the_cause() -> None:
    error = ValueError("later")
    error.__context__, error.__suppress_context__ = DataError("handled", "x"), True
    assert isinstance(explained(error), UnexpectedError)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "free room"),
        (OSError(errno.EROFS, "Read-only file system"), "make that disk writable"),
        (OSError(errno.EIO, "Input/output error"), "check that disk"),
        (PermissionError(errno.EACCES, "Permission denied"), "see that you may write there"),
        (sqlite3.OperationalError("attempt to write a readonly database"), "make that disk writable"),
        (sqlite3.OperationalError("database or disk is full"), "free room"),
        (RuntimeError("failed: Read-only file system (os error 30)"), "make that disk writable"),
        (sqlite3.DatabaseError("database disk image is malformed"), "evolve doctor"),
        (MemoryError(), "runtime.concurrency"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_the_remedy_fits_what_the_disk_said(error: Exception, remedy: str) -> None:
    said = explained(raised(WrapperError(error)))
    assert isinstance(said, EvolveError)
    assert remedy in said.remedy
    if remedy != "free room":
        assert "free room" not in said.remedy


def test_a_disk_error_of_a_database_is_told_without_the_statement() -> None:
    statement = (
        "(sqlite3.OperationalError) database or disk is full\n[SQL: UPDATE jobs SET job_body=?]\n[parameters: ('{...}',)]"
    )
    assert explained(RuntimeError(statement)).what == "the disk: (sqlite3.OperationalError) database or disk is full"


def test_a_disk_error_names_the_file() -> None:
    said = disk_error(OSError(errno.EROFS, "Read-only file system"), Path("/x/report.html"))
    assert isinstance(said, StoreError)
    assert said.what == "/x/report.html: cannot be written: Read-only file system"


def test_damaged_databases_are_found_and_whole_ones_are_not(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "whole.db") as connection:
        connection.execute("create table t (x)")
    connection.close()
    (tmp_path / "noise.db").write_bytes(b"\x07" * 9000)
    (tmp_path / "folder.db").mkdir()
    (tmp_path / "empty.db").touch()
    content = bytearray((tmp_path / "whole.db").read_bytes())
    content[100:4000] = b"\xff" * 3900
    (tmp_path / "flipped.db").write_bytes(bytes(content))
    assert [path.name for path in damaged_databases(tmp_path)] == ["empty.db", "flipped.db", "folder.db", "noise.db"]
