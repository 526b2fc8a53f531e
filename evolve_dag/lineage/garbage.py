"""Artifacts that nothing needs any more, listed and removed (``evolve gc``).

An artifact is *kept* when one of these leads to it:

- a reference of any iteration of any experiment (``refs/``), also of iterations that wait to be run again;
- what a registered experiment asks for under its present file (:func:`evolve_dag.lineage.planning.plan`), even before a run,
  and the model of its warm-up;
- a digest that MLflow was told: 32 hex digits in any file under ``tracking/``, the record of what was sent;
- another artifact that is kept: its inputs, and every digest that its manifest, its decision or its policy names (so the
  adapter and the pool of a champion stay, however long ago they were promoted).

A work folder is kept when it was touched within the last hour or when a registered experiment would resume it; a temporary
file that a killed process has left goes after an hour.

Removal renames a folder into ``trash/`` and then deletes it there: a kill leaves either the whole artifact or a leftover
that the next ``evolve gc`` clears; nothing half-deleted is ever visible. While an experiment is being run nothing is
removed, since a run may reuse what no reference names yet.
"""

from __future__ import annotations

import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from evolve_dag.config import registry
from evolve_dag.errors import ConcurrencyError, EvolveError, ModelError, StoreError
from evolve_dag.lineage import planning
from evolve_dag.store import graph, locks
from evolve_dag.store.artifacts import DIGEST, Store
from evolve_dag.store.disk import TEMPORARY
from evolve_dag.warmup import folder

if TYPE_CHECKING:
    from rich.console import RenderableType

RECENT_SECONDS = 3600.0
"""A work folder or a temporary file touched within this time is taken for one that is being worked in."""

TRASH = "trash"
TRACKED = "tracking"
"""Folder of the store whose files name what MLflow was told."""


What = Literal["artifact", "work", "cache", "temporary", "trash"]


@dataclass(frozen=True, slots=True)
class Removable:
    """One folder or file that nothing needs."""

    what: What
    """``artifact``; ``work``: of a killed step that no experiment would resume; ``cache``: an audit of artifacts that are gone;
    ``temporary``: what a killed process was about to write; ``trash``: left over by a clean-up that was stopped."""
    kind: str
    """Artifact kind; '' for trash."""
    digest: str
    path: Path
    bytes: int
    created: str
    """When it was made or last touched, ISO 8601, UTC."""


@dataclass(frozen=True, slots=True)
class Found:
    """What :func:`find` has found."""

    removable: tuple[Removable, ...]
    kept: int
    """Artifacts that are needed."""
    kept_bytes: int
    only_tracked: int
    """Of those, how many are kept for MLflow alone."""
    only_tracked_bytes: int
    young: int
    """Artifacts that nothing needs and that are younger than was asked for."""
    busy: tuple[str, ...]
    """Experiments that are being run, and artifacts that are being built; nothing is removed while there is one."""
    notes: tuple[str, ...] = ()
    """What could not be taken into account, for the reader."""

    @property
    def bytes(self) -> int:
        """Bytes of all that is removable."""
        return sum(one.bytes for one in self.removable)


@dataclass(frozen=True, slots=True)
class Removed:
    """What :func:`remove` has done."""

    removed: tuple[Removable, ...]
    left: tuple[str, ...] = field(default=())
    """What could not be removed, and why."""

    @property
    def bytes(self) -> int:
        """Bytes that were freed."""
        return sum(one.bytes for one in self.removed)


def find(
    store: Store, *, older_than_days: float = 0.0, even_tracked: bool = False, ours: frozenset[str] = frozenset()
) -> Found:
    """What nothing needs; writes nothing.

    Args:
        older_than_days: leave what is younger.
        even_tracked: what only MLflow's record names is not needed either (a registered model loads from MLflow's own copy;
            the lineage behind it can then no longer be walked).
        ours: locks that the caller holds itself.

    Raises:
        StoreError: a reference, or the manifest of an artifact that is needed, is damaged: what it needs cannot be told.
    """
    now = time.time()
    present = {path.name: path for path in (store.root / "objects").glob("*/*") if path.is_dir()}
    notes: list[str] = []
    # By the folder alone: a plan over the mirror would fetch every artifact that this machine does not have.
    wanted, work_wanted = _expected(Store(store.root), notes)
    roots = {ref.digest for ref in store.refs()} | wanted
    work = {path.name: path for path in (store.root / "work").glob("*/*") if path.is_dir()}
    fresh = {digest for digest, path in work.items() if now - _touched(path) < RECENT_SECONDS}
    kept = _closure(present, roots | fresh)
    tracked = set() if even_tracked else _closure(present, _tracked(store, present)) - kept
    kept_all = kept | tracked
    least = older_than_days * 86400

    removable: list[Removable] = []
    young = 0
    for digest, path in sorted(present.items(), key=lambda item: (item[1].parent.name, item[0])):
        if digest in kept_all:
            continue
        one = _removable("artifact", path.parent.name, digest, path)
        if now - _since(one.created) < least:
            young += 1
        else:
            removable.append(one)
    for digest, path in sorted(work.items()):
        # A journal lets a killed step go on where it was: worth nothing once no experiment asks for its digest.
        if digest not in fresh and digest not in work_wanted and now - _touched(path) >= least:
            removable.append(_removable("work", path.parent.name, digest, path))
    for path in sorted((store.root / "cache" / "audit").glob("*.json")):
        named = [part for part in path.stem.split("-") if DIGEST.fullmatch(part)]
        if any(digest not in kept_all for digest in named) and now - _touched(path) >= least:
            removable.append(_removable("cache", "audit", path.stem, path))
    trash = [_removable("trash", "", path.name, path) for path in sorted((store.root / TRASH).glob("*"))]
    gone = {one.path for one in (*removable, *trash)}
    for path in sorted(one for one in _below(store.root) if one.name.startswith(".") and one.name.endswith(TEMPORARY)):
        if gone.isdisjoint(path.parents) and now - _touched(path) >= max(RECENT_SECONDS, least):
            removable.append(_removable("temporary", "", path.name, path))
    removable += trash
    return Found(
        tuple(removable),
        len(kept_all),
        sum(_size(present[digest]) for digest in kept_all),
        len(tracked),
        sum(_size(present[digest]) for digest in tracked),
        young,
        tuple(name for name in locks.held(store.root) if name not in ours),
        tuple(notes),
    )


def remove(store: Store, *, older_than_days: float = 0.0, even_tracked: bool = False) -> tuple[Found, Removed]:
    """Find what nothing needs and remove it, one folder after the other.

    Every experiment that the store knows is held meanwhile, so none begins to run.

    Args:
        older_than_days, even_tracked: as for :func:`find`.

    Returns:
        What was found, and what became of it.

    Raises:
        ConcurrencyError: an experiment is being run, or an artifact is being built; nothing was removed.
        StoreError: as :func:`find`.
    """
    removed: list[Removable] = []
    left: list[str] = []
    with ExitStack() as held:
        ours = set()
        for name in _experiments(store):
            held.enter_context(Store(store.root).lock(name))  # what other machines run is not in this folder
            ours.add(f"experiment-{name}")
        found = find(store, older_than_days=older_than_days, even_tracked=even_tracked, ours=frozenset(ours))
        for one in found.removable:
            if busy := [name for name in locks.held(store.root) if name not in ours]:
                if not removed:
                    raise ConcurrencyError(f"{', '.join(busy)}: at work now: nothing was removed", "wait until it has ended")
                left.append(f"{busy[0]} has begun to work: give the command again when it has ended")
                break
            try:
                _delete(store, one)
            except OSError as error:
                left.append(f"{one.path}: {error.strerror or error}")
            else:
                removed.append(one)
    trash = store.root / TRASH
    if trash.is_dir() and not any(trash.iterdir()):
        trash.rmdir()
    return found, Removed(tuple(removed), tuple(left))


def render(found: Found, removed: Removed | None) -> RenderableType:
    """The list for a rich console; ``removed`` is None when nothing was to be removed."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    lines: list[RenderableType] = []
    if found.removable:
        table = Table(box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
        for name in ("what", "kind", "digest", "made"):
            table.add_column(name)
        table.add_column("size", justify="right")
        for one in found.removable:
            table.add_row(one.what, one.kind, one.digest[:12], one.created[:16].replace("T", " "), size(one.bytes))
        lines.append(table)
    lines += [Text(line) for line in sentences(found, removed)]
    return Group(*lines)


def sentences(found: Found, removed: Removed | None) -> list[str]:
    """What was found and done, in words."""
    lines = []
    if not found.removable:
        lines.append(f"nothing to remove: every artifact is needed ({found.kept}, {size(found.kept_bytes)})")
    elif removed is None:
        lines.append(
            f"{len(found.removable)} to remove, {size(found.bytes)}; kept: {found.kept} artifacts, {size(found.kept_bytes)}. "
            "Nothing was removed: --yes does it"
        )
    else:
        lines.append(f"removed {len(removed.removed)}, freed {size(removed.bytes)}; kept: {found.kept} artifacts")
        lines += [f"left: {line}" for line in removed.left]
    if found.only_tracked:
        held = f"{found.only_tracked} artifacts ({size(found.only_tracked_bytes)})"
        lines.append(f"{held} are kept only because MLflow was told of them: --even-tracked lets them go")
    if found.young:
        lines.append(f"{found.young} artifacts that nothing needs are younger than asked for")
    if found.busy and removed is None:
        lines.append(f"being worked on now, so --yes would refuse: {', '.join(found.busy)}")
    return lines + list(found.notes)


def to_dict(found: Found, removed: Removed | None) -> dict[str, Any]:
    """JSON values: what ``evolve gc --json`` prints."""
    shown = found.removable if removed is None else removed.removed
    return {
        "removed": removed is not None,
        "bytes": found.bytes if removed is None else removed.bytes,
        "kept": {"artifacts": found.kept, "bytes": found.kept_bytes, "only_for_mlflow": found.only_tracked},
        "younger": found.young,
        "busy": list(found.busy),
        "left": [] if removed is None else list(removed.left),
        "notes": list(found.notes),
        "items": [{name: getattr(one, name) for name in ("what", "kind", "digest", "bytes", "created")} for one in shown],
    }


def size(count: int) -> str:
    """``1234567`` -> ``1.2 MB``."""
    for unit, least in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= least:
            return f"{count / least:.1f} {unit}"
    return f"{count} B"


# -- what is needed


def _expected(store: Store, notes: list[str]) -> tuple[set[str], set[str]]:
    """Digests that registered experiments ask for now: all of them, and those that are still to be made."""
    wanted: set[str] = set()
    to_make: set[str] = set()
    for entry in registry.entries(store.root):
        try:
            experiment = entry.load()
            if experiment.warmup is not None:  # first: without the model nothing behind it can be planned
                with suppress(ModelError):  # the one to start from is missing
                    wanted.add(warmed := folder.digest(experiment))
                    to_make.add(warmed)
            last = max((ref.iteration for ref in store.refs(entry.name)), default=1)
            planned = planning.plan(experiment, store, max(experiment.iterations, last))
        except EvolveError as error:
            notes.append(f"experiment {entry.name}: kept by its references alone: {error.what}")
            continue
        for step in planned.steps:
            digest, action = (step.digest or step.digest_if_same), (step.if_same or step.action)
            if digest is not None:
                wanted.add(digest)
                if action == "recompute":
                    to_make.add(digest)
    return wanted, to_make


def _closure(present: Mapping[str, Path], roots: Iterable[str]) -> set[str]:
    """The artifacts of ``roots`` and everything that they name, over any number of steps."""
    return graph.reach(present.keys() & set(roots), lambda digest: present.keys() & graph.named_by(present[digest]))


def _tracked(store: Store, present: dict[str, Path]) -> set[str]:
    """Artifacts that a file of the tracking names."""
    found: set[str] = set()
    for path in sorted(_below(store.root / TRACKED)):
        if path.is_file() and not path.is_symlink():
            try:
                found |= {digest for digest in graph.digests_in(path) if digest in present}
            except FileNotFoundError:
                continue  # a lock or a request: it comes and goes
            except OSError as error:
                raise StoreError(
                    f"{path}: cannot be read: {error.strerror}", "check its permissions: it says what MLflow needs"
                ) from None
    return found


# -- who is at work


def _experiments(store: Store) -> list[str]:
    names = {entry.name for entry in registry.entries(store.root)}
    names |= {path.name for path in (store.root / "refs").glob("*") if path.is_dir()}
    return sorted(names)


# -- removing


def _delete(store: Store, one: Removable) -> None:
    """Out of sight by one rename, then deleted."""
    path = one.path
    if one.what != "trash":
        trash = store.root / TRASH
        trash.mkdir(exist_ok=True)
        path = trash / f"{one.kind}-{one.digest[:32]}-{time.time_ns()}"
        one.path.rename(path)
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _removable(what: What, kind: str, digest: str, path: Path) -> Removable:
    created = ""
    if what == "artifact":
        created = str((planning.read_manifest(path) or {}).get("created") or "")
    try:
        _since(created)
    except ValueError:
        created = ""
    return Removable(what, kind, digest, path, _size(path), created or _iso(_touched(path)))


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    total = 0
    for one in _below(path):
        with suppress(FileNotFoundError):
            total += one.lstat().st_size
    return total


def _touched(path: Path) -> float:
    """When ``path`` or the newest file below it was written, seconds since 1970; for ever new where it is gone by now."""
    newest = -math.inf
    for one in (path, *_below(path)):
        with suppress(FileNotFoundError):
            newest = max(newest, one.lstat().st_mtime)
    return newest if newest > -math.inf else math.inf


def _below(path: Path) -> Iterator[Path]:
    """Every file below a folder. What a run beside this moves away meanwhile is passed over, where `Path.rglob` fails."""
    for place, _, names in os.walk(path):
        yield from (Path(place) / name for name in names)


def _since(created: str) -> float:
    return datetime.fromisoformat(created).timestamp()


def _iso(seconds: float) -> str:
    from datetime import UTC

    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
