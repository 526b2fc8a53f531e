"""Append-only JSON lines that outlive a killed process."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evolve_dag.errors import StoreError
from evolve_dag.store.disk import fsync_folder
from evolve_dag.store.faults import disk_error


class Journal:
    """Append-only JSON lines of one builder: what is in it is not done again after a kill.

    Safe to append from several threads. A line that a kill tore is dropped and overwritten.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._lock = threading.Lock()
        self._drop_torn_line()

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record and flush it to the disk.

        Raises:
            StoreError: the disk is full or broken; the journal is left as it was before.
        """
        line = json.dumps(record, separators=(",", ":")).encode("ascii") + b"\n"
        with self._lock:
            try:
                descriptor = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            except OSError as error:
                raise disk_error(error, self.path) from error
            try:
                size = os.fstat(descriptor).st_size
                try:
                    written = 0
                    while written < len(line):
                        written += os.write(descriptor, line[written:])
                    os.fsync(descriptor)
                except OSError as error:
                    with contextlib.suppress(OSError):  # a half line would swallow the next record
                        os.ftruncate(descriptor, size)
                    raise disk_error(error, self.path) from error
            finally:
                os.close(descriptor)
            if size == 0:
                fsync_folder(self.path.parent)

    def records(self) -> list[dict[str, Any]]:
        """Every whole record, oldest first.

        Raises:
            StoreError: a line before the last is not a JSON object (edited by hand, or a broken disk).
        """
        with self._lock:
            try:
                lines = self.path.read_bytes().splitlines()
            except FileNotFoundError:
                return []
        records: list[dict[str, Any]] = []
        for number, line in enumerate(lines, 1):
            record = object_or_none(line)
            if record is None:
                raise StoreError(
                    f"{self.path}: line {number} is not a JSON object",
                    f"delete {self.path} and run again: what it held will be done again",
                )
            records.append(record)
        return records

    def _drop_torn_line(self) -> None:
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return
        whole = content[: content.rfind(b"\n") + 1]
        last = whole[whole.rfind(b"\n", 0, max(len(whole) - 1, 0)) + 1 :]
        if last and object_or_none(last) is None:  # a power cut can leave a line of the right length and wrong bytes
            whole = whole[: len(whole) - len(last)]
        if len(whole) < len(content):
            try:
                os.truncate(self.path, len(whole))
            except OSError as error:
                raise disk_error(error, self.path) from error


def object_or_none(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None
