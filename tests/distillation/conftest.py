from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from distillation_fakes import TinyChat, tiny_model, train_to_follow_hints


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def chat() -> TinyChat:
    return TinyChat()


@pytest.fixture(scope="session")
def trained() -> torch.nn.Module:
    """A teacher that follows hints; do not change it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    model = train_to_follow_hints(tiny_model())
    torch.set_num_threads(before)
    return model
