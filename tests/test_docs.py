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


@pytest.mark.parametrize("page", ["README.md", "docs/LOG.md", "docs/pocket_model_card.md", "CONTEXT.md", "CHANGELOG.md"])
def test_pages_are_finished_and_their_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    assert not re.findall(r"@[A-Z]+@", text)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


def test_figures_of_the_readme_are_those_that_were_measured() -> None:
    """The bold figure and its row come from docs/figures.json."""
    results = json.loads((ROOT / "docs/figures.json").read_text())
    readme = (ROOT / "README.md").read_text()
    for arm in ("pocket", "lexical"):
        runs = [r["rows"] for r in results if r["arm"] == arm]
        assert len(runs) == 3
        row = next(line for line in readme.splitlines() if line.startswith("|") and f"configs/{arm}.yaml" in line)
        for condition, k in (("base", 0), ("without", 2), ("with", 2)):
            assert f"{sum(rows[k][condition]['success'] for rows in runs) / 3:.1%}" in row
