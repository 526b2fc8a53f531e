"""Metadata of a materialization: where it lies, what it cost, its numbers, its links, and a look at its rows."""

from collections.abc import Iterator, Mapping
from math import isfinite
from typing import Any

import dagster as dg
import polars as pl
from evolve_dag.assets import columns, links, partitions
from evolve_dag.assets.picture import success_curve

from evolve_dag.errors import EvolveError
from evolve_dag.evaluation.gate import gate_from_json
from evolve_dag.evaluation.metrics import Metrics, metrics_from_json
from evolve_dag.reporting.summary import summarize
from evolve_dag.steps import base
from evolve_dag.store.artifacts import Artifact, Store
from evolve_dag.store.layout import DECISION, SUMMARY

CELL = 80
"""Characters of one cell."""

PLOTTED = ("success", "premature", "unanswered", "turns")
"""Metrics that become numbers of their own; those of development tasks are the promotion's evidence."""
CONDITIONS = ("base", "without", "with", "greedy", "ceiling")
"""Their order in the table of results; those of development tasks follow."""


def metadata(artifact: Artifact, store: Store, experiment: str, iteration: int) -> dict[str, Any]:
    """Metadata of a step's materialization; the keys are the same in every iteration, so Dagster can plot the numbers."""
    hidden = base.SPECS[artifact.kind].hidden
    return {
        **_picture(artifact, store, experiment, iteration),
        **links.hand_over(artifact, store, experiment, iteration),
        **_decision(artifact),
        **_results(artifact),
        **_tables(artifact),
        **dict(_numbers({key: value for key, value in artifact.summary.items() if key not in hidden})),
        "seconds": round(artifact.manifest.seconds, 2),
        **links.upstream(artifact, str(partitions.loop_key(experiment, iteration))),
        **links.mlflow(store.root, experiment, iteration, artifact),
        **links.report(store.root, experiment),
        "digest": artifact.digest,
        "path": dg.MetadataValue.path(artifact.path.resolve()),
    }


def _tables(artifact: Artifact) -> dict[str, Any]:
    """A look at every table of note, and the schema and the length of the main one."""
    found: dict[str, Any] = {}
    for number, one in enumerate(base.SPECS[artifact.kind].tables):
        if one.file not in artifact.manifest.files:
            continue
        frame = artifact.frame(one.file)
        schema = columns.schema(one.file, frame)
        name = "preview" if number == 0 else one.file.removesuffix(".parquet")
        if frame.height:
            shown = [column for column in one.columns if column in frame.columns]
            found[name] = table(one.file, _some(frame, one.rows).select(shown))
        if number == 0:
            found |= {"dagster/column_schema": schema, "dagster/row_count": frame.height}
    return found


def table(file: str, frame: pl.DataFrame) -> dg.TableMetadataValue:
    """A small table as Dagster shows it, its columns described."""
    records = [dg.TableRecord({name: _cell(value) for name, value in row.items()}) for row in frame.iter_rows(named=True)]
    return dg.MetadataValue.table(records, columns.schema(file, frame))


def _some(frame: pl.DataFrame, rows: int) -> pl.DataFrame:
    """``rows`` rows from all over the table; of contexts rather those in which something was injected."""
    if "injected" in frame.columns:
        injected = frame.filter(pl.col("injected") != "")
        frame = injected if injected.height else frame
    if frame.height <= rows:
        return frame
    return frame[[number * (frame.height - 1) // (rows - 1) for number in range(rows)]]


def _cell(value: object) -> str | int | float | bool:
    if isinstance(value, bool | int):
        return value
    if isinstance(value, float) and isfinite(value):  # what is not is no JSON, and the page would not read the table
        return _round(value)
    text = ", ".join(map(str, value)) if isinstance(value, list) else "" if value is None else str(value)
    text = " ".join(text.split())
    return text if len(text) <= CELL else text[: CELL - 1] + "…"


def _decision(artifact: Artifact) -> dict[str, Any]:
    """The gate's reasons as sentences and its evidence as numbers."""
    if DECISION not in artifact.manifest.files:
        return {}
    gate = gate_from_json(artifact.json(DECISION))
    reasons = "\n".join(f"- {reason}" for reason in gate.reasons)
    return {"reasons": dg.MetadataValue.md(reasons)} | {k: _round(v) for k, v in gate.evidence.items() if v is not None}


def _results(artifact: Artifact) -> dict[str, Any]:
    """Results of every condition: a table to read, and numbers to plot (``success_without``, ``success_without_low``, ...)."""
    if SUMMARY not in artifact.manifest.files:
        return {}
    measured = {name: metrics_from_json(content) for name, content in artifact.json(SUMMARY).items()}
    found: dict[str, Any] = {}
    for condition, metrics in measured.items():
        if condition.startswith("development"):
            continue
        for name in PLOTTED:
            value = getattr(metrics, name)
            if value is not None:
                found[f"{name}_{condition}"] = _round(value)
        for end, bound in zip(("low", "high"), metrics.intervals.get("success") or (), strict=False):
            found[f"success_{condition}_{end}"] = _round(bound)
    order = sorted(measured, key=lambda name: (CONDITIONS.index(name) if name in CONDITIONS else len(CONDITIONS), name))
    rows = pl.DataFrame([{"condition": name.replace("_", " "), **_row(measured[name])} for name in order])
    return ({"results": table("", rows)} if rows.height else {}) | found


def _row(metrics: Metrics) -> dict[str, str]:
    low, high = metrics.intervals.get("success") or (None, None)
    return {
        "success": _percent(metrics.success),
        "95% interval": f"{100 * low:.1f}–{_percent(high)}" if low is not None else "",
        "premature": _percent(metrics.premature),
        "unanswered": _percent(metrics.unanswered),
        "mean turns": "" if metrics.turns is None else f"{metrics.turns:.2f}",
        "episodes": str(metrics.n),
        "judged": str(metrics.judged),
    }


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.1%}"


def _picture(artifact: Artifact, store: Store, experiment: str, iteration: int) -> dict[str, Any]:
    """The success curve up to this iteration."""
    if not {SUMMARY, DECISION} & set(artifact.manifest.files):
        return {}
    try:
        picture = success_curve([row for row in summarize(store, experiment).rows if row.iteration <= iteration])
    except EvolveError:  # another artifact of the lineage is damaged: its own step tells; this one is made
        return {}
    return {"success_curve": dg.MetadataValue.md(picture)} if picture else {}


def _numbers(summary: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Scalars of a summary, nested ones under dotted names."""
    for key, value in summary.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            yield f"{prefix}{key}", _round(value)
        elif isinstance(value, (bool, int, str)) and value != "":
            yield f"{prefix}{key}", value


def _round(value: float) -> float:
    """Four digits that count."""
    return float(f"{value:.4g}")
