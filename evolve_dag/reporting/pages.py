"""HTML pages from the templates beside this module; they load nothing from anywhere.

All text that comes from artifacts (items, reasons, settings, observations) is data: every value is escaped where it is written,
whatever it holds. A template that names what it was not given fails; it never shows a gap.
"""

from __future__ import annotations

import shlex
from datetime import UTC, datetime
from functools import cache, partial
from html import escape
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from evolve_dag.reporting.drawing import Figure
from evolve_dag.reporting.summary import count, dollars, judged_of, mean_count, nats, percent, percent_interval, plain


def _draw(drawn: list[Figure], figure: Figure) -> int:
    """Put a figure on the page; returns its place among ``drawn``."""
    for trace in figure["data"]:
        trace.update({key: _as_text(trace[key]) for key in ("name", "legendgroup", "x", "customdata") if key in trace})
    drawn.append(figure)
    return len(drawn) - 1


def _as_text(value: Any) -> Any:
    """Plotly reads a little markup in texts (<b>, <a href>): names and items from artifacts must not be read so."""
    if isinstance(value, list):
        return [_as_text(one) for one in value]
    return escape(value, quote=False) if isinstance(value, str) else value


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("evolve_dag.reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for show in (plain, percent, percent_interval, nats, count, mean_count, dollars, judged_of):
        environment.globals[show.__name__] = show
    environment.globals["in_shell"] = shlex.quote
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False}  # JSON.parse of the page knows no NaN
    return environment


def render(template: str, **values: Any) -> str:
    """The page. ``values``: title, sections (anchor -> heading), and what else the template names."""
    drawn: list[Figure] = []
    common = {"back": "", "by": "", "plotly": "", "drawn": drawn, "draw": partial(_draw, drawn)}
    common["written"] = f"{datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC')}{values.pop('by', '')}"
    return _environment().get_template(template).render(common | values)
