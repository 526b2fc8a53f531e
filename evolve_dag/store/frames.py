"""Records <-> Polars frames for Parquet, and <-> JSON dicts for journals; both ways lose nothing.

Mappings (metadata, condition, evidence, arguments of a call) are JSON text in a frame, so that any key fits
one column and SQL reads them with ``column->>'$.key'``. Text that is not Unicode (a lone surrogate that a model wrote
as ``\\ud83d``) cannot be stored in Parquet: such a character becomes U+FFFD. Log-probabilities are 32-bit floats,
as models compute them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from evolve_dag.errors import DataError
from evolve_dag.records import Call, ExperienceItem, PoolEdit, Score, Step, ToolCall, Trajectory

if TYPE_CHECKING:
    import polars as pl

    from evolve_dag.store.artifacts import Artifact

TRAJECTORIES = "trajectories.parquet"
STEPS = "steps.parquet"
ITEMS = "items.parquet"
EDITS = "edits.parquet"
SCORES = "scores.parquet"
CALLS = "calls.parquet"


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
    return _frame([asdict(call) for call in calls], CALLS)


# -- trajectories


def trajectories_to_frames(trajectories: Sequence[Trajectory]) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Trajectories as two frames, ``trajectories.parquet`` and ``steps.parquet``.

    Raises:
        DataError: two trajectories share an id, or a value does not fit its column.
    """
    _refuse_repeats([t.id for t in trajectories], "trajectories")
    rows = [
        {
            "id": t.id,
            "task_id": t.task_id,
            "rollout": t.rollout,
            "seed": t.seed,
            "system": t.system,
            "question": t.question,
            "status": t.status,
            "answer": t.answer,
            "reward": t.reward,
            "error": t.error,
            "seconds": t.seconds,
            "turns": t.turns,
            "tokens": sum(len(step.token_ids) for step in t.steps),
        }
        for t in trajectories
    ]
    steps = [
        {
            "trajectory_id": t.id,
            "index": step.index,
            "text": step.text,
            "token_ids": list(step.token_ids),
            "logprobs": list(step.logprobs),
            "tool": None if step.call is None else step.call.name,
            "arguments": None if step.call is None else _mapping_to_text(step.call.arguments, f"{t.id} step {step.index}"),
            "answer": step.answer,
            "observation": step.observation,
            "problem": step.problem,
            "selected": list(step.selected),
            "injected": step.injected,
            "rationale": step.rationale,
            "prompt_tokens": step.prompt_tokens,
            "seconds": step.seconds,
        }
        for t in trajectories
        for step in t.steps
    ]
    return _frame(rows, TRAJECTORIES), _frame(steps, STEPS)


def trajectories_from_frames(trajectories: pl.DataFrame, steps: pl.DataFrame) -> list[Trajectory]:
    """The trajectories of two frames, in the order of the first; further columns are ignored.

    Raises:
        DataError: a column is missing or of another type, an id stands twice, or a step belongs to no
            trajectory.
    """
    rows = _rows(trajectories, TRAJECTORIES)
    _refuse_repeats([row["id"] for row in rows], TRAJECTORIES)
    of: dict[str, list[Step]] = {row["id"]: [] for row in rows}
    for row in _rows(steps, STEPS):
        if row["trajectory_id"] not in of:
            raise DataError(
                f"{STEPS}: a step of {row['trajectory_id']!r}, which {TRAJECTORIES} does not hold", "filter both frames alike"
            )
        call = None if row["tool"] is None else ToolCall(row["tool"], _mapping_from_text(row["arguments"], STEPS))
        of[row["trajectory_id"]].append(
            Step(
                index=row["index"],
                text=row["text"],
                token_ids=tuple(row["token_ids"]),
                logprobs=tuple(row["logprobs"]),
                call=call,
                answer=row["answer"],
                observation=row["observation"],
                problem=row["problem"],
                selected=tuple(row["selected"]),
                injected=row["injected"],
                rationale=row["rationale"],
                prompt_tokens=row["prompt_tokens"],
                seconds=row["seconds"],
            )
        )
    return [
        Trajectory(
            id=row["id"],
            task_id=row["task_id"],
            rollout=row["rollout"],
            seed=row["seed"],
            system=row["system"],
            question=row["question"],
            steps=tuple(sorted(of[row["id"]], key=lambda step: step.index)),
            status=row["status"],
            answer=row["answer"],
            reward=row["reward"],
            error=row["error"],
            seconds=row["seconds"],
        )
        for row in rows
    ]


def trajectory_to_dict(trajectory: Trajectory) -> dict[str, Any]:
    """One trajectory as JSON values, for a journal."""
    fields = {name: getattr(trajectory, name) for name in Trajectory.__dataclass_fields__}
    fields["steps"] = [_step_to_dict(step) for step in trajectory.steps]
    return fields


def trajectory_from_dict(record: Mapping[str, Any]) -> Trajectory:
    """The trajectory of :func:`trajectory_to_dict`, also after a trip through JSON.

    Raises:
        DataError: a field is missing or unknown.
    """
    try:
        return Trajectory(**{**record, "steps": tuple(_step_from_dict(step) for step in record["steps"])})
    except (KeyError, TypeError) as error:
        raise DataError(
            f"not a trajectory (id {record.get('id')!r}): {error}", "delete the journal and run again: its work is done again"
        ) from error


def _step_to_dict(step: Step) -> dict[str, Any]:
    fields = {name: getattr(step, name) for name in Step.__dataclass_fields__}
    for name in ("token_ids", "logprobs", "selected"):
        fields[name] = list(fields[name])
    if step.call is not None:
        fields["call"] = {"name": step.call.name, "arguments": dict(step.call.arguments)}
    return fields


def _step_from_dict(record: Mapping[str, Any]) -> Step:
    fields = dict(record)
    for name in ("token_ids", "logprobs", "selected"):
        fields[name] = tuple(fields[name])
    if fields["call"] is not None:
        fields["call"] = ToolCall(fields["call"]["name"], fields["call"]["arguments"])
    return Step(**fields)


# -- experience


def items_to_frame(items: Sequence[ExperienceItem]) -> pl.DataFrame:
    """A pool's items as ``items.parquet``, in their order.

    Raises:
        DataError: two items share an id, or evidence is not finite.
    """
    _refuse_repeats([item.id for item in items], "experience items")
    return _frame([item_to_dict(item, mappings_as_text=True) for item in items], ITEMS)


def items_from_frame(frame: pl.DataFrame) -> list[ExperienceItem]:
    """The items of ``items.parquet``, in its order; further columns are ignored.

    Raises:
        DataError: a column is missing or of another type, or an id stands twice.
    """
    rows = _rows(frame, ITEMS)
    _refuse_repeats([row["id"] for row in rows], ITEMS)
    return [
        item_from_dict(
            {
                **row,
                "condition": _mapping_from_text(row["condition"], ITEMS),
                "evidence": _mapping_from_text(row["evidence"], ITEMS),
            }
        )
        for row in rows
    ]


def item_to_dict(item: ExperienceItem, *, mappings_as_text: bool = False) -> dict[str, Any]:
    """One item as JSON values."""
    fields = {name: getattr(item, name) for name in ExperienceItem.__dataclass_fields__}
    fields["trajectory_ids"] = list(item.trajectory_ids)
    for name in ("condition", "evidence"):
        fields[name] = _mapping_to_text(fields[name], f"item {item.id}") if mappings_as_text else dict(fields[name])
    return fields


def item_from_dict(record: Mapping[str, Any]) -> ExperienceItem:
    """The item of :func:`item_to_dict`.

    Raises:
        DataError: a field is missing or unknown.
    """
    try:
        return ExperienceItem(**{**record, "trajectory_ids": tuple(record["trajectory_ids"])})
    except (KeyError, TypeError) as error:
        raise DataError(f"not an experience item (id {record.get('id')!r}): {error}", "mend or remove that item") from error


def edits_to_frame(edits: Sequence[PoolEdit]) -> pl.DataFrame:
    """Pool edits as ``edits.parquet``, in their order."""
    return _frame([edit_to_dict(edit) for edit in edits], EDITS)


def edits_from_frame(frame: pl.DataFrame) -> list[PoolEdit]:
    """The edits of ``edits.parquet``, in its order; further columns are ignored.

    Raises:
        DataError: a column is missing or of another type.
    """
    return [edit_from_dict(row) for row in _rows(frame, EDITS)]


def edit_to_dict(edit: PoolEdit) -> dict[str, Any]:
    """One edit as JSON values."""
    fields = {name: getattr(edit, name) for name in PoolEdit.__dataclass_fields__}
    return {**fields, "trajectory_ids": list(edit.trajectory_ids)}


def edit_from_dict(record: Mapping[str, Any]) -> PoolEdit:
    """The edit of :func:`edit_to_dict`.

    Raises:
        DataError: a field is missing or unknown.
    """
    try:
        return PoolEdit(**{**record, "trajectory_ids": tuple(record["trajectory_ids"])})
    except (KeyError, TypeError) as error:
        raise DataError(f"not a pool edit (item {record.get('item_id')!r}): {error}", "mend or remove that edit") from error


# -- scores


def scores_to_frame(scores: Sequence[Score]) -> pl.DataFrame:
    """Scores as ``scores.parquet``, in their order.

    Raises:
        DataError: a task, rollout and condition stand twice.
    """
    _refuse_repeats([f"{s.task_id}#{s.rollout} ({s.condition})" for s in scores], "scores")
    rows = []
    for score in scores:
        fields = {name: getattr(score, name) for name in Score.__dataclass_fields__}
        rows.append({**fields, "metadata": _mapping_to_text(score.metadata, f"score {score.task_id}#{score.rollout}")})
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
    if value is None or value.isascii():
        return value
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _mapping_to_text(mapping: Mapping[str, Any], where: str) -> str:
    for key, value in mapping.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise DataError(f"{where}: {key} is {value}", "leave out what could not be measured")
    return json.dumps(dict(mapping), ensure_ascii=False)


def _mapping_from_text(text: str, where: str) -> dict[str, Any]:
    try:
        mapping = json.loads(text)
    except (ValueError, TypeError) as error:
        raise DataError(f"{where}: not JSON text: {text!r}", "delete the artifact's folder and run again") from error
    if not isinstance(mapping, dict):
        raise DataError(f"{where}: not a JSON object: {text!r}", "delete the artifact's folder and run again")
    return mapping


def save_trajectories(folder: Path, trajectories: Sequence[Trajectory], prefix: str = "") -> None:
    """``trajectories.parquet`` and ``steps.parquet``."""
    frame, steps = trajectories_to_frames(trajectories)
    frame.write_parquet(folder / f"{prefix}trajectories.parquet")
    steps.write_parquet(folder / f"{prefix}steps.parquet")


def load_trajectories(artifact: Artifact) -> list[Trajectory]:
    """What :func:`save_trajectories` wrote."""
    return trajectories_from_frames(artifact.frame("trajectories.parquet"), artifact.frame("steps.parquet"))
