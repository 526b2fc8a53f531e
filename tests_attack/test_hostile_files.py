"""Files that a user, another program or an enemy may have written: refused before anything runs, in words, and quickly."""

from __future__ import annotations

import json
import os
import random
import shutil
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from forks import Forks
from world import CONFIG, NAME, write_world

PATIENCE = 180.0
"""Seconds; on an idle machine all of them take less than one."""
BIG = "9" * 5000
DEEP = 100_000

Write = Callable[[Path], object]
"""Given the file that is to be hostile, which is not there."""


def text(content: str) -> Write:
    return lambda path: path.write_text(content, encoding="utf-8")


def data(content: bytes) -> Write:
    return lambda path: path.write_bytes(content)


def changed(**changes: object) -> Write:
    return lambda path: path.write_text(yaml.safe_dump({**CONFIG, **changes}))


def bound_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(path.name if Path.cwd() == path.parent else os.path.relpath(path))


ANY: dict[str, Write] = {
    "folder": lambda path: path.mkdir(),
    "pipe": os.mkfifo,
    "endless device": lambda path: path.symlink_to("/dev/zero"),
    "random device": lambda path: path.symlink_to("/dev/urandom"),
    "null device": lambda path: path.symlink_to("/dev/null"),
    "link to itself": lambda path: path.symlink_to(path.name),
    "link to nowhere": lambda path: path.symlink_to("nowhere"),
    "socket": bound_socket,
    "missing": lambda path: None,
    "empty": data(b""),
    "blank": text("\n \n\t\n"),
    "zero bytes": data(bytes(5000)),
    "noise": data(random.Random(0).randbytes(5000)),
    "UTF-16": data('{"question": "a", "answer": "b"}'.encode("utf-16")),
    "not UTF-8": data(b'{"question": "\xff\xfe", "answer": "b"}\n'),
    "a zip": data(b"PK\x03\x04" + bytes(200)),
}
"""In place of any file that an experiment reads."""

JSONL: dict[str, Write] = {
    "not JSON": text("{\n"),
    "half a line": text('{"question": "Who?", "answer": "A"}\n{"question": "Wh'),
    "a list": text("[]\n"),
    "a number": text("17\n"),
    "NaN": text('{"question": NaN, "answer": Infinity, "title": NaN, "text": NaN}\n'),
    "key twice": text('{"question": "a", "question": "b", "answer": "c", "title": "t", "title": "u", "text": "x"}\n'),
    "deep lists": text("[" * DEEP + "]" * DEEP + "\n"),
    "deep objects": text('{"a":' * DEEP + "1" + "}" * DEEP + "\n"),
    "many digits": text(f'{{"question": "How many?", "answer": {BIG}, "title": "t", "text": {BIG}}}\n'),
    "wrong types": text('{"question": 5, "answer": ["x"], "title": {}, "text": null}\n'),
    "null": text('{"question": null, "answer": null, "title": null, "text": null}\n'),
    "lone surrogate": text('{"question": "\\ud800?", "answer": 1, "title": "\\ud800", "text": 2}\n'),
    "blank texts": text('{"question": " ", "answer": "", "title": " ", "text": ""}\n'),
    "other keys": text('{"a": 1}\n'),
    "terminal codes": text('{"question\\u001b[2J": "\\u001b]0;x\\u0007", "answer": 3}\n'),
}
"""In place of tasks or pages."""

EXPERIMENTS: dict[str, Write] = {
    "seed twice": text("seed: 1\nseed: 2\n"),
    "sexagesimal": text("seed: 1:30\n"),
    "octal": text("seed: 010\n"),
    "underscores": text("seed: 1_000\n"),
    "huge seed": text("seed: 99999999999999999999999\n"),
    "digits": text(f"seed: {BIG}\n"),
    "negative seed": text("seed: -1\n"),
    "many tasks": changed(tasks={**CONFIG["tasks"], "train": {"count": 99999999999}}),
    "many threads": changed(runtime={"threads": 100000000}),
    "device": changed(runtime={"device": "banana"}),
    "device cuda:99": changed(runtime={"device": "cuda:99"}),
    "pages of zeros": changed(environment={**CONFIG["environment"], "pages": "/dev/zero"}),
    "pages are a folder": changed(environment={**CONFIG["environment"], "pages": "."}),
    "pages with a zero byte": text('environment: {kind: corpus, pages: "a\\0b"}\n'),
    "tasks of zeros": changed(tasks={**CONFIG["tasks"], "held_out": {"path": "/dev/zero", "world": None}}),
    "files nowhere": changed(environment={"kind": "tools", "files": "nowhere", "tools": ["file"]}),
    "files are a device": changed(environment={"kind": "tools", "files": "/dev/zero", "tools": ["file"]}),
    "pool of zeros": changed(start_pool="/dev/zero"),
    "model is a file": changed(models={"policy": {"path": "pool.json"}}),
    "model is a device": changed(models={"policy": {"path": "/dev/zero"}}),
    "model is empty": changed(models={"policy": {"path": "own_corpus"}}),
    "extends itself": text(f"extends: {NAME}.yaml\n"),
    "extends a device": text("extends: /dev/zero\n"),
    "extends a folder": text("extends: .\n"),
    "extends a list": text("extends: [a, b]\n"),
    "alias in itself": text("a: &a {b: *a}\n"),
    "billion laughs": text("a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{f'*a{n - 1}, ' * 9}]\n" for n in range(1, 10))),
    "deep": text("a: " + "[" * 2000 + "]" * 2000 + "\n"),
    "deeper": text("a: " + "{a: " * DEEP),
    "deep blocks": text("\n".join(" " * n + "a:" for n in range(2000))),
    "python object": text('a: !!python/object/apply:os.system ["touch owned"]\n'),
    "tag": text("seed: !!binary aGVsbG8=\n"),
    "two documents": text("seed: 1\n---\nseed: 2\n"),
    "a list": text("- seed\n"),
    "a text": text("seed\n"),
    "tabs": text("a:\n\tb: 1\n"),
    "NaN": text("distillation: {learning_rate: .nan}\n"),
    "infinity": text("distillation: {learning_rate: .inf}\n"),
    "null": text("tasks: null\nrollout: null\n"),
    "name leaves": text("experiment: ../../up\n"),
    "name with a line": text('experiment: "a\\nb"\n'),
    "name is long": text(f"experiment: {'a' * 5000}\n"),
    "name is a device": text("experiment: /dev/null\n"),
    "unknown keys": text("sede: 1\nrollout: {steps: 3}\n"),
    "keys are numbers": text("1: 2\nnull: 3\n[a, b]: 4\n"),
    "date": text("seed: 2026-11-25\n"),
    "terminal codes": text('description: "\\u001b[2J\\u001b]0;x\\u0007"\nseed: x\n'),
}  # fmt: skip

POOLS: dict[str, Write] = {
    "not JSON": text("{"),
    "a list": text("[1, 2]"),
    "a number": text("5"),
    "wrong types": text('{"p1": 5, "p2": null, "p3": []}'),
    "deep": text("[" * DEEP + "]" * DEEP),
    "many digits": text(f'{{"p1": {BIG}}}'),
    "key twice": text('{"p1": "a", "p1": "b"}'),
    "half a version": text('{"version": 1, "items": [{"id": "p1"}]}'),
    "numbers": text('{"version": 1, "next_number": 1e999, "items": []}'),
    "nothing": text("{}"),
    "null": text("null"),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_world(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


FOR_ANOTHER_MACHINE = ("device cuda:99", "plan")
"""One may plan here what runs on a machine with that device; a run refuses it."""


def attack(forks: Forks, place: Path, file: str, hostile: dict[str, Write]) -> list[str]:
    """Every hostile content in place of a file; what is wrong with how `run` and `plan` take it."""
    found = []
    path = place / file
    real = path.read_bytes()
    for name, write in hostile.items():
        path.unlink()
        write(path)
        for command in ("plan", "run"):
            said = forks.run(command, f"{NAME}.yaml", "--iterations", "1", folder=place, patience=PATIENCE)
            told = list(said.complaints)
            if said.code == 0 and (name, command) != FOR_ANOTHER_MACHINE:
                told.append("taken without a word")
            if said.code and "EVOLVE_DEBUG" in said.err:
                told.append("nobody foresaw it")
            if (place / ".evolve" / "objects").exists():
                told.append("something was stored")
            if "\x1b" in said.err:
                told.append("terminal codes reach the terminal")
            if (place / "owned").exists():
                told.append("it was executed")
            found += [f"{file}, {name}, {command}: {one}\n{said.err[-500:]}" for one in told]
            shutil.rmtree(place / ".evolve", ignore_errors=True)
        if path.is_dir() and not path.is_symlink():
            path.rmdir()
        else:
            path.unlink(missing_ok=True)
        path.write_bytes(real)
    return found


@pytest.mark.parametrize(
    ("file", "hostile"),
    [
        (f"{NAME}.yaml", ANY | EXPERIMENTS),
        ("own_corpus/pages.jsonl", ANY | JSONL),
        ("own_corpus/train.jsonl", ANY | JSONL),
        ("own_corpus/held_out.jsonl", ANY | JSONL),
        ("pool.json", ANY | POOLS),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_is_refused_before_anything_runs(forks: Forks, place: Path, file: str, hostile: dict[str, Write]) -> None:
    found = attack(forks, place, file, hostile)
    assert not found, f"{len(found)}\n" + "\n".join(found)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"name": 1, "config": 2, "seed": []}', b"\xff", b"[" * DEEP])
@pytest.mark.parametrize("command", [("status", NAME), ("plan", NAME), ("gc",), ("doctor",), ("schedule", "list")])
def test_an_entry_of_the_registry_that_is_none(forks: Forks, place: Path, content: bytes, command: tuple[str, ...]) -> None:
    entry = place / ".evolve" / "experiments" / f"{NAME}.json"
    entry.parent.mkdir(parents=True)
    entry.write_bytes(content)
    said = forks.run(*command, folder=place, patience=PATIENCE)
    assert said.complaints == [], said.err


def test_what_is_imported(forks: Forks, place: Path) -> None:
    found = []
    for name, write in {**ANY, **JSONL, **POOLS}.items():
        path = place / f"import-{len(found)}-{name.replace(' ', '-')}.jsonl"
        write(path)
        for kind in ("auto", "pool", "rollouts"):
            said = forks.run("import", path.name, "--kind", kind, folder=place, patience=PATIENCE)
            told = list(said.complaints)
            if said.code and "EVOLVE_DEBUG" in said.err:
                told.append("nobody foresaw it")
            found += [f"{name}, {kind}: {one}\n{said.err[-500:]}" for one in told]
    assert not found, f"{len(found)}\n" + "\n".join(found)


def test_a_file_that_is_right_is_taken(forks: Forks, place: Path) -> None:
    """Else the tests above would pass whatever the files hold."""
    said = forks.run("plan", f"{NAME}.yaml", folder=place, patience=PATIENCE)
    assert (said.code, said.complaints) == (0, []), said.err
    assert json.loads((place / "pool.json").read_text())
