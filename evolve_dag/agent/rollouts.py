"""Many episodes at once: groups of rollouts with bounded concurrency and a journal to resume from."""

from __future__ import annotations

from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeGuard

from evolve_dag.agent.loop import NOT_JUDGED, judged, run_episode
from evolve_dag.agent.together import together
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
JudgeEpisode = Callable[[Task, Trajectory], Awaitable[Trajectory]]
"""(task, an episode of it that was played to its end) -> the same with a verdict, if there is one now."""


def episode_seed(seed: int, task_id: str, rollout: int) -> int:
    """Seed of one episode. It knows nothing of the experiment, so two policies on the same task draw the same
    numbers (common random numbers)."""
    return stable_hash("episode", seed, task_id, rollout)


def played_here(
    model: LanguageModel,
    environment: Environment | StatefulEnvironment,
    verifier: Verifier,
    settings: RolloutSettings,
    experience: ExperienceSource | None = None,
) -> PlayEpisode:
    """Episodes that are played in this process."""

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

    return play


def judged_here(verifier: Verifier) -> JudgeEpisode:
    """Verdicts of ``verifier`` for episodes that have none, since it could not be asked."""

    async def judge(task: Task, trajectory: Trajectory) -> Trajectory:
        told = (trajectory.error or "").startswith(NOT_JUDGED)
        return await judged(replace(trajectory, error=None) if told else trajectory, task, verifier)

    return judge


@dataclass(frozen=True, slots=True)
class Condition:
    """Rollouts of some tasks that are played in the same way from the same seed."""

    tasks: Sequence[Task]
    group_size: int
    """Rollouts of each task."""
    play: PlayEpisode
    """Plays one, here or elsewhere."""
    seed: int
    journal: Journal | None = None
    """Every finished trajectory is appended before it counts as done; what the journal already holds for the same task,
    rollout and seed is not run again, but for what has no verdict: whatever was in its way may be gone."""
    on_done: Callable[[Trajectory], None] | None = None
    """Called once per trajectory, for those from the journal as well."""
    judge: JudgeEpisode | None = None
    """Gives a verdict to what the journal holds without one; None: such an episode is played again."""
    first: int = 0
    """Number of the first of them."""

    def jobs(self) -> list[tuple[Task, int]]:
        """Every rollout to be made, group by group.

        Raises:
            DataError: two tasks share an id.
        """
        repeated = [name for name, count in Counter(task.id for task in self.tasks).items() if count > 1]
        if repeated:
            raise DataError(f"{len(repeated)} task ids appear twice, e.g. {repeated[0]!r}", "give every task its own id")
        return [(task, self.first + rollout) for task in self.tasks for rollout in range(self.group_size)]

    def earlier(self, jobs: Sequence[tuple[Task, int]]) -> list[Trajectory | None]:
        """Of each job what the journal holds, if anything."""
        done = _from_journal(self.journal)
        return [done.get((task.id, rollout, episode_seed(self.seed, task.id, rollout))) for task, rollout in jobs]

    async def run(self, task: Task, rollout: int, played: Trajectory | None = None) -> Trajectory:
        """One episode, in the journal when it returns.

        Args:
            played: the same, before this, without a verdict.
        """
        if played is not None and played.status != "failed" and self.judge is not None:
            trajectory = await self.judge(task, played)
        else:
            trajectory = await self.play(task, rollout, episode_seed(self.seed, task.id, rollout))
        _to_journal(self.journal, trajectory)
        return trajectory

    def tell(self, trajectory: Trajectory) -> None:
        """Call :attr:`on_done`."""
        if self.on_done is not None:
            self.on_done(trajectory)


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
    """:func:`gather_conditions` for one that is played in this process; ``greedy`` is argmax in place of the settings'
    temperature."""
    if greedy:
        settings = settings.model_copy(update={"temperature": 0.0})
    play = played_here(model, environment, verifier, settings, experience)
    (trajectories,) = await gather_conditions([Condition(tasks, group_size, play, seed, journal, on_done)], concurrency)
    return trajectories


async def gather_conditions(conditions: Sequence[Condition], concurrency: int) -> list[list[Trajectory]]:
    """Roll out all conditions, at most ``concurrency`` episodes at a time.

    The episodes of one task start together whatever their condition: as long as they ask the same, a model that answers many
    calls at once can answer once.

    Returns:
        Of each condition its trajectories in the order of the tasks, then of the rollouts, however they finished.

    Raises:
        DataError: two tasks of a condition share an id.
    """
    jobs = [condition.jobs() for condition in conditions]
    results = [condition.earlier(own) for condition, own in zip(conditions, jobs, strict=True)]
    for condition, own in zip(conditions, results, strict=True):
        for trajectory in own:
            if _settled(trajectory):
                condition.tell(trajectory)
    missing = [(at, number) for number, own in enumerate(results) for at, result in enumerate(own) if not _settled(result)]
    waiting = iter(sorted(missing, key=lambda job: job[0] / conditions[job[1]].group_size))

    async def work() -> None:
        for at, number in waiting:  # shared by all workers: each takes the next free position
            trajectory = await conditions[number].run(*jobs[number][at], results[number][at])
            results[number][at] = trajectory
            conditions[number].tell(trajectory)

    # Where one fails (a full disk under the journal, say) nothing writes after the error is out.
    await together(work() for _ in range(min(max(1, concurrency), len(missing))))
    return [[result for result in own if result is not None] for own in results]


def _settled(trajectory: Trajectory | None) -> TypeGuard[Trajectory]:
    """Whether there is an episode, and a verdict of it."""
    return trajectory is not None and trajectory.reward is not None


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
