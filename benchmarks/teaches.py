"""Does a pool teach anything? The base policy on training games, with the experiment's `start_pool` in context against without.

    python benchmarks/teaches.py configs/textworld_coin.yaml --games 64
    python benchmarks/teaches.py configs/textworld_coin.yaml --games 64 --model models/smollm2-135m     # before the warm-up

The first question of any run with external principles: what does not help in the context cannot be learned from it. Same games,
same draws, both ways; paired 95% interval over games. Training games, so that nothing is chosen by looking at held-out ones.
Resumes: finished episodes are in a journal under the store.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import time
from pathlib import Path

from evolve_dag.agent.rollouts import gather_rollouts
from evolve_dag.config.loading import load_experiment
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import ConfigError
from evolve_dag.evaluation.intervals import by_task, mean_interval, paired_difference
from evolve_dag.inference.backends import open_transformers
from evolve_dag.inference.folders import base_identity
from evolve_dag.inference.roles import Roles
from evolve_dag.inference.transformers import TransformersModel
from evolve_dag.interop.pools import pool_from_file
from evolve_dag.records import Trajectory
from evolve_dag.steps.policies import experience_source
from evolve_dag.store.journal import Journal
from evolve_dag.tasks.suites import load_split

CONDITIONS = ("without", "with")


def play(e: Experiment, games: int, condition: str, model: TransformersModel, store: Path) -> list[Trajectory]:
    """The first games of the training split."""
    with Roles(e) as roles:
        split = load_split(e, "train", roles)
        pool = pool_from_file(Path(e.start_pool))
        source = experience_source(e, pool, roles) if condition == "with" else None
        decides = (base_identity(e.models.policy), e.slice("environment", "rollout", "injection", "selection"), pool.to_json())
        name = hashlib.sha256(repr((condition, *decides)).encode()).hexdigest()[:16]
        store.mkdir(parents=True, exist_ok=True)
        return asyncio.run(
            gather_rollouts(
                split.tasks[:games],
                1,
                model=model,
                environment=split.environment,
                verifier=split.verifier,
                settings=e.rollout,
                seed=e.seed,
                concurrency=e.runtime.concurrency,
                experience=source,
                journal=Journal(store / f"{condition}-{name}.jsonl"),
            )
        )


def told(found: list[Trajectory]) -> str:
    """Mean reward with its interval, and what the episodes were like."""
    tasks, rewards = [one.task_id for one in found], [one.reward for one in found]
    interval = mean_interval(tasks, rewards)
    mean = sum(one or 0.0 for one in rewards) / len(rewards)
    steps = [step for one in found for step in one.steps]
    refused = sum(step.problem is not None or "refused" in step.features.values() for step in steps) / max(1, len(steps))
    span = f" ({interval[0]:.1%} to {interval[1]:.1%})" if interval else ""
    return f"reward {mean:.1%}{span}, {len(steps) / len(found):.1f} commands a game, {refused:.1%} of them refused"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--games", type=int, default=64)
    parser.add_argument("--model", default="", help="Folder in place of models.policy.path")
    parser.add_argument("--store", type=Path, default=Path(".evolve/teaches"))
    asked = parser.parse_args()
    e = load_experiment(asked.config)
    if not e.start_pool:
        raise ConfigError(f"{asked.config}: there is no start_pool", "name the pool whose worth is asked")
    if asked.model:
        policy = e.models.policy.model_copy(update={"path": asked.model})
        e = e.model_copy(update={"models": e.models.model_copy(update={"policy": policy})})
    found: dict[str, list[Trajectory]] = {}
    for condition in CONDITIONS:
        model = open_transformers(e.models.policy, runtime=e.runtime)
        begun, cpu = time.monotonic(), time.process_time()
        found[condition] = play(e, asked.games, condition, model, asked.store)
        seconds, counted = time.monotonic() - begun, model.counters
        tokens = f"{counted.computed_tokens:,} tokens computed, {counted.sampled_tokens:,} sampled"
        print(f"{condition}: {told(found[condition])}")
        print(f"  {seconds:.0f} s ({time.process_time() - cpu:.0f} s of CPU), {tokens}", flush=True)
    pairs = [by_task([t.task_id for t in found[c]], [t.reward for t in found[c]]) for c in reversed(CONDITIONS)]
    print("with - without:", paired_difference(*pairs))


if __name__ == "__main__":
    main()
