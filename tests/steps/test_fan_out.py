"""Episodes that others play: written down by the step that asked, so that a kill costs those that were on their way."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from small_lineage import small

from evolve_dag.agent.loop import NOT_JUDGED
from evolve_dag.agent.rollouts import PlayEpisode
from evolve_dag.inference.ledger import Ledger
from evolve_dag.records import Call, Step, Task, Trajectory
from evolve_dag.steps import base
from evolve_dag.steps.body import Playing
from evolve_dag.store.artifacts import Store
from evolve_dag.store.frames import load_trajectories

EPISODES = 12 * 4


@dataclass
class Elsewhere:
    """Workers that make trajectories up, and are gone after ``last`` of them."""

    last: int = EPISODES
    played: list[str] = field(default_factory=list)
    asked: list[Playing] = field(default_factory=list)
    judged: bool = True

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
            reward, error = (0.0, None) if self.judged else (None, f"{NOT_JUDGED}UnreachableError: the judge is down")
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
