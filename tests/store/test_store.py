"""The store: nothing half-written is visible, a killed builder resumes, every fault names its remedy."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolve_dag.errors import ConcurrencyError, ConfigError, EvolveError, StoreError
from evolve_dag.store.artifacts import Artifact, Build, Store
from evolve_dag.store.faults import is_disk_error
from evolve_dag.store.journal import Journal
from evolve_dag.store.locks import discard

CONFIG = {"seed": 1, "nested": {"rates": [0.5, 1.0], "name": "pocket"}}
INPUTS = {"policy": "ab" * 16}
DIGEST = Store.digest_of("trajectories", "1", CONFIG, INPUTS)
ARGUMENTS: dict[str, Any] = {"code_version": "1", "config": CONFIG, "inputs": INPUTS}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def make(store: Store, rows: int = 3) -> Artifact:
    with store.build("trajectories", DIGEST, **ARGUMENTS) as build:
        pl.DataFrame({"a": list(range(rows))}).write_parquet(build.path / "a.parquet")
        (build.path / "sub").mkdir()
        (build.path / "sub" / "facts.json").write_text('{"x": 1}')
        build.note(rows=rows, mean=float("nan"))
    assert build.artifact is not None
    return build.artifact


def tree(store: Store) -> dict[str, bytes]:
    """Everything a reader can see: content of all files but locks and work."""
    found = {}
    for path in store.root.rglob("*"):
        name = path.relative_to(store.root).as_posix()
        if path.is_file() and not name.startswith(("work/", "locks/")):
            found[name] = path.read_bytes()
    return found


# -- digests

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def shuffled(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: shuffled(value[key]) for key in reversed(list(value))}
    return tuple(shuffled(inner) for inner in value) if isinstance(value, list) else value


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4))
def test_digest_ignores_the_order_of_keys_and_a_trip_through_json(config: dict[str, Any]) -> None:
    digest = Store.digest_of("scores", "1", config, INPUTS)
    assert len(digest) == 32
    assert set(digest) <= set("0123456789abcdef")
    assert digest == Store.digest_of("scores", "1", shuffled(config), INPUTS)
    assert digest == Store.digest_of("scores", "1", json.loads(json.dumps(config)), INPUTS)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=5), JSON, max_size=4), st.text(max_size=5), JSON)
def test_digest_changes_with_any_value(config: dict[str, Any], key: str, value: Any) -> None:
    changed = {**config, key: [value]}
    same = json.dumps(config, sort_keys=True) == json.dumps(changed, sort_keys=True)
    assert (Store.digest_of("scores", "1", config, {}) == Store.digest_of("scores", "1", changed, {})) == same


def test_digest_covers_every_part_and_stays_what_it_was() -> None:
    parts: list[tuple[str, str, dict[str, Any], dict[str, str]]] = [
        ("scores", "1", {"a": 1}, {"b": "c"}),
        ("adapter", "1", {"a": 1}, {"b": "c"}),
        ("scores", "2", {"a": 1}, {"b": "c"}),
        ("scores", "1", {"a": 1.0}, {"b": "c"}),
        ("scores", "1", {"a": 1}, {"b": "d"}),
        ("scores", "1", {"b": "c"}, {"a": "1"}),
    ]
    assert len({Store.digest_of(*arguments) for arguments in parts}) == 6
    # Stores outlive releases: another hash here means that every artifact of every user is recomputed.
    assert Store.digest_of("scores", "1", {"a": 1, "é": [True, None, 0.5]}, {"b": "c"}) == "b56db855deadff8ecd506b4ce29fe427"


@pytest.mark.parametrize("value", [float("nan"), float("inf"), Path("x"), {1: 2}, {1, 2}, object()])
def test_a_config_that_is_not_json_is_refused(value: Any) -> None:
    with pytest.raises(ConfigError, match=r"config\.deep\[0\]"):
        Store.digest_of("scores", "1", {"deep": [value]}, {})


# -- building and reading


def test_what_is_built_can_be_read(store: Store) -> None:
    assert not store.exists("trajectories", DIGEST)
    made = make(store)
    assert store.exists("trajectories", DIGEST)
    found = store.open("trajectories", DIGEST, verify=True)
    assert found == made
    assert found.frame("a.parquet")["a"].to_list() == [0, 1, 2]
    assert found.json("sub/facts.json") == {"x": 1}
    assert found.file("a.parquet").stat().st_size == found.manifest.files["a.parquet"].bytes
    assert found.summary == {"rows": 3, "mean": None}, "what is not a number is null"
    assert (found.manifest.code_version, found.manifest.config, found.inputs) == ("1", CONFIG, INPUTS)
    assert not found.manifest.resumed
    assert not list(store.root.glob("work/*/*")), "the work folder goes when the artifact is there"
    assert str(store.root) not in (found.path / "manifest.json").read_text()


def test_reading_creates_nothing(store: Store) -> None:
    assert list(store.artifacts()) == store.refs() == store.find("a") == []
    assert not store.exists("scores", DIGEST)
    assert store.ref("pocket", 1, "scores") is None
    with pytest.raises(StoreError, match="no such scores artifact"):
        store.open("scores", DIGEST)
    assert not store.root.exists()


def test_listing_and_prefix(store: Store) -> None:
    made = make(store)
    other = Store.digest_of("scores", "1", {}, {})
    with store.build("scores", other, code_version="1", config={}, inputs={}):
        pass
    assert [one.kind for one in store.artifacts()] == ["scores", "trajectories"]
    assert [one.digest for one in store.artifacts("scores")] == [other]
    assert store.find(DIGEST[:7].upper()) == [made]
    assert store.find("zz") == []


def test_an_error_in_the_body_publishes_nothing(store: Store) -> None:
    def fail() -> None:
        with store.build("trajectories", DIGEST, **ARGUMENTS) as build:
            (build.path / "half").write_text("x")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert tree(store) == {}
    assert not list(store.root.glob("work/*/*")), "without a journal nothing is worth keeping"
    assert make(store).frame("a.parquet").height == 3


def test_the_journal_of_a_failed_build_is_there_for_the_next(store: Store) -> None:
    def interrupt() -> None:
        with store.build("trajectories", DIGEST, **ARGUMENTS) as build:
            build.journal("rollouts").append({"n": 1})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()
    with store.build("trajectories", DIGEST, **ARGUMENTS) as build:
        journal = build.journal("rollouts")
        assert journal.records() == [{"n": 1}]
        journal.append({"n": 2})
        assert build.journal("rollouts").records() == [{"n": 1}, {"n": 2}]
    assert build.artifact is not None
    assert build.artifact.manifest.resumed
    assert list(build.artifact.manifest.files) == [], "journals are not part of an artifact"


def test_a_digest_that_does_not_follow_is_refused(store: Store) -> None:
    with pytest.raises(ConfigError, match="does not follow"), store.build("scores", DIGEST, **ARGUMENTS):
        pytest.fail("the body must not run")


def test_building_what_exists_changes_nothing(store: Store) -> None:
    made = make(store)
    before = tree(store)
    with store.build("trajectories", DIGEST, **ARGUMENTS) as build:
        assert build.artifact == made
        (build.path / "a.parquet").write_text("something else")
    assert tree(store) == before
    assert build.artifact == made


@pytest.mark.parametrize("name", ["../x", "", "UPPER", "a/b"])
def test_names_cannot_leave_the_store(store: Store, name: str) -> None:
    for call in (
        lambda: store.exists(name, DIGEST),
        lambda: store.exists("scores", name),
        lambda: store.ref(name, 1, "scores"),
        lambda: store.lock(name).__enter__(),
        lambda: store.set_ref("pocket", 1, name, DIGEST),
    ):
        with pytest.raises(StoreError, match="is not a valid"):
            call()
    with pytest.raises(StoreError, match="journal name"), store.build("trajectories", DIGEST, **ARGUMENTS) as build:
        build.journal("../x")


def test_a_file_is_no_store(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="is a file"):
        Store(tmp_path / "file")


# -- corruption


def corrupt_size(path: Path) -> None:
    os.truncate(path / "a.parquet", 7)


def corrupt_bytes(path: Path) -> None:
    content = bytearray((path / "a.parquet").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "a.parquet").write_bytes(content)


def corrupt_missing(path: Path) -> None:
    (path / "a.parquet").unlink()


def corrupt_no_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


def corrupt_manifest(path: Path) -> None:
    (path / "manifest.json").write_text('{"kind": "trajectories"')


def corrupt_manifest_fields(path: Path) -> None:
    content = json.loads((path / "manifest.json").read_text())
    del content["files"]["a.parquet"]["sha256"]
    (path / "manifest.json").write_text(json.dumps(content))


def corrupt_lineage(path: Path) -> None:
    content = json.loads((path / "manifest.json").read_text())
    content["inputs"]["policy"] = "cd" * 16
    (path / "manifest.json").write_text(json.dumps(content))


def corrupt_nan(path: Path) -> None:
    content = json.loads((path / "manifest.json").read_text())
    content["config"]["seed"] = float("nan")
    (path / "manifest.json").write_text(json.dumps(content))


CORRUPTIONS = [value for name, value in sorted(globals().items()) if name.startswith("corrupt_")]


@pytest.mark.parametrize("corrupt", CORRUPTIONS)
def test_corruption_is_named_and_mended_by_the_remedy(store: Store, corrupt: Any) -> None:
    made = make(store)
    corrupt(made.path)
    culprit = "manifest.json" if "manifest" in corrupt.__name__ or corrupt in (corrupt_lineage, corrupt_nan) else "a.parquet"
    with pytest.raises(StoreError) as caught:
        store.open("trajectories", DIGEST).frame("a.parquet")
    assert str(made.path / culprit) in caught.value.what
    assert caught.value.remedy == f"delete folder {made.path} and run again: it will be recomputed"
    with pytest.raises(StoreError):
        store.open("trajectories", DIGEST, verify=True)
    shutil.rmtree(made.path)
    assert not store.exists("trajectories", DIGEST)
    assert make(store).frame("a.parquet").height == 3


def test_a_flipped_bit_is_found_when_the_file_is_used(store: Store) -> None:
    made = make(store)
    corrupt_bytes(made.path)
    found = store.open("trajectories", DIGEST)
    assert found.json("sub/facts.json") == {"x": 1}
    with pytest.raises(StoreError, match="sha256"):
        found.file("a.parquet")


def test_files_that_are_no_parquet_or_json(store: Store) -> None:
    with store.build("trajectories", DIGEST, **ARGUMENTS) as build:
        (build.path / "a.parquet").write_bytes(b"PAR1 but not really")
        (build.path / "b.json").write_text("{")
    found = store.open("trajectories", DIGEST)
    with pytest.raises(StoreError, match="not readable as Parquet"):
        found.frame("a.parquet")
    with pytest.raises(StoreError, match="not readable as JSON"):
        found.json("b.json")
    with pytest.raises(StoreError, match=r"no file 'c' \(it holds: a\.parquet, b\.json\)"):
        found.file("c")


def test_a_corrupt_artifact_is_not_built_over(store: Store) -> None:
    made = make(store)
    corrupt_size(made.path)
    before = tree(store)
    with pytest.raises(StoreError, match="corrupt"):
        make(store)
    assert tree(store) == before


# -- a full disk


def polars_to_full_disk(build: Build) -> None:
    (build.path / "b.parquet").symlink_to("/dev/full")
    pl.DataFrame({"a": list(range(100_000))}).write_parquet(build.path / "b.parquet")


def python_to_full_disk(build: Build) -> None:
    (build.path / "b.json").symlink_to("/dev/full")
    (build.path / "b.json").write_text("x" * 100_000)


def journal_to_full_disk(build: Build) -> None:
    journal = build.journal("full")
    journal.path.symlink_to("/dev/full")
    journal.append({"a": 1})


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize(
    "write",
    [polars_to_full_disk, python_to_full_disk, journal_to_full_disk],
    ids=lambda f: f.__name__,
)
def test_a_full_disk_publishes_nothing_and_loses_no_journal(store: Store, write: Any) -> None:
    def fill() -> None:
        with store.build("trajectories", DIGEST, **ARGUMENTS) as build:
            build.journal("done").append({"n": 1})
            (build.path / "a.parquet").write_text("big")
            write(build)

    with pytest.raises(StoreError, match="No space left on device") as caught:
        fill()
    assert "free room" in caught.value.remedy
    assert tree(store) == {}
    assert not list(store.root.rglob("a.parquet")), "half-written files give their room back"
    with store.build("trajectories", DIGEST, **ARGUMENTS) as build:
        assert build.journal("done").records() == [{"n": 1}]


@pytest.mark.parametrize("failing", ["fsync", "rename"])
def test_a_disk_that_fills_up_while_publishing(store: Store, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    def fail(*arguments: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if failing == "fsync":
            patch.setattr(os, "fsync", fail)
        else:
            patch.setattr(Path, "rename", fail)
        with pytest.raises(StoreError, match="No space left"):
            make(store)
    assert tree(store) == {}
    assert make(store).frame("a.parquet").height == 3


NO_ROOM = """
    import resource, sys
    import numpy as np
    import polars as pl
    from pathlib import Path
    from safetensors.numpy import save_file
    from evolve_dag.errors import StoreError
    from evolve_dag.store.artifacts import Journal, Store

    def room(size):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

    journal = Journal(Path(sys.argv[1]) / "j.jsonl")
    journal.append({"n": 1})
    room(64)
    try:
        journal.append({"text": "x" * 1000})
    except StoreError as error:
        print("journal:", error.what)
    room(resource.RLIM_INFINITY)
    journal.append({"n": 2})

    store = Store(sys.argv[1])
    def weights(path): save_file({"a": np.zeros(10_000)}, str(path / "a.safetensors"))
    def table(path): pl.DataFrame({"a": np.random.rand(100_000)}).write_parquet(path / "a.parquet")
    for write in (weights, table):
        room(5000)
        try:
            with store.build("scores", Store.digest_of("scores", "1", {}, {}), code_version="1", config={}, inputs={}) as build:
                write(build.path)
        except StoreError as error:
            print(write.__name__ + ":", error.what)
        room(resource.RLIM_INFINITY)
"""


def test_real_short_writes(tmp_path: Path) -> None:
    """No file may grow beyond a limit, so records and files really end in the middle."""
    command = [sys.executable, "-c", textwrap.dedent(NO_ROOM), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    said = done.stdout.splitlines()
    assert [line.split(":")[0] for line in said] == ["journal", "weights", "table"]
    assert all("cannot be written" in line and "File too large" in line for line in said)
    assert Journal(tmp_path / "j.jsonl").records() == [{"n": 1}, {"n": 2}]
    assert not (tmp_path / "objects").exists()
    assert not list(tmp_path.rglob("a.*"))


def test_other_errors_are_not_taken_for_a_full_disk(store: Store) -> None:
    assert not is_disk_error(ValueError("404 not found"))
    assert not is_disk_error(OSError(errno.ENOENT, "No such file"))
    assert is_disk_error(OSError(errno.EDQUOT, "quota"))
    with pytest.raises(FileNotFoundError), store.build("trajectories", DIGEST, **ARGUMENTS) as build:
        (build.path / "missing").read_text()


# -- journals


@pytest.mark.parametrize(
    "tail", [b"", b'{"n": 3', b'{"n": 3}', b"\x00\x00\n", b'{"n": 3\n', b"[3]\n", '{"n": "é'.encode()[:-1]]
)
def test_a_torn_last_line_is_dropped_and_overwritten(tmp_path: Path, tail: bytes) -> None:
    path = tmp_path / "j.jsonl"
    first = Journal(path)
    first.append({"n": 1})
    first.append({"n": 2, "text": "line\u2028break\r\n\ud83d"})
    whole = path.read_bytes()
    path.write_bytes(whole + tail)
    again = Journal(path)
    assert path.read_bytes() == whole
    again.append({"n": 4})
    assert [record["n"] for record in again.records()] == [1, 2, 4]
    assert again.records()[1]["text"] == "line\u2028break\r\n\ud83d"


@settings(deadline=None)
@given(st.lists(st.dictionaries(st.text(max_size=5), JSON, max_size=3), max_size=5), st.data())
def test_a_journal_cut_anywhere_keeps_every_whole_record(records: list[dict[str, Any]], data: st.DataObject) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "j.jsonl"
        ends = [0]
        journal = Journal(path)
        for record in records:
            journal.append(record)
            ends.append(path.stat().st_size)
        cut = data.draw(st.integers(0, ends[-1]))
        if path.exists():
            os.truncate(path, cut)
        assert Journal(path).records() == records[: sum(end <= cut for end in ends) - 1]


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text('{"n": 1}\nedited by hand\n{"n": 3}\n')
    with pytest.raises(StoreError, match=r"j\.jsonl: line 2 is not a JSON object") as caught:
        Journal(path).records()
    assert f"delete {path}" in caught.value.remedy


def test_threads_do_not_tear_each_others_lines(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "j.jsonl")

    def write(k: int) -> None:
        for n in range(10):
            journal.append({"k": k, "n": n, "text": "x" * 5000})

    threads = [threading.Thread(target=write, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted((r["k"], r["n"]) for r in journal.records()) == [(k, n) for k in range(4) for n in range(10)]


# -- kills and rivals

KILLED = """
    import sys, time
    from evolve_dag.store.artifacts import Store
    store, digest, config, inputs = Store(sys.argv[1]), sys.argv[2], eval(sys.argv[3]), eval(sys.argv[4])
    with store.lock("pocket"), store.build("trajectories", digest, code_version="1", config=config, inputs=inputs) as build:
        journal = build.journal("rollouts")
        print("holding", flush=True)
        for n in range(10_000):
            journal.append({"n": n, "text": "x" * 200})
            with (build.path / "a.parquet").open("ab") as stream:
                stream.write(b"half a file")
"""


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def start_builder(store: Store) -> subprocess.Popen[str]:
    arguments = [str(store.root), DIGEST, repr(CONFIG), repr(INPUTS)]
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(KILLED), *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "holding\n"
    return process


def test_kill_9_in_the_middle_of_a_build_then_resume(store: Store) -> None:
    done = 0
    for _ in range(2):  # the second builder is killed as well
        process = start_builder(store)
        journal = store.root / "work" / "trajectories" / DIGEST / "journals" / "rollouts.jsonl"
        enough, deadline = size_of(journal) + 2000, time.monotonic() + 60
        while size_of(journal) < enough and time.monotonic() < deadline:
            time.sleep(0.005)
        with (
            pytest.raises(ConcurrencyError, match=f"experiment 'pocket' is being run by process {process.pid}"),
            store.lock("pocket"),
        ):
            pass
        with (
            pytest.raises(ConcurrencyError, match=f"being built by process {process.pid}"),
            store.build("trajectories", DIGEST, **ARGUMENTS, wait_seconds=0),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert tree(store) == {}, "nothing half-written is visible"
        assert next(store.root.glob("work/trajectories/*/files/a.parquet")).stat().st_size > 0
    with store.lock("pocket"), store.build("trajectories", DIGEST, **ARGUMENTS, wait_seconds=0) as build:
        assert list(build.path.iterdir()) == [], "files of the dead builder are gone"
        records = build.journal("rollouts").records()
        done = len(records)
        assert done >= 16
        assert all(record["text"] == "x" * 200 for record in records)
        pl.DataFrame({"n": [record["n"] for record in records]}).write_parquet(build.path / "a.parquet")
    assert build.artifact is not None
    assert build.artifact.digest == DIGEST
    assert build.artifact.manifest.resumed
    assert store.open("trajectories", DIGEST, verify=True).frame("a.parquet").height == done


def test_a_kill_between_the_rename_and_the_clean_up_is_swept_later(store: Store) -> None:
    make(store)
    left = store.root / "work" / "trajectories" / DIGEST / "journals"
    left.mkdir(parents=True)
    (left / "j.jsonl").write_text("{}\n")
    other = Store.digest_of("scores", "1", {}, {})
    with store.build("scores", other, code_version="1", config={}, inputs={}):
        assert not left.exists()
    assert store.open("trajectories", DIGEST, verify=True)


def test_locks_of_what_is_published_go_and_those_of_what_is_not_stay(store: Store) -> None:
    make(store)
    begun, other = Store.digest_of("contexts", "1", {}, {}), Store.digest_of("scores", "1", {}, {})
    locks = store.root / "locks"
    (locks / f"build-trajectories-{DIGEST}.holder").write_text("{}")  # of a builder that was killed
    (locks / f"build-contexts-{begun}.lock").touch()
    with store.build("scores", other, code_version="1", config={}, inputs={}):
        left = {f"build-contexts-{begun}.lock", f"build-scores-{other}.lock", f"build-scores-{other}.holder"}
        assert {path.name for path in locks.iterdir()} == left
        discard(store.root, f"build-scores-{other}")
        assert {path.name for path in locks.iterdir()} == left, "it is held"
    (locks / f"build-scores-{other}.holder").write_text("{}")  # killed when all that was left to do was to go
    with store.lock("pocket"):
        assert {path.stem for path in locks.iterdir()} == {f"build-contexts-{begun}", "experiment-pocket"}


@pytest.mark.parametrize("change", [1, 2])
def test_a_kill_while_a_lock_is_cleaned_up_leaves_nothing_for_good(
    store: Store, monkeypatch: pytest.MonkeyPatch, change: int
) -> None:
    locks = store.root / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    for suffix in ("lock", "holder"):
        (locks / f"build-policy-{DIGEST}.{suffix}").write_text("{}")
    unlink, changes = Path.unlink, itertools.count(1)

    def killed(path: Path, missing_ok: bool = False) -> None:
        if next(changes) == change:
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            discard(store.root, f"build-policy-{DIGEST}")
    for lock in locks.glob("*.lock"):  # as the next builder sweeps
        discard(store.root, lock.stem)
    assert list(locks.iterdir()) == []


def race(root: str, number: int, start: Any, results: Any) -> None:
    start.wait()
    with Store(root).build("trajectories", DIGEST, **ARGUMENTS) as build:
        first = build.artifact is None
        (build.path / "by.txt").write_text(str(number))
        time.sleep(0.05)
    assert build.artifact is not None
    results.put((number, first, build.artifact.file("by.txt").read_text()))


def test_rival_builders_agree_on_one_result(store: Store) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    rivals = [context.Process(target=race, args=(str(store.root), n, start, results)) for n in range(4)]
    for rival in rivals:
        rival.start()
    start.set()
    told = [results.get(timeout=30) for _ in rivals]
    for rival in rivals:
        rival.join(10)
        assert rival.exitcode == 0
    winners = [number for number, first, _ in told if first]
    assert len(winners) == 1
    assert {by for _, _, by in told} == {str(winners[0])}
    assert len(list(store.artifacts())) == 1


def test_a_lock_is_held_once_even_in_one_process(store: Store) -> None:
    with store.lock("pocket"):
        with pytest.raises(ConcurrencyError, match=f"process {os.getpid()}") as caught, store.lock("pocket"):
            pass
        assert "end it" in caught.value.remedy
        with store.lock("other"):
            pass
    with store.lock("pocket"):
        pass


def test_a_lock_goes_when_its_body_fails(store: Store) -> None:
    with pytest.raises(ZeroDivisionError), store.lock("pocket"):
        raise ZeroDivisionError
    with store.lock("pocket"):
        pass


def test_waiting_for_a_builder_ends_in_a_message(store: Store) -> None:
    begun, end = threading.Event(), threading.Event()

    def hold() -> None:
        with store.build("trajectories", DIGEST, **ARGUMENTS):
            begun.set()
            end.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        begun.wait(20)
        started = time.monotonic()
        with (
            pytest.raises(ConcurrencyError, match="is being built"),
            store.build("trajectories", DIGEST, **ARGUMENTS, wait_seconds=0.2),
        ):
            pass
        assert time.monotonic() - started >= 0.2
    finally:
        end.set()
        thread.join()


# -- refs


def test_refs_point_and_move(store: Store) -> None:
    made = make(store)
    ref = store.set_ref("pocket", 2, "trajectories", made.digest, recomputed=True)
    assert store.ref("pocket", 2, "trajectories") == ref
    assert (ref.digest, ref.facts) == (DIGEST, {"recomputed": True})
    path = store.root / "refs" / "pocket" / "02" / "trajectories.json"
    before = path.stat().st_mtime_ns
    assert store.set_ref("pocket", 2, "trajectories", made.digest, recomputed=True) == ref
    assert path.stat().st_mtime_ns == before, "writing the same again changes nothing"
    assert store.set_ref("pocket", 2, "trajectories", made.digest, recomputed=False).facts == {"recomputed": False}
    store.set_ref("pocket", 10, "trajectories", made.digest)
    store.set_ref("other", 1, "trajectories", made.digest)
    assert [(r.experiment, r.iteration) for r in store.refs()] == [("other", 1), ("pocket", 2), ("pocket", 10)]
    assert [r.iteration for r in store.refs("pocket")] == [2, 10]
    assert store.refs("nobody") == []


def test_a_ref_needs_its_artifact(store: Store) -> None:
    with pytest.raises(StoreError, match=r"pocket\|02: scores"):
        store.set_ref("pocket", 2, "scores", DIGEST)
    with pytest.raises(StoreError, match="iteration 0"):
        store.ref("pocket", 0, "scores")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"kind": "trajectories", "digest": "x", "created": "", "facts": {}}', "{}"]
)
def test_a_broken_ref_is_named_and_can_be_written_anew(store: Store, content: str) -> None:
    made = make(store)
    store.set_ref("pocket", 1, "trajectories", made.digest)
    path = store.root / "refs" / "pocket" / "01" / "trajectories.json"
    path.write_text(content)
    with pytest.raises(StoreError, match=r"trajectories\.json: not a ref") as caught:
        store.refs()
    assert f"delete {path}" in caught.value.remedy
    store.set_ref("pocket", 1, "trajectories", made.digest)
    assert [ref.digest for ref in store.refs()] == [DIGEST]


@pytest.mark.parametrize("copied", ["pocket (backup)/01/scores.json", "pocket/01/scores (1).json", "pocket/01/._scores.json"])
def test_a_copy_among_the_refs_is_named(store: Store, copied: str) -> None:
    artifact = make(store)
    store.set_ref("pocket", 1, artifact.kind, artifact.digest)
    path = store.root / "refs" / copied
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"whatever")
    if path.name.startswith("."):  # of a file that macOS has copied
        assert [ref.digest for ref in store.refs()] == [artifact.digest]
    else:
        with pytest.raises(StoreError, match=re.escape(f"{path}: not the place of a ref")):
            store.refs()


def test_a_ref_on_a_full_disk_stays_what_it_was(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make(store)
    store.set_ref("pocket", 1, "trajectories", made.digest, n=1)
    before = tree(store)

    def fail(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(StoreError, match="No space left"):
        store.set_ref("pocket", 1, "trajectories", made.digest, n=2)
    assert tree(store) == before


def test_every_error_has_a_remedy(store: Store) -> None:
    with pytest.raises(EvolveError) as caught:
        store.open("scores", DIGEST)
    assert isinstance(caught.value, OSError)
    assert "remedy:" in str(caught.value)
