"""The inside of the sandbox: give up everything that is not needed, for ever, then do one job.

This file runs as a script in a process of its own, with the standard library alone. One line of JSON (:mod:`sandbox`
writes it) and the job's bytes come through stdin; ``READY`` is written once nothing can be taken back, then the job's output.
Nothing that was written by others runs before that line: should any measure fail, the process ends instead.

The measures, each held by the kernel and none needing privileges:

- resource limits: processor, memory, size of a file, open files, no core file;
- Landlock (Linux 5.13): no path can be opened but the interpreter's own (to read) and the empty folder (to write);
- no capabilities, no way to gain any;
- seccomp: an allow list of system calls. No socket, no second process or thread, no exec, no signal to anybody, no change
  of modes, owners, times or limits, no ptrace; whatever is not on the list is refused with ``EPERM``.

Sources: the kernel's Documentation/userspace-api/landlock.rst and seccomp_filter.rst; numbers of calls from its
arch/x86/entry/syscalls/syscall_64.tbl and include/uapi/asm-generic/unistd.h.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import struct
import sys
from collections.abc import Mapping, Sequence
from typing import Any

READY = b"ready\n"
"""First bytes of the output of a process that is shut in."""
NOT_CONFINED = 97
"""Exit status of a process that could not shut itself in; it did nothing else."""
UNREADABLE = 98
"""Exit status of a document that holds no text; the output says why."""
CODE_NAME = "<python>"
"""File name of the job's code in tracebacks."""

# ---------------------------------------------------------------- seccomp

MACHINES: Mapping[str, tuple[int, int]] = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}
"""Machine -> AUDIT_ARCH number, column in the tables below."""

ALLOWED: Mapping[str, tuple[int | None, int | None]] = {
    # reading and writing what is open
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67), "pwrite64": (18, 68),
    "close": (3, 57), "close_range": (436, 436), "lseek": (8, 62), "dup": (32, 23), "dup2": (33, None), "dup3": (292, 24),
    "pipe": (22, None), "pipe2": (293, 59), "poll": (7, None), "ppoll": (271, 73), "select": (23, None), "pselect6": (270, 72),
    "fsync": (74, 82), "fdatasync": (75, 83), "ftruncate": (77, 46), "sendfile": (40, 71), "copy_file_range": (326, 285),
    # looking at files; what may be opened is Landlock's or the mount namespace's affair
    "fstat": (5, 80), "stat": (4, None), "lstat": (6, None), "newfstatat": (262, 79), "statx": (332, 291),
    "access": (21, None), "faccessat": (269, 48), "faccessat2": (439, 439), "getdents64": (217, 61), "getcwd": (79, 17),
    "chdir": (80, 49), "readlink": (89, None), "readlinkat": (267, 78), "umask": (95, 166),
    "rename": (82, None), "renameat": (264, 38), "renameat2": (316, 276), "unlink": (87, None), "unlinkat": (263, 35),
    # memory
    "mmap": (9, 222), "mprotect": (10, 226), "munmap": (11, 215), "mremap": (25, 216), "madvise": (28, 233), "brk": (12, 214),
    "membarrier": (324, 283),
    # this process and its time
    "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139), "sigaltstack": (131, 132),
    "nanosleep": (35, 101), "clock_nanosleep": (230, 115), "clock_gettime": (228, 113), "clock_getres": (229, 114),
    "gettimeofday": (96, 169), "time": (201, None), "getitimer": (36, 102), "setitimer": (38, 103), "alarm": (37, None),
    "restart_syscall": (219, 128), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "exit": (60, 93), "exit_group": (231, 94),
    "uname": (63, 160), "sysinfo": (99, 179), "getrusage": (98, 165), "getrlimit": (97, 163), "times": (100, 153),
    "futex": (202, 98), "sched_yield": (24, 124), "sched_getaffinity": (204, 123), "getcpu": (309, 168),
    "getrandom": (318, 278), "set_robust_list": (273, 99), "rseq": (334, 293),
}  # fmt: skip
"""System call -> its number on x86_64 and on aarch64. Absent on purpose though harmless-looking: ``truncate``, ``chmod`` and
``utime`` take paths that Landlock does not look at; ``mkdir`` would let the folder grow where its size is not measured."""

OPEN, OPENAT, FCNTL, IOCTL, PRLIMIT = (2, None), (257, 56), (72, 25), (16, 29), (302, 261)
_FCNTL_COMMANDS = (0, 1, 2, 3, 4, 1030)
"""DUPFD, GETFD, SETFD, GETFL, SETFL, DUPFD_CLOEXEC. Not SETOWN and SETSIG: with them a pipe sends any signal to any process."""
_IOCTL_REQUESTS = (0x5451, 0x5450, 0x5401)
"""FIOCLEX, FIONCLEX, TCGETS (isatty)."""
_O_ACCMODE, _O_TRUNC, _O_TMPFILE = 0o3, 0o1000, 0o20000000

_LOAD, _EQUAL, _AND, _RETURN = 0x20, 0x15, 0x54, 0x06
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000 | 1, 0x80000000
"""Allow; fail with EPERM; kill the process."""


def seccomp_filter(machine: str) -> bytes:
    """The BPF program, as an array of ``struct sock_filter``.

    Raises:
        OSError: the machine is not one whose calls are known.
    """
    if machine not in MACHINES:
        raise OSError(f"no table of system calls for {machine}")
    arch, column = MACHINES[machine]
    program: list[tuple[int, int, int, int]] = [
        (_LOAD, 0, 0, 4),  # seccomp_data.arch
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL),  # 32-bit calls have other numbers
        (_LOAD, 0, 0, 0),  # seccomp_data.nr
    ]
    for numbers in ALLOWED.values():
        if (number := numbers[column]) is not None:
            program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]

    def when(numbers: tuple[int | None, int | None], *checks: tuple[int, int, int, int]) -> None:
        """``checks`` decide about one call."""
        if (number := numbers[column]) is not None:
            program.extend([(_EQUAL, 0, len(checks), number), *checks])

    def one_of(argument: int, values: Sequence[int]) -> list[tuple[int, int, int, int]]:
        tests = [step for value in values for step in ((_EQUAL, 0, 1, value), (_RETURN, 0, 0, _ALLOW))]
        return [(_LOAD, 0, 0, 16 + 8 * argument), *tests, (_RETURN, 0, 0, _REFUSE)]

    def flags(argument: int) -> list[tuple[int, int, int, int]]:
        # O_RDONLY | O_TRUNC empties a file that Landlock before its third version lets be read; O_TMPFILE has no name to count.
        load = (_LOAD, 0, 0, 16 + 8 * argument)
        return [
            load, (_AND, 0, 0, _O_TRUNC | _O_ACCMODE), (_EQUAL, 0, 1, _O_TRUNC), (_RETURN, 0, 0, _REFUSE),
            load, (_AND, 0, 0, _O_TMPFILE), (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW),
        ]  # fmt: skip

    when(OPEN, *flags(1))
    when(OPENAT, *flags(2))
    when(FCNTL, *one_of(1, _FCNTL_COMMANDS))
    when(IOCTL, *one_of(1, _IOCTL_REQUESTS))
    # Limits may be read, not set: both halves of the pointer to the new one are null.
    when(PRLIMIT, (_LOAD, 0, 0, 32), (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _REFUSE),
         (_LOAD, 0, 0, 36), (_EQUAL, 1, 0, 0), (_RETURN, 0, 0, _REFUSE), (_RETURN, 0, 0, _ALLOW))  # fmt: skip
    program.append((_RETURN, 0, 0, _REFUSE))
    return b"".join(struct.pack("=HBBI", code, true, false, value) for code, true, false, value in program)


# ---------------------------------------------------------------- the kernel's doors

_LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 444, 445, 446
_PR_SET_PDEATHSIG, _PR_SET_SECCOMP, _PR_SET_NO_NEW_PRIVS = 1, 22, 38
_READ_FILE, _READ_DIR, _WRITE_FILE, _REMOVE_FILE, _MAKE_REG, _TRUNCATE = 1 << 2, 1 << 3, 1 << 1, 1 << 5, 1 << 8, 1 << 14
_FILE_RIGHTS = _READ_FILE | _WRITE_FILE | _TRUNCATE | 1
_RIGHTS_BY_VERSION = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF, 5: 0xFFFF}


class _Libc:
    """System calls that Python does not offer."""

    def __init__(self) -> None:
        self.library = ctypes.CDLL(None, use_errno=True)

    def call(self, name: str, *arguments: Any) -> int:
        # Whole registers: the kernel looks at all 64 bits of an argument that Python would pass as 32.
        words = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
        result = int(getattr(self.library, name)(*words))
        if result < 0:
            number = ctypes.get_errno()
            raise OSError(number, f"{name}: {os.strerror(number)}")
        return result


def landlock_version() -> int:
    """Version of the kernel's Landlock; 0 without it."""
    try:
        call = _Libc().call
        return call("syscall", _LANDLOCK_CREATE, None, 0, 1)
    except (OSError, AttributeError):
        return 0


def restrict_files(readable: Sequence[str], writable: Sequence[str]) -> None:
    """From now on nothing below other paths can be opened.

    Raises:
        OSError: the kernel has no Landlock.
    """
    version = landlock_version()
    if version < 1:
        raise OSError("the kernel has no Landlock")
    libc = _Libc()
    rights = _RIGHTS_BY_VERSION[min(version, 5)]
    network = 0b11 if version >= 4 else 0
    scoped = 0b11 if version >= 6 else 0  # abstract sockets and signals stay inside
    attributes = struct.pack("=QQQ", rights, network, scoped)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = libc.call("syscall", _LANDLOCK_CREATE, attributes, len(attributes), 0)
    grants = [(path, _READ_FILE | _READ_DIR) for path in readable]
    grants += [(path, _READ_FILE | _READ_DIR | _WRITE_FILE | _REMOVE_FILE | _MAKE_REG | _TRUNCATE) for path in writable]
    for path, granted in grants:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        if not os.path.isdir(path):  # noqa: PTH112 (pathlib costs a third of this script's start)
            granted &= _FILE_RIGHTS
        rule = struct.pack("=Qi", granted & rights, descriptor)
        libc.call("syscall", _LANDLOCK_ADD, ruleset, 1, rule, 0)
        os.close(descriptor)
    libc.call("syscall", _LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


def limit_resources(*, megabytes: int, cpu_seconds: int, file_bytes: int, open_files: int) -> None:
    """Limits that cannot be raised again."""
    import resource

    limits = {
        resource.RLIMIT_CPU: cpu_seconds,
        resource.RLIMIT_FSIZE: file_bytes,
        resource.RLIMIT_NOFILE: open_files,
        resource.RLIMIT_CORE: 0,
    }
    if sys.platform == "linux":
        limits[resource.RLIMIT_AS] = megabytes * 2**20
    for name, value in limits.items():
        _, hard = resource.getrlimit(name)
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(name, (value, value))


def give_up_privileges(filter_calls: bool) -> None:
    """No capabilities, no new privileges, and only the calls of :data:`ALLOWED`."""
    libc = _Libc()
    libc.call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    header = struct.pack("=Ii", 0x20080522, 0)  # version 3, this process
    libc.call("capset", header, bytes(24))
    if filter_calls:
        program = seccomp_filter(platform.machine())
        buffer = ctypes.create_string_buffer(program, len(program))

        class Program(ctypes.Structure):
            _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.c_void_p))

        header_of_program = Program(len(program) // 8, ctypes.addressof(buffer))
        libc.call("prctl", _PR_SET_SECCOMP, 2, ctypes.byref(header_of_program), 0, 0)


# ---------------------------------------------------------------- the jobs


def run_code(code: str) -> int:
    """Run the policy's code as a module of its own; a last line that is an expression shows its value, as at a prompt."""
    import ast
    import builtins
    import linecache
    import traceback
    import types

    builtins.exit = builtins.quit = sys.exit  # type: ignore[assignment]
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    linecache.cache[CODE_NAME] = (len(code), None, code.splitlines(keepends=True), CODE_NAME)
    try:
        tree = ast.parse(code, CODE_NAME)
        final = tree.body[-1] if tree.body else None
        last = final if isinstance(final, ast.Expr) else None
        del tree.body[len(tree.body) - (last is not None) :]
        exec(compile(tree, CODE_NAME, "exec"), module.__dict__)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), CODE_NAME, "eval"), module.__dict__)
            if value is not None:
                print(repr(value))
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)  # sys.exit("why") says so, as it does at a prompt
        return 1
    except BaseException as error:
        sys.stdout.flush()
        # Only the code's own lines: the others name places of this machine.
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == CODE_NAME]
        header = ["Traceback (most recent call last):\n"] * bool(frames)
        lines = header + traceback.format_list(frames) + traceback.format_exception_only(type(error), error)
        print("".join(lines), end="", file=sys.stderr)
        return 1
    return 0


def _load(path: str) -> Any:
    """A module by its file: its package is not in sight here."""
    import importlib.util

    found = importlib.util.spec_from_file_location("documents", path)
    assert found is not None
    assert found.loader is not None
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


_report = 1
"""Descriptor to the parent."""


def main() -> int:
    global _report
    if sys.platform == "linux":
        _Libc().call("prctl", _PR_SET_PDEATHSIG, 9, 0, 0, 0)
    spec = json.loads(sys.stdin.buffer.readline())
    body = sys.stdin.buffer.read()
    if len(body) != spec["bytes"]:
        raise EOFError("the job did not come whole")  # its sender has died
    sys.path[:] = spec["path"]
    job = spec["job"]
    if job == "document":
        # Libraries print warnings where they like: what the parent reads goes another way.
        _report = os.dup(1)
        nowhere = os.open(os.devnull, os.O_RDWR)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
    if job == "document":
        # What parses is imported before the doors close: the job is hostile, the libraries are not.
        documents = _load(spec["documents"])
        documents.prepare(spec["format"])
    limit_resources(**spec["limits"])
    if spec["landlock"] is not None:
        restrict_files(spec["landlock"]["readable"], spec["landlock"]["writable"])
    if sys.platform == "linux":
        give_up_privileges(spec["seccomp"])
    os.write(_report, READY)
    if job == "document":
        try:
            text, status = documents.to_text(body, spec["format"], spec["arguments"]), 0
        except documents.UnreadableError as problem:
            text, status = str(problem), UNREADABLE
        with os.fdopen(_report, "wb") as result:
            result.write(text.encode("utf-8", "replace"))
        return status
    # Text that is no UTF-8 must not end in an error of our own; the encoding follows no variable.
    sys.stdout.reconfigure(encoding="utf-8", errors="backslashreplace", line_buffering=True)  # type: ignore[union-attr]
    sys.stderr.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    return run_code(body.decode("utf-8"))


if __name__ == "__main__":
    try:
        status = main()
    except MemoryError:
        os.write(_report, b"MemoryError\n")
        status = 1
    except Exception as problem:
        os.write(_report, f"{type(problem).__name__}: {problem}\n".encode("utf-8", "replace"))
        status = NOT_CONFINED
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(status)  # what the code registered to run at the end does not
