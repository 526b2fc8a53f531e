"""``evolve ui`` for real: started in a folder of its own, asked over HTTP, ended or killed; and what it leaves behind."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).parent.parent
TINY = {
    "extends": str(PROJECT / "configs" / "pocket.yaml"),
    "rollout": {"group_size": 2, "max_steps": 6},
    "tasks": {
        "train": {"count": 6, "world": 11},
        "development": {"count": 2, "world": 21},
        "held_out": {"count": 2, "world": 31},
    },
    "distillation": {"epochs": 1},
    "evaluation": {"bootstrap": 100},
    "tracking": {"mlflow": False},
    "runtime": {"threads": 1, "concurrency": 2},  # few at once, so that rollouts end one by one and a kill finds some done
}
"""An iteration of seconds."""


class Place:
    """A working folder with its configs, its store and its Dagster instance."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.store = folder / ".evolve"
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("EVOLVE_", "DAGSTER_", "MLFLOW_"))}
        self.environment = {**kept, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
        (folder / "configs").mkdir(parents=True, exist_ok=True)

    def config(self, name: str, **changes: object) -> None:
        """Write ``configs/<name>.yaml``."""
        (self.folder / "configs" / f"{name}.yaml").write_text(yaml.safe_dump({**TINY, **changes}))

    def evolve(self, *arguments: str) -> str:
        """Run a command to its end; returns what it printed."""
        command = [sys.executable, "-m", "evolve_dag", *arguments]
        done = subprocess.run(command, cwd=self.folder, env=self.environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{arguments}: {done.stdout}{done.stderr}"
        return done.stdout

    @contextmanager
    def instance(self) -> Iterator[Any]:
        """The Dagster instance, read from this process."""
        from evolve_dag.assets import launch

        with launch.open_instance(self.store) as opened:
            yield opened

    @contextmanager
    def ui(self, *options: str, environment: dict[str, str] | None = None) -> Iterator[Living]:
        """``evolve ui`` until the end of the block, however it is left."""
        living = Living(self, options, environment or {})
        try:
            yield living
        finally:
            living.clean_up()


class Living:
    """A running ``evolve ui``."""

    def __init__(self, place: Place, options: tuple[str, ...], environment: dict[str, str]) -> None:
        self.port, self.mlflow_port = free_port(), free_port()
        self.started = time.monotonic()
        command = [sys.executable, "-m", "evolve_dag", "ui", "--port", str(self.port), "--mlflow-port", str(self.mlflow_port)]
        self.output = place.folder / "ui.txt"
        with self.output.open("w") as out:
            self.process = subprocess.Popen(
                [*command, *options],
                cwd=place.folder,
                env={**place.environment, **environment},
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.family: dict[int, str] = {}

    def wait_for(self, text: str, seconds: float = 600) -> None:
        """Until it has printed ``text``."""
        wait(lambda: text in self.output.read_text() or self.process.poll() is not None, seconds, text)
        assert text in self.output.read_text(), self.output.read_text()
        self.family |= descendants(self.process.pid)

    def end(self, how: signal.Signals, seconds: float = 120) -> int:
        """Send a signal; returns the exit code. It must end in time."""
        self.family |= descendants(self.process.pid)
        self.process.send_signal(how)
        return self.process.wait(timeout=seconds)

    def left(self) -> dict[int, str]:
        """Processes of its family that still run."""
        return {pid: command for pid, command in self.family.items() if describe(pid) == command}

    def members(self, pattern: str) -> list[int]:
        """Processes under it whose command line holds ``pattern``."""
        self.family |= descendants(self.process.pid)
        return [pid for pid, command in self.left().items() if re.search(pattern, command)]

    def graphql(self, query: str, **variables: Any) -> Any:
        """Ask the web server as its pages do."""
        body = json.dumps({"query": query, "variables": variables}).encode()
        address = f"http://127.0.0.1:{self.port}/graphql"
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as response:
            content = json.load(response)
        assert "errors" not in content, content
        return content["data"]

    def clean_up(self) -> None:
        """End what is left of it."""
        if self.process.poll() is None:
            self.family |= descendants(self.process.pid)
            self.process.send_signal(signal.SIGINT)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
        for pid in self.left():
            os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait(until: Callable[[], object], seconds: float, what: str) -> None:
    """Poll until something holds."""
    end = time.monotonic() + seconds
    while not until():
        assert time.monotonic() < end, f"waited {seconds} s for: {what}"
        time.sleep(0.25)


def describe(pid: int) -> str:
    """Start time and command line of a running process; empty when it is gone or a zombie."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else f"{fields[19]} {command}"


def descendants(pid: int) -> dict[int, str]:
    """Processes under ``pid``, with their descriptions."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except (OSError, IndexError):
            continue
    found: dict[int, str] = {}
    for child in parents:
        above = child
        while above in parents and above != pid:
            above = parents[above]
        if above == pid and child != pid:
            found[child] = describe(child)
    return {child: command for child, command in found.items() if command}
