"""A world with a way, a model of a few thousand weights, and an experiment over both."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import torch
import yaml
from transformers import Qwen3Config, Qwen3ForCausalLM

from evolve_dag.config.loading import load_experiment
from evolve_dag.config.parts import CHOICES
from evolve_dag.config.schema import Experiment

sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "agent")]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a model that knows nothing."""
    from tiny_tokenizers import byte_level

    folder, tokenizer = tmp_path_factory.mktemp("tiny"), byte_level()
    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Qwen3Config(vocab_size=len(tokenizer), num_key_value_heads=1, head_dim=8, tie_word_embeddings=True, **shape)
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def experiment(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Experiment]:
    """The experiment, with keys of `warmup` and others laid over it."""
    monkeypatch.setitem(CHOICES["environment"].rows, "steps", "guided_world:STEPS")  # type: ignore[index]

    def load(warmup: Mapping[str, Any] | None = MappingProxyType({}), **changes: Any) -> Experiment:
        small = {"base": str(tiny), "world": 1, "episodes": 4, "development": 2, "rounds": 2}
        content = {
            "models": {"policy": {"path": str(tmp_path / "warm")}},
            "warmup": None if warmup is None else {**small, **warmup},
            "environment": {"kind": "steps"},
            "tasks": {"train": {"world": 11}, "development": {"world": 21}, "held_out": {"world": 31}},
            "rollout": {"max_steps": 5, "max_action_tokens": 4},
            "runtime": {"threads": 1, "concurrency": 4},
            **changes,
        }
        content = {key: value for key, value in content.items() if value is not None}
        path = tmp_path / "warmed.yaml"
        path.write_text(yaml.safe_dump(content))
        return load_experiment(path)

    return load
