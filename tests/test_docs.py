"""What the documents say is what the code does."""

from __future__ import annotations

import csv
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from small_lineage import copy_of, small

from evolve_dag.config.loading import load_experiment
from evolve_dag.config.outside import group
from evolve_dag.config.parts import CHOICES, part_of
from evolve_dag.config.reference import main, reference
from evolve_dag.config.schema import Experiment
from evolve_dag.experience.pool import Pool
from evolve_dag.inference.roles import Roles
from evolve_dag.records import ExperienceItem
from evolve_dag.steps import base
from evolve_dag.store.artifacts import Store

ROOT = Path(__file__).parent.parent


def test_configuration_page_is_current() -> None:
    assert (ROOT / "docs/configuration.md").read_text() == reference(), "run: python -m evolve_dag.config.reference"


@pytest.mark.parametrize(("given", "written"), [(["--help"], []), (["mine.md"], ["mine.md"])])
def test_the_page_is_written_where_it_is_asked(
    given: list[str], written: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["reference", *given])
    with suppress(SystemExit):
        main()
    assert [path.name for path in tmp_path.iterdir()] == written


def test_a_mistake_in_an_experiment_file_is_told_and_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "slip.yaml").write_text("seeed: 1\n")
    monkeypatch.setattr("sys.argv", ["reference", str(tmp_path / "mine.md"), str(tmp_path / "slip.yaml")])
    with pytest.raises(SystemExit):
        main()
    assert "did you mean 'seed'?" in capsys.readouterr().err
    assert not (tmp_path / "mine.md").exists()


def test_every_variable_of_ours_is_explained() -> None:
    code = "".join(path.read_text() for folder in ("evolve_dag", "assets") for path in sorted((ROOT / folder).rglob("*.py")))
    read = set(re.findall(r'"(EVOLVE_[A-Z_]+)"', code)) - {"EVOLVE_NO_KEY"}  # which is never set
    assert read == set(re.findall(r"^\| `(EVOLVE_[A-Z_]+)`", reference(), re.M))


def test_every_key_is_explained() -> None:
    empty = [line for line in reference().splitlines() if line.startswith("| `") and line.endswith("|  |")]
    assert not empty


def test_readme_names_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text()
    assert "make demo" in text
    assert "make test" in text


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "docs/LOG.md",
        "docs/real_models.md",
        "docs/pocket_model_card.md",
        "CONTEXT.md",
        "CHANGELOG.md",
        "CONTRIBUTING.md",
        "SECURITY.md",
        "docs/extending.md",
    ],
)
def test_pages_are_finished_and_their_links_lead_somewhere(page: str) -> None:
    text = (ROOT / page).read_text()
    assert not re.findall(r"@[A-Z]+@", text)
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        if "://" not in target:
            assert ((ROOT / page).parent / target).exists(), target


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (ROOT / page).read_text(), re.S)


def test_the_selector_of_the_page_on_extending_runs(tmp_path: Path) -> None:
    shutil.copy(ROOT / "configs/pocket.yaml", tmp_path)
    (tmp_path / "mine.py").write_text(blocks("docs/extending.md", "python")[0])
    (tmp_path / "newest.yaml").write_text(blocks("docs/extending.md", "yaml")[0])
    settings = load_experiment(tmp_path / "newest.yaml").selection
    pool = Pool(tuple(ExperienceItem(f"p000{n}", "Search.", "principle") for n in (1, 2, 3)))
    with Roles(Experiment(experiment="x")) as roles:
        chosen = roles.run(part_of("selector", settings).make(settings, roles, 0).select("?", (), pool))
    assert chosen.ids == ("p0002", "p0001")


def test_the_step_of_the_page_on_extending_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_lineage: Store) -> None:
    space: dict[str, Any] = {}
    exec(blocks("docs/extending.md", "python")[1], space)
    spec, store = space["SPEC"], copy_of(small_lineage, tmp_path / "store")
    monkeypatch.setitem(base.SPECS, spec.name, spec)
    artifact = base.run_step(spec.name, small(), 1, store).artifact
    assert artifact.summary["answers"] == artifact.frame(spec.tables[0].file).height > 0
    assert [(one.check, one.passed) for one in spec.examine(artifact, small())] == [("short", True)]


def test_the_page_on_extending_names_what_there_is() -> None:
    page = (ROOT / "docs/extending.md").read_text()
    for kind, choice in CHOICES.items():
        assert f"| `{group(kind)}` | `{choice.row}` |" in page


@pytest.mark.parametrize("file", sorted((ROOT / "docs/study").glob("*/study_*.yaml")), ids=lambda file: file.parent.name)
def test_the_file_of_a_study_makes_the_seeds_that_its_report_is_of(file: Path) -> None:
    with (file.parent / "success.csv").open() as report:
        told = {int(row["seed"]) for row in csv.DictReader(report) if row["seed"]}
    assert told <= set(yaml.safe_load(file.read_text())["seeds"])


def test_figures_of_the_readme_are_those_that_were_measured() -> None:
    """Rows of the nights and differences are those of docs/study/ten_in_context, the mean over seeds."""
    with (ROOT / "docs/study/ten_in_context/success.csv").open() as file:
        found = [row for row in csv.DictReader(file) if row["arm"] == "pocket" and row["seed"] == ""]
    readme = (ROOT / "README.md").read_text().replace("*", "")
    rows = [line for line in readme.splitlines() if line.startswith("|")]
    for condition, begin in (("without", "| without experience in context (`configs/pocket.yaml`)"), ("with", "| with it")):
        cells = [f"{float(row['success']):.1%}" for row in found if row["condition"] == condition]
        assert len(cells) >= 10
        (told,) = [row for row in rows if row.startswith(begin)]
        assert [cell.strip() for cell in told.split("|")[2:-1] if cell.strip()] == cells
    with (ROOT / "docs/study/ten_in_context/contrasts.csv").open() as file:
        last = {row["question"]: row for row in csv.DictReader(file) if row["arm"] == "pocket" and row["iteration"] == "10"}
    for question in ("first", "best"):
        low, middle, high = (100 * float(last[question][key]) for key in ("tasks_low", "difference", "tasks_high"))
        assert f"{middle:.1f} points" in readme
        assert f"({low:.1f} to {high:.1f})" in readme or f"({low:.1f} to {high:.1f};" in readme
