"""The far end of a launcher: ``python -m evolve_dag.assets.worker`` makes one step that is due and publishes its artifact.

A launcher starts it with what is to be made in the context of a Dagster Pipes session (:mod:`evolve_dag.assets.handover`). It
knows no Dagster beyond ``dagster_pipes``, and may be killed at any moment: whoever is handed the same step next goes on from
its journals, where the store is the same.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any, NoReturn

from dagster_pipes import PipesContext, PipesEnvVarParamsLoader, open_dagster_pipes

from evolve_dag.config import registry
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import ConfigError, EvolveError, StoreError
from evolve_dag.secrecy import masker
from evolve_dag.steps import base
from evolve_dag.steps.body import RolloutWorkers
from evolve_dag.store.artifacts import Store
from evolve_dag.store.faults import told
from evolve_dag.store.mirror import MirroredStore, open_store

TELL_SECONDS = 0.5
"""Least time between two messages of progress."""
PATIENCE_SECONDS = 20.0
"""How long an interrupted worker whose parent is gone may take to end."""


def main() -> None:
    """Make what the session asks for; exits with 0 when it is published."""
    if not PipesEnvVarParamsLoader().is_dagster_pipes_process():
        sys.exit("a launcher starts this (runtime.launcher, docs/launchers.md); by hand: evolve run CONFIG")
    signal.signal(signal.SIGTERM, _interrupt)
    with open_dagster_pipes() as pipes:
        _log_to(pipes)
        code = _worked(pipes)
    sys.exit(code)


def _worked(pipes: PipesContext) -> int:
    """Makes the step. What goes wrong is told without secrets; as an exception Pipes would send it as it is."""
    try:
        make(pipes.extras, _Telling(pipes))
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            error = EvolveError("the worker was told to end", "run the same command: it goes on from its journal")
        pipes.report_custom_message({"failure": told(error)})
        if os.environ.get("EVOLVE_DEBUG"):
            print(masker()(traceback.format_exc()), file=sys.stderr)
        return 1
    return 0


def make(order: Mapping[str, Any], progress: base.Progress) -> None:
    """Make the step of an order in this machine's store, unless it is there.

    Raises:
        ConfigError: what is asked for is not what this machine would make.
        StoreError: it was made and could not be sent to the mirror.
        EvolveError: as :func:`evolve_dag.steps.base.run_step`.
    """
    if order.get("parent"):
        threading.Thread(target=_end_with, args=(order["parent"],), daemon=True).start()
    experiment = Experiment.model_validate(order["experiment"])
    store = open_store(order.get("store") or registry.default_store())
    due = base.due_step(order["step"], experiment, order["iteration"], store, progress, _workers(order))
    if due.digest != order["digest"]:
        raise ConfigError(
            f"{order['step']}: this machine would make {due.digest[:12]}, and {order['digest'][:12]} is asked for",
            "install the same version of evolve-dag here, and lay the same files (tasks, models, parts) at the same paths",
        )
    if not due.expected.exists:
        base.make_here(due)
    _see_that_it_arrived(store, order["step"], due.digest)


def _workers(order: Mapping[str, Any]) -> RolloutWorkers | None:
    if not order.get("workers"):
        return None
    from evolve_dag.steps.ray_workers import RayWorkers

    return RayWorkers(order["experiment"], **order["workers"])


def _see_that_it_arrived(store: Store, kind: str, digest: str) -> None:
    if isinstance(store, MirroredStore) and not store.mirror.has(kind, digest):
        raise StoreError(
            f"{kind} {digest[:12]} was made, and could not be sent to {store.mirror.url}",
            "mend the connection or the credentials there; then `evolve mirror push` on that machine, or run it again",
        )


def _interrupt(*_: object) -> NoReturn:
    raise KeyboardInterrupt


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone: nobody would hear of what it makes."""
    while os.getppid() == parent:
        time.sleep(1.0)
    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGTERM)  # a real one: it ends a call that blocks
    time.sleep(PATIENCE_SECONDS)
    os._exit(1)


def _log_to(pipes: PipesContext) -> None:
    """What this package logs goes to the log of the run, without secrets."""

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if not pipes.is_closed:
                pipes.log.log(record.levelno, masker()(record.getMessage()))

    logging.getLogger("evolve_dag").addHandler(Handler())


class _Telling:
    """Progress that is told to whoever waits; few messages, whatever the number of units."""

    def __init__(self, pipes: PipesContext) -> None:
        self._pipes = pipes
        self._lock = threading.Lock()
        self._untold, self._last = 0, 0.0

    def start(self, label: str, total: int) -> None:
        self._tell("start", label, total)

    def advance(self, n: int = 1) -> None:
        with self._lock:
            self._untold += n
            due = time.monotonic() - self._last >= TELL_SECONDS
        if due:
            self._catch_up()

    def finish(self) -> None:
        self._catch_up()
        self._tell("finish")

    def _catch_up(self) -> None:
        with self._lock:
            n, self._untold, self._last = self._untold, 0, time.monotonic()
        if n:
            self._tell("advance", n)

    def _tell(self, *what: object) -> None:
        self._pipes.report_custom_message({"progress": what})


if __name__ == "__main__":
    main()
