"""The store's second home: what is visible there is whole, another machine reads it, a lost connection costs nothing."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import boto3  # type: ignore[import-untyped]
import pytest
from moto.server import ThreadedMotoServer

from evolve_dag.cli import main
from evolve_dag.errors import ConfigError, StoreError
from evolve_dag.secrecy import describe_error
from evolve_dag.store import mirror as mirrors
from evolve_dag.store.artifacts import Artifact, Ref, Store
from evolve_dag.store.mirror import Mirror, MirroredStore, Moved, open_store

SECRET = "wJalrXUtnFEMIK7MDENGbPxRfiCYEXAMPLEKEY"


@pytest.fixture(scope="module")
def server() -> Iterator[ThreadedMotoServer]:
    running = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    running.start()
    yield running
    running.stop()


@pytest.fixture
def bucket(server: ThreadedMotoServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """An empty bucket; credentials and endpoint only by the environment."""
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAIOSFODNN7EXAMPLE")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    name = f"evolve-{uuid.uuid4().hex[:8]}"
    boto3.client("s3").create_bucket(Bucket=name)
    return name


@pytest.fixture(params=["s3", "file", "memory"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same behaviour is asked of every kind of file system."""
    if request.param == "s3":
        return f"s3://{request.getfixturevalue('bucket')}/some/prefix"
    return f"file://{tmp_path}/remote" if request.param == "file" else f"memory://{uuid.uuid4().hex}"


@pytest.fixture
def folder(tmp_path: Path) -> str:
    return f"file://{tmp_path}/remote"


class Watched(Mirror):
    """Notes what is written and read; may fail at a write."""

    def __init__(self, url: str, *, fail_at: str = "") -> None:
        super().__init__(url, refresh_seconds=0.0, absent_seconds=0.0, retry_seconds=0.0)
        self.written: list[str] = []
        self.read: list[str] = []
        self.fail_at = fail_at

    def _write(self, name: str, content: bytes | Path) -> None:
        if self.fail_at and name.startswith(self.fail_at):
            raise ConnectionResetError(f"connection lost, key was {SECRET}")
        self.written.append(name)
        super()._write(name, content)

    def _read(self, name: str) -> bytes | None:
        self.read.append(name)
        return super()._read(name)


def make(
    store: Store, name: str = "a", *, kind: str = "scores", inputs: dict[str, str] | None = None, **files: str
) -> Artifact:
    """An artifact with a file in a folder and one that is the same in every artifact."""
    arguments: dict[str, Any] = {"code_version": "1", "config": {"name": name}, "inputs": inputs or {}}
    with store.build(kind, Store.digest_of(kind, **arguments), **arguments) as build:
        if build.artifact is None:
            (build.path / "sub").mkdir()
            for file, text in {"own.txt": f"of {name}", "sub/same.txt": "same everywhere", "empty": "", **files}.items():
                (build.path / file).write_text(text)
            build.note(name=name)
    assert build.artifact is not None
    return build.artifact


def visible(url: str) -> list[str]:
    """Names in the mirror."""
    return sorted(name for part in ("files", "objects", "refs") for name in Mirror(url)._list(part))


def waiting(store: Store) -> list[str]:
    return [path.name for path in mirrors._waiting(store)]


# -- two machines


def test_another_machine_reads_what_was_published(address: str, tmp_path: Path) -> None:
    here = MirroredStore(tmp_path / "here", Watched(address))
    made = make(here)
    here.set_ref("pocket", 1, "scores", made.digest, seconds=2.5)
    there = MirroredStore(tmp_path / "there", Watched(address))
    assert there.exists("scores", made.digest)
    assert not (tmp_path / "there" / "objects").exists()
    [ref] = there.refs("pocket")
    assert ref == here.ref("pocket", 1, "scores")
    assert ref.facts == {"seconds": 2.5}
    found = there.open("scores", ref.digest, verify=True)
    assert found.manifest == made.manifest
    assert found.file("sub/same.txt").read_text() == "same everywhere"
    assert found.file("empty").read_bytes() == b""
    assert found.path == tmp_path / "there" / "objects" / "scores" / made.digest
    assert not list((tmp_path / "there" / "mirror" / "incoming").glob("*/*/*"))


def test_what_the_mirror_has_is_not_made_again(folder: str, tmp_path: Path) -> None:
    made = make(MirroredStore(tmp_path / "here", Watched(folder)))
    there = MirroredStore(tmp_path / "there", Watched(folder))
    assert not there.exists("scores", "0" * 32)
    with pytest.raises(StoreError, match="no such scores artifact"):
        there.open("scores", "0" * 32)
    there.open("scores", made.digest)
    written = there.mirror.written  # type: ignore[union-attr]
    make(there)
    there.set_ref("pocket", 1, "scores", made.digest)
    assert written == ["refs/pocket/01/scores.json"]


def test_nothing_is_sent_twice(address: str, tmp_path: Path) -> None:
    mirror = Watched(address)
    store = MirroredStore(tmp_path / "here", mirror)
    first, second = make(store, "a"), make(store, "b")
    files = [name for name in mirror.written if name.startswith("files/")]
    assert len(files) == len(set(files)) == 4  # own.txt twice; same.txt and the empty one are shared
    assert mirror.written.index(f"objects/scores/{first.digest}.json") == 3
    assert mirror.written[-1] == f"objects/scores/{second.digest}.json"
    store.set_ref("pocket", 1, "scores", first.digest)
    before = list(mirror.written)
    assert mirror.push(store.here) == Moved()
    assert Watched(address).push(store.here) == Moved()
    assert mirror.written == before
    assert waiting(store) == []


def test_first_of_two_machines_that_make_the_same_stands(folder: str, tmp_path: Path) -> None:
    """Contents may differ in timings: neither must spoil the other's."""
    one = make(MirroredStore(tmp_path / "one", Watched(folder)), timing="1.0 s")
    two = make(Store(tmp_path / "two"), timing="2.0 s")
    assert one.digest == two.digest
    late = Watched(folder)
    assert late.push(Store(tmp_path / "two")) == Moved()
    assert late.written == []
    third = MirroredStore(tmp_path / "three", Watched(folder)).open("scores", one.digest, verify=True)
    assert third.file("timing").read_text() == "1.0 s"


def test_a_manifest_that_came_meanwhile_stands(folder: str, tmp_path: Path) -> None:
    class Overtaken(Watched):
        def _write(self, name: str, content: bytes | Path) -> None:
            if name.startswith("files/") and not (tmp_path / "one").exists():
                make(MirroredStore(tmp_path / "one", Watched(folder)), timing="1.0 s")
            super()._write(name, content)

    slow = MirroredStore(tmp_path / "two", Overtaken(folder))
    made = make(slow, timing="2.0 s")
    third = MirroredStore(tmp_path / "three", Watched(folder)).open("scores", made.digest, verify=True)
    assert third.file("timing").read_text() == "1.0 s"
    assert made.file("timing").read_text() == "2.0 s"


# -- refs


def test_the_later_ref_wins_on_both_sides(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(f"2026-01-01T00:00:{second:02d}+00:00" for second in range(60))
    monkeypatch.setattr("evolve_dag.store.artifacts._now", lambda: next(clock))
    one, two = (MirroredStore(tmp_path / name, Watched(folder)) for name in ("one", "two"))
    a, b = make(one, "a"), make(two, "b")
    one.set_ref("pocket", 1, "scores", a.digest)
    two.set_ref("pocket", 1, "scores", b.digest)
    ref = one.ref("pocket", 1, "scores")
    assert ref is not None
    assert ref.digest == b.digest
    assert one.open("scores", b.digest).file("own.txt").read_text() == "of b"
    # A ref that waited for its connection does not overtake one that was set after it.
    old = Ref("pocket", 1, "scores", a.digest, "2025-01-01T00:00:00+00:00")
    one.mirror.referenced(one.here, old)
    assert not one.mirror._send_ref(one.here, old)
    assert MirroredStore(tmp_path / "three", Watched(folder)).refs()[0].digest == b.digest


@pytest.mark.parametrize("behind", [0, 300])
def test_a_ref_that_takes_the_place_of_another_is_later_whatever_the_clocks_say(
    behind: int, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Set in the same second, or by a machine whose clock is behind, it was undone by the one that it had replaced."""
    one, two = (MirroredStore(tmp_path / name, Watched(folder)) for name in ("one", "two"))
    began = datetime(2026, 1, 1, tzinfo=UTC)
    monkeypatch.setattr("evolve_dag.store.artifacts._now", lambda: began.isoformat(timespec="seconds"))
    made = sorted((make(one, name).digest for name in "ab"), reverse=True)
    one.set_ref("pocket", 1, "scores", made[0])
    assert [ref.digest for ref in two.refs()] == made[:1]
    began -= timedelta(seconds=behind)
    two.set_ref("pocket", 1, "scores", made[1])
    assert [ref.digest for store in (one, two) for ref in store.refs()] == [made[1], made[1]]


def test_only_refs_that_changed_are_read_and_at_most_once_in_a_while(folder: str, tmp_path: Path) -> None:
    one = MirroredStore(tmp_path / "one", Watched(folder))
    for k in (1, 2, 3):
        one.set_ref("pocket", k, "scores", make(one, f"{k}").digest)
    eager = Watched(folder)
    two = MirroredStore(tmp_path / "two", eager)
    assert len(two.refs()) == 3
    assert len(eager.read) == 3
    assert len(two.refs("pocket")) == 3
    assert len(eager.read) == 3
    one.set_ref("pocket", 4, "scores", make(one, "4").digest)
    calm = Mirror(folder)  # a minute between looks
    assert len(MirroredStore(tmp_path / "two", calm).refs()) == 4
    one.set_ref("pocket", 5, "scores", make(one, "5").digest)
    assert len(MirroredStore(tmp_path / "two", calm).refs()) == 4
    assert two.ref("pocket", 5, "scores") is not None


@pytest.mark.parametrize(
    "content", [b"", b"[]", b'{"kind": "scores", "digest": "../..", "created": "", "facts": {}}', b'{"kind": "policy"}']
)
def test_what_is_no_ref_is_left_out(content: bytes, folder: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    one = MirroredStore(tmp_path / "one", Watched(folder))
    one.set_ref("pocket", 1, "policy", make(one, kind="policy").digest)
    one.mirror._write("refs/pocket/01/scores.json", content)
    one.mirror._write("refs/No Name/01/scores.json", content)
    two = MirroredStore(tmp_path / "two", Watched(folder))
    assert [ref.kind for ref in two.refs()] == ["policy"]
    assert "refs/pocket/01/scores.json: not a ref" in caplog.text
    assert sorted(path.name for path in (tmp_path / "two" / "refs").iterdir()) == ["pocket"]


@pytest.mark.parametrize("name", ["objects", "refs"])
def test_an_experiment_may_be_called_as_a_folder_of_the_mirror_is(name: str, folder: str, tmp_path: Path) -> None:
    one = MirroredStore(tmp_path / "one", Watched(folder))
    ref = one.set_ref(name, 1, "scores", make(one).digest)
    assert waiting(one) == []
    assert MirroredStore(tmp_path / "two", Watched(folder)).refs(name) == [ref]


# -- kills, lost connections, damage


def test_a_push_killed_in_the_middle_is_invisible_and_completes_later(folder: str, tmp_path: Path) -> None:
    code = f"""
    import os, signal, sys
    sys.path.insert(0, {str(Path(__file__).parent)!r})
    import test_mirror as t
    class Dying(t.Watched):
        def _write(self, name, content):
            if name.startswith("objects/"):
                os.kill(os.getpid(), signal.SIGKILL)
            super()._write(name, content)
    t.make(t.MirroredStore({str(tmp_path / "here")!r}, Dying({folder!r})))
    """
    ended = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(visible(folder)) == 3
    store = MirroredStore(tmp_path / "here", Watched(folder))
    [made] = store.artifacts()  # the local one was finished
    other = MirroredStore(tmp_path / "there", Watched(folder))
    assert not other.exists("scores", made.digest)
    assert waiting(store) == [made.digest]
    make(store, "b")  # the next publication sends both
    assert waiting(store) == []
    assert store.mirror.written == [  # type: ignore[union-attr]
        f"objects/scores/{made.digest}.json",
        *[name for name in store.mirror.written if name.startswith("files/")],  # type: ignore[union-attr]
        *[f"objects/scores/{a.digest}.json" for a in store.artifacts() if a.digest != made.digest],
    ]
    assert other.open("scores", made.digest, verify=True).manifest == made.manifest


def test_half_a_file_is_sent_anew(folder: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "here")
    made = make(store)
    mirror = Watched(folder)
    name = mirrors._file_name(made.manifest.files["own.txt"].sha256)
    mirror._write(name, b"of")
    assert mirror.push(store).artifacts == 1
    assert mirror._read(name) == b"of a"


def test_a_lost_connection_fails_no_step_and_is_made_up_for(
    bucket: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    address, endpoint = f"s3://{bucket}/p", os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # nobody listens there
    monkeypatch.setitem(mirrors._S3_OPTIONS["config_kwargs"]["retries"], "max_attempts", 1)
    store = MirroredStore(tmp_path / "here", Mirror(address))
    made = make(store)
    store.set_ref("pocket", 1, "scores", made.digest)
    assert not store.exists("scores", "0" * 32)
    assert [ref.digest for ref in store.refs()] == [made.digest]
    assert len([r for r in caplog.records if "cannot be used, going on without it" in r.message]) == 1  # then it is left alone
    assert len(waiting(store)) == 2
    with pytest.raises(StoreError, match="cannot be read") as needed:
        store.open("scores", "0" * 32)
    assert mirrors.VARIABLE in needed.value.remedy
    with pytest.raises(StoreError, match="cannot be written"):
        Mirror(address).push(store.here)
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    again = MirroredStore(tmp_path / "here", Watched(address))
    make(again, "b")
    assert waiting(again) == []
    other = MirroredStore(tmp_path / "there", Watched(address))
    assert other.open("scores", other.refs()[0].digest, verify=True).manifest == made.manifest


def test_refs_wait_for_the_artifacts_they_point_to(folder: str, tmp_path: Path) -> None:
    mirror = Watched(folder, fail_at="files/")
    store = MirroredStore(tmp_path / "here", mirror)
    made = make(store)
    store.set_ref("pocket", 1, "scores", made.digest)
    assert visible(folder) == []
    mirror.fail_at = "objects/"
    assert mirror._attempt(lambda: mirror._deliver(store.here), None) is None
    assert len(visible(folder)) == 3
    mirror.fail_at = ""
    assert mirror._deliver(store.here).refs == 1
    assert visible(folder)[-2:] == [f"objects/scores/{made.digest}.json", "refs/pocket/01/scores.json"]


@pytest.mark.parametrize("damage", ["content", "missing", "manifest", "escape"])
def test_what_is_damaged_in_the_mirror_is_refused_and_can_be_mended(damage: str, folder: str, tmp_path: Path) -> None:
    store = MirroredStore(tmp_path / "here", Watched(folder))
    made = make(store)
    remote = tmp_path / "remote"
    manifest = remote / f"objects/scores/{made.digest}.json"
    blob = remote / mirrors._file_name(made.manifest.files["own.txt"].sha256)
    if damage == "content":
        blob.write_text("OF A")  # of the same size
    elif damage == "missing":
        blob.unlink()
    elif damage == "manifest":
        manifest.write_text(manifest.read_text().replace('"name": "a"', '"name": "z"'))
    else:
        content = json.loads(manifest.read_text())
        content["files"]["../../../../escaped"] = content["files"]["own.txt"]
        manifest.write_text(json.dumps(content))
    other = MirroredStore(tmp_path / "there", Watched(folder))
    with pytest.raises(StoreError, match="damaged in the mirror") as told:
        other.open("scores", made.digest)
    assert not list((tmp_path / "there").rglob("own.txt"))
    assert not list(tmp_path.rglob("escaped"))
    assert f"objects/scores/{made.digest}.json" in told.value.remedy
    manifest.unlink()  # as the remedy says
    blob.unlink(missing_ok=True)
    assert Watched(folder).push(store.here).artifacts == 1
    assert other.open("scores", made.digest, verify=True).manifest == made.manifest


def test_what_is_damaged_here_is_not_sent(folder: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "here")
    bad, good = make(store, "bad"), make(store, "good")
    (bad.path / "own.txt").write_text("of BAD")
    moved = Watched(folder).push(store)
    assert moved.artifacts == 1
    assert len(moved.failed) == 1
    assert bad.digest in moved.failed[0]
    assert waiting(store) == [bad.digest]
    assert [name for name in visible(folder) if "objects" in name] == [f"objects/scores/{good.digest}.json"]


def test_a_damaged_artifact_that_was_deleted_comes_back_whole(folder: str, tmp_path: Path) -> None:
    store = MirroredStore(tmp_path / "here", Watched(folder))
    made = make(store)
    (made.path / "own.txt").write_text("of X")
    with pytest.raises(StoreError, match="corrupt"):
        store.open("scores", made.digest, verify=True)
    shutil.rmtree(made.path)
    assert store.open("scores", made.digest, verify=True).file("own.txt").read_text() == "of a"


# -- what people ask for


def test_pull_brings_what_an_experiment_rests_on(address: str, tmp_path: Path) -> None:
    here = MirroredStore(tmp_path / "here", Watched(address))
    first = make(here, "first", kind="trajectories")
    second = make(here, "second", inputs={"trajectories": first.digest, "corpus": "f" * 32})
    alone = make(here, "alone")
    here.set_ref("pocket", 1, "scores", second.digest)
    here.set_ref("other", 1, "scores", alone.digest)
    there, mirror = Store(tmp_path / "there"), Watched(address)
    said: list[str] = []
    moved = mirror.pull(there, "pocket", said.append)
    assert (moved.artifacts, moved.refs) == (2, 2)
    assert moved.bytes == sum(fact.bytes for made in (first, second) for fact in made.manifest.files.values())
    assert said == [f"scores {second.digest[:12]}", f"trajectories {first.digest[:12]}"]
    status = mirror.status(there)
    assert (status.here, status.there, status.not_here, status.not_there, status.refs_differ) == (2, 3, 1, (), 0)
    assert mirror.pull(there) == Moved(artifacts=1, bytes=sum(f.bytes for f in alone.manifest.files.values()))
    assert mirror.pull(there) == Moved()


def test_status_tells_what_is_where(folder: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "here")
    made = make(store)
    store.set_ref("pocket", 1, "scores", made.digest)
    mirror = Watched(folder)
    before = mirror.status(store)
    assert (before.here, before.there, before.refs_differ, before.bytes_there) == (1, 0, 1, 0)
    assert before.not_there == (f"scores {made.digest}",)
    assert mirror.push(store).refs == 1
    after = mirror.status(store)
    assert (after.here, after.there, after.not_there, after.refs_differ, after.waiting) == (1, 1, (), 0, 0)
    assert after.bytes_there == sum(fact.bytes for fact in made.manifest.files.values())


# -- the address


@pytest.mark.parametrize("url", ["s3://key:secretvalue@bucket/p", "s3://user@bucket", "s3://bucket/p?token=secretvalue"])
def test_an_address_with_credentials_is_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(ConfigError, match="holds a user") as told:
        Mirror(url)
    assert "secretvalue" not in str(told.value)
    assert "user@" not in str(told.value)


@pytest.mark.parametrize("url", ["bucket/prefix", "s3://", "simplecache::s3://bucket"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="not an address"):
        Mirror(url)


def test_an_unknown_protocol_stops_the_run_before_it_works(tmp_path: Path) -> None:
    store = MirroredStore(tmp_path, Mirror("nosuch://bucket"))
    with pytest.raises(ConfigError, match="nosuch"):
        store.exists("scores", "0" * 32)


def test_environment_names_the_mirror(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert type(open_store(tmp_path / "here")) is Store
    monkeypatch.setenv(mirrors.VARIABLE, folder)
    made = make(open_store(tmp_path / "here"))
    assert open_store(tmp_path / "there").open("scores", made.digest).manifest == made.manifest
    assert mirrors.configured() is mirrors.configured()  # what one store has found out of it the next one knows


def test_a_missing_bucket_and_an_unknown_experiment_are_named(bucket: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no experiment 'nobody'"):
        Mirror(f"s3://{bucket}").pull(Store(tmp_path), "nobody")
    with pytest.raises(StoreError, match="no bucket 'absent-bucket'"):
        Mirror("s3://absent-bucket/p").status(Store(tmp_path))


def test_errors_hold_no_secrets(monkeypatch: pytest.MonkeyPatch, folder: str, tmp_path: Path, caplog: Any) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    with caplog.at_level(logging.DEBUG, logger="evolve_dag.store.mirror"):
        make(MirroredStore(tmp_path / "here", Watched(folder, fail_at="files/")))
    assert "ConnectionResetError: connection lost, key was ***" in caplog.text
    assert SECRET not in caplog.text
    with pytest.raises(StoreError) as told:
        Watched(folder, fail_at="files/").push(Store(tmp_path / "here"))
    assert SECRET not in str(told.value)
    assert told.value.__cause__ is None
    assert describe_error(ValueError("at https://me:word@host/x <AWSAccessKeyId>AKIA1</")) == (
        "ValueError: at https://me:***@host/x <AWSAccessKeyId>***</"
    )


# -- the command line


def test_command_line_moves_a_store_to_another_machine(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def evolve(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["evolve", "mirror", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return f"{ended.value.code or 0} {out}{err}"

    assert evolve("status", "--store", str(tmp_path / "here")).startswith("2 error: EVOLVE_MIRROR is not set")
    store = Store(tmp_path / "here")
    made = make(store)
    store.set_ref("pocket", 1, "scores", made.digest)
    monkeypatch.setenv(mirrors.VARIABLE, folder)
    assert "1 artifacts only here" in evolve("status", "--store", str(store.root))
    assert f"scores {made.digest[:12]}\nsent 1 artifacts and 1 refs" in evolve("push", "--store", str(store.root))
    assert "fetched 1 artifacts and 1 refs" in evolve("pull", "--store", str(tmp_path / "there"))
    told = json.loads(evolve("status", "--json", "--store", str(tmp_path / "there")).removeprefix("0 "))
    assert (told["here"], told["there"], told["not_there"], told["refs_differ"]) == (1, 1, [], 0)
    (made.path / "own.txt").write_text("of X")
    (tmp_path / "remote" / f"objects/scores/{made.digest}.json").unlink()
    monkeypatch.setattr(mirrors, "configured", lambda: Mirror(folder))  # another process, so to speak
    assert evolve("push", "--store", str(store.root)).startswith("1 ")


def test_a_manifest_that_only_the_mirror_has_is_read(folder: str, tmp_path: Path) -> None:
    config = {"n": 1}
    digest = Store.digest_of("adapter", "1", config, {})
    there = MirroredStore(tmp_path / "there", Mirror(folder))
    with there.build("adapter", digest, code_version="1", config=config, inputs={}) as build:
        (build.path / "weights").write_text("w")
    here = MirroredStore(tmp_path / "here", Mirror(folder))
    assert here.read("adapter", digest).manifest.config == config
    with pytest.raises(StoreError, match="missing"):
        here.read("adapter", "0" * 32)
