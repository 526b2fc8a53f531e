"""A recipe that is another model's is told before it is run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evolve_dag.config.loading import is_study, load_experiment
from evolve_dag.config.schema import Experiment, TransformersModelSettings, VllmModelSettings
from evolve_dag.inference.folders import POCKET, longest_context
from evolve_dag.lineage.recipe import warnings

CONFIGS = Path(__file__).parents[2] / "configs"


def over(folder: Path, base: str, text: str) -> Experiment:
    (folder / "x.yaml").write_text(f"extends: {CONFIGS / base}\n{text}\n")
    return load_experiment(folder / "x.yaml")


def test_the_pocket_recipe_over_a_language_model_is_told(tmp_path: Path) -> None:
    [told] = warnings(over(tmp_path, "own_corpus.yaml", f"models: {{policy: {{path: {tmp_path}/llm}}}}"))
    assert "distillation.learning_rate 0.0025" in told
    assert "configs/own_corpus_llm.yaml" in told
    pocket = over(tmp_path, "own_corpus.yaml", f"models: {{policy: {{path: {POCKET}}}}}")
    assert not any("learning_rate" in one for one in warnings(pocket)), "the pocket policy by its folder"


@pytest.mark.parametrize("path", [p for p in sorted(CONFIGS.glob("*.yaml")) if not is_study(p)], ids=lambda p: p.stem)
def test_no_shipped_recipe_is_told(path: Path) -> None:
    assert list(warnings(load_experiment(path))) == []


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ({"sliding_window": 4096}, 4096),
        ({"sliding_window": 4096, "layer_types": ["sliding_attention", "full_attention"]}, 4096),
        ({"sliding_window": 4096, "layer_types": ["full_attention"] * 2}, 65_536),
        ({"sliding_window": 4096, "use_sliding_window": False}, 65_536),
        ({"sliding_window": None}, 65_536),
        ({"text_config": {"sliding_window": 1024}}, 1024),
        ({"attention_chunk_size": 8192}, 8192),
    ],
)
def test_where_attention_slides_its_window_is_the_longest_context(config: dict[str, Any], tokens: int, tmp_path: Path) -> None:
    """In this process; vLLM keeps what it needs."""
    (tmp_path / "config.json").write_text(json.dumps({"max_position_embeddings": 65_536} | config))
    assert longest_context(TransformersModelSettings(path=str(tmp_path)), tmp_path) == tokens
    assert longest_context(VllmModelSettings(path=str(tmp_path)), tmp_path) == 32_768


def test_a_model_that_takes_less_than_an_episode_can_come_to_is_told(tmp_path: Path) -> None:
    model = tmp_path / "llm"
    model.mkdir()
    for positions, told in ((8192 + 2 * 1024, 1), (8192 + 2 * 1024 + 1, 0)):
        (model / "config.json").write_text(json.dumps({"max_position_embeddings": positions}))
        found = list(warnings(over(tmp_path, "own_corpus_llm.yaml", f"models: {{policy: {{path: {model}}}}}")))
        assert len(found) == told, found
        assert all("rollout.max_tokens 8192" in one and f"takes {positions} tokens" in one for one in found)
