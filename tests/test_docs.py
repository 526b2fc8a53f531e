"""What the documents say is what the code does."""

from __future__ import annotations

from pathlib import Path

from evolve_dag.config_reference import reference

ROOT = Path(__file__).parent.parent


def test_configuration_page_is_current() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == reference(), "run: python -m evolve_dag.config_reference"


def test_every_key_is_explained() -> None:
    empty = [line for line in reference().splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not empty


def test_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text
