from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "agent"))
import tiny_tokenizers

from evolve_dag.inference.chat import ChatFormat

SHAPE = {
    "vocab_size": 368,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "initializer_range": 0.35,  # peaked enough that a wrong key or value changes what is sampled
}


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def chat() -> ChatFormat:
    return ChatFormat.from_tokenizer(tiny_tokenizers.byte_level())


def make(name: str) -> PreTrainedModel:
    torch.manual_seed(5)
    if name == "llama":  # no grouping: as many key/value heads as query heads
        return LlamaForCausalLM(LlamaConfig(**{**SHAPE, "num_key_value_heads": 4})).eval()
    return Qwen3ForCausalLM(Qwen3Config(**SHAPE)).eval()


@pytest.fixture(scope="session", params=["qwen3", "llama"])
def policy(request: pytest.FixtureRequest) -> PreTrainedModel:
    return make(request.param)


@pytest.fixture(scope="session")
def qwen3() -> PreTrainedModel:
    return make("qwen3")
