"""SQL over a store: DuckDB views in memory over the Parquet files of all artifacts (DESIGN: the store).

No database file and no lock: any number of readers, beside a run that writes. Every view exists, with its columns, in
an empty store too. Rows of an artifact that several iterations or experiments share appear once for each.

Example:
    ``evolve sql "select experiment, iteration, condition, avg(reward) from scores group by all order by all"``
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from evolve_dag.errors import DataError
from evolve_dag.store import frames
from evolve_dag.store.artifacts import Artifact, Store
from evolve_dag.store.layout import CALLS, CONTEXTS, CURVE, EDITS, ITEMS, SCORES, STEPS, TRAJECTORIES

if TYPE_CHECKING:
    import duckdb
    import polars as pl

VIEWS = {
    "artifacts": "one row per artifact: kind, digest, config, inputs and summary as JSON, created (UTC), seconds, bytes",
    "refs": "which artifact an iteration of an experiment uses for each kind",
    "trajectories": "one row per trajectory; by kind: training rollouts, contexts (the teacher's), scores (evaluation)",
    "steps": "one row per step of those trajectories",
    "items": "experience items of every pool",
    "edits": "every pool edit with its reason",
    "contexts": "one row per step that was learned from: the selected items and the injected text",
    "scores": "one row per evaluation rollout and condition",
    "calls": "one row per call to an extractor, selector, judge or served policy: tokens, attempts, cost in US dollars",
    "curves": "one row per optimizer step of every adapter",
}
"""View -> what a row is. Every view but ``artifacts`` and ``refs`` starts with kind, digest, experiment and iteration of
the artifact; a column of its own with such a name bears the view's name (``edits``: ``edit_iteration``)."""

_INSIDE = "inside"
"""Schema of what the views are made of: `show tables` lists the views alone."""
_PLACE = ("kind", "digest", "experiment", "iteration")
_FILES = {
    "trajectories": TRAJECTORIES,
    "steps": STEPS,
    "items": ITEMS,
    "edits": EDITS,
    "contexts": CONTEXTS,
    "scores": SCORES,
    "calls": CALLS,
    "curves": CURVE,
}


def connect(store: Store) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection in memory with the views of :data:`VIEWS` over the store as it is now.

    It can reach no other file, of the store or elsewhere, no network and no extension. Close it when done.

    Raises:
        StoreError: an artifact is corrupt (names the file and the remedy).
    """
    import duckdb

    artifacts = list(store.artifacts())
    for artifact in artifacts:
        artifact.verify(content=False)
    connection = duckdb.connect(":memory:")
    try:
        connection.execute("SET python_enable_replacements = false")  # a name in SQL must not reach Python variables
        connection.execute(f"CREATE SCHEMA {_INSIDE}")
        _table(connection, "artifacts", _artifacts_frame(artifacts))
        _table(connection, "refs", _refs_frame(store))
        for setting in ("autoinstall_known_extensions", "autoload_known_extensions"):
            connection.execute(f"SET {setting} = false")
        views = {view: [one for one in artifacts if name in one.manifest.files] for view, name in _FILES.items()}
        paths = {view: [str((one.path / _FILES[view]).resolve()) for one in having] for view, having in views.items()}
        allowed = ", ".join(_quote(path) for listed in paths.values() for path in listed)
        connection.execute(f"SET allowed_paths = [{allowed}]")
        connection.execute("SET enable_external_access = false")
        for view, having in views.items():
            _view(connection, view, having, paths[view])
        connection.execute("SET lock_configuration = true")
    except BaseException:
        connection.close()
        raise
    return connection


def run_sql(store: Store, text: str) -> pl.DataFrame:
    """The answer to one SELECT (or DESCRIBE, SUMMARIZE, SHOW) over the views.

    Raises:
        DataError: not valid, not a single query, or its columns have no Polars type; names the views.
        StoreError: an artifact is corrupt.
    """
    import duckdb
    import polars as pl
    import pyarrow

    with connect(store) as connection:
        try:
            statements = connection.extract_statements(text)
            if len(statements) != 1:
                raise DataError(f"SQL: {len(statements) or 'no'} statements, where one is expected", _remedy())
            if statements[0].type != duckdb.StatementType.SELECT:
                raise DataError(f"SQL: {statements[0].type.name} is not allowed: the store is only read", _remedy())
            return connection.sql(text).pl()
        except duckdb.Error as error:
            raise DataError(f"SQL: {error}", _remedy()) from error
        except (pl.exceptions.PolarsError, pyarrow.ArrowException) as error:
            raise DataError(f"SQL: a column of the answer has no table type: {error}", "cast it, e.g. column::text") from error


def _remedy() -> str:
    return f"write one SELECT over {', '.join(VIEWS)}; `describe steps` lists the columns of a view"


def _columns(view: str) -> pl.Schema:
    """Columns that a view has even when no file is there yet."""
    import polars as pl

    text, number, real = pl.String(), pl.Int32(), pl.Float64()
    if view == "contexts":
        return pl.Schema({"trajectory_id": text, "step": number, "selected": pl.List(text), "injected": text})
    if view == "curves":
        counts = dict.fromkeys(("step", "round"), number)
        values = dict.fromkeys(("loss", "divergence", "learning_rate", "gradient_norm"), real)
        return pl.Schema({**counts, **values, "tokens": number, "action_tokens": number, "skipped": pl.Boolean()})
    return frames.schemas()[_FILES[view]]


def _view(connection: duckdb.DuckDBPyConnection, view: str, artifacts: Sequence[Artifact], paths: Sequence[str]) -> None:
    """A view over the tables at ``paths``, one for each of ``artifacts``."""
    import polars as pl

    _table(connection, f"{_INSIDE}.{view}_columns", pl.DataFrame(schema={"filename": pl.String(), **_columns(view)}))
    where = {
        "filename": list(paths),
        "kind": [artifact.kind for artifact in artifacts],
        "digest": [artifact.digest for artifact in artifacts],
    }
    _table(connection, f"{_INSIDE}.{view}_files", pl.DataFrame(where, schema=dict.fromkeys(where, pl.String())))
    rows = f"SELECT * FROM {_INSIDE}.{view}_columns"
    if paths:
        files = ", ".join(_quote(path) for path in paths)
        # Else a folder above the store that is called like `seed=3` would be a column, in place of the files' own.
        how = "union_by_name = true, filename = true, hive_partitioning = false"
        rows += f" UNION ALL BY NAME SELECT * FROM read_parquet([{files}], {how})"
    columns = {row[0] for row in connection.execute(f"DESCRIBE {rows}").fetchall()}
    own = ", ".join(f"{name} AS {view.removesuffix('s')}_{name}" for name in _PLACE if name in columns)
    connection.execute(
        f"CREATE VIEW {view} AS SELECT f.kind, f.digest, r.experiment, r.iteration, "
        f"x.* EXCLUDE (filename) {f'RENAME ({own})' if own else ''} FROM ({rows}) x "
        f"JOIN {_INSIDE}.{view}_files f ON f.filename = x.filename LEFT JOIN refs r ON r.kind = f.kind AND r.digest = f.digest"
    )


def _artifacts_frame(artifacts: Sequence[Artifact]) -> pl.DataFrame:
    import polars as pl

    manifests = [artifact.manifest for artifact in artifacts]
    return pl.DataFrame(
        {
            "kind": [m.kind for m in manifests],
            "digest": [m.digest for m in manifests],
            "code_version": [m.code_version for m in manifests],
            "config": [_json(m.config) for m in manifests],
            "inputs": [_json(m.inputs) for m in manifests],
            "summary": [_json(m.summary) for m in manifests],
            "created": [_time(m.created) for m in manifests],
            "seconds": [m.seconds for m in manifests],
            "bytes": [sum(fact.bytes for fact in m.files.values()) for m in manifests],
        },
        schema={
            **dict.fromkeys(("kind", "digest", "code_version", "config", "inputs", "summary"), pl.String()),
            "created": pl.Datetime("us"),
            "seconds": pl.Float64(),
            "bytes": pl.Int64(),
        },
    )


def _refs_frame(store: Store) -> pl.DataFrame:
    import polars as pl

    refs = store.refs()
    return pl.DataFrame(
        {
            "experiment": [ref.experiment for ref in refs],
            "iteration": [ref.iteration for ref in refs],
            "kind": [ref.kind for ref in refs],
            "digest": [ref.digest for ref in refs],
            "created": [_time(ref.created) for ref in refs],
            "facts": [_json(ref.facts) for ref in refs],
        },
        schema={
            "experiment": pl.String(),
            "iteration": pl.Int32(),
            "kind": pl.String(),
            "digest": pl.String(),
            "created": pl.Datetime("us"),
            "facts": pl.String(),
        },
    )


def _table(connection: duckdb.DuckDBPyConnection, name: str, frame: pl.DataFrame) -> None:
    connection.register("_incoming", frame.to_arrow())
    connection.execute(f"CREATE TABLE {name} AS SELECT * FROM _incoming")
    connection.unregister("_incoming")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


def _time(stamp: str) -> datetime:
    """Without zone: DuckDB would need a further package to hand zones to Python."""
    return datetime.fromisoformat(stamp).astimezone(UTC).replace(tzinfo=None)


def _quote(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
