"""Everything that a report on a study says, computed once: curves, contrasts, costs, breakdowns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from evolve_dag.study.results import HELD, HELD_OUT, Column, Result, Results, breakdowns, temperature_of
from evolve_dag.study.statistics import AgainstBest, Estimate, against_best, difference, mean

ContrastKind = Literal["arm", "night", "first", "best", "base", "experience", "ceiling"]

QUESTIONS: Mapping[ContrastKind, str] = {
    "arm": "against the arm that it is matched to, at the same iteration",
    "night": "against the iteration before (the first: against the base policy)",
    "first": "against iteration 1",
    "best": "the last against the best of its own iterations",
    "base": "against the base policy, at the best of the temperatures that it was scored at",
    "experience": "with experience in context against without",
    "ceiling": "the candidate of a night, without experience, against the ceiling of the night",
}
"""What a contrast asks. All are paired by seed and task; unless said they are of what the loop holds, without experience."""


@dataclass(frozen=True, slots=True)
class Point:
    """Success of one policy of an arm under one condition."""

    arm: str
    iteration: int
    condition: str
    success: Estimate
    seeds: int


@dataclass(frozen=True, slots=True)
class Contrast:
    """One paired difference of success."""

    question: ContrastKind
    arm: str
    iteration: int
    against: str
    """The other side: an arm, an iteration, a temperature, a condition."""
    difference: Estimate
    naive: Estimate | None = None
    """Where the other side is the best of several: the difference to the one that looks best on all tasks."""

    @property
    def itself(self) -> bool:
        """Whether the best of the arm's own iterations is the one that is asked about: there is no difference to estimate."""
        return self.question == "best" and self.against == str(self.iteration)


@dataclass(frozen=True, slots=True)
class Cost:
    """What an arm has spent up to an iteration, mean over its seeds, as if it had run alone."""

    arm: str
    iteration: int
    sampled: float
    """Tokens sampled to learn from, all iterations so far."""
    trained: float
    """Tokens of trained rows, all iterations so far."""
    items: float
    """Items in the pool."""
    kept: int
    """Seeds in which the gate declined this iteration's candidate."""


@dataclass(frozen=True, slots=True)
class Part:
    """Success of what an arm holds after an iteration on the tasks that share one fact, without experience in context."""

    arm: str
    iteration: int
    fact: str
    value: str
    success: Estimate


@dataclass(frozen=True, slots=True)
class Findings:
    """What a study has found."""

    results: Results
    points: tuple[Point, ...]
    contrasts: tuple[Contrast, ...]
    costs: tuple[Cost, ...]
    parts: tuple[Part, ...]

    def last(self, arm: str) -> int:
        """The last iteration that all seeds of an arm have; 0 when there is none."""
        return max(self.results.iterations(arm), default=0)

    def seeds(self, arm: str) -> tuple[int, ...]:
        """Seeds that the arm's means are over."""
        return tuple(sorted({row.seed for row in self.results.rows if row.arm == arm}))

    def beside(self, arm: str, other: str = "") -> str:
        """An arm's name beside another one, the leading one unless said: ``own-10 (seeds 8, 9)`` where its means are over other
        seeds, so that they differ for that reason too."""
        own, theirs = self.seeds(arm), self.seeds(other or self.results.study.leading)
        return arm if not own or not theirs or own == theirs else f"{arm} ({numbered(own)})"

    def declined(self, arm: str) -> dict[int, int]:
        """Iterations whose candidate the gate declined -> in how many seeds."""
        return {cost.iteration: cost.kept for cost in self.costs if cost.arm == arm and cost.kept}

    def conditions(self, arm: str) -> tuple[str, ...]:
        """What there is to tell of an arm: its candidates too, where one was declined; else they are what the loop holds."""
        told = HELD_OUT if self.declined(arm) else (*HELD, "ceiling")
        known = {p.condition for p in self.points if p.arm == arm}
        return tuple(condition for condition in told if condition in known)

    def point(self, arm: str, iteration: int, condition: str = "held") -> Point | None:
        return next((p for p in self.points if (p.arm, p.iteration, p.condition) == (arm, iteration, condition)), None)

    def judged(self, arm: str, iteration: int, condition: str = "held") -> tuple[int, int]:
        """Episodes of a point that were judged, which success is of, and all of them; over all seeds."""
        known = [row.metrics[condition] for row in self.results.of(arm, iteration) if condition in row.metrics]
        return sum(metrics.judged for metrics in known), sum(metrics.n for metrics in known)

    def asked(self, question: ContrastKind, arm: str | None = None, iteration: int | None = None) -> list[Contrast]:
        """The contrasts of one question."""
        return [
            c for c in self.contrasts if c.question == question and arm in (None, c.arm) and iteration in (None, c.iteration)
        ]


def numbered(seeds: Sequence[int]) -> str:
    """``seed 8``, ``seeds 8, 9``."""
    return f"{'seeds' if len(seeds) > 1 else 'seed'} {', '.join(map(str, seeds))}"


def find(results: Results) -> Findings:
    """Compute all of it from what was read."""
    arms = [arm for arm in results.study.arms if results.iterations(arm)]
    return Findings(
        results,
        tuple(point for arm in arms for point in _points(results, arm)),
        tuple(contrast for arm in arms for contrast in _contrasts(results, arm)),
        tuple(cost for arm in arms for cost in _costs(results, arm)),
        tuple(part for arm in arms for part in _parts(results, arm)),
    )


def _points(results: Results, arm: str) -> Iterator[Point]:
    for k in (0, *results.iterations(arm)):
        for condition in HELD_OUT:
            column = results.column(arm, k, condition)
            success = mean(column, shared=results.shared)
            if success is not None:
                yield Point(arm, k, condition, success, len(column))


def _contrasts(results: Results, arm: str) -> Iterator[Contrast]:
    references, base = results.study.references(arm), results.base_columns(arm)
    iterations, shared = results.iterations(arm), results.shared
    columns = {k: results.column(arm, k) for k in (0, *iterations)}
    for k in iterations:
        for reference in references:
            if k in results.iterations(reference):
                yield from _contrast("arm", arm, k, reference, columns[k], results.column(reference, k), shared)
        yield from _contrast("night", arm, k, str(k - 1) if k > 1 else "base", columns[k], columns.get(k - 1, {}), shared)
        if k > 1:
            yield from _contrast("first", arm, k, "1", columns[k], columns.get(1, {}), shared)
        bases = {_called(name): column for name, column in base.items()}
        yield from _to_best("base", arm, k, columns[k], bases, shared)
        informed, candidate = results.column(arm, k, "held_with"), results.column(arm, k, "without")
        yield from _contrast("experience", arm, k, "without", informed, columns[k], shared)
        yield from _contrast("ceiling", arm, k, "ceiling", candidate, results.column(arm, k, "ceiling"), shared)
    if len(iterations) > 1:
        own = {str(k): columns[k] for k in iterations}
        yield from _to_best("best", arm, iterations[-1], columns[iterations[-1]], own, shared)


def _contrast(question: ContrastKind, arm: str, k: int, against: str, a: Column, b: Column, shared: bool) -> Iterator[Contrast]:
    found = difference(a, b, shared=shared)
    if found is not None:
        yield Contrast(question, arm, k, against, found)


def _to_best(
    question: ContrastKind, arm: str, k: int, policy: Column, others: Mapping[str, Column], shared: bool
) -> Iterator[Contrast]:
    found: AgainstBest | None = against_best(policy, others, shared=shared) if others else None
    if found is not None:
        yield Contrast(question, arm, k, found.best, found.honest, found.naive)


def _called(condition: str) -> str:
    """``base_at_0.3`` -> ``temperature 0.3``."""
    told = temperature_of(condition)
    return f"temperature {told}" if told else "the rollouts' temperature"


def _costs(results: Results, arm: str) -> Iterator[Cost]:
    sampled = trained = 0.0
    for k in results.iterations(arm):
        rows = results.of(arm, k)
        sampled += _mean(rows, "sampled")
        trained += _mean(rows, "trained")
        kept = sum(row.decision != "promote" for row in rows)
        yield Cost(arm, k, sampled, trained, _mean(rows, "items"), kept)


def _mean(rows: tuple[Result, ...], name: str) -> float:
    return sum(float(getattr(row, name) or 0) for row in rows) / len(rows)


def _parts(results: Results, arm: str) -> Iterator[Part]:
    for fact, values in breakdowns(results).items():
        for k in (0, *results.iterations(arm)):
            column = results.column(arm, k)
            for value in values:
                of_value = {
                    seed: {t: r for t, r in tasks.items() if results.facts.get(t, {}).get(fact) == value}
                    for seed, tasks in column.items()
                }
                success = mean(of_value, shared=results.shared)
                if success is not None:
                    yield Part(arm, k, fact, value, success)
