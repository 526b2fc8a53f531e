"""Dagster and MLflow as ``evolve ui`` starts them, on a store of their own, and Chromium in front of them.

The tests of a file tell one story and run in its order. What a failed test saw is left in ``tests_ui/failures``.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import urlopen

import pytest
from playwright.sync_api import Browser, Page, ViewportSize, expect, sync_playwright

sys.path.insert(0, str(Path(__file__).parent))  # ui_pages

from ui_pages import Dagster, Place, launch_iteration

FAILURES = Path(__file__).parent / "failures"
START_SECONDS = 600.0
END_SECONDS = 60.0
SYNC_SECONDS = 600.0
VIEWPORT: ViewportSize = {"width": 1400, "height": 1000}

expect.set_options(timeout=60_000)


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """``evolve ui`` on a fresh store with two experiments, ``tiny`` and ``lone``; every process of it is gone afterwards."""
    folder = tmp_path_factory.mktemp("ui")
    (folder / "configs").mkdir()
    ports = free_port(), free_port()
    place = Place(folder, *(f"http://127.0.0.1:{port}" for port in ports))
    place.write_config("tiny")
    place.write_config("lone", "seed: 1\n")  # else it would share what `tiny` has made, the promotion too
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("DAGSTER_", "MLFLOW_", "EVOLVE_"))}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "EVOLVE_CONFIGS": str(folder / "configs")}
    command = [sys.executable, "-m", "evolve_dag", "ui", "--store", str(folder / "store")]
    command += ["--port", str(ports[0]), "--mlflow-port", str(ports[1])]
    log = folder / "ui.log"
    with log.open("w") as out:
        process = subprocess.Popen(
            command,
            cwd=folder,
            env=environment,
            stdout=out,
            stderr=out,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background job's is ignored
        )
    try:
        for address in (f"{place.dagster}/server_info", f"{place.mlflow}/health"):
            wait_for(address, process, log)
        yield place
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for(address: str, process: subprocess.Popen[bytes], log: Path) -> None:
    """Wait until an address answers.

    Raises:
        AssertionError: it does not, or the process has ended; with the log.
    """
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            with urlopen(address, timeout=5):
                return
        except (URLError, OSError):
            time.sleep(0.5)
    raise AssertionError(f"{address} does not answer\n{log.read_text()}")


@pytest.fixture(scope="session")
def dagster(place: Place) -> Dagster:
    """Dagster by GraphQL, to wait for what takes long and to prepare what a test is not about."""
    return Dagster(place.dagster)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """The system's Chromium, else the one of ``playwright install chromium``."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("chromium-browser"), args=["--no-sandbox"]
        )
        yield browser
        browser.close()


@pytest.fixture
def page(browser: Browser, request: pytest.FixtureRequest) -> Iterator[Page]:
    """A fresh page; on failure its picture and its text are kept."""
    context = browser.new_context(viewport=VIEWPORT, accept_downloads=False)
    page = context.new_page()
    page.set_default_timeout(60_000)
    yield page
    if getattr(request.node, "failed", True):
        FAILURES.mkdir(exist_ok=True)
        page.screenshot(path=FAILURES / f"{request.node.name}.png")
        (FAILURES / f"{request.node.name}.txt").write_text(f"{page.url}\n\n{page.inner_text('body')}")
    context.close()


@pytest.fixture(scope="session")
def first_run(browser: Browser, dagster: Dagster) -> str:
    """``tiny|01``, materialized with the mouse; the id of its run, which has succeeded."""
    page = browser.new_page(viewport=VIEWPORT)
    page.set_default_timeout(60_000)
    run_id = launch_iteration(page, dagster, "tiny", "01")
    page.close()
    assert dagster.wait_for_run(run_id) == "SUCCESS", dagster.run(run_id)
    return run_id


@pytest.fixture(scope="session")
def champion(place: Place, first_run: str) -> str:
    """Version of the registered model ``tiny`` under the alias ``champion``, once the process in the background has sent it."""
    question = f"{place.mlflow}/api/2.0/mlflow/registered-models/alias?name=tiny&alias=champion"
    end = time.monotonic() + SYNC_SECONDS
    while time.monotonic() < end:
        try:
            with urlopen(question, timeout=30) as answer:
                return str(json.loads(answer.read())["model_version"]["version"])
        except HTTPError:
            time.sleep(2)
    raise AssertionError((place.folder / "store" / "tracking" / "sync.log").read_text())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Tell the ``page`` fixture how the test went."""
    report = yield
    if report.when == "call":
        item.failed = report.failed  # type: ignore[attr-defined]
    return report
