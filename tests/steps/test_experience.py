"""The step ``experience``: what it enters before it extracts, and what its checks count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from evolve_dag.config.schema import Experiment
from evolve_dag.experience.pool import Pool
from evolve_dag.records import ExperienceItem, Finding, PolicyRef
from evolve_dag.steps import experience
from evolve_dag.store.artifacts import Artifact, Store
from evolve_dag.store.frames import ITEMS, edits_from_frame, items_from_frame, items_to_frame, save_trajectories

ITEM = ExperienceItem("p0001", "Match: when a page is shown, open the page it names.", "principle", created=1, updated=1)
OTHER = replace(ITEM, id="p0002", text="Narrow: when a search returns no results, search only the short name.")


def stored(store: Store, kind: str, write: Callable[[Path], object]) -> Artifact:
    digest = Store.digest_of(kind, "1", {}, {})
    with store.build(kind, digest, code_version="1", config={}, inputs={}) as build:
        write(build.path)
    return store.open(kind, digest)


@pytest.mark.parametrize(
    ("items", "passed"),
    [
        ((ITEM, replace(OTHER, graduated=2)), True),
        ((ITEM, replace(OTHER, withdrawn=2)), True),
        ((ITEM, OTHER), False),
    ],
)
def test_items_that_left_the_context_do_not_count_for_the_cap(
    tmp_path: Path, items: tuple[ExperienceItem, ...], passed: bool
) -> None:
    artifact = stored(Store(tmp_path), "experience", lambda folder: items_to_frame(items).write_parquet(folder / ITEMS))
    found = {v.check: v for v in experience.examine(artifact, Experiment(experiment="x", extraction={"cap": 1}))}
    assert found["within_cap"].passed is passed


def test_a_tools_name_is_no_trajectory_detail(tmp_path: Path) -> None:
    texts = {"p0001": "Source: when a page is shown, call lookup_v2.", "p0002": "Source: when page 7 is shown, call lookup."}
    items = [replace(ITEM, id=item_id, text=text) for item_id, text in texts.items()]
    artifact = stored(Store(tmp_path), "experience", lambda folder: items_to_frame(items).write_parquet(folder / ITEMS))
    found = {v.check: v for v in experience.examine(artifact, Experiment(experiment="x"))}
    assert found["detail"].evidence["wrong"].keys() == {"p0002"}


def test_what_the_check_of_the_teacher_found_is_entered_first(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    entering = stored(store, "experience", lambda folder: (folder / "pool.json").write_text(Pool((ITEM, OTHER)).to_json()))
    notes: dict[str, object] = {}
    found = (Finding("withdraw", "p0001", "the teacher does worse with it: -20 points"), Finding("withdraw", "p0009", "gone"))
    context = SimpleNamespace(
        experiment=Experiment(experiment="x", tasks={"train": {"count": 2, "world": 11}}),
        iteration=2,
        store=store,
        inputs={"trajectories": stored(store, "trajectories", lambda folder: save_trajectories(folder, []))},
        build=SimpleNamespace(path=tmp_path, note=notes.update),
        entering=PolicyRef(2, "base", experience=entering.digest, next_item=3, findings=found),
        roles=SimpleNamespace(run=_done, memory=None),
        progress=SimpleNamespace(start=lambda *_: None, advance=lambda *_: None, finish=lambda: None),
    )
    experience.run(context)  # type: ignore[arg-type]
    import polars as pl

    items = items_from_frame(pl.read_parquet(tmp_path / ITEMS))
    assert [(i.id, i.withdrawn) for i in items] == [("p0001", 2), ("p0002", 0)]
    [edit] = edits_from_frame(pl.read_parquet(tmp_path / "edits.parquet"))
    assert (edit.operation, edit.item_id, edit.reason) == ("withdraw", "p0001", found[0].reason)
    assert (notes["withdrawn"], notes["active"]) == (1, 1)


def _done(coroutine: object) -> object:
    """What a coroutine gives that awaits nothing."""
    try:
        coroutine.send(None)  # type: ignore[attr-defined]
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it awaits something")
