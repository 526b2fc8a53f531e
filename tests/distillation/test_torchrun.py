"""A training that a step asks for, in processes of its own."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from distillation_fakes import make_scored_rows, tiny_model
from safetensors.torch import load_file

from evolve_dag.config.schema import DistillationSettings, Regime, RuntimeSettings
from evolve_dag.distillation import __main__ as entry_point
from evolve_dag.distillation.alignment import replay_injection
from evolve_dag.distillation.launch import Request, train
from evolve_dag.distillation.trainer import CurvePoint
from evolve_dag.errors import ConfigError, ModelError, StoreError

WEIGHTS = "adapter_model.safetensors"
TWO = RuntimeSettings(processes=2, shard=True, threads=1, tokens_per_pass=64)
POINT = CurvePoint(0, 0, 1.0, 0.0, None, 1e-3, 1.0, 10, 2, 5.0)


@pytest.fixture
def request_(tmp_path: Path) -> Request:
    settings = DistillationSettings(rank=4, alpha=8, learning_rate=1e-3, epochs=1, tokens_per_batch=200, top_k=8)
    return Request(tmp_path / "model", tmp_path / "out", settings, Regime(), checkpoint=tmp_path / "kept", base="tiny")


def nobody(point: CurvePoint, total: int) -> None:
    pytest.fail("no step is expected")


def test_two_processes_give_what_one_gives_and_say_how_far_they_are(request_: Request, tmp_path: Path) -> None:
    model = tiny_model()
    model.save_pretrained(request_.model)
    rows = make_scored_rows(model, range(12), replay_injection("step_wise"))
    told: list[tuple[CurvePoint, int]] = []
    found = train(request_, rows, TWO, on_step=lambda *step: told.append(step))
    weights = load_file(found.adapter / WEIGHTS)
    alone = train(request_, rows, TWO.model_copy(update={"processes": 1, "shard": False}), on_step=lambda *_: None)
    assert tuple(point for point, _ in told) == found.curve
    assert [total for _, total in told] == [len(alone.curve)] * len(alone.curve)
    assert [point.loss for point in found.curve] == pytest.approx([point.loss for point in alone.curve], rel=1e-5, abs=1e-6)
    for name, weight in load_file(alone.adapter / WEIGHTS).items():
        torch.testing.assert_close(weights[name], weight, atol=1e-6, rtol=1e-4)
    assert not (tmp_path / "kept" / "given").exists()


def test_nothing_to_learn_takes_one_process_and_no_device(request_: Request) -> None:
    tiny_model().save_pretrained(request_.model)
    found = train(request_, [], TWO.model_copy(update={"device": "cuda"}), on_step=nobody)
    assert found.unchanged
    assert (found.adapter / WEIGHTS).is_file()


@pytest.mark.parametrize(
    ("script", "kind", "words"),
    [
        ("echo a library says hello; echo '[1]'; echo '{failure}'; exit 1", StoreError, "the disk is full"),
        (
            "echo '  exitcode  : -9 (pid: 7)' >&2; exit 1",
            ModelError,
            "2 processes ended without a word: one was killed by SIGKILL",
        ),
        ("exit 3", ModelError, "without a word: exit code 3"),
    ],
)
def test_what_went_wrong_in_a_process_is_raised_here(
    script: str, kind: type[Exception], words: str, request_: Request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """By a command that stands for torchrun."""
    failure = json.dumps({"failure": {"type": "StoreError", "what": "the disk is full", "remedy": "free some"}})
    command = tmp_path / "torchrun"
    command.write_text("#!/bin/sh\n" + script.replace("{failure}", failure))
    command.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(command))
    rows = make_scored_rows(tiny_model(), range(2), replay_injection("step_wise"))
    with pytest.raises(kind, match=words):
        train(request_, rows, TWO, on_step=nobody)


def test_who_interrupts_ends_the_processes(request_: Request, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    command = tmp_path / "torchrun"
    line = json.dumps({"point": asdict(POINT), "total": 2})
    command.write_text(
        f"#!/bin/sh\ntrap 'touch {tmp_path}/ended; exit 1' TERM\necho '{line}'\nread nothing\ntouch {tmp_path}/ended"
    )
    command.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(command))

    def interrupt(point: CurvePoint, total: int) -> None:
        assert (point, total) == (POINT, 2)
        raise KeyboardInterrupt

    rows = make_scored_rows(tiny_model(), range(2), replay_injection("step_wise"))
    with pytest.raises(KeyboardInterrupt):
        train(request_, rows, TWO, on_step=interrupt)
    assert (tmp_path / "ended").is_file()


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(ConfigError, match=r"process 3 of a training has no GPU: 2 are here"), entry_point._together("cuda"):
        pass
