"""Lines of JSON that others wrote: judged one by one, and nothing that could not be a file is opened."""

from __future__ import annotations

import bz2
import gzip
import lzma
import os
from collections.abc import Callable
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


@pytest.mark.parametrize(
    ("pack", "told"),
    [
        (gzip.compress, "(gunzip)"),
        (bz2.compress, "(bunzip2)"),
        (lzma.compress, "(unxz)"),
        (lambda content: b"\x28\xb5\x2f\xfd" + content, "(unzstd)"),
    ],
    ids=["gzip", "bzip2", "xz", "zstd"],
)
def test_a_compressed_file_is_refused_once_not_line_by_line(tmp_path: Path, pack: Callable[[bytes], bytes], told: str) -> None:
    path = tmp_path / "lines.jsonl.x"
    path.write_bytes(pack(b"".join(b'{"number": %d}\n' % (n * n) for n in range(2000))))
    with pytest.raises(DataError) as caught:
        read_objects(path)
    assert caught.value.what.startswith(f"{path}: compressed (")
    assert "line 1" not in caught.value.what
    assert told in caught.value.remedy
