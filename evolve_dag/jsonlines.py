"""One reader for JSONL files that users write: every mistake at once, each with its line number."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from evolve_dag.errors import DataError

SHOWN = 10
"""Mistakes that one message spells out; the rest are counted."""

Mistake = tuple[int, str]
"""1-based line number and what is wrong there."""

_PACKED = {
    b"\x1f\x8b": ("gzip", "gunzip"),
    b"BZh": ("bzip2", "bunzip2"),
    b"\xfd7zXZ\x00": ("xz", "unxz"),
    b"\x28\xb5\x2f\xfd": ("zstd", "unzstd"),
    b"PK\x03\x04": ("zip", "unzip"),
}
"""First bytes of a compressed file, with which no JSON begins -> what made it, and what undoes it."""


def read_objects(path: str | Path) -> tuple[list[tuple[int, dict[str, Any]]], list[Mistake]]:
    """The JSON objects of a file with their 1-based line numbers, and the lines that hold none.

    Blank lines and a byte-order mark are skipped. Lines are judged one by one, so one broken line
    does not hide the next.

    Raises:
        DataError: the file is missing, unreadable, compressed or holds no line at all.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe would wait for ever, a device never end
        raise DataError(f"{path}: not a file", "the path must name a readable JSONL file")
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", "check the path in the experiment file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", "the path must name a readable JSONL file") from None
    refuse_packed(path, content)
    objects: list[tuple[int, dict[str, Any]]] = []
    mistakes: list[Mistake] = []
    # Split on line feeds only: str.splitlines would also cut at U+2028, which is legal inside JSON text.
    for number, raw in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not raw.strip():
            continue
        try:
            value = json.loads(raw.decode("utf-8"), object_pairs_hook=_refuse_repeated_keys)
        except UnicodeDecodeError as error:
            mistakes.append((number, f"not UTF-8 (byte {error.start + 1} of the line)"))
        except json.JSONDecodeError as error:
            mistakes.append((number, f"not valid JSON: {error.msg} (character {error.pos + 1} of the line)"))
        except _RepeatedKeyError as error:
            mistakes.append((number, f"key {error.args[0]!r} stands twice"))
        except RecursionError:
            mistakes.append((number, "not valid JSON: nested too deeply"))
        except ValueError:
            mistakes.append((number, "a number has too many digits"))
        else:
            if isinstance(value, dict):
                objects.append((number, value))
            else:
                mistakes.append((number, f"holds {kind_of(value)}, not an object like {{...}}"))
    if not objects and not mistakes:
        raise DataError(f"{path}: empty file", "write one JSON object a line")
    return objects, mistakes


def refuse_packed(path: str | Path, content: bytes) -> None:
    """Refuse a compressed file as a whole. It is not unpacked here: a digest is of a file's bytes, and the same rows packed
    again are other bytes.

    Args:
        content: the file's, or its beginning.

    Raises:
        DataError: it is compressed; names the program that unpacks it.
    """
    for start, (made_by, undo) in _PACKED.items():
        if content.startswith(start):
            raise DataError(
                f"{path}: compressed ({made_by})",
                f"unpack it ({undo}) and use the unpacked file in its place",
            )


def text_mistakes(value: Mapping[str, Any], key: str) -> list[str]:
    """What is wrong with the field ``key``, which must hold text that is not blank; [] when nothing is."""
    if key not in value or value[key] is None:
        return [f"{key!r} is missing"]
    if not isinstance(value[key], str):
        return [f"{key!r} must be text, not {kind_of(value[key])}"]
    if not value[key].strip():
        return [f"{key!r} is empty"]
    return []


def refuse(path: str | Path, mistakes: Iterable[Mistake], remedy: str) -> NoReturn:
    """Raise one DataError that lists ``mistakes`` by line."""
    refuse_all(path, [f"line {number}: {what}" for number, what in sorted(mistakes)], remedy)


def refuse_all(path: str | Path, mistakes: Sequence[str], remedy: str) -> NoReturn:
    """Raise one DataError that lists ``mistakes``, the first :data:`SHOWN` in full."""
    lines = list(mistakes[:SHOWN])
    if len(mistakes) > SHOWN:
        lines.append(f"... and {len(mistakes) - SHOWN} more")
    listing = "".join(f"\n  {line}" for line in lines)
    raise DataError(f"{path}: {len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}{listing}", remedy)


def kind_of(value: Any) -> str:
    """The JSON kind of ``value`` in a reader's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, (int, float)):
        return f"the number {value}"
    return "text" if isinstance(value, str) else "a list" if isinstance(value, list) else "an object"


class _RepeatedKeyError(ValueError):
    """An object names one key twice; json would keep the last in silence."""


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for key, inner in pairs:
        if key in value:
            raise _RepeatedKeyError(key)
        value[key] = inner
    return value
