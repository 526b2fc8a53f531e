from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from distillation_fakes import TinyChat, make_scored_rows, make_trajectory, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from evolve_dag.distillation.alignment import StudentRow, align, replay_injection
from evolve_dag.distillation.dataset import DistillationRow, StepView, batches, load_contexts, make_rows, save_contexts
from evolve_dag.distillation.teacher import TeacherTargets
from evolve_dag.errors import AlignmentError, StoreError

STEP_WISE = replay_injection("step_wise")


def sized(sizes: list[tuple[int, int, int]]) -> list[DistillationRow]:
    """Rows of (task, rollout, tokens); every second one is followed by a retention row of its trajectory."""
    made = []
    for index, (task, rollout, tokens) in enumerate(sizes):
        name, ids = f"t{task}@x#{rollout}.{index}", tuple(range(tokens))
        view = (StepView(0, (), "", 1),)
        made.append(DistillationRow(StudentRow(name, ids, (0,), ((1, tokens),)), view, None))
        if index % 2:
            row = StudentRow(f"{name}@0", (*ids, 0), (0,), ((2, tokens + 1),))
            made.append(DistillationRow(row, view, None, retention=True))
    return made


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 3), st.integers(2, 60)), max_size=40),
    st.integers(1, 400),
    st.integers(0, 5),
    st.integers(0, 3),
)
def test_every_row_once_and_no_batch_over_the_budget(sizes: list, budget: int, seed: int, epoch: int) -> None:
    rows = sized(sizes)
    made = batches(rows, budget, seed, epoch)
    assert sorted(index for batch in made for index in batch) == list(range(len(rows)))
    for batch in made:
        whole = {rows[index].trajectory for index in batch}
        assert [row for row in rows if row.trajectory in whole] == [rows[index] for index in sorted(batch)]
        assert sum(rows[index].tokens for index in batch) <= budget or len(whole) == 1
    assert made == batches(rows, budget, seed, epoch)


def test_order_follows_seed_and_epoch() -> None:
    rows = sized([(task, 0, 10) for task in range(50)])
    assert batches(rows, 50, 0, 0) != batches(rows, 50, 0, 1)
    assert batches(rows, 50, 0, 0) != batches(rows, 50, 1, 0)


def test_rollouts_of_a_task_are_neighbours() -> None:
    rows = sized([(task, rollout, 10) for rollout in range(4) for task in range(9)])
    tasks = [{rows[index].trajectory.split("#")[0] for index in batch} for batch in batches(rows, 66, 0)]
    assert all(len(found) == 1 for found in tasks)


def rows_of(kind: str) -> list[DistillationRow]:
    if kind == "none":
        chat = TinyChat()
        return make_rows([align(make_trajectory(chat, seed), chat, STEP_WISE) for seed in range(5)], None)
    return make_scored_rows(tiny_model(), range(5), STEP_WISE, top_k=0 if kind == "full" else 4)


def same(a: list[DistillationRow], b: list[DistillationRow]) -> None:
    assert [(one.row, one.contexts) for one in a] == [(one.row, one.contexts) for one in b]
    for one, other in zip(a, b, strict=True):
        assert (one.teacher is None) == (other.teacher is None)
        if one.teacher is not None and other.teacher is not None:
            for name in ("logprobs", "ids", "tail"):
                x, y = getattr(one.teacher, name), getattr(other.teacher, name)
                assert (x is None) == (y is None)
                if x is not None:
                    np.testing.assert_array_equal(x, y)
                    assert x.dtype == y.dtype


@pytest.mark.parametrize("kind", ["none", "top_k", "full"])
def test_round_trip(kind: str, tmp_path: Path) -> None:
    rows = rows_of(kind)
    save_contexts(tmp_path / "contexts", rows)
    same(rows, load_contexts(tmp_path / "contexts"))
    assert (tmp_path / "contexts" / "teacher.safetensors").exists() == (kind != "none")


@pytest.mark.parametrize("name", ["run[1]", "exp*", "a?b", "seed=3"])
def test_a_folder_may_be_called_like_a_pattern(name: str, tmp_path: Path) -> None:
    """A file that was there was called corrupt, and training of that store never began."""
    rows = rows_of("top_k")
    save_contexts(tmp_path / name / "contexts", rows)
    same(rows, load_contexts(tmp_path / name / "contexts"))


def test_files_are_the_same_bytes_every_time(tmp_path: Path) -> None:
    rows = rows_of("top_k")
    for name in ("a", "b"):
        save_contexts(tmp_path / name, rows)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_no_rows_at_all(tmp_path: Path) -> None:
    save_contexts(tmp_path, [])
    assert load_contexts(tmp_path) == []


def test_contexts_tell_what_the_teacher_read(tmp_path: Path) -> None:
    rows = rows_of("top_k")
    save_contexts(tmp_path, rows)
    frame = pl.read_parquet(tmp_path / "contexts.parquet")
    assert frame.height == sum(len(row.contexts) for row in rows)
    assert frame["injected"].str.starts_with("\nhint:\n").all()
    assert frame["selected"].list.len().to_list() == [1] * frame.height
    assert (frame["teacher_tokens"] > frame["start"]).all()


@pytest.mark.parametrize("name", ["rows.parquet", "contexts.parquet", "teacher.safetensors", "contexts.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "garbage"])
def test_damaged_files_are_named(name: str, damage: str, tmp_path: Path) -> None:
    save_contexts(tmp_path, rows_of("top_k"))
    path = tmp_path / name
    if damage == "missing":
        path.unlink()
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    else:
        path.write_bytes(b"\x00garbage\xff" * 9)
    with pytest.raises(StoreError, match=name) as caught:
        load_contexts(tmp_path)
    assert "materialize contexts again" in str(caught.value)


def test_files_that_do_not_fit_each_other_are_refused(tmp_path: Path) -> None:
    rows = rows_of("top_k")
    save_contexts(tmp_path, rows)
    frame = pl.read_parquet(tmp_path / "rows.parquet")
    frame.head(3).write_parquet(tmp_path / "rows.parquet")
    with pytest.raises(StoreError, match="counts 5 rows"):
        load_contexts(tmp_path)
    frame.drop("ends").write_parquet(tmp_path / "rows.parquet")
    with pytest.raises(StoreError, match=r"rows\.parquet: columns"):
        load_contexts(tmp_path)
    longer = frame.with_columns(pl.col("ends").list.eval(pl.element() + 1000))
    longer.write_parquet(tmp_path / "rows.parquet")
    with pytest.raises(AlignmentError, match="does not fit a row of"):
        load_contexts(tmp_path)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        (lambda a: a.pop("tail"), "lacks tail"),
        (lambda a: a.update(offsets=a["offsets"][:-1]), "offsets do not divide"),
        (lambda a: a.update(ids=a["ids"][:, :2].copy()), "different shapes"),
        (lambda a: a.update(logprobs=a["logprobs"] + 5), "no log-probabilities"),
        (lambda a: a.update(logprobs=np.full_like(a["logprobs"], np.nan)), "no log-probabilities"),
    ],
)
def test_teacher_arrays_are_checked(change: object, culprit: str, tmp_path: Path) -> None:
    save_contexts(tmp_path, rows_of("top_k"))
    arrays = load_file(str(tmp_path / "teacher.safetensors"))
    change(arrays)  # type: ignore[operator]
    save_file(arrays, str(tmp_path / "teacher.safetensors"))
    with pytest.raises(StoreError, match=culprit):
        load_contexts(tmp_path)


def test_other_format_is_refused(tmp_path: Path) -> None:
    save_contexts(tmp_path, rows_of("none"))
    facts = json.loads((tmp_path / "contexts.json").read_text())
    (tmp_path / "contexts.json").write_text(json.dumps({**facts, "format": 99}))
    with pytest.raises(StoreError, match="format 1"):
        load_contexts(tmp_path)


def test_rows_check_themselves() -> None:
    row = rows_of("top_k")[0]
    assert row.teacher is not None
    short = TeacherTargets(row.teacher.logprobs[:-1], None, None)
    with pytest.raises(AlignmentError, match=r"trajectory t0#0: \d+ teacher distributions for"):
        replace(row, teacher=short)
    with pytest.raises(AlignmentError, match="3 spans, 3 steps and 2 contexts"):
        replace(row, contexts=row.contexts[:2])
    spans = (row.row.spans[1], row.row.spans[0], row.row.spans[2])
    with pytest.raises(AlignmentError, match="step 1: span"):
        replace(row, row=replace(row.row, spans=spans))


def test_mixed_or_repeated_rows_are_not_saved(tmp_path: Path) -> None:
    with pytest.raises(AlignmentError, match="different kinds of teacher"):
        save_contexts(tmp_path, [rows_of("top_k")[0], rows_of("none")[1]])
    with pytest.raises(AlignmentError, match="stated twice: t0#0"):
        save_contexts(tmp_path, [rows_of("none")[0]] * 2)
    with pytest.raises(AlignmentError, match="1 teacher scores for 0"):
        make_rows([], [TeacherTargets(np.zeros((1, 1), np.float32))])


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="cannot be written"):
        save_contexts(tmp_path / "file" / "contexts", rows_of("none"))
