"""Commands of ``evolve`` without their seconds of imports: a server that has imported everything forks a process for each.

A forked process runs ``evolve_dag.cli.main`` as the command does, in a session of its own, and ends as any process ends.
Run as a script it is the server: an order a line on its standard input (JSON, see :class:`Order`), the process id and then
the wait status a line on its standard output.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import json
import os
import re
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import NoReturn

HERE = Path(__file__).resolve().parent
IMPORTS = (
    "alembic", "dagster", "duckdb", "peft", "plotly", "polars", "pyarrow.parquet", "rich.progress", "rich.table",
    "safetensors.torch", "scipy.stats", "torch", "transformers", "yaml",
    "mlflow.pyfunc", "mlflow.store.model_registry.sqlalchemy_store", "mlflow.store.tracking.sqlalchemy_store",
    "evolve_dag.cli", "evolve_dag.assets.launch", "evolve_dag.assets.location", "evolve_dag.assets.timetable",
    "evolve_dag.distillation.trainer", "evolve_dag.inference.transformers", "evolve_dag.lineage.audit",
    "evolve_dag.lineage.garbage", "evolve_dag.lineage.planning", "evolve_dag.lineage.trace", "evolve_dag.reporting.report",
    "evolve_dag.reporting.table", "evolve_dag.store.query", "evolve_dag.tracking.mlflow_command", "instruments",
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Order:
    """One command."""

    arguments: tuple[str, ...]
    """What stands behind ``evolve``."""
    folder: str
    """Working folder."""
    output: str
    """File for standard output; standard error goes beside it, with the ending ``.err``."""
    environment: Mapping[str, str] = field(default_factory=dict)
    """Laid over the server's own."""
    instruments: Mapping[str, object] = field(default_factory=dict)
    """Arguments of :func:`instruments.install`."""


@dataclass(frozen=True, slots=True)
class Said:
    """What a command said and how it ended."""

    code: int
    """Exit code; the negative number of the signal that ended it."""
    out: str
    err: str
    hung: bool = False
    """It had to be killed since it did not end in time."""

    @property
    def complaints(self) -> list[str]:
        """What no command may do, whatever the world looks like: hang, die, show a traceback, fail without a remedy."""
        found = []
        if self.hung:
            found.append("it hung")
        elif self.code < 0:
            found.append(f"it died of signal {-self.code}")
        if "Traceback (most recent call last)" in self.out + self.err:
            found.append("it showed a traceback")
        told = r"remedy:\s+\S|^Usage: |^left out: |BROKEN|: a run stops there"
        if self.code > 0 and not re.search(told, self.out + self.err, re.M):
            found.append(f"it ended with {self.code} and no remedy")
        return found


class Forks:
    """The server, seen from a test."""

    def __init__(self, scratch: Path, environment: Mapping[str, str]) -> None:
        self._scratch = scratch
        self._count = 0
        self._server = subprocess.Popen(
            [sys.executable, str(HERE / "forks.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=dict(environment),
            start_new_session=True,
            text=True,
            bufsize=1,
        )
        self._answer()

    def __enter__(self) -> Forks:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._server.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._server.stdin.close()
        self._server.kill()
        self._server.wait()

    def run(
        self,
        *arguments: str,
        folder: Path,
        environment: Mapping[str, str] | None = None,
        instruments: Mapping[str, object] | None = None,
        kill_after: float | None = None,
        patience: float = 600.0,
    ) -> Said:
        """Run a command to its end.

        Args:
            kill_after: SIGKILL after so many seconds; None: never.
            patience: seconds after which it counts as hung, and is killed.
        """
        self._count += 1
        output = self._scratch / f"said-{self._count % 100}"
        order = Order(arguments, str(folder), str(output), dict(environment or {}), dict(instruments or {}))
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(asdict(order)) + "\n")
        pid = int(self._answer())
        late = threading.Event()
        limit = patience if kill_after is None else kill_after
        timer = threading.Timer(limit, lambda: (late.set(), _kill(pid)))
        timer.start()
        status = int(self._answer())
        timer.cancel()
        timer.join()
        out, err = output.read_text(errors="replace"), output.with_suffix(".err").read_text(errors="replace")
        return Said(os.waitstatus_to_exitcode(status), out, err, hung=kill_after is None and late.is_set())

    def _answer(self) -> str:
        assert self._server.stdout is not None
        line = self._server.stdout.readline()
        if not line:
            raise RuntimeError("the server of forks has ended")
        return line


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


# -- the server


def serve() -> None:
    """Read orders until the input ends."""
    _import_everything()
    gc.collect()
    gc.freeze()  # else the first collection of every fork copies all that was imported
    print("ready", flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _become(Order(**json.loads(line)))
        print(pid, flush=True)
        print(os.waitpid(pid, 0)[1], flush=True)


def _import_everything() -> None:
    """What every command would import itself. No thread may run before a fork, so nothing is called."""
    import importlib

    for name in IMPORTS:
        importlib.import_module(name)
    threads = threading.enumerate()
    assert len(threads) == 1, threads


def _become(order: Order) -> NoReturn:
    """Turn this process into the command."""
    os.setsid()
    os.chdir(order.folder)
    os.environ.update(order.environment)
    nothing = os.open(os.devnull, os.O_RDONLY)
    out = os.open(order.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    err = os.open(f"{order.output}.err", os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    for descriptor, place in ((nothing, 0), (out, 1), (err, 2)):
        os.dup2(descriptor, place)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    import instruments

    from evolve_dag import cli

    instruments.install(**order.instruments)  # type: ignore[arg-type]
    sys.argv = ["evolve", *order.arguments]
    code = 1
    try:
        cli.main()
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
    # What the interpreter does at its end, but for taking down what the server imported: that costs seconds a fork.
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
