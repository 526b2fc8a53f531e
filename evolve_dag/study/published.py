"""What the paper reports, and what this study says of the same finding.

Source of every published figure: *Rethinking Continual Experience Internalization for Self-Evolving LLM Agents*,
arXiv:2606.04703 (Qwen3-4B on the live web), as public readings of it and its released code give them. Where readings
disagree, both are told.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from evolve_dag.reporting.summary import number, percent
from evolve_dag.study.findings import Findings
from evolve_dag.study.statistics import Estimate, difference

SOURCE = "arXiv:2606.04703"


@dataclass(frozen=True, slots=True)
class Finding:
    """One finding of the paper beside what was measured here."""

    claim: str
    paper: str
    """The published figures."""
    here: str
    """Ours; '' where the study has no arm for it."""


def compared(findings: Findings) -> list[Finding]:
    """Every finding, in the paper's order. ``paper`` in the study file says which arm stands for which one."""
    return [Finding(claim, paper, "; ".join(said(findings))) for claim, paper, said in _CLAIMS]


def points(estimate: Estimate | None) -> str:
    """``+4.3 points (2.3 to 6.4; over seeds -0.4 to 9.1)``: a difference with its intervals."""
    if estimate is None:
        return "–"
    low, high = (100 * bound for bound in estimate.tasks)
    over = "" if estimate.seeds is None else "; over seeds {:.1f} to {:.1f}".format(*(100 * bound for bound in estimate.seeds))
    return f"{100 * estimate.value:+.1f} points ({low:.1f} to {high:.1f}{over})"


def _at(findings: Findings, arm: str | None, iteration: int) -> str:
    point = findings.point(arm, iteration) if arm else None
    return "–" if point is None else percent(point.success.value)


def _behaviour(findings: Findings, arm: str | None, iteration: int, name: str) -> float | None:
    """Mean over seeds of one metric of what the loop holds, without experience in context."""
    rows = findings.results.of(arm, iteration) if arm else ()
    known = [value for row in rows if (value := getattr(row.metrics.get("held"), name, None)) is not None]
    return sum(known) / len(known) if known else None


def _step_wise_or_global(findings: Findings) -> Iterator[str]:
    arms = findings.results.study.settings.paper
    if arms.step_wise and arms.global_injection:
        a, b = (findings.results.column(arm, 1) for arm in (arms.step_wise, arms.global_injection))
        if a and b:
            told = f"{_at(findings, arms.step_wise, 1)} and {_at(findings, arms.global_injection, 1)}"
            found = difference(a, b, shared=findings.results.shared)
            yield f"{told} (base {_at(findings, arms.step_wise, 0)}): {points(found)}"


def _answers_before_tools(findings: Findings) -> Iterator[str]:
    arms = findings.results.study.settings.paper
    for name, arm in (("global", arms.global_injection), ("step-wise", arms.step_wise)):
        if arm and (k := findings.last(arm)):
            yield f"{name} {percent(_behaviour(findings, arm, k, 'no_tool'))} at iteration {k}"


def _turns(findings: Findings) -> Iterator[str]:
    arms = findings.results.study.settings.paper
    named = (("base", arms.on_policy, 0), ("on-policy", arms.on_policy, 1), ("off-policy", arms.step_wise, 1))
    for name, arm, k in named:
        if arm and findings.point(arm, k):
            yield f"{name} {number(_behaviour(findings, arm, k, 'turns'))}"


def _iterations(findings: Findings) -> Iterator[str]:
    arm = findings.results.study.settings.paper.step_wise
    if arm and (last := findings.last(arm)):
        yield ", ".join(_at(findings, arm, k) for k in range(last + 1)) + " (base first)"


def _instance(findings: Findings) -> Iterator[str]:
    arm = findings.results.study.settings.paper.instance
    if arm and (k := min(3, findings.last(arm))):
        results = findings.results
        found = difference(results.column(arm, k), results.column(arm, 0), shared=results.shared)
        yield f"{_at(findings, arm, k)} at iteration {k}: {points(found)} against the base"


def _still_profits(findings: Findings) -> Iterator[str]:
    arm = findings.results.study.settings.paper.step_wise
    if arm and (asked := findings.asked("experience", arm, findings.last(arm))):
        yield f"iteration {asked[0].iteration}: {points(asked[0].difference)}"


_CLAIMS: tuple[tuple[str, str, Callable[[Findings], Iterator[str]]], ...] = (
    (
        "Step-wise injection beats global injection after one iteration",
        "WebWalkerQA 31.2 and 23.2 (base 23.0), GAIA 22.7 and 16.8, BrowseComp-ZH 5.2 and 4.5 (self-generated experience)",
        _step_wise_or_global,
    ),
    (
        "Global injection teaches to answer before any tool call",
        "global 63.82% of the trajectories after iterating, step-wise 0%",
        _answers_before_tools,
    ),
    (
        "On-policy learning inflates trajectories",
        "assistant turns after one update: 21.9; base 2.5, teacher data 4.5",
        _turns,
    ),
    (
        "The final recipe gets better over three iterations",
        "WebWalkerQA 30.6, 30.7, 33.1 (another reading: 33.9, 32.8, 32.2); GAIA 29.8, 30.1, 33.3; BrowseComp-ZH 5.2, 4.4, 5.9",
        _iterations,
    ),
    ("Instance-level experience falls below the base by iteration 3", "told in words", _instance),
    ("After internalization the recipe still profits from experience in context", "told in words", _still_profits),
)
