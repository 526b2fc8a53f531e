"""A Ray cluster on this machine: a head, and two nodes with one CPU and a store folder each, over one mirror.

Run by `make test-ray` alone, which installs Ray.
"""

from __future__ import annotations

import os

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "EVOLVE_TRACKING": "off", "OMP_NUM_THREADS": "1"}
os.environ |= {"RAY_worker_niceness": "0"}  # else the actors wait for everything else on this machine

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from endpoint import Endpoint
from ray.cluster_utils import Cluster

HERE = Path(__file__).parent


@dataclass(frozen=True, slots=True)
class Place:
    """Where everything is."""

    dashboard: str
    mirror: str


def add_node(cluster: Cluster, **how: Any) -> None:
    """Ray gives a node and its dashboard 30 s each to start, which is not always enough on a machine with other work."""
    for attempt in (1, 2, 3):
        try:
            cluster.add_node(**how)
        except Exception:  # what Ray raises then
            if attempt == 3:
                raise
        else:
            return


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    folder = tmp_path_factory.mktemp("cluster")
    made = Cluster()
    try:
        head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": 0}
        for name, how in (("head", head), ("one", {"num_cpus": 1}), ("two", {"num_cpus": 1})):
            add_node(made, env_vars={"EVOLVE_STORE": str(folder / name)}, **how)
        os.environ["RAY_ADDRESS"] = made.gcs_address
        yield Place(f"http://{made.webui_url}", f"file://{folder}/mirror")
    finally:
        made.shutdown()


@pytest.fixture
def endpoint() -> Iterator[Endpoint]:
    with Endpoint(latency=0.05) as running:
        yield running


def experiment_text(endpoint: Endpoint, launcher: str, tasks: int = 8) -> str:
    return f"""
experiment: fanned
models: {{policy: {{backend: "endpoint_policy:ENDPOINT", url: "{endpoint.url}"}}}}
tasks: {{train: {{count: {tasks}, world: 13}}}}
rollout: {{group_size: 2, max_steps: 8}}
runtime: {{threads: 1, concurrency: 2, launcher: {{trajectories: {launcher}}}}}
"""


def ray_launcher(place: Place, workers: int) -> str:
    return f'{{kind: ray, address: "{place.dashboard}", python: "{sys.executable}", workers: {workers}}}'
