"""What is missing is told at once, before anything is made."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from evolve_dag.config.loading import load_experiment
from evolve_dag.config.schema import SHIPPED, Experiment
from evolve_dag.errors import DataError, ModelError
from evolve_dag.inference.folders import is_pocket
from evolve_dag.lineage.planning import plan
from evolve_dag.steps.needs import absent_files, absent_programs, require_files, unset_keys
from evolve_dag.steps.preflight import preflight
from evolve_dag.store.artifacts import Store

CONFIGS = Path(__file__).parents[2] / "configs"


def of(folder: Path, text: str) -> Experiment:
    (folder / "x.yaml").write_text(text)
    return load_experiment(folder / "x.yaml")


def test_the_files_for_a_gpu_tell_all_that_they_lack_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.which", lambda name: None)  # `make vllm` may have been here
    experiment = load_experiment(CONFIGS / "qwen3_4b_web.yaml")
    with pytest.raises(DataError) as told:
        plan(experiment, Store(tmp_path / "store"))
    for key in ("models.policy.path", "tasks.train.path", "tasks.development.path", "tasks.held_out.path"):
        assert f"{key}: {CONFIGS.parent}" in told.value.what
    assert "docs/benchmarks.md" in told.value.remedy
    assert absent_programs(experiment) == [f"models.policy.python: {CONFIGS.parent}/.venv-vllm/bin/python: no such program"]


def test_what_is_there_or_not_read_is_not_missing(tmp_path: Path) -> None:
    require_files(of(tmp_path, f"extends: {CONFIGS / 'own_corpus.yaml'}\n"))
    unread = "models: {extractor: {path: nowhere}}\n"  # the extractor asks no model
    assert absent_files(of(tmp_path, f"extends: {CONFIGS / 'own_corpus.yaml'}\n{unread}")) == []
    read = "extraction: {extractor: llm}\nselection: {selector: lexical}\n"
    assert absent_files(of(tmp_path, f"extends: {CONFIGS / 'own_corpus.yaml'}\n{unread}{read}")) == [
        f"models.extractor.path: {tmp_path}/nowhere: no model there (config.json, tokenizer.json, *.safetensors)"
    ]
    assert absent_files(of(tmp_path, "environment: {kind: tools, tools: [file], files: gone}\n" + TASKS))[0].startswith(
        f"environment.files: {tmp_path}/gone: no such"
    )


@pytest.mark.parametrize("name", SHIPPED)
def test_a_policy_that_ships_is_there(tmp_path: Path, name: str) -> None:
    experiment = of(tmp_path, f"extends: {CONFIGS / 'pocket.yaml'}\nmodels: {{policy: {{path: {name}}}}}\n")
    assert experiment.models.policy.path == name, "a name, no folder beside the file"
    assert absent_files(experiment) == []
    assert is_pocket(experiment.models.policy)


@pytest.mark.parametrize("name", SHIPPED)
def test_what_is_no_model_may_be_called_like_one_that_ships(tmp_path: Path, name: str) -> None:
    experiment = of(tmp_path, f"extends: {CONFIGS / 'own_corpus.yaml'}\nstart_pool: {name}\n")
    assert experiment.start_pool == str(tmp_path / name)


TASKS = "tasks: {train: {path: a}, development: {path: b}, held_out: {path: c}}\n"


def test_a_model_that_is_warmed_up_is_the_warm_ups_affair() -> None:
    assert absent_files(load_experiment(CONFIGS / "textworld_coin.yaml")) == []


def test_an_engine_needs_its_interpreter_and_servers_do_not(tmp_path: Path) -> None:
    def engine(more: str) -> Experiment:
        return of(tmp_path, f"models: {{policy: {{backend: vllm, path: pocket, context_tokens: 2200, {more}}}}}\n")

    assert absent_programs(engine(f"python: {sys.executable}")) == []
    assert absent_programs(engine("python: gone/python, servers: ['http://127.0.0.1:1/v1']")) == []
    missing = engine("python: gone/python")
    with pytest.raises(ModelError, match=r"models\.policy\.python: .*gone/python: no such program"):
        preflight(missing, 1, Store(tmp_path))
    assert any("no such program" in note for note in plan(missing, Store(tmp_path / "store")).notes)


def test_keys_are_told_with_who_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SERPER_API_KEY", "OPENAI_API_KEY", "JINA_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DEEPSEEK_API_KEY", "sk-set")
    found = unset_keys(load_experiment(CONFIGS / "qwen3_4b_web.yaml"))
    assert set(found) == {"SERPER_API_KEY", "OPENAI_API_KEY", "JINA_API_KEY"}
    assert found["OPENAI_API_KEY"] == ["models.judge (verification)"]
    assert unset_keys(load_experiment(CONFIGS / "pocket.yaml")) == {}
