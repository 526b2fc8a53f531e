"""Pool files of others, ids kept: the paper's released code (arXiv:2606.04703) and youtu-agent (Training-Free GRPO,
arXiv:2510.08191), on which its extraction is built.

``experiences.json`` is ``{id: text}`` as extraction writes it, a list of objects as step-wise evaluation wants it, a list of
texts, ``batch_update.json`` around one of these; or it is our ``pool.json``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from evolve_dag.errors import DataError
from evolve_dag.experience.locality import trajectory_detail
from evolve_dag.experience.phrases import MAX_WORDS
from evolve_dag.experience.pool import ITEM_ID, Pool, counted
from evolve_dag.jsonlines import kind_of, read_objects, refuse, refuse_all
from evolve_dag.plain import whole
from evolve_dag.records import ExperienceItem, Granularity, PoolEdit
from evolve_dag.store.disk import read_bytes
from evolve_dag.store.jsonvalues import is_finite
from evolve_dag.store.layout import EDITS, ITEMS, POOL

if TYPE_CHECKING:
    from evolve_dag.store.artifacts import Store

VERSION = "2"
"""Raise it when the same file would become another pool."""
SHOWN = 5
"""Places that one note names."""

_REMEDY = 'a pool reads {"<id>": "<text>", ...}, ["<text>", ...] or [{"id": "...", "text": "..."}, ...]'
_WRAPPERS = ("experiences", "new_experiences", "experience", "items", "pool", "data")
_TEXTS = ("text", "content", "experience", "full_text", "principle")
_GRANULARITIES = get_args(Granularity)
_MARKUP = re.compile(r"<(?:/?[a-zA-Z][^<>]*+|!--(?:(?!-->|<!--(?!>)).)*+--)>")
_PAGE = re.compile(r"\s*<(?:!doctype|html|head|body|\?xml)\b", re.IGNORECASE)
LISTED = re.compile(r"^\[([^\]\s]+)\]\.? ", re.M)
"""An item in a prompt of the released code: ``[G0]. Prioritize ...``."""


@dataclass(frozen=True, slots=True)
class ImportedPool:
    """A pool file, read."""

    pool: Pool
    renamed: Mapping[str, str]
    """Our id -> the file's, for those that cannot be ours."""
    notes: tuple[str, ...]
    """What a reader should know of the items, with their places."""


def pool_from_file(path: str | Path) -> Pool:
    """The pool of a file in any of the formats above; see :func:`read_pool`."""
    return read_pool(path).pool


def read_pool(path: str | Path, *, granularity: Granularity | None = None) -> ImportedPool:
    """A pool file.

    Texts are taken as they are, but for half characters (:func:`~evolve_dag.plain.whole`). An item is what ``granularity``
    says, else what the file says (``granularity`` of the item, or beside the items for all of them); where neither says
    anything, an item with trajectory detail is instance-level and any other is a principle, however it is phrased. An id that
    cannot be ours, or no id, gets the next number.

    Raises:
        DataError: the file is missing, empty, a web page or not JSON; or lists every broken item with its place.
    """
    path = Path(path)
    content: Any
    if path.suffix.lower() in (".jsonl", ".ndjson"):
        objects, broken = read_objects(path)
        if broken:
            refuse(path, broken, _REMEDY)
        content = [value for _, value in objects]
    else:
        text = read_text(path)
        content = read_json(path, text)
        if isinstance(content, dict) and {"version", "next_number"} & content.keys():
            ours = Pool.from_json(whole(json.dumps(content, ensure_ascii=False)), str(path))
            items = tuple(replace(i, granularity=granularity or i.granularity) for i in ours.items)
            return ImportedPool(replace(ours, items=items), {}, ())
    entries = _entries(content)
    if not entries:
        what = "no item" if content in ({}, []) else f"{kind_of(content)} that holds no experience"
        raise DataError(f"{path}: {what}", _REMEDY)
    if granularity is not None:
        entries = [replace(entry, stated=granularity) for entry in entries]
    return _pool(path, entries)


@dataclass(frozen=True, slots=True)
class _Entry:
    """One item of a foreign pool."""

    place: str
    id: str | None
    value: Any
    stated: Any = None
    """The granularity that the file says."""


def _entries(content: Any, stated: Any = None) -> list[_Entry]:
    if isinstance(content, dict):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), (dict, list))), None)
        if inner is not None:
            return _entries(inner, content.get("granularity", stated))
        if content.get("granularity") in _GRANULARITIES:  # else it is an item that bears this id
            stated = content["granularity"]
            content = {key: value for key, value in content.items() if key != "granularity"}
        return [_Entry(f"item {key!r}", whole(key), value, _said(value, stated)) for key, value in content.items()]
    if not isinstance(content, list):
        return []
    found = []
    for number, value in enumerate(content, 1):
        own = value.get("id") if isinstance(value, dict) else None
        own = whole(str(own)) if isinstance(own, (str, int)) and not isinstance(own, bool) else None
        found.append(_Entry(f"item {number}{f' ({own})' if own else ''}", own, value, _said(value, stated)))
    return found


def _said(value: Any, of_file: Any) -> Any:
    return value.get("granularity", of_file) if isinstance(value, dict) else of_file


def _pool(path: Path, entries: Sequence[_Entry]) -> ImportedPool:
    texts = [_item_text(entry) for entry in entries]
    if mistakes := _mistakes(entries, texts):
        refuse_all(path, mistakes, _REMEDY)
    kept = [entry.id if entry.id is not None and ITEM_ID.fullmatch(entry.id) else None for entry in entries]
    # Past every id like ours in the file: an id is never given twice, and a pool that was exported comes back under its own.
    number = Pool(tuple(ExperienceItem(id, "", "instance") for id in kept if id)).next_number
    items: list[ExperienceItem] = []
    renamed: dict[str, str] = {}
    noted = Notes()
    seen: dict[str, str] = {}
    for entry, id, found in zip(entries, kept, texts, strict=True):
        text = (found or "").strip()
        if id is None:
            id, number = f"p{number:04d}", number + 1
            if entry.id is not None:
                renamed[id] = entry.id
                noted.add("ids that cannot be ours", f"{entry.id!r} is {id} here")
        granularity = _granularity(entry, id, text, noted)
        if _MARKUP.search(text):
            noted.add("with markup", id)
        folded = " ".join(text.split()).casefold()
        if folded in seen:
            noted.add("with the text of another item", f"{id}, as {seen[folded]}")
        seen.setdefault(folded, id)
        extra = entry.value if isinstance(entry.value, dict) else {}
        numbers = {k: float(v) for k, v in extra.items() if k != "id" and is_finite(v)}
        items.append(ExperienceItem(id, text, granularity, evidence=numbers))
    return ImportedPool(Pool(tuple(items), version=1), renamed, noted.lines("item"))


def _mistakes(entries: Sequence[_Entry], texts: Sequence[str | None]) -> list[str]:
    found: list[str] = []
    first: dict[str, str] = {}
    for entry, text in zip(entries, texts, strict=True):
        if text is None:
            found.append(f"{entry.place}: no text (looked for {', '.join(_TEXTS)})")
        elif not text.strip():
            found.append(f"{entry.place}: empty")
        if entry.stated is not None and entry.stated not in _GRANULARITIES:
            found.append(f"{entry.place}: granularity: must be `principle` or `instance`, not {entry.stated!r}")
        if entry.id is not None and entry.id in first:
            found.append(f"{entry.place}: the same id as {first[entry.id]}")
        first.setdefault(entry.id or entry.place, entry.place)
    return found


def _granularity(entry: _Entry, id: str, text: str, noted: Notes) -> Granularity:
    """What is stated, else what the text shows; ``noted`` gets what a reader of the pool may not expect."""
    detail = trajectory_detail(text)
    found: Granularity = entry.stated or ("instance" if detail else "principle")
    if detail and found == "principle":
        noted.add("stated as principle-level, with trajectory detail", f"{id}: {'; '.join(detail)}")
    elif detail and entry.stated is None:
        noted.add("with trajectory detail, taken in as instance-level items", f"{id}: {'; '.join(detail)}")
    if found == "principle" and (words := len(text.split())) > MAX_WORDS:
        noted.add(f"longer than the {MAX_WORDS} words of a new principle", f"{id}: {words} words")
    return found


def _item_text(entry: _Entry) -> str | None:
    value = entry.value
    if isinstance(value, dict):
        value = next((value[key] for key in _TEXTS if isinstance(value.get(key), str)), None)
    if not isinstance(value, str):
        return None
    value = whole(value)
    # Step-wise evaluation wants the id in the text, too: "[G0]. Prioritize ..."
    listed = LISTED.match(value)
    return value[listed.end() :] if listed and listed[1] == entry.id else value


def pool_config(pool: Pool, source: str) -> dict[str, Any]:
    """What decides an imported pool's artifact: the file's name and the pool itself."""
    return {"imported": source, "pool": hashlib.sha256(pool.to_json().encode("utf-8", "surrogatepass")).hexdigest()}


def pool_digest(pool: Pool, source: str) -> str:
    """Digest of the artifact that :func:`artifact_of` makes; runs and writes nothing."""
    from evolve_dag.store.artifacts import Store

    return Store.digest_of("experience", f"imported/{VERSION}", pool_config(pool, source), {})


def artifact_of(pool: Pool, store: Store, source: str, *, renamed: Mapping[str, str] | None = None) -> str:
    """The pool as an ``experience`` artifact, so that a policy can enter an iteration with it.

    Args:
        source: name of the file it came from; stands in the reason of every edit. A path would tie the digest to a machine.
        renamed: our id -> the file's.

    Returns:
        The digest.
    """
    from evolve_dag.experience.locality import locality
    from evolve_dag.store.frames import edits_to_frame, items_to_frame

    names = renamed or {}
    edits = [
        PoolEdit(
            "add", i.id, i.created, None, i.text,
            f"imported from {source}" + (f" (there: {names[i.id]})" if i.id in names else ""), i.trajectory_ids,
        )
        for i in pool.items
    ]  # fmt: skip
    digest = pool_digest(pool, source)
    with store.build(
        "experience", digest, code_version=f"imported/{VERSION}", config=pool_config(pool, source), inputs={}
    ) as build:
        if build.artifact is None:
            (build.path / POOL).write_text(pool.to_json(), encoding="utf-8")
            items_to_frame(pool.items).write_parquet(build.path / ITEMS)
            edits_to_frame(edits).write_parquet(build.path / EDITS)
            build.note(imported=source, items=len(pool), **counted(edits),
                       locality=asdict(locality(pool.items)), statistics={}, renamed=dict(names))  # fmt: skip
    return digest


# -- files and what is said of them


class Notes:
    """What to tell, gathered by what it is."""

    def __init__(self) -> None:
        self._places: dict[str, list[str]] = {}

    def add(self, what: str, place: str) -> None:
        """Something at ``place``, e.g. ``line 3``."""
        self._places.setdefault(what, []).append(place)

    def lines(self, noun: str) -> tuple[str, ...]:
        """One line for each kind of thing, with its first places."""
        return tuple(
            f"{len(places)} {noun}{'s' if len(places) > 1 else ''} {what} ({_few(places)})"
            for what, places in self._places.items()
        )


def _few(places: Sequence[str]) -> str:
    more = f"; and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
    return "; ".join(places[:SHOWN]) + more


def read_text(path: Path) -> str:
    """Text of a file that somebody else wrote.

    Raises:
        DataError: missing, unreadable, not UTF-8 or empty.
    """
    try:
        content = read_bytes(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", "check the path") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", "it must be a readable file") from None
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 (byte {error.start + 1})", "save it as UTF-8") from None
    if not text.strip():
        raise DataError(f"{path}: empty file", "the run that wrote it may have been stopped: take an earlier one")
    return text


def read_json(path: Path, text: str) -> Any:
    """Content of a JSON file.

    Raises:
        DataError: a web page, not JSON (with the place), or a key that stands twice in one object.
    """
    if is_page(text):
        raise a_page(path)
    repeated: list[str] = []

    def pairs(found: list[tuple[str, Any]]) -> dict[str, Any]:
        names = Counter(name for name, _ in found)
        repeated.extend(f"key {name!r} stands {count} times in one object" for name, count in names.items() if count > 1)
        return dict(found)

    try:
        content = json.loads(text, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}: not valid JSON: line {error.lineno}, column {error.colno}: {error.msg}",
            "mend the place, or export it again",
        ) from None
    except RecursionError:
        raise DataError(f"{path}: not valid JSON: nested too deeply", _REMEDY) from None
    except ValueError:
        raise DataError(f"{path}: a number has too many digits", _REMEDY) from None
    if repeated:
        refuse_all(path, repeated, "give each its own id: of two with one id only the last would be read")
    return content


def is_page(text: str) -> bool:
    """Whether a text is HTML."""
    return _PAGE.match(text) is not None


def a_page(path: Path) -> DataError:
    """What to say of a file that is a web page."""
    return DataError(f"{path}: a web page, not JSON", "download the file itself, not the page that shows it")
