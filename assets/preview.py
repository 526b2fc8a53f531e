"""Metadata of a materialization: where it lies, what it cost, its numbers, and a look at its rows."""

from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg

from evolve_dag.steps.base import StepOutcome
from evolve_dag.store import Artifact

ROWS = 8
COLUMNS = 6
CELL = 80
"""Characters of one cell."""

TABLES: Mapping[str, tuple[str, ...]] = {
    "trajectories": ("trajectories.parquet",),
    "experience": ("items.parquet",),
    "contexts": ("contexts.parquet",),
    "adapter": ("curve.parquet",),
    "scores": ("scores.parquet",),
}
"""File to look at, where an artifact has several; otherwise its first table."""


def metadata(outcome: StepOutcome) -> dict[str, Any]:
    """Metadata of a step's materialization."""
    artifact = outcome.artifact
    found: dict[str, Any] = {
        "digest": artifact.digest,
        "path": dg.MetadataValue.path(artifact.path.resolve()),
        "recomputed": outcome.recomputed,
        "seconds": round(outcome.seconds, 2),
        **dict(_numbers(artifact.summary)),
    }
    table = preview(artifact)
    if table:
        found["preview"] = dg.MetadataValue.md(table)
    return found


def preview(artifact: Artifact) -> str:
    """The first rows of an artifact's main table, as Markdown; '' when it has none."""
    import polars as pl

    tables = [name for name in artifact.manifest.files if name.endswith(".parquet")]
    wanted = [name for name in TABLES.get(artifact.kind, ()) if name in tables] or tables
    if not wanted:
        return ""
    frame = pl.scan_parquet(artifact.path / wanted[0], glob=False).head(ROWS).collect()
    columns = [name for name, kind in frame.schema.items() if not kind.is_nested()][:COLUMNS]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    lines += ["| " + " | ".join(_cell(value) for value in row) + " |" for row in frame.select(columns).iter_rows()]
    return "\n".join(lines) if columns else ""


def _cell(value: object) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)
    text = " ".join(text.split()).replace("|", "\\|")
    return text if len(text) <= CELL else text[: CELL - 1] + "…"


def _numbers(summary: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Scalars of a summary, nested ones under dotted names."""
    for key, value in summary.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{key}.")
        elif isinstance(value, (bool, int, float, str)):
            yield f"{prefix}{key}", value
