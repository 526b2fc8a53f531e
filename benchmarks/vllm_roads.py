"""What an engine of our own costs beside vLLM's server, through the same client code: CPU until ready, and per call.

    python benchmarks/vllm_roads.py --python .venv-vllm/bin/python      # vLLM's CPU build: make vllm

CPU seconds of the process and its children, so that a busy machine changes little; the batches of both take turns.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import time
from concurrent.futures import wait
from pathlib import Path
from statistics import median

import httpx
import psutil
from transformers import AutoTokenizer

from evolve_dag.config.schema import RuntimeSettings, VllmModelSettings
from evolve_dag.inference.chat import ChatFormat
from evolve_dag.inference.folders import POCKET
from evolve_dag.inference.vllm_process import EngineProcess
from evolve_dag.inference.vllm_servers import Servers
from evolve_dag.inference.vllm_source import Ask, Source
from evolve_dag.protocols import Sampling
from evolve_dag.records import Message

SERVER = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(POCKET), "--served-model-name", "pocket"]
SERVER += ["--dtype", "float32", "--max-model-len", "2048", "--host", "127.0.0.1", "--enforce-eager"]
SERVER += ["--enable-prefix-caching", "--no-enable-chunked-prefill"]
ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "TORCHDYNAMO_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
}


def used(pid: int) -> float:
    """CPU seconds of a process and of all below it."""
    root = psutil.Process(pid)
    return sum(sum(one.cpu_times()[:2]) for one in (root, *root.children(recursive=True)))


def engine(python: str) -> tuple[Source, int]:
    settings = VllmModelSettings(backend="vllm", path="pocket", dtype="float32", python=python)
    process = EngineProcess.start(settings, RuntimeSettings(threads=1, concurrency=64), POCKET, ())
    return process, process.pid


def server(python: str) -> tuple[Source, int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [python, *SERVER, "--port", str(port)]
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, env={**os.environ, **ENVIRONMENT}, stdout=quiet, stderr=quiet)
    while True:
        if process.poll() is not None:
            raise SystemExit(f"the server ended with {process.returncode}")
        try:
            httpx.get(f"http://127.0.0.1:{port}/v1/models", timeout=5).raise_for_status()
            return Servers([f"http://127.0.0.1:{port}/v1"]), process.pid
        except httpx.HTTPError:
            time.sleep(0.5)


def batch(source: Source, chat: ChatFormat, calls: int, seed: int) -> None:
    asks = [
        Ask(
            tuple(chat.encode((Message("system", "Answer."), Message("user", f"What is the home of person {n} {seed}?")))),
            Sampling(max_tokens=16, seed=n),
            16,
            tuple(sorted(chat.stop_ids)),
        )
        for n in range(calls)
    ]
    done = wait([source.submit(ask) for ask in asks]).done
    assert all(len(future.result().ids) for future in done)


def main() -> None:
    """Measure, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", default=".venv-vllm/bin/python")
    parser.add_argument("--calls", type=int, default=64)
    parser.add_argument("--batches", type=int, default=5)
    asked = parser.parse_args()
    python = str(Path(asked.python).absolute())
    chat = ChatFormat.from_tokenizer(AutoTokenizer.from_pretrained(POCKET))
    roads: dict[str, tuple[Source, int]] = {}
    for name, start in (("engine", engine), ("server", server)):
        began = time.monotonic()
        source, pid = roads[name] = start(python)
        source.load(None, None)
        batch(source, chat, 1, 0)
        print(f"{name}: ready after {used(pid):.1f} CPU s, {time.monotonic() - began:.1f} s", flush=True)
    spent: dict[str, list[float]] = {name: [] for name in roads}
    for number in range(asked.batches):
        for name, (source, pid) in roads.items():
            before = used(pid) + sum(os.times()[:2])
            batch(source, chat, asked.calls, number)
            spent[name].append((used(pid) + sum(os.times()[:2]) - before) / asked.calls)
    for name, each in spent.items():
        print(f"{name}: {1000 * median(each):.2f} CPU ms a call of 16 tokens, both sides ({asked.calls} at once)")
    for source, pid in roads.values():
        source.close()
        if psutil.pid_exists(pid):
            for one in (*psutil.Process(pid).children(recursive=True), psutil.Process(pid)):
                one.kill()


if __name__ == "__main__":
    main()
