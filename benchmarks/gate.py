"""What the gate sees: simulated nights with a true loss or gain, through the gate's own code.

    python benchmarks/gate.py --runs 400 --out docs/gate.json   # the table of docs/LOG.md

How nights are simulated. Task i is solved by a policy with probability sigmoid(level + a_i + e_i): a_i is the task's
difficulty (SD ``SPREAD`` logits), e_i what this policy is better or worse at (a random walk over the nights, SD ``WANDER`` a
night), and the level is set so that success over the whole population of tasks is what the scenario says. So a loss of 0 is
none in the population, while the development tasks at hand may say otherwise. Common draws couple two policies the less, the
more nights lie between them: on a share ``CLOSE`` ^ nights of the tasks the outcome hangs on one common number for both,
elsewhere they are independent (the candidate's number is the champion's, the champion's the best one's, each on its share).
The three numbers are fitted to stored runs of the pocket world, whose paired SD grows from 0.25 between neighbours to 0.45 over
six nights (docs/LOG.md); ``--fit`` prints what they come to.

The candidate of a night comes from the champion: it loses (or gains) what the scenario says against *that*, so a decline or a
restore stops the erosion, as in the loop. In scenarios with a gain the plateau lies at the success of the world.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evolve_dag.config.schema import GateSettings
from evolve_dag.evaluation import gate
from evolve_dag.evaluation.gate import Night, decide_on
from evolve_dag.records import Standing

Floats = NDArray[np.float64]


SPREAD, WANDER, CLOSE = 3.0, 0.2, 0.72
RESAMPLES = 1000
"""Of the interval of a night, where the gate takes 4,000: most of the time goes there."""
STARTS = (0.85, 0.45, 0.25)
"""Success of the first policy."""
CLIMB = (-0.03, -0.11, -0.20, -0.17, -0.13, -0.13, -0.05, -0.03)
"""What the pocket world gains night by night; for a plateau at 95%."""


@dataclass(frozen=True, slots=True)
class Policy:
    """One policy of a run."""

    success: float
    """In the population of tasks."""
    nights: int
    """That it wandered."""
    wandered: Floats


@dataclass(frozen=True, slots=True)
class Run:
    """What became of one lineage."""

    restored: int | None
    """First night on which the best came back; "by 10" counts from the end of the gains that a scenario begins with."""
    keeps: int
    success: tuple[float, ...]
    """Of who holds, after each night, in the population."""
    sd: float
    """Mean SD of a task's difference."""
    below_peak: float
    """Highest success of any champion less that of the last."""


@cache
def _levels(spread: float) -> tuple[Floats, Floats]:
    """Mean success of tasks with this spread at each level."""
    nodes, weights = np.polynomial.hermite_e.hermegauss(61)
    levels = np.linspace(-16.0, 16.0, 641)
    return levels, (1 / (1 + np.exp(-(levels[:, None] + spread * nodes)))) @ (weights / weights.sum())


def chances(policy: Policy, difficulty_T: Floats) -> Floats:
    """Chance of each task."""
    levels, means = _levels(float(np.hypot(SPREAD, WANDER * policy.nights**0.5)))
    return 1 / (1 + np.exp(-(np.interp(policy.success, means, levels) + difficulty_T + policy.wandered)))


def played(policies: Sequence[Policy], difficulty_T: Floats, rng: np.random.Generator) -> list[Floats]:
    """What each of them, from the oldest on, solves in one night: 1 or 0 a task."""
    tasks, found, number_T = len(difficulty_T), [], np.empty(0)
    for at, policy in enumerate(policies):
        own_T = rng.random(tasks)
        apart = policy.nights - policies[at - 1].nights if at else 0
        number_T = np.where(rng.random(tasks) < CLOSE**apart, number_T, own_T) if at else own_T
        found.append((number_T < chances(policy, difficulty_T)).astype(float))
    return found


def lineage(success: float, losses: Sequence[float], tasks: int, settings: GateSettings, seed: int) -> Run:
    """One lineage: ``losses`` is what the candidate of each night truly loses against the champion that it comes from."""
    rng = np.random.default_rng(seed)
    difficulty_T = rng.normal(0, SPREAD, tasks)
    start = success + sum(loss for loss in losses if loss < 0)
    champion = best = Policy(start, 0, np.zeros(tasks))
    standing, decisions, held, sds, peak = Standing(), [], [], [], start
    for night, loss in enumerate(losses, 1):
        wandered = champion.wandered + rng.normal(0, WANDER, tasks)
        candidate = Policy(float(np.clip(champion.success - loss, 0.005, 0.995)), champion.nights + 1, wandered)
        between = [champion] if champion is not best else []
        of_best, *of_champion, of_candidate = played([best, *between, candidate], difficulty_T, rng)
        against = (of_candidate, of_champion[0]) if of_champion else None
        seen = Night(tasks, of_candidate, of_best, None, (0.0, 0.0), (4.0, 4.0), against)
        decided = decide_on(seen, settings, 0, iteration=night, standing=standing)
        champion = {"promote": candidate, "keep": champion, "restore": best}[decided.decision]
        best = candidate if decided.standing.best == night else best
        standing, peak = decided.standing, max(peak, champion.success)
        decisions.append(decided.decision)
        held.append(champion.success)
        sds.append(decided.evidence["success_sd"] or 0.0)
    restored = decisions.index("restore") + 1 if "restore" in decisions else None
    return Run(
        restored,
        decisions.count("keep"),
        tuple(held),
        float(np.mean(sds)),
        peak - held[-1],
    )


def scenarios() -> Iterator[tuple[str, list[float]]]:
    """Name, and the true loss of each night (negative: a gain)."""
    for loss in (0.0, 0.3, 0.5, 1.0, 2.0, 3.0):
        yield f"loses {loss:g} a night", [loss / 100] * 30
    yield "gains 8, 5, 3, 2, 1, then stays", [-0.08, -0.05, -0.03, -0.02, -0.01] + [0.0] * 25
    yield "gains 8, 5, 3, 2, 1, then loses 0.5", [-0.08, -0.05, -0.03, -0.02, -0.01] + [0.005] * 25
    yield "climbs by 85 in eight, then stays", [*CLIMB, *[0.0] * 30]
    yield "climbs by 85 in eight, then loses 0.5", [*CLIMB, *[0.005] * 30]
    yield "gains 2 four times, loses 12 once, then stays", [-0.02] * 4 + [0.12] + [0.0] * 25
    yield "one night in twenty loses 20", []


def nights_of(name: str, losses: Sequence[float], seed: int) -> list[float]:
    """The losses of one run; accidents are drawn."""
    if losses:
        return list(losses)
    return [0.2 if accident else 0.0 for accident in np.random.default_rng([seed, 7]).random(30) < 0.05]


def many(arguments: tuple[float, str, int, float, int, int]) -> dict[str, Any]:
    """All runs of one scenario, summed up."""
    gate.RESAMPLES = RESAMPLES
    start, name, tasks, margin, runs, seed = arguments
    settings = GateSettings(margin=margin)
    losses = dict(scenarios())[name]
    found = [lineage(start, nights_of(name, losses, seed + n), tasks, settings, seed + n) for n in range(runs)]
    climbing = next((at for at, loss in enumerate(losses) if loss >= 0), 0)
    ten = [run for run in found if run.restored is not None and run.restored - climbing <= 10]
    return {
        "start": start,
        "scenario": name,
        "tasks": tasks,
        "margin": margin,
        "runs": runs,
        "seed": seed,
        "sd": float(np.mean([run.sd for run in found])),
        "restored_10": len(ten) / runs,
        "restored_30": sum(run.restored is not None for run in found) / runs,
        "kept": float(np.mean([run.keeps / len(run.success) for run in found])),
        "success_10": float(np.mean([run.success[9] for run in found])),
        "success_30": float(np.mean([run.success[-1] for run in found])),
        "below_peak": float(np.mean([run.below_peak for run in found])),
    }


def fit(start: float, nights: int, tasks: int = 20_000) -> str:
    """Paired SD of two policies of the same level by the nights between them."""
    rng = np.random.default_rng(0)
    difficulty_T, wandered, sds = rng.normal(0, SPREAD, tasks), np.zeros(tasks), []
    best = Policy(start, 0, wandered)
    for night in range(1, nights + 1):
        wandered = wandered + rng.normal(0, WANDER, tasks)
        of_best, of_candidate = played([best, Policy(start, night, wandered)], difficulty_T, rng)
        sds.append(f"{(of_candidate - of_best).std():.3f}")
    return f"{start:.0%}: {' '.join(sds)}"


def main() -> None:
    """Print a line a scenario."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=float, nargs="+", default=STARTS)
    parser.add_argument("--scenarios", nargs="+", default=[name for name, _ in scenarios()])
    parser.add_argument("--tasks", type=int, nargs="+", default=[512])
    parser.add_argument("--margins", type=float, nargs="+", default=[GateSettings().margin])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--fit", action="store_true", help="print the paired SD by the nights between, and stop")
    given = parser.parse_args()
    if given.fit:
        print("\n".join(fit(start, 10) for start in (*given.starts, 0.7)))
        return
    jobs = [
        (start, name, tasks, margin, given.runs, given.seed)
        for tasks in given.tasks
        for margin in given.margins
        for start in given.starts
        for name in given.scenarios
    ]
    print(f"{given.runs} runs of at least 30 nights each, seeds {given.seed} to {given.seed + given.runs - 1}")
    heads = "success", "tasks", "margin", "SD", "a night", "back by 10", "by 30", "kept", "held at 10", "at 30", "below peak"
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    results = []
    with ProcessPoolExecutor(given.processes) as pool:
        for row in pool.map(many, jobs):
            results.append(row)
            print(
                f"| {100 * row['start']:g}% | {row['tasks']} | {100 * row['margin']:g} | {row['sd']:.2f} | {row['scenario']} | "
                f"{row['restored_10']:.1%} | {row['restored_30']:.1%} | {row['kept']:.1%} | {row['success_10']:.1%} | "
                f"{row['success_30']:.1%} | {100 * row['below_peak']:.1f} |",
                flush=True,
            )
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
