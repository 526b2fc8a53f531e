"""A training that is killed anywhere ends in the bytes of one that was not."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_fakes import make_scored_rows, tiny_model

import evolve_dag.distillation.checkpoint as checkpoint_module
from evolve_dag.config.schema import DistillationSettings, Regime
from evolve_dag.distillation.alignment import replay_injection
from evolve_dag.distillation.dataset import DistillationRow
from evolve_dag.distillation.trainer import CurvePoint, DistillationResult, distill

STEP_WISE = replay_injection("step_wise")
SETTINGS = DistillationSettings(rank=4, alpha=8, learning_rate=1e-2, epochs=2, tokens_per_batch=150, top_k=8)
WEIGHTS = "adapter_model.safetensors"


class Killed(BaseException):
    """What no handler of the code under test catches."""


@pytest.fixture(autouse=True)
def always_due(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_module, "SECONDS", 0.0)


@pytest.fixture(scope="module")
def rows(trained: torch.nn.Module) -> list[DistillationRow]:
    return twice(make_scored_rows(trained, range(8), STEP_WISE))


def twice(clean: list[DistillationRow]) -> list[DistillationRow]:
    """With a retention row of each."""
    return [*clean, *(replace(row, row=replace(row.row, trajectory_id=f"{row.trajectory}@0"), retention=True) for row in clean)]


def run(model: torch.nn.Module, rows: list[DistillationRow], out: Path, **changes: Any) -> DistillationResult:
    own = [key for key in changes if key in DistillationSettings.model_fields]
    settings = SETTINGS.model_copy(update={key: changes.pop(key) for key in own})
    return distill(model, rows, settings=settings, regime=Regime(), out=out, **changes)


def killed_at(step: int) -> Callable[[CurvePoint, int], None]:
    def on_step(point: CurvePoint, total: int) -> None:
        if point.step == step:
            raise Killed

    return on_step


def collecting(seen: list[CurvePoint]) -> Callable[[CurvePoint, int], None]:
    return lambda point, total: seen.append(point)


def facts(result: DistillationResult) -> list[CurvePoint]:
    return [replace(point, tokens_per_second=0.0) for point in result.curve]


def test_killed_anywhere_the_same_bytes(trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path) -> None:
    whole = run(trained, rows, tmp_path / "whole")
    assert len(whole.curve) >= 8
    for step in (0, 3, len(whole.curve) - 1):
        kept = tmp_path / f"kept{step}"
        for at in (step, step, min(step + 2, len(whole.curve) - 1)):  # killed again before anything new, and a little later
            with pytest.raises(Killed):
                run(trained, rows, tmp_path / "x", checkpoint=kept, on_step=killed_at(at))
        seen: list[CurvePoint] = []
        result = run(trained, rows, tmp_path / f"{step}", checkpoint=kept, on_step=collecting(seen))
        assert (result.adapter / WEIGHTS).read_bytes() == (whole.adapter / WEIGHTS).read_bytes()
        assert facts(result) == facts(whole)
        assert tuple(seen) == result.curve


def test_rows_that_were_sampled_while_training_are_not_sampled_again(
    trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path
) -> None:
    fresh = twice(make_scored_rows(trained, range(100, 104), STEP_WISE))
    fresh += fresh[-2:]  # drills bear the names of retention rows
    asked: list[int] = []

    def resample(number: int, student: torch.nn.Module) -> list[DistillationRow]:
        asked.append(number)
        return fresh if number == 1 else []

    whole = run(trained, rows, tmp_path / "whole", refresh=3, resample=resample)
    starts = [next(point.step for point in whole.curve if point.round == number) for number in range(3)]
    asked.clear()
    for step in (starts[1], starts[1] + 1, starts[2], len(whole.curve) - 1):
        with pytest.raises(Killed):
            run(trained, rows, tmp_path / "x", refresh=3, resample=resample, checkpoint=tmp_path, on_step=killed_at(step))
    result = run(trained, rows, tmp_path / "again", refresh=3, resample=resample, checkpoint=tmp_path)
    assert asked == [1, 2]
    assert (result.adapter / WEIGHTS).read_bytes() == (whole.adapter / WEIGHTS).read_bytes()
    assert (result.refreshes, result.empty_refreshes) == (whole.refreshes, whole.empty_refreshes) == (2, 1)


def test_killed_at_the_end_of_a_pass_it_ends_there(
    trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path
) -> None:
    whole = run(trained, rows, tmp_path / "whole", epochs=3, target_divergence=1e9)
    assert whole.note.startswith("ended after 1 of 3 passes")
    with pytest.raises(Killed):
        run(
            trained, rows, tmp_path / "x", epochs=3, target_divergence=1e9, checkpoint=tmp_path,
            on_step=killed_at(len(whole.curve) - 1),
        )  # fmt: skip
    result = run(trained, rows, tmp_path / "again", epochs=3, target_divergence=1e9, checkpoint=tmp_path)
    assert (result.adapter / WEIGHTS).read_bytes() == (whole.adapter / WEIGHTS).read_bytes()
    assert len(result.curve) == len(whole.curve)


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def flipped(content: bytes) -> bytes:
    return content[:-9] + bytes([content[-9] ^ 1]) + content[-8:]


@pytest.mark.parametrize("damage", [cut, flipped, lambda content: b"", lambda content: content[:30]])
def test_a_damaged_checkpoint_is_refused_and_said(
    trained: torch.nn.Module,
    rows: list[DistillationRow],
    tmp_path: Path,
    damage: Callable[[bytes], bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with pytest.raises(Killed):
        run(trained, rows, tmp_path / "x", checkpoint=tmp_path, on_step=killed_at(4))
    state = tmp_path / checkpoint_module.STATE
    state.write_bytes(damage(state.read_bytes()))
    result = run(trained, rows, tmp_path / "a", checkpoint=tmp_path)
    assert "cut off or was changed: training begins anew" in result.note
    assert str(state) in caplog.text
    whole = run(trained, rows, tmp_path / "whole")
    assert (result.adapter / WEIGHTS).read_bytes() == (whole.adapter / WEIGHTS).read_bytes()


def test_the_checkpoint_of_another_training_is_refused(
    trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path
) -> None:
    with pytest.raises(Killed):
        run(trained, rows, tmp_path / "x", checkpoint=tmp_path, on_step=killed_at(2))
    state = (tmp_path / checkpoint_module.STATE).read_bytes()
    for other, changes in ((rows[1:], {}), (rows, {"seed": 1}), (rows, {"training": 2}), (rows, {"base": "other"})):
        (tmp_path / checkpoint_module.STATE).write_bytes(state)
        result = run(trained, other, tmp_path / "a", checkpoint=tmp_path, **changes)
        assert "belongs to another training" in result.note


@pytest.mark.parametrize("missing", [False, True])
def test_sampled_rows_that_are_damaged_are_refused(
    trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path, missing: bool
) -> None:
    fresh = twice(make_scored_rows(trained, range(100, 104), STEP_WISE))
    changes: dict[str, Any] = {"refresh": 2, "resample": lambda number, student: fresh}
    whole = run(trained, rows, tmp_path / "whole", **changes)
    kept = tmp_path / "kept"
    with pytest.raises(Killed):
        run(trained, rows, tmp_path / "x", checkpoint=kept, on_step=killed_at(len(whole.curve) - 1), **changes)
    path = kept / "round-1" / "part-001" / "rows.parquet"
    if missing:
        shutil.rmtree(path.parent)
    else:
        path.write_bytes(cut(path.read_bytes()))
    result = run(trained, rows, tmp_path / "again", checkpoint=kept, **changes)
    assert "lacks its sampled rows" in result.note
    assert (result.adapter / WEIGHTS).read_bytes() == (whole.adapter / WEIGHTS).read_bytes()


def test_a_checkpoint_is_due_by_time_and_by_share(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(checkpoint_module, "SECONDS", 15.0)
    monkeypatch.setattr(checkpoint_module.time, "monotonic", lambda: now)
    checkpoint = checkpoint_module.Checkpoint(tmp_path, "run")
    now = 114.9
    assert not checkpoint.due(500, 1000)
    now = 115.0
    assert checkpoint.due(500, 1000)
    assert not checkpoint.due(9, 1000)  # less than 1% of the steps is at stake
    assert checkpoint.load() is None
    checkpoint.save(checkpoint_module.State({"a": torch.ones(2)}, {}), 500)
    assert not checkpoint.due(600, 1000)
    now = 130.0
    assert not checkpoint.due(509, 1000)
    assert checkpoint.due(510, 1000)


PROCESS = """
import sys
from pathlib import Path
import torch
import evolve_dag.distillation.checkpoint as checkpoint
sys.path.insert(0, sys.argv[1])
import distillation_fakes as fakes
import test_checkpoint as tests
torch.set_num_threads(1)
checkpoint.SECONDS = 0.0
model = fakes.tiny_model()
rows = fakes.make_scored_rows(model, range(8), tests.STEP_WISE)
out = Path(sys.argv[2])
tests.run(model, rows, out / "adapter", checkpoint=out / "kept", on_step=lambda point, total: print(point.step, flush=True))
"""


def test_a_killed_process_goes_on(tmp_path: Path) -> None:
    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", PROCESS, str(Path(__file__).parent), str(tmp_path)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    with start() as killed:
        assert killed.stdout is not None
        for _ in range(3):
            killed.stdout.readline()
        killed.send_signal(signal.SIGKILL)
    assert not (tmp_path / "adapter").exists()
    with start() as again:
        assert again.stdout is not None
        steps = again.stdout.read().split()
        assert again.wait() == 0
    model = tiny_model()
    whole = run(model, make_scored_rows(model, range(8), STEP_WISE), tmp_path / "whole")
    assert steps == [str(point.step) for point in whole.curve]
    assert (tmp_path / "adapter" / WEIGHTS).read_bytes() == (whole.adapter / WEIGHTS).read_bytes()
