"""Frames and journal dicts give back exactly the records that went in."""

from __future__ import annotations

import io
import json
from dataclasses import replace

import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolve_dag.errors import DataError
from evolve_dag.records import ExperienceItem, PoolEdit, Score, Step, ToolCall, Trajectory
from evolve_dag.store import frames, layout
from evolve_dag.store.jsonvalues import from_values, to_values

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
OPTIONAL = st.none() | TEXT
NAMES = st.lists(TEXT, max_size=3).map(tuple)
SECONDS = st.floats(0, 1e6)
NUMBER = st.integers(0, 2**31 - 1)
LOGPROB = st.floats(-1e4, 0, width=32)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(-1e9, 1e9) | TEXT, lambda one: st.lists(one, max_size=2), max_leaves=3
)


@st.composite
def steps(draw: st.DrawFn, index: int) -> Step:
    ids = draw(st.lists(NUMBER, max_size=4))
    return Step(
        index=index,
        text=draw(TEXT),
        token_ids=tuple(ids),
        logprobs=tuple(draw(LOGPROB) for _ in ids) if draw(st.booleans()) else (),
        call=draw(st.none() | st.builds(ToolCall, TEXT, st.dictionaries(TEXT, JSON, max_size=2))),
        answer=draw(OPTIONAL),
        observation=draw(OPTIONAL),
        problem=draw(OPTIONAL),
        selected=draw(NAMES),
        injected=draw(TEXT),
        prompt_tokens=draw(NUMBER),
        seconds=draw(SECONDS),
        features=draw(st.dictionaries(TEXT, TEXT, max_size=2)),
    )


@st.composite
def trajectories(draw: st.DrawFn) -> list[Trajectory]:
    ids = draw(st.lists(TEXT, max_size=4, unique=True))
    return [
        Trajectory(
            id=one,
            task_id=draw(TEXT),
            rollout=draw(NUMBER),
            seed=draw(st.integers(0, 2**63 - 1)),
            system=draw(TEXT),
            question=draw(TEXT),
            steps=tuple(draw(steps(index)) for index in range(draw(st.integers(0, 3)))),
            status=draw(st.sampled_from(["answered", "forced", "ended", "unanswered", "failed"])),
            answer=draw(OPTIONAL),
            reward=draw(st.none() | st.floats(0, 1)),
            error=draw(OPTIONAL),
            seconds=draw(SECONDS),
            offers_tools=draw(st.booleans()),
        )
        for one in ids
    ]


ITEMS = st.lists(
    st.builds(
        ExperienceItem,
        id=TEXT,
        text=TEXT,
        granularity=st.sampled_from(["principle", "instance"]),
        condition=st.dictionaries(TEXT, TEXT, max_size=3),
        evidence=st.dictionaries(TEXT, st.floats(allow_nan=False, allow_infinity=False), max_size=3),
        trajectory_ids=NAMES,
        created=NUMBER,
        updated=NUMBER,
    ),
    max_size=4,
    unique_by=lambda item: item.id,
)
EDITS = st.lists(
    st.builds(
        PoolEdit,
        operation=st.sampled_from(["add", "update", "delete", "merge"]),
        item_id=TEXT,
        iteration=NUMBER,
        before=OPTIONAL,
        after=OPTIONAL,
        reason=TEXT,
        trajectory_ids=NAMES,
        into=OPTIONAL,
    ),
    max_size=4,
)
SCORES = st.lists(
    st.builds(
        Score,
        task_id=TEXT,
        rollout=NUMBER,
        condition=st.sampled_from(["without", "with", "greedy"]),
        reward=st.none() | st.floats(0, 1),
        premature=st.booleans(),
        status=st.sampled_from(["answered", "forced", "ended", "unanswered", "failed"]),
        turns=NUMBER,
        tokens=NUMBER,
        answer=OPTIONAL,
        metadata=st.dictionaries(TEXT, TEXT, max_size=3),
    ),
    max_size=4,
    unique_by=lambda score: (score.task_id, score.rollout, score.condition),
)


def through_parquet(frame: pl.DataFrame) -> pl.DataFrame:
    buffer = io.BytesIO()
    frame.write_parquet(buffer)
    buffer.seek(0)
    return pl.read_parquet(buffer)


@settings(deadline=None)
@given(trajectories())
def test_trajectories_survive_parquet(given_trajectories: list[Trajectory]) -> None:
    rows, step_rows = frames.trajectories_to_frames(given_trajectories)
    assert frames.trajectories_from_frames(through_parquet(rows), through_parquet(step_rows)) == given_trajectories


@settings(deadline=None)
@given(trajectories())
def test_trajectories_survive_a_journal(given_trajectories: list[Trajectory]) -> None:
    lines = [json.dumps(frames.trajectory_to_dict(one)) for one in given_trajectories]
    assert [frames.trajectory_from_dict(json.loads(line)) for line in lines] == given_trajectories


@settings(deadline=None)
@given(ITEMS)
def test_items_survive_parquet_and_json(items: list[ExperienceItem]) -> None:
    back = frames.items_from_frame(through_parquet(frames.items_to_frame(items)))
    assert back == items
    assert [list(item.evidence) for item in back] == [list(item.evidence) for item in items]
    assert [from_values(ExperienceItem, json.loads(json.dumps(to_values(item))), "", "") for item in items] == items


@settings(deadline=None)
@given(EDITS)
def test_edits_survive_parquet_and_json(edits: list[PoolEdit]) -> None:
    assert frames.edits_from_frame(through_parquet(frames.edits_to_frame(edits))) == edits
    assert [from_values(PoolEdit, json.loads(json.dumps(to_values(edit))), "", "") for edit in edits] == edits


@settings(deadline=None)
@given(SCORES)
def test_scores_survive_parquet(scores: list[Score]) -> None:
    assert frames.scores_from_frame(through_parquet(frames.scores_to_frame(scores))) == scores


ONE = Trajectory(
    id="t#0",
    task_id="t",
    rollout=0,
    seed=1,
    system="s",
    question="q",
    steps=(
        Step(0, "look", (1, 2), (-0.5, -0.25), ToolCall("search", {"query": "Bado"}), observation="no results"),
        Step(1, "done", (3,), (-1.0,), answer="Rato"),
    ),
    status="answered",
    answer="Rato",
    reward=1.0,
)


def test_empty_frames_have_the_columns() -> None:
    rows, step_rows = frames.trajectories_to_frames([])
    assert rows.schema == frames.schemas()[layout.TRAJECTORIES]
    assert step_rows.schema == frames.schemas()[layout.STEPS]
    assert frames.items_to_frame([]).schema == frames.schemas()[layout.ITEMS]
    assert frames.edits_to_frame([]).schema == frames.schemas()[layout.EDITS]
    assert frames.scores_to_frame([]).schema == frames.schemas()[layout.SCORES]


def test_derived_columns() -> None:
    rows, step_rows = frames.trajectories_to_frames([ONE])
    assert rows.select("turns", "tokens").rows() == [(2, 3)]
    assert step_rows["arguments"].to_list() == ['{"query": "Bado"}', None]


def test_further_columns_are_ignored() -> None:
    rows, step_rows = (frame.with_columns(more=1) for frame in frames.trajectories_to_frames([ONE]))
    assert frames.trajectories_from_frames(rows, step_rows) == [ONE]


def test_steps_of_before_they_had_features_are_read() -> None:
    rows, step_rows = frames.trajectories_to_frames([ONE])
    assert frames.trajectories_from_frames(rows, step_rows.drop("features")) == [ONE]


def test_rollouts_of_before_it_was_noted_whether_there_were_tools_are_read() -> None:
    rows, step_rows = frames.trajectories_to_frames([ONE])
    assert frames.trajectories_from_frames(rows.drop("offers_tools"), step_rows) == [ONE]


def test_steps_come_back_in_order_whatever_the_order_of_the_rows() -> None:
    rows, step_rows = frames.trajectories_to_frames([ONE])
    assert frames.trajectories_from_frames(rows, step_rows.reverse()) == [ONE]


def test_a_lone_surrogate_does_not_lose_the_trajectory() -> None:
    call = ToolCall("search", {"query": "\ud83d"})
    odd = replace(ONE, steps=(replace(ONE.steps[0], call=call, observation="no page named \ud83d", selected=("\udc00",)),))
    back = frames.trajectories_from_frames(*frames.trajectories_to_frames([odd]))[0]
    assert back.steps[0].observation == "no page named \N{REPLACEMENT CHARACTER}"
    assert back.steps[0].call == ToolCall("search", {"query": "\N{REPLACEMENT CHARACTER}"})
    assert back.steps[0].selected == ("\N{REPLACEMENT CHARACTER}",)
    assert frames.trajectory_from_dict(json.loads(json.dumps(frames.trajectory_to_dict(odd)))) == odd


def test_not_judged_stays_null() -> None:
    rows, step_rows = frames.trajectories_to_frames([replace(ONE, reward=None)])
    assert rows["reward"].to_list() == [None]
    assert frames.trajectories_from_frames(rows, step_rows)[0].reward is None


def test_repeated_ids_are_refused() -> None:
    with pytest.raises(DataError, match="'t#0' stands twice"):
        frames.trajectories_to_frames([ONE, ONE])
    rows, step_rows = frames.trajectories_to_frames([ONE])
    with pytest.raises(DataError, match="stands twice"):
        frames.trajectories_from_frames(pl.concat([rows, rows]), step_rows)
    with pytest.raises(DataError, match="'p1' stands twice"):
        frames.items_to_frame([ExperienceItem("p1", "a", "principle"), ExperienceItem("p1", "b", "principle")])


def test_orphan_steps_are_refused() -> None:
    rows, step_rows = frames.trajectories_to_frames([ONE])
    with pytest.raises(DataError, match=r"'t#0', which trajectories\.parquet does not hold"):
        frames.trajectories_from_frames(rows.clear(), step_rows)


def test_wrong_columns_are_named() -> None:
    rows, step_rows = frames.trajectories_to_frames([ONE])
    with pytest.raises(DataError, match=r"trajectories\.parquet: missing or of another type: seed, answer"):
        frames.trajectories_from_frames(rows.drop("answer").with_columns(pl.col("seed").cast(pl.String)), step_rows)


def test_values_that_do_not_fit_are_refused() -> None:
    with pytest.raises(DataError, match=r"trajectories\.parquet: a value does not fit"):
        frames.trajectories_to_frames([replace(ONE, seed=2**64)])
    with pytest.raises(DataError, match="item p1: lift is nan"):
        frames.items_to_frame([ExperienceItem("p1", "a", "principle", evidence={"lift": float("nan")})])


def test_broken_mapping_text_is_named() -> None:
    frame = frames.items_to_frame([ExperienceItem("p1", "a", "principle")])
    for broken in ("{", "[]", None):
        with pytest.raises(DataError, match=r"items\.parquet: not "):
            frames.items_from_frame(frame.with_columns(pl.lit(broken, pl.String).alias("condition")))


@pytest.mark.parametrize("record", [{"id": "x"}, {**frames.trajectory_to_dict(ONE), "rollout": "first"}])
def test_a_malformed_journal_record_is_named(record: dict[str, object]) -> None:
    with pytest.raises(DataError, match="not a trajectory"):
        frames.trajectory_from_dict(record)
