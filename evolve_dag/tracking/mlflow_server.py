"""Where MLflow is, how it is reached, and what it has been sent already.

Nothing here imports mlflow but :func:`connect`; importing it costs seconds.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
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
from evolve_dag.store.journal import Journal

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


class TrackingError(EvolveError, RuntimeError):
    """MLflow cannot be reached or refuses what it is sent. Nothing is lost: the store has it all."""


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
    """The address without user and password."""
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
    """What MLflow, its database driver or the network raise, as one :class:`TrackingError` without secrets."""
    try:
        yield
    except EvolveError:
        raise
    except Exception as error:  # mlflow, sqlalchemy, requests and botocore share no base class
        raise TrackingError(
            f"MLflow at {shown(uri)}: {describe_error(error)}",
            "nothing is lost: `evolve sync-mlflow` sends what is missing once it works again",
        ) from error


def connect(root: Path, uri: str) -> MlflowClient:
    """A client of ``uri``; the store's own database is made when it is not there.

    Raises:
        TrackingError: mlflow is not installed, the server does not answer within seconds, or the database is of no use.
    """
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)
    _check_answers(uri)
    try:
        from mlflow import MlflowClient
    except ImportError as error:
        raise TrackingError(
            f"mlflow cannot be imported: {error}", "pip install 'mlflow>=3.4', or set tracking.mlflow: false"
        ) from None
    for name in ("mlflow", "alembic"):  # "Creating initial MLflow database tables..."; mlflow sets its level when imported
        logging.getLogger(name).setLevel(logging.WARNING)
    with mlflow_errors(uri):
        if uri == f"sqlite:///{own_database(root)}":
            own_database(root).parent.mkdir(parents=True, exist_ok=True)
        return MlflowClient(tracking_uri=uri, registry_uri=uri)


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
