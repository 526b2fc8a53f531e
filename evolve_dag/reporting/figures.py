"""The report's figures as plain plotly specifications.

A specification says what is drawn, not in which colour: every trace carries ``meta.slot`` (which colour of the palette) and
``meta.paint`` (line, band, bar), and the page paints it for light or dark. Plotly itself is not needed here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from evolve_dag.evaluation.metrics import Metrics
from evolve_dag.lineage import audit
from evolve_dag.reporting.summary import EDITS, STAYS, IterationRow, LineageSummary, step_names
from evolve_dag.steps.base import STEP_ORDER

Figure = dict[str, Any]
"""A plotly figure: ``{"data": [...], "layout": {...}}``, JSON values only."""

Condition = Literal["without", "with_experience", "greedy"]

CONDITIONS: dict[Condition, str] = {
    "without": "without experience",
    "with_experience": "with experience in context",
    "greedy": "greedy, without experience",
}

INTERNALIZED: tuple[tuple[str, Callable[[audit.Internalized], float | None]], ...] = (
    ("before", lambda one: one.before),
    ("after", lambda one: one.after),
    ("now", lambda one: one.now),
)
"""Bars of an item: the policy that entered the iteration, its candidate, the policy that the lineage holds now."""

NEUTRAL = ("#2f7ed8", "#d9731a", "#1f9d72", "#a45cc4", "#b58a14", "#d14d7a", "#3a9bb5", "#7d8590")
"""Mid tones that can be read on white and on near-black; the SVG stands on pages that we do not paint."""


def success(summaries: Sequence[LineageSummary], conditions: Sequence[Condition]) -> Figure:
    """Held-out success over iterations with 95% bands, one line per experiment and condition."""
    lines = [
        _metric_line(summary, condition, "success", scale=100, name=_name(summary, condition, summaries, conditions), slot=slot)
        for slot, (summary, condition) in enumerate((s, c) for s in summaries for c in conditions)
    ]
    return _over_iterations(lines, summaries, range_=(0, 100), suffix="%")


def behaviour(summaries: Sequence[LineageSummary], field: str, *, share: bool) -> Figure:
    """One metric without experience over iterations (``turns``, ``premature``, ...), one line per experiment."""
    scale = 100 if share else 1
    lines = [
        _metric_line(summary, "without", field, scale=scale, name=summary.experiment, slot=slot)
        for slot, summary in enumerate(summaries)
    ]
    return _over_iterations(lines, summaries, suffix="%" if share else "", from_zero=True)


def endings(summary: LineageSummary) -> Figure:
    """How the episodes end, as shares that add up to 100%: after reading, premature, forced, unanswered, failed."""
    rows = [row for row in summary.rows if row.without is not None and row.without.n]
    kinds: list[tuple[str, Callable[[Metrics], float]]] = [
        ("after reading", _grounded),
        ("premature", lambda m: m.premature or 0.0),
        ("forced", lambda m: m.forced or 0.0),
        ("unanswered", lambda m: m.unanswered or 0.0),
        ("failed", lambda m: m.failed or 0.0),
    ]
    data = [
        _bar([_label(row) for row in rows], [100 * share(row.without) for row in rows if row.without], name, slot, "%{y:.1f}%")
        for slot, (name, share) in enumerate(kinds)
    ]
    return _bars(data, range_=(0, 100), suffix="%")


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
        lines.append(_line(points, f"{key} {value}", slot))
    return _over_iterations(lines, [summary], range_=(0, 100), suffix="%")


def pool_growth(summaries: Sequence[LineageSummary]) -> Figure:
    """Items in the pool over iterations."""
    lines = []
    for slot, summary in enumerate(summaries):
        points = [(r.iteration, float(r.pool_size), None, None, "") for r in summary.rows if r.pool_size is not None]
        lines.append(_line(points, summary.experiment, slot))
    return _over_iterations(lines, summaries, "items", from_zero=True)


def pool_edits(summary: LineageSummary) -> Figure:
    """Pool edits of each iteration by kind; deletions and merges point down."""
    rows = [row for row in summary.iterations if row.edits]
    data = []
    for slot, name in enumerate(EDITS):
        sign = -1 if name in ("deleted", "merged") else 1
        counts = [sign * row.edits.get(name, 0) for row in rows]
        data.append(_bar([_label(row) for row in rows], counts, name, slot, f"%{{y}} {name}"))
    return _bars(data, "edits")


def locality(summary: LineageSummary) -> Figure:
    """Shares of the pool's items that hold trajectory detail or a strategy, over iterations."""
    names = sorted({name for row in summary.iterations for name in row.locality})
    lines = []
    for slot, name in enumerate(names):
        points = [(r.iteration, 100 * r.locality[name], None, None, "") for r in summary.iterations if name in r.locality]
        lines.append(_line(points, name.replace("_", " "), slot))
    return _over_iterations(lines, [summary], range_=(0, 100), suffix="%")


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
    layout = _layout("loss, nats per action token", from_zero=True)
    layout["xaxis"] |= {"title": _title("optimizer step"), "rangemode": "tozero"}
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
                    "meta": {"slot": (7, 0, 2)[slot], "paint": "bar"},
                }
            )
    layout = _layout("nats per token", from_zero=True)
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
    layout = _layout("", suffix="%", from_zero=True)
    layout |= {"bargap": 0.4, "showlegend": False}
    layout["xaxis"] |= {"type": "category"}
    return {"data": data if rows else [], "layout": layout}


def inside(summaries: Sequence[LineageSummary]) -> Figure:
    """Share of the divergence of all learned steps that each iteration took over, one line per experiment."""
    lines = []
    for slot, summary in enumerate(summaries):
        rows = [one for row in summary.iterations for one in row.internalized if one.item == audit.ALL]
        points = [_inside_point(one) for one in rows if one.share is not None]
        lines.append(_line(points, summary.experiment, slot))
    figure = _over_iterations([line for line in lines if line[-1]["x"]], summaries, suffix="%", from_zero=True)
    figure["layout"]["xaxis"]["range"][0] = 0.5
    return figure


def over_seeds(groups: Mapping[str, Sequence[LineageSummary]], condition: Condition) -> Figure:
    """Mean success of several seeds of one experiment; the band reaches from the lowest to the highest seed.

    Args:
        groups: experiment -> its lineages. Those with one lineage are left out.
    """
    lines = []
    for slot, (name, members) in enumerate(groups.items()):
        values: dict[int, list[float]] = {}
        for summary in members:
            for point in _points(summary, condition, "success", 100):
                values.setdefault(point[0], []).append(point[1])
        points: list[Point] = [
            (k, sum(found) / len(found), min(found), max(found), f"{len(found)} seeds")
            for k, found in sorted(values.items())
            if len(found) > 1
        ]
        if len(members) > 1:
            lines.append(_line(points, name, slot))
    drawn = _over_iterations(lines, [s for members in groups.values() for s in members], range_=(0, 100), suffix="%")
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

Point = tuple[int, float, float | None, float | None, str]
"""Iteration, value, low, high, remark for the hover text."""


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
    return _line(
        _points(summary, condition, field, scale),
        name,
        slot,
        dash={"with_experience": "dash", "greedy": "dot"}.get(condition, "solid"),
        declined=_declined(summary),
    )


def _line(
    points: Sequence[Point], name: str, slot: int, *, dash: str = "solid", declined: frozenset[int] = frozenset()
) -> list[dict[str, Any]]:
    """A line with its band: two traces of one legend entry."""
    traces: list[dict[str, Any]] = []
    if any(low is not None for _, _, low, _, _ in points):
        xs = [p[0] for p in points]
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": xs + xs[::-1],
                "y": [p[3] if p[3] is not None else p[1] for p in points]
                + [p[2] if p[2] is not None else p[1] for p in reversed(points)],
                "fill": "toself",
                "line": {"width": 0},
                "hoverinfo": "skip",
                "showlegend": False,
                "legendgroup": name,
                "meta": {"slot": slot, "paint": "band"},
            }
        )

    def around(point: Point) -> str:
        bounds = f" ({point[2]:.1f}–{point[3]:.1f})" if point[2] is not None and point[3] is not None else ""
        stays = "; declined, the champion stays" if point[0] in declined else ""
        return f"{bounds}{', ' if point[4] else ''}{point[4]}{stays}"

    traces.append(
        {
            "type": "scatter",
            "mode": "lines+markers",
            "cliponaxis": False,
            "x": [p[0] for p in points],
            "y": [p[1] for p in points],
            "name": name,
            "legendgroup": name,
            "customdata": [around(p) for p in points],
            "line": {"width": 2.4, "dash": dash},
            "marker": {"size": 8, "symbol": ["circle-open" if p[0] in declined else "circle" for p in points]},
            "hovertemplate": "%{y:.1f}%{customdata}<extra>%{fullData.name}</extra>",
            "meta": {"slot": slot, "paint": "line"},
        }
    )
    return traces


def _over_iterations(
    lines: Sequence[list[dict[str, Any]]],
    summaries: Sequence[LineageSummary],
    heading: str = "",
    *,
    range_: tuple[float, float] | None = None,
    suffix: str = "",
    from_zero: bool = False,
) -> Figure:
    # bands first, so that no band lies over a line
    data = sorted((trace for line in lines for trace in line if trace["x"]), key=lambda trace: trace["meta"]["paint"] != "band")
    layout = _layout(heading, range_=range_, suffix=suffix, from_zero=from_zero)
    layout["showlegend"] = sum(trace["meta"]["paint"] == "line" for trace in data) > 1
    last = max([1, *(row.iteration for summary in summaries for row in summary.rows)])
    ticks = list(range(0, last + 1, max(1, -(-last // 12))))
    layout["xaxis"] |= {
        "title": _title("iteration"),
        "tickvals": ticks,
        "ticktext": ["base" if k == 0 else str(k) for k in ticks],
        "range": [-0.06 * last, 1.06 * last],
    }
    layout["hovermode"] = "x unified"
    return {"data": data, "layout": layout}


def _layout(
    heading: str, *, range_: tuple[float, float] | None = None, suffix: str = "", from_zero: bool = False
) -> dict[str, Any]:
    yaxis: dict[str, Any] = {"title": _title(heading), "ticksuffix": suffix, "zeroline": False}
    if range_ is not None:
        # a little room, so that a point on the bound is drawn whole
        spread = 0.03 * (range_[1] - range_[0])
        yaxis["range"] = [range_[0] - spread, range_[1] + spread]
    elif from_zero:
        yaxis["rangemode"] = "tozero"
    return {
        "xaxis": {"zeroline": False},
        "yaxis": yaxis,
        "margin": {"l": 58, "r": 16, "t": 34, "b": 48},
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "height": 340,
    }


def _bar(labels: Sequence[str], values: Sequence[float], name: str, slot: int, shown: str) -> dict[str, Any]:
    return {
        "type": "bar",
        "x": list(labels),
        "y": list(values),
        "name": name,
        "hovertemplate": f"{shown}<extra>%{{fullData.name}}</extra>",
        "meta": {"slot": slot, "paint": "bar"},
    }


def _bars(
    data: list[dict[str, Any]], heading: str = "", *, range_: tuple[float, float] | None = None, suffix: str = ""
) -> Figure:
    layout = _layout(heading, suffix=suffix)
    if range_ is not None:
        layout["yaxis"]["range"] = list(range_)
    layout["xaxis"] |= {"type": "category", "title": _title("iteration")}
    layout |= {"barmode": "relative", "bargap": 0.35}
    return {"data": [trace for trace in data if any(trace["y"])], "layout": layout}


def _title(text: str) -> dict[str, Any]:
    return {"text": text, "font": {"size": 13}, "standoff": 8}


def _per_step(summary: LineageSummary, heading: str, value: Callable[[Any], float], shown: str) -> Figure:
    rows = summary.iterations
    data = []
    for name in step_names(rows):
        values = [sum(value(step) for step in row.steps if step.name == name) for row in rows]
        slot = STEP_ORDER.index(name) if name in STEP_ORDER else len(STEP_ORDER)
        data.append(_bar([_label(row) for row in rows], values, name, slot, shown))
    return _bars(data, heading)


def _grounded(metrics: Metrics) -> float:
    others = (metrics.premature, metrics.forced, metrics.unanswered, metrics.failed)
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
