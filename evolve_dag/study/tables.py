"""A study's numbers as Markdown, CSV and JSON: the same bytes for the same results, so that they can be versioned."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve_dag.reporting.summary import count, mean_count, percent, percent_interval
from evolve_dag.store.disk import write_atomic
from evolve_dag.store.faults import disk_error
from evolve_dag.study import figures
from evolve_dag.study.findings import QUESTIONS, Contrast, ContrastKind, Findings, numbered
from evolve_dag.study.published import SOURCE, compared, points
from evolve_dag.study.statistics import Estimate, mean
from evolve_dag.study.what_differs import Change, as_stated, what_differs

if TYPE_CHECKING:
    from rich.console import Console

METHOD = (
    "Success is on held-out tasks, which decide nothing; actions are sampled. It is that of the policy that the loop holds "
    "once the gate has decided: the night's candidate where it was promoted, else the champion that stayed or came back, or "
    "the base policy, by its own scores (with experience only where its pool was scored as it is now). "
    "Every seed counts alike. Intervals are 95%. "
    "The first is over tasks, resampled within each seed, or for all seeds together where they are asked the same ones: it "
    "holds for these seeds. The second is over seeds, Student's t over their means: it holds for another seed as well, and is "
    "wide with three of them. Differences are paired by seed and task."
)
HOLLOW = "Hollow points, and ○ in tables: nights whose candidate the gate declined in at least one seed."
DIFFERS = (
    "Every key that decides results and in which an arm differs from one that it is contrasted with, found by comparing the "
    "experiments as they were resolved. Said in: where the arm's entry states it, its `set` or its file. What is *not said*, "
    "and what a preset of the regime brings along (`regime: off_policy` sets source, divergence and rejection anew), is easily "
    "overlooked: the contrast may be owed to it. What is scored besides (other temperatures, ceiling, greedy) changes no other "
    "number and is not listed."
)
CONDITIONS: Mapping[str, str] = {
    "held": "held",
    "held_with": "held, with experience",
    "held_greedy": "held, greedy",
    "without": "candidate",
    "with": "candidate, with experience",
    "ceiling": "ceiling of the night",
    "greedy": "candidate, greedy",
}
"""Condition -> how a reader is told."""
A_PART = "**A part of the study**: the file asks for more, or for something else, than the command did."
BEST = (
    "The best of several is chosen on one half of the tasks and measured on the other, both ways, and chosen anew in every "
    "resample: so the luck of the one that was chosen is not taken for a difference. The naive figure chooses and measures on "
    "all tasks, and is too low by that luck."
)
ITSELF = "it is its own best"
"""In place of a difference, where the best on all tasks is the one that is asked about."""


def write(findings: Findings, folder: Path) -> list[Path]:
    """``study.md``, ``study.json``, ``success.csv``, ``contrasts.csv``, ``costs.csv``, ``breakdown.csv``, and pictures.

    Raises:
        StoreError: the folder cannot be written.
    """
    from evolve_dag.reporting.pictures import draw

    texts = {
        "study.md": markdown(findings),
        "study.json": json.dumps(as_json(findings), indent=1, allow_nan=False) + "\n",
        "success.csv": _csv(_success_rows(findings)),
        "contrasts.csv": _csv(_contrast_rows(findings)),
        "costs.csv": _csv(_cost_rows(findings)),
        "breakdown.csv": _csv(_breakdown_rows(findings)),
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            write_atomic(folder / name, text.encode(), durable=False)
        drawn = [
            draw(figure, title, folder / f"{name}.{kind}")
            for name, (title, figure) in _pictures(findings).items()
            for kind in ("svg", "png")
            if figure["data"]
        ]
    except OSError as error:
        raise disk_error(error, folder) from error
    return [*(folder / name for name in texts), *drawn]


def _pictures(findings: Findings) -> dict[str, tuple[str, figures.Figure]]:
    study = findings.results.study
    return {
        "success": (f"Held-out success, {study.leading}", figures.success(findings, study.leading)),
        "arms": ("Held-out success without experience, every arm", figures.all_arms(findings, study.arms)),
        "sampled": ("Success over tokens sampled to learn from", figures.against_tokens(findings, "sampled")),
    }


def print_findings(findings: Findings, console: Console) -> None:
    """Success of what each arm holds, without experience, in the terminal."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    study = findings.results.study
    last = max(map(findings.last, study.arms), default=0)
    part = ", a part of it" if study.part is not None else ""
    table = Table(
        title=f"study {study.name}{part}: held-out success of what is held, without experience",
        box=box.SIMPLE_HEAD,
        title_justify="left",
    )
    table.add_column("arm", no_wrap=True)
    shown = _that_fit(last, console.width - max(map(len, study.arms)))
    for heading in ("seeds", *(str(k) if k else "base" for k in shown), "last, over tasks"):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in study.arms:
        points = [findings.point(arm, k) for k in shown]
        end = findings.point(arm, findings.last(arm))
        cells = [
            "–" if point is None else f"{100 * point.success.value:.1f}{_star(findings, arm, k)}"
            for k, point in zip(shown, points, strict=True)
        ]
        around = "–" if end is None else percent_interval(end.success.tasks)
        table.add_row(Text(arm), str(end.seeds) if end else "0", *cells, around)
    console.print(table)
    if told := other_seeds(findings):
        console.print(Text(told, style="yellow"))
    for told in unjudged(findings, conditions=["held"]):
        console.print(Text(told, style="dim"))
    if missing := findings.results.missing:
        console.print(Text(f"not there yet: {sum(missing.values())} iterations ({_listed(missing)})", style="yellow"))


def _that_fit(last: int, width: int) -> list[int]:
    """Iterations of a table of ``width`` columns beside the arms' names: the base policy, the last, and between them every one,
    every second, ... ."""
    most = max(2, (width - 37) // 8)  # beside "seeds" and an interval; a figure takes eight with its margins
    every = next(n for n in range(1, last + 2) if -(-last // n) + 1 <= most or n > last)
    return [0, *sorted(range(last, 0, -every))]


# -- Markdown


def markdown(findings: Findings) -> str:
    """The report as Markdown."""
    study = findings.results.study
    seeds = ", ".join(str(seed) for seed in dict.fromkeys(cell.seed for cell in study.cells))
    lines = [f"# Study {study.name}", ""]
    if study.settings.description:
        lines += [study.settings.description, ""]
    lines += [f"{len(study.arms)} arms, seeds {seeds}. Made by `{study.command}`.", ""]
    if study.part is not None:
        lines += [A_PART, ""]
    if findings.results.missing:
        missing = sum(findings.results.missing.values())
        lines += [f"**Not finished**: {missing} iterations are not there yet ({_listed(findings.results.missing)}).", ""]
    lines += [METHOD, ""]
    lines += ["## Success over iterations", "", HOLLOW, "", *_curves(findings)]
    lines += ["", told] if (told := other_seeds(findings)) else []
    lines += [line for told in unjudged(findings) for line in ("", told.replace("*", r"\*"))]
    lines += ["", "## What differs", "", DIFFERS, "", *_what_differs(findings)]
    lines += ["", "## Contrasts", "", BEST, ""]
    for question, told in QUESTIONS.items():
        asked = shown_contrasts(findings, question)
        if asked:
            lines += [f"### {_heading(told)}", "", *_contrasts(findings, asked), ""]
    lines += ["## Tokens, pool and gate", "", *_costs(findings), ""]
    for fact in dict.fromkeys(part.fact for part in findings.parts):
        lines += [f"## Success by {_one_line(fact)}, last iteration, without experience", "", *_by_fact(findings, fact), ""]
    lines += ["## The paper's figures beside ours", "", f"Published figures: {SOURCE}, on another world and another model.", ""]
    lines += _table(["finding", "paper", "here"], [[f.claim, f.paper, f.here or "no arm"] for f in compared(findings)])
    return "\n".join(lines) + "\n"


def _heading(text: str) -> str:
    return text[0].upper() + text[1:]


def _listed(missing: Mapping[str, int]) -> str:
    told = [f"{name}: {number}" for name, number in missing.items()]
    return ", ".join(told[:8]) + (f" and {len(told) - 8} more" if len(told) > 8 else "")


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(map(_cell, row))} |" for row in (heads, *rows)]
    return [lines[0], "|" + "---|" * len(heads), *lines[1:]]


def _cell(text: str) -> str:
    """One line, in which a bar is text: facts of tasks and values of keys may hold anything."""
    return _one_line(text).replace("|", r"\|")


def _one_line(text: str) -> str:
    return " ".join(text.splitlines())


def shown(estimate: Estimate | None) -> str:
    """``34.4% (31.0–37.9; seeds 20.1–48.7)``."""
    if estimate is None:
        return "–"
    seeds = "" if estimate.seeds is None else f"; seeds {percent_interval(estimate.seeds)}"
    return f"{percent(estimate.value)} ({percent_interval(estimate.tasks)}{seeds})"


def _curves(findings: Findings) -> list[str]:
    study = findings.results.study
    last = max(map(findings.last, study.arms), default=0)
    rows = []
    for arm in study.arms:
        for condition in findings.conditions(arm):
            cells = [at(findings, arm, k, condition) for k in range(last + 1)]
            end = findings.point(arm, findings.last(arm), condition)
            rows.append(
                [arm, CONDITIONS[condition], str(len(findings.seeds(arm))), *cells, shown(end.success if end else None)]
            )
    heads = ["arm", "condition", "seeds", "base", *map(str, range(1, last + 1)), "last, with intervals"]
    return _table(heads, rows)


def at(findings: Findings, arm: str, iteration: int, condition: str = "held") -> str:
    """``34.4%* ○ (2 seeds)``: success, whether episodes were not judged, whether a candidate was declined, and how many seeds
    know it where that is not all."""
    point = findings.point(arm, iteration, condition)
    if point is None:
        return "–"
    declined = " ○" if iteration in findings.declined(arm) else ""
    some = f" ({point.seeds} seed{'s' if point.seeds > 1 else ''})" if point.seeds < len(findings.seeds(arm)) else ""
    return f"{percent(point.success.value)}{_star(findings, arm, iteration, condition)}{declined}{some}"


def other_seeds(findings: Findings) -> str:
    """Which arms' means must not be laid beside the leading arm's, being over other seeds; '' where all are over the same."""
    arms, leading = findings.results.study.arms, findings.results.study.leading
    told = [name for arm in arms if (name := findings.beside(arm)) != arm]
    if not told:
        return ""
    return (
        f"Over other seeds than {leading} ({numbered(findings.seeds(leading))}): {'; '.join(told)}. Means and curves differ by "
        "their seeds as well; contrasts do not: they are over the seeds that both sides have."
    )


def unjudged(findings: Findings, conditions: Sequence[str] = tuple(CONDITIONS)) -> list[str]:
    """``* b, held: episodes judged: 288 of 360 in iteration 1``: what is not judged must not make an arm look better."""
    told = []
    for arm in findings.results.study.arms:
        for condition in (one for one in findings.conditions(arm) if one in conditions):
            counts = {k: findings.judged(arm, k, condition) for k in range(findings.last(arm) + 1)}
            lacking = [
                f"{judged} of {episodes} in {f'iteration {k}' if k else 'base'}"
                for k, (judged, episodes) in counts.items()
                if judged < episodes
            ]
            told += [f"* {arm}, {CONDITIONS[condition]}: episodes judged: {', '.join(lacking)}"] if lacking else []
    return told


def _star(findings: Findings, arm: str, iteration: int, condition: str = "held") -> str:
    """Marks a figure that lacks episodes, see :func:`unjudged`."""
    judged, episodes = findings.judged(arm, iteration, condition)
    return "*" if judged < episodes else ""


def said(findings: Findings, change: Change) -> str:
    """Where the arm's entry states a key that differs; '' where it does not."""
    config = Path(findings.results.study.settings.arms[change.arm].config).name
    by_part = f"the other {change.key.partition('.')[0]}"
    return {"set": "set", "config": config, "preset": "a preset of the regime", "part": by_part, "": ""}[change.said]


def _what_differs(findings: Findings) -> list[str]:
    rows = [
        [c.arm, c.reference, c.key, as_stated(c.here), as_stated(c.there), said(findings, c) or "**not said**"]
        for c in what_differs(findings.results.study)
    ]
    return _table(["arm", "against", "key", "here", "there", "said in"], rows) if rows else ["Nothing."]


def shown_contrasts(findings: Findings, question: ContrastKind) -> list[Contrast]:
    """Of questions that are asked at every iteration of every arm, some: all of the leading arm, the last of the others."""
    asked = findings.asked(question)
    last = {(c.arm, c.against if question == "arm" else ""): c for c in asked}.values()
    return [c for c in asked if c.arm == findings.results.study.leading or c in last]


def of_seeds(findings: Findings, contrast: Contrast) -> str:
    """`` (2 of 5 seeds)`` where a contrast is over fewer seeds than its arm; '' where it is over all of them."""
    known, own = len(contrast.difference.by_seed), len(findings.seeds(contrast.arm))
    return f" ({known} of {own} seeds)" if known < own else ""


def _contrasts(findings: Findings, asked: Sequence[Contrast]) -> list[str]:
    heads = ["arm", "iteration", "against", "difference (over tasks; over seeds)", "verdict over tasks"]
    naive = any(c.naive for c in asked)
    rows = []
    for c in asked:
        told = [ITSELF, "–", "–"] if c.itself else [points(c.difference), c.difference.verdict, points(c.naive)]
        rows.append([c.arm, str(c.iteration), f"{c.against}{of_seeds(findings, c)}", *told[: 3 if naive else 2]])
    return _table([*heads, *(["naive"] if naive else [])], rows)


def _costs(findings: Findings) -> list[str]:
    rows = []
    for arm in findings.results.study.arms:
        own = [cost for cost in findings.costs if cost.arm == arm]
        if own:
            kept = ", ".join(f"{c.kept} in {c.iteration}" for c in own if c.kept) or "none"
            items = ", ".join(mean_count(c.items) for c in own)
            rows.append(
                [arm, str(own[-1].iteration), count(round(own[-1].sampled)), count(round(own[-1].trained)), items, kept]
            )
    return _table(["arm", "iterations", "tokens sampled", "tokens trained", "items in the pool", "declined by the gate"], rows)


def _by_fact(findings: Findings, fact: str) -> list[str]:
    values = sorted({part.value for part in findings.parts if part.fact == fact})
    rows = []
    for arm in findings.results.study.arms:
        own = {p.value: p.success for p in findings.parts if (p.arm, p.fact, p.iteration) == (arm, fact, findings.last(arm))}
        if own:
            rows.append(
                [arm, *(f"{percent(own[v].value)} ({percent_interval(own[v].tasks)})" if v in own else "–" for v in values)]
            )
    return _table(["arm", *(f"{fact} {value}" for value in values)], rows)


# -- CSV and JSON


def _csv(rows: Iterator[Mapping[str, Any]]) -> str:
    listed = list(rows)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(dict.fromkeys(key for row in listed for key in row)), lineterminator="\n")
    writer.writeheader()
    for row in listed:
        writer.writerow({key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()})
    return stream.getvalue()


def _numbers(estimate: Estimate, name: str) -> dict[str, Any]:
    low, high = estimate.seeds or (None, None)
    return {
        name: estimate.value,
        "tasks_low": estimate.tasks[0],
        "tasks_high": estimate.tasks[1],
        "seeds_low": low,
        "seeds_high": high,
        "tasks": estimate.n,
    }


def _success_rows(findings: Findings) -> Iterator[dict[str, Any]]:
    """Every seed, and all of them together (``seed`` empty), by one rule: tasks count alike, however many of a task's episodes
    were judged. Behaviour is over episodes."""
    for p in findings.points:
        where = {"arm": p.arm, "iteration": p.iteration, "condition": p.condition}
        yield {**where, "seed": "", **_numbers(p.success, "success")}
    for row in findings.results.rows:
        for condition, metrics in row.metrics.items():
            success = mean({row.seed: row.rewards.get(condition, {})})
            value, (low, high) = (None, (None, None)) if success is None else (success.value, success.tasks)
            yield {
                "arm": row.arm, "iteration": row.iteration, "condition": condition, "seed": row.seed,
                "success": value, "tasks_low": low, "tasks_high": high, "tasks": metrics.tasks,
                "judged": metrics.judged, "episodes": metrics.n, "premature": metrics.premature, "no_tool": metrics.no_tool,
                "unanswered": metrics.unanswered, "failed": metrics.failed, "turns": metrics.turns,
            }  # fmt: skip


def _contrast_rows(findings: Findings) -> Iterator[dict[str, Any]]:
    for c in findings.contrasts:
        where = {"question": c.question, "arm": c.arm, "iteration": c.iteration, "against": c.against}
        naive = {} if c.naive is None else {"naive": c.naive.value}
        seeds = {f"seed_{seed}": value for seed, value in c.difference.by_seed.items()}
        numbers = {**_numbers(c.difference, "difference"), "seeds": len(seeds)}
        yield {**where, **numbers, "verdict": c.difference.verdict, **naive, **seeds}


def _cost_rows(findings: Findings) -> Iterator[dict[str, Any]]:
    """What each cell spent in each iteration."""
    for row in findings.results.rows:
        if row.iteration:
            yield {
                "arm": row.arm, "seed": row.seed, "iteration": row.iteration, "tokens_sampled": row.sampled,
                "tokens_trained": row.trained, "items": row.items, "decision": row.decision, "champion": row.champion,
                "seconds": round(row.seconds, 1),
            }  # fmt: skip


def _breakdown_rows(findings: Findings) -> Iterator[dict[str, Any]]:
    for p in findings.parts:
        yield {"arm": p.arm, "iteration": p.iteration, "fact": p.fact, "value": p.value, **_numbers(p.success, "success")}


def as_json(findings: Findings) -> dict[str, Any]:
    """Everything, as JSON values."""
    results = findings.results
    return {
        "study": results.study.name,
        "description": results.study.settings.description,
        "command": results.study.command,
        "part": results.study.part is not None,
        "reference": results.study.reference,
        "arms": {
            arm: {"seeds": [cell.seed for cell in results.study.of_arm(arm)], "iterations": list(results.iterations(arm))}
            for arm in results.study.arms
        },
        "what_differs": [asdict(change) for change in what_differs(results.study)],
        "missing": dict(results.missing),
        "success": list(_success_rows(findings)),
        "contrasts": list(_contrast_rows(findings)),
        "costs": list(_cost_rows(findings)),
        "breakdown": list(_breakdown_rows(findings)),
        "paper": [{"claim": f.claim, "paper": f.paper, "here": f.here} for f in compared(findings)],
    }
