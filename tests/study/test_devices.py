"""How the GPUs of a machine are dealt out among the processes of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from studies import study

from evolve_dag.study.devices import VISIBLE, shares


def dealt(folder: Path, *runtimes: dict[str, Any]) -> tuple[str, ...]:
    arms = {f"a{n}": {"config": "arm.yaml", "set": {"runtime": runtime}} for n, runtime in enumerate(runtimes)}
    return shares(study(folder, arms=arms, seeds=[4]))


def test_one_each_or_as_many_as_a_training_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VISIBLE, raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 5)
    assert dealt(tmp_path, {"device": "cuda"}) == ("0", "1", "2", "3", "4")
    assert dealt(tmp_path, {"device": "cuda", "processes": 2}, {"device": "cuda"}) == ("0,1", "2,3")
    engine = {"models": {"policy": {"backend": "vllm", "path": "/m", "tensor_parallel": 2}}, "runtime": {"device": "cuda"}}
    assert shares(study(tmp_path, seeds=[4], arms={"a": {"config": "arm.yaml", "set": engine}})) == ("0,1", "2,3")
    assert dealt(tmp_path, {"device": "cuda", "processes": 6}) == (), "not even one: the training says so itself"


def test_what_others_left_visible_is_dealt_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VISIBLE, "GPU-aa, GPU-bb")
    assert dealt(tmp_path, {"device": "cuda"}, {"device": "cpu"}) == ("GPU-aa", "GPU-bb")
    monkeypatch.setenv(VISIBLE, "")
    assert dealt(tmp_path, {"device": "cuda"}) == ()


@pytest.mark.parametrize("device", ["cpu", "cuda:1", "mps"])
def test_a_device_that_is_named_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert dealt(tmp_path, {"device": device}) == ()


def test_a_number_among_others_names_the_gpus_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert dealt(tmp_path, {"device": "cuda"}, {"device": "cuda:1"}) == ()
