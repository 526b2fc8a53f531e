"""Two processes that train together find what one finds."""

from __future__ import annotations

import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from distillation_fakes import make_scored_rows, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from evolve_dag.config.schema import DistillationSettings, Regime
from evolve_dag.distillation import trainer
from evolve_dag.distillation.__main__ import main, train
from evolve_dag.distillation.alignment import replay_injection
from evolve_dag.distillation.dataset import batches, save_contexts
from evolve_dag.distillation.forward import Forward
from evolve_dag.distillation.launch import Request
from evolve_dag.distillation.parallel import Processes
from evolve_dag.distillation.trainer import DistillationResult, distill
from evolve_dag.errors import ConfigError
from evolve_dag.store.jsonvalues import from_values

WEIGHTS = "adapter_model.safetensors"


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


SETTINGS = DistillationSettings(rank=4, alpha=8, learning_rate=1e-3, epochs=2, tokens_per_batch=120, top_k=8)
PASSES = 50
"""Tokens; some of the rows have more."""
TOLERANCE = 1e-4
"""Of the largest gradient of a step; the later ones start from weights that differ in their last digits."""

FAULT = 3
"""Step in which one of two processes fails."""


@pytest.fixture(scope="module")
def server() -> Any:
    """Starts processes that have imported already what is slow to import."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(["transformers.models.qwen3.modeling_qwen3", "torch.distributed.fsdp", "peft", "pytest"])
    return made


class Pair:
    """Two processes that train one request, by its entry point and as torchrun would start them."""

    def __init__(self, server: Any, folder: Path, request: dict[str, Any], fault: str = "") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        folder.mkdir()
        (folder / "request.json").write_text(json.dumps(request))
        both = [server.Process(target=_one_of_two, args=(rank, port, folder, fault)) for rank in (0, 1)]
        for one in both:
            one.start()
        for one in both:
            one.join(600)
            one.kill()  # one that hangs
        self.codes = [one.exitcode for one in both]
        self.said = [(folder / f"said-{rank}").read_text() for rank in (0, 1)]
        self.held = [[int(line) for line in (folder / f"held-{rank}").read_text().split()] for rank in (0, 1)]
        """Bytes of the base in each process, after every step that it took."""


def _one_of_two(rank: int, port: int, folder: Path, fault: str) -> None:
    import evolve_dag.distillation.checkpoint as checkpoint_module
    import evolve_dag.distillation.trainer as trainer_module

    torch.set_num_threads(1)
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in place.items()})
    checkpoint_module.SECONDS = 0.0
    step, losses = trainer_module._Run._step, trainer_module.row_losses
    faults = {"memory": memory_runs_out, "infinite": lambda *given, **more: infinite(losses(*given, **more))}

    def watched(run: Any, *given: Any) -> Any:
        failing = rank == 1 and given[1] == FAULT
        trainer_module.row_losses = faults.get(fault, losses) if failing else losses
        point = step(run, *given)
        print(_held(run.wrapped), file=held, flush=True)
        gradients.append(_gradients(run))
        if failing and fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return point

    trainer_module._Run._step = watched
    gradients: list[dict[str, Any]] = []
    with (folder / f"held-{rank}").open("w") as held, (folder / f"said-{rank}").open("w") as said:
        sys.stdout = sys.stderr = said
        sys.argv = ["evolve_dag.distillation", str(folder / "request.json")]
        try:
            main()
        except SystemExit as end:
            print(end, file=said)
            raise
        finally:
            torch.save(gradients, folder / f"gradients-{rank}.pt")


def _gradients(run: Any) -> dict[str, Any]:
    """What a step went by, as it is when the step is done."""
    return {name: one.grad.clone() for name, one in run.parameters.items()}


def _held(model: Any) -> int:
    """Bytes of the frozen weights in this process."""
    frozen = {id(one): one for one in model.parameters() if not one.requires_grad}
    return sum((one.to_local() if hasattr(one, "to_local") else one).nbytes for one in frozen.values())


def memory_runs_out(*_: Any, **__: Any) -> None:
    raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")


def infinite(losses: Any) -> Any:
    return replace(losses, loss=losses.loss * math.inf)


@dataclass
class Task:
    """A training for two processes, and what one alone finds in it."""

    folder: Path
    model: Any
    rows: Any
    alone: DistillationResult
    gradients: list[dict[str, Any]]
    """Of every step of the one that trains alone."""

    def request(self, name: str, **changes: Any) -> dict[str, Any]:
        return {
            "model": str(self.folder / "model"),
            "contexts": [str(self.folder / "contexts")],
            "out": str(self.folder / name),
            "settings": SETTINGS.model_dump(mode="json"),
            "regime": Regime().model_dump(mode="json"),
            "tokens_per_pass": PASSES,
            "shard": True,
            **changes,
        }


def make_task(folder: Path, kind: str, tied: bool) -> Task:
    model = tiny_model(kind=kind, tie_word_embeddings=tied)
    scored = partial(make_scored_rows, model, inject=replay_injection("step_wise"))
    rows = [row for steps in (3, 1, 6) for row in scored(range(10 * steps, 10 * steps + 4), steps=steps)]
    model.save_pretrained(folder / "model")
    save_contexts(folder / "contexts", rows)
    gradients: list[dict[str, Any]] = []
    step = trainer._Run._step

    def watched(run: Any, *given: Any) -> Any:
        point = step(run, *given)
        gradients.append(_gradients(run))
        return point

    with pytest.MonkeyPatch.context() as meanwhile:
        meanwhile.setattr(trainer._Run, "_step", watched)
        alone = distill(model, rows, settings=SETTINGS, regime=Regime(), out=folder / "alone", tokens_per_pass=PASSES)
    return Task(folder, model, rows, alone, gradients)


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return make_task(tmp_path_factory.mktemp("task"), "qwen3", True)


def found_what_one_finds(task: Task, name: str, pair: Pair) -> None:
    assert pair.codes == [0, 0], pair.said
    told = json.loads(pair.said[0].splitlines()[-1])
    for key in ("loss", "gradient_norm", "divergence"):
        alone = [getattr(point, key) for point in task.alone.curve]
        assert [point[key] for point in told["curve"]] == pytest.approx(alone, rel=1e-5, abs=1e-6)
    weights, alone = (load_file(str(folder / WEIGHTS)) for folder in (task.folder / name, task.folder / "alone"))
    for key, weight in alone.items():
        torch.testing.assert_close(weights[key], weight, atol=1e-6, rtol=1e-4)


def test_the_entry_point_does_what_the_function_does(task: Task) -> None:
    found = train(from_values(Request, task.request("entry", shard=False), "", ""))
    assert (found.adapter / WEIGHTS).read_bytes() == (task.alone.adapter / WEIGHTS).read_bytes()


@pytest.mark.parametrize(
    ("kind", "tied", "changes"),
    [
        ("qwen3", True, {"shard": False}),
        ("qwen3", True, {"shard": True}),
        ("llama", False, {"shard": True, "activation_checkpointing": True}),
    ],
)
def test_two_processes_find_the_gradients_of_one(
    kind: str, tied: bool, changes: dict[str, Any], tmp_path: Path, server: Any
) -> None:
    """Some batches leave one of the two with fewer passes, or with none."""
    task = make_task(tmp_path, kind, tied)
    pair = Pair(server, tmp_path / "run", task.request("out", **changes))
    found_what_one_finds(task, "out", pair)
    for rank in (0, 1):
        found = torch.load(tmp_path / "run" / f"gradients-{rank}.pt")
        assert len(found) == len(task.gradients)
        for one, alone in zip(found, task.gradients, strict=True):
            largest = max(float(gradient.abs().max()) for gradient in alone.values())
            torch.testing.assert_close(one, alone, atol=min(1e-6, TOLERANCE * largest), rtol=0.0)
    assert {(0, 1), (2, 1)} <= passes_of_both(task)
    whole = _held(task.model.requires_grad_(False))
    assert {held for steps in pair.held for held in steps} == {whole // 2 if changes["shard"] else whole}
    assert [len(steps) for steps in pair.held] == [len(task.alone.curve)] * 2


def passes_of_both(task: Task) -> set[tuple[int, ...]]:
    """How many each of two processes has, in the batches of the training."""
    found, forward = set(), Forward(task.model)
    for epoch in range(SETTINGS.epochs):
        for batch in batches(task.rows, SETTINGS.tokens_per_batch, 0, epoch):
            shares = [Processes(rank, 2).own([task.rows[index] for index in batch]) for rank in (0, 1)]
            found.add(tuple(len(forward.passes([row.row.ids for row in share], PASSES)) for share in shares))
    return found


def test_of_two_processes_with_half_a_base_one_is_killed(task: Task, tmp_path: Path, server: Any) -> None:
    request = task.request("killed", checkpoint=str(tmp_path / "kept"))
    pair = Pair(server, tmp_path / "first", request, "killed")
    assert pair.codes == [1, -signal.SIGKILL]
    assert "another process of this training is gone" in pair.said[0]
    assert "goes on from the checkpoint" in pair.said[0]
    assert not (task.folder / "killed").exists()
    again = Pair(server, tmp_path / "second", request)
    found_what_one_finds(task, "killed", again)
    assert len(task.alone.curve) - len(again.held[0]) >= FAULT


def test_of_two_processes_with_half_a_base_one_has_too_little_memory(task: Task, tmp_path: Path, server: Any) -> None:
    """It cannot go back and leave the other in the middle of a pass: both end, and say why."""
    pair = Pair(server, tmp_path / "run", task.request("memory"), "memory")
    assert pair.codes == [1, 1]
    assert f"training step {FAULT}: memory ran out in passes of {PASSES} tokens" in pair.said[1]
    assert "lower runtime.tokens_per_pass" in pair.said[1]
    assert "another process of this training is gone" in pair.said[0]


def test_of_two_processes_with_half_a_base_one_has_a_loss_that_is_not_finite(task: Task, tmp_path: Path, server: Any) -> None:
    """It stays with the other to the end of the step, which is skipped by both."""
    pair = Pair(server, tmp_path / "run", task.request("infinite"), "infinite")
    assert pair.codes == [0, 0], pair.said
    curve = json.loads(pair.said[0].splitlines()[-1])["curve"]
    assert [point["step"] for point in curve if point["skipped"]] == [FAULT]
    assert len(curve) == len(task.alone.curve)


def test_one_process_cannot_hold_half_a_base(task: Task) -> None:
    with pytest.raises(ConfigError, match=r"(?s)spread over processes, and there is one.*torchrun"):
        distill(task.model, task.rows, settings=SETTINGS, regime=Regime(), out=task.folder / "one", shard=True)


def test_two_processes_cannot_hold_half_a_base_in_4_bit(task: Task, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(Processes, "here", lambda: Processes(0, 2))
    monkeypatch.setattr(task.model, "is_quantized", True, raising=False)
    with pytest.raises(ConfigError, match=r"(?s)in 4 bit cannot be spread.*set shard to false"):
        distill(task.model, task.rows, settings=SETTINGS, regime=Regime(), out=tmp_path, shard=True)


@pytest.mark.parametrize(
    ("values", "words"),
    [({"model": "x"}, "out: missing"), ({"model": "x", "out": "y", "settings": {}, "regime": {}}, "contexts: missing")],
)
def test_a_request_that_cannot_be_read_ends_with_a_message(
    values: dict[str, Any], words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "request.json").write_text(json.dumps(values))
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / "request.json")])
    with pytest.raises(SystemExit, match=words):
        main()


def test_it_is_a_command(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evolve_dag.distillation", str(tmp_path / "request.json")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "request.json: cannot be read" in done.stderr
    assert "Traceback" not in done.stderr
