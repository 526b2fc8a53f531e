"""Heavy steps in a process of their own: the same digests, what goes wrong there is told here, nothing is left running.

The worker's body is a stub (:data:`STUB`), for the model is not what is tested; process, messages and store are real.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import signal
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from assets_helpers import FakeSteps, iteration, problems_of, write_config
from dagster._core.errors import DagsterExecutionInterruptedError
from evolve_dag.assets import handover, launchers, worker

from evolve_dag.config import registry
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import ConfigError, DataError, EvolveError
from evolve_dag.steps import base
from evolve_dag.store.artifacts import Store
from evolve_dag.store.faults import UnexpectedError, retold, told

STUB = """
import os, sys, time
import numpy as np, polars as pl
from pathlib import Path
from safetensors.numpy import save_file
from evolve_dag.assets import worker
from evolve_dag.errors import DataError
from evolve_dag.steps import base

def body(context):
    (Path.cwd() / "worker.pid").write_text(str(os.getpid()))
    journal = context.build.journal()
    context.progress.start("training", 3)
    for done in range(len(journal.records()), 3):
        exec(os.environ.get("STUB", ""))
        journal.append({"done": done})
        context.progress.advance()
    context.progress.finish()
    curve = pl.DataFrame({"step": [0, 1], "loss": [0.5, 0.2], "skipped": [False, False]})
    curve.write_parquet(context.build.path / "curve.parquet")
    save_file({"weight": np.zeros(2, dtype=np.float32)}, context.build.path / "adapter_model.safetensors")
    context.build.note(loss_first=0.5, loss_last=0.2)

base._body = lambda name: body
worker.main()
"""
SECRET = "Zq9vK2xWb7LmT4YpRg6N"


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Workers run :data:`STUB`; ``setenv("STUB", code)`` has them do something before each unit."""
    monkeypatch.setattr(launchers, "ENTRY", ("-c", STUB))
    return monkeypatch


@pytest.fixture
def experiment(place: Path) -> Experiment:
    config = write_config(place / "configs/tiny.yaml", runtime={"launcher": {"adapter": "subprocess"}})
    return registry.register(registry.default_store(), config)


@pytest.fixture
def due(fake: FakeSteps, experiment: Experiment, store: Store) -> None:
    """All that the adapter is made from."""
    for step in base.sources("adapter")[:-1]:
        base.run_step(step.name, experiment, 1, store)


def only_adapter(memory: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    return iteration(memory, 1, only=["adapter"], check=False)


def runs(process: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    return False


def test_a_worker_makes_the_artifact_that_this_process_would(
    due: None, stub: pytest.MonkeyPatch, fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance, store: Store
) -> None:
    before = list(fake.ran)
    result = only_adapter(memory)
    assert fake.ran == before
    [made] = [m for m in result.asset_materializations_for_node("adapter") if m.label == "adapter"]
    assert made.metadata["recomputed"].value is True
    ref = store.ref("tiny", 1, "adapter")
    assert ref is not None
    assert ref.facts["recomputed"] is True
    here = experiment.model_copy(update={"runtime": Experiment(experiment="x").runtime})
    assert base.resolve("adapter", here, 1, store).digest == ref.digest == made.tags["dagster/data_version"]
    said = [entry.user_message for entry in memory.all_logs(result.run_id)]
    assert "training: 3 of 3" in said


def test_a_real_iteration_is_the_same_with_every_heavy_step_in_a_process_of_its_own(
    place: Path, memory: dg.DagsterInstance, store: Store
) -> None:
    """Real bodies and the real policy: what a worker makes, the run alone would make, weights to the byte."""
    worlds = {"train": 13, "development": 22, "held_out": 32}
    written = write_config(
        place / "configs/tiny.yaml",
        start_pool="pool.json",
        tasks={split: {"count": 4, "world": world} for split, world in worlds.items()},
        rollout={"group_size": 2},
        regime={"rejection": False},
        distillation={"epochs": 1},
        runtime={"threads": 1, "launcher": "subprocess"},
    )
    written.with_name("pool.json").write_text('{"p1": "Narrow: when nothing is known yet, search only the short name."}')
    experiment = registry.register(registry.default_store(), written)
    assert iteration(memory, 1).success
    alone, here = Experiment.model_validate(experiment.model_dump() | {"runtime": {"threads": 1}}), Store(place / "here")
    for step in base.STEP_ORDER:
        base.run_step(step, alone, 1, here)
    made, there = ({step: one.open(step, ref_of(one, step)) for step in base.STEP_ORDER} for one in (here, store))
    assert {step: one.digest for step, one in made.items()} == {step: one.digest for step, one in there.items()}
    weights = "adapter_model.safetensors"
    assert made["adapter"].manifest.files[weights] == there["adapter"].manifest.files[weights]
    keys = ["condition", "task_id", "rollout", "reward", "tokens"]
    assert made["scores"].frame("scores.parquet")[keys].equals(there["scores"].frame("scores.parquet")[keys])


def ref_of(store: Store, step: str) -> str:
    ref = store.ref("tiny", 1, step)
    assert ref is not None
    return ref.digest


def test_what_goes_wrong_there_is_told_here_without_secrets(
    due: None, stub: pytest.MonkeyPatch, memory: dg.DagsterInstance
) -> None:
    stub.setenv("SOME_API_KEY", SECRET)
    stub.setenv("STUB", f"raise DataError('rows.jsonl: line 3: {SECRET} is no number', 'mend the line')")
    result = only_adapter(memory)
    assert problems_of(result) == "rows.jsonl: line 3: *** is no number\n  remedy: mend the line"
    told_of = "\n".join(f"{entry.user_message}{entry.dagster_event}" for entry in memory.all_logs(result.run_id))
    assert SECRET not in told_of


def test_a_killed_worker_is_told_plainly_and_the_next_goes_on_from_its_journal(
    due: None, stub: pytest.MonkeyPatch, memory: dg.DagsterInstance, store: Store
) -> None:
    stub.setenv("STUB", "done == 2 and os.kill(os.getpid(), 9)")
    problem = problems_of(only_adapter(memory))
    assert "adapter[tiny|01]: its worker ended without a word: ChildProcessError: killed by SIGKILL" in problem
    assert "it goes on from its journal" in problem
    stub.setenv("STUB", "assert done == 2")
    assert only_adapter(memory).success
    assert next(store.artifacts("adapter")).manifest.resumed


def test_an_interrupted_run_ends_its_worker(
    due: None, stub: pytest.MonkeyPatch, memory: dg.DagsterInstance, place: Path
) -> None:
    stub.setenv("STUB", "time.sleep(60)")

    def interrupt() -> None:
        while not (place / "worker.pid").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    with pytest.raises(DagsterExecutionInterruptedError):
        iteration(memory, 1, only=["adapter"])
    assert not runs(int((place / "worker.pid").read_text()))


def test_a_worker_that_does_not_end_in_time_makes_no_failure_of_an_interrupted_run(
    due: None, stub: pytest.MonkeyPatch, memory: dg.DagsterInstance, place: Path
) -> None:
    stub.setenv(
        "STUB", "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); (Path.cwd() / 'deaf').touch(); time.sleep(60)"
    )
    stub.setattr(launchers, "PATIENCE_SECONDS", 0.2)

    def interrupt() -> None:
        while not (place / "deaf").exists():
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt, daemon=True).start()
    try:
        with pytest.raises(DagsterExecutionInterruptedError):
            iteration(memory, 1, only=["adapter"])
    finally:
        os.kill(int((place / "worker.pid").read_text()), signal.SIGKILL)


def test_a_worker_whose_parent_is_gone_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(worker.signal, "pthread_kill", lambda thread, number: ended.append(number))
    monkeypatch.setattr(worker.os, "_exit", ended.append)
    monkeypatch.setattr(worker, "PATIENCE_SECONDS", 0.0)
    worker._end_with(parent=0)
    assert ended == [signal.SIGTERM, 1]


def test_a_machine_that_would_make_something_else_refuses(fake: FakeSteps, experiment: Experiment, store: Store) -> None:
    made = base.run_step("policy", experiment, 1, store).artifact
    order = {"step": "trajectories", "iteration": 1, "experiment": experiment.model_dump(mode="json")}
    order |= {"store": str(store.root), "digest": made.digest}
    with pytest.raises(ConfigError, match=f"this machine would make .*, and {made.digest[:12]} is asked for"):
        worker.make(order, base.Silent())
    assert fake.ran == ["policy[tiny|01]"]


def test_a_launcher_that_cannot_start_a_worker_says_so(due: None, place: Path, memory: dg.DagsterInstance) -> None:
    write_config(place / "configs/tiny.yaml", runtime={"launcher": {"adapter": {"kind": "subprocess", "python": "/no/python"}}})
    problem = problems_of(only_adapter(memory))
    assert "adapter[tiny|01]: launcher subprocess could not start a worker: FileNotFoundError" in problem


def test_what_a_launcher_needs_is_looked_at_before_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    ray = Experiment.model_validate({"experiment": "x", "runtime": {"launcher": "ray"}})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"runtime.launcher.trajectories: ray needs dagster_ray") as missing:
        handover.check(ray)
    assert missing.value.remedy == "pip install 'evolve-dag[ray]'"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    with pytest.raises(ConfigError, match="may make the step on another machine, and EVOLVE_MIRROR is not set"):
        handover.check(ray)
    monkeypatch.setenv("EVOLVE_MIRROR", "file:///net/share")
    handover.check(ray)


@pytest.mark.parametrize("before", [None, "http://theirs:8265"])
@pytest.mark.parametrize(("said", "asked"), [("http://ours:8265", "http://ours:8265"), ("", None)])
def test_a_cluster_that_the_file_names_goes_before_the_environments(
    before: str | None, said: str, asked: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's clients take RAY_API_SERVER_ADDRESS, then RAY_ADDRESS, and only then what they are given."""
    asked = asked or before
    seen: list[str | None] = []

    class Client:
        def __init__(self, **settings: Any) -> None: ...

        def run(self, **settings: Any) -> None:
            seen.append(os.environ.get("RAY_API_SERVER_ADDRESS"))
            raise ConnectionError("nobody there")

    parts = {"PipesRayJobClient": Client, "PipesRayJobMessageReader": object, "SubmitJobParams": dict}
    monkeypatch.setitem(sys.modules, "dagster_ray.core.pipes", types.SimpleNamespace(**parts))
    monkeypatch.setenv("RAY_ADDRESS", "http://elsewhere:8265")
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    if before is not None:
        monkeypatch.setenv("RAY_API_SERVER_ADDRESS", before)
    launch = launchers._ray(launchers.RaySettings(address=said))
    assert launch is not None
    with pytest.raises(ConnectionError):
        launch(launchers.Handover(None, {}, {}, lambda reader, **made_with: None))  # type: ignore[arg-type, return-value]
    assert (seen, os.environ.get("RAY_API_SERVER_ADDRESS")) == ([asked], before)


@pytest.mark.parametrize("error", [DataError("x: wrong", "mend x"), EvolveError("y"), ValueError("z")])
def test_an_error_comes_back_as_it_was_told(error: Exception) -> None:
    again = retold(told(error))
    assert type(again) is (type(error) if isinstance(error, EvolveError) else UnexpectedError)
    if isinstance(error, EvolveError):
        assert (again.what, again.remedy) == (error.what, error.remedy)
