"""What the conditions of a policy cost side by side, against one after the other, in CPU seconds of one thread.

    python benchmarks/evaluation.py configs/pocket.yaml .evolve 5 --tasks 256      # the policy and pool of iteration 5

Both sides roll out the same held-out tasks, without experience and with it, by the same weights under the same draws; that
they sampled the same tokens is said.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from evolve_dag.agent.rollouts import Condition, gather_conditions
from evolve_dag.config.loading import load_experiment
from evolve_dag.config.schema import Experiment
from evolve_dag.inference.folders import model_folder
from evolve_dag.inference.roles import Roles
from evolve_dag.inference.transformers import TransformersModel
from evolve_dag.records import Trajectory
from evolve_dag.steps.policies import adapter_folder, experience_source, open_pool
from evolve_dag.store.artifacts import Store
from evolve_dag.tasks.suites import load_split


def roll_out(
    experiment: Experiment, store: Store, iteration: int, batches: Sequence[Sequence[str]], concurrency: int
) -> dict[str, list[Trajectory]]:
    """The rollouts of each condition, ``without`` or ``with``; those of a batch side by side."""
    refs = {kind: store.ref(experiment.experiment, iteration, kind) for kind in ("adapter", "experience")}
    digests = {kind: ref.digest for kind, ref in refs.items() if ref is not None}
    found: dict[str, list[Trajectory]] = {}
    with Roles(experiment) as roles:
        split = load_split(experiment, "held_out", roles)
        source = experience_source(experiment, open_pool(store.open("experience", digests["experience"])), roles)
        folder = model_folder(experiment.models.policy)
        adapter = adapter_folder(store, digests["adapter"])
        model = TransformersModel.load(folder, adapter_dir=adapter, threads=1, max_batch=concurrency)
        for names in batches:
            conditions = [
                Condition(
                    split.tasks, 1, split.environment, split.verifier, experiment.rollout, 0, source if name == "with" else None
                )
                for name in names
            ]
            found |= zip(names, roles.run(gather_conditions(conditions, model=model, concurrency=concurrency)), strict=True)
        print("    ", model.counters)
        roles.run(model.close())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", type=Path)
    parser.add_argument("store", type=Path)
    parser.add_argument("iteration", type=int)
    parser.add_argument("--name", help="experiment in the store, where it is not that of the file")
    parser.add_argument("--tasks", type=int, default=256)
    parser.add_argument("--world", type=int, default=3061, help="of the held-out tasks")
    parser.add_argument("--repeats", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(1)
    values = load_experiment(given.experiment).model_dump(exclude_unset=False)
    values["tasks"]["held_out"] |= {"count": given.tasks, "world": given.world}
    experiment = Experiment.model_validate(values | ({"experiment": given.name} if given.name else {}))
    sides = {"one after the other, 128 at a time": ([["without"], ["with"]], 128)}
    sides["side by side, 512 at a time"] = ([["without", "with"]], 512)
    seconds: dict[str, float] = {}
    tokens = []
    for _ in range(given.repeats):
        for side, (batches, concurrency) in sides.items():
            begun = time.process_time()
            found = roll_out(experiment, Store(given.store), given.iteration, batches, concurrency)
            seconds[side] = min(seconds.get(side, np.inf), time.process_time() - begun)
            tokens.append([[step.token_ids for step in one.steps] for name in ("without", "with") for one in found[name]])
    for side, least in seconds.items():
        print(f"{side}: {least:.2f} CPU s")
    first, last = seconds.values()
    print(f"ratio {first / last:.2f}; same tokens: {all(one == tokens[0] for one in tokens)}")


if __name__ == "__main__":
    main()
