"""The paths of a GPU against those of the CPU. Run by `make test-gpu` alone; without a GPU everything is skipped."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ |= {"EVOLVE_TRACKING": "off", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / folder) for folder in ("tests", "tests/distillation", "benchmarks")]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            item.add_marker(pytest.mark.skip("no GPU here"))


@pytest.fixture(autouse=True)
def exact_float32() -> Iterator[None]:
    """Products of float32 in float32, as on the CPU that they are compared with."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)
