"""Results of a study that nobody ran: invented numbers, real types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from studies import study

from evolve_dag.evaluation.metrics import Metrics
from evolve_dag.study.results import Result, Results

TASKS = 120


def results(
    folder: Path,
    curves: Mapping[str, Sequence[float]],
    *,
    seeds: Sequence[int] = (4, 5, 6),
    missing: Mapping[str, int] | None = None,
    references: Mapping[str, Sequence[str]] | None = None,
    **changes: object,
) -> Results:
    """Arm -> success of the base policy and of every candidate; a little better with experience; base at 0 and 0.3 too.

    The gate declines the second candidate under seed 4, so that what is held then is the first.
    """
    found = study(
        folder,
        seeds=list(seeds),
        iterations=max(map(len, curves.values())) - 1,
        arms={
            arm: {"config": "arm.yaml", "iterations": len(curve) - 1, "reference": list((references or {}).get(arm, ()))}
            for arm, curve in curves.items()
        },
        **changes,
    )
    rows = [row for arm, curve in curves.items() for seed in seeds for row in _cell(arm, seed, curve)]
    facts = {f"{seed}-{n}": {"depth": str(n % 3)} for seed in seeds for n in range(TASKS)}
    return Results(found, tuple(rows), facts, missing or {})


def _cell(arm: str, seed: int, curve: Sequence[float]) -> list[Result]:
    rng = np.random.default_rng([seed, TASKS])
    hardness = rng.random(TASKS)  # common to all policies of a seed, so that pairs are tight

    def answered(share: float) -> dict[str, float]:
        return {f"{seed}-{n}": float(hardness[n] < share) for n in range(TASKS)}

    base = {"held": curve[0], "without": curve[0], "base_at_0": curve[0] + 0.05, "base_at_0.3": curve[0] + 0.1}
    rows = [_row(arm, seed, 0, {c: answered(share) for c, share in base.items()})]
    for k, share in enumerate(curve[1:], 1):
        held = curve[_champion(seed, k)]
        shares = {"without": share, "with": share + 0.03, "ceiling": share + 0.01, "greedy": share + 0.1}
        shares |= {"held": held, "held_with": held + 0.03, "held_greedy": held + 0.1}
        rows.append(_row(arm, seed, k, {c: answered(s) for c, s in shares.items()}))
    return rows


def _champion(seed: int, iteration: int) -> int:
    return 1 if (seed, iteration) == (4, 2) else iteration


def _row(arm: str, seed: int, iteration: int, rewards: Mapping[str, Mapping[str, float]]) -> Result:
    metrics = {
        condition: Metrics(
            n=TASKS, tasks=TASKS, judged=TASKS, success=sum(tasks.values()) / TASKS, premature=0.1, no_tool=0.02,
            unanswered=0.0, failed=0.0, forced=0.0, turns=4.0 + iteration, tokens=60.0, problems=0.0,
            intervals={"success": (0.1, 0.9)},
        )
        for condition, tasks in rewards.items()
    }  # fmt: skip
    if iteration == 0:
        return Result(arm, seed, 0, rewards, metrics)
    champion = _champion(seed, iteration)
    decision = "promote" if champion == iteration else "keep"
    return Result(
        arm, seed, iteration, rewards, metrics, 3 + iteration, decision, champion, 40_000, 300_000 + 1000 * seed, 60.0
    )  # fmt: skip
