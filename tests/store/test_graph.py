"""The walk over digests: all that can be reached, once, and no digest overlooked."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_dag.errors import StoreError
from evolve_dag.store import graph


@given(st.dictionaries(st.integers(0, 9).map(str), st.sets(st.integers(0, 9).map(str))), st.sets(st.integers(0, 9).map(str)))
def test_reach_is_the_least_set_that_holds_the_starts_and_what_follows(arrows: dict[str, set[str]], starts: set[str]) -> None:
    asked: list[str] = []

    def following(one: str) -> set[str]:
        asked.append(one)
        return arrows.get(one, set())

    found = graph.reach(starts, following)
    assert starts <= found
    assert all(arrows.get(one, set()) <= found for one in found)
    assert found - starts <= set().union(*(arrows.get(one, set()) for one in found), set())
    assert sorted(asked) == sorted(found), "each is asked once"


def test_a_digest_across_the_border_of_two_reads_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_CHUNK", 50)
    digest = "0123456789abcdef" * 2
    for at in range(120):
        (tmp_path / "file").write_text("-" * at + digest + "-" * 60)
        assert digest in graph.digests_in(tmp_path / "file")
    (tmp_path / "file").write_text("x" * 10 + digest * 2 + " ")
    monkeypatch.setattr(graph, "_CHUNK", 1 << 20)
    assert graph.digests_in(tmp_path / "file") == set(), "64 digits are a hash of a file"


def test_an_artifact_names_what_its_manifest_and_its_decision_name_but_not_itself(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 32)
    folder.mkdir()
    with pytest.raises(StoreError, match="missing"):
        graph.named_by(folder)
    (folder / "manifest.json").write_text("{}")
    with pytest.raises(StoreError, match="corrupt"):
        graph.named_by(folder)
    (folder / "manifest.json").write_text(f'{{"digest": "{"a" * 32}", "inputs": {{"policy": "{"b" * 32}"}}}}')
    (folder / "decision.json").write_text(f'{{"adapter": "{"c" * 32}"}}')
    (folder / "else.json").write_text(f'"{"d" * 32}"')
    assert graph.named_by(folder) == {"b" * 32, "c" * 32}
