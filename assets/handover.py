"""A heavy step handed over to a process of its own, by the launcher that the experiment names for it.

The worker (:mod:`evolve_dag.assets.worker`) makes the step and publishes its artifact; this side waits, shows how far it is,
and opens what was made. What goes wrong there is raised here, as if the step had been made here.
"""

import importlib.util
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import dagster as dg
from dagster._core.pipes.context import PipesMessageHandler
from dagster_pipes import PipesMessage, PipesParams
from evolve_dag.assets.launchers import Handover, Launch, LauncherPart

from evolve_dag.config.parts import LauncherSettings, part_of
from evolve_dag.config.schema import Experiment, Launchers
from evolve_dag.errors import ConfigError, EvolveError
from evolve_dag.secrecy import describe_error
from evolve_dag.steps import base
from evolve_dag.steps.body import Progress
from evolve_dag.store import mirror
from evolve_dag.store.faults import retold

LOG_SECONDS = 30.0
"""Between two lines of a run's log that say how far a step is."""


def check(experiment: Experiment) -> None:
    """Look at what the launchers of an experiment need here, so that a run fails before it begins.

    Raises:
        ConfigError: a library is not installed, or no mirror is set.
    """
    for step in Launchers.model_fields:
        settings: LauncherSettings = getattr(experiment.runtime.launcher, step)
        row: LauncherPart[Any] = part_of("launcher", settings)
        what = f"runtime.launcher.{step}: {settings.kind}"
        for library, extra in row.libraries.items():
            if importlib.util.find_spec(library) is None:
                raise ConfigError(f"{what} needs {library}, which is not installed", f"pip install 'evolve-dag[{extra}]'")
        if row.elsewhere and mirror.configured() is None:
            raise ConfigError(
                f"{what} may make the step on another machine, and {mirror.VARIABLE} is not set",
                f"set {mirror.VARIABLE} to an address that both see, e.g. s3://bucket/prefix or file:///net/share",
            )


def maker(context: dg.AssetExecutionContext, experiment: Experiment, step: str) -> base.Make:
    """What makes a step of this experiment: this process, or a worker that its launcher starts."""
    settings: LauncherSettings | None = getattr(experiment.runtime.launcher, step, None)
    if settings is None:
        return base.make_here
    row: LauncherPart[Any] = part_of("launcher", settings)
    launch = row.make(settings)
    return base.make_here if launch is None else partial(_hand_over, context, row, launch)


def _hand_over(context: dg.AssetExecutionContext, row: LauncherPart[Any], launch: Launch, due: base.Due) -> None:
    check(due.experiment)
    heard = _Heard(due.progress, context.log)
    order = {
        "step": due.expected.name,
        "iteration": due.expected.iteration,
        "digest": due.digest,
        "experiment": due.experiment.model_dump(mode="json"),
    }
    environment = {}
    if row.elsewhere:
        environment[mirror.VARIABLE] = os.environ[mirror.VARIABLE]
    else:
        order |= {"store": str(due.store.root.resolve()), "parent": os.getpid()}
    try:
        launch(Handover(context, order, environment, heard.reader))
    except Exception as error:  # each client has errors of its own
        raise heard.failure or _wordless(error, row, due, heard.opened) from None


def _wordless(error: Exception, row: LauncherPart[Any], due: base.Due, opened: bool) -> EvolveError:
    """What to say where the worker itself said nothing."""
    here = f"{due.expected.name}[{base.partition(due.experiment, due.expected.iteration)}]"
    if opened:
        return EvolveError(f"{here}: its worker ended without a word: {describe_error(error)}", row.remedy)
    kind = getattr(due.experiment.runtime.launcher, due.expected.name).kind
    return EvolveError(
        f"{here}: launcher {kind} could not start a worker: {describe_error(error)}",
        "see that it can be reached and that evolve-dag is installed there, or set runtime.launcher: in_process",
    )


class _Heard:
    """What a worker says of itself, as it comes in."""

    def __init__(self, progress: Progress, log: dg.DagsterLogManager) -> None:
        self._progress, self._log = progress, log
        self._label, self._done, self._total, self._told = "", 0, 0, 0.0
        self.failure: EvolveError | None = None
        self.opened = False

    def reader(self, reader: type[dg.PipesMessageReader], **made_with: Any) -> dg.PipesMessageReader:
        """A Pipes reader of that class whose custom messages come here."""
        heard = self

        class Listening(reader):  # type: ignore[valid-type, misc]
            @contextmanager
            def read_messages(self, handler: PipesMessageHandler) -> Iterator[PipesParams]:
                with super().read_messages(_Between(handler, heard)) as params:
                    yield params

        made: dg.PipesMessageReader = Listening(**made_with)
        return made

    def message(self, payload: Mapping[str, Any]) -> None:
        """One custom message: ``{"progress": [what, ...]}`` or ``{"failure": {type, what, remedy}}``."""
        if "failure" in payload:
            self.failure = retold(payload["failure"])
            return
        what, *values = payload["progress"]
        getattr(self, f"_{what}")(*values)

    def _start(self, label: str, total: int) -> None:
        self._label, self._done, self._total, self._told = label, 0, total, time.monotonic()
        self._progress.start(label, total)

    def _advance(self, n: int) -> None:
        self._done += n
        self._progress.advance(n)
        if time.monotonic() - self._told >= LOG_SECONDS:
            self._say()

    def _finish(self) -> None:
        self._say()
        self._progress.finish()

    def _say(self) -> None:
        self._told = time.monotonic()
        self._log.info(f"{self._label}: {self._done} of {self._total}")


class _Between:
    """A handler of Pipes messages that lets custom ones out; all else goes on to Dagster."""

    def __init__(self, handler: PipesMessageHandler, heard: _Heard) -> None:
        self._handler, self._heard = handler, heard

    def handle_message(self, message: PipesMessage) -> None:
        self._heard.opened = True
        params = message["params"]
        if message["method"] == "report_custom_message" and params is not None:
            self._heard.message(params["payload"])
        else:
            self._handler.handle_message(message)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._handler, name)
