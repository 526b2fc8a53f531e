"""What a person sees in the MLflow UI after an iteration; nobody has sent anything by hand."""

from __future__ import annotations

from playwright.sync_api import Page, expect
from ui_pages import Dagster, Place, close_dialogs


def test_the_asset_leads_to_mlflow(page: Page, dagster: Dagster, place: Place, champion: str) -> None:
    page.goto(dagster.asset("scores", partition="tiny|01", view="partitions"))
    link = page.get_by_role("link", name=place.mlflow).first
    address = link.get_attribute("href")
    assert address is not None
    page.goto(address)
    expect(page.get_by_text("tiny", exact=True).first).to_be_visible()


def test_the_run_of_an_iteration(page: Page, place: Place, champion: str) -> None:
    open_model(page, place)
    page.get_by_role("link", name=f"Version {champion}").click()
    page.get_by_role("link", name="iteration 01").click()
    close_dialogs(page)
    expect(page.get_by_role("heading", name="iteration 01")).to_be_visible()
    expect(page.get_by_text("Finished").first).to_be_visible()
    expect(page.get_by_text("evolve.partition").first).to_be_visible()
    expect(page.get_by_text("success/without", exact=True).first).to_be_attached()


def test_the_trace_of_a_trajectory(page: Page, place: Place, champion: str) -> None:
    page.goto(f"{place.mlflow}/#/experiments/1/traces")
    page.get_by_text("What is the").first.wait_for()
    close_dialogs(page)
    page.get_by_text("What is the").first.click()
    expect(page.get_by_text("step 1", exact=True)).to_be_visible()
    expect(page.get_by_text("search", exact=True).first).to_be_visible()
    page.get_by_text("step 1", exact=True).click()
    page.get_by_role("tab", name="Attributes").click()
    expect(page.get_by_text("evolve.logprob_mean", exact=True)).to_be_visible()


def test_the_registered_model_has_its_champion(page: Page, place: Place, champion: str) -> None:
    open_model(page, place)
    expect(page.get_by_text("@ champion").first).to_be_visible()
    expect(page.get_by_text(f"Version {champion}", exact=True).first).to_be_visible()


def open_model(page: Page, place: Place) -> None:
    """The page of the registered model."""
    page.goto(f"{place.mlflow}/#/models/tiny")
    page.get_by_text("Versions", exact=True).first.wait_for()
    close_dialogs(page)
