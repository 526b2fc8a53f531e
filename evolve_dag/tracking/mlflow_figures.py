"""The report's figures as PNG, which MLflow's artifact view shows without a network (matplotlib comes with mlflow)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve_dag.reporting import figures
from evolve_dag.reporting.figures import NEUTRAL, Figure

if TYPE_CHECKING:
    from evolve_dag.reporting.summary import LineageSummary

_DASHES = {"dash": "--", "dot": ":"}


def write_figures(summary: LineageSummary, folder: Path) -> list[Path]:
    """Draw the lineage's figures into ``folder``; figures without data are left out."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn: dict[str, tuple[str, Figure]] = {
        "success": ("Held-out success, %", figures.success([summary], ["without", "with_experience"])),
        "training": ("Training curve", figures.training(summary)),
        "endings": ("How episodes end, %", figures.endings(summary)),
        "turns": ("Turns without experience", figures.behaviour([summary], "turns", share=False)),
        "premature": ("Premature answers, %", figures.behaviour([summary], "premature", share=True)),
        "pool": ("Items in the pool", figures.pool_growth([summary])),
        "seconds": ("Seconds per step", figures.seconds(summary)),
    }
    return [draw(figure, title, folder / f"{name}.png") for name, (title, figure) in drawn.items() if figure["data"]]


def draw(figure: Figure, title: str, path: Path) -> Path:
    """One figure of :mod:`evolve_dag.reporting.figures` (lines, bands, stacked bars) as a PNG of 880 x 495 pixels."""
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
    canvas.savefig(path)
    return path


def _bars(axes: Any, trace: dict[str, Any], colour: str, above: dict[Any, float], below: dict[Any, float]) -> None:
    """Bars on top of those before them; negative values go down."""
    starts = []
    for x, y in zip(trace["x"], trace["y"], strict=True):
        ends = below if y < 0 else above
        starts.append(ends.get(x, 0.0))
        ends[x] = starts[-1] + y
    axes.bar(trace["x"], trace["y"], bottom=starts, width=0.6, color=colour, label=trace["name"])
