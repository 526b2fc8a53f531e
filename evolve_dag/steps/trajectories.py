"""Step ``trajectories``: G rollouts per training task, verified (METHOD steps 1 and 2)."""

from __future__ import annotations

from evolve_dag.evaluation.metrics import counts
from evolve_dag.seeds import stable_hash
from evolve_dag.steps.body import StepContext
from evolve_dag.steps.policies import open_policy, roll_out
from evolve_dag.store.frames import save_trajectories
from evolve_dag.tasks.suites import check_disjoint, load_split


def run(context: StepContext) -> None:
    """Roll out policy(k) without experience in its context, so that what it lacks shows."""
    experiment = context.experiment
    check_disjoint(experiment)
    split = load_split(experiment, "train", context.roles)
    with open_policy(context.store, context.entering.adapter, context.roles) as model:
        trajectories = roll_out(
            context,
            split,
            model,
            label="rollouts",
            seed=stable_hash("trajectories", experiment.seed, context.iteration),
            group_size=experiment.rollout.group_size,
        )
    save_trajectories(context.build.path, trajectories)
    context.build.note(**counts(trajectories))
