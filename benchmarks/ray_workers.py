"""Rollouts behind an endpoint with a fixed latency, fanned out over one Ray actor and over two: rate, digests, rows.

``python benchmarks/ray_workers.py [repeats]`` (needs the extra [ray]). A local cluster of two nodes with one CPU each; both
sides are measured in turn, over the last three quarters of the episodes: an actor starts in seconds, whatever their number.
"""

# ruff: noqa: E402 - Ray reads its variables when it is imported
from __future__ import annotations

import hashlib
import os
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "EVOLVE_TRACKING": "off", "OMP_NUM_THREADS": "1"}
os.environ |= {"RAY_worker_niceness": "0"}  # else the actors wait for everything else on this machine
HERE = Path(__file__).resolve().parent.parent / "tests_ray"
sys.path.insert(0, str(HERE))

import ray
from endpoint import TURNS, Endpoint
from ray.cluster_utils import Cluster

from evolve_dag.config.loading import load_experiment
from evolve_dag.steps import base
from evolve_dag.steps.ray_workers import RayWorkers
from evolve_dag.store.artifacts import Artifact, Store
from evolve_dag.store.frames import CALLS

LATENCY = 0.05
TASKS, GROUP, CONCURRENCY = 48, 2, 4


class Times:
    """When each episode was done."""

    def __init__(self) -> None:
        self.done: list[float] = []

    def start(self, label: str, total: int) -> None: ...

    def advance(self, n: int = 1) -> None:
        self.done += [time.monotonic()] * n

    def finish(self) -> None: ...

    @property
    def rate(self) -> float:
        """Episodes a second, after the first few, which may have waited for the other actor to start."""
        kept = self.done[len(self.done) // 4 :]
        return (len(kept) - 1) / (kept[-1] - kept[0])


def rows(artifact: Artifact) -> str:
    """Hash of what was sampled; wall times left out."""
    names = sorted(name for name in artifact.manifest.files if name.endswith(".parquet") and name != CALLS)  # as they came
    frames = [artifact.frame(name) for name in names]
    told = [frame.drop([c for c in frame.columns if c.startswith("seconds")]).write_json() for frame in frames]
    return hashlib.sha256("".join(told).encode()).hexdigest()[:12]


def measure(folder: Path, experiment: Any, count: int) -> tuple[float, str, str]:
    """Rate, digest and rows of the trajectories, on a store of its own."""
    store, times = Store(folder), Times()
    base.run_step("policy", experiment, 1, store)
    workers = RayWorkers(experiment.model_dump(mode="json"), count)
    base.make_here(due := base.due_step("trajectories", experiment, 1, store, times, workers))
    return times.rate, due.digest, rows(store.open("trajectories", due.digest))


def main() -> None:
    folder = Path(tempfile.mkdtemp())
    shutil.copy(HERE / "endpoint_policy.py", folder)
    cluster = Cluster()
    try:
        cluster.add_node(num_cpus=0, include_dashboard=False, env_vars={"EVOLVE_STORE": str(folder / "head")})
        for name in ("one", "two"):
            cluster.add_node(num_cpus=1, env_vars={"EVOLVE_STORE": str(folder / name)})
        ray.init(address=cluster.address, log_to_driver=False)
        with Endpoint(LATENCY) as endpoint:
            (folder / "fanned.yaml").write_text(
                f"models: {{policy: {{backend: 'endpoint_policy:ENDPOINT', url: '{endpoint.url}'}}}}\n"
                f"tasks: {{train: {{count: {TASKS}, world: 13}}}}\nrollout: {{group_size: {GROUP}, max_steps: 8}}\n"
                f"runtime: {{threads: 1, concurrency: {CONCURRENCY}}}\n"
            )
            experiment = load_experiment(folder / "fanned.yaml")
            best = CONCURRENCY / (TURNS * LATENCY)
            print(
                f"{TASKS * GROUP} episodes of {TURNS} calls, {LATENCY * 1000:.0f} ms each, {CONCURRENCY} in flight on an actor"
            )
            for n in range(int(sys.argv[1]) if len(sys.argv) > 1 else 2):
                one = measure(folder / f"{n}-one", experiment, 1)
                two = measure(folder / f"{n}-two", experiment, 2)
                same = "same digest and rows" if one[1:] == two[1:] else "DIFFERENT"
                print(
                    f"one {one[0]:.1f}/s ({one[0] / best:.0%} of what the latency allows), two {two[0]:.1f}/s: "
                    f"{two[0] / one[0]:.2f} x, {same} ({two[1][:12]} {two[2]})",
                    flush=True,
                )
        ray.shutdown()
    finally:
        cluster.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
