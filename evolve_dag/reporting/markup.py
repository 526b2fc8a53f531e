"""Parts of HTML pages. What they are given as text is escaped; cells of a table and bodies are HTML already."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from evolve_dag.errors import DataError

_BLANK = re.compile(r"\{\{(\w+)\}\}")


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with every named blank filled, in one pass, so that a value is never read as a template."""
    blanks = set(_BLANK.findall(template))
    if blanks != set(values):
        differ = ", ".join(sorted(blanks ^ set(values)))
        raise DataError(f"report.html: blanks and values differ: {differ}", "reinstall evolve-dag: its files do not fit")
    return _BLANK.sub(lambda blank: values[blank[1]], template)


def table(heads: Sequence[str], body: Iterable[Sequence[str]], *, numeric: Iterable[int] = (), text: Iterable[int] = ()) -> str:
    """A table of cells that are HTML already."""
    style = dict.fromkeys(numeric, ' class="n"') | dict.fromkeys(text, ' class="text"')
    head = "".join(f"<th{style.get(n, '')}>{cell}</th>" for n, cell in enumerate(heads))
    rows = ("".join(f"<td{style.get(n, '')}>{cell}</td>" for n, cell in enumerate(row)) for row in body)
    lines = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div>'


def grid(*parts: str, pairs: bool = False) -> str:
    """Figures side by side, as many as the page is wide, or two."""
    return f'<div class="grid{" pairs" if pairs else ""}">{"".join(parts)}</div>' if any(parts) else ""


def note(text: str) -> str:
    return f'<p class="soft">{escape(text)}</p>'


def details(heading: str, body: str) -> str:
    return f"<details><summary>{escape(heading)}</summary>{body}</details>"


def facts(values: Mapping[str, Any], between: str) -> str:
    facts = (f"{name.replace('_', ' ')} {plain(value)}" for name, value in values.items())
    return between.join(f"<small>{escape(fact)}</small>" for fact in facts)


def plain(value: Any) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def digest(digest: str) -> str:
    return f'<code title="{escape(digest)}">{escape(digest[:12])}</code>'
