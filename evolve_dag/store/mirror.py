"""A second home of the store on object storage: ``EVOLVE_MIRROR=s3://bucket/prefix``, or any other address of fsspec.

Steps go on working on the local store, which is fast, atomic and locked. The mirror is what several machines share::

    files/<2 hex digits>/<sha256>                 content of files, named by its hash: the same bytes lie there once
    objects/<kind>/<digest>.json                  the manifest; written last, so nothing half-written is ever visible
    refs/<experiment>/<iteration>/<kind>.json     as in the local store
    leases/<experiment>/<number>.json             which machine runs it (lease.py)

*Out.* An artifact is sent when it is published, a ref when it is set, and never before the artifact it points to. What
could not be sent waits in ``<store>/mirror/outbox`` for the next publication or for ``evolve mirror push``; a step never
fails or recomputes for it. Two machines that make the same artifact send the same digest: the first manifest stands, and
since files are named by their content, neither can spoil the other's.

*In.* An artifact that is not here and is asked for is fetched into a folder of its own, every hash is checked, then it
appears by one rename. Whether the mirror has one is asked once (yes is remembered for the process, no for half a minute).
Refs are looked through when refs are read, at most once a minute and process (one listing, then only what has changed);
of two refs the one set later wins, by the clocks of the machines that set them; one that takes the place of another is later.

*Cost.* On S3 one request for an artifact that is not here and was asked about; for a published one three, and four a file;
two for a ref. A mirror that cannot be reached costs one attempt with its timeouts, then it is left alone for five minutes.

Credentials come from where the protocol's own tools find them (``AWS_ACCESS_KEY_ID``..., a profile, a role;
``AWS_ENDPOINT_URL`` for another server than Amazon's), never from the address. One machine at a time may run an experiment,
by a lease; where the mirror cannot be reached, a run begins without one, and says so.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from evolve_dag.errors import AwayError, ConfigError, EvolveError, StoreError
from evolve_dag.secrecy import describe_error
from evolve_dag.store.artifacts import DIGEST, EXPERIMENT, KIND, WAIT_SECONDS, Artifact, Build, FileFact, Ref, Store
from evolve_dag.store.disk import fsync_folder, pretty, write_atomic
from evolve_dag.store.faults import disk_error, is_disk_error
from evolve_dag.store.graph import named_by, reach
from evolve_dag.store.layout import MANIFEST
from evolve_dag.store.lease import Lease, holder_of
from evolve_dag.store.locks import locked

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem  # type: ignore[import-untyped]

log = logging.getLogger(__name__)

VARIABLE = "EVOLVE_MIRROR"
FOLDER = "mirror"
"""Folder of the local store for what waits to be sent and what is being fetched."""
THREADS = 8
"""Files that travel at once."""

_OBJECT_STORES = frozenset({"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "memory"})
"""Where a write shows whole or not at all. Elsewhere it is made under another name and moved."""
_S3_OPTIONS: dict[str, Any] = {
    # Botocore's own patience with a server that is gone would hold a step up for minutes.
    "config_kwargs": {"connect_timeout": 10, "read_timeout": 60, "retries": {"mode": "standard", "max_attempts": 2}}
}
_SHA256 = re.compile(r"[0-9a-f]{64}")

Item = TypeVar("Item")
Result = TypeVar("Result")
Say = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Moved:
    """What :meth:`Mirror.push` or :meth:`Mirror.pull` did."""

    artifacts: int = 0
    refs: int = 0
    bytes: int = 0
    """Content that travelled; what lay there already is not in it."""
    failed: tuple[str, ...] = ()
    """What could not be sent although the mirror works, and why (e.g. an artifact that is damaged here)."""


@dataclass(frozen=True, slots=True)
class Status:
    """What lies where."""

    url: str
    here: int
    """Artifacts in the local store."""
    there: int
    """Artifacts in the mirror."""
    not_there: tuple[str, ...]
    """``<kind> <digest>`` of what only the local store has."""
    not_here: int
    """Artifacts that only the mirror has."""
    refs_differ: int
    """Refs that one side lacks, or that point elsewhere."""
    waiting: int
    """Artifacts and refs in the outbox."""
    bytes_there: int
    """All content in the mirror, also what no manifest names any more."""


@dataclass(slots=True)
class _Connection:
    process: int
    files: AbstractFileSystem
    root: str
    whole: bool
    """Whether writes show whole or not at all."""
    reading: dict[str, Any]
    """Arguments for reading a small object."""


@dataclass(slots=True)
class _Known:
    """What this process has found out."""

    there: set[tuple[str, str]] = field(default_factory=set)
    absent: dict[tuple[str, str], float] = field(default_factory=dict)
    refreshed: dict[Path, float] = field(default_factory=dict)
    quiet_until: float = 0.0


def configured() -> Mirror | None:
    """The mirror of ``EVOLVE_MIRROR``, one a process; None when that is unset.

    Raises:
        ConfigError: as :class:`Mirror`.
    """
    url = os.environ.get(VARIABLE, "").strip()
    return _of(url) if url else None


@cache
def _of(url: str) -> Mirror:
    return Mirror(url)


class Mirror:
    """One address on object storage that stores are mirrored to. Every store that its methods take is the folder on this
    machine, :attr:`MirroredStore.here`.

    Args:
        url: e.g. ``s3://bucket/prefix``, ``file:///net/shared/evolve``.
        refresh_seconds: how long refs that were looked through count as current.
        absent_seconds: how long an artifact that was not there is taken to be still missing.
        retry_seconds: how long a mirror that could not be reached is left alone.

    Raises:
        ConfigError: the address is none, or holds credentials.
    """

    def __init__(
        self, url: str, *, refresh_seconds: float = 60.0, absent_seconds: float = 30.0, retry_seconds: float = 300.0
    ) -> None:
        self.url = _checked(url)
        self._refresh_seconds = refresh_seconds
        self._absent_seconds = absent_seconds
        self._retry_seconds = retry_seconds
        self._known = _Known()
        self._connection: _Connection | None = None
        self._leases: dict[str, Lease] = {}

    def __repr__(self) -> str:
        return f"Mirror({self.url!r})"

    # -- what the store asks for; only a wrong address and a needed artifact can fail

    def has(self, kind: str, digest: str) -> bool:
        """Whether the artifact is there; a mirror that cannot be reached has nothing.

        Raises:
            ConfigError: the protocol is unknown or its package is not installed.
        """
        key = (kind, digest)
        if key in self._known.there:
            return True
        if time.monotonic() < self._known.absent.get(key, 0.0):
            return False
        return self._attempt(lambda: self._manifest(kind, digest) is not None, False)

    def manifest(self, kind: str, digest: str) -> bytes | None:
        """The manifest of an artifact alone; a mirror that cannot be reached has none.

        Raises:
            ConfigError: the protocol is unknown or its package is not installed.
        """
        return self._attempt(lambda: self._manifest(kind, digest), None)

    def fetch(self, store: Store, kind: str, digest: str) -> bool:
        """Bring an artifact into the local store; False when the mirror does not have it.

        Raises:
            AwayError: the mirror cannot be read.
            StoreError: what it holds is damaged; nothing of it is visible then.
            ConfigError: the protocol is unknown or its package is not installed.
        """
        target = store.folder(kind, digest)
        try:
            content = self._manifest(kind, digest)
            if content is None:
                return False
            with locked(store.root, f"pull-{kind}-{digest}", f"{kind} {digest[:12]} is being fetched", WAIT_SECONDS):
                if not target.is_dir():
                    self._fetch(store, kind, digest, content, target)
        except EvolveError:
            raise
        except Exception as error:  # fsspec, botocore, aiohttp and the sockets below share no base class
            if is_disk_error(error):
                raise disk_error(error, store.root) from error
            raise AwayError(
                f"{kind} {digest[:12]} is not in {store.root}, and the mirror {self.url} cannot be read: "
                f"{describe_error(error)}",
                "mend the connection or the credentials and give the same command again; "
                f"without {VARIABLE} it is computed anew",
            ) from None
        return True

    def published(self, store: Store, artifact: Artifact) -> None:
        """Send an artifact and whatever waits; what fails waits on and is logged."""
        self._remember(store, "objects", artifact.kind, artifact.digest)
        self._attempt(lambda: self._deliver(store), None)

    def referenced(self, store: Store, ref: Ref) -> None:
        """Send a ref, after the artifact it points to; what fails waits on and is logged."""
        self._remember(store, "refs", ref.experiment, f"{ref.iteration:02d}", ref.kind)
        self._attempt(lambda: self._deliver(store), None)

    def refresh(self, store: Store) -> None:
        """Bring in refs that other machines have set; at most once in ``refresh_seconds``."""
        now = time.monotonic()
        last = self._known.refreshed.get(store.root)
        if last is None or now - last >= self._refresh_seconds:
            self._known.refreshed[store.root] = now
            self._attempt(lambda: self._pull_refs(store), 0)

    # -- who runs what

    @contextlib.contextmanager
    def leased(self, store: Store, experiment: str) -> Iterator[None]:
        """Hold an experiment against other machines; without, where the mirror cannot be reached.

        Raises:
            ConcurrencyError: another machine holds it.
        """
        lease = Lease(_Objects(self), experiment, holder_of(store.root), self.url)
        other = self._attempt(lease.acquire, None)
        if other is not None:
            raise lease.refusal(other)
        self._leases[experiment] = lease
        try:
            yield
        finally:
            del self._leases[experiment]
            self._attempt(lease.release, None)

    def check_lease(self, experiment: str) -> None:
        """Raises ConcurrencyError where this process held the experiment and another machine has taken over."""
        if (lease := self._leases.get(experiment)) is not None:
            lease.check()

    # -- what people ask for

    def push(self, store: Store, say: Say = lambda _: None) -> Moved:
        """Send everything that the mirror lacks, whatever was sent before.

        Raises:
            StoreError: the mirror cannot be reached or refuses; what was sent until then stays.
        """
        with self._plain_errors("be written"):
            self._check_bucket()
            there = self._manifests()
            self._known.there |= there.keys()
            lacking = sorted((self._read_here(store, key) for key in _here(store) - there.keys()), key=lambda a: a[0])
            for _, kind, digest in lacking:
                self._remember(store, "objects", kind, digest)
            for ref in store.refs():
                self._remember(store, "refs", ref.experiment, f"{ref.iteration:02d}", ref.kind)
            return self._deliver(store, say)

    def pull(self, store: Store, experiment: str | None = None, say: Say = lambda _: None) -> Moved:
        """Bring in refs, and every artifact behind those (of an experiment), over any number of steps.

        Raises:
            StoreError: the mirror cannot be reached, or holds something damaged; what came until then stays.
            ConfigError: nobody knows the experiment.
        """
        with self._plain_errors("be read"):
            self._check_bucket()
            refs = self._pull_refs(store)
            there = self._manifests()
            self._known.there |= there.keys()
            kinds = {digest: kind for kind, digest in there}
            known = sorted({ref.experiment for ref in store.refs()})
            if experiment is not None and experiment not in known:
                raise ConfigError(
                    f"no experiment {experiment!r} in {self.url} or {store.root}",
                    f"name one of these: {', '.join(known) or 'none'}",
                )
            sizes: list[int] = []

            def behind(digest: str) -> set[str]:
                """Brings an artifact in, and gives the digests that it names."""
                if digest not in kinds:
                    return set()
                kind = kinds[digest]
                if not store.exists(kind, digest) and self.fetch(store, kind, digest):
                    say(f"{kind} {digest[:12]}")
                    sizes.append(sum(fact.bytes for fact in store.read(kind, digest).manifest.files.values()))
                with contextlib.suppress(StoreError):  # one that was damaged here before holds up nothing
                    return named_by(store.folder(kind, digest))
                return set()

            wanted = [ref.digest for ref in store.refs() if experiment is None or ref.experiment == experiment]
            reach(wanted, behind)
            return Moved(len(sizes), refs, sum(sizes))

    def status(self, store: Store) -> Status:
        """What lies where; changes nothing.

        Raises:
            StoreError: the mirror cannot be reached.
        """
        with self._plain_errors("be read"):
            self._check_bucket()
            here, there = _here(store), self._manifests().keys()
            mine = {(r.experiment, r.iteration, r.kind): r.digest for r in store.refs()}
            listing = self._list("refs")
            contents = _parallel(self._read, listing)
            found = [_ref(path, content) for path, content in zip(listing, contents, strict=True) if content is not None]
            theirs = {(r.experiment, r.iteration, r.kind): r.digest for r in found if r is not None}
            return Status(
                self.url,
                len(here),
                len(there),
                tuple(f"{kind} {digest}" for kind, digest in sorted(here - there)),
                len(there - here),
                sum(mine.get(key) != theirs.get(key) for key in mine.keys() | theirs.keys()),
                len(_waiting(store)),
                sum(int(info["size"]) for info in self._list("files").values()),
            )

    # -- sending

    def _remember(self, store: Store, *parts: str) -> None:
        path = store.root.joinpath(FOLDER, "outbox", *parts)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:  # the artifact itself is published: `evolve mirror push` compares both sides
            log.warning("%s: cannot be noted for the mirror: %s", path, error.strerror)

    def _deliver(self, store: Store, say: Say = lambda _: None) -> Moved:
        """Send what waits, artifacts first and oldest first; an artifact that is damaged here stays behind."""
        artifacts = refs = size = 0
        failed: list[str] = []
        for marker in _waiting(store):
            parts = marker.relative_to(store.root / FOLDER / "outbox").parts
            try:
                if parts[0] == "objects":
                    if store.folder(parts[1], parts[2]).is_dir():
                        sent = self._send_artifact(store, parts[1], parts[2])
                        if sent is not None:
                            artifacts, size = artifacts + 1, size + sent
                            say(f"{parts[1]} {parts[2][:12]}")
                else:
                    place = (parts[1], int(parts[2]), parts[3])
                    ref = store.ref(*place)
                    if ref is not None and self._send_ref(store, ref):
                        refs += 1
                    marker.unlink(missing_ok=True)
                    if store.ref(*place) != ref:  # set anew while this one was on its way
                        marker.touch()
                    continue
            except ConfigError:
                raise
            except EvolveError as error:
                failed.append(error.what)
                log.warning("not sent to the mirror: %s", error.what)
            else:
                with contextlib.suppress(OSError):
                    marker.unlink()
        return Moved(artifacts, refs, size, tuple(failed))

    def _send_artifact(self, store: Store, kind: str, digest: str) -> int | None:
        """Bytes that were sent; None when it was there."""
        if (kind, digest) in self._known.there or self._manifest(kind, digest) is not None:
            return None
        artifact = store.read(kind, digest)
        artifact.verify()  # a damaged file must not travel
        files = {fact.sha256: (artifact.path / name, fact) for name, fact in artifact.manifest.files.items()}
        sent = sum(_parallel(lambda one: self._send_file(*one), files.values()))
        if self._manifest(kind, digest) is None:  # else another machine was faster, and the first one stands
            self._write(f"objects/{kind}/{digest}.json", (artifact.path / MANIFEST).read_bytes())
        self._known.there.add((kind, digest))
        return sent

    def _send_file(self, source: Path, fact: FileFact) -> int:
        name = _file_name(fact.sha256)
        if self._size(name) == fact.bytes:
            return 0
        self._write(name, source)
        if (arrived := self._size(name)) != fact.bytes:
            raise OSError(f"{name}: {arrived} bytes arrived of {fact.bytes}")
        return fact.bytes

    def _send_ref(self, store: Store, ref: Ref) -> bool:
        name = f"refs/{ref.experiment}/{ref.iteration:02d}/{ref.kind}.json"
        content = self._read(name)
        there = _ref(name, content) if content is not None else None
        if there is not None and _age(there) >= _age(ref):
            return False
        if store.folder(ref.kind, ref.digest).is_dir():
            self._send_artifact(store, ref.kind, ref.digest)
        elif self._manifest(ref.kind, ref.digest) is None:
            raise StoreError(f"{ref.experiment}|{ref.iteration:02d}: {ref.kind} {ref.digest[:12]} is neither here nor there")
        self._write(name, ref.content)
        return True

    # -- fetching

    def _fetch(self, store: Store, kind: str, digest: str, content: bytes, target: Path) -> None:
        staging = Store(store.root / FOLDER / "incoming")
        folder = staging.folder(kind, digest)
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
            (folder / MANIFEST).write_bytes(content)
            try:
                files = staging.read(kind, digest).manifest.files
                for name, fact in files.items():
                    path = PurePosixPath(name)
                    if path.is_absolute() or ".." in path.parts or name == MANIFEST or not _SHA256.fullmatch(fact.sha256):
                        raise StoreError(f"{name!r} is not a file of an artifact")
            except StoreError as error:
                raise self._damaged(kind, digest, f"objects/{kind}/{digest}.json", error.what) from None
            _parallel(lambda one: self._fetch_file(kind, digest, folder / one[0], one[1]), files.items())
            for inner in sorted(folder.rglob("*"), reverse=True):
                if inner.is_dir():
                    fsync_folder(inner)
            target.parent.mkdir(parents=True, exist_ok=True)
            fsync_folder(folder)
            try:
                folder.rename(target)
            except OSError:
                if not target.is_dir():  # else it was built here meanwhile, and that one stands
                    raise
            fsync_folder(target.parent)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _fetch_file(self, kind: str, digest: str, path: Path, fact: FileFact) -> None:
        name = _file_name(fact.sha256)
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = self._connect()
        try:
            connection.files.get_file(f"{connection.root}/{name}", str(path))
        except FileNotFoundError:
            raise self._damaged(kind, digest, name, "it is missing") from None
        with path.open("rb") as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
            os.fsync(stream.fileno())
        if found != fact.sha256:
            raise self._damaged(kind, digest, name, f"its content hashes to {found[:12]}...")

    def _damaged(self, kind: str, digest: str, name: str, what: str) -> StoreError:
        both = " and ".join(dict.fromkeys((f"objects/{kind}/{digest}.json", name)))
        return StoreError(
            f"{self.url}/{name}: damaged in the mirror, so {kind} {digest[:12]} cannot be fetched: {what}",
            f"delete {both} there and run `evolve mirror push` where it was made; without {VARIABLE} it is computed anew",
        )

    def _pull_refs(self, store: Store) -> int:
        """Bring in refs that are new or newer; returns how many."""
        state = store.root / FOLDER / f"refs-{hashlib.sha256(self.url.encode()).hexdigest()[:12]}.json"
        try:
            seen = dict(json.loads(state.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            seen = {}
        listing = {name: _mark(info) for name, info in self._list("refs").items()}
        wanted = [name for name, mark in listing.items() if seen.get(name) != mark or not (store.root / name).exists()]
        changed = 0
        for name, content in zip(wanted, _parallel(self._read, wanted), strict=True):
            ref = _ref(name, content) if content is not None else None
            if ref is None:
                log.warning("%s/%s: not a ref; left out", self.url, name)
                del listing[name]
                continue
            here = None
            with contextlib.suppress(StoreError):  # a broken ref is mended by the one that comes
                here = store.ref(ref.experiment, ref.iteration, ref.kind)
            if here is None or _age(ref) > _age(here):
                store.write_ref(ref)
                changed += 1
        if listing != seen:
            state.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(state, pretty(listing), durable=False)
        return changed

    # -- one object

    def _connect(self) -> _Connection:
        """The file system, opened once a process: a forked one must not use its parent's."""
        connection = self._connection
        if connection is not None and connection.process == os.getpid():
            return connection
        scheme = urlsplit(self.url).scheme
        try:
            import fsspec

            options = _S3_OPTIONS if scheme in ("s3", "s3a") else {}
            files, root = fsspec.core.url_to_fs(self.url, use_listings_cache=False, skip_instance_cache=True, **options)
        except ImportError as error:
            raise ConfigError(
                f"{VARIABLE}={self.url}: {error}", "pip install 'evolve-dag[s3]', or the package of that protocol"
            ) from None
        except ValueError as error:
            raise ConfigError(f"{VARIABLE}={self.url}: {describe_error(error)}", "use e.g. s3://bucket/prefix") from None
        if hasattr(files, "retries"):  # s3fs repeats what botocore has repeated: a silent server would be asked for an hour
            files.retries = 2
        protocols = {files.protocol} if isinstance(files.protocol, str) else set(files.protocol)
        # Else s3fs asks for the size first, and in vain once more for a folder of that name: three requests for one.
        reading = {"max_concurrency": 1} if "s3" in protocols else {}
        self._connection = _Connection(os.getpid(), files, root.rstrip("/"), bool(protocols & _OBJECT_STORES), reading)
        return self._connection

    def _check_bucket(self) -> None:
        if urlsplit(self.url).scheme in ("s3", "s3a"):
            bucket = urlsplit(self.url).netloc
            try:
                self._connect().files.info(bucket)
            except FileNotFoundError:
                raise StoreError(
                    f"{self.url}: there is no bucket {bucket!r}", f"make it, or mend {VARIABLE} and AWS_ENDPOINT_URL"
                ) from None

    def _manifest(self, kind: str, digest: str) -> bytes | None:
        content = self._read(f"objects/{kind}/{digest}.json")
        key = (kind, digest)
        if content is None:
            self._known.absent[key] = time.monotonic() + self._absent_seconds
        else:
            self._known.there.add(key)
        return content

    def _read(self, name: str) -> bytes | None:
        connection = self._connect()
        try:
            return bytes(connection.files.cat_file(f"{connection.root}/{name}", **connection.reading))
        except FileNotFoundError:
            return None

    def _size(self, name: str) -> int | None:
        connection = self._connect()
        try:
            return int(connection.files.info(f"{connection.root}/{name}")["size"])
        except FileNotFoundError:
            return None

    def _write(self, name: str, content: bytes | Path) -> None:
        connection = self._connect()
        target = written = f"{connection.root}/{name}"
        if not connection.whole:
            connection.files.makedirs(target.rpartition("/")[0], exist_ok=True)
            written = f"{target}.{uuid.uuid4().hex[:8]}.part"
        if isinstance(content, bytes):
            connection.files.pipe_file(written, content)
        else:
            connection.files.put_file(str(content), written)
        if written != target:
            connection.files.mv(written, target)

    def _list(self, folder: str) -> dict[str, dict[str, Any]]:
        """Name below the address -> what the file system says about it; half-written ones are left out."""
        connection = self._connect()
        try:
            found = connection.files.find(f"{connection.root}/{folder}", detail=True)
        except FileNotFoundError:
            return {}
        start = len(connection.root) + 1
        return {path[start:]: info for path, info in sorted(found.items()) if not path.endswith(".part")}

    def _manifests(self) -> dict[tuple[str, str], dict[str, Any]]:
        found = {}
        for name, info in self._list("objects").items():
            _, kind, digest = [*PurePosixPath(name).with_suffix("").parts, "", ""][:3]
            if KIND.fullmatch(kind) and DIGEST.fullmatch(digest):
                found[kind, digest] = info
        return found

    @staticmethod
    def _read_here(store: Store, key: tuple[str, str]) -> tuple[str, str, str]:
        """When it was made, kind, digest; one whose manifest is damaged comes first, and is told when it is sent."""
        try:
            return (store.read(*key).manifest.created, *key)
        except StoreError:
            return ("", *key)

    def _attempt(self, action: Callable[[], Result], otherwise: Result) -> Result:
        """Do something that may fail; after a failure nothing is tried for a while."""
        if time.monotonic() < self._known.quiet_until:
            return otherwise
        try:
            return action()
        except ConfigError:
            raise
        except Exception as error:
            self._known.quiet_until = time.monotonic() + self._retry_seconds
            log.warning(
                "the mirror %s cannot be used, going on without it: %s; tried again in %.0f s, and `evolve mirror push` sends "
                "what is missing",
                self.url,
                describe_error(error),
                self._retry_seconds,
            )
            return otherwise

    @contextlib.contextmanager
    def _plain_errors(self, verb: str) -> Any:
        try:
            yield
        except EvolveError:
            raise
        except Exception as error:
            raise StoreError(
                f"the mirror {self.url} cannot {verb}: {describe_error(error)}",
                "check the network, AWS_ENDPOINT_URL and the credentials, then give the command again: it goes on",
            ) from None
        self._known.quiet_until = 0.0


@dataclass(frozen=True, slots=True)
class _Objects:
    """What a lease needs of a mirror."""

    mirror: Mirror

    def names(self, folder: str) -> Iterable[str]:
        return self.mirror._list(folder)

    def read(self, name: str) -> bytes | None:
        return self.mirror._read(name)

    def write(self, name: str, content: bytes) -> None:
        self.mirror._write(name, content)

    def create(self, name: str, content: bytes) -> bool:
        connection = self.mirror._connect()
        target = f"{connection.root}/{name}"
        try:
            if connection.whole:
                connection.files.pipe_file(target, content, mode="create")
            else:
                connection.files.makedirs(target.rpartition("/")[0], exist_ok=True)
                with connection.files.open(target, "xb") as file:
                    file.write(content)
        except FileExistsError:
            return False
        return True

    def remove(self, names: Iterable[str]) -> None:
        connection = self.mirror._connect()
        for name in names:
            with contextlib.suppress(Exception):  # it is gone, or the key may not delete: both will do
                connection.files.rm_file(f"{connection.root}/{name}")


class MirroredStore(Store):
    """A store that object storage stands behind: what was made here is sent, what is not here is fetched.

    Args:
        root: the folder on this machine.
        mirror: where else artifacts and refs lie.
    """

    def __init__(self, root: Path | str, mirror: Mirror) -> None:
        super().__init__(root)
        self.mirror = mirror
        self.here = Store(root)
        """The folder alone."""

    def exists(self, kind: str, digest: str) -> bool:
        """Whether the artifact is here or in the mirror."""
        return super().exists(kind, digest) or self.mirror.has(kind, digest)

    def open(self, kind: str, digest: str, *, verify: bool = False) -> Artifact:
        """The artifact; one that only the mirror has is fetched first.

        Raises:
            StoreError: missing, corrupt, or it cannot be fetched.
        """
        self._bring(kind, digest)
        return super().open(kind, digest, verify=verify)

    def read(self, kind: str, digest: str) -> Artifact:
        """The artifact by its manifest alone; one that only the mirror has is fetched first.

        Raises:
            StoreError: missing, corrupt, or it cannot be fetched.
        """
        self._bring(kind, digest)
        return super().read(kind, digest)

    def manifest(self, kind: str, digest: str) -> bytes | None:
        """As :meth:`Store.manifest`, here or in the mirror; nothing is fetched with it."""
        return super().manifest(kind, digest) if super().exists(kind, digest) else self.mirror.manifest(kind, digest)

    def _bring(self, kind: str, digest: str) -> None:
        if not super().exists(kind, digest):
            self.mirror.fetch(self.here, kind, digest)

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
        """As :meth:`Store.build`; what was made is sent."""
        with super().build(
            kind, digest, code_version=code_version, config=config, inputs=inputs, wait_seconds=wait_seconds
        ) as build:
            by_another = build.artifact is not None
            yield build
        if build.artifact is not None and not by_another:
            self.mirror.published(self.here, build.artifact)

    def set_ref(self, experiment: str, iteration: int, kind: str, digest: str, **facts: Any) -> Ref:
        """As :meth:`Store.set_ref`; a ref that changed is sent.

        Raises:
            ConcurrencyError: another machine has taken the experiment over.
        """
        self.mirror.check_lease(experiment)
        before = None
        with contextlib.suppress(StoreError):  # a broken ref is mended by writing it anew
            before = super().ref(experiment, iteration, kind)
        ref = super().set_ref(experiment, iteration, kind, digest, **facts)
        if ref != before:
            self.mirror.referenced(self.here, ref)
        return ref

    @contextlib.contextmanager
    def lock(self, experiment: str) -> Iterator[None]:
        """As :meth:`Store.lock`, against other machines too."""
        with super().lock(experiment), self.mirror.leased(self.here, experiment):
            yield

    def ref(self, experiment: str, iteration: int, kind: str) -> Ref | None:
        """The ref; what other machines set counts too."""
        self.mirror.refresh(self.here)
        return super().ref(experiment, iteration, kind)

    def refs(self, experiment: str | None = None) -> list[Ref]:
        """All refs (of an experiment); what other machines set counts too."""
        self.mirror.refresh(self.here)
        return super().refs(experiment)


def open_store(root: Path | str) -> Store:
    """The store under ``root``, with the mirror that ``EVOLVE_MIRROR`` names, if any.

    Raises:
        ConfigError: ``EVOLVE_MIRROR`` is not an address.
        StoreError: ``root`` is a file.
    """
    mirror = configured()
    return Store(root) if mirror is None else MirroredStore(root, mirror)


# -- inside


def _checked(url: str) -> str:
    if "@" in url.partition("://")[2].partition("/")[0] or "?" in url:
        raise ConfigError(  # the address itself is not repeated: it would show what it must not hold
            f"{VARIABLE}: the address holds a user, a password or parameters",
            "write s3://bucket/prefix and give credentials by the environment, e.g. AWS_ACCESS_KEY_ID",
        )
    scheme, separator, rest = url.partition("://")
    if not separator or not scheme.isalnum() or not rest.strip("/") or "::" in url:
        raise ConfigError(f"{VARIABLE}={url}: not an address of object storage", "use e.g. s3://bucket/prefix")
    return url.rstrip("/")


def _file_name(sha256: str) -> str:
    return f"files/{sha256[:2]}/{sha256}"


def _here(store: Store) -> set[tuple[str, str]]:
    return set(store.listing())


def _waiting(store: Store) -> list[Path]:
    """Markers of what waits to be sent: artifacts before refs, oldest first."""
    outbox = store.root / FOLDER / "outbox"
    found: list[Path] = []
    for pattern in ("objects/*/*", "refs/*/*/*"):
        ages = []
        for path in outbox.glob(pattern):
            with contextlib.suppress(OSError):  # another process has just sent it
                ages.append((path.stat().st_mtime_ns, path))
        found += [path for _, path in sorted(ages)]
    return found


def _ref(name: str, content: bytes) -> Ref | None:
    """A ref from its place and its content; None when it is not one."""
    parts = PurePosixPath(name).with_suffix("").parts
    try:
        _, experiment, iteration, kind = parts
        values = json.loads(content)
        valid = (
            EXPERIMENT.fullmatch(experiment)
            and iteration.isdecimal()
            and int(iteration) >= 1
            and KIND.fullmatch(kind)
            and values["kind"] == kind
            and DIGEST.fullmatch(values["digest"])
            and isinstance(values["created"], str)
            and isinstance(values["facts"], dict)
        )
        return Ref(experiment, int(iteration), kind, values["digest"], values["created"], values["facts"]) if valid else None
    except (ValueError, KeyError, TypeError):
        return None


def _age(ref: Ref) -> tuple[str, str]:
    """What decides which of two refs is the later one; the digest only so that all machines agree."""
    return ref.created, ref.digest


def _mark(info: dict[str, Any]) -> str:
    """Something that changes whenever a file does."""
    return "|".join(str(info.get(name, "")) for name in ("ETag", "LastModified", "mtime", "created", "size"))


def _parallel(action: Callable[[Item], Result], items: Iterable[Item]) -> Sequence[Result]:
    """Results in order; after the first failure nothing more is begun."""
    with ThreadPoolExecutor(THREADS) as pool:
        futures = [pool.submit(action, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
