"""The report's figures as PNG, which MLflow's artifact view shows without a network."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from evolve_dag.reporting import figures
from evolve_dag.reporting.drawing import Figure
from evolve_dag.reporting.pictures import draw

if TYPE_CHECKING:
    from evolve_dag.reporting.summary import LineageSummary


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
