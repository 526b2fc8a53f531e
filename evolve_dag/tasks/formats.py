"""Task suites: files as their authors publish them -> tasks. The data is the user's: docs/benchmarks.md.

Every suite is a row mapping over one reader (JSONL, JSON, Parquet, CSV, XLSX), so a converted file loads too.
``fields`` in the experiment file wins over what a suite expects.
"""

from __future__ import annotations

import base64
import codecs
import csv
import hashlib
import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from evolve_dag.config.fence import Fence
from evolve_dag.config.parts import part
from evolve_dag.errors import DataError, OrderError, PartError
from evolve_dag.jsonlines import Mistake, kind_of, read_objects, refuse_packed
from evolve_dag.records import Task
from evolve_dag.tasks.jsonl import in_percent, tasks_from

if TYPE_CHECKING:
    from evolve_dag.config.schema import TaskSplit

Row = Mapping[str, Any]
Rows = list[tuple[int, Row]]
"""With their number: line, or place in the file."""


@dataclass(frozen=True, slots=True)
class Suite:
    """The row of a suite: how its authors publish a task."""

    read: Callable[[Row], Row]
    """A row of the file -> ``id``, ``question``, ``answer`` and facts to break results down by."""
    once: bool = False
    """Whether the published file holds every problem many times over."""

    def fenced(self, fence: Fence) -> Self:
        """The same row for a suite from outside: what it cannot read is a mistake of that row of the file."""

        def read(row: Row) -> Row:
            try:
                task = fence.run(self.read, row)
            except PartError as error:
                raise _RowError(error.what) from error
            if not isinstance(task, Mapping):
                raise _RowError(fence.nonsense(f"a task is a mapping, not a {type(task).__name__}").what)
            return task

        return replace(self, read=read)


def load_suite(split: TaskSplit, *, suite: str) -> list[Task]:
    """Tasks of one split's file.

    Raises:
        DataError: the file cannot be read, or lists every broken row.
    """
    objects, mistakes = rows_of(split)
    told = f"{split.path}, percent {split.percent[0]} to {split.percent[1]}" if split.percent else str(split.path)
    if not objects and not mistakes:
        raise DataError(f"{told}: no task falls into that part of the file", "widen the split's percent")
    if split.stream and not mistakes:
        earlier, taken = _next_rows(told, objects, split)
        return tasks_from(told, taken, mistakes, suite=suite, count=None, earlier=earlier)
    return tasks_from(told, objects, mistakes, suite=suite, count=split.count, skip=split.skip)


def rows_of(split: TaskSplit) -> tuple[Rows, list[Mistake]]:
    """The rows of the part of the file that a split draws from, as ``suite`` or ``fields`` read them, and what is wrong
    with the others.

    Raises:
        DataError: the file cannot be read.
    """
    assert split.path is not None
    path = Path(split.path)
    rows, mistakes = read_rows(path)
    format: Suite = part("suite", split.suite)
    objects: Rows = []
    for number, row in rows:
        try:
            objects.append((number, _mapped(row, split.fields) if split.fields else format.read(row)))
        except _RowError as error:
            mistakes.append((number, str(error)))
    if format.once:
        objects = _once(objects)
    if split.percent is not None:
        objects = [(number, row) for number, row in objects if in_percent(row.get("question"), *split.percent)]
    return objects, mistakes


def _next_rows(path: str, objects: Rows, split: TaskSplit) -> tuple[Rows, Rows]:
    """The rows of a stream's earlier iterations, and of this one: at the end of the file perhaps fewer than ``count``."""
    taken = objects[split.skip : None if split.count is None else split.skip + split.count]
    if not taken:
        raise OrderError(
            f"{path}: no tasks left: it holds {len(objects)} rows, and this iteration begins with row {split.skip + 1}",
            "append tasks to the file, or lower `iterations`",
        )
    return objects[: split.skip], taken


class _RowError(ValueError):
    """What is wrong with one row."""


# -- suites


def _plain(row: Row) -> Row:
    return row


def _webwalkerqa(row: Row) -> Row:
    """WebWalkerQA (680 in ``test``): question, answer, root_url, and an ``info`` object for breakdowns."""
    info = row.get("info") or {}
    if isinstance(info, str):
        info = _json(info, "info")
    info = info if isinstance(info, Mapping) else {}
    facts = {
        "difficulty": info.get("difficulty_level"),
        "domain": info.get("domain"),
        "language": info.get("lang"),
        "kind": info.get("type"),
    }
    question = _first(row, "question", "Question")
    root = row.get("root_url")
    return {
        "id": row.get("id"),
        "question": f"{question}\n(Start from {root})" if root and isinstance(question, str) else question,
        "answer": _first(row, "answer", "Answer"),
        **{name: value for name, value in facts.items() if isinstance(value, str)},
    }


def _gaia(row: Row) -> Row:
    """GAIA-Text-103: the 103 validation tasks of GAIA that need no file."""
    attached = row.get("file_name") or ""
    if attached:
        raise _RowError(f"needs the file {attached!r}: not one of the 103 text tasks")
    level = _first(row, "Level", "level")
    return {
        "id": as_text(_first(row, "task_id", "id")),
        "question": _first(row, "Question", "question"),
        "answer": as_text(_first(row, "Final answer", "final_answer", "answer", "Answer")),
        **({"difficulty": str(level)} if level is not None else {}),
    }


def _browsecomp_zh(row: Row) -> Row:
    """BrowseComp-ZH (289): encrypted with the row's canary, so that no crawler reads it as plain text."""
    row = {key.strip().lower(): value for key, value in row.items() if isinstance(key, str)}
    canary = row.get("canary")
    question, answer, topic = (_first(row, *names) for names in (("question",), ("answer",), ("topic",)))
    if isinstance(canary, str) and canary.strip():
        question, answer, topic = (
            decrypt(value, canary) if isinstance(value, str) and value else value for value in (question, answer, topic)
        )
    return {"question": question, "answer": answer, **({"domain": topic} if isinstance(topic, str) and topic else {})}


def _aime(row: Row) -> Row:
    """AIME of any year: an integer from 0 to 999."""
    year = _first(row, "year", "Year")
    return {
        "id": as_text(_first(row, "id", "ID", "problem_idx", "unique_id")),
        "question": _first(row, "problem", "Problem", "question"),
        "answer": as_text(_first(row, "answer", "Answer")),
        **({"year": str(year)} if year is not None else {}),
    }


_DAPO_HEAD = re.compile(r"^Solve the following math problem step by step\..*?\n\n", re.S)
_DAPO_TAIL = re.compile(r"\n\nRemember to put your answer on its own line after \"Answer:\"\.?\s*$")


def _dapo(row: Row) -> Row:
    """DAPO-Math-17k: a chat prompt around the problem, and the reference under ``reward_model``."""
    prompt, reward, extra = row.get("prompt"), row.get("reward_model"), row.get("extra_info")
    if not prompt or not isinstance(reward, Mapping):
        return {**_aime(row)}
    content = prompt[0].get("content") if isinstance(prompt, (list, tuple)) and isinstance(prompt[0], Mapping) else prompt
    if isinstance(content, str):
        content = _DAPO_TAIL.sub("", _DAPO_HEAD.sub("", content))
    return {
        "id": as_text(extra.get("index")) if isinstance(extra, Mapping) else None,
        "question": content,
        "answer": as_text(reward.get("ground_truth")),
    }


JSONL = Suite(_plain)
WEBWALKERQA = Suite(_webwalkerqa)
GAIA_TEXT_103 = Suite(_gaia)
BROWSECOMP_ZH = Suite(_browsecomp_zh)
AIME = Suite(_aime)
DAPO = Suite(_dapo, once=True)


def decrypt(text: str, canary: str) -> str:
    """Undo the XOR with the repeated SHA-256 of the canary that BrowseComp and BrowseComp-ZH are published under."""
    try:
        content = base64.b64decode(text, validate=True)
        key = hashlib.sha256(canary.encode()).digest()
        return bytes(byte ^ key[n % len(key)] for n, byte in enumerate(content)).decode("utf-8")
    except ValueError:
        what = "cannot be decrypted with its canary: is the file as published? Of readable texts leave out the canary"
        raise _RowError(what) from None


def _once(objects: Rows) -> Rows:
    """Every problem as it stands first."""
    seen: dict[tuple[str, str], tuple[int, Row]] = {}
    for number, row in objects:
        seen.setdefault((str(row.get("question")), str(row.get("answer"))), (number, row))
    return list(seen.values())


def _mapped(row: Row, fields: Mapping[str, str]) -> Row:
    """Only what ``fields`` names: our name -> theirs."""
    found = {ours: _at(row, theirs) for ours, theirs in fields.items()}
    return {ours: as_text(value) if ours in ("id", "answer") else value for ours, value in found.items()}


def _at(row: Row, name: str) -> Any:
    """The value under a name of the file; dots go into objects."""
    value: Any = row
    for key in [name] if name in row else name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise _RowError(f"no field {name!r} (fields: {', '.join(row)})")
        value = value[key]
    return value


def _first(row: Row, *names: str) -> Any:
    return next((row[name] for name in names if row.get(name) is not None), None)


def as_text(value: Any) -> Any:
    """Numbers as text: a reference is compared as text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return str(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else value


def _json(text: str, where: str) -> Mapping[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        raise _RowError(f"{where!r} is not JSON") from None
    return value if isinstance(value, Mapping) else {}


# -- files


def read_rows(path: Path) -> tuple[Rows, list[Mistake]]:
    """Rows, and what is wrong with the others.

    Raises:
        DataError: the file is missing, of an unknown kind, empty or cannot be read.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file", "docs/benchmarks.md says where each suite comes from")
    reader = _READERS.get(path.suffix.lower())
    if reader is None:
        objects, broken = read_objects(path)
        return list(objects), broken
    try:
        rows = list(reader(path))
    except DataError:
        raise
    except UnicodeDecodeError as error:
        with path.open("rb") as handle:
            refuse_packed(path, handle.read(16))
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1})", "save it as UTF-8") from None
    except Exception as error:  # whatever a library says of a broken file
        raise DataError(f"{path}: cannot be read: {type(error).__name__}: {error}", "download it again") from None
    if not rows:
        raise DataError(f"{path}: no row", "download it again")
    told = [(n, row, _row_mistake(row)) for n, row in rows]
    return [(n, row) for n, row, wrong in told if wrong is None], [(n, wrong) for n, _, wrong in told if wrong is not None]


BLANK = 1024
"""Bytes from which on a file of text is not looked into to see whether a row is in it."""
_QUESTIONS = frozenset({"question", "problem"})
"""Columns that a header is known by, beside the one that `fields` names."""


def without_rows(path: Path, question: str = "question") -> bool:
    """Whether a file holds no row and no mistake: nothing, a header alone, an empty list or table.

    Args:
        question: the column of the questions; a line that names none may be a task without a header.

    Raises:
        OSError: it cannot be read.
    """
    stat = path.stat()
    return _without_rows(path, stat.st_size, stat.st_mtime_ns, _QUESTIONS | {question.lower()})


@lru_cache(maxsize=4096)
def _without_rows(path: Path, size: int, modified: int, questions: frozenset[str]) -> bool:
    ending = path.suffix.lower()
    if size >= BLANK and ending not in (".parquet", ".xlsx"):
        return False
    if size < BLANK and not path.read_bytes().removeprefix(codecs.BOM_UTF8).strip():
        return True
    try:
        match ending:
            case ".parquet":
                return _rows_of_parquet(path) == 0
            case ".xlsx":
                sheets = _sheets(path)
                lines = sheets[0].iter_rows(values_only=True)
                header = [str(name) for name in next(lines, ())]
                more = len(sheets) > 1 or any(True for _ in lines)
            case ".json":
                content = json.loads(path.read_text(encoding="utf-8-sig"))
                return content == [] or (isinstance(content, Mapping) and list(content.values()) == [[]])
            case ".csv" | ".tsv":
                text = path.read_text(encoding="utf-8-sig").strip()
                header, more = re.split(r"[,\t]", text), "\n" in text
            case _:
                return False
    except Exception:  # what is wrong with it is told where it is read
        return False
    return not more and not questions.isdisjoint(name.strip('" ').lower() for name in header)


def _row_mistake(row: Any) -> str | None:
    if not isinstance(row, Mapping):
        return "not an object"
    more = row.get(None)  # where csv.DictReader puts them
    return f"more cells than columns ({len(more)}): in CSV a text with a comma stands between quotes" if more else None


def _read_json(path: Path) -> Iterable[tuple[int, Any]]:
    repeated: list[str] = []

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        repeated.extend(_repeated(name for name, _ in found))
        return dict(found)

    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        if error.msg == "Extra data":
            raise DataError(f"{path}: holds more than one JSON value", "if it is one a line, name it .jsonl") from None
        raise
    _refuse_repeated(path, "key", repeated)
    if isinstance(content, Mapping):  # {"data": [...]} and the like
        lists = [value for value in content.values() if isinstance(value, list) and all(isinstance(v, Mapping) for v in value)]
        content = lists[0] if len(lists) == 1 else [content]
    if not isinstance(content, list):
        raise DataError(f"{path}: holds {kind_of(content)}, not a list of tasks", "write one task an object: [{...}, {...}]")
    return enumerate(content, 1)


def _read_parquet(path: Path) -> Iterable[tuple[int, Any]]:
    import polars as pl

    return enumerate(pl.read_parquet(path, glob=False).to_dicts(), 1)


def _rows_of_parquet(path: Path) -> int:
    import polars as pl

    return int(pl.scan_parquet(path, glob=False).select(pl.len()).collect().item())


def _read_csv(path: Path, **dialect: Any) -> Iterable[tuple[int, Any]]:
    csv.field_size_limit(2**31 - 1)  # a question may hold all that it is about; else a cell ends at 128 KiB
    with path.open(encoding="utf-8-sig", newline="") as handle:
        _refuse_open_quote(path, csv.reader(chain(handle, (_END,)), **dialect))
        handle.seek(0)
        rows = csv.DictReader(handle, **dialect)
        names = rows.fieldnames or ()
        if not dialect and len(names) == 1 and re.search(r"[;\t|]", names[0]):
            raise DataError(f"{path}: its columns are not separated by commas", "save it with commas, or as .tsv or .xlsx")
        _refuse_repeated(path, "column", _repeated(names))
        return [(rows.line_num, row) for row in rows]  # the line that a row ends on


_END = "\x1f the end"
"""A line behind the last one."""


def _refuse_open_quote(path: Path, rows: Any) -> None:
    """A quotation mark that is never closed makes one cell of all that follows: rows would be lost without a word."""
    begins = line = 1
    for row in rows:
        if row == [_END]:
            return
        begins, line = line, rows.line_num + 1
    what = f"the row that begins on line {begins} opens a quotation mark that is never closed"
    raise DataError(f"{path}: {what}", "in CSV a text with a quotation mark stands between quotes, and its own are doubled")


def _read_tsv(path: Path) -> Iterable[tuple[int, Any]]:
    """TSV knows no quotes, but some programs write them as in CSV: then all of the file reads so."""
    try:
        return _read_csv(path, delimiter="\t", strict=True)
    except csv.Error:
        return _read_csv(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _sheets(path: Path) -> Any:
    try:
        from openpyxl import load_workbook
    except ImportError:
        raise DataError(
            f"{path}: openpyxl is not installed", "pip install 'evolve-dag[web]', or save the file as CSV"
        ) from None
    sheets = load_workbook(path, read_only=True, data_only=True).worksheets
    for sheet in sheets:
        sheet.reset_dimensions()  # some programs write a smaller size than the sheet has, and what is beyond would be left out
    return sheets


def _read_xlsx(path: Path) -> Iterable[tuple[int, Any]]:
    lines = _sheets(path)[0].iter_rows(values_only=True)
    names = ["" if name is None else str(name) for name in next(lines, ())]
    _refuse_repeated(path, "column", _repeated(names))
    for number, line in enumerate(lines, 2):  # as the sheet numbers them
        if any(cell is not None for cell in line):
            yield number, {name: cell for name, cell in zip(names, line, strict=False) if name}


def _repeated(names: Iterable[str]) -> list[str]:
    """The names that stand more than once; a column without one is none."""
    return [name for name, count in Counter(names).items() if count > 1 and name.strip()]


def _refuse_repeated(path: Path, what: str, names: Sequence[str]) -> None:
    if names:
        told = ", ".join(map(repr, dict.fromkeys(names)))
        raise DataError(f"{path}: {what} {told} stands twice", "give each its own name: of two only the last would be read")


_READERS: Mapping[str, Callable[[Path], Iterable[tuple[int, Any]]]] = {
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
    ".tsv": _read_tsv,
    ".xlsx": _read_xlsx,
}
