"""The report's figures as plain plotly specifications, made of the parts in :mod:`evolve_dag.reporting.drawing`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from evolve_dag.evaluation.metrics import Metrics
from evolve_dag.lineage import audit
from evolve_dag.reporting.drawing import Figure, Point, axes, bar, bars, line, over_iterations, title
from evolve_dag.reporting.summary import EDITS, STAYS, IterationRow, LineageSummary, step_names
from evolve_dag.steps.base import STEP_ORDER

Condition = Literal["without", "with_experience", "greedy", "ceiling"]

CONDITIONS: dict[Condition, str] = {
    "without": "without experience",
    "with_experience": "with experience in context",
    "greedy": "greedy, without experience",
    "ceiling": "ceiling",
}

INTERNALIZED: tuple[tuple[str, Callable[[audit.Internalized], float | None]], ...] = (
    ("before", lambda one: one.before),
    ("after", lambda one: one.after),
    ("now", lambda one: one.now),
)
"""Bars of an item: the policy that entered the iteration, its candidate, the policy that the lineage holds now."""


def success(summaries: Sequence[LineageSummary], conditions: Sequence[Condition]) -> Figure:
    """Held-out success over iterations with 95% bands, one line per experiment and condition."""
    lines = [
        _metric_line(summary, condition, "success", scale=100, name=_name(summary, condition, summaries, conditions), slot=slot)
        for slot, (summary, condition) in enumerate((s, c) for s in summaries for c in conditions)
    ]
    return over_iterations(lines, _last(summaries), range_=(0, 100), suffix="%")


def behaviour(summaries: Sequence[LineageSummary], field: str, *, share: bool) -> Figure:
    """One metric without experience over iterations (``turns``, ``premature``, ...), one line per experiment."""
    scale = 100 if share else 1
    lines = [
        _metric_line(summary, "without", field, scale=scale, name=summary.experiment, slot=slot)
        for slot, summary in enumerate(summaries)
    ]
    return over_iterations(lines, _last(summaries), suffix="%" if share else "", from_zero=True)


def endings(summary: LineageSummary) -> Figure:
    """How the episodes end, as shares that add up to 100%: after reading (answered, where there are no tools), ended by the
    environment, premature, forced, unanswered, failed."""
    rows = [row for row in summary.rows if row.without is not None and row.without.n]
    found = [row.without for row in rows if row.without]
    # With tools whoever answers before any call is premature; without them nobody is.
    without_tools = any((m.no_tool or 0.0) > (m.premature or 0.0) for m in found)
    by_environment: list[tuple[str, Callable[[Metrics], float]]] = [
        ("ended, solved", lambda m: m.ended_solved or 0.0),
        ("ended, not solved", lambda m: (m.ended or 0.0) - (m.ended_solved or 0.0)),
    ]
    kinds: list[tuple[str, Callable[[Metrics], float]]] = [
        ("answered" if without_tools else "after reading", _grounded),
        *(by_environment if any(m.ended for m in found) else []),
        ("premature", lambda m: m.premature or 0.0),
        ("forced", lambda m: m.forced or 0.0),
        ("unanswered", lambda m: m.unanswered or 0.0),
        ("failed", lambda m: m.failed or 0.0),
    ]
    data = [
        bar([_label(row) for row in rows], [100 * share(metrics) for metrics in found], name, slot, "%{y:.1f}%")
        for slot, (name, share) in enumerate(kinds)
    ]
    return bars(data, range_=(0, 100), suffix="%")


def breakdown(summary: LineageSummary, key: str) -> Figure:
    """Success without experience over iterations, one line per value of a metadata key (``hops``)."""
    values = sorted({value for row in summary.rows if row.without for value in row.without.by.get(key, {})})
    lines = []
    for slot, value in enumerate(values):
        points = []
        for row in summary.rows:
            part = row.without.by.get(key, {}).get(value) if row.without else None
            if part is not None and part.success is not None:
                low, high = part.interval or (part.success, part.success)
                points.append((row.iteration, 100 * part.success, 100 * low, 100 * high, f"{part.judged} judged"))
        lines.append(line(points, f"{key} {value}", slot))
    return over_iterations(lines, _last([summary]), range_=(0, 100), suffix="%")


def pool_growth(summaries: Sequence[LineageSummary]) -> Figure:
    """Items in the pool over iterations."""
    lines = []
    for slot, summary in enumerate(summaries):
        points = [(r.iteration, float(r.pool_size), None, None, "") for r in summary.rows if r.pool_size is not None]
        lines.append(line(points, summary.experiment, slot))
    return over_iterations(lines, _last(summaries), "items", from_zero=True)


def pool_edits(summary: LineageSummary) -> Figure:
    """Pool edits of each iteration by kind; deletions and merges point down."""
    rows = [row for row in summary.iterations if row.edits]
    data = []
    for slot, name in enumerate(EDITS):
        sign = -1 if name in ("deleted", "merged", "graduated", "withdrawn") else 1
        counts = [sign * row.edits.get(name, 0) for row in rows]
        data.append(bar([_label(row) for row in rows], counts, name, slot, f"%{{y}} {name}"))
    return bars(data, "edits")


def locality(summary: LineageSummary) -> Figure:
    """Shares of the pool's items that hold trajectory detail or a strategy, over iterations."""
    names = sorted({name for row in summary.iterations for name in row.locality})
    lines = []
    for slot, name in enumerate(names):
        points = [(r.iteration, 100 * r.locality[name], None, None, "") for r in summary.iterations if name in r.locality]
        lines.append(line(points, name.replace("_", " "), slot))
    return over_iterations(lines, _last([summary]), range_=(0, 100), suffix="%")


def training(summary: LineageSummary) -> Figure:
    """Loss over optimizer steps, one line per iteration."""
    data = []
    for slot, row in enumerate(row for row in summary.iterations if row.curve):
        steps = [record.get("step", float(n)) for n, record in enumerate(row.curve)]
        losses = [record["loss"] for record in row.curve]
        data.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": steps,
                "y": losses,
                "name": f"iteration {row.iteration}",
                "line": {"width": 1.8},
                "hovertemplate": "step %{x}: %{y:.4f}<extra>%{fullData.name}</extra>",
                "meta": {"slot": slot, "paint": "line"},
            }
        )
    layout = axes("loss, nats per action token", from_zero=True)
    layout["xaxis"] |= {"title": title("optimizer step"), "rangemode": "tozero"}
    return {"data": data, "layout": layout}


def internalized(summary: LineageSummary) -> Figure:
    """Teacher to student at each item's own steps, before and after each iteration, side by side."""
    shown = [one for row in summary.iterations for one in row.internalized if one.item not in (audit.ALL, audit.NONE)]
    places = [[f"iteration {one.iteration}" for one in shown], [one.item for one in shown]]
    data = []
    for slot, (name, value) in enumerate(INTERNALIZED):
        values = [value(one) for one in shown]
        if any(v is not None for v in values):
            texts = [f"{one.steps} steps" for one in shown]
            data.append(
                {
                    "type": "bar",
                    "x": places,
                    "y": values,
                    "name": name,
                    "customdata": texts,
                    "hovertemplate": "%{y:.4f} nats, %{customdata}<extra>%{fullData.name}</extra>",
                    "meta": {"slot": (7, 0, 2)[slot], "paint": "bar"},  # grey for what was there before
                }
            )
    layout = axes("nats per token", from_zero=True)
    layout["xaxis"] |= {"type": "multicategory"}
    layout |= {"barmode": "group", "bargap": 0.25}
    return {"data": data, "layout": layout}


def inside_now(summary: LineageSummary) -> Figure:
    """What of each item is in the present policy, at the learned steps of the iteration that first taught it; most first."""
    first: dict[str, audit.Internalized] = {}
    for row in summary.iterations:
        for one in row.internalized:
            if one.item not in (audit.ALL, audit.NONE) and one.share_now is not None:
                first.setdefault(one.item, one)
    rows = sorted(first.values(), key=lambda one: -(one.share_now or 0.0))
    shares = [100 * (one.share_now or 0.0) for one in rows]
    bounds = [one.interval_now or (one.share_now or 0.0, one.share_now or 0.0) for one in rows]
    data = [
        {
            "type": "bar",
            "x": [f"{one.item} {one.text.split(':')[0]}" if ":" in one.text[:24] else one.item for one in rows],
            "y": shares,
            "error_y": {
                "type": "data",
                "symmetric": False,
                "array": [100 * high - share for share, (_, high) in zip(shares, bounds, strict=True)],
                "arrayminus": [share - 100 * low for share, (low, _) in zip(shares, bounds, strict=True)],
                "thickness": 1.4,
            },
            "name": "inside now",
            "customdata": [f"first taught in iteration {one.iteration}, {one.steps} steps" for one in rows],
            "hovertemplate": "%{y:.0f}%, %{customdata}<extra>%{x}</extra>",
            "meta": {"slot": 0, "paint": "bar"},
        }
    ]
    layout = axes("", suffix="%", from_zero=True)
    layout |= {"bargap": 0.4, "showlegend": False}
    layout["xaxis"] |= {"type": "category"}
    return {"data": data if rows else [], "layout": layout}


def inside(summaries: Sequence[LineageSummary]) -> Figure:
    """Share of the divergence of all learned steps that each iteration took over, one line per experiment."""
    lines = []
    for slot, summary in enumerate(summaries):
        rows = [one for row in summary.iterations for one in row.internalized if one.item == audit.ALL]
        points = [_inside_point(one) for one in rows if one.share is not None]
        lines.append(line(points, summary.experiment, slot))
    figure = over_iterations([one for one in lines if one[-1]["x"]], _last(summaries), suffix="%", from_zero=True)
    figure["layout"]["xaxis"]["range"][0] = 0.5  # the base policy has taken nothing over yet
    return figure


def over_seeds(groups: Mapping[str, Sequence[LineageSummary]], condition: Condition) -> Figure:
    """Mean success of several seeds of one experiment; the band reaches from the lowest to the highest seed. Iterations that
    one of them lacks are left out: a mean over other seeds at every iteration would move for that reason alone.

    Args:
        groups: experiment -> its lineages. Those with one lineage are left out.
    """
    lines = []
    for slot, (name, members) in enumerate(groups.items()):
        measured = [{point[0]: point[1] for point in _points(summary, condition, "success", 100)} for summary in members]
        measured = [own for own in measured if own]
        common = sorted(set.intersection(*map(set, measured))) if len(measured) > 1 else []
        values = {k: [own[k] for own in measured] for k in common}
        points: list[Point] = [
            (k, sum(found) / len(found), min(found), max(found), f"{len(found)} seeds") for k, found in values.items()
        ]
        if len(members) > 1:
            lines.append(line(points, name, slot))
    drawn = over_iterations(lines, _last([s for members in groups.values() for s in members]), range_=(0, 100), suffix="%")
    drawn["layout"]["showlegend"] = True
    return drawn


def cost(summary: LineageSummary) -> Figure:
    """US dollars of the steps of each iteration, stacked; empty where no call has a known price."""
    return _per_step(summary, "US dollars", lambda step: step.cost or 0.0, "$%{y:.4f}")


def seconds(summary: LineageSummary) -> Figure:
    """Wall time of the steps of each iteration, stacked."""
    return _per_step(summary, "seconds", lambda step: step.seconds, "%{y:.1f} s")


def tokens(summary: LineageSummary) -> Figure:
    """Sampled tokens of the steps of each iteration, stacked."""
    return _per_step(summary, "tokens", lambda step: float(step.tokens or 0), "%{y:.3s} tokens")


# -- inside


def _inside_point(one: audit.Internalized) -> Point:
    share = one.share or 0.0
    low, high = one.interval or (share, share)
    return (one.iteration, 100 * share, 100 * low, 100 * high, f"{one.steps} steps")


def _points(summary: LineageSummary, condition: Condition, field: str, scale: float) -> list[Point]:
    points: list[Point] = []
    for row in summary.rows:
        metrics: Metrics | None = getattr(row, condition)
        value = getattr(metrics, field) if metrics is not None else None
        if metrics is None or value is None:
            continue
        low, high = metrics.intervals.get(field) or (value, value)
        remark = f"{metrics.judged} of {metrics.n} judged" if field == "success" else f"{metrics.n} episodes"
        points.append((row.iteration, scale * value, scale * low, scale * high, remark))
    return points


def _metric_line(
    summary: LineageSummary, condition: Condition, field: str, *, scale: float, name: str, slot: int
) -> list[dict[str, Any]]:
    return line(
        _points(summary, condition, field, scale),
        name,
        slot,
        dash={"with_experience": "dash", "greedy": "dot", "ceiling": "dot"}.get(condition, "solid"),
        declined=_declined(summary),
    )


def _per_step(summary: LineageSummary, heading: str, value: Callable[[Any], float], shown: str) -> Figure:
    rows = summary.iterations
    data = []
    for name in step_names(rows):
        values = [sum(value(step) for step in row.steps if step.name == name) for row in rows]
        slot = STEP_ORDER.index(name) if name in STEP_ORDER else len(STEP_ORDER)
        data.append(bar([_label(row) for row in rows], values, name, slot, shown))
    return bars(data, heading)


def _grounded(metrics: Metrics) -> float:
    others = (metrics.ended, metrics.premature, metrics.forced, metrics.unanswered, metrics.failed)
    return max(0.0, 1.0 - sum(share or 0.0 for share in others))


def _label(row: IterationRow) -> str:
    return "base" if row.iteration == 0 else str(row.iteration)


def _declined(summary: LineageSummary) -> frozenset[int]:
    return frozenset(row.iteration for row in summary.rows if row.gate is not None and row.gate.decision in STAYS)


def _name(
    summary: LineageSummary, condition: Condition, summaries: Sequence[LineageSummary], conditions: Sequence[Condition]
) -> str:
    if len(summaries) == 1:
        return CONDITIONS[condition]
    return summary.experiment if len(conditions) == 1 else f"{summary.experiment}, {CONDITIONS[condition]}"


def _last(summaries: Sequence[LineageSummary]) -> int:
    return max((row.iteration for summary in summaries for row in summary.rows), default=0)
