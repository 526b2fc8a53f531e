"""Records <-> Polars frames for Parquet, and <-> JSON dicts for journals; both ways lose nothing.

Mappings (metadata, condition, evidence, arguments of a call, features) are JSON text in a frame, so that any key fits
one column and SQL reads them with ``column->>'$.key'``. Text that is not Unicode (a lone surrogate that a model wrote
as ``\\ud83d``) cannot be stored in Parquet: such a character becomes U+FFFD. Log-probabilities are 32-bit floats,
as models compute them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from evolve_dag.errors import DataError
from evolve_dag.plain import whole
from evolve_dag.records import Call, ExperienceItem, PoolEdit, Score, Step, ToolCall, Trajectory
from evolve_dag.store.jsonvalues import from_values, to_values
from evolve_dag.store.layout import CALLS, EDITS, ITEMS, SCORES, STEPS, TRAJECTORIES

if TYPE_CHECKING:
    import polars as pl

    from evolve_dag.store.artifacts import Artifact

_AGAIN = "delete the artifact's folder and run again"


def schemas() -> dict[str, pl.Schema]:
    """Columns of every Parquet file of records: file name -> schema."""
    import polars as pl

    text, number, names = pl.String(), pl.Int32(), pl.List(pl.String())
    return {
        TRAJECTORIES: pl.Schema(
            {
                "id": text,
                "task_id": text,
                "rollout": number,
                "seed": pl.Int64(),
                "system": text,
                "question": text,
                "status": text,
                "answer": text,
                "reward": pl.Float64(),
                "error": text,
                "seconds": pl.Float64(),
                "offers_tools": pl.Boolean(),
                "turns": number,  # these two follow from the steps; they save a join in SQL
                "tokens": pl.Int64(),
            }
        ),
        STEPS: pl.Schema(
            {
                "trajectory_id": text,
                "index": number,
                "text": text,
                "token_ids": pl.List(pl.Int32()),
                "logprobs": pl.List(pl.Float32()),
                "tool": text,
                "arguments": text,
                "answer": text,
                "observation": text,
                "problem": text,
                "selected": names,
                "injected": text,
                "rationale": text,
                "prompt_tokens": number,
                "seconds": pl.Float64(),
                "features": text,
            }
        ),
        ITEMS: pl.Schema(
            {
                "id": text,
                "text": text,
                "granularity": text,
                "condition": text,
                "evidence": text,
                "trajectory_ids": names,
                "created": number,
                "updated": number,
                "graduated": number,
                "withdrawn": number,
            }
        ),
        EDITS: pl.Schema(
            {
                "operation": text,
                "item_id": text,
                "iteration": number,
                "before": text,
                "after": text,
                "reason": text,
                "trajectory_ids": names,
                "into": text,
            }
        ),
        CALLS: pl.Schema(
            {
                "role": text,
                "model": text,
                "purpose": text,
                "outcome": text,
                "attempts": number,
                "prompt_tokens": pl.Int64(),
                "cached_tokens": pl.Int64(),
                "completion_tokens": pl.Int64(),
                "seconds": pl.Float64(),
                "cost": pl.Float64(),
                "error": text,
                "cut_characters": pl.Int64(),
            }
        ),
        SCORES: pl.Schema(
            {
                "task_id": text,
                "rollout": number,
                "condition": text,
                "reward": pl.Float64(),
                "premature": pl.Boolean(),
                "status": text,
                "turns": number,
                "tokens": number,
                "answer": text,
                "metadata": text,
            }
        ),
    }


# -- calls


def calls_to_frame(calls: Sequence[Call]) -> pl.DataFrame:
    """The ledger of a step as a frame, ``calls.parquet``."""
    return _frame([to_values(call) for call in calls], CALLS)


# -- trajectories


def trajectories_to_frames(trajectories: Sequence[Trajectory]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Trajectories as two frames, ``trajectories.parquet`` and ``steps.parquet``.

    Raises:
        DataError: two trajectories share an id, or a value does not fit its column.
    """
    _refuse_repeats([t.id for t in trajectories], "trajectories")
    rows, steps = [], []
    for t in trajectories:
        values = to_values(t)
        rows.append(values | {"turns": t.turns, "tokens": sum(len(step.token_ids) for step in t.steps)})
        for step in values["steps"]:
            call = step["call"] or {"name": None, "arguments": None}
            arguments, where = call["arguments"], f"{t.id} step {step['index']}"
            text = None if arguments is None else _mapping_to_text(arguments, where)
            features = _mapping_to_text(step["features"], where)
            steps.append(step | {"trajectory_id": t.id, "tool": call["name"], "arguments": text, "features": features})
    return _frame(rows, TRAJECTORIES), _frame(steps, STEPS)


def trajectories_from_frames(trajectories: pl.DataFrame, steps: pl.DataFrame) -> list[Trajectory]:
    """The trajectories of two frames, in the order of the first; further columns are ignored.

    Raises:
        DataError: a column is missing or of another type, an id stands twice, or a step belongs to no
            trajectory.
    """
    import polars as pl

    if "offers_tools" not in trajectories.columns:  # made before it was noted
        trajectories = trajectories.with_columns(offers_tools=True)
    rows = _rows(trajectories, TRAJECTORIES)
    _refuse_repeats([row["id"] for row in rows], TRAJECTORIES)
    of: dict[str, list[Step]] = {row["id"]: [] for row in rows}
    if "features" not in steps.columns:  # made before environments could describe what they show
        steps = steps.with_columns(features=pl.lit("{}"))
    for row in _rows(steps, STEPS):
        if row["trajectory_id"] not in of:
            raise DataError(
                f"{STEPS}: a step of {row['trajectory_id']!r}, which {TRAJECTORIES} does not hold", "filter both frames alike"
            )
        call = None if row["tool"] is None else ToolCall(row["tool"], _mapping_from_text(row["arguments"], STEPS))
        where = f"{STEPS}: step {row['index']} of {row['trajectory_id']!r}"
        features = _mapping_from_text(row["features"], STEPS)
        of[row["trajectory_id"]].append(from_values(Step, row | {"call": call, "features": features}, where, _AGAIN))
    return [
        from_values(
            Trajectory,
            row | {"steps": sorted(of[row["id"]], key=lambda step: step.index)},
            f"{TRAJECTORIES}: {row['id']!r}",
            _AGAIN,
        )
        for row in rows
    ]


def trajectory_to_dict(trajectory: Trajectory) -> dict[str, Any]:
    """One trajectory as JSON values, for a journal."""
    return to_values(trajectory)


def trajectory_from_dict(record: Mapping[str, Any]) -> Trajectory:
    """The trajectory of :func:`trajectory_to_dict`, also after a trip through JSON.

    Raises:
        DataError: a field is missing or of another type.
    """
    what = f"not a trajectory (id {record.get('id')!r})"
    return from_values(Trajectory, record, what, "delete the journal and run again: its work is done again")


# -- experience


def items_to_frame(items: Sequence[ExperienceItem]) -> pl.DataFrame:
    """A pool's items as ``items.parquet``, in their order.

    Raises:
        DataError: two items share an id, or evidence is not finite.
    """
    _refuse_repeats([item.id for item in items], "experience items")
    rows = [
        to_values(item) | {name: _mapping_to_text(getattr(item, name), f"item {item.id}") for name in ("condition", "evidence")}
        for item in items
    ]
    return _frame(rows, ITEMS)


def items_from_frame(frame: pl.DataFrame) -> list[ExperienceItem]:
    """The items of ``items.parquet``, in its order; further columns are ignored.

    Raises:
        DataError: a column is missing or of another type, or an id stands twice.
    """
    import polars as pl

    if "withdrawn" not in frame.columns:  # made before the teacher was checked
        frame = frame.with_columns(withdrawn=pl.lit(0, pl.Int32()))
    rows = _rows(frame, ITEMS)
    _refuse_repeats([row["id"] for row in rows], ITEMS)
    mappings = ("condition", "evidence")
    rows = [row | {name: _mapping_from_text(row[name], ITEMS) for name in mappings} for row in rows]
    return [from_values(ExperienceItem, row, f"{ITEMS}: item {row['id']!r}", _AGAIN) for row in rows]


def edits_to_frame(edits: Sequence[PoolEdit]) -> pl.DataFrame:
    """Pool edits as ``edits.parquet``, in their order."""
    return _frame([to_values(edit) for edit in edits], EDITS)


def edits_from_frame(frame: pl.DataFrame) -> list[PoolEdit]:
    """The edits of ``edits.parquet``, in its order; further columns are ignored.

    Raises:
        DataError: a column is missing or of another type.
    """
    return [from_values(PoolEdit, row, f"{EDITS}: item {row['item_id']!r}", _AGAIN) for row in _rows(frame, EDITS)]


# -- scores


def scores_to_frame(scores: Sequence[Score]) -> pl.DataFrame:
    """Scores as ``scores.parquet``, in their order.

    Raises:
        DataError: a task, rollout and condition stand twice.
    """
    _refuse_repeats([f"{s.task_id}#{s.rollout} ({s.condition})" for s in scores], "scores")
    rows = [to_values(s) | {"metadata": _mapping_to_text(s.metadata, f"score {s.task_id}#{s.rollout}")} for s in scores]
    return _frame(rows, SCORES)


def scores_from_frame(frame: pl.DataFrame) -> list[Score]:
    """The scores of ``scores.parquet``, in its order; further columns are ignored.

    Raises:
        DataError: a column is missing or of another type.
    """
    return [Score(**{**row, "metadata": _mapping_from_text(row["metadata"], SCORES)}) for row in _rows(frame, SCORES)]


# -- inside


def _frame(rows: list[dict[str, Any]], name: str) -> pl.DataFrame:
    import polars as pl

    schema = schemas()[name]
    columns = {column: [row[column] for row in rows] for column in schema}
    for column, kind in schema.items():
        if kind == pl.String():
            columns[column] = [_unicode(value) for value in columns[column]]
        elif kind == pl.List(pl.String()):
            columns[column] = [[_unicode(value) for value in values] for values in columns[column]]
    try:
        return pl.DataFrame(columns, schema=schema, strict=True)
    except (pl.exceptions.PolarsError, TypeError, OverflowError) as error:
        raise DataError(f"{name}: a value does not fit its column: {error}", "the record that holds it is malformed") from error


def _rows(frame: pl.DataFrame, name: str) -> Iterable[dict[str, Any]]:
    schema = schemas()[name]
    wrong = [column for column, kind in schema.items() if frame.schema.get(column) != kind]
    if wrong:
        raise DataError(
            f"{name}: missing or of another type: {', '.join(wrong)}",
            "it was written by another version: delete the artifact's folder and run again",
        )
    return cast("Iterable[dict[str, Any]]", frame.select(schema.names()).to_dicts())


def _refuse_repeats(ids: Sequence[str], where: str) -> None:
    seen: set[str] = set()
    for one in ids:
        if one in seen:
            raise DataError(f"{where}: {one!r} stands twice", "every id must be unique in its frame")
        seen.add(one)


def _unicode(value: str | None) -> str | None:
    return None if value is None else whole(value)


def _mapping_to_text(mapping: Mapping[str, Any], where: str) -> str:
    for key, value in mapping.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{where}: {key} is {value}", "leave out what could not be measured")
    return json.dumps(dict(mapping), ensure_ascii=False)


def _mapping_from_text(text: str, where: str) -> dict[str, Any]:
    try:
        mapping = json.loads(text)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: not JSON text: {text!r}", _AGAIN) from error
    if not isinstance(mapping, dict):
        raise DataError(f"{where}: not a JSON object: {text!r}", _AGAIN)
    return mapping


def save_trajectories(folder: Path, trajectories: Sequence[Trajectory], prefix: str = "") -> None:
    """``trajectories.parquet`` and ``steps.parquet``."""
    frame, steps = trajectories_to_frames(trajectories)
    frame.write_parquet(folder / f"{prefix}trajectories.parquet")
    steps.write_parquet(folder / f"{prefix}steps.parquet")


def load_trajectories(artifact: Artifact) -> list[Trajectory]:
    """What :func:`save_trajectories` wrote."""
    return trajectories_from_frames(artifact.frame(TRAJECTORIES), artifact.frame(STEPS))
