"""Our end of the pipe to vLLM's engine, which runs in a process of its own (the other end: ``vllm_engine.py``)."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from evolve_dag.errors import ClosedError, ModelError, UnreachableError
from evolve_dag.inference.folders import longest_context
from evolve_dag.inference.vllm_source import RANKS, Adapter, Ask, Check, Sampled
from evolve_dag.secrecy import describe_error, excerpt

if TYPE_CHECKING:
    from evolve_dag.config.schema import RuntimeSettings, VllmModelSettings

T = TypeVar("T")

ENGINE = Path(__file__).with_name("vllm_engine.py")
START_SECONDS = 1800.0
"""Longest wait for the engine to load a model and compile it."""
_RESTARTS = 2
"""How often an engine that died is started again; its calls are asked anew."""
_DEATHS = 2
"""A call that was there at so many deaths is their likely cause, and fails."""
_CLOSE_SECONDS = 15.0
_REMEDY = (
    "models.policy.python must name an interpreter that imports vllm; where memory is short, lower models.policy.gpu_memory, "
    "models.policy.context_tokens or runtime.concurrency"
)


@dataclass(slots=True)
class _Pending:
    line: str
    future: Future[Any]
    convert: Callable[[dict[str, Any]], Any]
    deaths: int = 0


class EngineProcess:
    """Implements :class:`~evolve_dag.inference.vllm_source.Source` with one engine of our own.

    An engine that dies is started again, with its adapters, and asked again what it had not answered. One that hangs is ended.

    Args:
        python: interpreter of an environment that holds vLLM; '' takes this one.
        arguments: of vLLM's ``EngineArgs``.
        environment: variables for the process besides ours.
        timeout_seconds: longest wait for one answer.

    Raises:
        ModelError: the engine does not start; the message ends with the last that it printed.
    """

    def __init__(
        self,
        python: str,
        arguments: Mapping[str, Any],
        *,
        environment: Mapping[str, str] | None = None,
        timeout_seconds: float = 600.0,
    ) -> None:
        self.timeout_seconds: float | None = timeout_seconds
        self._python = python or sys.executable
        self._arguments = dict(arguments)
        self._environment = dict(environment or {})
        self._lock = threading.RLock()
        self._pending: dict[int, _Pending] = {}
        self._numbers = itertools.count()
        self._adapters: dict[str, Adapter] = {}
        self._restarts = 0
        self._heard = 0.0  # when the engine last gave anything, monotonic clock
        self._closed = False
        self._over: ModelError | None = None  # why there is no engine any more
        self._ready: Future[dict[str, Any]] = Future()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the object)
        self._process = self._start()
        try:
            ready = self._ready.result(START_SECONDS)
        except FutureTimeout:
            message = f"vLLM's engine did not start within {START_SECONDS:.0f} s{self._last_lines()}"
            self.close()
            raise ModelError(message, _REMEDY) from None
        except ModelError:
            self.close()
            raise
        self.max_context = int(ready["max_model_len"])
        self.version = str(ready["version"])

    @classmethod
    def start(
        cls, settings: VllmModelSettings, runtime: RuntimeSettings, folder: Path, adapters: tuple[Adapter, ...]
    ) -> EngineProcess:
        """An engine with room for ``adapters``, which :meth:`load` then loads.

        Args:
            folder: of the base model.
        """
        return cls(
            settings.python,
            engine_arguments(settings, runtime, folder, adapters),
            environment={"OMP_NUM_THREADS": str(runtime.threads)} if runtime.device == "cpu" else None,
            timeout_seconds=settings.timeout_seconds,
        )

    @property
    def pid(self) -> int:
        """Process id of the engine."""
        return self._process.pid

    def load(self, adapter: Adapter | None, probe: Check | None) -> None:
        if adapter is not None:
            self._waited_for(self._send(_loading(adapter), lambda _: None))
            with self._lock:
                self._adapters[adapter.name] = adapter
        if probe is not None:
            futures = [self.submit(ask) for ask in probe.asks]
            probe.judge([self._waited_for(future) for future in futures], "vLLM's engine")

    def unload(self, adapter: Adapter) -> None:
        """Take an adapter out, so that another may have its place."""
        with self._lock:
            self._adapters.pop(adapter.name, None)
        self._waited_for(self._send({"op": "unload", "name": adapter.name}, lambda _: None))

    def _waited_for(self, future: Future[T]) -> T:
        """Its result.

        Raises:
            UnreachableError: it does not come within :attr:`timeout_seconds`.
        """
        try:
            return future.result(self.timeout_seconds)
        except FutureTimeout:
            seconds = self.timeout_seconds or 0.0
            self.late(seconds)
            raise UnreachableError(
                f"vLLM's engine gave no answer within {seconds:g} s{self._last_lines()}", "raise models.policy.timeout_seconds"
            ) from None

    def submit(self, ask: Ask) -> Future[Sampled]:
        return self._send(
            {
                "op": "sample",
                "ids": ask.ids,
                "adapter": ask.adapter.name if ask.adapter else None,
                "sampling": ask.parameters(),
                "schema": dict(ask.schema) if ask.schema else None,
            },
            _sampled,
        )

    def late(self, seconds: float) -> None:
        """End an engine that gave nothing for so long: it hangs."""
        with self._lock:
            if time.monotonic() - self._heard >= seconds:
                self._kill(self._process)

    def release(self, session: str) -> None:
        """Nothing to do: the engine finds shared prefixes by itself."""

    def close(self) -> None:
        with self._lock:
            if self._closed:
                return
            self._closed = True
            process = self._process
            with contextlib.suppress(OSError):
                if process.stdin is not None:
                    process.stdin.close()
        self._listener.join(_CLOSE_SECONDS)
        if self._listener.is_alive():
            self._kill(process)
            self._listener.join()
        self._fail(ClosedError("vLLM's engine was closed", "open the policy again"))
        self._log.close()

    # ------------------------------------------------------------------ the process and its pipe

    def _start(self) -> subprocess.Popen[bytes]:
        environment = {**os.environ, **self._environment}
        if self._python != sys.executable:  # they speak of our environment, not of the engine's
            for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV"):
                environment.pop(name, None)
        try:
            process = subprocess.Popen(
                [self._python, "-u", str(ENGINE)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
                start_new_session=True,
            )
        except OSError as problem:
            raise ModelError(f"{self._python}: cannot be started: {problem.strerror}", _REMEDY) from problem
        self._process = process
        self._heard = time.monotonic() + START_SECONDS  # until then it may load its model in silence
        self._write(json.dumps({"op": "start", "arguments": self._arguments}))
        self._listener = threading.Thread(target=self._listen, args=(process,), name="evolve-vllm", daemon=True)
        self._listener.start()
        return process

    def _send(self, message: dict[str, Any], convert: Callable[[dict[str, Any]], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            if self._over is not None or self._closed:
                future.set_exception(self._over or ClosedError("vLLM's engine was closed", "open the policy again"))
                return future
            number = next(self._numbers)
            line = json.dumps({**message, "id": number}, separators=(",", ":"))
            self._pending[number] = _Pending(line, future, convert)
            self._write(line)
        future.add_done_callback(lambda done: self._abort(number) if done.cancelled() else None)
        return future

    def _abort(self, number: int) -> None:
        with self._lock:
            if self._pending.pop(number, None) is not None and not self._closed:
                self._write(json.dumps({"op": "abort", "target": number}))

    def _write(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a dead engine is the listener's affair
            assert self._process.stdin is not None
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()

    def _listen(self, process: subprocess.Popen[bytes]) -> None:
        """Take the answers of one engine until it ends."""
        assert process.stdout is not None
        for line in process.stdout:
            try:
                message = json.loads(line)
            except ValueError:  # torn: the engine was killed while it wrote
                self._kill(process)
                break
            self._heard = time.monotonic()
            if "ready" in message:
                if not self._ready.done():
                    self._ready.set_result(message["ready"])
                continue
            with self._lock:
                pending = self._pending.pop(message["id"], None)
            if pending is None or not pending.future.set_running_or_notify_cancel():
                continue
            if "error" in message:
                pending.future.set_exception(ModelError(f"vLLM's engine refused a call: {excerpt(message['error'], 400)}"))
                continue
            try:
                pending.future.set_result(pending.convert(message))
            except Exception as problem:
                pending.future.set_exception(ModelError(f"vLLM's engine gave an unreadable answer: {describe_error(problem)}"))
        self._ended(process)

    def _ended(self, process: subprocess.Popen[bytes]) -> None:
        """The engine is gone: start it again, unless that is as it should be or of no use."""
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        self._kill(process)  # what a tensor-parallel engine may have left
        assert process.stdout is not None
        process.stdout.close()
        with self._lock:
            code = process.wait()
            if self._closed:
                return
            error = UnreachableError(f"vLLM's engine ended with status {code}{self._last_lines()}", _REMEDY)
            never_ready = not self._ready.done()
            suspects: list[_Pending] = []
            if never_ready:
                self._ready.set_exception(error)
            if never_ready or self._restarts >= _RESTARTS:
                self._over = error
            else:
                self._restarts += 1
                for number, pending in list(self._pending.items()):
                    pending.deaths += 1
                    if pending.deaths >= _DEATHS:
                        suspects.append(self._pending.pop(number))
                self._start_again(error)
        _fail_all(suspects, error)
        if self._over is not None:
            self._fail(self._over)

    def _start_again(self, error: UnreachableError) -> None:
        """Another engine, which is asked what the one that ended with ``error`` has not answered."""
        try:
            self._process = self._start()
        except ModelError as problem:  # no memory for a process, an environment that was moved away
            self._over = UnreachableError(f"{error.what}\nand none can be started again: {problem.what}", _REMEDY)
            return
        for adapter in self._adapters.values():
            self._send(_loading(adapter), lambda _: None)
        for pending in self._pending.values():
            self._write(pending.line)

    def _kill(self, process: subprocess.Popen[bytes]) -> None:
        """End an engine and all that it started, unless it was reaped: then another may have its number."""
        with self._lock, contextlib.suppress(ProcessLookupError, PermissionError):
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)

    def _fail(self, error: ModelError) -> None:
        with self._lock:
            waiting = list(self._pending.values())
            self._pending.clear()
        _fail_all(waiting, error)

    def _last_lines(self) -> str:
        """The end of what the engine printed, for an error message."""
        try:
            size = os.fstat(self._log.fileno()).st_size
            text = os.pread(self._log.fileno(), 6000, max(0, size - 6000)).decode("utf-8", "replace")
        except (OSError, ValueError):
            return ""
        whole = text if size <= 6000 else text.partition("\n")[2]  # half of a line might hold half of a secret
        lines = [excerpt(line, 400) for line in whole.splitlines() if line.strip()]
        return ": …\n" + "\n".join(lines[-12:]) if lines else ""


def engine_arguments(
    settings: VllmModelSettings, runtime: RuntimeSettings, folder: Path, adapters: tuple[Adapter, ...]
) -> dict[str, Any]:
    """What vLLM's ``EngineArgs`` is made from."""
    arguments: dict[str, Any] = {
        "model": str(folder.resolve()),
        "dtype": settings.dtype,
        "max_model_len": longest_context(settings, folder),
        "max_num_seqs": runtime.concurrency,
        "gpu_memory_utilization": settings.gpu_memory,
        "tensor_parallel_size": settings.tensor_parallel,
        "enable_prefix_caching": True,
        "logprobs_mode": "raw_logprobs",
        "generation_config": "vllm",  # not the model's own file: our parameters are all there are
        "disable_log_stats": True,
    }
    if adapters:
        rank = max(adapter.rank for adapter in adapters)
        arguments |= {
            "enable_lora": True,
            # One more than there are: on a CPU a call without adapter is given the adapter of the last slot.
            "max_loras": len(adapters) + 1,
            "max_lora_rank": next(known for known in RANKS if known >= rank),
            "lora_target_modules": sorted({name for adapter in adapters for name in adapter.targets}),
        }
    return arguments


def _loading(adapter: Adapter) -> dict[str, Any]:
    return {"op": "load", "name": adapter.name, "path": str(adapter.folder)}


def _sampled(message: dict[str, Any]) -> Sampled:
    return Sampled(
        tuple(message["ids"]),
        tuple(message["logprobs"]),
        message["cached"],
        tuple({int(index): float(value) for index, value in table} for table in message.get("top", ())),
    )


def _fail_all(waiting: list[_Pending], error: ModelError) -> None:
    for pending in waiting:
        if pending.future.set_running_or_notify_cancel():
            pending.future.set_exception(error)
