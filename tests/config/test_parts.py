"""One row a choice: every row can be looked up, says what is true of it, and costs no heavy import."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path
from typing import get_args

import pytest

from evolve_dag import prompts
from evolve_dag.config.loading import is_study, load_experiment
from evolve_dag.config.parts import CHOICES, Part, part, parts
from evolve_dag.config.schema import Experiment, HelperRole
from evolve_dag.errors import ConfigError
from evolve_dag.steps.needs import absent_programs

ROOT = Path(__file__).parents[2]
ALL = [(kind, name) for kind, choice in CHOICES.items() for name in choice.rows]
HEAVY = "torch transformers mlflow dagster polars duckdb plotly openai httpx trafilatura markitdown math_verify"


def load(folder: Path, text: str) -> Experiment:
    (folder / "x.yaml").write_text(text)
    return load_experiment(folder / "x.yaml")


@pytest.mark.parametrize(("kind", "name"), ALL, ids=[f"{kind}-{name}" for kind, name in ALL])
def test_a_row_says_what_is_true_of_it(kind: str, name: str) -> None:
    row = part(kind, name)
    if not isinstance(row, Part):
        return
    assert row.settings.__doc__
    named = row.settings.model_fields[CHOICES[kind].key]
    assert get_args(named.annotation) == (name,)
    assert named.default == name
    if any(field.is_required() for field in row.settings.model_fields.values()):
        return
    settings = row.settings()
    assert set(row.roles(settings)) <= set(get_args(HelperRole))
    for prompt in row.prompts(settings, Experiment(experiment="x")):
        prompts.load(prompt)


def test_what_a_part_needs_is_brought_by_an_extra_of_this_package() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    needed = {(library, extra) for _, _, row in parts() for library, extra in row.libraries.items()}
    assert needed
    for library, extra in needed:
        assert any(line.startswith(library.replace("_", "-")) for line in extras[extra]), (library, extra)


def test_looking_a_row_up_imports_nothing_heavy() -> None:
    look = "[part(kind, name) for kind, choice in CHOICES.items() for name in choice.rows]"
    code = f"import sys; from evolve_dag.config.parts import CHOICES, part; {look}; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    assert not set(HEAVY.split()) & {name.split(".")[0] for name in loaded}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "selection: {min_items: 2}",
            "selection.min_items: unknown key: it belongs to `selector: llm`, and this is `selector: state`",
        ),
        ("selection: {selector: lexical, top_p: 0.5}", "selection.top_p: unknown key: it belongs to `selector: llm`"),
        ("extraction: {extractor: llm, min_lift: 0.1}", "it belongs to `extractor: contrast`, and this is `extractor: llm`"),
        ("extraction: {domain: mathematics}", "extraction.domain: unknown key: it belongs to `extractor: llm`"),
        ("verification: {verdict: json}", "it belongs to `kind: judge`, and this is `kind: exact`"),
        ("environment: {pages: x.jsonl}", "environment.pages: unknown key: it belongs to `kind: corpus`"),
        ("environment: {system: x}", "it belongs to `kind: corpus or tools`"),
        (
            "models: {extractor: {backend: openai, model: m, gpu_memory: 0.5}}",
            "models.extractor.gpu_memory: unknown key: it belongs to",
        ),
        ("selection: {selector: llm, min_itmes: 2}", "selection.min_itmes: unknown key (did you mean 'min_items'?)"),
        (
            "selection: {selector: nearest}",
            "selection.selector: should be 'state', 'lexical', 'embedding' or 'llm', not 'nearest'",
        ),
        ("selection: {selector: [llm]}", "selection.selector: should be 'state'"),
        ("selection: llm", "selection: should be a mapping, not 'llm'"),
        ("models: {extractor: oracle}", "models.extractor: should be a mapping or 'policy', not 'oracle'"),
        (
            "models: {policy: {backend: openai, model: m}}",
            "models.policy.backend: should be 'transformers' or 'vllm', not 'openai'",
        ),
        (
            "regime: {divergence: renyi}",
            "regime.divergence: should be 'forward_kl', 'reverse_kl', 'jsd' or 'cross_entropy', not 'renyi'",
        ),
        ("tasks: {train: {suite: gaia}}", "tasks.train.suite: should be 'jsonl'"),
        ("tasks: {train: {world: 2000000, count: 4}}", "tasks.train.world: 2000000 is a pretraining world"),
    ],
)
def test_mistakes_about_parts_name_file_key_and_remedy(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text)
    assert "1 mistake\n" in str(caught.value)
    assert told in str(caught.value)
    assert "x.yaml: " in str(caught.value)


def test_another_part_keeps_of_the_inherited_section_what_it_has_too(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "selection: {selector: llm, min_items: 2, max_items: 5}\nextraction: {min_support: 3, cap: 7}\n"
    )
    e = load(tmp_path, "extends: base.yaml\nselection: {selector: lexical}\nextraction: {extractor: llm}\n")
    assert e.selection.model_dump() == {"selector": "lexical", "max_items": 5}
    assert e.extraction.cap == 7
    same = load(tmp_path, "extends: base.yaml\nselection: {selector: llm, temperature: 0.0}\n")
    assert same.selection.model_dump()["min_items"] == 2
    with pytest.raises(ConfigError, match="belongs to `selector: llm`"):  # what this file says itself is no inheritance
        load(tmp_path, "extends: base.yaml\nselection: {selector: lexical, min_items: 1}\n")


def test_an_experiment_comes_back_from_its_json() -> None:
    for path in (p for p in (ROOT / "configs").glob("*.yaml") if not is_study(p)):
        e = load_experiment(path)
        assert Experiment.model_validate_json(e.model_dump_json()) == e


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("", ["in_process"] * 4),
        ("subprocess", ["subprocess"] * 4),
        ("{kind: ray, workers: 2}", ["ray"] * 4),
        ("{adapter: subprocess}", ["in_process", "in_process", "subprocess", "in_process"]),
        ("{kind: ray, adapter: {kind: subprocess}}", ["ray", "ray", "subprocess", "ray"]),
    ],
)
def test_a_launcher_is_named_for_all_heavy_steps_or_by_step(tmp_path: Path, text: str, kinds: list[str]) -> None:
    experiment = load(tmp_path, f"runtime: {{launcher: {text}}}" if text else "seed: 1")
    launchers = experiment.runtime.launcher
    assert [getattr(launchers, step).kind for step in ("trajectories", "contexts", "adapter", "scores")] == kinds
    assert Experiment.model_validate(experiment.model_dump(mode="json")) == experiment  # as a worker gets it


@pytest.mark.parametrize(
    ("inherited", "own", "expected"),
    [
        ("ray", "{adapter: subprocess}", ["ray", "ray", "subprocess", "ray"]),
        ("{kind: ray, workers: 4}", "{kind: subprocess}", ["subprocess"] * 4),
        ("{kind: ray, adapter: subprocess}", "in_process", ["in_process"] * 4),
        ("{adapter: {kind: ray, cpus: 2}}", "{adapter: subprocess}", ["in_process", "in_process", "subprocess", "in_process"]),
        ("{kind: ray, workers: 4}", "{workers: 2}", ["ray"] * 4),
    ],
)
def test_a_launcher_is_laid_over_another(tmp_path: Path, inherited: str, own: str, expected: list[str]) -> None:
    (tmp_path / "base.yaml").write_text(f"runtime: {{launcher: {inherited}}}\n")
    found = load(tmp_path, f"extends: base.yaml\nruntime: {{launcher: {own}}}\n").runtime.launcher
    assert [getattr(found, step).kind for step in type(found).model_fields] == expected


MINE = """
from evolve_dag.assets.launchers import LauncherPart
from evolve_dag.config.parts import LauncherSettings

class Mine(LauncherSettings):
    '''Somewhere.'''

    kind: str = "mine"
    '''Somewhere.'''

ROW = LauncherPart(settings=Mine, make=lambda settings: None)
"""


@pytest.mark.parametrize("text", ["'beside:ROW'", "{kind: 'beside:ROW'}", "{adapter: 'beside:ROW'}"])
def test_a_launcher_may_lie_beside_the_file_that_names_it(tmp_path: Path, text: str) -> None:
    (tmp_path / "beside.py").write_text(MINE)
    assert load(tmp_path, f"runtime: {{launcher: {text}}}\n").runtime.launcher.adapter.kind == f"{tmp_path}/beside.py:ROW"


def test_a_launcher_s_interpreter_lies_beside_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "base.yaml").write_text("runtime: {launcher: {kind: subprocess, python: venv/bin/python}}\n")
    e = load(tmp_path / "below", "extends: ../base.yaml\nruntime: {launcher: {scores: in_process}}\n")
    assert e.runtime.launcher.adapter.model_dump()["python"] == f"{tmp_path}/venv/bin/python"
    assert absent_programs(e) == [f"runtime.launcher.python: {tmp_path}/venv/bin/python: no such program"]
    one = load(tmp_path, "runtime: {launcher: {adapter: {kind: subprocess, python: gone/python}}}\n")
    assert absent_programs(one) == [f"runtime.launcher.adapter.python: {tmp_path}/gone/python: no such program"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("slurm", "runtime.launcher.kind: should be 'in_process', 'subprocess', 'ray' or 'kubernetes', not 'slurm'"),
        ("{adapter: slurm}", "runtime.launcher.adapter.kind: should be 'in_process'"),
        ("{adaptr: ray}", "runtime.launcher.adaptr: unknown key (did you mean 'adapter'?)"),
        ("{kind: kubernetes}", "runtime.launcher.image: missing"),
        ("{kind: ray, wrkers: 2}", "runtime.launcher.wrkers: unknown key"),
    ],
)
def test_a_mistake_about_a_launcher_is_told_once(tmp_path: Path, text: str, told: str) -> None:
    with pytest.raises(ConfigError) as error:
        load(tmp_path, f"runtime: {{launcher: {text}}}")
    assert "1 mistake\n" in error.value.what
    assert told in error.value.what
