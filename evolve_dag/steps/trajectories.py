"""Step ``trajectories``: G rollouts per training task, verified (METHOD steps 1 and 2)."""

from __future__ import annotations

from collections.abc import Iterator

from evolve_dag.config.schema import Experiment
from evolve_dag.evaluation.gate import LEAST_JUDGED
from evolve_dag.evaluation.intervals import by_task
from evolve_dag.evaluation.metrics import counts
from evolve_dag.records import Trajectory
from evolve_dag.seeds import stable_hash
from evolve_dag.steps.body import Playing, StepContext
from evolve_dag.steps.policies import (
    ANSWERED,
    TASK_KEYS,
    Rollouts,
    answered,
    condition_of,
    fan_out,
    judged,
    open_policy,
    play_students,
)
from evolve_dag.steps.spec import Check, StepSpec, Table, Verdict
from evolve_dag.store.artifacts import Artifact
from evolve_dag.store.frames import save_trajectories
from evolve_dag.store.layout import TRAJECTORIES
from evolve_dag.tasks.suites import check_disjoint, left_out, load_split, one_world


def run(context: StepContext) -> None:
    """Roll out policy(k) without experience in its context, so that what it lacks shows."""
    trajectories = _roll_out(context)
    save_trajectories(context.build.path, trajectories)
    context.build.note(**counts(trajectories))
    if context.experiment.rollout.more:  # tasks count alike, however many rollouts they got
        known = by_task([one.task_id for one in trajectories], [one.reward for one in trajectories])
        context.build.note(success=sum(sum(own) / len(own) for own in known.values()) / len(known) if known else None)
    if gone := left_out(context.experiment, "train"):
        context.build.note(left_out=len(gone))


def _roll_out(context: StepContext) -> list[Trajectory]:
    experiment, adapter = context.experiment, context.entering.adapter
    seed, size = stable_hash("trajectories", experiment.seed, context.iteration), experiment.rollout.group_size
    if context.workers is not None:
        playing = Playing("trajectories", context.iteration, "train", adapter)
        return fan_out(context, context.workers, playing, seed=seed, group_size=size)
    split = load_split(experiment, "train", context.roles)
    with open_policy(context.store, adapter, context.roles) as model:
        condition = condition_of(context, Rollouts("rollouts", split, seed, size), model)
        return play_students(context, condition, experiment.runtime.concurrency)


def examine(artifact: Artifact, experiment: Experiment) -> Iterator[Verdict]:
    """Whether enough could be judged, and who was asked did answer."""
    yield judged(artifact, TRAJECTORIES)
    yield answered(artifact)


def _unread(experiment: Experiment) -> tuple[str, ...]:
    """The other splits decide what is left out of the training tasks, where anything is."""
    return () if one_world(experiment) else ("tasks.development", "tasks.held_out")


SPEC = StepSpec(
    "trajectories",
    "A group of rollouts per training task, without experience, verified; a reward may be null: not judged.",
    version="6",
    config=("seed", "tasks.train", "tasks.development", "tasks.held_out", *TASK_KEYS),
    inputs=("policy",),
    run=run,
    kinds=frozenset({"parquet", "polars"}),
    iteration=True,
    unread=_unread,
    guard=check_disjoint,
    checks=(Check("judged", f"At least {LEAST_JUDGED:.0%} of the trajectories could be judged."), ANSWERED),
    examine=examine,
    tables=(Table(TRAJECTORIES, ("task_id", "question", "answer", "reward", "status", "turns", "tokens")),),
)
