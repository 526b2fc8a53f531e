"""Dagster's GraphQL and the pages that the tests and the screenshots open."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote
from urllib.request import Request, urlopen

from playwright.sync_api import Page

ROOT = Path(__file__).parent.parent
LOCATION = "evolve_dag"
RUN_SECONDS = 1500.0
"""For one iteration; half a minute on an idle machine."""

STALE = """
query ($keys: [AssetKeyInput!]!, $partition: String!) {
  assetNodes(assetKeys: $keys) { assetKey { path } staleStatus(partition: $partition) }
}"""
RUN = "query ($id: ID!) { runOrError(runId: $id) { ... on Run { status } } }"


CONFIG = """\
extends: {pocket}
experiment: {name}
iterations: 2
tasks:
  train: {{count: 24, world: 11}}
  development: {{count: 12, world: 21}}
  held_out: {{count: 24, world: 31}}
evaluation: {{bootstrap: 200}}
tracking: {{trajectories: 2}}
"""
"""An iteration of half a minute."""


@dataclass(frozen=True, slots=True)
class Place:
    """What the tests share."""

    folder: Path
    """Working folder: ``configs`` and ``store`` are in it."""
    dagster: str
    """Address, without a slash at the end."""
    mlflow: str

    def write_config(self, name: str, more: str = "") -> None:
        """Write ``configs/<name>.yaml``."""
        text = CONFIG.format(pocket=ROOT / "configs" / "pocket.yaml", name=name)
        (self.folder / "configs" / f"{name}.yaml").write_text(text + more)


class Dagster:
    """Questions to a running Dagster that no page answers well: how a run ended, what is unsynced."""

    def __init__(self, address: str) -> None:
        self.address = address

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        """The data of a GraphQL query.

        Raises:
            AssertionError: Dagster reports errors.
        """
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = Request(f"{self.address}/graphql", body, {"content-type": "application/json"})
        with urlopen(request, timeout=120) as answer:
            content = json.loads(answer.read())
        assert "errors" not in content, content["errors"]
        data: dict[str, Any] = content["data"]
        return data

    def wait_for_run(self, run_id: str) -> str:
        """``SUCCESS``, ``FAILURE`` or ``CANCELED``, once the run has ended."""
        end = time.monotonic() + RUN_SECONDS
        status = "?"
        while time.monotonic() < end:
            status = self.ask(RUN, id=run_id)["runOrError"]["status"]
            if status in ("SUCCESS", "FAILURE", "CANCELED"):
                return str(status)
            time.sleep(1)
        raise AssertionError(f"run {run_id} is {status} after {RUN_SECONDS:.0f} s")

    def unsynced(self, steps: tuple[str, ...], partition: str) -> set[str]:
        """Assets whose partition Dagster calls stale."""
        nodes = self.ask(STALE, keys=[{"path": [step]} for step in steps], partition=partition)["assetNodes"]
        return {node["assetKey"]["path"][-1] for node in nodes if node["staleStatus"] == "STALE"}

    def asset(self, step: str, *, partition: str = "", view: str = "events") -> str:
        """Address of a page of an asset."""
        chosen = f"&partition={quote(partition, safe='')}" if partition else ""
        return f"{self.address}/assets/{step}?view={view}{chosen}"

    def job(self, name: str) -> str:
        """Address of a job's graph, where it is launched."""
        return f"{self.address}/locations/{LOCATION}/jobs/{name}"

    def run(self, run_id: str) -> str:
        """Address of a run."""
        return f"{self.address}/runs/{run_id}"


def launch_iteration(page: Page, dagster: Dagster, experiment: str, iteration: str) -> str:
    """Materialize one iteration from the job's page, as a person does; returns the run's id."""
    page.goto(dagster.job("iteration"))
    page.get_by_role("button", name="Materialize all").click()
    for key in (experiment, iteration):
        page.get_by_text("Select a partition or create one").first.click()
        page.get_by_text(key, exact=True).filter(visible=True).last.click()
        page.keyboard.press("Escape")
    return launch(page)


def launch(page: Page) -> str:
    """Press the launch button of the open dialog and follow the run; returns its id."""
    page.get_by_role("button", name="Launch 1 run").click()
    page.get_by_text("Launched run").wait_for()
    page.get_by_role("link", name="View", exact=True).or_(page.get_by_role("button", name="View", exact=True)).click()
    page.wait_for_url("**/runs/*")
    return page.url.rsplit("/", 1)[1].partition("?")[0]


def close_dialogs(page: Page) -> None:
    """MLflow greets a new browser with a panel and hints that cover the page."""
    page.wait_for_timeout(1500)  # they come a moment after the page
    for name in ("Got it", "Close"):
        button = page.get_by_role("button", name=name).filter(visible=True)
        if button.count():
            button.first.click()
