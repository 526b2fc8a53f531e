"""The report on a study as one HTML file; what is said stands in ``reporting/templates/study.html.jinja``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from evolve_dag.evaluation.intervals import Interval
from evolve_dag.reporting import pages
from evolve_dag.reporting.report import versions
from evolve_dag.store.disk import write_atomic
from evolve_dag.store.faults import disk_error
from evolve_dag.study import figures
from evolve_dag.study.findings import QUESTIONS, Findings
from evolve_dag.study.published import SOURCE, compared
from evolve_dag.study.results import breakdowns
from evolve_dag.study.statistics import Estimate
from evolve_dag.study.tables import (
    BEST,
    CONDITIONS,
    DIFFERS,
    HOLLOW,
    ITSELF,
    METHOD,
    at,
    of_seeds,
    other_seeds,
    said,
    shown_contrasts,
    unjudged,
)
from evolve_dag.study.what_differs import as_stated, what_differs

SECTIONS = {
    "result": "Result",
    "differs": "What differs",
    "arms": "Arm by arm",
    "contrasts": "Contrasts",
    "compute": "At equal compute",
    "breakdown": "Breakdown",
    "paper": "The paper beside ours",
    "reproduce": "Reproduce",
}
"""Part of the template -> its heading."""


def write_page(findings: Findings, path: Path) -> Path:
    """Write the report; it appears whole or not at all.

    Raises:
        StoreError: the file cannot be written.
    """
    content = render(findings)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content.encode(), durable=False)
    except OSError as error:
        raise disk_error(error, path) from error
    return path


def render(findings: Findings) -> str:
    """The report as one HTML text that loads nothing from anywhere."""
    from plotly.offline import get_plotlyjs

    def part(arm: str, fact: str, value: str) -> Estimate | None:
        last = findings.last(arm)
        wanted = (arm, last, fact, value)
        return next((p.success for p in findings.parts if (p.arm, p.iteration, p.fact, p.value) == wanted), None)

    results = findings.results
    return pages.render(
        "study.html.jinja",
        title=f"Study {results.study.name}",
        by=f" by evolve-dag {versions().get('evolve-dag', '')}",
        sections=SECTIONS,
        plotly=get_plotlyjs(),
        findings=findings,
        last=max(map(findings.last, results.study.arms), default=0),
        facts=breakdowns(results),
        part=part,
        shown=lambda question: shown_contrasts(findings, question),
        published=compared(findings),
        share=share,
        signed=signed,
        at=partial(at, findings),
        of_seeds=partial(of_seeds, findings),
        other_seeds=other_seeds(findings),
        unjudged=unjudged(findings),
        bounds=bounds,
        figures=figures,
        METHOD=METHOD,
        HOLLOW=HOLLOW,
        CONDITIONS=CONDITIONS,
        DIFFERS=DIFFERS.replace("`", "").replace("*", ""),
        differing=[(c, as_stated(c.here), as_stated(c.there), said(findings, c)) for c in what_differs(results.study)],
        BEST=BEST,
        ITSELF=ITSELF,
        QUESTIONS=QUESTIONS,
        SOURCE=SOURCE,
    )


def share(value: float) -> str:
    """``0.344`` -> ``34.4%``."""
    return f"{value:.1%}"


def signed(value: float) -> str:
    """``0.043`` -> ``+4.3``, in points."""
    return f"{100 * value:+.1f}"


def bounds(interval: Interval, show: Callable[[float], str]) -> str:
    """``31.0–37.9``, or ``-1.2 to +3.0`` for differences."""
    low, high = (show(bound).removesuffix("%") for bound in interval)
    return f"{low} to {high}" if show is signed else f"{low}–{high}"
