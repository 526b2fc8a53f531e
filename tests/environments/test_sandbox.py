"""Every attack is tried under every strategy that this machine offers, and once without any, to see that it is one."""

from __future__ import annotations

import contextlib
import ctypes
import io
import os
import platform
import struct
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import web_fakes

from evolve_dag.environments.web import confine, sandbox
from evolve_dag.environments.web.sandbox import NotConfinedError, Outcome, Sandbox
from evolve_dag.errors import ModelError

HERE = [name for name in sandbox.STRATEGIES if not sandbox.probe(name)]
"""Strategies that hold on this machine."""


def everywhere(code: str, *, seconds: float = 5.0, megabytes: int = 512) -> list[tuple[str, str]]:
    """(ending, output) of ``code`` under each strategy; where there is none, that nothing runs is what is tested."""
    if not HERE:
        with pytest.raises(ModelError, match="no sandbox"):
            sandbox.open_sandbox()
    outcomes = [Sandbox(name).run_python(code, seconds=seconds, megabytes=megabytes) for name in HERE]
    return [(outcome.ending, outcome.output.decode()) for outcome in outcomes]


def unconfined(code: str) -> str:
    """The same code as a usual process."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False).stdout


# ---------------------------------------------------------------- what it is for


@pytest.mark.parametrize(
    ("code", "shown"),
    [
        ("1 + 1", "2\n"),
        ("print('a')\n'b'", "a\n'b'\n"),
        ("x = 3", ""),
        ("None", ""),
        ("", ""),
        ("import sys\nprint('to stderr', file=sys.stderr)", "to stderr\n"),
        ("print('naïve \\u6f22 \\ud800')", "naïve 漢 \\ud800\n"),
        ("import math, json, re, statistics, fractions, itertools, decimal, datetime\nmath.comb(10, 3)", "120\n"),
        ("from dataclasses import dataclass\n@dataclass\nclass A:\n    x: int = 1\nA()", "A(x=1)\n"),
        (
            "open('note.txt', 'w').write('kept'); print(open('note.txt').read())\nimport os\nos.listdir('.')",
            "kept\n['note.txt']\n",
        ),
        ("import numpy\nprint(int(numpy.linalg.matrix_rank(numpy.eye(3))))", "3\n"),
        ("import sympy\nx = sympy.Symbol('x')\nprint(sympy.integrate(x**2, x))", "x**3/3\n"),
        ("input()", "EOFError: EOF when reading a line\n"),
        ("__name__", "'__main__'\n"),
        ("exit()", ""),
    ],
)
def test_programs(code: str, shown: str) -> None:
    for ending, output in everywhere(code, seconds=30.0):
        assert output.endswith(shown)
        assert ending == ("error" if "Error" in shown else "done")
        assert shown or not output


def test_a_mistake_is_shown_with_its_own_lines_alone() -> None:
    code = "import json\ndef f():\n    return json.loads('{')\nf()\n"
    for ending, output in everywhere(code):
        assert ending == "error"
        assert 'File "<python>", line 3, in f\n    return json.loads' in output
        assert output.endswith("JSONDecodeError: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)\n")
        assert "/json/" not in output
        assert "confine" not in output
    for ending, output in everywhere("1 +"):
        assert ending == "error"
        assert "SyntaxError" in output


def test_nothing_is_kept_between_programs() -> None:
    for name in HERE:
        box = Sandbox(name)
        box.run_python("open('left', 'w').write('x'); import builtins; builtins.left = 1", seconds=5, megabytes=512)
        outcome = box.run_python("import os, builtins\n(os.listdir('.'), hasattr(builtins, 'left'))", seconds=5, megabytes=512)
        assert outcome == Outcome(b"([], False)\n", "done")


def test_the_same_program_prints_the_same_under_every_strategy() -> None:
    code = "import os, tempfile\nprint({'b', 'a', 'c', 'longer'}, sorted(os.listdir('.')))\ntempfile.mkdtemp(prefix='x')"
    outputs = {output.partition("/job/x")[0] for _, output in everywhere(code)}
    assert len(outputs) == min(1, len(HERE))


def test_many_at_once() -> None:
    if not HERE:
        return
    box, seen = Sandbox(HERE[0]), {}
    threads = [
        threading.Thread(target=lambda n=n: seen.update({n: box.run_python(f"{n} * {n}", seconds=20, megabytes=256).output}))
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == {n: f"{n * n}\n".encode() for n in range(8)}


# ---------------------------------------------------------------- attacks

REFUSED: dict[str, str] = {
    "connect": "import socket; socket.create_connection(('127.0.0.1', {port}), timeout=2); print('THROUGH')",
    "listen": "import socket; socket.create_server(('127.0.0.1', 0)); print('THROUGH')",
    "unix socket": "import socket; socket.socket(socket.AF_UNIX); print('THROUGH')",
    "raw socket call": "import ctypes; print('THROUGH' if ctypes.CDLL(None).socket(2, 1, 0) >= 0 else 'refused')",
    "read a secret": "print('THROUGH', open('{secret}').read())",
    "read it by another way": "import os; print('THROUGH', os.read(os.open('../../../../../..{secret}', os.O_RDONLY), 100))",
    "passwd": "print('THROUGH', open('/etc/passwd').read())",
    "parent's environment": "print('THROUGH', open('/proc/{parent}/environ').read())",
    "parent's memory": "print('THROUGH', open('/proc/{parent}/mem', 'rb'))",
    "list the root's home": "import os; print('THROUGH', os.listdir(os.path.dirname('{secret}')))",
    "write outside": "open('{folder}/new', 'w').write('x'); print('THROUGH')",
    "overwrite": "open('{secret}', 'r+').write('x'); print('THROUGH')",
    "truncate by path": "import os; os.truncate('{secret}', 0); print('THROUGH')",
    "truncate by reading": "import os; os.open('{secret}', os.O_RDONLY | os.O_TRUNC); print('THROUGH')",
    "delete": "import os; os.remove('{secret}'); print('THROUGH')",
    "rename": "import os; os.rename('{secret}', 'mine'); print('THROUGH')",
    "hard link": "import os; os.link('{secret}', 'mine'); print('THROUGH', open('mine').read())",
    "symbolic link": "import os; os.symlink('{secret}', 'mine'); print('THROUGH', open('mine').read())",
    "mode": "import os; os.chmod('{secret}', 0o777); print('THROUGH')",
    "owner": "import os; os.chown('{secret}', 1, 1); print('THROUGH')",
    "times": "import os; os.utime('{secret}', (0, 0)); print('THROUGH')",
    "folder": "import os; os.mkdir('deep'); print('THROUGH')",
    "device": "import os, stat; os.mknod('zero', stat.S_IFCHR | 0o666, os.makedev(1, 5)); print('THROUGH')",
    "nameless file": "import os; os.open('.', os.O_TMPFILE | os.O_RDWR); print('THROUGH')",
    "memory file": "import os; os.memfd_create('x'); print('THROUGH')",
    "kill the parent": "import os; os.kill({parent}, 9); print('THROUGH')",
    "kill everybody": "import os; os.kill(-1, 9); print('THROUGH')",
    "signal by a pipe": "import fcntl, os; fcntl.fcntl(os.pipe()[0], fcntl.F_SETOWN, {parent}); print('THROUGH')",
    "choose the signal": "import fcntl, os; fcntl.fcntl(os.pipe()[0], 10, 9); print('THROUGH')",
    "fork": "import os\npid = os.fork()\nprint('THROUGH')",
    "shell": "import subprocess; print('THROUGH', subprocess.run(['/bin/sh', '-c', 'id']))",
    "exec": """import os; os.execv('/bin/sh', ['sh', '-c', "echo THR''OUGH"])""",
    "thread": "import threading; threading.Thread(target=print).start(); print('THROUGH')",
    "raise the limits": "import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1)); print('THROUGH')",
    "trace the parent": "import ctypes; print('THROUGH' if ctypes.CDLL(None).ptrace(16, {parent}, 0, 0) == 0 else 'refused')",
    "namespaces": "import ctypes; print('THROUGH' if ctypes.CDLL(None).unshare(0x10000000) == 0 else 'refused')",
    "mount": "import ctypes; print('THROUGH' if ctypes.CDLL(None).mount(b'x', b'/', b'tmpfs', 0, None) == 0 else 'refused')",
    "another filter": "import ctypes; print('THROUGH' if ctypes.CDLL(None).prctl(4, 1, 0, 0, 0) == 0 else 'refused')",
    "become somebody": "import os; os.setuid(1); print('THROUGH')",
    "environment": "import os; print('THROUGH' if 'hidden' in str(dict(os.environ)) else 'refused')",
}


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], str]]:
    """Fills an attack's blanks, with a secret that stays as it is."""
    folder = tmp_path_factory.mktemp("outside")
    secret = folder / "secret"
    secret.write_text("TOP")
    secret.chmod(0o600)
    before = os.environ.get("EVOLVE_TEST_KEY")
    os.environ["EVOLVE_TEST_KEY"] = "hidden"
    with web_fakes.serve() as web:
        values = {"secret": str(secret), "folder": str(folder), "parent": str(os.getpid()), "port": str(web.port)}

        def fill(code: str) -> str:
            code = code.replace("'THROUGH'", "'THR' + 'OUGH'")  # a traceback shows the line itself
            for name, value in values.items():
                code = code.replace(f"{{{name}}}", value)
            return code

        yield fill
        assert not web.heard
    if before is None:
        del os.environ["EVOLVE_TEST_KEY"]
    assert [path.name for path in folder.iterdir()] == ["secret"]
    assert secret.read_text() == "TOP"
    assert secret.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("attack", REFUSED)
def test_attack(attack: str, outside: Callable[[str], str]) -> None:
    for ending, output in everywhere(outside(REFUSED[attack])):
        assert "THROUGH" not in output
        assert "TOP" not in output
        assert "hidden" not in output
        assert (ending, output) == ("done", "refused\n") or (ending == "error" and ("Error" in output))


@pytest.mark.parametrize(
    "attack",
    ["connect", "unix socket", "read a secret", "passwd", "truncate by reading", "thread", "memory file", "environment"],
)
def test_attacks_are_attacks(attack: str, outside: Callable[[str], str], tmp_path: Path) -> None:
    """Without the sandbox they get through: that they fail inside is the sandbox's doing."""
    copy = tmp_path / "copy"
    copy.write_text("TOP")
    with web_fakes.serve() as web:
        code = REFUSED[attack].replace("{secret}", str(copy)).replace("{port}", str(web.port))
        assert "THROUGH" in unconfined(code)


def test_the_other_door_of_the_kernel_is_shut() -> None:
    """32-bit calls have other numbers, and would pass a filter that looks at numbers alone."""
    if platform.machine() != "x86_64":
        assert struct.pack("=HBBI", 0x15, 1, 0, confine.MACHINES["aarch64"][0]) in confine.seccomp_filter("aarch64")
        return
    code = (
        "import ctypes, mmap\n"
        "page = mmap.mmap(-1, 4096, prot=7)\n"
        "page.write(bytes.fromhex('b814000000cd80c3'))\n"  # mov eax, 20 (getpid); int 0x80; ret
        "f = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(page)))\n"
        "print('before', flush=True)\nprint('THROUGH', f())"
    )
    for ending, output in everywhere(code):
        assert (ending, output) == ("crash", "before\n")


# ---------------------------------------------------------------- limits


@pytest.mark.parametrize("code", ["while True: pass", "import time; time.sleep(60)", "2**(10**10)"])
def test_time(code: str) -> None:
    started = time.monotonic()
    endings = {ending for ending, _ in everywhere(code, seconds=0.3)}
    assert endings <= {"time", "memory", "error"}  # the power may run out of memory first
    assert time.monotonic() - started < 10


def test_closing_the_output_does_not_hide_an_endless_loop() -> None:
    code = "import os\nprint('so long', flush=True)\nos.close(1); os.close(2)\nwhile True: pass"
    for outcome in everywhere(code, seconds=0.3):
        assert outcome == ("time", "so long\n")


@pytest.mark.parametrize("code", ["x = bytearray(10**9)", "x = [0]\nwhile True: x += x", "import mmap\nmmap.mmap(-1, 2**31)"])
def test_memory(code: str) -> None:
    for ending, output in everywhere(code, megabytes=128, seconds=10):
        assert ending in ("memory", "error")
        assert "Cannot allocate memory" in output or output.endswith("MemoryError\n")


def test_a_fork_bomb_and_a_thread_bomb_make_nothing() -> None:
    code = (
        "import os, _thread\nmade = 0\nfor _ in range(1000):\n"
        "    for start in (os.fork, lambda: _thread.start_new_thread(print, ())):\n"
        "        try:\n            start(); made += 1\n        except (OSError, RuntimeError): pass\nprint(made)"
    )
    for outcome in everywhere(code):
        assert outcome == ("done", "0\n")


def test_output() -> None:
    for ending, output in everywhere("while True: print('x' * 1000)", seconds=30):
        assert ending == "output"
        assert len(output) == sandbox.OUTPUT_BYTES
    for ending, output in everywhere("print('x' * 100_000)"):
        assert (ending, len(output)) == ("done", 100_001)


@pytest.mark.parametrize(
    ("code", "ending"),
    [
        ("with open('a', 'wb', 0) as f:\n    while True: f.write(b'0' * 10**6)", "error"),
        ("import os\nos.truncate(os.open('a', os.O_RDWR | os.O_CREAT), 10**10)", "error"),
        ("n = 0\nwhile True:\n    n += 1\n    open(f'f{n}', 'wb').write(b'0' * 10**6)", "disk"),
        ("n = 0\nwhile True:\n    n += 1\n    open(f'f{n}', 'wb')", "disk"),
        ("files = []\nwhile True: files.append(open(f'f{len(files)}', 'wb'))", "error"),
    ],
)
def test_disk(code: str, ending: str) -> None:
    for found, output in everywhere(code, seconds=30):
        assert found == ending
        assert ending == "disk" or "Errno" in output


@pytest.mark.parametrize("code", ["import ctypes; ctypes.string_at(0)", "import os; os.abort()"])
def test_crashes(code: str) -> None:
    assert {ending for ending, _ in everywhere(code)} <= {"crash"}


@pytest.mark.parametrize(
    "code", ["import os; os._exit(97)", "import os; os._exit(98)", "raise SystemExit(3)", "raise KeyboardInterrupt"]
)
def test_no_exit_status_reads_as_a_failure_of_the_sandbox(code: str) -> None:
    assert {ending for ending, _ in everywhere(code)} <= {"error", "unreadable"}


def test_nobody_is_left_behind_and_no_folder_either(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    libc = ctypes.CDLL(None)
    linux = sys.platform == "linux"
    assert not linux or libc.prctl(36, 1, 0, 0, 0) == 0  # orphans come to us
    before = _children()
    try:
        everywhere("import time\nopen('x', 'w').write('x')\ntime.sleep(60)", seconds=0.2)
        for _ in range(3):
            everywhere("n = 0\nwhile True:\n    n += 1\n    open(f'f{n}', 'wb')", seconds=20)
        for _ in range(100):
            if _children() <= before:
                break
            time.sleep(0.02)
        assert _children() <= before
    finally:
        assert not linux or libc.prctl(36, 0, 0, 0, 0) == 0
    assert not list(tmp_path.iterdir())


def _children() -> set[int]:
    """Living processes whose parent this one is."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[1]) != os.getpid():
            continue
        number = int(path.parent.name)
        if fields[0] == "Z":
            with contextlib.suppress(ChildProcessError):
                os.waitpid(number, os.WNOHANG)  # dead, and ours to bury
        else:
            found.add(number)
    return found


# ---------------------------------------------------------------- proof before trust


def test_at_least_one_strategy_holds_where_the_kernel_offers_one() -> None:
    if confine.landlock_version() >= 1 and platform.machine() in confine.MACHINES:
        assert "landlock" in HERE
    assert ("holds" in sandbox.sandbox_report()) == bool(HERE)


class Leaky(Sandbox):
    """Runs code as a usual process."""

    def __init__(self) -> None:
        super().__init__("landlock")

    def run_python(self, code: str, *, seconds: float, megabytes: int) -> Outcome:
        return Outcome(unconfined(code).encode(), "done")


def test_the_probe_finds_every_hole_of_a_sandbox_that_is_none(tmp_path: Path) -> None:
    harmless = sandbox.ATTACK.replace('tried("exec"', 'through.append("exec") or (lambda *_: 0)("exec"')
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sandbox, "ATTACK", harmless)
        assert sandbox.attack(Leaky(), tmp_path) == ["changed a file"]
    (tmp_path / "canary").unlink()
    (tmp_path / "canary.new").unlink()
    with pytest.MonkeyPatch.context() as patch:
        for change in ('tried("truncate', 'tried("change a mode', 'tried("write a file'):
            harmless = harmless.replace(change, '(lambda *_: 0)("' + change[7:])
        patch.setattr(sandbox, "ATTACK", harmless)
        (said,) = sandbox.attack(Leaky(), tmp_path)
    for hole in ("network", "socket", "read a file", "read /etc/passwd", "environment", "second process", "signal", "limits"):
        assert repr(hole) in said


def test_a_sandbox_that_says_nothing_does_not_hold(tmp_path: Path) -> None:
    class Silent(Leaky):
        def run_python(self, code: str, *, seconds: float, megabytes: int) -> Outcome:
            return Outcome(b"[]\n", "done")  # without the number that the attack was given

    assert sandbox.attack(Silent(), tmp_path)


def test_without_a_strategy_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "probe", lambda name: f"no {name}")
    with pytest.raises(
        ModelError, match=r"no sandbox on this machine \(bubblewrap: no bubblewrap; landlock: no landlock\)"
    ) as caught:
        sandbox.open_sandbox()
    assert "install bubblewrap" in caught.value.remedy
    assert "install bubblewrap" in sandbox.sandbox_report()
    parser = sandbox.open_parser()
    assert parser.strategy is None
    with pytest.raises(NotConfinedError):
        parser.run_python("1", seconds=1, megabytes=64)


def test_code_does_not_run_where_a_door_cannot_be_shut(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The kernel refuses a measure: the process ends before the code is looked at."""
    mark = tmp_path / "ran"
    broken = tmp_path / "confine.py"
    source = Path(confine.__file__).read_text()
    assert "version = landlock_version()" in source
    broken.write_text(source.replace("version = landlock_version()", "version = 0"))
    monkeypatch.setattr(confine, "__file__", str(broken))
    with pytest.raises(NotConfinedError, match="no Landlock"):
        Sandbox("landlock").run_python(f"open({str(mark)!r}, 'w')", seconds=5, megabytes=256)
    assert not mark.exists()


def test_a_job_that_comes_in_part_is_not_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    real = sandbox._supervise
    monkeypatch.setattr(
        sandbox, "_supervise", lambda command, folder, feed, **limits: real(command, folder, feed[:-3], **limits)
    )
    with pytest.raises(NotConfinedError, match="did not come whole"):
        Sandbox(HERE[0] if HERE else "landlock").run_python("print('half')", seconds=5, megabytes=256)


@pytest.mark.parametrize("machine", list(confine.MACHINES))
def test_the_filter_is_a_program_that_the_kernel_could_run(machine: str) -> None:
    """Decides calls as the table says, by an interpreter of the few instructions that it uses."""
    program = list(struct.iter_unpack("=HBBI", confine.seccomp_filter(machine)))
    arch, column = confine.MACHINES[machine]

    def verdict(number: int, *arguments: int, architecture: int = arch) -> int:
        data = struct.pack("=IIQ6Q", number, architecture, 0, *[*arguments, *[0] * (6 - len(arguments))])
        position = value = 0
        while True:
            code, true, false, constant = program[position]
            position += 1
            if code == 0x20:
                (value,) = struct.unpack_from("=I", data, constant)
            elif code == 0x54:
                value &= constant
            elif code == 0x15:
                position += true if value == constant else false
            else:
                assert code == 0x06
                return constant

    allow, refuse = 0x7FFF0000, 0x00050001
    special = {numbers[column] for numbers in (confine.OPEN, confine.OPENAT, confine.FCNTL, confine.IOCTL, confine.PRLIMIT)}
    allowed = {numbers[column] for numbers in confine.ALLOWED.values()} - {None}
    for number in range(600):
        if number not in special:
            assert verdict(number) == (allow if number in allowed else refuse), number
        assert verdict(number | 0x40000000) == refuse  # x32
        assert verdict(number, architecture=0x40000003) == 0x80000000
    openat, prlimit, fcntl, ioctl = (
        numbers[column] or 0 for numbers in (confine.OPENAT, confine.PRLIMIT, confine.FCNTL, confine.IOCTL)
    )
    assert verdict(openat, 0, 0, os.O_RDONLY) == allow
    assert verdict(openat, 0, 0, os.O_WRONLY | os.O_TRUNC | os.O_CREAT) == allow
    assert verdict(openat, 0, 0, os.O_RDONLY | os.O_TRUNC) == refuse
    assert verdict(openat, 0, 0, os.O_RDWR | 0o20000000) == refuse
    assert verdict(prlimit, 0, 7, 0) == allow
    assert verdict(prlimit, 0, 7, 1) == refuse
    assert verdict(prlimit, 0, 7, 1 << 32) == refuse
    assert verdict(fcntl, 0, 3) == allow
    assert verdict(fcntl, 0, 8) == refuse
    assert verdict(ioctl, 0, 0x5412) == refuse  # TIOCSTI types into a terminal
    assert len(program) < 4096


def test_a_machine_without_a_table_is_refused() -> None:
    with pytest.raises(OSError, match="no table"):
        confine.seccomp_filter("riscv64")


# ---------------------------------------------------------------- documents


def archive(members: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return out.getvalue()


def test_documents_are_parsed_under_every_strategy_and_without_one() -> None:
    for box in [*map(Sandbox, HERE), Sandbox(None)]:
        outcome = box.parse(web_fakes.pdf("Hello World"), "pdf", {"characters": 100}, seconds=60)
        assert (outcome.ending, outcome.output.split()) == ("done", [b"Hello", b"World"])


def test_broken_and_hostile_documents() -> None:
    box = sandbox.open_parser()
    assert box.parse(b"%PDF-1.4 rubbish", "pdf", {"characters": 100}, seconds=60).ending == "error"
    bomb = archive({"xl/worksheets/sheet1.xml": b"0" * 101_000_000})
    assert len(bomb) < 1_000_000
    assert box.parse(bomb, "xlsx", {"characters": 100}, seconds=60) == Outcome(b"it unpacks to too much", "unreadable")
    page = {"url": "", "charset": "", "characters": 100}
    assert box.parse(b"<html></html>", "html", page, seconds=60).ending == "unreadable"
    assert box.parse(b"<p>" * 1000, "html", page, seconds=0.001).ending == "time"
