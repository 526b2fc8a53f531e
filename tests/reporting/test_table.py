"""The tables that a run ends with."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from lineages import checked, lineage, metrics
from rich.console import Console

from evolve_dag.evaluation.gate import GateDecision
from evolve_dag.reporting.summary import IterationRow, LineageSummary
from evolve_dag.reporting.table import print_summary


def shown(summary: LineageSummary, width: int = 130) -> str:
    stream = io.StringIO()
    print_summary(summary, Console(file=stream, width=width))
    return stream.getvalue()


def line(text: str, start: str) -> str:
    return next(found for found in text.splitlines() if found.strip().startswith(start))


def test_results_with_intervals_and_the_gate() -> None:
    text = shown(lineage(declined=(3,)))
    base, third = line(text, "base"), line(text, "3 ")
    assert "28.0% 24.1–31.9" in base
    assert "76.0% 72.3–79.7" in base
    for expected in ("81.0% 77.6–84.4", "85.0%", "5.50 5.28–5.72", "7.0% 4.8–9.2", "3.0% 1.5–4.5", "keep"):
        assert expected in third
    assert "promote" in line(text, "2 ")
    assert "iteration 3: the champion stays: success 81.0%" in text
    assert "7 of 21 steps recomputed" in text


def test_seconds_and_tokens_of_the_steps() -> None:
    text = shown(lineage())
    assert line(text, "trajectories").split() == ["trajectories", *["11.3", "s"] * 3, "33.9", "s"]
    assert "32.4k" in text
    assert "3 min 17 s" in text


@pytest.mark.parametrize("width", [80, 100, 130])
def test_nothing_is_cut_at_the_width_of_a_terminal(width: int) -> None:
    text = shown(lineage(), width)
    assert "…" not in text
    assert max(map(len, text.splitlines())) <= width


@pytest.mark.parametrize("width", [80, 130])
def test_the_ceiling_and_the_base_by_temperature_are_shown_where_they_were_measured(width: int) -> None:
    summary = lineage()
    assert "ceiling" not in shown(summary, width)
    base, *rows = summary.rows
    tried = {0.0: metrics(0.31, 0.1, 4.0, 0.0), 0.3: metrics(0.40, 0.1, 4.0, 0.0), 1.0: metrics(0.28, 0.1, 4.0, 0.0)}
    rows = [replace(row, ceiling=metrics(0.86, 0.1, 4.0, 0.0)) for row in rows]
    text = shown(replace(summary, rows=(replace(base, at_temperature=tried), *rows)), width)
    assert "base, success by temperature: 0 31.0%, 0.3 40.0% (best), 1 28.0%" in text
    assert "86.0%" in line(text, "1 ")
    assert "ceiling: the policy that entered" in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text


def test_a_night_that_taught_nothing_and_what_was_withdrawn_are_told() -> None:
    text = " ".join(shown(checked(lineage())).split())
    assert "iteration 3: nothing is taught: the teacher with experience is below the student without it: -30.0 points" in text
    assert "iteration 3: pocket-001 is withdrawn: the teacher does worse with it: -30.0 points" in text
    assert "iteration 2: attempt 2 of 2: the teacher may teach, without pocket-001: +10.0 points" in text
    assert "iteration 2: pocket-001 is withdrawn by attempt 1: the teacher does worse with it: -30.0 points" in text
    assert "iteration 1: " not in text


def test_unjudged_episodes_are_told() -> None:
    summary = LineageSummary("pocket", (IterationRow(1, without=metrics(0.5, 0.1, 4.0, 0.0, judged=500)),))
    text = shown(summary)
    assert "50.0%*" in text
    assert "* iteration 1, without: episodes judged: 500 of 512 (48.8% of all right)" in text
    assert "steps recomputed" not in text


def test_nothing_judged_is_a_dash() -> None:
    unknown = replace(metrics(0.5, 0.1, 4.0, 0.0, judged=0), success=None, intervals={})
    assert "–*" in shown(LineageSummary("pocket", (IterationRow(1, without=unknown),)))


def test_brackets_in_reasons_are_text() -> None:
    row = IterationRow(1, gate=GateDecision("keep", ("lost [red]task[/red] [/nope]",), {}))
    assert "lost [red]task[/red] [/nope]" in shown(LineageSummary("pocket", (row,)))


def test_many_iterations_still_fit() -> None:
    curve = tuple(0.3 + 0.05 * k for k in range(10))
    text = shown(lineage(without=curve, with_experience=curve[1:], premature=curve), 100)
    assert "iteration 9" in text
    assert "iteration 4 " not in text
    assert "iterations 1 to 4 are counted under 'all' only" in text


@pytest.mark.parametrize(
    ("width", "left_out"),
    [
        (80, ""),
        (66, ""),
        (65, "iteration 1 is counted"),
        (50, "iterations 1 to 2 are counted"),
        (30, "iterations 1 to 3 are counted"),
    ],
)
def test_the_table_of_steps_shows_as_many_iterations_as_fit(width: int, left_out: str) -> None:
    text = shown(lineage(), width)
    table = text[text.index("seconds and tokens per step") :]
    assert "…" not in table
    assert "trajectories" in table
    assert "33.9 s" in table
    assert left_out in " ".join(table.split())
    assert bool(left_out) is ("counted under" in " ".join(table.split()))


def test_work_of_a_killed_process_is_marked() -> None:
    summary = lineage()
    row = summary.rows[1]
    resumed = replace(row, steps=(replace(row.steps[1], resumed=True),))
    text = shown(LineageSummary("pocket", (resumed,)))
    assert ">11.3 s" in text
    assert "resumed after a kill" in text
