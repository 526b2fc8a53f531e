"""Where MLflow is, how it is reached, and what it has been sent already.

Nothing here imports mlflow but :func:`connect` and the making of a database; importing it costs seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import sqlite3
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import HTTPError
from urllib.parse import urlsplit, urlunsplit
from urllib.request import Request, urlopen

from evolve_dag.errors import EvolveError
from evolve_dag.secrecy import describe_error
from evolve_dag.store.disk import fsync_folder, require_address
from evolve_dag.store.faults import alembic_revision, chain, disk_error, disk_trouble, is_damaged_database
from evolve_dag.store.journal import Journal
from evolve_dag.store.locks import locked

if TYPE_CHECKING:
    from mlflow import MlflowClient

URI_VARIABLE = "MLFLOW_TRACKING_URI"
"""MLflow's own variable: which server or database to send to."""
ADDRESS_VARIABLE = "EVOLVE_MLFLOW_UI"
"""Where a person sees the store's own database in a browser, e.g. ``http://127.0.0.1:5000``; for links."""

_DEFAULTS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A server that is down is met again by the next sync; MLflow's own patience would be minutes a call.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "60",
    "MLFLOW_ASYNC_TRACE_LOGGING_RETRY_TIMEOUT": "30",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "GIT_PYTHON_REFRESH": "quiet",
}
_PATIENCE = 10.0
"""Seconds until a server that says nothing counts as down."""
_MAKING_SECONDS = 600.0
"""How long a process waits for another one that makes the database."""


class TrackingError(EvolveError, RuntimeError):
    """MLflow cannot be reached or refuses what it is sent. Nothing is lost: the store has it all."""


class RefusedError(TrackingError):
    """MLflow works, and refuses what one experiment has for it; what other experiments have it may take."""


_OF_CONTENT = (
    "INVALID_PARAMETER_VALUE",
    "INVALID_STATE",
    "MALFORMED_REQUEST",
    "RESOURCE_ALREADY_EXISTS",
    "RESOURCE_DOES_NOT_EXIST",
)
"""MLflow's codes for a request that is wrong in itself; all others may be of the server, its database or the way there."""


def own_database(root: Path) -> Path:
    """The database that is used when ``MLFLOW_TRACKING_URI`` is unset."""
    return root.resolve() / "mlflow" / "mlflow.db"


def tracking_uri(root: Path) -> str:
    """``MLFLOW_TRACKING_URI``, or sqlite in the store (MLflow 3 refuses plain folders)."""
    return os.environ.get(URI_VARIABLE) or f"sqlite:///{own_database(root)}"


def is_server(uri: str) -> bool:
    """A tracking server, which decides itself where artifacts go; else a database that this process opens."""
    return urlsplit(uri).scheme in ("http", "https", "databricks") or uri == "databricks"


def shown(uri: str) -> str:
    """The address without user and password, which may also stand in its query."""
    uri = uri.partition("?")[0]
    parts = urlsplit(uri)
    if "@" not in parts.netloc:
        return uri
    return urlunsplit(parts._replace(netloc=parts.netloc.rpartition("@")[2]))


def artifact_location(root: Path, uri: str) -> str | None:
    """Where the artifacts of a new MLflow experiment go; None: the server says."""
    if is_server(uri):
        return None
    folder = root.resolve() / "mlflow" / "artifacts"
    folder.mkdir(parents=True, exist_ok=True)
    return folder.as_uri()


@contextmanager
def mlflow_errors(uri: str) -> Iterator[None]:
    """What MLflow, its database driver or the network raise, as one :class:`TrackingError` without secrets;
    :class:`RefusedError` where it is about what was sent."""
    try:
        yield
    except EvolveError:
        raise
    except Exception as error:  # mlflow, sqlalchemy, requests and botocore share no base class
        if getattr(error, "error_code", None) in _OF_CONTENT and not any(map(is_damaged_database, chain(error))):
            raise RefusedError(f"MLflow at {shown(uri)} refuses what it was sent: {describe_error(error)}", _REFUSED) from error
        raise TrackingError(f"MLflow at {shown(uri)}: {describe_error(error)}", _remedy(uri, error)) from error


_REFUSED = "mend what it names, in the experiment file or in MLflow, then `evolve sync-mlflow` sends what is missing"


def _remedy(uri: str, error: Exception) -> str:
    behind = list(chain(error))
    path = _database_file(uri)
    if path is not None and any(map(is_damaged_database, behind)):
        return _anew(path)
    for one in behind:
        if disk_trouble(one) is not None:
            return disk_error(one).remedy
    return "nothing is lost: `evolve sync-mlflow` sends what is missing once it works again"


def _database_file(uri: str) -> Path | None:
    """The SQLite file behind an address; None: it is no such address."""
    scheme, _, path = uri.partition(":///")
    return Path(path) if scheme == "sqlite" and path else None


def _anew(path: Path) -> str:
    return f"move {path} away, then `evolve sync-mlflow --again` sends everything anew: all of it is in the artifacts"


def connect(root: Path, uri: str) -> MlflowClient:
    """A client of ``uri``; the store's own database is made when it is not there.

    Raises:
        TrackingError: mlflow is not installed, the server does not answer within seconds, or the database is of no use.
        StoreError: the database cannot be written.
    """
    _check_answers(uri)
    _set_defaults()
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise TrackingError(
            f"mlflow cannot be imported: {error}", "pip install 'mlflow>=3.4', or set tracking.mlflow: false"
        ) from None
    _quiet()
    own = uri == f"sqlite:///{own_database(root)}"
    if own:
        prepare_database(root)
    with mlflow_errors(uri):
        try:
            return MlflowClient(tracking_uri=uri, registry_uri=uri)
        except Exception as error:
            if not own or any(disk_trouble(one) for one in chain(error)) or "locked" in str(error):
                raise
            raise _of_no_use(own_database(root), describe_error(error)) from error


def _set_defaults() -> None:
    """Before mlflow is imported."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


def _quiet() -> None:
    """Neither what MLflow does at work nor tracebacks of what it raises as well; it sets its level when it is imported."""
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)


def prepare_database(root: Path) -> None:
    """Make the store's own database when it is not there, and see that it is one when it is.

    MLflow makes some sixty tables one after the other, and can neither use nor mend a database in which a kill has left fewer.
    So they are made in a file beside, which is renamed when it is whole.

    Raises:
        TrackingError: the file is not a database of MLflow.
        StoreError: it cannot be written, or MLflow would look for it elsewhere.
        ConcurrencyError: another process makes it and does not come to an end.
    """
    path = own_database(root)
    require_address(path)
    if not _is_there(path):
        with locked(root, "mlflow-database", "MLflow's database is being made", _MAKING_SECONDS):
            if not _is_there(path):
                _make_database(path)
    _check_database(path)


def _is_there(path: Path) -> bool:
    try:
        return path.stat().st_size > 0
    except (FileNotFoundError, NotADirectoryError):
        return False


def _make_database(path: Path) -> None:
    new = path.with_name(f"{path.name}.new")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Left by a maker that was killed. SQLite would roll a journal back into whatever database comes to lie beside it.
        for leftover in (*path.parent.glob(f"{new.name}*"), path.with_name(f"{path.name}-journal")):
            leftover.unlink(missing_ok=True)
        with mlflow_errors(f"sqlite:///{path}"):
            _make_tables(new)
        new.replace(path)
        fsync_folder(path.parent)
    except OSError as error:
        raise disk_error(error, path) from error


def _make_tables(path: Path) -> None:
    _set_defaults()
    from mlflow.store.db.utils import _initialize_tables, create_sqlalchemy_engine
    from sqlalchemy import event

    _quiet()
    engine = create_sqlalchemy_engine(f"sqlite:///{path}")
    # Some 250 statements, each committed: they need not reach the disk one by one, the file does before it gets its name.
    event.listen(engine, "connect", lambda connection, _: connection.execute("PRAGMA synchronous = OFF"))
    try:
        _initialize_tables(engine)
    finally:
        engine.dispose()
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _check_database(path: Path) -> None:
    """Whether SQLite can read it and MLflow has made it; MLflow itself would try for minutes."""
    try:
        made = alembic_revision(path, _PATIENCE)
    except sqlite3.DatabaseError as error:
        if "locked" in str(error):
            return  # somebody works with it
        raise _of_no_use(path, str(error)) from error
    if made is None:
        raise _of_no_use(path, "its tables were not made to the end")


def _of_no_use(path: Path, why: str) -> TrackingError:
    return TrackingError(f"{path}: not a database that MLflow can use: {why}", _anew(path))


def _check_answers(uri: str) -> None:
    """Fail in seconds where nothing answers; any HTTP answer will do, also 401 and 404."""
    if urlsplit(uri).scheme not in ("http", "https"):
        return
    address = shown(uri).rstrip("/") + "/version"
    try:
        urlopen(Request(address), timeout=_PATIENCE).close()
    except HTTPError:
        return
    except (OSError, ValueError) as error:
        if isinstance(getattr(error, "reason", None), ssl.SSLError):
            return  # MLflow has settings of its own for certificates
        raise TrackingError(
            f"MLflow at {shown(uri)} does not answer: {describe_error(error)}",
            f"start it, or mend {URI_VARIABLE}; nothing is lost: `evolve sync-mlflow` sends what is missing then",
        ) from None


class SentRecord:
    """What a tracking server has been sent, one JSON line a fact; a file per server.

    It saves questions and gives links. What makes a second sending harmless is on the server: runs are found by their tags,
    traces have ids that follow from what they show, model versions carry their adapter's digest.
    """

    def __init__(self, root: Path, uri: str) -> None:
        self.path = record_path(root, uri)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._journal = Journal(self.path)  # drops a line that a kill tore
        self._facts: dict[str, Any] = {}
        for line in self._journal.records():
            self._facts[line["key"]] = line["value"]
        if not self._facts:
            self.put("server", shown(uri))

    def get(self, *key: object) -> Any:
        """What is remembered under ``key``, or None."""
        return self._facts.get(_key(key))

    def put(self, *key_and_value: object) -> None:
        """Remember the last argument under the others; None forgets."""
        *key, value = key_and_value
        if self._facts.get(_key(key)) != value:
            self._journal.append({"key": _key(key), "value": value})
            self._facts[_key(key)] = value

    def forget(self, *prefix: object) -> None:
        """Forget everything under ``prefix``."""
        start = _key(prefix)
        for key in [k for k, value in self._facts.items() if value is not None and f"{k}/".startswith(f"{start}/")]:
            self.put(*key.split("/"), None)


def record_path(root: Path, uri: str) -> Path:
    """File of a server's record; the name does not tell the address, which may hold a password."""
    return root / "tracking" / f"{hashlib.sha256(uri.encode()).hexdigest()[:16]}.jsonl"


def read_facts(root: Path, uri: str) -> Mapping[str, Any]:
    """The record as it stands, for links; never writes, never raises for a line that is being written."""
    facts: dict[str, Any] = {}
    try:
        content = record_path(root, uri).read_bytes()
    except OSError:
        return facts
    for line in content.splitlines():
        try:
            fact = json.loads(line)
            facts[fact["key"]] = fact["value"]
        except (ValueError, KeyError, TypeError):
            continue
    return facts


def _key(parts: object) -> str:
    assert isinstance(parts, (list, tuple))
    return "/".join(str(part) for part in parts)
