"""One iteration of a lineage as MLflow's params, metrics and tags: plain values, nothing is sent here."""

from __future__ import annotations

import json
import posixpath
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from math import isfinite
from typing import TYPE_CHECKING, Any

from evolve_dag.reporting.summary import EDITS, IterationRow, LineageSummary
from evolve_dag.secrecy import masker
from evolve_dag.store.artifacts import joined_config

if TYPE_CHECKING:
    from evolve_dag.config.schema import Experiment
    from evolve_dag.evaluation.metrics import Metrics
    from evolve_dag.store.artifacts import Artifact, Ref, Store

PARAM_CHARACTERS = 500
"""Longest value of a parameter that every MLflow server takes; config.json beside the run holds all of it."""

NAME_CHARACTERS = 250
"""Longest name of a parameter or tag."""

CURVE = ("loss", "divergence", "learning_rate", "gradient_norm", "tokens_per_second", "action_tokens")
"""Columns of the training curve that are sent."""

MEASURED = (
    "success",
    "solved",
    "success_all",
    "premature",
    "no_tool",
    "forced",
    "unanswered",
    "failed",
    "turns",
    "tokens",
    "problems",
)
"""Fields of :class:`~evolve_dag.evaluation.metrics.Metrics` that are sent."""

WITH_INTERVAL = ("success", "premature", "turns")
"""Those of them whose interval is sent too, as ``success/without_low`` and ``success/without_high``."""

GATE = ("success_difference", "success_low", "success_high", "success_detectable", "drift_evidence", "drift_loss")
"""Evidence of the gate that is sent: the candidate against the best champion so far."""

TEACHER = ("teacher", "student", "difference", "low", "high")
"""Of the check of the teacher: success with and without experience on training tasks, and the difference."""

_UNSENT_SECTIONS = ("runtime", "tracking", "schedule", "iterations", "description")
"""Keys that decide no result; a lineage may change them, and MLflow's parameters never change."""


@dataclass(frozen=True, slots=True)
class Point:
    """One value of a metric."""

    key: str
    value: float
    step: int
    milliseconds: int
    """Since 1970; the same at every sending, so that MLflow knows the point again."""


@dataclass(frozen=True, slots=True)
class IterationFacts:
    """What one iteration tells MLflow."""

    experiment: str
    """Name of the lineage."""
    iteration: int
    lineage: str
    """Digest of the lineage's first promotion: it covers the config and the code of everything before it."""
    row: IterationRow
    refs: Mapping[str, Ref]
    artifacts: Mapping[str, Artifact]
    started: int
    """Milliseconds since 1970."""
    ended: int
    """Milliseconds since 1970."""

    @property
    def promotion(self) -> str:
        """Digest of the promotion, which covers all that came before it."""
        return self.refs["promotion"].digest

    @property
    def promoted(self) -> bool:
        """Did the gate promote the candidate?"""
        return self.row.gate is not None and self.row.gate.decision == "promote"

    @property
    def partition(self) -> str:
        """``pocket|02``."""
        return f"{self.experiment}|{self.iteration:02d}"


def iterations(store: Store, summary: LineageSummary) -> list[IterationFacts]:
    """The finished iterations of a lineage, in order."""
    refs: dict[int, dict[str, Ref]] = {}
    for ref in store.refs(summary.experiment):
        refs.setdefault(ref.iteration, {})[ref.kind] = ref
    rows = [row for row in summary.iterations if row.gate is not None]
    found = []
    for row in rows:
        mine = refs[row.iteration]
        artifacts = {kind: store.open(kind, ref.digest) for kind, ref in mine.items()}
        begun = artifacts.get("trajectories", artifacts["promotion"]).manifest
        found.append(
            IterationFacts(
                summary.experiment,
                row.iteration,
                refs[rows[0].iteration]["promotion"].digest,
                row,
                mine,
                artifacts,
                started=milliseconds(begun.created) - round(1000 * begun.seconds),
                ended=milliseconds(artifacts["promotion"].manifest.created),
            )
        )
    return found


def milliseconds(stamp: str) -> int:
    """ISO 8601 -> milliseconds since 1970."""
    return round(1000 * datetime.fromisoformat(stamp).timestamp())


def settings(facts: IterationFacts) -> dict[str, Any]:
    """The config slices that the iteration's artifacts were made with."""
    merged = joined_config(facts.artifacts.values())
    return {key: value for key, value in sorted(merged.items()) if key not in ("iteration", "policy", "standing")}


def params(settings: Mapping[str, Any]) -> dict[str, str]:
    """Config slices as flat parameters, long values cut, under names that every server takes.

    >>> params({"regime": {"source": "teacher"}, "seed": 0, "tasks.train": {"path": None}})
    {'regime.source': 'teacher', 'seed': '0', 'tasks.train.path': 'null'}
    >>> params({"extra": {"$schema": "x", "_schema": "y"}})
    {'extra._schema': 'y', 'extra._schema_2': 'x'}
    """
    mask = masker()
    return {name: _cut(mask(_text(value))) for name, value in _named(_flat(settings))}


def undecisive(experiment: Experiment) -> dict[str, str]:
    """Settings that decide no result, as tags: they may change within a lineage."""
    sections = experiment.model_dump(mode="json", include=set(_UNSENT_SECTIONS))
    mask = masker()
    stated = _named((f"config.{key}", value) for key, value in _flat(sections) if value not in (None, ""))
    return {name: _cut(mask(_text(value))) for name, value in stated}


def tags(facts: IterationFacts) -> dict[str, str]:
    """Who and what a nested run is: its place in the lineage, the digests of its artifacts, the decision."""
    found = {
        "evolve.experiment": facts.experiment,
        "evolve.lineage": facts.lineage,
        "evolve.iteration": str(facts.iteration),
        "evolve.partition": facts.partition,
        "evolve.asset_key": "promotion",
        "evolve.version": version(),
        **{f"evolve.digest.{kind}": ref.digest for kind, ref in facts.refs.items()},
        **{f"evolve.code_version.{kind}": a.manifest.code_version for kind, a in facts.artifacts.items()},
    }
    if facts.row.gate is not None:
        found["evolve.decision"] = facts.row.gate.decision
        found["evolve.reasons"] = "; ".join(facts.row.gate.reasons)[:5000]
    for kind, ref in facts.refs.items():
        run = ref.facts.get("dagster_run_id")
        if run:
            found[f"dagster.run_id.{kind}"] = str(run)
            found["dagster.run_id"] = str(run)
            found["dagster.partition"] = facts.partition
    return found


def version() -> str:
    """Of this package."""
    try:
        return metadata.version("evolve-dag")
    except metadata.PackageNotFoundError:
        return "unknown"


def results(facts: IterationFacts, base: IterationRow | None = None) -> list[Point]:
    """Metrics of an iteration at step k: success and behaviour with intervals, the pool, the gate, time, tokens and cost.

    Args:
        base: the row of the base policy; its results are step 0.
    """
    row, at = facts.row, facts.ended
    points: list[Point] = []

    def add(key: str, value: Any, step: int = facts.iteration) -> None:
        if isinstance(value, (int, float)) and not isinstance(value, bool) and isfinite(value):
            points.append(Point(key, float(value), step, at))

    if base is not None and base.without is not None:
        for key, value in _measured(base.without, "without"):
            add(key, value, 0)
        for temperature, tried in base.at_temperature.items():
            add(f"success/base_at_{temperature:g}", tried.success, 0)
    shown = (("without", row.without), ("with", row.with_experience), ("greedy", row.greedy), ("ceiling", row.ceiling))
    for condition, metrics in shown:
        if metrics is not None:
            for key, value in _measured(metrics, condition):
                add(key, value)
    add("pool/items", row.pool_size)
    for name in EDITS:
        add(f"pool/{name}", row.edits.get(name))
    for name, value in row.locality.items():
        add(f"pool/share_{name}", value)
    add("promoted", float(facts.promoted))
    for name in GATE:
        add(f"gate/{name}", row.gate.evidence.get(name) if row.gate is not None else None)
    for name in TEACHER:
        add(f"teacher/{name}", getattr(row.check.whole, name, None) if row.check is not None else None)
    add("teacher/attempts", row.check.attempts if row.check is not None and row.check.whole is not None else None)
    for name in ("rows", "kept", "loss_first", "loss_last", "divergence_first", "divergence_last"):
        add(f"training/{name}", row.training.get(name))
    add("cost/seconds", sum(step.seconds for step in row.steps))
    add("cost/tokens", sum(step.tokens or 0 for step in row.steps))
    for step in row.steps:
        add(f"cost/seconds_{step.name}", step.seconds)
        add(f"cost/tokens_{step.name}", step.tokens)
    for key, value in _calls(facts.artifacts).items():
        add(key, value)
    return points


def curve(facts: IterationFacts) -> list[Point]:
    """The training curve, one step an optimizer step."""
    adapter = facts.artifacts.get("adapter")
    if adapter is None:
        return []
    ended = milliseconds(adapter.manifest.created)
    seconds = [_duration(record) for record in facts.row.curve]
    points = []
    left = sum(seconds)
    for n, record in enumerate(facts.row.curve):
        left -= seconds[n]
        at, step = ended - round(1000 * left), int(record.get("step", n))
        points += [Point(f"train/{key}", float(record[key]), step, at) for key in CURVE if key in record]
    return points


# -- inside


def _measured(metrics: Metrics, condition: str) -> Iterator[tuple[str, float | None]]:
    for name in MEASURED:
        yield f"{name}/{condition}", getattr(metrics, name)
        interval = metrics.intervals.get(name) if name in WITH_INTERVAL else None
        if interval is not None:
            yield f"{name}/{condition}_low", interval[0]
            yield f"{name}/{condition}_high", interval[1]
    yield f"episodes/{condition}", metrics.n
    yield f"judged/{condition}", metrics.judged


def _calls(artifacts: Mapping[str, Artifact]) -> dict[str, float]:
    """Sums of the cost ledgers over the steps: role -> its calls, tokens, dollars. One unknown price makes the sum unknown."""
    sums: dict[str, float] = {}
    unknown: set[str] = set()
    for artifact in artifacts.values():
        calls = artifact.summary.get("calls")
        for role, totals in calls.items() if isinstance(calls, Mapping) else ():
            for name, value in totals.items() if isinstance(totals, Mapping) else ():
                key = f"calls/{role}_{'usd' if name == 'cost' else name}"
                if isinstance(value, (int, float)):
                    sums[key] = sums.get(key, 0.0) + value
                else:
                    unknown.add(key)
    dollars = [key for key in (*sums, *unknown) if key.endswith("_usd")]
    if dollars and not unknown:
        sums["cost/usd"] = sum(sums[key] for key in dollars)
    return {key: value for key, value in sums.items() if key not in unknown}


def _duration(record: Mapping[str, float]) -> float:
    rate = record.get("tokens_per_second", 0.0)
    return record.get("tokens", 0.0) / rate if rate > 0 else 0.0


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in sorted(value.items()):
            yield from _flat(inner, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, value


def _named(flat: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """The same values under names that MLflow takes and that are all different: those that it takes as they are stay so, one
    that would be another's ends in a number."""
    taken: set[str] = set()
    for key, value in sorted(flat, key=lambda one: _legal(one[0]) != one[0]):
        name, number = _legal(key), 1
        while name in taken:
            number += 1
            ending = f"_{number}"
            name = _legal(key)[: NAME_CHARACTERS - len(ending)] + ending
        taken.add(name)
        yield name, value


def _legal(key: str) -> str:
    """Keys of an experiment file may be anything (``models.extractor.extra.$schema``). MLflow takes letters, digits and
    ``_-. /``, on most systems ``:`` too, and what would be a path only where it is its shortest form."""
    name = re.sub(r"[^\w\-. /]", "_", key)[:NAME_CHARACTERS]
    if posixpath.normpath(name) != name or name.startswith("/"):
        name = name.replace("/", "_")
    return f"_{name}"[:NAME_CHARACTERS] if name in ("", ".") or name.startswith("..") else name


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        value = list(value)
    return json.dumps(value, ensure_ascii=False, default=str)


def _cut(text: str) -> str:
    return text if len(text) <= PARAM_CHARACTERS else text[: PARAM_CHARACTERS - 1] + "…"
