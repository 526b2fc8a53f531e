"""A real (small) iteration sent to real MLflow backends: once, again, after kills and losses, to a server that was down."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import polars as pl
import pytest
import yaml
from filelock import FileLock
from plotly.offline import get_plotlyjs
from small_lineage import SMALL, copy_of

from evolve_dag.config import registry
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import DataError, ModelError
from evolve_dag.records import Message, Step, Trajectory
from evolve_dag.steps.base import SPECS, STEP_ORDER, run_step
from evolve_dag.store.artifacts import Store
from evolve_dag.tracking import mlflow_sync, mlflow_traces
from evolve_dag.tracking.mlflow_server import ADDRESS_VARIABLE, URI_VARIABLE, TrackingError, own_database, record_path
from evolve_dag.tracking.mlflow_sync import start_background_sync, sync, tracking_link

CONFIG = SMALL | {"tracking": {"trajectories": 2}}
TABLES = (
    "experiments", "runs", "params", "metrics", "tags", "datasets", "inputs", "trace_info", "trace_tags", "spans",
    "assessments", "registered_models", "model_versions", "registered_model_aliases",
)  # fmt: skip
TRACES = 2 * 9
"""train, teacher, base at three temperatures, ceiling, without, with, greedy."""
PICTURES = mlflow_sync._Sender.pictures


@pytest.fixture(scope="module")
def made(small_lineage: Store, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store with one promoted iteration, and MLflow's own database, empty (making its tables takes seconds)."""
    from mlflow import MlflowClient

    root = copy_of(small_lineage, tmp_path_factory.mktemp("made") / "store").root
    own_database(root).parent.mkdir(parents=True)
    MlflowClient(f"sqlite:///{own_database(root)}")
    return root


@pytest.fixture
def store(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A copy, the experiment registered, nothing set in the environment."""
    for variable in (URI_VARIABLE, ADDRESS_VARIABLE, mlflow_sync.SWITCH_VARIABLE, registry.CONFIGS_VARIABLE):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(mlflow_sync._Sender, "pictures", lambda *_: None)  # a second each; one test draws them
    root = tmp_path / "store"
    shutil.copytree(made, root)
    configure(root)
    return Store(root)


def configure(root: Path, **changes: Any) -> Experiment:
    path = root.parent / "small.yaml"
    path.write_text(yaml.safe_dump(CONFIG | changes))
    return registry.register(root, path)


def client(store: Store) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(mlflow_sync.tracking_uri(store.root))


def counts(database: Path) -> dict[str, int]:
    with sqlite3.connect(database) as connection:
        return {table: connection.execute(f"select count(*) from {table}").fetchone()[0] for table in TABLES}


def runs(store: Store) -> dict[str, Any]:
    """Name of the run -> the run, of the MLflow experiment ``small``."""
    there = client(store)
    found = there.search_runs([there.get_experiment_by_name("small").experiment_id])
    return {run.info.run_name: run for run in found}


def add_iteration(store: Store, k: int, decision: str, **changes: str) -> None:
    """An iteration after the first, made of copies of its files: all that a reader of the store can see of one."""
    made: dict[str, str] = {}
    for kind in STEP_ORDER[1:]:
        policy = store.ref("small", k, "policy")
        assert policy is not None
        made["policy"] = policy.digest
        first = store.open(kind, store.ref("small", 1, kind).digest)  # type: ignore[union-attr]
        config = dict(first.manifest.config) | {"iteration": k, **changes}
        inputs = {name: made[name] for name in SPECS[kind].inputs}
        made[kind] = digest = Store.digest_of(kind, "1", config, inputs)
        with store.build(kind, digest, code_version="1", config=config, inputs=inputs) as build:
            for name in first.manifest.files:
                (build.path / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(first.path / name, build.path / name)
            build.summary.update(first.summary)
            if kind == "promotion":
                content = json.loads((build.path / "decision.json").read_text())
                entering = store.open("policy", made["policy"]).summary
                entered = {name: entering[name] for name in ("adapter", "experience")}
                leaving = {name: made[name] for name in ("adapter", "experience")} if decision == "promote" else entered
                content |= {"decision": decision, "policy": content["policy"] | leaving}
                if decision == "restore":
                    content["standing"] |= {"champion": 1, "best": 1}
                (build.path / "decision.json").write_text(json.dumps(content))
                build.note(decision=decision)
        store.set_ref("small", k, kind, digest, dagster_run_id=f"dagster-{k}")
    config = {"policy": {"iteration": k + 1, **leaving}}
    digest = Store.digest_of("policy", "1", config, {})
    with store.build("policy", digest, code_version="1", config=config, inputs={}) as build:
        build.note(**leaving, base=entering["base"])
    store.set_ref("small", k + 1, "policy", digest)


def test_an_iteration_is_sent_whole_and_only_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mlflow_sync._Sender, "pictures", PICTURES)
    sent = sync(store)
    assert (sent.runs, sent.traces, sent.versions, sent.failed, sent.skipped) == (2, TRACES, 1, [], [])
    found = runs(store)
    parent, nested = found["small"], found["iteration 01"]
    assert nested.data.tags["mlflow.parentRunId"] == parent.info.run_id
    for kind in STEP_ORDER:
        assert nested.data.tags[f"evolve.digest.{kind}"] == store.ref("small", 1, kind).digest  # type: ignore[union-attr]
    assert nested.data.tags["evolve.partition"] == "small|01"
    assert nested.data.tags["evolve.decision"] == "promote"
    assert "evolve run small.yaml --iterations 1" in parent.data.tags["mlflow.note.content"]
    assert parent.data.params["distillation.learning_rate"] == "0.0007"
    assert parent.data.params["tasks.train.world"] == "13"
    assert parent.data.tags["config.iterations"] == "3"
    assert {run.info.status for run in found.values()} == {"FINISHED"}

    there = client(store)
    adapter = store.open("adapter", store.ref("small", 1, "adapter").digest)  # type: ignore[union-attr]
    curve = adapter.frame("curve.parquet")
    history = there.get_metric_history(nested.info.run_id, "train/loss")
    assert [(m.step, m.value) for m in history] == list(zip(curve["step"], curve["loss"], strict=True))
    summary = store.open("scores", store.ref("small", 1, "scores").digest).json("summary.json")  # type: ignore[union-attr]
    steps = {m.step: m.value for m in there.get_metric_history(parent.info.run_id, "success/without")}
    assert steps == {0: summary["base"]["success"], 1: summary["without"]["success"]}
    low, high = summary["without"]["intervals"]["success"]
    assert parent.data.metrics["success/without_low"] == low
    assert parent.data.metrics["success/without_high"] == high

    digests = {i.dataset.digest for i in nested.inputs.dataset_inputs}
    assert {store.ref("small", 1, kind).digest for kind in ("trajectories", "contexts", "scores")} <= digests  # type: ignore[union-attr]
    assert {i.dataset.name for i in parent.inputs.dataset_inputs} == {
        f"small tasks, {use}" for use in ("training", "development", "held-out")
    }
    files = {f.path for f in there.list_artifacts(parent.info.run_id)} | {
        f.path for f in there.list_artifacts(parent.info.run_id, "figures")
    }
    assert {"report.html", "figures/success.png", "figures/training.png"} <= files

    before = counts(own_database(store.root))
    assert str(sync(store)) == "nothing to send"
    sync(store, again=True)
    assert counts(own_database(store.root)) == before
    record_path(store.root, mlflow_sync.tracking_uri(store.root)).unlink()  # as on another machine
    assert sync(store).runs == 0
    assert counts(own_database(store.root)) == before


def test_traces_show_what_the_episode_did(store: Store) -> None:
    sync(store)
    there = client(store)
    nested = runs(store)["iteration 01"]
    traces = there.search_traces(locations=[nested.info.experiment_id], run_id=nested.info.run_id, max_results=100)
    contexts = store.open("contexts", store.ref("small", 1, "contexts").digest)  # type: ignore[union-attr]
    steps = contexts.frame("steps.parquet")
    rewards = dict(contexts.frame("trajectories.parquet").select("id", "reward").iter_rows())
    taught = [t for t in traces if t.info.tags["evolve.condition"] == "teacher"]
    assert len(taught) == 2
    assert {t.info.tags["evolve.digest"] for t in taught} == {contexts.digest}
    for trace in taught:
        name = trace.info.tags["evolve.trajectory"]
        rows = steps.filter(pl.col("trajectory_id") == name).sort("index").to_dicts()
        root, *spans = trace.data.spans
        assert root.span_type == "AGENT"
        assert root.attributes["evolve.reward"] == rewards[name]
        assert [a.feedback.value for a in trace.info.assessments] == [rewards[name]]
        calls = [s for s in spans if s.span_type == "LLM"]
        assert [s.outputs["choices"][0]["message"]["content"] for s in calls] == [row["text"] for row in rows]
        tools = [s for s in spans if s.span_type == "TOOL"]
        assert [(s.name, s.outputs["observation"]) for s in tools] == [
            (row["tool"], row["observation"]) for row in rows if row["tool"] and row["problem"] is None
        ]
        for call, row in zip(calls, rows, strict=True):
            assert call.attributes.get("evolve.selected", []) == row["selected"]
            assert call.inputs["messages"][-1]["content"].endswith(row["injected"])
            assert call.attributes["mlflow.chat.tokenUsage"]["output_tokens"] == len(row["token_ids"])
        chosen = [s.attributes["evolve.selected"] for s in spans if s.span_type == "RETRIEVER" and s.outputs]
        assert chosen == [row["selected"] for row in rows if row["selected"]]
        times = [(s.start_time_ns, s.end_time_ns) for s in spans]
        assert all(root.start_time_ns <= a < b <= root.end_time_ns for a, b in times)
        assert times == sorted(times)
        assert {s.parent_id for s in spans} == {root.span_id}


def test_the_champion_moves_with_a_promotion_stays_on_keep_and_comes_back_on_restore(store: Store) -> None:
    sync(store)
    there = client(store)
    alias = lambda: int(there.get_model_version_by_alias("small", "champion").version)  # noqa: E731
    assert alias() == 1
    add_iteration(store, 2, "keep")
    assert sync(store).versions == 1
    assert alias() == 1
    add_iteration(store, 3, "promote")
    sent = sync(store)
    assert (sent.runs, sent.versions) == (1, 1)
    assert alias() == 3
    versions = {int(v.version): v for v in there.search_model_versions("name = 'small'")}
    assert {n: v.tags["evolve.decision"] for n, v in versions.items()} == {1: "promoted", 2: "declined", 3: "promoted"}
    add_iteration(store, 4, "restore")
    sync(store)
    assert alias() == 1, "the best champion so far came back"
    first = store.ref("small", 1, "adapter")
    assert versions[2].tags["evolve.parent.adapter"] == versions[3].tags["evolve.parent.adapter"] == first.digest  # type: ignore[union-attr]
    found = runs(store)
    assert found["iteration 03"].data.tags["dagster.run_id"] == "dagster-3"
    assert len(there.get_metric_history(found["small"].info.run_id, "success/without")) == 5
    there.delete_registered_model("small")
    add_iteration(store, 5, "keep")
    assert sync(store).versions == 2, "the champion's version was deleted with the model"
    assert there.get_model_version_by_alias("small", "champion").tags["evolve.digest.adapter"] == first.digest  # type: ignore[union-attr]


@pytest.fixture
def other(store: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A copy of ``store`` that sends to its server."""
    configure(store.root, tracking={"trajectories": 0})
    there = Store(store.root.parent / "other" / "store")
    shutil.copytree(store.root, there.root)
    configure(there.root, tracking={"trajectories": 0})
    monkeypatch.setenv(URI_VARIABLE, f"sqlite:///{own_database(store.root)}")
    return there


def test_of_two_stores_none_takes_the_others_champion_away(store: Store, other: Store) -> None:
    add_iteration(store, 2, "promote")
    add_iteration(other, 2, "promote", tasks="others")
    there = client(store)

    def champion() -> str:
        return str(there.get_model_version_by_alias("small", "champion").tags["evolve.digest.promotion"])

    first, second = (one.ref("small", 2, "promotion").digest for one in (store, other))  # type: ignore[union-attr]
    assert sync(store).skipped == []
    for one in (other, store, other):
        told = sync(one).skipped
        assert champion() == first
        assert len(told) == (one is other)
    assert "another name (`experiment:`) or another server (MLFLOW_TRACKING_URI)" in told[0]
    there.delete_registered_model_alias("small", "champion")
    assert sync(other).skipped == []
    assert champion() == second
    [told_here] = sync(store).skipped
    assert "which another store has sent" in told_here


def test_of_two_stores_each_says_what_holds_in_it(store: Store, other: Store) -> None:
    add_iteration(store, 2, "keep")
    add_iteration(other, 2, "keep", tasks="others")
    there = client(store)

    def marks() -> dict[str, str]:
        """Promotion of a second night -> whether its run is marked."""
        experiment_id = there.get_experiment_by_name("small").experiment_id
        nights = there.search_runs([experiment_id], "tags.`evolve.partition` = 'small|02'")
        return {run.data.tags["evolve.digest.promotion"]: run.data.tags["evolve.current"] for run in nights}

    first, second = (one.ref("small", 2, "promotion").digest for one in (store, other))  # type: ignore[union-attr]
    for one in (store, other):
        sync(one)
    assert marks() == {first: "true", second: "true"}
    add_iteration(other, 2, "keep", tasks="mended")
    sync(other)
    third = other.ref("small", 2, "promotion").digest  # type: ignore[union-attr]
    assert marks() == {first: "true", second: "false", third: "true"}


def test_a_champion_that_somebody_moved_comes_back(store: Store) -> None:
    configure(store.root, tracking={"trajectories": 0})
    add_iteration(store, 2, "promote")
    sync(store)
    there = client(store)

    def champion() -> str:
        return str(there.get_model_version_by_alias("small", "champion").tags["evolve.digest.promotion"])

    there.set_registered_model_alias("small", "champion", "1")
    assert sync(store).skipped == []
    old = champion()
    assert old == store.ref("small", 2, "promotion").digest  # type: ignore[union-attr]
    add_iteration(store, 2, "promote", tasks="mended")
    shutil.rmtree(store.folder("promotion", old))
    assert sync(store).skipped == [], "sent from here, though gc has removed it"
    assert champion() == store.ref("small", 2, "promotion").digest != old  # type: ignore[union-attr]


def test_another_config_is_another_lineage(store: Store) -> None:
    sync(store)
    run_step("promotion", configure(store.root, gate={"max_turn_ratio": 3.0}), 1, store)
    assert sync(store).runs == 2
    there = client(store)
    experiment_id = there.get_experiment_by_name("small").experiment_id

    def current() -> dict[str, str]:
        """Kind of run -> the lineage of the one that is marked."""
        marked = there.search_runs([experiment_id], "tags.`evolve.current` = 'true'")
        assert len(marked) == 2
        return {r.data.tags["evolve.kind"]: r.data.tags["evolve.lineage"] for r in marked}

    def champion() -> int:
        return int(there.get_model_version_by_alias("small", "champion").version)

    def promotion() -> str:
        return store.ref("small", 1, "promotion").digest  # type: ignore[union-attr]

    assert current() == {"lineage": promotion(), "iteration": promotion()}
    assert champion() == 2
    run_step("promotion", configure(store.root), 1, store)
    assert str(sync(store)) == "nothing to send"
    assert current() == {"lineage": promotion(), "iteration": promotion()}, "the earlier config holds again"
    assert champion() == 1


def test_a_night_that_is_made_anew_takes_the_place_of_the_old_one(store: Store) -> None:
    configure(store.root, tracking={"trajectories": 0})
    add_iteration(store, 2, "keep")
    sync(store)
    add_iteration(store, 2, "keep", tasks="mended")
    assert sync(store).runs == 1
    there = client(store)
    nights = there.search_runs([there.get_experiment_by_name("small").experiment_id], "tags.`evolve.partition` = 'small|02'")
    marks = {run.data.tags["evolve.digest.promotion"]: run.data.tags["evolve.current"] for run in nights}
    assert sorted(marks.values()) == ["false", "true"]
    assert marks[store.ref("small", 2, "promotion").digest] == "true"  # type: ignore[union-attr]


def test_what_was_deleted_stays_deleted_and_what_was_lost_is_sent_anew(store: Store, made: Path) -> None:
    sync(store)
    before = counts(own_database(store.root))
    client(store).delete_run(runs(store)["small"].info.run_id)
    sent = sync(store)
    assert sent.runs == 0
    assert "deleted in MLflow" in sent.skipped[0]
    # A fresh database behind the same address; the process that knew the old one is gone too.
    shutil.copyfile(own_database(made), own_database(store.root))
    subprocess.run([sys.executable, "-m", "evolve_dag", "sync-mlflow", "--store", str(store.root)], check=True)
    assert counts(own_database(store.root)) == before


@pytest.mark.parametrize("tagged", [True, False])
def test_an_experiment_that_was_renamed_in_mlflow_is_sent_to_all_the_same(
    store: Store, monkeypatch: pytest.MonkeyPatch, tagged: bool
) -> None:
    configure(store.root, tracking={"trajectories": 0})
    sync(store)
    there = client(store)
    experiment_id = there.get_experiment_by_name("small").experiment_id
    if not tagged:  # made before there was such a tag
        with sqlite3.connect(own_database(store.root)) as connection:
            connection.execute("delete from experiment_tags where key = 'evolve.experiment'")
    there.rename_experiment(experiment_id, "my first one")
    there.delete_experiment(experiment_id)
    add_iteration(store, 2, "keep")
    assert sync(store).runs == 1
    assert there.get_experiment_by_name("small") is None
    assert there.get_experiment(experiment_id).lifecycle_stage == "active"
    assert len(there.search_runs([experiment_id])) == 3
    monkeypatch.setenv(ADDRESS_VARIABLE, "http://mlflow")
    for iteration in (1, 2):
        assert f"/experiments/{experiment_id}/runs/" in str(tracking_link(store.root, "small", iteration))


def test_an_id_that_a_new_server_gave_to_another_experiment_is_not_taken(store: Store, made: Path) -> None:
    configure(store.root, tracking={"trajectories": 0})
    sync(store)
    shutil.copyfile(own_database(made), own_database(store.root))
    there = client(store)
    assert there.create_experiment("somebody's") == "1"
    assert sync(store).runs == 2
    assert there.search_runs(["1"]) == []
    assert len(runs(store)) == 2


def test_a_loaded_champion_says_what_the_policy_says(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    import mlflow.pyfunc

    from evolve_dag.inference.folders import POCKET
    from evolve_dag.inference.transformers import TransformersModel
    from evolve_dag.protocols import Request, Sampling

    sync(store)
    uri = mlflow_sync.tracking_uri(store.root)
    monkeypatch.setenv(URI_VARIABLE, uri)
    mlflow.set_tracking_uri(uri)
    try:
        loaded = mlflow.pyfunc.load_model("models:/small@champion")
    finally:
        mlflow.set_tracking_uri(None)
    artifact = store.open("trajectories", store.ref("small", 1, "trajectories").digest)  # type: ignore[union-attr]
    frame = artifact.frame("trajectories.parquet").unique("task_id", maintain_order=True).head(3)
    adapter = store.open("adapter", store.ref("small", 1, "adapter").digest)  # type: ignore[union-attr]
    policy = TransformersModel.load(POCKET, adapter_dir=adapter.path, threads=1)

    async def ask() -> list[str]:
        requests = [
            Request((Message("system", system), Message("user", question)), Sampling(0.0, 1.0, 48))
            for system, question in frame.select("system", "question").iter_rows()
        ]
        return [done.text for done in await asyncio.gather(*map(policy.generate, requests))]

    expected = asyncio.run(ask())
    assert loaded.predict([{"question": question} for question in frame["question"]]) == expected
    messages = [{"role": "system", "content": frame["system"][0]}, {"role": "user", "content": frame["question"][0]}]
    assert loaded.predict([{"messages": messages}]) == expected[:1]
    assert len(loaded.predict([{"question": frame["question"][0]}], params={"max_tokens": 4})[0]) < len(expected[0])
    with pytest.raises(DataError, match="input 1: neither a question nor messages"):
        loaded.predict([{"query": "?"}])


def test_an_adapter_refuses_other_weights(tmp_path: Path) -> None:
    from evolve_dag.inference.folders import folder_digest, shipped
    from evolve_dag.tracking.mlflow_policy import base_folder

    (tmp_path / "model.safetensors").write_bytes(b"other weights")
    other = f"sha256:{folder_digest(tmp_path)[:32]}:float32"
    assert base_folder(other, str(tmp_path)) == tmp_path
    for folder in shipped().values():
        assert base_folder(f"sha256:{folder_digest(folder)[:32]}:float32", str(tmp_path)) == folder
    (tmp_path / "model.safetensors").write_bytes(b"changed weights")
    with pytest.raises(ModelError, match="EVOLVE_BASE_MODEL"):
        base_folder(other, str(tmp_path))


def test_killed_in_the_middle_then_the_same_as_without(store: Store, made: Path, tmp_path: Path) -> None:
    calm = tmp_path / "calm"
    shutil.copytree(store.root, calm)
    configure(calm)
    sync(Store(calm))
    command = [sys.executable, "-m", "evolve_dag", "sync-mlflow", "--store", str(store.root)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not 0 < counts(own_database(store.root))["trace_info"] < TRACES - 2:
            assert process.poll() is None, "finished before it could be killed"
            assert time.monotonic() < deadline, "never got there"
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert counts(own_database(store.root))["trace_info"] < TRACES
    sync(store)
    assert counts(own_database(store.root)) == counts(own_database(calm))


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def server(made: Path, tmp_path: Path, port: int) -> Iterator[Any]:
    """Starts MLflow's server on ``port`` when called."""
    processes = []

    def start() -> None:
        shutil.copyfile(own_database(made), tmp_path / "server.db")
        environment = os.environ | {
            "_MLFLOW_SERVER_FILE_STORE": f"sqlite:///{tmp_path}/server.db",
            "_MLFLOW_SERVER_REGISTRY_STORE": f"sqlite:///{tmp_path}/server.db",
            "_MLFLOW_SERVER_ARTIFACT_ROOT": "mlflow-artifacts:/",
            "_MLFLOW_SERVER_ARTIFACT_DESTINATION": str(tmp_path / "server"),
            "_MLFLOW_SERVER_SERVE_ARTIFACTS": "true",
            "MLFLOW_DISABLE_TELEMETRY": "true",
        }
        environment.pop(URI_VARIABLE, None)
        command = [sys.executable, "-m", "uvicorn", "mlflow.server.fastapi_app:app", "--port", str(port)]
        processes.append(subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        deadline = time.monotonic() + 120
        while True:
            with socket.socket() as knock:
                if knock.connect_ex(("127.0.0.1", port)) == 0:
                    return
            assert time.monotonic() < deadline, "the server did not come up"
            time.sleep(0.05)

    yield start
    for process in processes:
        process.terminate()
        process.wait()


def test_a_server_that_is_down_gets_it_later(
    store: Store, server: Any, port: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(URI_VARIABLE, f"http://someone:pass-of-someone@127.0.0.1:{port}")
    started = time.monotonic()
    with pytest.raises(TrackingError, match="does not answer") as caught:
        sync(store)
    assert time.monotonic() - started < 5
    assert "evolve sync-mlflow" in caught.value.remedy
    assert "pass-of-someone" not in str(caught.value)
    assert tracking_link(store.root, "small", 1) is None
    server()
    sent = sync(store)
    assert (sent.runs, sent.traces, sent.versions) == (2, TRACES, 1)
    assert (tmp_path / "server").is_dir()
    run = runs(store)["iteration 01"].info
    link = tracking_link(store.root, "small", 1)
    assert link == f"http://127.0.0.1:{port}/#/experiments/{run.experiment_id}/runs/{run.run_id}"
    for path in (store.root / "tracking").iterdir():
        assert b"pass-of-someone" not in path.read_bytes()
    before = counts(tmp_path / "server.db")
    assert before["spans"] > TRACES
    assert before["assessments"] == TRACES
    sync(store, again=True)
    assert counts(tmp_path / "server.db") == before


def test_in_the_background(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_link(store.root, "small", 1) is None
    (store.root / "tracking").mkdir()
    with FileLock(store.root / "tracking" / "sync.lock"):
        # Another process is sending: the request is left to it, without waiting for the lock, which nobody lets go here.
        start_background_sync(store.root, "small")
    assert not (store.root / "tracking" / "sync.log").exists()
    assert [p.name for p in (store.root / "tracking" / "requests").iterdir()] == ["small"]
    start_background_sync(store.root, "small")
    deadline = time.monotonic() + 900  # it runs at low priority: on a busy machine it waits for everybody else
    log = store.root / "tracking" / "sync.log"
    while "small: " not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)
    assert "small: 2 runs, " in log.read_text()
    assert f"{TRACES} traces" in log.read_text()
    assert not any((store.root / "tracking" / "requests").iterdir())
    link = tracking_link(store.root, "small", 1)
    assert link == f"mlflow run {runs(store)['iteration 01'].info.run_id}"
    monkeypatch.setenv(ADDRESS_VARIABLE, "http://127.0.0.1:5000/")
    adapter = store.ref("small", 1, "adapter").digest  # type: ignore[union-attr]
    assert "/runs/" in str(tracking_link(store.root, "small", 1, {"adapter": adapter}))
    assert "small%7C01" in str(tracking_link(store.root, "small", 1, {"adapter": "of another config"}))
    assert str(tracking_link(store.root, "small", 1)).startswith("http://127.0.0.1:5000/#/experiments/")
    assert "small%7C02" in str(tracking_link(store.root, "small", 2))


def test_a_failure_in_the_background_keeps_the_request(store: Store, port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(URI_VARIABLE, f"http://127.0.0.1:{port}")
    monkeypatch.setattr(mlflow_sync, "_lower_priority", lambda: None)
    mlflow_sync._request(store.root, "small")
    assert mlflow_sync.main(store.root) == 1
    assert [p.name for p in (store.root / "tracking" / "requests").iterdir()] == ["small"]


@pytest.mark.parametrize("why", ["unknown", "file", "typo", "switch"])
def test_nothing_happens_where_nothing_is_wanted(store: Store, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = counts(own_database(store.root))
    if why == "file":
        configure(store.root, tracking={"mlflow": False})
        assert sync(store).skipped == ["small: tracking.mlflow is false"]
    if why == "typo":
        configure(store.root)
        assert mlflow_sync._wanted(store, ["small"], mlflow_sync.Sent()) == [("small", registry.load(store.root, "small"))]
        configure(store.root, experiment="another")
        assert mlflow_sync._wanted(store, ["small"], mlflow_sync.Sent()) == [("small", None)], "its file is another's"
        (store.root.parent / "small.yaml").write_text("tracking: {mlflow: false}\nseeed: 5\n")
        [told] = sync(store, ["small"]).failed
        assert told.startswith("small: nothing is sent while its file is wrong")
    if why == "switch":
        monkeypatch.setenv(mlflow_sync.SWITCH_VARIABLE, "off")
    start_background_sync(store.root, "nobody" if why == "unknown" else "small")
    assert not (store.root / "tracking").exists()
    assert counts(own_database(store.root)) == before


def lose_the_file(store: Store, *, entry: bool | None, ref: bool | None) -> None:
    """As on another machine, or after the file was removed.

    Args:
        entry: what the registry knows of ``tracking.mlflow``; None: as an earlier version wrote it.
        ref: what the newest promotion knows of it.
    """
    (store.root.parent / "small.yaml").unlink()
    path = store.root / "experiments" / "small.json"
    facts = json.loads(path.read_text())
    del facts["mlflow"]
    path.write_text(json.dumps(facts if entry is None else facts | {"mlflow": entry}))
    known = store.ref("small", 1, "promotion")
    assert known is not None
    rest = {key: value for key, value in known.facts.items() if key != "mlflow"}
    store.set_ref("small", 1, "promotion", known.digest, **rest, **({} if ref is None else {"mlflow": ref}))


@pytest.mark.parametrize(
    ("entry", "ref", "told"),
    [
        (True, None, None),
        (False, True, "small: tracking.mlflow was false when its file was last read"),
        (None, True, None),
        (None, False, "small: tracking.mlflow was false when its file was last read"),
        (None, None, "small: its file is gone, and nothing says whether it may be sent"),
    ],
)
def test_what_a_file_said_counts_when_it_is_gone(store: Store, entry: bool | None, ref: bool | None, told: str | None) -> None:
    lose_the_file(store, entry=entry, ref=ref)
    named, all_of_them = mlflow_sync.Sent(), mlflow_sync.Sent()
    assert bool(mlflow_sync._wanted(store, None, all_of_them)) == (told is None)
    assert [line.startswith(told or "") for line in all_of_them.skipped] == ([] if told is None else [True])
    unknown = entry is None and ref is None
    assert bool(mlflow_sync._wanted(store, ["small"], named)) == (told is None or unknown), "who names it has decided"


def test_what_the_file_says_is_kept_for_when_it_is_gone(store: Store) -> None:
    assert store.ref("small", 1, "promotion").facts["mlflow"] is True  # type: ignore[union-attr]
    configure(store.root, tracking={"mlflow": False})
    (store.root.parent / "small.yaml").unlink()
    assert sync(store).skipped == ["small: tracking.mlflow was false when its file was last read"]
    assert not any((store.root / "tracking").glob("*.jsonl"))


def test_no_secret_reaches_the_server(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "no results"  # stands in the traces of nearly every episode
    monkeypatch.setenv("EXAMPLE_API_KEY", secret)
    monkeypatch.setattr(mlflow_sync._Sender, "pictures", PICTURES)
    sync(store)
    pages = {path.name: path.read_text() for path in store.root.glob("mlflow/artifacts/**/*.html")}
    assert set(pages) == {"report.html", "small~audit.html"}
    assert not any(secret in page for page in pages.values())
    assert get_plotlyjs() in pages["report.html"], "what draws is as it was"
    with sqlite3.connect(own_database(store.root)) as connection:
        texts = [row[0] for row in connection.execute("select content from spans")]
        texts += [row[0] or "" for row in connection.execute("select response_preview from trace_info")]
    assert any("***" in text for text in texts)
    assert not any(secret in text for text in texts)


def test_no_secret_stands_in_a_span(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXAMPLE_API_KEY", "zq9xk2vv7plainkey")
    step = Step(0, "search", (5,), (-0.1,), problem="no such tool: zq9xk2vv7plainkey")
    failed = Trajectory("t#0", "t", 0, 1, "system", "?", (step,), "failed", error="401 for zq9xk2vv7plainkey")
    one = mlflow_traces.Sample("train", failed, "d" * 32, "trajectories", 1_700_000_000_000)
    facts = SimpleNamespace(partition="small|01")
    spans = mlflow_traces.build_spans(one, facts, "tr-" + "a" * 32, {}, mlflow_traces._shortener())  # type: ignore[arg-type]
    assert len(spans) == 2
    assert not any("zq9xk2vv7plainkey" in str(span.to_dict()) for span in spans)


def test_a_damaged_artifact_is_named_and_the_others_are_sent(store: Store) -> None:
    path = store.open("contexts", store.ref("small", 1, "contexts").digest).path / "steps.parquet"  # type: ignore[union-attr]
    path.write_bytes(path.read_bytes()[:-1] + b"?")
    sent = sync(store)
    assert "steps.parquet" in sent.failed[0]
    assert sent.runs == 2


def test_what_mlflow_refuses_of_one_experiment_does_not_keep_the_others_back(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = store.root / "refs" / "other"
    shutil.copytree(store.root / "refs" / "small", other)
    for path in other.rglob("*.json"):
        path.write_text(path.read_text().replace('"small"', '"other"'))
    told = mlflow_sync.mlflow_facts.tags
    illegal = {"a name?": "x"}
    monkeypatch.setattr(
        mlflow_sync.mlflow_facts, "tags", lambda facts: told(facts) | (illegal if facts.experiment == "other" else {})
    )
    sent = sync(store, ["other", "small"])
    assert len(sent.failed) == 1
    assert sent.failed[0].startswith("other: MLflow at sqlite")
    assert "a name?" in sent.failed[0]
    assert "iteration 01" in runs(store)


def test_keys_that_mlflow_would_refuse_are_sent_under_names_that_it_takes(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = mlflow_sync.mlflow_facts.settings
    extra = {"models.extractor": {"extra": {"$schema": "https://json-schema.org", "user@host": 1, "https://x": 2}}}
    monkeypatch.setattr(mlflow_sync.mlflow_facts, "settings", lambda facts: told(facts) | extra)
    assert sync(store).failed == []
    assert runs(store)["iteration 01"].data.params["models.extractor.extra._schema"] == "https://json-schema.org"
