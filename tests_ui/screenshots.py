"""The pictures of docs/images, taken from what ``evolve ui`` shows of a finished experiment.

Commands::

    evolve run configs/pocket.yaml && evolve sync-mlflow pocket
    evolve ui                                            # in another terminal
    python tests_ui/screenshots.py pocket 3              # experiment, iteration
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote
from urllib.request import Request, urlopen

from playwright.sync_api import Page, sync_playwright
from ui_pages import ROOT, Dagster, close_dialogs

WIDTH = 1400
COLOURS = 256
"""The interfaces use few colours; a palette keeps a picture below 300 kB."""


def lineage(page: Page, dagster: Dagster) -> None:
    """The seven assets of the loop."""
    page.set_viewport_size({"width": 2400, "height": 1250})  # Dagster leaves the details out where they have no room
    page.goto(f"{dagster.address}/locations/evolve_dag/asset-groups/loop/lineage")
    page.get_by_text("promotion", exact=True).first.wait_for()
    page.get_by_text("Hide navigation").click()
    page.wait_for_timeout(1000)
    page.reload()  # the graph is fitted to the page when it opens
    page.get_by_text("promotion", exact=True).first.wait_for()
    page.wait_for_timeout(6000)


def asset(page: Page, dagster: Dagster, partition: str) -> None:
    """Scores of one iteration: picture, results, rows."""
    page.set_viewport_size({"width": WIDTH, "height": 1050})
    page.goto(dagster.asset("scores", partition=partition, view="partitions"))
    page.get_by_alt_text("success over iterations").wait_for()
    page.get_by_text("Hide navigation").click()
    page.wait_for_timeout(3000)


def run(page: Page, mlflow: str, experiment_id: str, partition: str) -> None:
    """The training curves of one iteration."""
    page.set_viewport_size({"width": WIDTH, "height": 1000})
    page.goto(f"{mlflow}/#/experiments/{experiment_id}/runs/{run_of(mlflow, experiment_id, partition)}/model-metrics")
    page.get_by_placeholder("Search metric charts").wait_for()
    close_dialogs(page)
    page.get_by_placeholder("Search metric charts").fill("train/")
    page.wait_for_timeout(6000)


def trace(page: Page, mlflow: str, experiment_id: str) -> None:
    """One trajectory with experience in its context."""
    page.set_viewport_size({"width": WIDTH, "height": 800})
    page.goto(f"{mlflow}/#/experiments/{experiment_id}/traces")
    page.get_by_text("What is the").first.wait_for()
    close_dialogs(page)
    page.locator("tr, [role=row]").filter(has_text="with/").get_by_text("What is the").first.click()
    page.get_by_text("step 2", exact=True).click()
    page.mouse.move(WIDTH // 2, 700)
    page.wait_for_timeout(3000)


def run_of(mlflow: str, experiment_id: str, partition: str) -> str:
    """Id of the MLflow run of a partition."""
    body = json.dumps({"experiment_ids": [experiment_id], "filter": f"tags.`evolve.partition` = '{partition}'"}).encode()
    request = Request(f"{mlflow}/api/2.0/mlflow/runs/search", body, {"content-type": "application/json"})
    with urlopen(request, timeout=60) as answer:
        return str(json.loads(answer.read())["runs"][0]["info"]["run_id"])


def experiment_of(mlflow: str, name: str) -> str:
    """Id of the MLflow experiment."""
    with urlopen(f"{mlflow}/api/2.0/mlflow/experiments/get-by-name?experiment_name={quote(name)}", timeout=60) as answer:
        return str(json.loads(answer.read())["experiment"]["experiment_id"])


def save(page: Page, path: Path) -> None:
    """A picture with a palette, ``WIDTH`` pixels wide."""
    from PIL import Image

    page.screenshot(path=path)
    with Image.open(path) as picture:
        whole = picture.convert("RGB")
        height = round(whole.height * WIDTH / whole.width)
        whole.resize((WIDTH, height), Image.Resampling.LANCZOS).quantize(COLOURS).save(path, optimize=True)
    print(f"{path}: {path.stat().st_size // 1000} kB")


def main() -> None:
    """Take the four pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment")
    parser.add_argument("iteration", type=int)
    parser.add_argument("--dagster", default="http://127.0.0.1:3000")
    parser.add_argument("--mlflow", default="http://127.0.0.1:5000")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "images")
    arguments = parser.parse_args()
    dagster, partition = Dagster(arguments.dagster), f"{arguments.experiment}|{arguments.iteration:02d}"
    experiment_id = experiment_of(arguments.mlflow, arguments.experiment)
    pictures: dict[str, Callable[[Page], None]] = {
        "dagster-lineage": lambda page: lineage(page, dagster),
        "dagster-asset": lambda page: asset(page, dagster, partition),
        "mlflow-run": lambda page: run(page, arguments.mlflow, experiment_id, partition),
        "mlflow-trace": lambda page: trace(page, arguments.mlflow, experiment_id),
    }
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        for name, open_page in pictures.items():
            page = browser.new_page()
            page.set_default_timeout(60_000)
            open_page(page)
            save(page, arguments.out / f"{name}.png")
            page.close()
        browser.close()


if __name__ == "__main__":
    main()
