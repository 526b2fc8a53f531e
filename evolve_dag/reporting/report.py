"""The report: one self-contained HTML file about one or several lineages; it loads nothing from anywhere.

What is said stands in ``templates/report.html.jinja``; here is what it asks for.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from evolve_dag.errors import DataError, StoreError
from evolve_dag.evaluation.metrics import Metrics
from evolve_dag.lineage import audit
from evolve_dag.reporting import figures, pages
from evolve_dag.reporting.summary import (
    STAYS,
    LineageSummary,
    StepRow,
    count,
    duration,
    number,
    number_interval,
    percent,
    percent_interval,
    standing_note,
    step_names,
)
from evolve_dag.store.disk import write_atomic

if TYPE_CHECKING:
    from evolve_dag.experience.teacher_check import Comparison, TeacherCheck
    from evolve_dag.store.artifacts import Store

PACKAGES = ("evolve-dag", "torch", "transformers", "peft", "dagster", "polars", "duckdb", "numpy")
"""Packages whose version the report names."""


def write_report(summaries: Sequence[LineageSummary], path: Path | str, *, store: Store | None = None) -> Path:
    """Write the report; every file appears whole or not at all.

    Args:
        summaries: lineages, compared side by side in the order given.
        path: file to write; its folder is made when missing.
        store: where the lineages are; given, each gets an audit page beside the report, which links to it.

    Returns:
        The path.

    Raises:
        DataError: no lineage was given, or the same one twice.
        StoreError: the file cannot be written.
    """
    path = Path(path)
    audits: dict[str, str] = {}
    if store is not None:
        from evolve_dag.reporting import audit_page

        for summary in summaries:
            read = [row.iteration for row in summary.iterations]
            audits[summary.experiment] = audit_page.render(store, summary.experiment, read, report=quote(path.name))
    content = render(summaries, {name: quote(_audit_name(name)) for name in audits})
    for name, page in audits.items():
        _write(path.with_name(_audit_name(name)), page)
    return _write(path, content)


def _audit_name(experiment: str) -> str:
    return f"{experiment}~audit.html"  # no experiment's name has a tilde: no report is called so


def _write(path: Path, content: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content.encode(), durable=False)
    except OSError as error:
        raise StoreError(
            f"{path}: the report cannot be written: {error.strerror or error}", "name another file, or free room"
        ) from error
    return path


def render(summaries: Sequence[LineageSummary], audits: Mapping[str, str] | None = None) -> str:
    """The report as one HTML text.

    Args:
        audits: experiment -> address of its audit page, relative to the report; linked where given.

    Raises:
        DataError: no lineage was given, or the same one twice.
    """
    names = [summary.experiment for summary in summaries]
    if not names or len(set(names)) < len(names):
        raise DataError(
            "the report was asked for no experiment" if not names else f"an experiment is named twice: {', '.join(names)}",
            "name each experiment once, e.g. evolve report A B",
        )
    from plotly.offline import get_plotlyjs

    return pages.render(
        "report.html.jinja",
        title=f"Self-evolution of {names[0]}" if len(names) == 1 else "Self-evolution, side by side",
        by=f" by evolve-dag {versions().get('evolve-dag', '')}",
        sections=SECTIONS,
        plotly=get_plotlyjs(),
        summaries=summaries,
        audits=audits or {},
        audited=[s for s in summaries if any(row.internalized for row in s.rows)],
        seeds={name: members for name, members in _by_experiment(summaries).items() if len(members) > 1},
        commands=_commands(summaries),
        versions=versions(),
        **_FUNCTIONS,
    )


def versions() -> dict[str, str]:
    """Python and the packages that decide results, as installed where the report is written."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


SECTIONS = {
    "result": "Result",
    "behaviour": "Behaviour",
    "experience": "Experience pool",
    "training": "Training",
    "internalization": "Internalization",
    "gate": "Gate",
    "cost": "Time and cost",
    "reproduce": "Reproduce",
}
"""Part of the template -> its heading."""

TRAINED = {
    "loss_first": "loss, first",
    "loss_last": "loss, last",
    "divergence_first": "divergence, first",
    "divergence_last": "divergence, last",
}
"""Headings of the adapter's numbers that need the note below the table."""

HEADLINE = (
    ("success without", "without", "success"),
    ("success with", "with_experience", "success"),
    ("premature answers", "without", "premature"),
    ("mean turns", "without", "turns"),
)
"""What the last iteration is known by: heading, condition, metric."""

RESULTS = (
    ("success without", "without", "success"),
    ("success with", "with_experience", "success"),
    ("greedy", "greedy", "success"),
    ("ceiling", "ceiling", "success"),
    ("solved in full", "without", "solved"),
    ("turns", "without", "turns"),
    ("premature", "without", "premature"),
    ("unanswered", "without", "unanswered"),
    ("forced", "without", "forced"),
)
"""Columns of the table of results: heading, condition, metric."""


def _commands(summaries: Sequence[LineageSummary]) -> list[str]:
    commands = [summary.command for summary in summaries if summary.command]
    commands += [f"evolve audit {s.experiment}" for s in summaries if any(row.internalized for row in s.rows)]
    return [*commands, f"evolve report {' '.join(summary.experiment for summary in summaries)}"]


def _breakdowns(summary: LineageSummary) -> list[str]:
    """Facts of tasks that have more than one value."""
    parts = [row.without.by for row in summary.rows if row.without]
    return sorted({key for by in parts for key, values in by.items() if len(values) > 1})


def _trained(summary: LineageSummary) -> dict[str, str]:
    """The adapter's numbers, in the order in which the step notes them, with their headings; tokens stand under cost."""
    facts = (row.training for row in summary.iterations)
    numbers = (key for training in facts for key, value in training.items() if isinstance(value, (int, float)))
    return {key: TRAINED.get(key, key.replace("_", " ")) for key in numbers if key != "tokens"}


def _checked(summary: LineageSummary) -> tuple[list[int], list[tuple[str, str, list[tuple[str, str, str]]]]]:
    """Iterations whose teacher was checked; then a row for all items together and one for each: name, text, and by
    iteration the difference to the student's success, its interval, and what came of it."""
    checks = {row.iteration: row.check for row in summary.iterations if row.check is not None and row.check.whole is not None}
    texts = {item.id: item.text for row in summary.iterations for item in row.items}
    items = {k: {one.item: one for one in check.items} for k, check in checks.items()}
    whole = [(*_effect(check.whole), _outcome(check)) for check in checks.values()]
    rows = [("all", "all items together", whole)]
    for name in dict.fromkeys(name for found in items.values() for name in found):
        seen = [found.get(name) for found in items.values()]
        cells = [(*_effect(one.comparison), "withdrawn" if one.withdrawn else "") if one else ("", "", "") for one in seen]
        rows.append((name, texts.get(name, ""), cells))
    return list(checks), rows


def _outcome(check: TeacherCheck) -> str:
    tried = f"attempt {check.attempts}" if check.earlier else ""
    return ", ".join(filter(None, [tried, "not taught" if check.refusal else ""]))


def _effect(comparison: Comparison | None) -> tuple[str, str]:
    if comparison is None:
        return "–", "not told apart"
    low, high = (f"{100 * bound:+.1f}" for bound in (comparison.low, comparison.high))
    return f"{100 * comparison.difference:+.1f}", f"{low} to {high}, {comparison.tasks} tasks"


def _paid(summary: LineageSummary) -> list[tuple[int, str, str, Mapping[str, Any]]]:
    """Calls to other models than the policy: iteration, step, role, sums."""
    steps = ((row.iteration, step) for row in summary.iterations for step in row.steps)
    return [(k, step.name, role, sums) for k, step in steps for role, sums in step.calls.items()]


def _measured(metrics: Metrics | None, field: str) -> tuple[str, str]:
    """A metric and its interval, as they are written."""
    show, around = (number, number_interval) if field == "turns" else (percent, percent_interval)
    return (show(getattr(metrics, field)), around(metrics.intervals.get(field))) if metrics else ("–", "")


def _spent(steps: Sequence[StepRow], name: str | None = None) -> tuple[str, str]:
    """Time and tokens of the steps, or of those with one name."""
    steps = [step for step in steps if name in (None, step.name)]
    if not steps:
        return "–", ""
    tokens = sum(step.tokens or 0 for step in steps)
    resumed = any(step.resumed for step in steps)
    return ("≥ " if resumed else "") + duration(sum(step.seconds for step in steps)), count(tokens) if tokens else ""


def _as_json(settings: Mapping[str, Any]) -> str:
    return json.dumps(dict(settings), indent=2, ensure_ascii=False, default=str)


def _by_experiment(summaries: Sequence[LineageSummary]) -> dict[str, list[LineageSummary]]:
    """Experiment -> its lineages of several seeds (``<experiment>-s<N>``, see evolve_dag.config.registry)."""
    groups: dict[str, list[LineageSummary]] = {}
    for summary in summaries:
        groups.setdefault(summary.experiment.removesuffix(f"-s{summary.settings.get('seed')}"), []).append(summary)
    return groups


def _recipe(summary: LineageSummary) -> str:
    """The three dimensions, where the artifacts tell them (METHOD)."""
    settings = summary.settings
    parts = [settings.get("granularity"), settings.get("injection")]
    if "regime.source" in settings:
        rejection = "with rejection" if settings.get("regime.rejection") else "without rejection"
        parts += [f"source {settings['regime.source']}", settings.get("regime.divergence"), rejection]
    told = [str(part) for part in parts if part]
    return f" · {', '.join(told)}" if told else ""


_FUNCTIONS = {
    "ALL": audit.ALL, "NONE": audit.NONE, "HEADLINE": HEADLINE, "RESULTS": RESULTS, "STAYS": STAYS,
    "figures": figures, "standing_note": standing_note,
    "step_names": step_names, "recipe": _recipe, "breakdowns": _breakdowns, "trained": _trained, "paid": _paid,
    "checked": _checked,
    "measured": _measured, "spent": _spent, "as_json": _as_json,
}  # fmt: skip
"""What the template may call."""
