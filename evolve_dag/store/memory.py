"""What was asked once need not be asked again: answers of models and of the web, by the hash of the question.

One SQLite file for all steps, experiments and processes of a store. A killed step that resumes finds here what it has paid
for. Only results are kept, never failures; deleting the file costs time and money, nothing else.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from evolve_dag.errors import StoreError
from evolve_dag.plain import whole
from evolve_dag.secrecy import without_keys


class Memory:
    """Text by (space, key). Safe to use from many threads and processes.

    Raises:
        StoreError: the file cannot be opened, read or written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._connections = threading.local()

    @staticmethod
    def key_of(*parts: Any) -> str:
        """Hash of plain JSON values: equal values, equal key."""
        text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    def get(self, space: str, key: str) -> str | None:
        """What was put there last, or None."""
        with _told(self.path):
            row = self._open().execute("SELECT value FROM memory WHERE space = ? AND key = ?", (space, key)).fetchone()
        return None if row is None else str(row[0])

    def put(self, space: str, key: str, value: str) -> None:
        """Remember ``value``, without half characters and the keys of endpoints and services; the last one stands."""
        value = whole(without_keys(value))
        with _told(self.path), self._open() as connection:
            connection.execute("INSERT OR REPLACE INTO memory VALUES (?, ?, ?)", (space, key, value))

    def close(self) -> None:
        """Close this thread's connection."""
        connection = getattr(self._connections, "open", None)
        if connection is not None:
            connection.close()
            self._connections.open = None

    def _open(self) -> sqlite3.Connection:
        connection: sqlite3.Connection | None = getattr(self._connections, "open", None)
        if connection is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self.path, timeout=60.0)
            with closing(connection.execute("PRAGMA journal_mode=WAL")):
                pass
            connection.execute("PRAGMA synchronous=NORMAL")
            with connection:
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS memory (space TEXT, key TEXT, value TEXT NOT NULL, PRIMARY KEY (space, key))"
                )
            self._connections.open = connection
        return connection


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """SQLite's errors as ours."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StoreError(
            f"{path}: cannot be used: {error}", "free room, or delete the file: it only saves asking again"
        ) from error
