"""The pocket model in the real vLLM: an engine and servers for all tests, two adapters that change what it says.

Run by `make test-vllm` alone; the interpreter that holds vLLM is named by EVOLVE_VLLM_PYTHON (default: .venv-vllm).
"""

from __future__ import annotations

import copy
import os
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from evolve_dag.config.schema import RuntimeSettings, VllmModelSettings
from evolve_dag.distillation.adapter import attach, save_adapter
from evolve_dag.inference.chat import ChatFormat
from evolve_dag.inference.folders import POCKET
from evolve_dag.inference.vllm import VllmModel
from evolve_dag.inference.vllm_process import EngineProcess
from evolve_dag.inference.vllm_source import Adapter, Source
from evolve_dag.protocols import Request, Sampling
from evolve_dag.records import Message

ROOT = Path(__file__).resolve().parent.parent
PYTHON = os.environ.get("EVOLVE_VLLM_PYTHON") or str(ROOT / ".venv-vllm" / "bin" / "python")
SYSTEM = Message("system", "Use the tools: search, visit. Then answer.")
RUNTIME = RuntimeSettings(threads=1, concurrency=64)


def make_adapter(folder: Path, seed: int, scale: float = 0.03) -> Path:
    """A random adapter of rank 8; ``scale`` 0 leaves the base model as it is."""
    torch.set_num_threads(1)
    base = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    wrapped = attach(copy.deepcopy(base), rank=8, alpha=16, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data = scale * torch.randn(parameter.shape, generator=generator)
    save_adapter(wrapped, folder, base="pocket")
    return folder


@dataclass(frozen=True)
class Bench:
    """What the tests share."""

    chat: ChatFormat
    a: Adapter
    b: Adapter

    def model(self, source: Source, adapter: Adapter | None) -> VllmModel:
        return VllmModel(source, self.chat, adapter, vocabulary=self.chat.vocab_size)


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Bench:
    folder = tmp_path_factory.mktemp("adapters")
    a, b = (Adapter.read(make_adapter(folder / name, seed)) for name, seed in (("a", 1), ("b", 2)))
    return Bench(ChatFormat.from_tokenizer(AutoTokenizer.from_pretrained(POCKET)), a, b)


@pytest.fixture(scope="session")
def engine(bench: Bench) -> Iterator[EngineProcess]:
    """One engine with both adapters."""
    process = EngineProcess.start(settings(), RUNTIME, POCKET, (bench.a, bench.b))
    process.load(bench.a, None)
    process.load(bench.b, None)
    yield process
    process.close()


def settings(**changes: Any) -> VllmModelSettings:
    return VllmModelSettings(backend="vllm", path="pocket", dtype="float32", python=PYTHON, **changes)


def questions(count: int, **sampling: Any) -> list[Request]:
    kinds = ["mayor of city Bado Keli", "stream of river Zano Pile", "home of person Rato Miku", "mouth of river Nilo Tavi"]
    return [
        Request(
            (SYSTEM, Message("user", f"What is the {kinds[number % 4]}?" + " Say it." * (number % 3))),
            Sampling(**{"max_tokens": 16 + number % 5, "seed": number, **sampling}),
            f"s{number}",
        )
        for number in range(count)
    ]


# ---------------------------------------------------------------------- servers


@dataclass(frozen=True)
class Server:
    process: subprocess.Popen[bytes]
    address: str
    log: Path


def start_server(log: Path, *, max_loras: int, port: int = 0) -> Server:
    if not port:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    environment = {
        **os.environ,
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHDYNAMO_DISABLE": "1",
        "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True",
    }
    command = [PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(POCKET), "--served-model-name", "pocket"]
    command += ["--dtype", "float32", "--max-model-len", "2048", "--host", "127.0.0.1", "--port", str(port)]
    command += ["--enable-lora", "--max-loras", str(max_loras), "--max-lora-rank", "8", "--enable-prefix-caching"]
    # Without the last one a seeded call ends a server on a CPU as soon as a prompt is computed in parts (vLLM 0.32).
    command += ["--enforce-eager", "--enable-prompt-tokens-details", "--no-enable-chunked-prefill"]
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=environment, start_new_session=True)
    return Server(process, f"http://127.0.0.1:{port}/v1", log)


def wait_for(servers: Sequence[Server], seconds: float = 1200) -> None:
    import httpx

    limit = time.monotonic() + seconds
    for server in servers:
        while True:
            waiting = server.process.poll() is None and time.monotonic() < limit
            assert waiting, server.log.read_text()[-3000:]
            try:
                if httpx.get(f"{server.address}/models", timeout=5).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)


def stop(server: Server) -> None:
    if server.process.poll() is None:
        os.killpg(server.process.pid, 9)
    server.process.wait()


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two servers: one with room to spare for adapters, one with room for one and the base model."""
    folder = tmp_path_factory.mktemp("servers")
    running = [start_server(folder / f"{count}.log", max_loras=count) for count in (9, 2)]
    try:
        wait_for(running)
        yield running
    finally:
        for server in running:
            stop(server)
