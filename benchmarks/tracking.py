"""What MLflow tracking costs an experiment: two iterations with and without it, in pairs.

Needs nothing but the package. Tracking sends an iteration while the next one runs, so one iteration alone would show nothing.

    python benchmarks/tracking.py --repeats 5                       # a small experiment, minutes
    python benchmarks/tracking.py --config configs/pocket.yaml      # the pocket default

Every measurement is a process of its own with a store of its own, and the arms take turns in going first. ``seconds`` is the
wall time of the iterations, ``cpu_seconds`` what the run itself used (what it lends to nobody), ``call_milliseconds`` what
the run waits for tracking to start. The arm ``dead`` has a tracking server that takes connections and never answers. A busy
machine blurs wall time: the ratios are medians over pairs, and the load is printed beside them.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

ARMS = ("without", "with", "dead")
SMALL = """\
experiment: small
tasks:
  train: {count: 32, world: 11}
  development: {count: 32, world: 21}
  held_out: {count: 64, world: 31}
extraction: {min_support: 5, confidence: 0.8}
runtime: {threads: 1}
"""


def measure(config: Path, root: Path, iterations: int, tracked: bool) -> dict[str, Any]:
    """Run the iterations in this process; what goes on in the background is waited for after the clock has stopped."""
    from evolve_dag.config import registry
    from evolve_dag.steps.base import STEP_ORDER, run_step
    from evolve_dag.store.artifacts import Store
    from evolve_dag.tracking.mlflow_sync import start_background_sync

    experiment = registry.register(root, config)
    store = Store(root)
    calls = []
    wall, cpu = time.perf_counter(), time.process_time()
    for k in range(1, iterations + 1):
        for step in STEP_ORDER:
            run_step(step, experiment, k, store)
        if tracked:
            begun = time.perf_counter()
            start_background_sync(root, experiment.experiment)
            calls.append(1000 * (time.perf_counter() - begun))
    found = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu, "call_milliseconds": calls}
    if tracked:
        found["log"] = wait_for_background(root)
    return found


def wait_for_background(root: Path) -> list[str]:
    """Until nobody sends any more; what the background said."""
    from evolve_dag.tracking.mlflow_sync import THREAD

    for thread in threading.enumerate():
        if thread.name == THREAD:
            thread.join()
    return (root / "tracking" / "sync.log").read_text().splitlines()


def in_process(arm: str, config: Path, iterations: int, dead: str) -> dict[str, Any]:
    """One measurement in a process of its own."""
    environment = os.environ | {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "OMP_NUM_THREADS": "1"}
    for variable in ("MLFLOW_TRACKING_URI", "EVOLVE_TRACKING"):
        environment.pop(variable, None)
    if arm == "dead":
        environment["MLFLOW_TRACKING_URI"] = dead
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--arm", arm, "--config", str(config), "--store", f"{folder}/store"]
        command += ["--iterations", str(iterations)]
        done = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, check=True
        )
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def compare(config: Path, iterations: int, repeats: int) -> dict[str, Any]:
    """All arms, ``repeats`` times, each time in another order."""
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in ARMS}
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        dead = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for n in range(repeats):
            for arm in (*ARMS[n % 3 :], *ARMS[: n % 3]):
                found[arm].append(in_process(arm, config, iterations, dead))
                seconds = found[arm][-1]["seconds"]
                print(f"{n + 1}/{repeats} {arm}: {seconds:.1f} s, load {os.getloadavg()[0]:.1f}", file=sys.stderr)
    report: dict[str, Any] = {"config": config.name, "iterations": iterations, "repeats": repeats, "load": os.getloadavg()}
    for arm, runs in found.items():
        report[arm] = {name: round(statistics.median(run[name] for run in runs), 3) for name in ("seconds", "cpu_seconds")}
        if arm != "without":
            report[arm]["call_milliseconds"] = round(max(max(run["call_milliseconds"]) for run in runs), 1)
            for name in ("seconds", "cpu_seconds"):
                ratios = [run[name] / base[name] for run, base in zip(runs, found["without"], strict=True)]
                report[arm][f"{name}_ratio"] = round(statistics.median(ratios), 3)
                report[arm][f"{name}_ratios"] = [round(ratio, 3) for ratio in ratios]
            report[arm]["log"] = runs[-1]["log"]
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--config", type=Path, help="experiment file; without it a small one")
    parser.add_argument("--iterations", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arm", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--store", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.arm:
        print(json.dumps(measure(options.config, options.store, options.iterations, options.arm != "without")))
        return
    with tempfile.TemporaryDirectory() as folder:
        config = options.config or Path(folder, "small.yaml")
        if options.config is None:
            config.write_text(SMALL)
        print(json.dumps(compare(config, options.iterations, options.repeats), indent=2))


if __name__ == "__main__":
    main()
