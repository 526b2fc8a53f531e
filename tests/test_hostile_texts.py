"""What others wrote is read in linear time: the texts of benchmarks/hostile_texts.py, each in a process with little time.

The limit is no measurement: linear time stays twenty times below it, and quadratic time lies a hundred times above and more.
"""

from __future__ import annotations

import importlib.util
import os
import resource
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SECONDS = 30
MEGABYTES = {"an action": 10.0, "a fence": 10.0}
"""For the two that an attack found first; 0.3 for the others."""


def _load() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "hostile_texts.py"
    spec = importlib.util.spec_from_file_location("hostile_texts", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["hostile_texts"] = module  # where its dataclass looks for itself
    spec.loader.exec_module(module)
    return module


CASES: list[Any] = list(_load().CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_no_text_takes_more_than_linear_time(case: Any) -> None:
    size = round(1e6 * MEGABYTES.get(case.name, 0.3))
    for number in range(len(case.texts)):
        child = os.fork()
        if not child:
            try:
                resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
                case.read(case.text(number, size))
                os._exit(0)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, 0)
        ended = os.waitstatus_to_exitcode(status)
        assert ended == 0, f"{case.texts[number]!r}: {'too slow' if ended < 0 else 'it raised'}"
