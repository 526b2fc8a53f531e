"""vLLM's engine in a process of its own: JSON lines in on stdin, JSON lines out on what was stdout.

This file is run by path with the interpreter of a virtual environment that holds vLLM and need not hold evolve-dag;
it imports the standard library and vLLM, nothing else. Calls that arrive while others run join their batch. The
process ends when its stdin does or when its parent is gone, and all memory, the GPU's too, goes with it.

In:  ``{"op": "start", "arguments": {...}}``  first; vLLM's ``EngineArgs``
     ``{"op": "load", "id", "name", "path"}``  ``{"op": "unload", "id", "name"}``  adapters
     ``{"op": "sample", "id", "ids", "adapter", "sampling": {...}, "schema"}``  ``{"op": "abort", "target"}``
Out: ``{"ready": {...}}``, then one ``{"id", ...}`` or ``{"id", "error"}`` for each line that has an id, in any order.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import sys
import threading
import time
from importlib import metadata
from pathlib import Path
from typing import Any

_LAST_WORDS_SECONDS = 10.0
"""How long an orderly end may take before the process group is killed."""


def main() -> None:
    """Serve until the parent closes the pipe."""
    # Python puts this file's folder first, where `transformers.py` and `openai.py` are modules of ours.
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != here]
    # vLLM and its libraries print: everything but our own lines goes to stderr.
    commands = os.fdopen(os.dup(0), "r", encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)

    inbox: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(commands, inbox), daemon=True).start()
    threading.Thread(target=_watch, args=(os.getppid(), inbox), daemon=True).start()

    def reply(**fields: Any) -> None:
        replies.write(json.dumps(fields, separators=(",", ":")) + "\n")
        replies.flush()

    first = inbox.get()
    if first is not None:
        _Engine(first["arguments"], reply).serve(inbox)


class _Engine:
    """vLLM's engine with the adapters that are loaded; one thread, this one, touches it."""

    def __init__(self, arguments: dict[str, Any], reply: Any) -> None:
        cpu = _cpu_build()
        for name, value in _ENVIRONMENT.items() if cpu else ():
            os.environ.setdefault(name, value)
        # The engine stays in this process: no second one to outlive it.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

        import vllm  # type: ignore[import-not-found]
        from vllm import EngineArgs, LLMEngine

        if cpu:
            # There this share is of all memory, not of a card's; VLLM_CPU_KVCACHE_SPACE decides instead.
            # A seeded call whose prompt is computed in parts ends the engine there ("CPU Generator does not use offset", 0.32).
            arguments = {**arguments, "enforce_eager": True, "enable_chunked_prefill": False}
            arguments.pop("gpu_memory_utilization", None)
            arguments["kv_cache_memory_bytes"] = int(float(os.environ["VLLM_CPU_KVCACHE_SPACE"]) * 2**30)
        self._engine = LLMEngine.from_engine_args(EngineArgs(**arguments))
        self._reply = reply
        self._adapters: dict[str, Any] = {}
        self._free_slots = arguments.get("max_loras", 1) - 1
        self._numbers = 0
        self._running: dict[str, tuple[int, bool]] = {}
        reply(ready={"max_model_len": self._engine.model_config.max_model_len, "version": vllm.__version__, "pid": os.getpid()})

    def serve(self, inbox: queue.SimpleQueue[dict[str, Any] | None]) -> None:
        while True:
            while not self._running or not inbox.empty():
                message = inbox.get()
                if message is None:
                    return
                self._obey(message)
            for output in self._engine.step():
                if output.finished:
                    self._finish(output)

    def _obey(self, message: dict[str, Any]) -> None:
        try:
            getattr(self, f"_op_{message['op']}")(message)
        except Exception as problem:  # a bad call is its caller's affair; the others go on
            self._reply(id=message.get("id"), error=f"{type(problem).__name__}: {problem}")

    def _op_load(self, message: dict[str, Any]) -> None:
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]

        if message["name"] not in self._adapters:
            # With all slots taken, requests without adapter are given the last one's on a CPU: one slot stays free.
            if len(self._adapters) >= self._free_slots:
                raise ValueError(f"all {self._free_slots} adapter slots are taken by {', '.join(self._adapters)}")
            self._numbers += 1
            # Cached prefixes are known by the adapter's name, so a name is never used for a second load.
            request = LoRARequest(f"{message['name']}#{self._numbers}", self._numbers, message["path"])
            if not self._engine.add_lora(request):
                raise ValueError("vLLM refused the adapter")
            self._adapters[message["name"]] = request
        self._reply(id=message["id"])

    def _op_unload(self, message: dict[str, Any]) -> None:
        request = self._adapters.pop(message["name"], None)
        if request is not None:
            self._engine.remove_lora(request.lora_int_id)
        self._reply(id=message["id"])

    def _op_sample(self, message: dict[str, Any]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams  # type: ignore[import-not-found]

        adapter = message.get("adapter")
        if adapter and adapter not in self._adapters:
            raise ValueError(f"adapter {adapter} is not loaded")
        schema = message.get("schema")
        params = SamplingParams(
            **message["sampling"],
            ignore_eos=True,  # stop_token_ids says when to stop
            detokenize=schema is not None,
            output_kind=RequestOutputKind.FINAL_ONLY,
            structured_outputs=StructuredOutputsParams(json=schema) if schema else None,
        )
        name = str(message["id"])
        self._running[name] = (message["id"], bool(message["sampling"]["logprobs"]))
        try:
            self._engine.add_request(
                name,
                {"prompt_token_ids": message["ids"]},
                params,
                lora_request=self._adapters[adapter] if adapter else None,
            )
        except BaseException:
            del self._running[name]
            raise

    def _op_abort(self, message: dict[str, Any]) -> None:
        name = str(message["target"])
        if self._running.pop(name, None) is not None:
            self._engine.abort_request([name])

    def _finish(self, output: Any) -> None:
        number, wants_top = self._running.pop(output.request_id, (None, False))
        if number is None:
            return
        [drawn] = output.outputs
        ids = [int(index) for index in drawn.token_ids]
        tables = drawn.logprobs or []
        fields: dict[str, Any] = {
            "id": number,
            "ids": ids,
            "logprobs": [table[index].logprob for table, index in zip(tables, ids)],  # noqa: B905 (Python 3.9)
            "cached": output.num_cached_tokens or 0,
            "finish": drawn.finish_reason,
        }
        if wants_top:
            fields["top"] = [[[index, entry.logprob] for index, entry in table.items()] for table in tables]
        self._reply(**fields)


_ENVIRONMENT = {
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
    "TORCHDYNAMO_DISABLE": "1",
}
"""What vLLM's CPU build needs on a small machine; what is set already stays."""


def _cpu_build() -> bool:
    try:
        return "cpu" in metadata.version("vllm")
    except metadata.PackageNotFoundError:
        return True  # distributed as vllm-cpu, or not there at all


def _listen(commands: Any, inbox: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    for line in commands:
        inbox.put(json.loads(line))
    _end(inbox)


def _watch(parent: int, inbox: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    """The pipe may be held open by a fork of a parent that was killed."""
    while os.getppid() == parent:
        time.sleep(1.0)
    _end(inbox)


def _end(inbox: queue.SimpleQueue[dict[str, Any] | None]) -> None:
    inbox.put(None)
    time.sleep(_LAST_WORDS_SECONDS)
    # Still here: a step hangs. Workers of a tensor-parallel engine are in the group too.
    if os.getpgrp() == os.getpid():
        os.killpg(os.getpgrp(), signal.SIGKILL)
    os._exit(1)


if __name__ == "__main__":
    main()
