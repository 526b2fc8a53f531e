"""Memory: what was put is got, by every process, and nothing else."""

from __future__ import annotations

import json
import multiprocessing
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_dag import secrecy
from evolve_dag.errors import StoreError
from evolve_dag.store.memory import Memory

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def test_what_was_put_is_got_in_its_space_alone(tmp_path: Path) -> None:
    memory = Memory(tmp_path / "deep" / "memory.sqlite")
    assert memory.get("judge", "k") is None
    memory.put("judge", "k", "ja \ud83d\ude00 ☃".encode("utf-16", "surrogatepass").decode("utf-16"))
    memory.put("judge", "k", "the last one stands")
    assert memory.get("judge", "k") == "the last one stands"
    assert memory.get("selector", "k") is None
    memory.close()
    assert Memory(memory.path).get("judge", "k") == "the last one stands"


def test_half_a_character_is_no_obstacle(tmp_path: Path) -> None:
    """The web's texts and models' answers have them, as JSON spells them, where somebody has cut an emoji."""
    memory = Memory(tmp_path / "memory.sqlite")
    memory.put("web", "k", "cut \ud83d")
    assert memory.get("web", "k") == "cut \ufffd"


def _write(path: str, start: int) -> None:
    memory = Memory(Path(path))
    for number in range(start, start + 40):
        memory.put("space", str(number), str(number))


def test_many_processes_and_threads_write_at_once(tmp_path: Path) -> None:
    path = tmp_path / "memory.sqlite"
    workers = [multiprocessing.get_context("spawn").Process(target=_write, args=(str(path), n * 40)) for n in range(2)]
    threads = [threading.Thread(target=_write, args=(str(path), n * 40)) for n in range(2, 5)]
    for worker in [*workers, *threads]:
        worker.start()
    for worker in [*workers, *threads]:
        worker.join()
    memory = Memory(path)
    assert [memory.get("space", str(n)) for n in range(200)] == [str(n) for n in range(200)]


def test_a_file_that_is_no_memory_is_named(tmp_path: Path) -> None:
    path = tmp_path / "memory.sqlite"
    path.write_bytes(b"not a database, but long enough to be read as one" * 20)
    with pytest.raises(StoreError, match=r"memory\.sqlite.*\n.*delete the file"):
        Memory(path).get("a", "b")


@given(JSON, JSON)
def test_keys_differ_exactly_where_values_do(a: object, b: object) -> None:
    assert Memory.key_of("x", a) == Memory.key_of("x", a)
    if repr(a) != repr(b) and a != b:
        assert Memory.key_of(a) != Memory.key_of(b)


def test_a_key_that_was_said_back_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrecy, "_keys", set())
    key = secrecy.read_key("SOME_WORD", {"SOME_WORD": 'Zq9"K2x/b7LmT4YpRg6N'})
    memory = Memory(tmp_path / "memory.sqlite")
    memory.put("extraction", "k", json.dumps({"summary": f"asked with {key}", "next": ["password: x"]}))
    assert json.loads(memory.get("extraction", "k") or "") == {"summary": "asked with ***", "next": ["password: x"]}
    memory.close()
    assert not [path for path in tmp_path.iterdir() if b"Zq9" in path.read_bytes()]
