"""Two processes that train together find what one finds."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_fakes import make_scored_rows, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from evolve_dag.config.schema import DistillationSettings, Regime
from evolve_dag.distillation.alignment import replay_injection
from evolve_dag.distillation.dataset import save_contexts
from evolve_dag.distillation.parallel import Processes
from evolve_dag.distillation.trainer import distill


@dataclass
class Row:
    tokens: int


@given(st.lists(st.integers(1, 500), min_size=1, max_size=40), st.integers(1, 5))
def test_every_row_is_someones_and_nobody_has_much_more(tokens: list[int], count: int) -> None:
    rows: Any = [Row(one) for one in tokens]
    shares = [Processes(rank, count).own(rows) for rank in range(count)]
    assert [row for share in shares for row in share] == rows
    assert max(sum(row.tokens for row in share) for share in shares) <= sum(tokens) / count + max(tokens)


def test_one_process_is_not_asked_to_exchange_anything() -> None:
    assert Processes.here() == Processes(0, 1)
    assert Processes().add_up([], (1.0, math.inf)) == [1.0, math.inf]


def test_two_processes_find_the_gradients_of_one(tmp_path: Path) -> None:
    """By gloo, through the entry point. One step, so that Adam, whose first step has the gradient's sign alone, hides nothing:
    the curve says loss and norm of the gradient, and a second step says where the first one led."""
    model = tiny_model()
    rows = make_scored_rows(model, range(12), replay_injection("step_wise"))
    model.save_pretrained(tmp_path / "model")
    save_contexts(tmp_path / "contexts", rows)
    settings = DistillationSettings(rank=4, alpha=8, learning_rate=1e-3, epochs=3, tokens_per_batch=400, top_k=8)
    request = {
        "model": str(tmp_path / "model"),
        "contexts": [str(tmp_path / "contexts")],
        "settings": settings.model_dump(mode="json"),
        "regime": Regime().model_dump(mode="json"),
    }
    told = {}
    for count in (1, 2):
        path = tmp_path / f"request-{count}.json"
        path.write_text(
            json.dumps({**request, "out": str(tmp_path / f"out-{count}"), "checkpoint": str(tmp_path / f"kept-{count}")})
        )
        launcher = [] if count == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(count)]
        command = [sys.executable, *launcher, "-m", "evolve_dag.distillation", str(path)]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=1200)
        assert done.returncode == 0, done.stderr
        told[count] = json.loads(done.stdout.splitlines()[-1])
    one, two = (told[count]["curve"] for count in (1, 2))
    assert len(one) == len(two) >= 6
    for key in ("loss", "gradient_norm", "divergence"):
        assert [point[key] for point in two] == pytest.approx([point[key] for point in one], rel=1e-5, abs=1e-6)
    weights = [load_file(str(tmp_path / f"out-{count}" / "adapter_model.safetensors")) for count in (1, 2)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=1e-6, rtol=1e-4)
    here = distill(model, rows, settings=settings, regime=Regime(), out=tmp_path / "here")
    assert (here.adapter / "adapter_model.safetensors").read_bytes() == (
        tmp_path / "out-1" / "adapter_model.safetensors"
    ).read_bytes()


def test_a_request_that_cannot_be_read_ends_with_a_message(tmp_path: Path) -> None:
    (tmp_path / "request.json").write_text('{"model": "x"}')
    command = [sys.executable, "-m", "evolve_dag.distillation", str(tmp_path / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "contexts: missing" in done.stderr
    assert "Traceback" not in done.stderr
