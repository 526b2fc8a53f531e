"""A lineage that takes seconds, and what two stores that hold it must have in common."""

from __future__ import annotations

import base64
import json
import math
import os
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

PROJECT = Path(__file__).resolve().parent.parent
NAME = "tiny"
ITERATIONS = 2
CONFIG: dict[str, Any] = {
    "experiment": NAME,
    "seed": 4,
    "iterations": ITERATIONS,
    "start_pool": "pool.json",
    "regime": {"preset": "off_policy", "rejection": False},
    "environment": {
        "kind": "corpus",
        "pages": "own_corpus/pages.jsonl",
        "results": 3,
        "text_weight": 0.0,
        "minimum_match": 0.65,
    },
    "tasks": {
        "train": {"path": "own_corpus/train.jsonl", "count": 2, "world": None, "stream": True},
        "development": {"path": "own_corpus/development.jsonl", "count": 1, "world": None},
        "held_out": {"path": "own_corpus/held_out.jsonl", "count": 1, "world": None},
    },
    "rollout": {"group_size": 2, "max_steps": 5},
    "distillation": {"epochs": 1},
    "evaluation": {"bootstrap": 100},
    "runtime": {"threads": 1, "concurrency": 2},  # few at once, so that a step has a middle
    "tracking": {"trajectories": 1},
}
POOL = {"p1": "Narrow: when nothing is known yet, search only the short name."}
"""Experience from the beginning, so that every step has something to do."""

TOLERANCE = 1e-4
"""Of numbers that a batch of another make-up changes in their last digits."""
WALL_TIMES = frozenset({"seconds", "created", "resumed", "tokens_per_second", "dagster_run_id", "recomputed"})
"""Keys and columns that tell when, how long and by whom, and not what."""
_VOLATILE_FILES = re.compile(
    rf"dagster/|cache/|locks/run-|locks/build-.*\.lock$|locks/mlflow-database\.lock$|(locks/experiment-|refs/){NAME}-imported[./]"
    r"|reports/|tracking/|mlflow/|logs/|(.*/)?\.[^/]+\.tmp$"
)
"""What the loop does not rest on, and what other commands leave. The lock of what was built last stays till the next run;
temporary files of killed processes, which nobody reads, are `evolve gc`'s."""


def environment(**more: str) -> dict[str, str]:
    """The environment of a command: one thread, no network, nothing of the user's own."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("EVOLVE_", "DAGSTER_", "MLFLOW_"))}
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "POLARS_MAX_THREADS"), "1")
    quiet = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    return {**kept, **threads, **quiet, "DAGSTER_DISABLE_TELEMETRY": "true", "EVOLVE_TRACKING": "off", **more}


def write_world(folder: Path, **changes: object) -> Path:
    """The experiment's file and what it reads; returns the file."""
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copytree(PROJECT / "configs" / "own_corpus", folder / "own_corpus", dirs_exist_ok=True)
    (folder / "pool.json").write_text(json.dumps(POOL))
    path = folder / f"{NAME}.yaml"
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


# -- what two stores have in common


def store_differences(calm: Path, other: Path) -> list[str]:
    """What is in one store and not, or not the same, in the other; wall times and last digits aside."""
    found = [*_of_sets("files", _names(calm), _names(other)), *_of_sets("events", _recorded(calm), _recorded(other))]
    for path in sorted(_names(calm) & _names(other)):
        found += [f"{path}: {line}" for line in _of_files(calm / path, other / path)]
    return found


def _of_sets(what: str, first: set[str], second: set[str]) -> Iterator[str]:
    yield from (f"{what}: {one} is missing" for one in sorted(first - second))
    yield from (f"{what}: {one} is too many" for one in sorted(second - first))


def _names(root: Path) -> set[str]:
    """All files; of locks those that stay when nothing was killed."""
    names = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    return {name for name in names if not _VOLATILE_FILES.match(name)}


def _recorded(root: Path) -> set[str]:
    """What Dagster shows: the data version of every asset and partition, and runs that do not come to an end."""
    import dagster as dg
    from evolve_dag.assets import automation, launch, partitions, recovery

    from evolve_dag.steps.base import STEP_ORDER

    with launch.open_instance(root) as instance:
        found = {f"unfinished run {run.run_id}" for run in instance.get_runs(dg.RunsFilter(statuses=recovery.IN_PROGRESS))}
        for k in range(1, ITERATIONS + 2):
            for step in STEP_ORDER:
                version = automation.recorded_version(instance, dg.AssetKey(step), partitions.loop_key(NAME, k))
                found.add(f"{step}[{k}] is {version}")
    return found


def _of_files(calm: Path, other: Path) -> Iterator[str]:
    if calm.read_bytes() == other.read_bytes():
        return
    if calm.suffix == ".parquet":
        import polars as pl

        yield from _of_values(*(pl.read_parquet(path).to_dict(as_series=False) for path in (calm, other)), "")
    elif calm.suffix == ".safetensors":
        from safetensors.numpy import load_file

        first, second = ({k: v.tolist() for k, v in load_file(path).items()} for path in (calm, other))
        if "ids" in first and "ids" in second:  # a teacher's most probable tokens
            rankings = (list(zip(each.pop("ids"), each.pop("logprobs"), strict=True)) for each in (first, second))
            yield from _of_rankings(*rankings)
        yield from _of_values(first, second, "")
    elif calm.suffix == ".json":
        first, second = (json.loads(path.read_text()) for path in (calm, other))
        if calm.name == "manifest.json":
            first["files"], second["files"] = sorted(first["files"]), sorted(second["files"])  # compared one by one
        yield from _of_values(first, second, "")
    else:
        yield "other bytes"


_Ranking = tuple[list[int], list[float]]


def _of_rankings(first: list[_Ranking], second: list[_Ranking]) -> Iterator[str]:
    """Ids and log-probabilities of each row; two as good as equal may change places, also the last with one left out."""
    if len(first) != len(second):
        yield f"rankings: {len(first)} and {len(second)} rows"
    for number, rows in enumerate(zip(first, second, strict=False)):
        one, two = (dict(zip(*row, strict=True)) for row in rows)
        for token in sorted(one.keys() | two.keys()):
            logprobs = one.get(token, min(one.values())), two.get(token, min(two.values()))
            yield from _of_values(*logprobs, f"rankings[{number}] of token {token}")


def _of_values(first: Any, second: Any, where: str) -> Iterator[str]:
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        yield from _of_sets(where or "keys", set(map(str, first)), set(map(str, second)))
        for key in first.keys() & second.keys() - WALL_TIMES:
            yield from _of_values(first[key], second[key], f"{where}.{key}")
    elif isinstance(first, list) and isinstance(second, list):
        if len(first) != len(second):
            yield f"{where}: {len(first)} and {len(second)} values"
        for number, (one, two) in enumerate(zip(first, second, strict=False)):
            yield from _of_values(one, two, f"{where}[{number}]")
    elif isinstance(first, float) and isinstance(second, float) and not math.isclose(first, second, abs_tol=TOLERANCE):
        yield f"{where}: {first} and {second}"
    elif not isinstance(first, float) and first != second:
        yield f"{where}: {first!r} and {second!r}"


# -- what two databases of MLflow have in common


_TIMES = re.compile(r"time|created|updated|timestamp|duration|ended|started|_ms$|_ns$|^assessment_id$|^input_uuid$")
"""Columns that hold a time, or an id that MLflow draws and nothing refers to."""


_TRACES = """
SELECT t.request_id, r.name || ' ' || c.value || ' ' || n.value
FROM trace_info t
JOIN trace_request_metadata m ON m.request_id = t.request_id AND m.key = 'mlflow.sourceRun'
JOIN runs r ON r.run_uuid = m.value
JOIN trace_tags c ON c.request_id = t.request_id AND c.key = 'evolve.condition'
JOIN trace_tags n ON n.request_id = t.request_id AND n.key = 'evolve.trajectory'
"""


def _drawn_ids(connection: sqlite3.Connection) -> dict[str, str]:
    """Every id that MLflow has drawn, and those that follow from one -> what it stands for."""
    drawn = dict(connection.execute("SELECT run_uuid, name FROM runs").fetchall())
    drawn |= dict(connection.execute("SELECT dataset_uuid, name || digest FROM datasets").fetchall())
    traces = dict(connection.execute(_TRACES).fetchall())
    for trace, meaning in traces.items():
        drawn[trace] = drawn[_base64(trace.removeprefix("tr-"))] = meaning
        order = "SELECT span_id FROM spans WHERE trace_id = ? ORDER BY start_time_unix_nano, name"
        for number, (span,) in enumerate(connection.execute(order, (trace,)).fetchall()):
            drawn[span] = drawn[_base64(span)] = f"{meaning} span {number}"
    return drawn


def _base64(digits: str) -> str:
    return base64.b64encode(bytes.fromhex(digits)).decode()


def mlflow_content(root: Path) -> Counter[str]:
    """Every row of every table and the name of every file; no times, and drawn ids read as what they stand for."""
    found: list[str] = []
    with sqlite3.connect(root / "mlflow" / "mlflow.db") as connection:
        drawn = _drawn_ids(connection)
        for (table,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
            columns = [row[1] for row in connection.execute(f"PRAGMA table_info({table})") if not _TIMES.search(row[1])]
            for row in connection.execute(f"SELECT {', '.join(columns)} FROM {table}" if columns else "SELECT 1 WHERE FALSE"):
                found.append(f"{table}: " + "; ".join(map("{}={}".format, columns, row)))
    artifacts = root / "mlflow" / "artifacts"
    found += [f"file {path.relative_to(artifacts)}" for path in artifacts.rglob("*") if path.is_file()]
    ids = re.compile("|".join(map(re.escape, drawn)) or "$^")
    return Counter(ids.sub(lambda match: f"<{drawn[match[0]]}>", line).replace(str(root), "<store>") for line in found)
