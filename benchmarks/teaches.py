"""Does a pool teach anything? The base policy on games, with the experiment's `start_pool` in context against without.

    python benchmarks/teaches.py configs/textworld_coin.yaml --games 64
    python benchmarks/teaches.py configs/textworld_coin.yaml --games 64 --model models/smollm2-135m     # before the warm-up
    python benchmarks/teaches.py configs/textworld_coin.yaml --games 200 --split held_out --seeds 1 2 3    # once all is chosen

The first question of any run with external principles: what does not help in the context cannot be learned from it. Same games,
same draws, both ways; paired 95% interval over games. Training games, so that nothing is chosen by looking at held-out ones.
Seed S plays the games of the S-th world after the file's. Resumes: finished episodes are in a journal under the
store.
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
from evolve_dag.tasks.suites import SPLITS, SplitName, load_split

CONDITIONS = ("without", "with")


def of_seed(e: Experiment, seed: int) -> Experiment:
    """The experiment on worlds of its own.

    Raises:
        ConfigError: its tasks come from no world.
    """
    if any(own.world is None for own in e.tasks.splits.values()):
        raise ConfigError(
            f"{e.experiment}: its tasks come from no world", "leave --seeds out: they would be the same tasks again"
        )
    splits = {name: own.model_copy(update={"world": (own.world or 0) + seed}) for name, own in e.tasks.splits.items()}
    return e.model_copy(update={"seed": seed, "tasks": e.tasks.model_copy(update=splits)})


def play(
    e: Experiment, name_of_split: SplitName, games: int, condition: str, model: TransformersModel, store: Path
) -> list[Trajectory]:
    """The first games of a split."""
    with Roles(e) as roles:
        split = load_split(e, name_of_split, roles)
        pool = pool_from_file(Path(e.start_pool))
        source = experience_source(e, pool, roles) if condition == "with" else None
        decides = (base_identity(e.models.policy), e.slice("environment", "rollout", "injection", "selection"), pool.to_json())
        questions = (e.seed, e.slice(f"tasks.{name_of_split}"))
        name = hashlib.sha256(repr((condition, *decides, *questions)).encode()).hexdigest()[:16]
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
    parser.add_argument("--split", choices=SPLITS, default="train")
    parser.add_argument("--seeds", type=int, nargs="+", default=[], help="In place of the file's own")
    parser.add_argument("--store", type=Path, default=Path(".evolve/teaches"))
    asked = parser.parse_args()
    e = load_experiment(asked.config)
    if not e.start_pool:
        raise ConfigError(f"{asked.config}: there is no start_pool", "name the pool whose worth is asked")
    if asked.model:
        policy = e.models.policy.model_copy(update={"path": asked.model})
        e = e.model_copy(update={"models": e.models.model_copy(update={"policy": policy})})
    found: dict[str, list[Trajectory]] = {condition: [] for condition in CONDITIONS}
    for seed in asked.seeds or [None]:
        one = e if seed is None else of_seed(e, seed)
        own: dict[str, list[Trajectory]] = {}
        for condition in CONDITIONS:
            model = open_transformers(e.models.policy, runtime=e.runtime)
            begun, cpu = time.monotonic(), time.process_time()
            own[condition] = play(one, asked.split, asked.games, condition, model, asked.store)
            found[condition] += own[condition]
            seconds, counted = time.monotonic() - begun, model.counters
            tokens = f"{counted.computed_tokens:,} tokens computed, {counted.sampled_tokens:,} sampled"
            print(f"seed {one.seed}, {len(own[condition])} games of {asked.split}, {condition}: {told(own[condition])}")
            print(f"  {seconds:.0f} s ({time.process_time() - cpu:.0f} s of CPU), {tokens}", flush=True)
        print("with - without:", difference(own), flush=True)
    if len(asked.seeds) > 1:
        print("all seeds, with - without:", difference(found))


def difference(found: dict[str, list[Trajectory]]) -> object:
    """Paired over games."""
    sides = [found[condition] for condition in reversed(CONDITIONS)]
    return paired_difference(*(by_task([one.task_id for one in side], [one.reward for one in side]) for side in sides))


if __name__ == "__main__":
    main()
