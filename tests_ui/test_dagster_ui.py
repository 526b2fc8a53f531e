"""What a person does and sees in the Dagster UI."""

from __future__ import annotations

import time

import pytest
from playwright.sync_api import Page, expect
from ui_pages import Dagster, Place, launch

STEPS = ("policy", "trajectories", "experience", "contexts", "adapter", "scores", "promotion")
TICK_SECONDS = 120.0
"""``config_watch`` looks every 30 s."""


def test_the_location_loads_without_a_dialog_in_the_way(page: Page, dagster: Dagster) -> None:
    page.goto(f"{dagster.address}/locations")
    expect(page.get_by_text("Loaded").first).to_be_visible()
    expect(page.get_by_text("evolve_dag").first).to_be_visible()
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.goto(f"{dagster.address}/locations/evolve_dag/asset-groups/loop/list")
    for step in STEPS:
        expect(page.locator(f'a[href="/assets/{step}"]')).to_be_visible()


def test_an_iteration_that_was_launched_with_the_mouse_finishes(page: Page, dagster: Dagster, first_run: str) -> None:
    page.goto(dagster.run(first_run))
    expect(page.get_by_text("Success", exact=True).first).to_be_visible()
    expect(page.get_by_text("tiny|01").first).to_be_visible()
    expect(page.get_by_text("Succeeded (7)")).to_be_visible()


def test_a_materialization_shows_picture_tables_and_numbers(page: Page, dagster: Dagster, first_run: str) -> None:
    page.goto(dagster.asset("scores", partition="tiny|01", view="partitions"))
    picture = page.get_by_alt_text("success over iterations")
    expect(picture).to_be_visible()
    assert picture.evaluate("image => image.complete && image.naturalWidth") == 415
    expect(page.get_by_role("columnheader", name="95% interval")).to_be_visible()
    expect(page.get_by_role("cell", name="development candidate", exact=True)).to_be_visible()
    expect(page.get_by_role("columnheader", name="task_id")).to_be_visible()
    expect(page.get_by_text("success_without_low", exact=True)).to_be_visible()
    expect(page.get_by_role("link", name="adapter", exact=True).first).to_have_attribute(
        "href", "/assets/adapter?view=partitions&partition=tiny%7C01"
    )
    page.goto(dagster.asset("trajectories", partition="tiny|01", view="overview"))
    expect(page.get_by_text("1 right, 0 wrong, between them a part of it; empty: could not be judged.")).to_be_visible()
    expect(page.get_by_text("team:evolve-dag").or_(page.get_by_text("evolve-dag", exact=True)).first).to_be_visible()


def test_the_numbers_are_plotted(page: Page, dagster: Dagster, first_run: str) -> None:
    page.goto(dagster.asset("scores", view="overview"))
    page.get_by_role("button", name="Plots").click()
    expect(page.get_by_text("success_without", exact=True)).to_be_visible()
    assert page.locator("canvas").count() > 3


@pytest.mark.parametrize(
    ("step", "check", "evidence"),
    [
        ("experience", "within_cap", "distinct_ids"),
        ("contexts", "clean", "experience_in_student_view"),
        ("contexts", "same_actions", "teacher_distributions"),
        ("adapter", "finite_loss", "broken_tensors"),
        ("scores", "judged", "failed_episodes"),
        ("promotion", "gate", "premature_rise"),
    ],
)
def test_the_checks_show_their_evidence(
    page: Page, dagster: Dagster, first_run: str, step: str, check: str, evidence: str
) -> None:
    page.goto(f"{dagster.asset(step, view='checks')}&checkDetail={check}")
    page.get_by_text(check, exact=True).first.click()
    expect(page.get_by_text("Latest execution")).to_be_visible()
    expect(page.get_by_text(evidence, exact=True).first).to_be_visible()


def test_the_closing_edge_is_a_link_in_both_directions(page: Page, dagster: Dagster, first_run: str) -> None:
    page.goto(dagster.asset("promotion", partition="tiny|01", view="partitions"))
    page.get_by_role("link", name="policy[tiny|02]").click()
    page.wait_for_url("**/assets/policy?**")
    expect(page.get_by_text("decided_by", exact=True)).to_be_visible()
    page.get_by_role("link", name="promotion[tiny|01]").click()
    page.wait_for_url("**/assets/promotion?**")
    expect(page.get_by_text("commits", exact=True)).to_be_visible()


def test_iteration_2_refuses_without_the_promotion_of_iteration_1(page: Page, dagster: Dagster, place: Place) -> None:
    page.goto(dagster.asset("policy", partition="lone|02", view="partitions"))
    page.get_by_role("button", name="Materialize").first.click()
    run_id = launch(page)
    assert dagster.wait_for_run(run_id) == "FAILURE"
    expect(page.get_by_text("policy[lone|02] is not promoted yet").first).to_be_visible()
    expect(page.get_by_text("materialize promotion[lone|01] first").first).to_be_visible()


def test_a_config_change_makes_exactly_its_readers_unsynced(page: Page, dagster: Dagster, place: Place, first_run: str) -> None:
    assert dagster.unsynced(STEPS, "tiny|01") == set()
    place.write_config("tiny", "selection: {selector: lexical}\n")
    try:
        wait_until_unsynced(dagster, {"contexts", "scores"})
        for step in STEPS:
            page.goto(dagster.asset(step, partition="tiny|01", view="partitions"))
            expect(page.get_by_text("Materialized", exact=True).first).to_be_visible()
            expect(page.get_by_text("path", exact=True).first).to_be_visible()
            expect(page.get_by_text("Unsynced")).to_have_count(1 if step in ("contexts", "scores") else 0)
    finally:
        place.write_config("tiny")
    wait_until_unsynced(dagster, set())


def wait_until_unsynced(dagster: Dagster, expected: set[str]) -> None:
    """Wait for a tick of ``config_watch`` and what follows from it."""
    end = time.monotonic() + TICK_SECONDS
    found = dagster.unsynced(STEPS, "tiny|01")
    while found != expected and time.monotonic() < end:
        time.sleep(2)
        found = dagster.unsynced(STEPS, "tiny|01")
    assert found == expected
