"""Episodes that others play: written down by the step that asked, so that a kill costs those that were on their way."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from small_lineage import small

from evolve_dag.agent.loop import NOT_JUDGED
from evolve_dag.agent.rollouts import PlayEpisode
from evolve_dag.config.schema import contradictions
from evolve_dag.inference.ledger import Ledger
from evolve_dag.records import Call, Step, Task, Trajectory
from evolve_dag.steps import base
from evolve_dag.steps.body import Playing
from evolve_dag.store.artifacts import Store
from evolve_dag.store.frames import load_trajectories
from evolve_dag.tasks.suites import load_tasks_of

EPISODES = 12 * 4


@dataclass
class Elsewhere:
    """Workers that make trajectories up, and are gone after ``last`` of them."""

    last: int = EPISODES
    played: list[str] = field(default_factory=list)
    asked: list[Playing] = field(default_factory=list)
    judged: bool = True
    rewards: dict[str, list[float]] = field(default_factory=dict)
    """Of a task by rollout; the last one goes on. Of others: 0."""

    @contextmanager
    def open(self, playing: Playing, ledger: Ledger | None) -> Iterator[tuple[PlayEpisode, int]]:
        self.asked.append(playing)

        async def play(task: Task, rollout: int, seed: int) -> Trajectory:
            if len(self.played) >= self.last:
                raise ConnectionError("gone")
            name = f"{task.id}#{rollout}"
            self.played.append(name)
            assert ledger is not None
            ledger.record(Call("policy", "m", "", "ok", 1, 10, 0, 2, 0.1, None, None, 0))
            steps = (Step(0, "x", (1, 2), (-0.5, -0.5), answer="x"),)
            own = self.rewards.get(task.id, [0.0])
            reward, error = (
                (own[min(rollout, len(own) - 1)], None)
                if self.judged
                else (None, f"{NOT_JUDGED}UnreachableError: the judge is down")
            )
            return Trajectory(name, task.id, rollout, seed, "s", task.question, steps, "answered", "x", reward, error)

        yield play, 3


def test_a_kill_costs_what_was_on_its_way_and_nothing_is_counted_twice(tmp_path: Path) -> None:
    store, experiment = Store(tmp_path), small()
    base.run_step("policy", experiment, 1, store)
    first, second = Elsewhere(last=20), Elsewhere()
    with pytest.raises(ConnectionError):
        base.make_here(base.due_step("trajectories", experiment, 1, store, workers=first))
    due = base.due_step("trajectories", experiment, 1, store, workers=second)
    base.make_here(due)
    assert first.asked == second.asked == [Playing("trajectories", 1, "train", None)]
    assert len(first.played) == 20
    assert len(second.played) == EPISODES - 20
    assert not set(first.played) & set(second.played)
    artifact = store.open("trajectories", due.digest)
    assert due.digest == base.resolve("trajectories", experiment, 1, store).digest
    assert len(load_trajectories(artifact)) == EPISODES
    assert artifact.summary["calls"]["policy"]["calls"] == EPISODES


def test_an_episode_that_lacks_only_its_verdict_is_judged_and_not_played(tmp_path: Path) -> None:
    store, experiment, workers = Store(tmp_path), small(), Elsewhere(judged=False)
    base.run_step("policy", experiment, 1, store)
    due = base.due_step("trajectories", experiment, 1, store, workers=workers)
    base.make_here(due)
    assert len(set(workers.played)) == len(workers.played) == EPISODES
    assert {t.reward for t in load_trajectories(store.open("trajectories", due.digest))} == {0.0}


@pytest.mark.parametrize("last", [EPISODES, 5, 24, 30])
def test_later_rollouts_go_where_the_first_had_mixed_outcomes(last: int, tmp_path: Path) -> None:
    store, experiment = Store(tmp_path), small(rollout={"group_size": 4, "frontier": 0.5})
    base.run_step("policy", experiment, 1, store)
    names = [task.id for task in load_tasks_of(experiment, "train")]
    rewards = {names[3]: [0.0, 1.0, 1.0], names[5]: [1.0, 0.0, 0.0], names[7]: [1.0]}
    workers = [Elsewhere(last, rewards=rewards), Elsewhere(rewards=rewards)]
    for one in workers:  # what a kill leaves is taken up wherever it came
        with suppress(ConnectionError):
            base.make_here(base.due_step("trajectories", experiment, 1, store, workers=one))
    played = [name for one in workers for name in one.played]
    assert len(set(played)) == len(played) == EPISODES
    artifact = store.open("trajectories", base.resolve("trajectories", experiment, 1, store).digest)
    found = load_trajectories(artifact)
    assert [(t.task_id, t.rollout) for t in found] == sorted(
        ((t.task_id, t.rollout) for t in found), key=lambda one: (names.index(one[0]), one[1])
    ), "task by task, as ever"
    had = Counter(t.task_id for t in found)
    assert (had[names[3]], had[names[5]]) == (10, 10)  # two, and four times as many on top
    assert {had[name] for name in names} == {10, 3, 2}
    each = {names[3]: 9 / 10, names[5]: 1 / 10, names[7]: 1.0}
    assert artifact.summary["success"] == pytest.approx(sum(each.values()) / len(names)), "tasks count alike"


def test_a_group_must_hold_mixed_outcomes_and_leave_something_to_give() -> None:
    for size, share, wrong in (
        (2, 0.5, True),
        (4, 0.1, True),
        (2, 0.75, True),
        (1, 0.5, True),
        (3, 0.3, False),
        (4, 0.5, False),
    ):
        told = contradictions(small(rollout={"group_size": size, "frontier": share}))
        assert any("outcomes can be mixed in two rollouts or more" in what for key, what in told) is wrong
