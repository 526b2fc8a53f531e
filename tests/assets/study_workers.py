"""What workers of a study do in tests: the loop without a model, in a process of their own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from assets_helpers import FakeSteps
from evolve_dag.assets import studies

from evolve_dag.errors import DataError
from evolve_dag.steps import base
from evolve_dag.steps.body import StepContext

REAL = base._body


def fake(job: studies.Job) -> studies.Done:
    """The real thing over made-up steps; every body that runs leaves a line in ``ran``."""
    return _with(job)


def slow(job: studies.Job) -> studies.Done:
    """The same, with an adapter that takes its time."""
    return _with(job, adapter=lambda context: time.sleep(0.6))


def two_of_three(job: studies.Job) -> studies.Done:
    """An arm whose adapter cannot be made, and one that takes its process down."""
    return _with(job, adapter=_fail)


def _fail(context: StepContext) -> None:
    if ".greedy-" in context.experiment.experiment:
        raise DataError("no room for [this] arm", "make some")
    if ".lexical-" in context.experiment.experiment:
        os.kill(os.getpid(), signal.SIGKILL)


def _with(job: studies.Job, **before: Any) -> studies.Done:
    steps = FakeSteps()
    steps.real = REAL  # a worker does several jobs

    def body(name: str) -> base.Body:
        inner = steps.body(name)

        def run(context: StepContext) -> None:
            before.get(name, lambda _: None)(context)
            inner(context)
            with Path("ran").open("a") as file:  # one short write: whole, also from several processes
                file.write(f"{name} {context.build.path.parent.name}\n")

        return run

    base._body = body
    os.fsync = lambda descriptor: None  # no power cut here
    return studies.do(job)
