from __future__ import annotations

import pytest
import tiny_tokenizers

from evolve_dag.inference.chat import ChatFormat


@pytest.fixture(scope="session", params=["byte_level", "word_level"])
def chat(request: pytest.FixtureRequest) -> ChatFormat:
    return ChatFormat.from_tokenizer(getattr(tiny_tokenizers, request.param)())


@pytest.fixture(scope="session")
def byte_chat() -> ChatFormat:
    return ChatFormat.from_tokenizer(tiny_tokenizers.byte_level())
