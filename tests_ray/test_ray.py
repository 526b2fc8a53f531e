"""Rollouts of one iteration on a Ray cluster: the digests and rows of one process; a worker's death costs what it had begun."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

import dagster as dg
import polars as pl
import pytest
from conftest import HERE, Place, experiment_text, ray_launcher
from endpoint import TURNS, Endpoint
from evolve_dag.assets import partitions
from evolve_dag.assets.launch import QUIET

from evolve_dag.config import registry
from evolve_dag.definitions import defs
from evolve_dag.store.artifacts import Artifact
from evolve_dag.store.frames import CALLS
from evolve_dag.store.mirror import open_store


def materialize(folder: Path, place: Place, text: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Artifact, str]:
    """The trajectories of iteration 1 through Dagster, on a machine of its own, and the run's log."""
    folder.mkdir()
    shutil.copy(HERE / "endpoint_policy.py", folder)
    (folder / "fanned.yaml").write_text(text)
    monkeypatch.setenv("EVOLVE_STORE", str(folder / "store"))
    monkeypatch.setenv("EVOLVE_MIRROR", place.mirror)
    registry.register(registry.default_store(), folder / "fanned.yaml")
    (folder / "home").mkdir()
    with dg.DagsterInstance.local_temp(str(folder / "home")) as instance:
        partitions.add_partitions(instance, ["fanned"], 1)
        result = defs.resolve_job_def("iteration").execute_in_process(
            instance=instance,
            partition_key=partitions.loop_key("fanned", 1),
            asset_selection=[dg.AssetKey("policy"), dg.AssetKey("trajectories")],
            run_config=QUIET,
        )
        log = "\n".join(entry.user_message for entry in instance.all_logs(result.run_id))
    store = open_store(registry.default_store())
    ref = store.ref("fanned", 1, "trajectories")
    assert ref is not None
    return store.open("trajectories", ref.digest, verify=True), log


def rows(artifact: Artifact) -> list[pl.DataFrame]:
    names = sorted(name for name in artifact.manifest.files if name.endswith(".parquet") and name != CALLS)  # as they came
    frames = [artifact.frame(name) for name in names]
    return [frame.drop([c for c in frame.columns if c.startswith("seconds")]) for frame in frames]


def test_episodes_fan_out_and_a_killed_worker_costs_what_it_had_begun(
    cluster: Place, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = Place("", f"file://{tmp_path}/other")
    alone, _ = materialize(tmp_path / "alone", here, experiment_text(endpoint, "in_process"), monkeypatch)
    calls = sum(endpoint.calls.values())
    assert calls == 8 * 2 * TURNS
    endpoint.calls.clear()
    killed: list[int] = []

    def kill_one() -> None:
        while sum(endpoint.calls.values()) < 20 or len(endpoint.calls) < 2:
            time.sleep(0.01)
        killed.append(next(iter(endpoint.calls)))
        os.kill(killed[0], signal.SIGKILL)

    threading.Thread(target=kill_one, daemon=True).start()
    fanned, log = materialize(tmp_path / "fanned", cluster, experiment_text(endpoint, ray_launcher(cluster, 2)), monkeypatch)
    assert killed[0] in endpoint.calls
    assert os.getpid() not in endpoint.calls
    assert len(endpoint.calls) >= 2
    assert sum(endpoint.calls.values()) <= calls + 2 * TURNS  # two episodes in flight on the one that was killed
    assert "a rollout worker died (ActorDiedError): its unfinished episodes are played again" in log
    assert "rollouts: 16 of 16" in log
    assert fanned.digest == alone.digest
    assert fanned.summary["calls"]["policy"]["calls"] == alone.summary["calls"]["policy"]["calls"] == calls
    assert all(one.equals(other) for one, other in zip(rows(fanned), rows(alone), strict=True))


def test_a_cluster_that_cannot_start_a_worker_is_told(
    cluster: Place, endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = experiment_text(endpoint, ray_launcher(cluster, 2).replace(sys.executable, "/no/python"))
    text = f"seed: 7\n{text}"  # else the mirror has it
    with pytest.raises(dg.Failure) as told:
        materialize(tmp_path / "wrong", cluster, text, monkeypatch)
    assert "trajectories[fanned|01]: launcher ray could not start a worker" in str(told.value.description)
    assert "see that it can be reached and that evolve-dag is installed there" in str(told.value.description)


def test_a_cluster_that_does_not_answer_is_told(endpoint: Endpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nobody = Place("http://127.0.0.1:9", f"file://{tmp_path}/mirror")
    with pytest.raises(dg.Failure) as told:
        materialize(tmp_path / "dead", nobody, experiment_text(endpoint, ray_launcher(nobody, 2)), monkeypatch)
    assert "trajectories[fanned|01]: launcher ray could not start a worker" in str(told.value.description)
    assert "http://127.0.0.1:9" in str(told.value.description)
    assert not endpoint.calls
