"""Many episodes at once: groups of rollouts with bounded concurrency and a journal to resume from."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING

from evolve_dag.agent.loop import run_episode
from evolve_dag.errors import DataError
from evolve_dag.protocols import Environment, ExperienceSource, LanguageModel, StatefulEnvironment
from evolve_dag.records import Task, Trajectory
from evolve_dag.seeds import stable_hash

if TYPE_CHECKING:
    from evolve_dag.config.schema import RolloutSettings
    from evolve_dag.protocols import Verifier
    from evolve_dag.store.journal import Journal


PlayEpisode = Callable[[Task, int, int], Awaitable[Trajectory]]
"""(task, number of the rollout, seed of the episode) -> its trajectory."""


def episode_seed(seed: int, task_id: str, rollout: int) -> int:
    """Seed of one episode. It knows nothing of the experiment, so two policies on the same task draw the same
    numbers (common random numbers)."""
    return stable_hash("episode", seed, task_id, rollout)


async def gather_rollouts(
    tasks: Sequence[Task],
    group_size: int,
    *,
    model: LanguageModel,
    environment: Environment | StatefulEnvironment,
    verifier: Verifier,
    settings: RolloutSettings,
    seed: int,
    concurrency: int,
    experience: ExperienceSource | None = None,
    journal: Journal | None = None,
    on_done: Callable[[Trajectory], None] | None = None,
    greedy: bool = False,
) -> list[Trajectory]:
    """:func:`gather_episodes` that are played in this process.

    Args:
        greedy: argmax in place of the settings' temperature.
    """
    if greedy:
        settings = settings.model_copy(update={"temperature": 0.0})

    async def play(task: Task, rollout: int, seed: int) -> Trajectory:
        return await run_episode(
            task,
            rollout,
            model=model,
            environment=environment,
            verifier=verifier,
            settings=settings,
            seed=seed,
            experience=experience,
        )

    return await gather_episodes(tasks, group_size, play, seed=seed, concurrency=concurrency, journal=journal, on_done=on_done)


async def gather_episodes(
    tasks: Sequence[Task],
    group_size: int,
    play: PlayEpisode,
    *,
    seed: int,
    concurrency: int,
    journal: Journal | None = None,
    on_done: Callable[[Trajectory], None] | None = None,
) -> list[Trajectory]:
    """Play ``group_size`` episodes of each task, at most ``concurrency`` at a time.

    Args:
        play: plays one, here or elsewhere.
        journal: every finished trajectory is appended before it counts as done; what the journal already
            holds for the same task, rollout and seed is not run again. Failed rollouts count as done.
        on_done: called once per trajectory, for those from the journal as well.

    Returns:
        Trajectories in the order of the tasks, then of the rollouts, however they finished.

    Raises:
        DataError: two tasks share an id.
    """
    repeated = [name for name, count in Counter(task.id for task in tasks).items() if count > 1]
    if repeated:
        raise DataError(f"{len(repeated)} task ids appear twice, e.g. {repeated[0]!r}", "give every task its own id")
    jobs = [(task, rollout) for task in tasks for rollout in range(group_size)]
    done = _from_journal(journal)
    results: list[Trajectory | None] = []
    for task, rollout in jobs:
        earlier = done.get((task.id, rollout, episode_seed(seed, task.id, rollout)))
        results.append(earlier)
        if earlier is not None and on_done is not None:
            on_done(earlier)
    waiting = iter([position for position, result in enumerate(results) if result is None])

    async def work() -> None:
        for position in waiting:  # shared by all workers: each takes the next free position
            task, rollout = jobs[position]
            trajectory = await play(task, rollout, episode_seed(seed, task.id, rollout))
            _to_journal(journal, trajectory)
            results[position] = trajectory
            if on_done is not None:
                on_done(trajectory)

    count = min(max(1, concurrency), sum(result is None for result in results))
    workers = [asyncio.create_task(work()) for _ in range(count)]
    try:
        await asyncio.gather(*workers)
    finally:
        # One worker failed (a full disk under the journal, say) or the caller cancelled: stop the others first,
        # so that nothing writes after the error is out.
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
    return [result for result in results if result is not None]


def _from_journal(journal: Journal | None) -> dict[tuple[str, int, int], Trajectory]:
    if journal is None:
        return {}
    from evolve_dag.store.frames import trajectory_from_dict

    trajectories = (trajectory_from_dict(record) for record in journal.records())
    return {(t.task_id, t.rollout, t.seed): t for t in trajectories}


def _to_journal(journal: Journal | None, trajectory: Trajectory) -> None:
    if journal is not None:
        from evolve_dag.store.frames import trajectory_to_dict

        journal.append(trajectory_to_dict(trajectory))
