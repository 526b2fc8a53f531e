"""The launcher ``kubernetes`` against a stub of the API that runs a pod's command as a process. There was no cluster.

Run by ``make test-kubernetes``, which installs the extra; skipped without it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dagster as dg
import pytest
import yaml
from assets_helpers import FakeSteps, iteration, problems_of, write_config
from evolve_dag.assets import launchers
from test_launchers import STUB

from evolve_dag.config import registry
from evolve_dag.store.mirror import open_store

pytest.importorskip("dagster_k8s", reason="needs the extra [kubernetes]")
ROOT = Path(__file__).parents[2]


class Cluster:
    """The part of the API that Dagster's client uses. A pod is a process; of its containers the first is run."""

    def __init__(self) -> None:
        self.pods: dict[str, dict[str, Any]] = {}
        self.deleted: list[str] = []
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        cluster = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                pod = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                self.answer(cluster.create(pod))

            def do_GET(self) -> None:
                path = urlsplit(self.path).path
                if path.endswith("/log"):
                    self.send_response(200)
                    self.end_headers()
                    for line in cluster.log(path.split("/")[-2]):
                        self.wfile.write(line)
                else:
                    name = self.path.partition("metadata.name%3D")[2].partition("&")[0]
                    self.answer({"kind": "PodList", "apiVersion": "v1", "items": cluster.listed(name)})

            def do_DELETE(self) -> None:
                cluster.deleted.append(urlsplit(self.path).path.split("/")[-1])
                self.answer({})

            def answer(self, content: dict[str, Any]) -> None:
                said = json.dumps(content).encode()
                self.send_response(200)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(said)))
                self.end_headers()
                self.wfile.write(said)

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def create(self, pod: dict[str, Any]) -> dict[str, Any]:
        name, container = pod["metadata"]["name"], pod["spec"]["containers"][0]
        variables = {one["name"]: one["value"] for one in container["env"]}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("EVOLVE_")}
        self.pods[name] = pod
        self._processes[name] = subprocess.Popen(
            container["command"], env=kept | variables, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        return pod

    def log(self, name: str) -> Iterator[bytes]:
        stream = self._processes[name].stderr
        assert stream is not None
        for line in stream:
            yield f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%f}000Z ".encode() + line

    def listed(self, name: str) -> list[dict[str, Any]]:
        code = self._processes[name].poll()
        state = {"running": {}} if code is None else {"terminated": {"exitCode": code if code >= 0 else 128 - code}}
        container = self.pods[name]["spec"]["containers"][0]["name"]
        status = {"name": container, "ready": code is None, "restartCount": 0, "image": "", "imageID": "", "state": state}
        return [{**self.pods[name], "status": {"phase": "Running", "containerStatuses": [status]}}]


@pytest.fixture
def cluster(place: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """A stub cluster and an experiment that sends its adapter there."""
    running = Cluster()
    address = f"http://127.0.0.1:{running.server.server_address[1]}"
    names = {"name": "stub", "context": {"cluster": "stub", "user": "stub"}}
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "stub",
        "contexts": [names],
        "users": [{"name": "stub", "user": {}}],
    }
    (place / "kube").write_text(yaml.safe_dump(config | {"clusters": [{"name": "stub", "cluster": {"server": address}}]}))
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(place / "kube"))
    monkeypatch.setenv("EVOLVE_MIRROR", f"file://{place}/mirror")
    monkeypatch.setattr(launchers, "ENTRY", ("-c", STUB))
    pod = yaml.safe_load((ROOT / "docker/kubernetes/worker-pod.yaml").read_text())
    pod["containers"][0]["env"][0]["value"] = str(place / "store of the pod")
    (place / "configs").mkdir()
    (place / "configs/pod.yaml").write_text(yaml.safe_dump(pod))
    launcher = {"kind": "kubernetes", "image": "evolve-dag:1", "pod": "pod.yaml", "python": sys.executable}
    registry.register(
        registry.default_store(), write_config(place / "configs/tiny.yaml", runtime={"launcher": {"adapter": launcher}})
    )
    yield running
    running.server.shutdown()


def test_a_pod_makes_the_step_and_the_mirror_brings_it_here(
    cluster: Cluster, fake: FakeSteps, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = iteration(instance, 1, check=False)
    assert result.success, problems_of(result)
    [(name, pod)] = cluster.pods.items()
    container = pod["spec"]["containers"][0]
    assert container["image"] == "evolve-dag:1"
    assert container["resources"]["limits"] == {"memory": "16Gi"}
    assert pod["spec"]["restartPolicy"] == "Never"
    assert cluster.deleted == [name]
    assert "adapter" not in {one.partition("[")[0] for one in fake.ran}
    store = open_store(registry.default_store())
    ref = store.ref("tiny", 1, "adapter")
    assert ref is not None
    assert store.open("adapter", ref.digest, verify=True).summary["loss_last"] == 0.2
    assert "training: 3 of 3" in [entry.user_message for entry in instance.all_logs(result.run_id)]


def test_what_goes_wrong_in_a_pod_is_told_here(
    cluster: Cluster, fake: FakeSteps, instance: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launchers, "ENTRY", ("-c", STUB.replace("exec(", "time.sleep(2); raise DataError('a', 'b'); exec(")))
    assert problems_of(iteration(instance, 1, check=False)) == "a\n  remedy: b"
    assert len(cluster.deleted) == 1


def test_a_cluster_that_does_not_answer_is_told(cluster: Cluster, fake: FakeSteps, instance: dg.DagsterInstance) -> None:
    cluster.server.shutdown()
    cluster.server.server_close()
    told = problems_of(iteration(instance, 1, check=False))
    assert "launcher kubernetes" in told, told
    assert "Connection refused" in told, told
