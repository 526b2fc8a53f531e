"""One machine at a time runs an experiment: of two that begin at once one gets it, a machine that is gone loses it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from test_mirror import Watched, address, bucket, folder, make, server

from evolve_dag.errors import ConcurrencyError
from evolve_dag.store import lease
from evolve_dag.store.mirror import MirroredStore, _Objects

__all__ = ["address", "bucket", "folder", "server"]  # fixtures


def machine(tmp_path: Path, name: str, address: str) -> MirroredStore:
    return MirroredStore(tmp_path / name, Watched(address))


@pytest.fixture
def abandoned(tmp_path: Path, folder: str) -> MirroredStore:
    """A machine that was killed while it ran ``pocket``: its lease stays."""
    store = machine(tmp_path, "gone", folder)
    leave(store)
    return store


def leave(store: MirroredStore) -> None:
    held = lease.Lease(_Objects(store.mirror), "pocket", lease.holder_of(store.root), store.mirror.url)
    assert held.acquire() is None
    held._stop.set()
    store.mirror._leases["pocket"] = held


def test_two_machines_do_not_run_one_experiment(address: str, tmp_path: Path) -> None:
    here, there = machine(tmp_path, "here", address), machine(tmp_path, "there", address)
    for _ in range(2):  # given back, it can be had again, by either
        with here.lock("pocket"):
            with pytest.raises(
                ConcurrencyError, match=r"'pocket' is being run by process .* on .* since .*lease in"
            ) as refused:
                there.lock("pocket").__enter__()
            assert "ends by itself in 1" in refused.value.remedy
            with there.lock("other"):
                pass
        with there.lock("pocket"):
            pass
    assert len(list(here.mirror._list("leases/pocket"))) == 1


def test_of_machines_that_begin_at_once_one_gets_it(address: str, tmp_path: Path) -> None:
    if address.startswith("memory"):
        pytest.skip("the file system in memory asks first and writes then: it is for one process")
    machines = [machine(tmp_path, str(n), address) for n in range(3)]
    held: list[Any] = []

    def begin(store: MirroredStore) -> bool:
        try:
            held.append(lock := store.lock("pocket"))
            lock.__enter__()
        except ConcurrencyError:
            return False
        return True

    with ThreadPoolExecutor(len(machines)) as pool:
        assert sum(pool.map(begin, machines)) == 1


def test_a_killed_run_goes_on_at_once_on_its_machine_and_later_elsewhere(
    abandoned: MirroredStore, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConcurrencyError, match="is being run by"):
        machine(tmp_path, "other", folder).lock("pocket").__enter__()
    with MirroredStore(abandoned.root, Watched(folder)).lock("pocket"):
        pass
    leave(abandoned)
    now = time.time()
    monkeypatch.setattr(lease.time, "time", lambda: now + lease.TERM_SECONDS + 1)
    with machine(tmp_path, "other", folder).lock("pocket"):
        pass


def test_who_was_taken_over_sets_no_ref_any_more(
    abandoned: MirroredStore, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was asleep, or cut off from the mirror, and wakes up."""
    made, held, now = make(abandoned), abandoned.mirror._leases["pocket"], time.time()
    held.renew()
    abandoned.set_ref("pocket", 1, "scores", made.digest)
    with monkeypatch.context() as later:
        later.setattr(lease.time, "time", lambda: now + 2 * lease.TERM_SECONDS)
        other = machine(tmp_path, "other", folder)
        with other.lock("pocket"):
            held.renew()
            with pytest.raises(ConcurrencyError, match="was taken over by process"):
                abandoned.set_ref("pocket", 2, "scores", made.digest)
            held.release()
            with pytest.raises(ConcurrencyError, match="is being run by"):
                machine(tmp_path, "third", folder).lock("pocket").__enter__()
    abandoned.set_ref("other", 1, "scores", made.digest)


def test_who_wakes_up_after_its_term_looks_before_it_sets_a_ref(
    abandoned: MirroredStore, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between waking and the next renewal half a minute may pass."""
    made, now = make(abandoned), time.time()
    monkeypatch.setattr(lease.time, "time", lambda: now + 2 * lease.TERM_SECONDS)
    abandoned.set_ref("pocket", 1, "scores", made.digest)  # nobody has taken over: it goes on
    monkeypatch.setattr(lease.time, "time", lambda: now + 4 * lease.TERM_SECONDS)
    with machine(tmp_path, "other", folder).lock("pocket"), pytest.raises(ConcurrencyError, match="was taken over by process"):
        abandoned.set_ref("pocket", 2, "scores", made.digest)


def test_a_run_begins_without_a_lease_where_the_mirror_is_gone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    store = machine(tmp_path, "here", "memory://gone")
    store.mirror._connect = lambda: (_ for _ in ()).throw(ConnectionResetError("gone"))  # type: ignore[method-assign]
    with store.lock("pocket"):
        pass
    assert "cannot be used, going on without it: ConnectionResetError" in caplog.text


def test_a_term_that_was_created_and_not_written_holds_up_nobody(tmp_path: Path, folder: str) -> None:
    store = machine(tmp_path, "here", folder)
    (tmp_path / "remote/leases/pocket").mkdir(parents=True)
    (tmp_path / "remote/leases/pocket/000000007.json").touch()
    with store.lock("pocket"):
        assert max(store.mirror._list("leases/pocket")) == "leases/pocket/000000008.json"
