"""Parts that figures are made of: lines with bands, bars, axes; plotly specifications without plotly.

A specification says what is drawn, not in which colour: every trace carries ``meta.slot`` (which colour of the palette) and
``meta.paint`` (line, band, bar), and the page paints it for light or dark.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Any

Figure = dict[str, Any]
"""A plotly figure: ``{"data": [...], "layout": {...}}``, JSON values only."""

Point = tuple[int, float, float | None, float | None, str]
"""Iteration, value, low, high, remark for the hover text."""


HOLLOW = "circle-open"
NEUTRAL = ("#2f7ed8", "#d9731a", "#1f9d72", "#a45cc4", "#b58a14", "#d14d7a", "#3a9bb5", "#7d8590")
"""Mid tones that can be read on white and on near-black; the SVG stands on pages that we do not paint."""


def line(
    points: Sequence[Point], name: str, slot: int, *, dash: str = "solid", declined: Collection[int] = ()
) -> list[dict[str, Any]]:
    """A line with its band: two traces of one legend entry. Points of ``declined`` iterations are hollow."""
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
            "marker": {"size": 8, "symbol": symbols([p[0] for p in points], declined)},
            "hovertemplate": "%{y:.1f}%{customdata}<extra>%{fullData.name}</extra>",
            "meta": {"slot": slot, "paint": "line"},
        }
    )
    return traces


def symbols(iterations: Iterable[int], declined: Collection[int]) -> list[str]:
    """A marker for each iteration: hollow where the gate declined its candidate."""
    return [HOLLOW if iteration in declined else "circle" for iteration in iterations]


def over_iterations(
    lines: Sequence[list[dict[str, Any]]],
    last: int,
    heading: str = "",
    *,
    range_: tuple[float, float] | None = None,
    suffix: str = "",
    from_zero: bool = False,
) -> Figure:
    """Lines over iterations 0 (the base policy) to ``last``."""
    # bands first, so that no band lies over a line
    data = sorted((trace for line in lines for trace in line if trace["x"]), key=lambda trace: trace["meta"]["paint"] != "band")
    layout = axes(heading, range_=range_, suffix=suffix, from_zero=from_zero)
    layout["showlegend"] = sum(trace["meta"]["paint"] == "line" for trace in data) > 1
    last = max(1, last)
    ticks = list(range(0, last + 1, max(1, -(-last // 12))))
    layout["xaxis"] |= {
        "title": title("iteration"),
        "tickvals": ticks,
        "ticktext": ["base" if k == 0 else str(k) for k in ticks],
        "range": [-0.06 * last, 1.06 * last],
    }
    layout["hovermode"] = "x unified"
    return {"data": data, "layout": layout}


def axes(
    heading: str, *, range_: tuple[float, float] | None = None, suffix: str = "", from_zero: bool = False
) -> dict[str, Any]:
    """What all figures share."""
    yaxis: dict[str, Any] = {"title": title(heading), "ticksuffix": suffix, "zeroline": False}
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


def bar(labels: Sequence[str], values: Sequence[float], name: str, slot: int, shown: str) -> dict[str, Any]:
    """One trace of bars."""
    return {
        "type": "bar",
        "x": list(labels),
        "y": list(values),
        "name": name,
        "hovertemplate": f"{shown}<extra>%{{fullData.name}}</extra>",
        "meta": {"slot": slot, "paint": "bar"},
    }


def bars(
    data: list[dict[str, Any]], heading: str = "", *, range_: tuple[float, float] | None = None, suffix: str = ""
) -> Figure:
    """Bars on top of each other, those below zero downwards."""
    layout = axes(heading, suffix=suffix)
    if range_ is not None:
        layout["yaxis"]["range"] = list(range_)
    layout["xaxis"] |= {"type": "category", "title": title("iteration")}
    layout |= {"barmode": "relative", "bargap": 0.35}
    return {"data": [trace for trace in data if any(trace["y"])], "layout": layout}


def title(text: str) -> dict[str, Any]:
    """Heading of an axis."""
    return {"text": text, "font": {"size": 13}, "standoff": 8}
