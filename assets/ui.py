"""``evolve ui``: Dagster and MLflow on this machine, started together and ended together."""

import os
import signal
import socket
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from evolve_dag.assets import automation, launch, partitions, watchdog
from filelock import Timeout

from evolve_dag.config import registry
from evolve_dag.errors import ConcurrencyError, ConfigError, EvolveError
from evolve_dag.store.locks import taken
from evolve_dag.tracking import mlflow_server

HOST = "127.0.0.1"
QUIET = {
    "DAGSTER_DISABLE_TELEMETRY": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # seven more processes, for scoring jobs that nothing here asks for
    "DO_NOT_TRACK": "true",
    "PYTHONUNBUFFERED": "1",
}
POLL_SECONDS = 0.3
TAIL_LINES = 15
Say = Callable[[str], None]


@dataclass(slots=True)
class LocalServer:
    """One web interface."""

    name: str
    address: str
    command: Sequence[str]
    probe: str
    """Path that answers once it can be used."""
    log: Path
    end: signal.Signals
    """What asks its main process to end."""
    process: "subprocess.Popen[bytes] | None" = None
    answers: bool = field(default=False)

    def start(self, environment: Mapping[str, str]) -> None:
        """Start it in a process group of its own, so that everything it starts can be ended with it."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("ab") as out:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=dict(environment), start_new_session=True
            )

    def check(self) -> bool:
        """Whether it answers now."""
        try:
            with urllib.request.urlopen(self.address + self.probe, timeout=2):
                return True
        except urllib.error.HTTPError:
            return False
        except OSError:
            return False

    def tail(self) -> str:
        """The end of its log."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines() if self.log.exists() else []
        return "\n".join(lines[-TAIL_LINES:])


def serve(root: Path, port: int, mlflow_port: int, *, mlflow: bool = True, say: Say = print) -> None:
    """Run both interfaces until Ctrl-C or SIGTERM; no process stays behind, not even when this one is killed.

    A run that is going on is ended with them; it is started again, and resumes, when the interface is started again.

    Raises:
        ConcurrencyError: another `evolve ui` serves the store.
        ConfigError: a port is taken.
        EvolveError: an interface ended by itself; with the end of its log.
        StoreError: the store cannot be written.
    """
    with _alone(root):
        _serve(root, port, mlflow_port, mlflow=mlflow, say=say)


@contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Keep a second interface from the store, whatever its ports: of two Dagster daemons each makes every tick of a schedule.

    The lock has no holder's note: who cleans up takes a lock with one for work that is going on.
    """
    try:
        lock = taken(root, "ui")
    except Timeout:
        raise ConcurrencyError(
            f"another `evolve ui` serves the store {root}", "use that one, or end it first: of two each would run the nights"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _serve(root: Path, port: int, mlflow_port: int, *, mlflow: bool, say: Say) -> None:
    uri = mlflow_server.tracking_uri(root)
    local = mlflow and not mlflow_server.is_server(uri)
    check_port(port, "--port")
    if local:
        if port == mlflow_port:
            raise ConfigError(f"--port and --mlflow-port are both {port}", "give them different ports")
        check_port(mlflow_port, "--mlflow-port")
    stop = threading.Event()
    previous = {one: signal.signal(one, lambda *_: stop.set()) for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        environment = {**os.environ, **QUIET, registry.STORE_VARIABLE: str(root.resolve())}
        if local:
            environment[mlflow_server.ADDRESS_VARIABLE] = f"http://{HOST}:{mlflow_port}"
        services = [dagster_service(root, port)]
        environment["DAGSTER_HOME"] = str(launch.prepare_home(root))
        if local:
            services.insert(0, mlflow_service(root, uri, mlflow_port))
        if not stop.is_set():
            supervise(services, environment, stop, say, [] if local or not mlflow else [f"MLflow   {mlflow_server.shown(uri)}"])
    finally:
        for one, handler in previous.items():
            signal.signal(one, handler)


def dagster_service(root: Path, port: int) -> LocalServer:
    """``dagster dev`` on the instance and the store of the command line."""
    experiments, problems = automation.known_experiments(root)
    for problem in problems:
        print(f"left out: {problem}", file=sys.stderr)
    with launch.open_instance(root) as instance:  # so that the experiments are there before the first tick of config_watch
        partitions.add_partitions(
            instance, [e.experiment for e in experiments], max((e.iterations for e in experiments), default=0)
        )
    where = ["-w", str(launch.workspace_file(root)), "-h", HOST, "-p", str(port)]
    command = [sys.executable, "-m", "dagster", "dev", "--log-level", "warning", *where]
    # Its SIGTERM is deaf in some shells' background jobs; SIGINT is what it is made for.
    return LocalServer(
        "Dagster", f"http://{HOST}:{port}", command, "/server_info", root / "logs" / "dagster.log", signal.SIGINT
    )


def mlflow_service(root: Path, uri: str, port: int) -> LocalServer:
    """``mlflow server`` on the store's own database."""
    if uri == f"sqlite:///{mlflow_server.own_database(root)}":
        mlflow_server.prepare_database(root)
    artifacts = str(mlflow_server.artifact_location(root, uri))
    where = ["--backend-store-uri", uri, "--artifacts-destination", artifacts, "--host", HOST, "--port", str(port)]
    command = [sys.executable, "-m", "mlflow", "server", *where, "--workers", "1"]
    return LocalServer("MLflow", f"http://{HOST}:{port}", command, "/health", root / "logs" / "mlflow.log", signal.SIGTERM)


def check_port(port: int, option: str) -> None:
    """Refuse a port that something listens on.

    Raises:
        ConfigError: naming the option that changes it.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise ConfigError(
                f"port {port} on {HOST} cannot be used: {error.strerror}",
                f"end what listens there, or choose another: evolve ui {option} {port + 1 if port < 65535 else port - 1}",
            ) from None


def supervise(
    services: Sequence[LocalServer], environment: Mapping[str, str], stop: threading.Event, say: Say, also: Sequence[str] = ()
) -> None:
    """Start the services, tell their addresses once they answer, and end all of them when one ends or ``stop`` is set.

    Raises:
        EvolveError: one ended by itself.
    """
    guard = subprocess.Popen(
        [sys.executable, "-I", str(Path(watchdog.__file__))],
        stdin=subprocess.PIPE,
        start_new_session=True,
        text=True,
        bufsize=1,
    )
    assert guard.stdin is not None
    groups: dict[int, int] = {}
    try:
        say("starting; this takes half a minute")
        for service in services:
            service.start(environment)
            assert service.process is not None
            groups[service.process.pid] = service.end
            guard.stdin.write(f"+{service.process.pid} {int(service.end)}\n")
        told = False
        while not stop.wait(POLL_SECONDS):
            for service in services:
                assert service.process is not None
                code = service.process.poll()
                if code is not None:
                    raise EvolveError(
                        f"{service.name} has ended by itself (code {code}); its log ends:\n{service.tail()}",
                        f"the whole log: {service.log}",
                    )
                if not service.answers and service.check():
                    service.answers = True
                    say(f"{service.name:<8} {service.address}")
            if not told and all(service.answers for service in services):
                told = True
                for line in also:
                    say(line)
                say(f"logs in {services[0].log.parent}; Ctrl-C ends {'both' if len(services) > 1 else 'it'}")
        say("\nending")
    finally:
        watchdog.end_groups(groups)
        for service in services:
            if service.process is not None:
                service.process.poll()
        for group in groups:
            guard.stdin.write(f"-{group}\n")
        guard.stdin.close()
        guard.wait(timeout=watchdog.PATIENCE_SECONDS + 5)
