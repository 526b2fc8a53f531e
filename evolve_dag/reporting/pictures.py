"""Figures as files that any viewer shows: PNG and SVG (matplotlib, which comes with mlflow)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evolve_dag.reporting.drawing import HOLLOW, NEUTRAL, Figure

_DASHES = {"dash": "--", "dot": ":"}


def draw(figure: Figure, title: str, path: Path) -> Path:
    """One figure (lines, bands, stacked bars) as a PNG of 880 x 495 pixels, or as an SVG where ``path`` ends so.

    The same figure is the same file: an SVG holds neither a date nor drawn ids.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure as Canvas

    canvas = Canvas(figsize=(8, 4.5), dpi=110)
    FigureCanvasAgg(canvas)
    axes: Any = canvas.add_subplot()
    above: dict[Any, float] = {}
    below: dict[Any, float] = {}
    for trace in figure["data"]:
        colour = NEUTRAL[trace["meta"]["slot"] % len(NEUTRAL)]
        if trace["meta"]["paint"] == "band":
            axes.fill(trace["x"], trace["y"], color=colour, alpha=0.16, linewidth=0)
        elif trace["type"] == "bar":
            _bars(axes, trace, colour, above, below)
        else:
            style = _DASHES.get(trace.get("line", {}).get("dash", ""), "-")
            marker = "o" if "markers" in trace.get("mode", "") else ""
            axes.plot(trace["x"], trace["y"], style, marker=marker, markersize=5, color=colour, label=trace.get("name"))
            _hollow(axes, trace, colour)
    layout = figure["layout"]
    ticks = layout["xaxis"].get("tickvals")
    if ticks is not None:
        axes.set_xticks(ticks, layout["xaxis"]["ticktext"])
    axes.set_xlabel(layout["xaxis"].get("title", {}).get("text", ""))
    axes.set_ylabel(layout["yaxis"].get("title", {}).get("text", ""))
    if "range" in layout["yaxis"]:
        axes.set_ylim(*layout["yaxis"]["range"])
    axes.set_title(title, loc="left")
    axes.grid(axis="y", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if len({t["name"] for t in figure["data"] if "name" in t}) > 1:
        axes.legend(frameon=False, fontsize=8)
    with rc_context({"svg.hashsalt": "evolve-dag"}):
        canvas.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else {})
    return path


def _hollow(axes: Any, trace: dict[str, Any], colour: str) -> None:
    """Points that are hollow on the page are so here."""
    shown = trace.get("marker", {}).get("symbol", [])
    places = [place for place, symbol in enumerate(shown) if symbol == HOLLOW]
    if places:
        xs, ys = ([trace[axis][place] for place in places] for axis in ("x", "y"))
        axes.plot(xs, ys, "o", markersize=5, color=colour, markerfacecolor="white", zorder=3)


def _bars(axes: Any, trace: dict[str, Any], colour: str, above: dict[Any, float], below: dict[Any, float]) -> None:
    """Bars on top of those before them; negative values go down."""
    starts = []
    for x, y in zip(trace["x"], trace["y"], strict=True):
        ends = below if y < 0 else above
        starts.append(ends.get(x, 0.0))
        ends[x] = starts[-1] + y
    axes.bar(trace["x"], trace["y"], bottom=starts, width=0.6, color=colour, label=trace["name"])
