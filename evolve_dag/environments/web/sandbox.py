"""Python that a policy wrote, run where it can harm nothing; and documents that others wrote, parsed there.

One process a job, nothing kept between jobs. What the process can do is decided by the kernel (:mod:`confine`), in one of
two ways, the first that *holds here*: each is tried with an attack on itself before it is trusted, and without one that
holds nothing runs.

1. ``bubblewrap``: namespaces of its own (files, network, processes, users), by the program ``bwrap``;
   and the system-call filter.
2. ``landlock``: the kernel's own rules on paths; and the system-call filter. Needs neither a program nor a privilege, so it
   works in most containers. Names and sizes of files outside can be asked there, their content cannot.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

from evolve_dag.environments.web import confine
from evolve_dag.errors import ModelError, SessionError

StrategyName = Literal["bubblewrap", "landlock"]
STRATEGIES: tuple[StrategyName, ...] = ("bubblewrap", "landlock")
"""In order of preference."""

FILE_BYTES = 8_000_000
"""Largest file that a job may write."""
FOLDER_BYTES = 32_000_000
"""Most that its folder may hold, all files together."""
FOLDER_FILES = 1_000
OPEN_FILES = 32
OUTPUT_BYTES = 400_000
"""Output after which a job is stopped."""
START_SECONDS = 60.0
"""Longest wait for a process to shut itself in, on a machine that is busy."""
_POLL_SECONDS = 0.05
_ENVIRONMENT = {
    "PYTHONHASHSEED": "0",  # the same code prints a set in the same order
    "LANG": "C.UTF-8",
    "TZ": "UTC",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",  # else pyarrow complains that it may open no thread
    **dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1"),
}
"""Everything that a job finds in its environment."""

_DOCUMENTS = Path(confine.__file__).resolve().with_name("documents.py")

Ending = Literal["done", "error", "unreadable", "time", "memory", "output", "disk", "crash"]


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a job did."""

    output: bytes
    """What it wrote, at most :data:`OUTPUT_BYTES`."""
    ending: Ending
    """``done``; ``error``: it ended by itself, with a status that is not 0; ``unreadable``: a document without text;
    else what it was stopped for."""


class NotConfinedError(Exception):
    """The process could not be shut in; the job was not begun."""


def not_started(problem: NotConfinedError) -> SessionError:
    """That a job was not begun where a sandbox holds: it has no memory, no process or no time left on this machine, which says
    nothing about whoever asked for it."""
    what = f"a process of the sandbox could not be started: {' '.join(str(problem).split())[:200]}"
    return SessionError(what, "free memory and processes of this machine, or lower runtime.concurrency")


class Sandbox:
    """Runs jobs under one strategy. Safe to use from many threads.

    Use :func:`open_sandbox`, which gives one that was proven here.
    """

    def __init__(self, strategy: StrategyName | None) -> None:
        self.strategy = strategy
        """None: resource limits alone; for parsing where no strategy holds, never for code."""

    def run_python(self, code: str, *, seconds: float, megabytes: int) -> Outcome:
        """Run ``code``.

        Args:
            seconds: of processor time and of wall time.
            megabytes: of address space.

        Raises:
            NotConfinedError: it was not begun.
        """
        if self.strategy is None:
            raise NotConfinedError("code runs only where a strategy holds")
        return self._run({"job": "python"}, code.encode("utf-8"), seconds=seconds, megabytes=megabytes, output=OUTPUT_BYTES)

    def parse(self, body: bytes, kind: str, arguments: Mapping[str, Any], *, seconds: float, megabytes: int = 2048) -> Outcome:
        """Text of a document by :func:`documents.to_text`.

        Raises:
            NotConfinedError: it was not begun, e.g. since a library is missing.
        """
        spec = {
            "job": "document",
            "documents": str(_DOCUMENTS),
            "format": kind,
            "arguments": dict(arguments),
        }
        return self._run(spec, body, seconds=seconds, megabytes=megabytes, output=8_000_000)

    def _run(self, spec: dict[str, Any], body: bytes, *, seconds: float, megabytes: int, output: int) -> Outcome:
        folder = Path(tempfile.mkdtemp(prefix="evolve-sandbox-"))
        try:
            limits = {
                "megabytes": megabytes,
                "cpu_seconds": int(seconds) + 2,
                "file_bytes": FILE_BYTES,
                "open_files": OPEN_FILES,
            }
            confined = self.strategy is not None
            landlock = (
                {"readable": _readable(), "writable": [str(folder), "/dev/null"]} if self.strategy == "landlock" else None
            )
            spec |= {"path": _module_path(), "limits": limits, "landlock": landlock, "seccomp": confined}
            spec["bytes"] = len(body)
            feed = json.dumps(spec).encode() + b"\n" + body
            outcome = _supervise(self._command(folder), folder, feed, seconds=seconds, output=output)
            # One name for the folder, whatever the machine and the strategy.
            return Outcome(outcome.output.replace(str(folder).encode(), b"/job"), outcome.ending)
        finally:
            _remove(folder)

    def _command(self, folder: Path) -> list[str]:
        # -P -s -S: no path of ours, no user's packages, no code that site-packages run at start.
        python = [_interpreter(), "-P", "-s", "-S", "-B", str(Path(confine.__file__).resolve())]
        if self.strategy != "bubblewrap":
            return python
        bwrap = shutil.which("bwrap")
        if bwrap is None:
            raise NotConfinedError("the program bwrap is not installed")
        # No --new-session: the session is new already, and what is within stays in the group that is killed as one.
        command = [bwrap, "--unshare-all", "--die-with-parent", "--cap-drop", "ALL"]
        for path in ("/lib", "/lib64", "/lib32", "/bin"):
            if os.path.islink(path):  # noqa: PTH114
                command += ["--symlink", os.readlink(path), path]  # noqa: PTH115
        for path in (*_readable(), _interpreter(), python[-1], str(_DOCUMENTS)):
            if not Path(path).is_symlink() or Path(path).is_file():
                command += ["--ro-bind-try", path, path]
        command += ["--dev-bind", "/dev/null", "/dev/null", "--bind", str(folder), "/job", "--chdir", "/job"]
        return [*command, "--remount-ro", "/", "--", *python]


def _interpreter() -> str:
    return os.path.realpath(sys.executable)


def _module_path() -> list[str]:
    """Where modules are found: the standard library and installed packages, nothing of this project's folder."""
    paths = sysconfig.get_paths()
    standard = paths["stdlib"]
    found = [standard, f"{standard}/lib-dynload", paths["purelib"], paths["platlib"]]
    return list(dict.fromkeys(os.path.realpath(path) for path in found))


def _readable() -> list[str]:
    """Paths that an interpreter with numpy needs to read."""
    libraries = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib"]
    shared = [os.path.realpath(Path(sys.base_prefix) / "lib")]
    others = ["/etc/ld.so.cache", "/usr/share/zoneinfo"]
    here = [str(Path(confine.__file__).resolve())]
    return list(dict.fromkeys([*_module_path(), *libraries, *shared, *others, *here]))


def _supervise(command: list[str], folder: Path, feed: bytes, *, seconds: float, output: int) -> Outcome:
    """Start ``command``, write ``feed`` to it, watch its limits, and leave no process behind."""
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=_ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        close_fds=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    stopped: Ending | None = None
    written = bytearray()
    try:
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        rest = memoryview(feed)
        deadline = time.monotonic() + START_SECONDS
        begun = False
        with selectors.DefaultSelector() as waiting:
            waiting.register(process.stdout, selectors.EVENT_READ)
            waiting.register(process.stdin, selectors.EVENT_WRITE)
            open_ended = True
            looked = 0.0
            # A program may close its output and go on: what ends the wait is the end of the process.
            while stopped is None and (open_ended or not _has_ended(process)):
                for key, _ in waiting.select(_POLL_SECONDS if open_ended else _POLL_SECONDS / 10):
                    if key.fileobj is process.stdin:
                        try:
                            rest = rest[os.write(process.stdin.fileno(), rest[:65_536]) :]
                        except BlockingIOError:
                            continue
                        except BrokenPipeError:
                            rest = rest[:0]
                        if not rest:
                            waiting.unregister(process.stdin)
                            process.stdin.close()
                    else:
                        chunk = os.read(process.stdout.fileno(), 65_536)
                        written += chunk
                        if not chunk:
                            open_ended = False
                            waiting.unregister(process.stdout)
                now = time.monotonic()
                if not begun and len(written) >= len(confine.READY):
                    if not written.startswith(confine.READY):
                        break
                    begun, deadline = True, now + seconds
                if len(written) > output + len(confine.READY):
                    stopped = "output"
                elif now > deadline:
                    stopped = "time"
                elif now - looked > _POLL_SECONDS:
                    looked = now
                    if _overfull(folder):
                        stopped = "disk"
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        with contextlib.suppress(OSError):
            process.stdin.close()
        process.stdout.close()
        status = process.wait()
    if not begun:
        said = bytes(written[-500:]).decode("utf-8", "replace").strip()
        raise NotConfinedError(said or f"the process ended with status {status} before it was shut in")
    content = bytes(written[len(confine.READY) :][:output])
    if stopped is None:
        stopped = _ending(status, content)
    return Outcome(content, stopped)


def _remove(folder: Path) -> None:
    """Remove the folder, even while a process that was just killed makes its last file in it."""
    for _ in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(0.02)


def _has_ended(process: subprocess.Popen[bytes]) -> bool:
    if not hasattr(os, "waitid"):  # macOS, where nothing but parsing runs
        return process.poll() is not None
    # Looked at, not reaped: until it is, its number is given to nobody else, and its group can be killed by it.
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _ending(status: int, content: bytes) -> Ending:
    killed = -status if status < 0 else status - 128 if status > 128 else 0  # bwrap adds 128 to the signal's number
    if killed in (signal.SIGXCPU, signal.SIGKILL):
        return "time"
    if killed:
        return "crash"
    if status == 0:
        return "done"
    if status == confine.UNREADABLE:
        return "unreadable"
    return "memory" if b"MemoryError" in content[-200:] else "error"


def _overfull(folder: Path) -> bool:
    size = 0
    with contextlib.suppress(OSError), os.scandir(folder) as entries:
        for count, entry in enumerate(entries, 1):
            with contextlib.suppress(OSError):
                size += entry.stat(follow_symlinks=False).st_blocks * 512
            if count > FOLDER_FILES or size > FOLDER_BYTES:
                return True
    return False


# ---------------------------------------------------------------- proof before trust

ATTACK = """
import ctypes, os, signal
through = []
def tried(name, act):
    try:
        if act() is not False:
            through.append(name)
    except BaseException:
        pass
def network():
    import socket
    socket.create_connection(("127.0.0.1", PORT), timeout=2)
def raw_socket():
    return ctypes.CDLL(None).socket(2, 1, 0) >= 0
def fork():
    if os.fork() == 0:
        os._exit(0)
def group():
    return ctypes.CDLL(None).kill(PARENT, 0) == 0
def sigio():
    import fcntl
    read, write = os.pipe()
    fcntl.fcntl(read, fcntl.F_SETOWN, PARENT)
def mode():
    os.chmod(CANARY, 0o777)
def limits():
    import resource
    resource.setrlimit(resource.RLIMIT_CPU, (1, 1))
def truncate():
    os.open(CANARY, os.O_RDONLY | os.O_TRUNC)
tried("network", network)
tried("socket", raw_socket)
tried("read a file", lambda: open(CANARY).read())
tried("read /etc/passwd", lambda: open("/etc/passwd").read())
tried("read the parent's environment", lambda: open(f"/proc/{PARENT}/environ").read())
tried("environment", lambda: bool(set(os.environ) - KNOWN))
tried("write a file", lambda: open(CANARY, "a"))
tried("truncate a file", truncate)
tried("make a file", lambda: open(CANARY + ".new", "w"))
tried("change a mode", mode)
tried("second process", fork)
tried("exec", lambda: os.execv("/bin/sh", ["sh", "-c", "echo executed"]))
tried("signal", group)
tried("signal by a pipe", sigio)
tried("limits", limits)
print(NONCE, sorted(through))
"""
"""Tries everything that must fail, and says what did not."""


def attack(sandbox: Sandbox, folder: Path) -> list[str]:
    """What gets through ``sandbox``; [] when it holds.

    Args:
        folder: an empty one outside of it, for the file that must not be reached.

    Raises:
        NotConfinedError: the strategy cannot be used here at all.
    """
    import socket

    canary = folder / "canary"
    canary.write_text("secret", encoding="utf-8")
    canary.chmod(0o600)
    nonce = secrets.token_hex(8)
    with socket.create_server(("127.0.0.1", 0)) as server:
        names = {
            "PORT": server.getsockname()[1],
            "PARENT": os.getpid(),
            "CANARY": str(canary),
            "NONCE": nonce,
            # Python itself sets LC_CTYPE where the locale is C; bwrap sets PWD.
            "KNOWN": {*_ENVIRONMENT, "LC_CTYPE", "PWD"},
        }
        code = "\n".join(f"{name} = {value!r}" for name, value in names.items()) + ATTACK
        outcome = sandbox.run_python(code, seconds=20.0, megabytes=512)
    text = outcome.output.decode("utf-8", "replace").strip()
    if canary.read_text(encoding="utf-8") != "secret" or canary.stat().st_mode & 0o777 != 0o600:
        return ["changed a file"]
    if text != f"{nonce} []":
        return [text.removeprefix(nonce).strip()[:300] or f"no report ({outcome.ending})"]
    return []


_lock = threading.Lock()


@lru_cache(maxsize=8)
def _tried(strategy: StrategyName) -> str:
    """'' when the strategy holds here; else why it is not used."""
    if sys.platform != "linux":
        return f"{sys.platform} has neither namespaces nor seccomp"
    try:
        with tempfile.TemporaryDirectory(prefix="evolve-probe-") as folder:
            through = attack(Sandbox(strategy), Path(folder))
    except (NotConfinedError, OSError) as problem:
        return " ".join(str(problem).split())[:300]
    return f"its own test got through: {', '.join(through)}" if through else ""


def probe(strategy: StrategyName) -> str:
    """'' when the strategy holds on this machine; else why it is not used. Tried once a process."""
    with _lock:
        return _tried(strategy)


REMEDY = (
    "install bubblewrap (apt install bubblewrap), or use a Linux with Landlock (5.13), or leave python out of environment.tools"
)


def open_sandbox() -> Sandbox:
    """A sandbox that withstood its own attack on this machine.

    Raises:
        ModelError: there is none.
    """
    reasons = []
    for strategy in STRATEGIES:
        reason = probe(strategy)
        if not reason:
            return Sandbox(strategy)
        reasons.append(f"{strategy}: {reason}")
    raise ModelError(f"the python tool has no sandbox on this machine ({'; '.join(reasons)})", REMEDY)


def open_parser() -> Sandbox:
    """Where documents are parsed: the sandbox, or where there is none a process with resource limits alone.

    Parsing runs known libraries over hostile bytes, not hostile code: limits keep it from hanging or eating the memory.
    """
    try:
        return open_sandbox()
    except ModelError:
        return Sandbox(None)


def sandbox_report() -> str:
    """One line for ``evolve doctor``: which strategy holds here, and why the others are not used."""
    parts = []
    for strategy in STRATEGIES:
        reason = probe(strategy)
        parts.append(f"{strategy} holds" if not reason else f"{strategy} is not used: {reason}")
    return "; ".join(parts) + ("" if any(part.endswith("holds") for part in parts) else f": {REMEDY}")
