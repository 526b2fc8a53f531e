"""The figures of the README: arms of the paper's grid over several seeds, on worlds that were not used while building.

    python benchmarks/figures.py --seeds 101 102 103 --arms pocket lexical --out docs/figures.json

Seed S trains on pocket world 1000+S, gates on world 2000+S and is scored on 512 tasks of world 3000+S. Results that the store
already holds are not computed again. Arms run side by side, one thread each.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from evolve_dag.config.loading import load_experiment
from evolve_dag.config.schema import Experiment
from evolve_dag.steps.base import STEP_ORDER, run_step
from evolve_dag.store.artifacts import Store

CONFIGS = Path(__file__).parent.parent / "configs"


def arm(name: str, seed: int, held_out: int) -> Experiment:
    """The experiment ``configs/<name>.yaml`` on the worlds of ``seed``."""
    values = load_experiment(CONFIGS / f"{name}.yaml").model_dump()
    values |= {"experiment": f"{name}-f{seed}", "seed": seed}
    for number, (split, count) in enumerate((("train", None), ("development", None), ("held_out", held_out)), 1):
        values["tasks"][split] |= {"world": 1000 * number + seed, **({"count": count} if count else {})}
    values["runtime"] |= {"threads": 1}
    return Experiment.model_validate(values)


def run(name: str, seed: int, iterations: int, held_out: int, root: str) -> dict[str, Any]:
    """All iterations of one arm and seed; its numbers."""
    import torch

    torch.set_num_threads(1)
    experiment, store = arm(name, seed, held_out), Store(root)
    rows, started = [], time.monotonic()
    for k in range(1, iterations + 1):
        outcomes = {step: run_step(step, experiment, k, store) for step in STEP_ORDER}
        scores = outcomes["scores"].artifact.json("summary.json")
        rows.append(
            {
                "iteration": k,
                **{c: _short(scores[c]) for c in ("base", "without", "with", "greedy") if c in scores},
                "items": outcomes["experience"].artifact.summary["items"],
                "decision": outcomes["promotion"].artifact.json("decision.json")["decision"],
                "seconds": {s: round(o.seconds, 1) for s, o in outcomes.items()},
            }
        )
    return {"arm": name, "seed": seed, "rows": rows, "seconds": round(time.monotonic() - started, 1)}


def _short(metrics: dict[str, Any]) -> dict[str, Any]:
    keys = ("n", "success", "premature", "no_tool", "unanswered", "forced", "turns", "problems")
    return {**{k: metrics[k] for k in keys}, "interval": metrics["intervals"]["success"], "by": metrics["by"]}


def table(results: list[dict[str, Any]]) -> str:
    """Markdown: per arm the mean over seeds at every iteration."""
    lines = [
        "| arm | seeds | base | "
        + " | ".join(f"{k}" for k in (1, 2, 3))
        + " | x base | with exp. | premature | unanswered | turns | kept |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(r["arm"] for r in results):
        runs = [r["rows"] for r in results if r["arm"] == name]

        def mean(runs: list[Any], k: int, condition: str, key: str = "success") -> float:
            found = [rows[k][condition][key] for rows in runs if condition in rows[k]]
            return statistics.fmean(found) if found else float("nan")

        base, last = mean(runs, 0, "base"), len(runs[0]) - 1
        curve = " | ".join(f"{mean(runs, k, 'without'):.1%}" for k in range(last + 1))
        kept = sum(row["decision"] == "keep" for rows in runs for row in rows)
        success, informed = mean(runs, last, "without"), mean(runs, last, "with")
        shown = f"{informed:.1%}" if informed == informed else "–"  # nan: the arm has no experience
        premature, unanswered, turns = (mean(runs, last, "without", key) for key in ("premature", "unanswered", "turns"))
        lines.append(
            f"| {name} | {len(runs)} | {base:.1%} | {curve} | {success / base:.2f} | {shown} | {premature:.1%} | "
            f"{unanswered:.1%} | {turns:.2f} | {kept} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[101, 102, 103])
    parser.add_argument("--arms", nargs="+", default=["pocket", "lexical"])
    parser.add_argument("--iterations", type=int, default=3)
    parser.add_argument("--held-out", type=int, default=512)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--store", default=".evolve/figures")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    jobs = [(name, seed) for seed in args.seeds for name in args.arms]
    results = []
    with ProcessPoolExecutor(args.processes) as pool:
        futures = {
            pool.submit(run, name, seed, args.iterations, args.held_out, args.store): (name, seed) for name, seed in jobs
        }
        for future in as_completed(futures):
            result = future.result()
            results.append(result)
            last = result["rows"][-1]
            print(
                f"{futures[future]} {result['seconds']:.0f} s, success {last['without']['success']:.1%}",
                file=sys.stderr,
                flush=True,
            )
    results.sort(key=lambda r: (args.arms.index(r["arm"]), r["seed"]))
    if args.out:
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
