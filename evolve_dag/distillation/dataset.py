"""Rows that training reads, their batches, and their files.

A contexts folder holds

    rows.parquet          one row per trajectory: token ids of the clean trajectory and its action spans
    contexts.parquet      one row per kept step: span, selected item ids, injected text, tokens the teacher read
    teacher.safetensors   the teacher's log-probabilities, all trajectories behind each other, with row offsets
    contexts.json         sizes and the kind of teacher, checked on load
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from evolve_dag.distillation.alignment import Aligned, StudentRow, TeacherView
from evolve_dag.distillation.teacher import TeacherTargets
from evolve_dag.errors import AlignmentError, StoreError
from evolve_dag.store.layout import CONTEXTS

if TYPE_CHECKING:
    import polars as pl

FORMAT = 1


@dataclass(frozen=True, slots=True)
class StepView:
    """What the teacher had in its context at one step."""

    step: int
    selected: tuple[str, ...]
    """Ids of the experience items."""
    injected: str
    """Text that was added to the clean history."""
    teacher_tokens: int
    """Tokens of the teacher's context."""


@dataclass(frozen=True, slots=True)
class DistillationRow:
    """One trajectory to learn from."""

    row: StudentRow
    """The student's view: the clean trajectory."""
    contexts: tuple[StepView, ...]
    """The teacher's side, one per kept step, same order as ``row.steps``."""
    teacher: TeacherTargets | None
    """Its distribution on the N action tokens of ``row``; None when only the sampled ids are learned from."""
    retention: bool = False
    """The student reads the experience too (:func:`retention_rows`); ``row`` is then the teacher's view of one step."""

    def __post_init__(self) -> None:
        where = f"trajectory {self.row.trajectory_id}"
        spans = self.row.spans
        if not len(spans) == len(self.row.steps) == len(self.contexts):
            raise AlignmentError(
                f"{where}: {len(spans)} spans, {len(self.row.steps)} steps and {len(self.contexts)} contexts",
                "they are made together: materialize contexts again",
            )
        end = 1  # a token needs one before it that predicts it
        for step, context, (start, stop) in zip(self.row.steps, self.contexts, spans, strict=True):
            if context.step != step or start < end or stop <= start or stop > len(self.row.ids):
                raise AlignmentError(
                    f"{where}, step {step}: span [{start}, {stop}) does not fit a row of {len(self.row.ids)} tokens",
                    "materialize contexts again",
                )
            end = stop
        if self.teacher is not None and len(self.teacher) != self.action_tokens:
            raise AlignmentError(
                f"{where}: {len(self.teacher)} teacher distributions for {self.action_tokens} action tokens",
                "score the same rows that are trained on",
            )

    @property
    def action_tokens(self) -> int:
        """N: tokens that the loss is on."""
        return sum(end - start for start, end in self.row.spans)

    @property
    def tokens(self) -> int:
        """Tokens of the student's row."""
        return len(self.row.ids)

    @property
    def trajectory(self) -> str:
        """Id of the trajectory that the row is of."""
        return self.row.trajectory_id.rpartition("@")[0] if self.retention else self.row.trajectory_id


def make_rows(aligned: Sequence[Aligned], targets: Sequence[TeacherTargets] | None) -> list[DistillationRow]:
    """Join alignment and teacher scores; ``targets`` is None for cross-entropy on the sampled ids."""
    if targets is not None and len(targets) != len(aligned):
        raise AlignmentError(
            f"{len(targets)} teacher scores for {len(aligned)} trajectories", "score the aligned trees, in order"
        )
    teachers: Sequence[TeacherTargets | None] = [None] * len(aligned) if targets is None else targets
    return [
        DistillationRow(one.row, tuple(_context(view) for view in one.views), teacher)
        for one, teacher in zip(aligned, teachers, strict=True)
    ]


def retention_rows(
    rows: Sequence[DistillationRow], aligned: Sequence[Aligned], share: float, seed: int
) -> list[DistillationRow]:
    """Teacher's views as rows of their own: the student reads the experience and learns what the teacher did with it.

    The clean rows move the weights where no experience stands in the context; nothing holds them where it does, and after
    a few iterations a small policy cannot read it any more. These rows hold them.

    Args:
        rows: what :func:`make_rows` made of ``aligned``.
        share: of the steps that had an item, how many; the choice follows from ``seed`` and the step alone.
    """
    found: list[DistillationRow] = []
    for one, pair in zip(rows, aligned, strict=True):
        first = 0
        for view, context, (start, end) in zip(pair.views, one.contexts, one.row.spans, strict=True):
            part = slice(first, first + end - start)
            first = part.stop
            name = f"{view.trajectory_id}@{view.step}"
            if not view.injected or random.Random(f"retention:{seed}:{name}").random() >= share:
                continue
            row = StudentRow(name, view.ids, (view.step,), ((view.start, len(view.ids)),))
            teacher = None if one.teacher is None else one.teacher[part]
            found.append(DistillationRow(row, (context,), teacher, retention=True))
    return found


def sharpened(rows: Sequence[DistillationRow], temperature: float) -> list[DistillationRow]:
    """``rows``, clean or retention rows, whose teacher is surer of what it prefers where it read experience.

    Every night's student is the next night's teacher. A teacher at temperature 1 hands on its own noise, so a lesson that is
    handed on loses a little every time; below 1, it comes back to what the teacher prefers.

    Args:
        temperature: of the teacher (:meth:`TeacherTargets.sharpened`); 1 is the loss of the paper.
    """
    return list(rows) if temperature == 1.0 else [_sharpened(row, temperature) for row in rows]


def _sharpened(row: DistillationRow, temperature: float) -> DistillationRow:
    if row.teacher is None:
        return row
    read = [bool(context.injected) for context in row.contexts]
    tokens = np.repeat(read, [end - start for start, end in row.row.spans])
    return replace(row, teacher=row.teacher.sharpened(temperature, tokens))


def _context(view: TeacherView) -> StepView:
    return StepView(view.step, view.selected, view.injected, view.start)


def batches(rows: Sequence[DistillationRow], tokens_per_batch: int, seed: int, epoch: int = 0) -> list[list[int]]:
    """Indices of the rows of each optimizer step, in a seeded order; every index exactly once.

    The rows of a trajectory stay together, and rollouts of one task are neighbours: they begin alike, and what they begin with
    is computed once. So a step holds clean and retention rows as they belong together.

    Args:
        tokens_per_batch: most tokens of a step, shared ones counted in every row; one trajectory alone may have more.
        seed, epoch: the order follows from both, on every machine.
    """
    order = random.Random(f"batches:{seed}:{epoch}")
    trajectories: dict[str, list[int]] = {}
    for index, row in enumerate(rows):
        trajectories.setdefault(row.trajectory, []).append(index)
    tasks: dict[str, list[list[int]]] = {}
    for name, own in trajectories.items():
        tasks.setdefault(name.rpartition("#")[0], []).append(own)
    groups = list(tasks.values())
    order.shuffle(groups)
    found: list[list[int]] = []
    filled = 0
    for group in groups:
        order.shuffle(group)
        for own in group:
            size = sum(rows[index].tokens for index in own)
            if not found or filled + size > tokens_per_batch:
                found.append([])
                filled = 0
            found[-1].extend(own)
            filled += size
    order.shuffle(found)
    return found


def save_contexts(folder: Path, rows: Sequence[DistillationRow]) -> None:
    """Write ``rows`` into ``folder`` (made when missing).

    Raises:
        StoreError: the files cannot be written (disk full, no permission).
        AlignmentError: the rows' teachers are of different kinds or widths.
    """
    import polars as pl
    from safetensors.numpy import save_file

    kind, width = _teacher_shape(rows)
    names = [one.row.trajectory_id for one in rows]
    if len(set(names)) != len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise AlignmentError(f"trajectories stated twice: {', '.join(twice[:5])}", "ids are unique in an artifact")
    spans = [one.row.spans for one in rows]
    rows_frame = pl.DataFrame(
        {
            "trajectory_id": names,
            "ids": [list(one.row.ids) for one in rows],
            "starts": [[start for start, _ in row] for row in spans],
            "ends": [[end for _, end in row] for row in spans],
        },
        schema=_rows_schema(),
    )
    flat = [(one, context, span) for one in rows for context, span in zip(one.contexts, one.row.spans, strict=True)]
    contexts_frame = pl.DataFrame(
        {
            "trajectory_id": [one.row.trajectory_id for one, _, _ in flat],
            "step": [context.step for _, context, _ in flat],
            "start": [start for _, _, (start, _) in flat],
            "end": [end for _, _, (_, end) in flat],
            "selected": [list(context.selected) for _, context, _ in flat],
            "injected": [context.injected for _, context, _ in flat],
            "teacher_tokens": [context.teacher_tokens for _, context, _ in flat],
        },
        schema=_contexts_schema(),
    )
    facts = {
        "format": FORMAT,
        "rows": len(rows),
        "steps": len(flat),
        "action_tokens": sum(one.action_tokens for one in rows),
        "teacher": kind,
        "width": width,
        "retention": any(one.retention for one in rows),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        rows_frame.write_parquet(folder / "rows.parquet")
        contexts_frame.write_parquet(folder / CONTEXTS)
        if kind != "none":
            save_file(_teacher_arrays(rows), str(folder / "teacher.safetensors"))
        (folder / "contexts.json").write_text(json.dumps(facts, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    except Exception as error:  # polars and safetensors have error types of their own for a full disk
        raise StoreError(f"{folder}: contexts cannot be written: {error}", "free disk space, or use another store") from error


def save_parts(folder: Path, rows: Sequence[DistillationRow]) -> list[Path]:
    """Any ``rows`` in as many contexts folders below ``folder`` as it takes; read one after the other they are the same rows.

    Raises:
        StoreError: the files cannot be written.
    """
    parts = _parts(rows)
    folders = [folder / f"part-{index:03d}" for index in range(len(parts))]
    for place, part in zip(folders, parts, strict=True):
        save_contexts(place, part)
    return folders


def _parts(rows: Sequence[DistillationRow]) -> list[list[DistillationRow]]:
    """``rows`` in their order, in parts that can be saved: of one kind, no name twice (a drill may have a retention row's)."""
    parts: list[list[DistillationRow]] = []
    names: set[str] = set()
    for row in rows:
        if not parts or row.retention != parts[-1][-1].retention or row.row.trajectory_id in names:
            parts.append([])
            names = set()
        parts[-1].append(row)
        names.add(row.row.trajectory_id)
    return parts


def load_contexts(folder: Path) -> list[DistillationRow]:
    """Read what :func:`save_contexts` wrote, in the same order.

    Raises:
        StoreError: a file is missing, corrupt or does not fit the others.
        AlignmentError: spans, steps and teacher rows of a trajectory do not fit each other.
    """
    import polars as pl

    facts = _read(folder, "contexts.json", lambda path: json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(facts, dict) or facts.get("format") != FORMAT:
        raise StoreError(f"{folder / 'contexts.json'}: not a contexts folder of format {FORMAT}", _AGAIN)
    table = partial(pl.read_parquet, glob=False)  # the store's folder may be called run[1]
    rows, contexts = _read(folder, "rows.parquet", table), _read(folder, CONTEXTS, table)
    _check_schema(folder / "rows.parquet", rows, _rows_schema())
    _check_schema(folder / CONTEXTS, contexts, _contexts_schema())
    if facts.get("rows") != rows.height or facts.get("steps") != contexts.height:
        raise StoreError(
            f"{folder}: contexts.json counts {facts.get('rows')} rows and {facts.get('steps')} steps, "
            f"the files hold {rows.height} and {contexts.height}",
            _AGAIN,
        )
    steps: dict[str, list[dict[str, Any]]] = {}
    for record in contexts.iter_rows(named=True):
        steps.setdefault(record["trajectory_id"], []).append(record)
    teachers = _load_teacher(folder, str(facts.get("teacher")), rows.height)
    loaded = []
    for index, record in enumerate(rows.iter_rows(named=True)):
        own = steps.get(record["trajectory_id"], [])
        if len(record["starts"]) != len(record["ends"]) or any(token < 0 for token in record["ids"]):
            raise StoreError(f"{folder / 'rows.parquet'}: row {index} is not well formed", _AGAIN)
        row = StudentRow(
            record["trajectory_id"],
            tuple(record["ids"]),
            tuple(one["step"] for one in own),
            tuple(zip(record["starts"], record["ends"], strict=True)),
        )
        selected = tuple(StepView(one["step"], tuple(one["selected"]), one["injected"], one["teacher_tokens"]) for one in own)
        loaded.append(DistillationRow(row, selected, teachers[index], bool(facts.get("retention"))))
    return loaded


_AGAIN = "the folder was changed or cut off: delete the artifact and materialize contexts again"


def _teacher_shape(rows: Sequence[DistillationRow]) -> tuple[str, int]:
    """``(none | top_k | full, width)`` that all rows share."""
    shapes = {("none", 0) if one.teacher is None else (one.teacher.kind, int(one.teacher.logprobs.shape[1])) for one in rows}
    if len(shapes) > 1:
        raise AlignmentError(f"rows with different kinds of teacher: {sorted(shapes)}", "score all rows with one top_k")
    return shapes.pop() if shapes else ("none", 0)


def _teacher_arrays(rows: Sequence[DistillationRow]) -> dict[str, np.ndarray]:
    teachers = [one.teacher for one in rows if one.teacher is not None]
    arrays: dict[str, np.ndarray] = {
        "offsets": np.cumsum([0, *(len(teacher) for teacher in teachers)], dtype=np.int64),
        "logprobs": np.concatenate([teacher.logprobs for teacher in teachers]).astype(np.float32),
    }
    ids = [teacher.ids for teacher in teachers if teacher.ids is not None]
    tails = [teacher.tail for teacher in teachers if teacher.tail is not None]
    if ids:
        arrays["ids"] = np.concatenate(ids).astype(np.int32)
        arrays["tail"] = np.concatenate(tails).astype(np.float32)
    return arrays


def _load_teacher(folder: Path, kind: str, count: int) -> list[TeacherTargets | None]:
    if kind == "none":
        return [None] * count
    from safetensors.numpy import load_file

    path = folder / "teacher.safetensors"
    arrays = _read(folder, path.name, lambda found: load_file(str(found)))
    needed = {"offsets", "logprobs", *(("ids", "tail") if kind == "top_k" else ())}
    missing = needed - set(arrays)
    if missing:
        raise StoreError(f"{path}: lacks {', '.join(sorted(missing))}", _AGAIN)
    offsets, logprobs = arrays["offsets"], arrays["logprobs"]
    n = logprobs.shape[0]
    if offsets.shape != (count + 1,) or offsets[0] != 0 or offsets[-1] != n or (np.diff(offsets) < 0).any():
        raise StoreError(f"{path}: its offsets do not divide {n} action tokens among {count} rows", _AGAIN)
    if kind == "top_k" and (arrays["ids"].shape != logprobs.shape or arrays["tail"].shape != (n,)):
        raise StoreError(f"{path}: ids, tail and log-probabilities have different shapes", _AGAIN)
    if np.isnan(logprobs).any() or (logprobs > 1e-3).any():
        raise StoreError(f"{path}: holds numbers that are no log-probabilities", _AGAIN)
    parts = [slice(int(a), int(b)) for a, b in pairwise(offsets)]
    if kind == "full":
        return [TeacherTargets(logprobs[part]) for part in parts]
    return [TeacherTargets(logprobs[part], arrays["ids"][part], arrays["tail"][part]) for part in parts]


def _rows_schema() -> dict[str, pl.DataType]:
    import polars as pl

    numbers = pl.List(pl.Int32())
    return {"trajectory_id": pl.String(), "ids": numbers, "starts": numbers, "ends": numbers}


def _contexts_schema() -> dict[str, pl.DataType]:
    import polars as pl

    return {
        "trajectory_id": pl.String(),
        "step": pl.Int32(),
        "start": pl.Int32(),
        "end": pl.Int32(),
        "selected": pl.List(pl.String()),
        "injected": pl.String(),
        "teacher_tokens": pl.Int32(),
    }


def _check_schema(path: Path, frame: pl.DataFrame, schema: dict[str, pl.DataType]) -> None:
    if dict(frame.schema) != schema:
        raise StoreError(f"{path}: columns {dict(frame.schema)}, expected {schema}", _AGAIN)
    empty = [name for name in frame.columns if frame[name].null_count()]
    if empty:
        raise StoreError(f"{path}: empty cells in {', '.join(empty)}", _AGAIN)


def _read(folder: Path, name: str, reader: Any) -> Any:
    path = folder / name
    if not path.is_file():
        raise StoreError(f"{path}: no such file", _AGAIN)
    try:
        return reader(path)
    except Exception as error:  # each reader has its own family; to the caller the file is simply corrupt
        raise StoreError(f"{path}: cannot be read: {error}", _AGAIN) from error
