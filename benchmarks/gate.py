"""What the gate sees: simulated nights with a true loss or gain, through the gate's own code.

    python benchmarks/gate.py --runs 400 --out docs/gate.json        # the table of docs/LOG.md; minutes on one idle core

How nights are simulated. Task i is solved by a policy with probability sigmoid(level + a_i + e_i): a_i is the task's
difficulty (SD ``spread`` logits), e_i what this policy is better or worse at (a random walk over the nights, SD ``wander`` a
night), and the level is set so that success over the whole population of tasks is what the scenario says. So a loss of 0 is
none in the population, while the development tasks at hand may say otherwise. On a share ``coupled`` of the tasks the outcome
hangs on one common number for both policies, as common draws make it; elsewhere they are independent. The paired SD that
results is printed; stored runs show 0.26 to 0.37 (docs/LOG.md).

The candidate of a night comes from the champion: it loses (or gains) what the scenario says against *that*, so a decline or a
restore stops the erosion, as in the loop. In scenarios with a gain the plateau lies at the success of the world.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evolve_dag.config.schema import GateSettings
from evolve_dag.evaluation.gate import decide
from evolve_dag.records import Score, Standing

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class World:
    """How outcomes vary."""

    start: float
    """Success of the first policy."""
    spread: float
    """SD of the tasks' difficulty, logits."""
    wander: float
    """SD of what a policy unlearns and learns a night beside its level, logits."""
    coupled: float
    """Share of tasks whose outcome hangs on one common number for both policies."""


WORLDS = {
    "85%": World(0.85, 2.0, 0.2, 0.7),
    "45%": World(0.45, 3.0, 0.2, 0.5),
    "30%": World(0.30, 3.5, 0.2, 0.5),
}


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
    """First night on which the best came back."""
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


def chances(world: World, policy: Policy, difficulty_T: Floats) -> Floats:
    """Chance of each task."""
    levels, means = _levels(float(np.hypot(world.spread, world.wander * policy.nights**0.5)))
    return 1 / (1 + np.exp(-(np.interp(policy.success, means, levels) + difficulty_T + policy.wandered)))


def scores(solved_T: NDArray[np.bool_]) -> list[Score]:
    """One rollout a task."""
    return [Score(f"t{n:04d}", 0, "", float(right), False, "answered", 4, 20) for n, right in enumerate(solved_T)]


def lineage(world: World, losses: Sequence[float], tasks: int, settings: GateSettings, seed: int) -> Run:
    """One lineage: ``losses`` is what the candidate of each night truly loses against the champion that it comes from."""
    rng = np.random.default_rng(seed)
    difficulty_T = rng.normal(0, world.spread, tasks)
    start = world.start + sum(loss for loss in losses if loss < 0)
    champion = best = Policy(start, 0, np.zeros(tasks))
    standing, decisions, success, sds, peak = Standing(), [], [], [], start
    for night, loss in enumerate(losses, 1):
        wandered = champion.wandered + rng.normal(0, world.wander, tasks)
        candidate = Policy(float(np.clip(champion.success - loss, 0.005, 0.995)), champion.nights + 1, wandered)
        common_T, own_T = rng.random(tasks), rng.random(tasks)
        coupled_T = rng.random(tasks) < world.coupled
        solved = [
            np.where(coupled_T, common_T, drawn_T) < chances(world, policy, difficulty_T)
            for policy, drawn_T in ((candidate, own_T), (best, common_T))
        ]
        gate = decide(*map(scores, solved), settings, 0, iteration=night, standing=standing)
        champion = {"promote": candidate, "keep": champion, "restore": best}[gate.decision]
        best = candidate if gate.standing.best == night else best
        standing, peak = gate.standing, max(peak, champion.success)
        decisions.append(gate.decision)
        success.append(champion.success)
        sds.append(gate.evidence["success_sd"] or 0.0)
    restored = decisions.index("restore") + 1 if "restore" in decisions else None
    return Run(
        restored,
        decisions.count("keep"),
        tuple(success),
        float(np.mean(sds)),
        peak - success[-1],
    )


def scenarios() -> Iterator[tuple[str, list[float]]]:
    """Name, and the true loss of each night (negative: a gain)."""
    for loss in (0.0, 0.3, 0.5, 1.0, 3.0):
        yield f"loses {loss:g} a night", [loss / 100] * 30
    yield "gains 8, 5, 3, 2, 1, then stays", [-0.08, -0.05, -0.03, -0.02, -0.01] + [0.0] * 25
    yield "gains 8, 5, 3, 2, 1, then loses 0.5", [-0.08, -0.05, -0.03, -0.02, -0.01] + [0.005] * 25
    yield "one night in twenty loses 20", []


def nights_of(name: str, losses: Sequence[float], seed: int) -> list[float]:
    """The losses of one run; accidents are drawn."""
    if losses:
        return list(losses)
    return [0.2 if accident else 0.0 for accident in np.random.default_rng([seed, 7]).random(30) < 0.05]


def many(arguments: tuple[str, str, int, float, int, int]) -> dict[str, Any]:
    """All runs of one scenario, summed up."""
    where, name, tasks, margin, runs, seed = arguments
    world, settings = WORLDS[where], GateSettings(margin=margin)
    losses = dict(scenarios())[name]
    found = [lineage(world, nights_of(name, losses, seed + n), tasks, settings, seed + n) for n in range(runs)]
    ten = [run for run in found if run.restored is not None and run.restored <= 10]
    return {
        "world": where,
        **asdict(world),
        "scenario": name,
        "tasks": tasks,
        "margin": margin,
        "runs": runs,
        "seed": seed,
        "sd": float(np.mean([run.sd for run in found])),
        "restored_10": len(ten) / runs,
        "restored_30": sum(run.restored is not None for run in found) / runs,
        "kept": float(np.mean([run.keeps for run in found])) / 30,
        "success_10": float(np.mean([run.success[9] for run in found])),
        "success_30": float(np.mean([run.success[-1] for run in found])),
        "below_peak": float(np.mean([run.below_peak for run in found])),
    }


def main() -> None:
    """Print a line a scenario."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--worlds", nargs="+", default=list(WORLDS), choices=list(WORLDS))
    parser.add_argument("--scenarios", nargs="+", default=[name for name, _ in scenarios()])
    parser.add_argument("--tasks", type=int, nargs="+", default=[512])
    parser.add_argument("--margins", type=float, nargs="+", default=[GateSettings().margin])
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    jobs = [
        (world, name, tasks, margin, given.runs, given.seed)
        for tasks in given.tasks
        for margin in given.margins
        for world in given.worlds
        for name in given.scenarios
    ]
    print(f"{given.runs} runs of 30 nights each, seeds {given.seed} to {given.seed + given.runs - 1}")
    heads = "success", "tasks", "margin", "SD", "a night", "back by 10", "by 30", "kept", "held at 10", "at 30", "below peak"
    print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    results = []
    with ProcessPoolExecutor(given.processes) as pool:
        for row in pool.map(many, jobs):
            results.append(row)
            print(
                f"| {row['world']} | {row['tasks']} | {100 * row['margin']:g} | {row['sd']:.2f} | {row['scenario']} | "
                f"{row['restored_10']:.1%} | {row['restored_30']:.1%} | {row['kept']:.1%} | {row['success_10']:.1%} | "
                f"{row['success_30']:.1%} | {100 * row['below_peak']:.1f} |",
                flush=True,
            )
    if given.out:
        given.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
