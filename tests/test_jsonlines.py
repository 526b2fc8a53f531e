"""Lines of JSON that others wrote: judged one by one, and nothing that could not be a file is opened."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from evolve_dag.errors import DataError
from evolve_dag.jsonlines import read_objects


@pytest.mark.parametrize(
    ("line", "what"),
    [
        (f'{{"answer": {"9" * 5000}}}', "a number has too many digits"),
        ("[" * 100_000 + "]" * 100_000, "nested too deeply"),
        ('{"a": 1, "a": 2}', "key 'a' stands twice"),
        ("5", "holds the number 5, not an object"),
        ("{", "not valid JSON"),
    ],
    ids=lambda value: value[:12],
)
def test_a_broken_line_is_named_and_the_next_is_read(tmp_path: Path, line: str, what: str) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text(f'{line}\n\n{{"good": 1}}\n')
    objects, [(number, told)] = read_objects(path)
    assert objects == [(3, {"good": 1})]
    assert number == 1
    assert what in told


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero"), Path.mkdir], ids=["pipe", "device", "folder"]
)
def test_what_is_no_file_is_not_opened(tmp_path: Path, make: object) -> None:
    path = tmp_path / "lines.jsonl"
    make(path)  # type: ignore[operator]
    with pytest.raises(DataError, match="not a file"):
        read_objects(path)
