"""What workers of a study do in tests: the loop without a model, in a process of their own."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from assets_helpers import FakeSteps
from evolve_dag.assets import studies
from rich.console import Console

from evolve_dag.errors import DataError
from evolve_dag.steps import base
from evolve_dag.steps.body import StepContext
from evolve_dag.study.definition import Choice, load_study

REAL = base._body


def fake(job: studies.Job) -> studies.Done:
    """The real thing over made-up steps; every body that runs leaves a line in ``ran``."""
    return _with(job)


def held(job: studies.Job) -> studies.Done:
    """The same up to as many bodies as the file ``most`` says; then it waits for its end."""
    return _with(job, **dict.fromkeys(base.STEP_ORDER, _wait))


def command(file: Path) -> None:
    """What a process does that runs a study and is going to be killed."""
    os.chdir(file.parent)
    studies.START = "forkserver"
    asked = load_study(file, Choice(("plain", "greedy"), iterations=1))
    studies.run(asked, Path(".evolve"), Console(stderr=True, quiet=True), held)


def _wait(context: StepContext) -> None:
    while Path("ran").exists() and len(Path("ran").read_text().splitlines()) >= int(Path("most").read_text()):
        time.sleep(0.05)


def two_of_three(job: studies.Job) -> studies.Done:
    """An arm whose adapter cannot be made, and one that takes its process down."""
    return _with(job, adapter=_fail)


def seeing(job: studies.Job) -> studies.Done:
    """Says which GPUs it sees."""
    with Path("seen").open("a") as file:
        file.write(f"{os.getpid()} {os.environ.get('CUDA_VISIBLE_DEVICES')}\n")
    return studies.Done({})


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
