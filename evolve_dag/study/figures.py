"""The figures of a study, in the parts of :mod:`evolve_dag.reporting.drawing`. Bands and whiskers are 95% over tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from evolve_dag.reporting.drawing import Figure, axes, line, over_iterations, symbols, title
from evolve_dag.reporting.drawing import Point as Place
from evolve_dag.study.findings import Cost, Findings, Point
from evolve_dag.study.statistics import Estimate

REFERENCE_SLOT, ARM_SLOT = 7, 0
DASHES = ("solid", "dash", "dot")
"""With eight colours these tell 24 arms apart."""


def success(findings: Findings, arm: str) -> Figure:
    """One arm over iterations: what it holds without and with experience, the ceiling, and its candidates where one was
    declined; the first arm that it is contrasted with behind it."""
    last, told = findings.last(arm), findings.conditions(arm)
    lines = []
    for reference in findings.results.study.references(arm)[:1]:
        lines.append(_curve(findings, reference, "held", findings.beside(reference, arm), REFERENCE_SLOT, until=last))
    for slot, (condition, name, dash) in enumerate(
        (
            ("held", arm, "solid"),
            ("held_with", f"{arm}, with experience", "dash"),
            ("ceiling", "ceiling of the night", "dot"),
            ("without", "the night's candidate", "dot"),
        )
    ):
        if condition in told:
            lines.append(_curve(findings, arm, condition, name, ARM_SLOT + slot, dash))
    drawn = [one for one in lines if one[-1]["x"]]
    return over_iterations(drawn, last, range_=(0, 100), suffix="%")


def all_arms(findings: Findings, arms: Sequence[str]) -> Figure:
    """Several arms over iterations, without experience in context; no bands."""
    lines = [
        [trace for trace in _curve(findings, arm, "held", findings.beside(arm), *_style(n)) if trace["meta"]["paint"] == "line"]
        for n, arm in enumerate(arms)
    ]
    figure = over_iterations(lines, max(map(findings.last, arms), default=0), range_=(0, 100), suffix="%")
    figure["layout"]["height"] = 460  # two dozen names take room
    return figure


def at_the_end(findings: Findings) -> Figure:
    """Success after the last iteration, arm by arm, the base policy first, under a name that no arm can have."""
    base = findings.point(findings.results.study.leading, 0)
    ends = [(arm, findings.point(arm, findings.last(arm))) for arm in findings.results.study.arms]
    named = [("base policy", base), *((findings.beside(arm), end) for arm, end in ends)]
    rows = [(name, p.success, f"iteration {p.iteration}, {p.seeds} seeds") for name, p in named if p is not None]
    return _whiskers(rows, "without experience")


def contrasts(findings: Findings) -> Figure:
    """Each arm minus every arm that it is contrasted with, at the last iteration that both have."""
    last = {(c.arm, c.against): c for c in findings.asked("arm")}
    rows = [(f"{arm} − {other}", c.difference, f"iteration {c.iteration}") for (arm, other), c in last.items()]
    return _whiskers(rows, "minus its reference", suffix=" points")


def against_tokens(findings: Findings, which: Literal["sampled", "trained"]) -> Figure:
    """Success without experience over the tokens that were spent to get there: arms at equal compute stand above each other."""
    spent: Callable[[Cost], float] = (lambda cost: cost.sampled) if which == "sampled" else (lambda cost: cost.trained)
    data = []
    for n, arm in enumerate(findings.results.study.arms):
        at = {cost.iteration: spent(cost) for cost in findings.costs if cost.arm == arm} | {0: 0.0}
        points = [p for p in _points(findings, arm, "held") if p.iteration in at]
        slot, dash = _style(n)
        data.append(
            {
                "type": "scatter",
                "mode": "lines+markers",
                "x": [at[p.iteration] for p in points],
                "y": [100 * p.success.value for p in points],
                "name": findings.beside(arm),
                "customdata": [f"iteration {p.iteration}" if p.iteration else "base" for p in points],
                "line": {"width": 1.8, "dash": dash},
                "marker": {"size": 6, "symbol": symbols([p.iteration for p in points], findings.declined(arm))},
                "hovertemplate": "%{y:.1f}%, %{x:.3s} tokens, %{customdata}<extra>%{fullData.name}</extra>",
                "meta": {"slot": slot, "paint": "line"},
            }
        )
    layout = axes("", range_=(0, 100), suffix="%")
    layout["xaxis"] |= {"title": title(f"tokens {which} so far"), "rangemode": "tozero"}
    return {"data": [trace for trace in data if trace["x"]], "layout": layout | {"height": 460}}


def pool(findings: Findings) -> Figure:
    """Items in the pool, mean over seeds."""
    lines = []
    for n, arm in enumerate(findings.results.study.arms):
        places: list[Place] = [(c.iteration, c.items, None, None, "") for c in findings.costs if c.arm == arm]
        slot, dash = _style(n)
        lines.append(line(places, arm, slot, dash=dash))
    last = max(map(findings.last, findings.results.study.arms), default=0)
    return over_iterations([one for one in lines if one[-1]["x"]], last, "items", from_zero=True)


def by_fact(findings: Findings, arm: str, fact: str) -> Figure:
    """One arm over iterations, a line per value of a fact (``depth``)."""
    values = sorted({part.value for part in findings.parts if (part.arm, part.fact) == (arm, fact)})
    lines = []
    for slot, value in enumerate(values):
        parts = [p for p in findings.parts if (p.arm, p.fact, p.value) == (arm, fact, value)]
        lines.append(line([_place(p.iteration, p.success) for p in parts], f"{fact} {value}", slot))
    return over_iterations(lines, findings.last(arm), range_=(0, 100), suffix="%")


# -- inside


def _style(n: int) -> tuple[int, str]:
    """Colour and dash of the n-th arm."""
    return n % 8, DASHES[n // 8 % len(DASHES)]


def _points(findings: Findings, arm: str, condition: str) -> list[Point]:
    return [p for p in findings.points if (p.arm, p.condition) == (arm, condition)]


def _place(iteration: int, success: Estimate) -> Place:
    low, high = success.tasks
    seeds = ", ".join(f"{100 * value:.1f}" for value in success.by_seed.values())
    return iteration, 100 * success.value, 100 * low, 100 * high, f"seeds {seeds}; {success.n} tasks"


def _curve(
    findings: Findings, arm: str, condition: str, name: str, slot: int, dash: str = "solid", until: int | None = None
) -> list[dict[str, Any]]:
    points = [p for p in _points(findings, arm, condition) if until is None or p.iteration <= until]
    return line([_place(p.iteration, p.success) for p in points], name, slot, dash=dash, declined=findings.declined(arm))


def _whiskers(rows: Sequence[tuple[str, Estimate, str]], name: str, suffix: str = "%") -> Figure:
    values = [100 * estimate.value for _, estimate, _ in rows]
    bounds = [(100 * estimate.tasks[0], 100 * estimate.tasks[1]) for _, estimate, _ in rows]
    trace = {
        "type": "bar",
        "x": [arm for arm, _, _ in rows],
        "y": values,
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [high - value for value, (_, high) in zip(values, bounds, strict=True)],
            "arrayminus": [value - low for value, (low, _) in zip(values, bounds, strict=True)],
            "thickness": 1.4,
        },
        "name": name,
        "customdata": [f"{low:.1f} to {high:.1f}, {told}" for (low, high), (_, _, told) in zip(bounds, rows, strict=True)],
        "hovertemplate": f"%{{y:.1f}}{suffix} (%{{customdata}})<extra>%{{x}}</extra>",
        "meta": {"slot": 0, "paint": "bar"},
    }
    layout = axes("", suffix="%" if suffix == "%" else "", from_zero=suffix == "%")
    layout |= {"bargap": 0.4, "showlegend": False, "height": 420}
    layout["xaxis"] |= {"type": "category"}
    return {"data": [trace] if rows else [], "layout": layout}
