"""What a run ends with in the terminal: results per iteration, then seconds and tokens per step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from evolve_dag.evaluation.metrics import Metrics
from evolve_dag.reporting.summary import (
    STAYS,
    IterationRow,
    LineageSummary,
    StepRow,
    count,
    duration,
    judged_of,
    number,
    number_interval,
    percent,
    percent_interval,
    recompute_note,
    standing_note,
    step_names,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

MOST_ITERATIONS = 5
"""Columns of the table of steps; the rest stands in the report."""
STEP_AND_ALL, ONE_ITERATION = 30, 12
"""Terminal columns that the names of steps and their sums take, and an iteration beside them."""

WIDE = 116
"""Terminal columns from which a value and its interval stand in one line."""


def print_summary(summary: LineageSummary, console: Console) -> None:
    """Print both tables, the reasons of declined candidates and what was recomputed."""
    from rich.text import Text

    console.print(iteration_table(summary, wide=console.width >= WIDE))
    for note in _notes(summary):
        console.print(Text(note, style="dim"))
    for row in summary.rows:
        if row.gate is not None and row.gate.decision in STAYS:
            # Text, not a string: reasons are data and may hold brackets, which rich would read as markup
            told = f"iteration {row.iteration}: {STAYS[row.gate.decision]}: {'; '.join(row.gate.reasons)}"
            console.print(Text(told, style="yellow"))
    if note := standing_note(summary):
        console.print(Text(note))
    console.print()
    console.print(step_table(summary, console.width))
    if recompute_note(summary):
        console.print(Text(recompute_note(summary), style="bold"))


def iteration_table(summary: LineageSummary, *, wide: bool = True) -> Table:
    """One line an iteration: held-out results with 95% intervals, pool size, the gate's decision."""
    from rich import box
    from rich.table import Table

    title = f"{summary.experiment}: held-out results (95% interval)"
    columns = _columns(summary, wide)
    padding = (0, 1) if wide else (0, 1, 0, 0)
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=wide, padding=padding)
    table.add_column("iteration" if wide else "k", justify="right", min_width=4)
    for heading, _, _ in columns:
        table.add_column(heading, justify="right", min_width=max(len(word) for word in heading.split()))
    table.add_column("pool", justify="right")
    table.add_column("gate")
    for row in summary.rows:
        table.add_row(
            "base" if row.iteration == 0 else str(row.iteration),
            *(_cell(getattr(row, condition), field, wide) for _, condition, field in columns),
            "–" if row.pool_size is None else str(row.pool_size),
            _gate(row),
        )
    return table


def _columns(summary: LineageSummary, wide: bool) -> list[tuple[str, str, str]]:
    """Heading, condition and metric. The ceiling takes the place of the unanswered where the terminal has no room for both."""
    ceiling = any(row.ceiling for row in summary.rows)
    return [
        ("success without", "without", "success"),
        ("success with", "with_experience", "success"),
        *([("ceiling", "ceiling", "success")] if ceiling else []),
        ("mean turns", "without", "turns"),
        ("premature", "without", "premature"),
        *([("unanswered", "without", "unanswered")] if wide or not ceiling else []),
    ]


def step_table(summary: LineageSummary, width: int = WIDE) -> Table:
    """One line a step: seconds, and tokens where the step reports them, in all iterations and in the last ones that fit."""
    from rich import box
    from rich.table import Table

    rows = summary.iterations
    most = min(MOST_ITERATIONS, max(0, (width - STEP_AND_ALL) // ONE_ITERATION))
    shown = rows[max(0, len(rows) - most) :]
    table = Table(title="seconds and tokens per step", box=box.SIMPLE_HEAD, title_justify="left", show_footer=True)
    table.add_column("step", footer="all", no_wrap=True)
    for row in shown:
        table.add_column(f"iteration {row.iteration}", justify="right", footer=_spent(row.steps))
    table.add_column("all", justify="right", footer=_spent([s for row in rows for s in row.steps]))
    for name in step_names(rows):
        per_row = [[s for s in row.steps if s.name == name] for row in rows]
        cells = [_spent(steps) for steps in per_row[len(rows) - len(shown) :]]
        table.add_row(name, *cells, _spent([s for steps in per_row for s in steps]))
    notes = []
    if left := rows[: len(rows) - len(shown)]:
        which = f"iterations 1 to {left[-1].iteration} are" if left[-1].iteration > 1 else "iteration 1 is"
        notes.append(f"{which} counted under 'all' only")
    if any(step.resumed for row in rows for step in row.steps):
        notes.append("> resumed after a kill: the time before it is not counted")
    table.caption = "\n".join(notes) or None
    return table


def _spent(steps: Sequence[StepRow]) -> Text:
    from rich.text import Text

    if not steps:
        return Text("–", style="dim")
    text = Text((">" if any(s.resumed for s in steps) else "") + duration(sum(s.seconds for s in steps)))
    tokens = [s.tokens for s in steps if s.tokens]
    if tokens:
        text.append(f"\n{count(sum(tokens))}", style="dim")
    return text


def _cell(metrics: Metrics | None, field: str, wide: bool) -> Text:
    from rich.text import Text

    if metrics is None:
        return Text("–", style="dim")
    value: float | None = getattr(metrics, field)
    interval = metrics.intervals.get(field)
    shown, bounds = (
        (number(value), number_interval(interval)) if field == "turns" else (percent(value), percent_interval(interval))
    )
    text = Text(shown + ("*" if field == "success" and metrics.judged < metrics.n else ""))
    if bounds:
        text.append((" " if wide else "\n") + bounds, style="dim")
    return text


def _gate(row: IterationRow) -> Text:
    from rich.text import Text

    if row.gate is None:
        return Text("–", style="dim")
    return Text(row.gate.decision, style="green" if row.gate.decision == "promote" else "bold yellow")


def _notes(summary: LineageSummary) -> list[str]:
    notes = []
    if line := summary.base_by_temperature:
        notes.append(f"base, {line}")
    if any(row.ceiling for row in summary.rows):
        notes.append("ceiling: the policy that entered the iteration, with the iteration's experience in context")
    notes += [f"iteration {row.iteration}: {told}" for row in summary.rows if row.check for told in row.check.told]
    for row in summary.rows:
        for condition, metrics in (("without", row.without), ("with", row.with_experience)):
            if metrics is not None and metrics.judged < metrics.n:
                name = "base" if row.iteration == 0 else f"iteration {row.iteration}"
                notes.append(f"* {name}, {condition}: episodes judged: {judged_of(metrics)}")
    return notes
