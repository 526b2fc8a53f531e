"""What the documents say is what the code does."""

from __future__ import annotations

import json
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
    """The row of the nights comes from docs/nights.json."""
    runs = [result["rows"] for result in json.loads((ROOT / "docs/nights.json").read_text())]
    assert len(runs) == 2
    readme = (ROOT / "README.md").read_text().replace("**", "")
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    first = next(row for row in rows if "configs/pocket.yaml" in row)
    for k in range(6):
        assert f"{sum(rows[k]['without']['success'] for rows in runs) / 2:.1%}" in first
    assert f"{sum(rows[0]['base']['success'] for rows in runs) / 2:.1%}" in first
    second = next(row for row in rows if row.startswith("| with it"))
    for k in range(6):
        assert f"{sum(rows[k]['with']['success'] for rows in runs) / 2:.1%}" in second
