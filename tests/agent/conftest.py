from __future__ import annotations

import pytest
import tiny_tokenizers

from evolve_dag.inference.chat import ChatFormat


@pytest.fixture(scope="session")
def byte_chat() -> ChatFormat:
    return ChatFormat.from_tokenizer(tiny_tokenizers.byte_level())
