"""``evolve ui`` starts both interfaces, tells their addresses, and leaves no process behind, however it ends."""

from __future__ import annotations

import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from living import Place, free_port, wait


@pytest.fixture
def place(tmp_path: Path) -> Place:
    made = Place(tmp_path)
    made.config("tiny")
    return made


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_both_answer_and_both_end(place: Place, how: signal.Signals) -> None:
    with place.ui() as ui:
        ui.wait_for("Ctrl-C ends both")
        printed = ui.output.read_text()
        for name, port in (("Dagster", ui.port), ("MLflow", ui.mlflow_port)):
            assert re.search(rf"^{name} +http://127\.0\.0\.1:{port}$", printed, re.MULTILINE), printed
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=30) as response:
                assert response.status == 200
        [location] = ui.graphql("{workspaceOrError{... on Workspace{locationEntries{name loadStatus}}}}")["workspaceOrError"][
            "locationEntries"
        ]
        assert location["name"] == "evolve_dag"
        assert ui.graphql("{shouldShowNux}")["shouldShowNux"] is False
        assert ui.graphql("{instance{runQueuingSupported}}")["instance"]["runQueuingSupported"] is True
        assert len(ui.family) >= 6, "watchdog, dagster dev, its web server, daemon and code server, MLflow"
        begun = time.monotonic()
        assert ui.end(how) == 0
        assert time.monotonic() - begun < 15
        assert ui.left() == {}


def test_nothing_outlives_a_killed_parent(place: Place) -> None:
    with place.ui() as ui:
        ui.wait_for("Ctrl-C ends both")
        ui.end(signal.SIGKILL)
        wait(lambda: not ui.left(), 30, "the watchdog to end what was left")


def test_when_one_ends_by_itself_the_other_is_ended_and_it_is_told(place: Place) -> None:
    with place.ui() as ui:
        ui.wait_for("Ctrl-C ends both")
        [server] = ui.members(r"-m mlflow server")
        subprocess.run(["kill", "-9", str(server)], check=True)
        assert ui.process.wait(30) == 1
        printed = ui.output.read_text()
        assert "MLflow has ended by itself (code -9)" in printed
        assert "Traceback" not in printed.split("its log ends:")[0]
        wait(lambda: not ui.left(), 30, "the other one to end")


def test_a_server_elsewhere_is_named_and_not_started(place: Place) -> None:
    with place.ui(environment={"MLFLOW_TRACKING_URI": "http://user:hidden@tracking.invalid:5000"}) as ui:
        ui.wait_for("Ctrl-C ends it")
        printed = ui.output.read_text()
        assert "MLflow   http://tracking.invalid:5000" in printed
        assert "hidden" not in printed
        assert ui.members("mlflow server") == []
        assert ui.end(signal.SIGINT) == 0
        assert ui.left() == {}


@pytest.mark.parametrize("option", ["--port", "--mlflow-port"])
def test_a_port_that_is_taken_is_told_at_once(place: Place, option: str) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        ports = {"--port": free_port(), "--mlflow-port": free_port()} | {option: taken.getsockname()[1]}
        arguments = [str(part) for pair in ports.items() for part in pair]
        command = [sys.executable, "-m", "evolve_dag", "ui", *arguments]
        done = subprocess.run(command, cwd=place.folder, env=place.environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 2
    assert f"port {ports[option]} on 127.0.0.1 cannot be used" in done.stderr
    assert f"evolve ui {option}" in done.stderr
    assert "Traceback" not in done.stderr
