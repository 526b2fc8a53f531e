"""Content-addressed artifacts on local disk: nothing half-written is ever visible (DESIGN: the store).

Layout under the root::

    objects/<kind>/<digest>/           finished artifacts: files, and manifest.json written last
    work/<kind>/<digest>/files/        what a builder is writing; becomes the folder above by one rename
    work/<kind>/<digest>/journals/     JSON lines that outlive a killed builder, so that it resumes
    refs/<experiment>/<iteration>/     <kind>.json: which artifact an iteration of an experiment uses
    mirror/                            what waits to be sent to object storage (:mod:`evolve_dag.store.mirror`)
    locks/                             locks that vanish with their process

The digest of an artifact is the hash of its kind, the version of the code, the slice of config that its
step reads and the digests of what it read. So a killed step that resumes ends in the same digest, and two
experiments share what they have in common.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve_dag.errors import ConcurrencyError, ConfigError, EvolveError, StoreError
from evolve_dag.store.disk import fsync_folder, pretty, write_atomic
from evolve_dag.store.faults import disk_error, is_disk_error
from evolve_dag.store.journal import Journal
from evolve_dag.store.layout import MANIFEST
from evolve_dag.store.locks import discard, locked

if TYPE_CHECKING:
    import polars as pl


log = logging.getLogger(__name__)

WAIT_SECONDS = math.inf
"""How long a builder waits for another process that makes the same artifact."""

KIND = re.compile(r"[a-z][a-z0-9_]{0,63}")
DIGEST = re.compile(r"[0-9a-f]{32}")
EXPERIMENT = re.compile(r"[a-z0-9][a-z0-9_.-]{0,99}")
"""A file names it with 64 characters at most; ``-s<N>`` of another seed and ``-imported`` come behind that."""
_JOURNAL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True, slots=True)
class FileFact:
    """What the manifest knows about one file of an artifact."""

    bytes: int
    sha256: str
    """64 hex digits."""


@dataclass(frozen=True, slots=True)
class Manifest:
    """The record that makes a folder an artifact; holds no path beyond what ``config`` holds."""

    kind: str
    digest: str
    code_version: str
    """Version of the code of the step that made it."""
    config: Mapping[str, Any]
    """The slice of config that the step read, as plain JSON values."""
    inputs: Mapping[str, str]
    """Name -> digest of everything that was read (artifacts, and digests of models, corpora, prompts)."""
    files: Mapping[str, FileFact]
    """Name (``/`` between folders) -> size and hash of every file but the manifest."""
    summary: Mapping[str, Any]
    """A few facts for people and tables, as JSON; decides nothing."""
    created: str
    """When it was finished, ISO 8601, UTC."""
    seconds: float
    """Wall time of the process that finished it; work of a killed predecessor is not in it."""
    resumed: bool = False
    """True when a killed predecessor left work in a journal that was used."""


@dataclass(frozen=True, slots=True)
class Ref:
    """Which artifact one iteration of an experiment uses for a kind."""

    experiment: str
    iteration: int
    """k, 1-based."""
    kind: str
    digest: str
    created: str
    """When the ref came to point there, ISO 8601, UTC."""
    facts: Mapping[str, Any] = field(default_factory=dict)
    """Whatever the writer wants to remember, as JSON."""

    @property
    def content(self) -> bytes:
        """What its file holds; experiment and iteration are in the file's place."""
        return pretty({"kind": self.kind, "digest": self.digest, "created": self.created, "facts": dict(self.facts)})


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished artifact. Every file is checked against its hash when it is first asked for."""

    kind: str
    digest: str
    path: Path
    manifest: Manifest
    _verified: set[str] = field(default_factory=set, repr=False, compare=False)

    @property
    def summary(self) -> Mapping[str, Any]:
        """Short for ``manifest.summary``."""
        return self.manifest.summary

    @property
    def inputs(self) -> Mapping[str, str]:
        """Short for ``manifest.inputs``."""
        return self.manifest.inputs

    def file(self, name: str) -> Path:
        """Path of one file, its bytes verified.

        Raises:
            StoreError: the artifact has no such file, or the file is missing or not what was written.
        """
        fact = self.manifest.files.get(name)
        if fact is None:
            known = ", ".join(self.manifest.files) or "none"
            raise StoreError(
                f"{self.path}: the {self.kind} artifact holds no file {name!r} (it holds: {known})", _recompute(self.path)
            )
        path = self.path / name
        if name not in self._verified:
            self._check_size(name)
            try:
                with path.open("rb") as stream:
                    found = hashlib.file_digest(stream, "sha256").hexdigest()
            except OSError as error:
                raise StoreError(f"{path}: cannot be read: {error.strerror}", _recompute(self.path)) from error
            if found != fact.sha256:
                raise StoreError(
                    f"{path}: corrupt: sha256 {found[:12]}... where {fact.sha256[:12]}... was written", _recompute(self.path)
                )
            self._verified.add(name)
        return path

    def json(self, name: str) -> Any:
        """Content of a JSON file.

        Raises:
            StoreError: missing, corrupt or not JSON.
        """
        path = self.file(name)
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise StoreError(f"{path}: not readable as JSON: {error}", _recompute(self.path)) from error

    def frame(self, name: str) -> pl.DataFrame:
        """Content of a Parquet file.

        Raises:
            StoreError: missing, corrupt or not Parquet.
        """
        import polars as pl

        path = self.file(name)
        try:
            return pl.read_parquet(path, glob=False)
        except (OSError, pl.exceptions.PolarsError) as error:
            raise StoreError(f"{path}: not readable as Parquet: {error}", _recompute(self.path)) from error

    def verify(self, *, content: bool = True) -> None:
        """Check that every file is there with its size and, with ``content``, its hash.

        Raises:
            StoreError: names the first file that is not what was written.
        """
        for name in self.manifest.files:
            if content:
                self.file(name)
            else:
                self._check_size(name)

    def _check_size(self, name: str) -> None:
        path, expected = self.path / name, self.manifest.files[name].bytes
        try:
            found = path.stat().st_size
        except OSError:
            raise StoreError(f"{path}: missing from {self.kind} {self.digest[:12]}", _recompute(self.path)) from None
        if found != expected:
            raise StoreError(f"{path}: corrupt: {found} bytes where {expected} were written", _recompute(self.path))


class Build:
    """An artifact in the making: write files under ``path``, keep progress in a journal, fill ``summary``."""

    def __init__(self, folder: Path, artifact: Artifact | None) -> None:
        self.path: Path = folder / "files"
        """Folder to write into; empty at the start, becomes the artifact."""
        self.summary: dict[str, Any] = {}
        """A few facts for people and tables (JSON values; a number that is not finite becomes null)."""
        self.artifact: Artifact | None = artifact
        """Already set at the start when another process has finished the artifact meanwhile (what is written then is
        thrown away, so the body may be left at once); set after a clean exit in any case."""
        self.resumed = False
        """True once a journal or checkpoint was opened that a killed predecessor had written to."""
        self._journals = folder / "journals"
        self.ledger_path = self._journals / "calls.jsonl"
        """Where calls to paid models are written down; outlives a killed builder, as journals do."""

    def journal(self, name: str = "journal") -> Journal:
        """The journal of that name, with what a killed predecessor wrote."""
        if not _JOURNAL.fullmatch(name):
            raise StoreError(f"journal name {name!r}: letters, digits, '.', '_' and '-' only", "choose another name")
        journal = Journal(self._journals / f"{name}.jsonl")
        self.resumed = self.resumed or (journal.path.exists() and journal.path.stat().st_size > 0)
        return journal

    def checkpoint(self, name: str) -> Path:
        """Where a folder of that name may be made that outlives a killed builder, as journals do."""
        folder = self._journals / name
        self.resumed = self.resumed or folder.exists()
        return folder

    def note(self, **facts: Any) -> None:
        """Add facts to the summary."""
        self.summary.update(facts)


class Store:
    """Artifacts, refs and locks under one folder. Reading creates nothing.

    It knows this folder alone. :func:`evolve_dag.store.mirror.open_store` gives one that object storage stands behind, where
    ``EVOLVE_MIRROR`` names some.

    Args:
        root: the folder.
    """

    def __init__(self, root: Path | str) -> None:
        self.root = Path(root)
        if self.root.exists() and not self.root.is_dir():
            raise StoreError(f"{self.root}: is a file, not a folder", "name another folder with --store")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self.root)!r})"

    # -- artifacts

    @staticmethod
    def digest_of(kind: str, code_version: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
        """32 hex digits that stand for what a step would make.

        The order of keys does not matter; ``1`` and ``1.0`` differ.

        Raises:
            ConfigError: ``config`` holds something that is not JSON (NaN, a path, a key that is not text).
        """
        what = {
            "kind": kind,
            "code_version": code_version,
            "config": _plain(config, "config"),
            "inputs": _plain(inputs, "inputs"),
        }
        canonical = json.dumps(what, sort_keys=True, separators=(",", ":"), allow_nan=False)
        return hashlib.sha256(canonical.encode("ascii")).hexdigest()[:32]

    def folder(self, kind: str, digest: str) -> Path:
        """Where the artifact lies, or would lie.

        Raises:
            StoreError: that is no kind, or no digest.
        """
        _check_name(KIND, kind, "artifact kind")
        _check_name(DIGEST, digest, "digest (32 hex digits)")
        return self.root / "objects" / kind / digest

    def listing(self) -> list[tuple[str, str]]:
        """Kind and digest of every artifact folder, sorted; nothing is read."""
        found = [(path.parent.name, path.name) for path in (self.root / "objects").glob("*/*") if path.is_dir()]
        return sorted(pair for pair in found if KIND.fullmatch(pair[0]) and DIGEST.fullmatch(pair[1]))

    def exists(self, kind: str, digest: str) -> bool:
        """Whether there is such an artifact (corrupt or not: :meth:`open` tells)."""
        return self.folder(kind, digest).is_dir()

    def open(self, kind: str, digest: str, *, verify: bool = False) -> Artifact:
        """The artifact; sizes of its files are checked, with ``verify`` their hashes too.

        Raises:
            StoreError: missing or corrupt; names the file and the remedy.
        """
        folder = self.folder(kind, digest)
        if not folder.is_dir():
            raise StoreError(f"{folder}: no such {kind} artifact", f"materialize {kind} for this iteration first")
        artifact = self.read(kind, digest)
        artifact.verify(content=verify)
        return artifact

    def read(self, kind: str, digest: str) -> Artifact:
        """The artifact by its manifest alone; its files are not looked at.

        Raises:
            StoreError: the manifest is missing or corrupt.
        """
        folder = self.folder(kind, digest)
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            files = {name: FileFact(int(fact["bytes"]), str(fact["sha256"])) for name, fact in content.pop("files").items()}
            manifest = Manifest(files=files, **content)
            told = self.digest_of(manifest.kind, manifest.code_version, manifest.config, manifest.inputs)
        except FileNotFoundError:
            raise StoreError(f"{path}: missing", _recompute(folder)) from None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise StoreError(f"{path}: corrupt: {error}", _recompute(folder)) from error
        if (kind, digest) != (manifest.kind, manifest.digest) or digest != told:
            raise StoreError(f"{path}: corrupt: it describes another artifact", _recompute(folder))
        return Artifact(kind, digest, folder, manifest)

    def manifest(self, kind: str, digest: str) -> bytes | None:
        """The manifest as it lies there, whatever it says; None where there is none. Nothing else is looked at."""
        try:
            return (self.folder(kind, digest) / MANIFEST).read_bytes()
        except OSError:
            return None

    def artifacts(self, kind: str | None = None) -> Iterator[Artifact]:
        """All artifacts (of a kind), by kind and digest; manifests are checked, files are not.

        Raises:
            StoreError: a manifest is missing or corrupt.
        """
        for found_kind, digest in self.listing():
            if kind is None or kind == found_kind:
                try:
                    yield self.read(found_kind, digest)
                except StoreError:
                    if self.folder(found_kind, digest).is_dir():
                        raise  # else it was removed while we were listing

    def find(self, prefix: str) -> list[Artifact]:
        """Artifacts of any kind whose digest starts with ``prefix``."""
        return [self.read(kind, digest) for kind, digest in self.listing() if digest.startswith(prefix.lower())]

    @contextlib.contextmanager
    def build(
        self,
        kind: str,
        digest: str,
        *,
        code_version: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        wait_seconds: float = WAIT_SECONDS,
    ) -> Iterator[Build]:
        """Make one artifact: a clean exit publishes it whole, anything else leaves only journals to resume from.

        A second builder of the same digest waits up to ``wait_seconds``; when the first one has succeeded by then,
        ``Build.artifact`` is set from the start and the first one's result stands.

        Raises:
            ConcurrencyError: another process still builds it after ``wait_seconds``.
            StoreError: the disk is full or broken (nothing is published), or the published artifact is corrupt.
            ConfigError: ``digest`` does not follow from the other arguments.
        """
        target = self.folder(kind, digest)
        told = self.digest_of(kind, code_version, config, inputs)
        if told != digest:
            raise ConfigError(
                f"{kind}: digest {digest[:12]}... does not follow from code version, config and inputs ({told[:12]}...)",
                "compute it with Store.digest_of from the same arguments: a wrong digest would make the lineage lie",
            )
        folder = self.root / "work" / kind / digest
        self._sweep()
        with locked(self.root, f"build-{kind}-{digest}", f"{kind} {digest[:12]} is being built", wait_seconds):
            started = time.monotonic()
            published = self.open(kind, digest) if target.is_dir() else None
            build = Build(folder, published)
            try:
                shutil.rmtree(build.path, ignore_errors=True)  # a dead builder's files may be torn; its journals are not
                build.path.mkdir(parents=True)
                build._journals.mkdir(exist_ok=True)
                yield build
                if published is None:
                    seconds = time.monotonic() - started
                    build.artifact = self._publish(build, target, kind, digest, code_version, config, inputs, seconds)
            except BaseException as error:
                shutil.rmtree(build.path, ignore_errors=True)  # on a full disk this room is needed
                for empty in (build._journals, folder):
                    with contextlib.suppress(OSError):
                        empty.rmdir()
                if is_disk_error(error) and not isinstance(error, EvolveError):
                    raise disk_error(error, build.path) from error
                raise
            shutil.rmtree(folder, ignore_errors=True)

    # -- refs

    def set_ref(self, experiment: str, iteration: int, kind: str, digest: str, **facts: Any) -> Ref:
        """Point an iteration of an experiment at an artifact; writing what is there already changes nothing.

        Raises:
            StoreError: the artifact does not exist, or the ref cannot be written.
        """
        path = self._ref_path(experiment, iteration, kind)
        if not self.exists(kind, digest):
            raise StoreError(
                f"{experiment}|{iteration:02d}: {kind} {digest[:12]} is not in {self.root}", "build the artifact before its ref"
            )
        plain = _plain(facts, "facts", finite=False)
        present = None
        with contextlib.suppress(StoreError):  # a broken ref is mended by writing it anew
            present = self._read_ref(experiment, iteration, kind)
        if present is not None and present.digest == digest and present.facts == plain:
            return present
        ref = Ref(experiment, iteration, kind, digest, _after(present), plain)
        try:
            self.write_ref(ref)
        except OSError as error:
            raise disk_error(error, path) from error
        return ref

    def write_ref(self, ref: Ref) -> None:
        """Write a ref as it is, whether its artifact is here or not.

        Raises:
            OSError: it cannot be written.
        """
        path = self._ref_path(ref.experiment, ref.iteration, ref.kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, ref.content)

    def ref(self, experiment: str, iteration: int, kind: str) -> Ref | None:
        """The ref, or None when that iteration has none for this kind.

        Raises:
            StoreError: the ref file is corrupt.
        """
        return self._read_ref(experiment, iteration, kind)

    def _read_ref(self, experiment: str, iteration: int, kind: str) -> Ref | None:
        path = self._ref_path(experiment, iteration, kind)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["kind"] != kind or not DIGEST.fullmatch(content["digest"]):
                raise ValueError("kind or digest is wrong")
            return Ref(experiment, iteration, kind, content["digest"], content["created"], content["facts"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise StoreError(f"{path}: not a ref: {error}", f"delete {path} and run again: it will be written anew") from error

    def refs(self, experiment: str | None = None) -> list[Ref]:
        """All refs (of an experiment), by experiment, iteration and kind.

        Raises:
            StoreError: a ref file is corrupt.
        """
        found: list[Ref] = []
        for path in sorted((self.root / "refs").glob("*/*/*.json")):
            name, iteration = path.parts[-3], path.parts[-2]
            if path.name.startswith("."):  # what a system lays beside a file that it copies
                continue
            if iteration.isdecimal() and (experiment is None or name == experiment):
                if not (EXPERIMENT.fullmatch(name) and KIND.fullmatch(path.stem)):
                    raise StoreError(f"{path}: not the place of a ref", "move what is yours out of refs/: it is looked through")
                ref = self._read_ref(name, int(iteration), path.stem)
                if ref is not None:
                    found.append(ref)
        return sorted(found, key=lambda ref: (ref.experiment, ref.iteration, ref.kind))

    # -- locks

    @contextlib.contextmanager
    def lock(self, experiment: str) -> Iterator[None]:
        """Hold an experiment for this process; the lock goes when the process ends, however it ends.

        Raises:
            ConcurrencyError: another run holds it; names its process id. Does not wait.
        """
        _check_name(EXPERIMENT, experiment, "experiment")
        with locked(self.root, f"experiment-{experiment}", f"experiment {experiment!r} is being run", 0.0):
            self._sweep()  # here too: a run that finds everything builds nothing
            yield

    # -- inside

    def _ref_path(self, experiment: str, iteration: int, kind: str) -> Path:
        _check_name(EXPERIMENT, experiment, "experiment")
        _check_name(KIND, kind, "artifact kind")
        if iteration < 1:
            raise StoreError(f"{experiment}: iteration {iteration} does not exist", "iterations count from 1")
        return self.root / "refs" / experiment / f"{iteration:02d}" / f"{kind}.json"

    def _publish(
        self,
        build: Build,
        target: Path,
        kind: str,
        digest: str,
        code_version: str,
        config: Mapping[str, Any],
        inputs: Mapping[str, str],
        seconds: float,
    ) -> Artifact:
        files: dict[str, dict[str, Any]] = {}
        for path in sorted(build.path.rglob("*")):
            if path.is_file():
                with path.open("rb") as stream:
                    sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
                    os.fsync(stream.fileno())
                files[path.relative_to(build.path).as_posix()] = {"bytes": path.stat().st_size, "sha256": sha256}
            elif path.is_dir():
                fsync_folder(path)
        content = {
            "kind": kind,
            "digest": digest,
            "code_version": code_version,
            "config": _plain(config, "config"),
            "inputs": _plain(inputs, "inputs"),
            "files": files,
            "summary": _plain(build.summary, "summary", finite=False),
            "created": _now(),
            "seconds": round(seconds, 3),
            "resumed": build.resumed,
        }
        write_atomic(build.path / MANIFEST, pretty(content))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            build.path.rename(target)
        except OSError:
            if not target.is_dir():
                raise
            return self.open(kind, digest)  # a file system without locks let a second builder in: the first one stands
        fsync_folder(target.parent)
        return self.read(kind, digest)

    def _sweep(self) -> None:
        """Remove what is left of published artifacts: their locks, and a work folder when a kill came before it went."""
        for path in (self.root / "work").glob("*/*"):
            kind, digest = path.parent.name, path.name
            if (self.root / "objects" / kind / digest).is_dir():
                with contextlib.suppress(ConcurrencyError), locked(self.root, f"build-{kind}-{digest}", "", 0.0):
                    shutil.rmtree(path, ignore_errors=True)
        for path in (self.root / "locks").glob("build-*.lock"):
            _, kind, digest = path.stem.split("-")
            if (self.root / "objects" / kind / digest).is_dir():
                discard(self.root, path.stem)


def joined_config(artifacts: Iterable[Artifact]) -> dict[str, Any]:
    """What artifacts were made with, in one; of a section that several read different keys of, all these keys."""
    joined: dict[str, Any] = {}
    for artifact in artifacts:
        for key, value in artifact.manifest.config.items():
            both = isinstance(value, dict) and isinstance(joined.get(key), dict)
            joined[key] = joined[key] | value if both else value
    return joined


def _recompute(folder: Path) -> str:
    return f"delete folder {folder} and run again: it will be recomputed"


def _check_name(pattern: re.Pattern[str], name: str, what: str) -> None:
    if not pattern.fullmatch(name):
        raise StoreError(f"{name!r} is not a valid {what}", f"it must match {pattern.pattern}")


def _plain(value: Any, where: str, *, finite: bool = True) -> Any:
    """``value`` as JSON values. With ``finite`` a NaN is refused, else it becomes None ("not measured" is null)."""
    if value is None or isinstance(value, (str, bool, int)):
        return value
    if isinstance(value, float):
        if math.isfinite(value):
            return value
        if finite:
            raise ConfigError(f"{where}: {value} is not a JSON number", "use a finite number, or null")
        return None
    if isinstance(value, Mapping):
        for key in value:
            if not isinstance(key, str):
                raise ConfigError(f"{where}: key {key!r} is not text", "use text keys")
        return {key: _plain(inner, f"{where}.{key}", finite=finite) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner, f"{where}[{n}]", finite=finite) for n, inner in enumerate(value)]
    if callable(getattr(value, "tolist", None)):  # NumPy and torch
        return _plain(value.tolist(), where, finite=finite)
    raise ConfigError(f"{where}: a {type(value).__name__} is not a JSON value", "use text, numbers, lists and mappings")


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _after(present: Ref | None) -> str:
    """The time of a ref that takes the place of ``present``: now, but later than that one, which a machine may have set whose
    clock is ahead. On object storage the later of two stands."""
    now = _now()
    with contextlib.suppress(ValueError, TypeError):  # what stands there may be no time
        if present is not None and present.created >= now:
            return (datetime.fromisoformat(present.created) + timedelta(seconds=1)).isoformat(timespec="seconds")
    return now
