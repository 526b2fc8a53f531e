"""What several steps open: the policy that acts, the pool, and rollouts with progress and journal."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve_dag.agent.rollouts import run_rollouts
from evolve_dag.frames import trajectories_from_frames, trajectories_to_frames
from evolve_dag.inference.folders import model_folder
from evolve_dag.records import Task, Trajectory

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evolve_dag.agent.loop import ExperienceSource
    from evolve_dag.benchmarks.suites import Split
    from evolve_dag.config import Experiment
    from evolve_dag.experience.pool import Pool
    from evolve_dag.inference.transformers import TransformersModel
    from evolve_dag.steps.base import StepContext
    from evolve_dag.store import Artifact, Store


@contextmanager
def open_policy(experiment: Experiment, adapter: Path | None) -> Iterator[TransformersModel]:
    """The policy with its adapter merged in; memory is freed on leaving.

    Args:
        adapter: folder of the adapter, or None for the bare base model.
    """
    import asyncio

    from evolve_dag.inference.transformers import TransformersModel

    settings, runtime = experiment.models.policy, experiment.runtime
    model = TransformersModel.load(
        model_folder(settings),
        adapter_dir=adapter,
        dtype=settings.dtype,
        device=runtime.device,
        threads=runtime.threads,
        max_batch=runtime.concurrency,
    )
    try:
        yield model
    finally:
        asyncio.run(model.close())


def adapter_folder(store: Store, digest: str | None) -> Path | None:
    """Folder of an adapter artifact, checked; None for the bare base model."""
    if digest is None:
        return None
    artifact = store.open("adapter", digest)
    artifact.verify()
    return artifact.path


def open_pool(artifact: Artifact | None) -> Pool:
    """The pool of an experience artifact, or an empty one."""
    from evolve_dag.experience.pool import Pool

    if artifact is None:
        return Pool()
    path = artifact.file("pool.json")
    return Pool.from_json(path.read_text(encoding="utf-8"), str(path))


def experience_source(experiment: Experiment, pool: Pool) -> ExperienceSource | None:
    """The pool as it stands in the teacher's context; None when there is nothing to inject."""
    from evolve_dag.experience.injection import Injector
    from evolve_dag.experience.selection import make_selector

    if experiment.injection == "none" or not pool.items:
        return None
    return Injector(experiment.injection, pool, make_selector(experiment.selection))


def roll_out(
    context: StepContext,
    split: Split,
    model: Any,
    *,
    label: str,
    seed: int,
    group_size: int,
    experience: ExperienceSource | None = None,
    greedy: bool = False,
    journal: str | None = None,
) -> list[Trajectory]:
    """Rollouts of all tasks of ``split``, resumed from the step's journal ``label``."""
    experiment = context.experiment
    context.progress.start(label, len(split.tasks) * group_size)
    try:
        return run_rollouts(
            split.tasks,
            group_size,
            model=model,
            environment=split.environment,
            verifier=split.verifier,
            settings=experiment.rollout,
            seed=seed,
            concurrency=experiment.runtime.concurrency,
            experience=experience,
            journal=context.build.journal(journal or label.replace(" ", "_")),
            on_done=lambda _: context.progress.advance(),
            greedy=greedy,
        )
    finally:
        context.progress.finish()


def save_trajectories(folder: Path, trajectories: Sequence[Trajectory], prefix: str = "") -> None:
    """``trajectories.parquet`` and ``steps.parquet``."""
    frame, steps = trajectories_to_frames(trajectories)
    frame.write_parquet(folder / f"{prefix}trajectories.parquet")
    steps.write_parquet(folder / f"{prefix}steps.parquet")


def load_trajectories(artifact: Artifact) -> list[Trajectory]:
    """What :func:`save_trajectories` wrote."""
    return trajectories_from_frames(artifact.frame("trajectories.parquet"), artifact.frame("steps.parquet"))


def counts(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Numbers for a manifest: episodes, judged, success, turns, sampled tokens, failures."""
    judged = [t.reward for t in trajectories if t.reward is not None]
    return {
        "trajectories": len(trajectories),
        "judged": len(judged),
        "success": sum(judged) / len(judged) if judged else None,
        "turns": sum(t.turns for t in trajectories) / max(1, len(trajectories)),
        "failed": sum(t.status == "failed" for t in trajectories),
        "unanswered": sum(t.status == "unanswered" for t in trajectories),
        "tokens": sum(len(s.token_ids) for t in trajectories for s in t.steps),
    }


def by_id(tasks: Sequence[Task]) -> dict[str, Task]:
    """Task id -> task."""
    return {task.id: task for task in tasks}
