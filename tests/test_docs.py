"""What the documents say is what the code does."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest

from evolve_dag.config.reference import reference

ROOT = Path(__file__).parent.parent


def test_configuration_page_is_current() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == reference(), "run: python -m evolve_dag.config.reference"


def test_every_key_is_explained() -> None:
    empty = [line for line in reference().splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not empty


def test_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text


@pytest.mark.parametrize(
    "page",
    ["README.md", "docs/LOG.md", "docs/pocket_model_card.md", "CONTEXT.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"],
)
def test_pages_are_finished_and_their_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    assert not re.findall(r"@[A-Z]+@", text)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


def test_figures_of_the_readme_are_those_that_were_measured() -> None:
    """The rows of the nights come from docs/study/success.csv, the mean over seeds, and the differences from contrasts.csv."""
    with (ROOT / "docs/study/success.csv").open() as file:
        found = [row for row in csv.DictReader(file) if row["arm"] == "pocket" and row["seed"] == ""]
    readme = (ROOT / "README.md").read_text().replace("*", "")
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    for condition, begin in (("without", "| without experience in context (`configs/pocket.yaml`)"), ("with", "| with it")):
        cells = [f"{float(row['success']):.1%}" for row in found if row["condition"] == condition]
        assert len(cells) >= 10
        (told,) = [row for row in rows if row.startswith(begin)]
        assert [cell.strip() for cell in told.split("|")[2:-1] if cell.strip()] == cells
    with (ROOT / "docs/study/contrasts.csv").open() as file:
        last = {row["question"]: row for row in csv.DictReader(file) if row["arm"] == "pocket" and row["iteration"] == "10"}
    for question in ("first", "best"):
        low, middle, high = (100 * float(last[question][key]) for key in ("tasks_low", "difference", "tasks_high"))
        assert f"{middle:.1f} points" in readme
        assert f"({low:.1f} to {high:.1f})" in readme or f"({low:.1f} to {high:.1f};" in readme
