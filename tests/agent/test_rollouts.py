"""Groups of rollouts: order, concurrency, the journal."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import pytest
from worlds import ANSWER, SEARCH, Exact, World

from evolve_dag.agent.rollouts import Condition, episode_seed, gather_conditions, gather_rollouts, played_here
from evolve_dag.config.schema import RolloutSettings
from evolve_dag.errors import ClosedError, DataError
from evolve_dag.inference.scripted import ScriptedModel
from evolve_dag.records import Message, Task, Trajectory

TASKS = [Task(f"t{n}", f"question {n}?", "Rato Miku") for n in range(5)]


class ListJournal:
    """A journal in memory, by the interface of the store's."""

    def __init__(self, records: Sequence[dict[str, Any]] = (), *, room: int = 10**9) -> None:
        self._records, self._room = list(records), room

    def append(self, record: dict[str, Any]) -> None:
        if len(self._records) >= self._room:
            raise OSError(28, "No space left on device")
        self._records.append(record)

    def records(self) -> list[dict[str, Any]]:
        return list(self._records)


def two_steps(messages: Sequence[Message]) -> str:
    return SEARCH if len(messages) == 2 else ANSWER


def arguments(model: ScriptedModel, **changes: Any) -> dict[str, Any]:
    return {
        "model": model,
        "environment": World(),
        "verifier": Exact(),
        "settings": RolloutSettings(),
        "seed": 3,
        "concurrency": 4,
    } | changes


def strip(trajectories: Sequence[Trajectory]) -> list[tuple[Any, ...]]:
    """Without wall times."""
    return [(t.id, t.seed, t.status, t.answer, t.reward, t.error, [s.text for s in t.steps]) for t in trajectories]


def test_order_is_by_task_then_rollout() -> None:
    delays = iter([0.02, 0.0, 0.01] * 20)

    class Uneven(ScriptedModel):
        async def generate(self, request: Any) -> Any:
            await asyncio.sleep(next(delays))
            return await super().generate(request)

    done: list[str] = []
    model = Uneven(two_steps)
    trajectories = asyncio.run(gather_rollouts(TASKS, 3, **arguments(model), on_done=lambda t: done.append(t.id)))
    assert [t.id for t in trajectories] == [f"t{n}#{r}" for n in range(5) for r in range(3)]
    assert sorted(done) == sorted(t.id for t in trajectories)
    assert done != [t.id for t in trajectories]
    assert len(set(model.released)) == 15


def test_concurrency_is_bounded_and_used() -> None:
    now, most = 0, 0

    class Counting(ScriptedModel):
        async def generate(self, request: Any) -> Any:
            nonlocal now, most
            now += 1
            most = max(most, now)
            await asyncio.sleep(0.001)
            now -= 1
            return await super().generate(request)

    asyncio.run(gather_rollouts(TASKS, 4, **arguments(Counting(two_steps), concurrency=6)))
    assert most == 6


def test_resume_runs_only_what_is_missing() -> None:
    whole = ListJournal()
    expected = asyncio.run(gather_rollouts(TASKS, 2, **arguments(ScriptedModel(two_steps)), journal=whole))
    assert len(whole.records()) == 10

    cut = ListJournal(whole.records()[:7])
    model, done = ScriptedModel(two_steps), []
    again = asyncio.run(gather_rollouts(TASKS, 2, **arguments(model), journal=cut, on_done=lambda t: done.append(t.id)))
    assert strip(again) == strip(expected)
    assert len(model.requests) == 3 * 2
    assert len(cut.records()) == 10
    assert len(done) == 10

    idle = ScriptedModel(two_steps)
    assert strip(asyncio.run(gather_rollouts(TASKS, 2, **arguments(idle), journal=cut))) == strip(expected)
    assert idle.requests == []


def test_journal_of_another_seed_is_not_taken() -> None:
    journal = ListJournal()
    asyncio.run(gather_rollouts(TASKS, 1, **arguments(ScriptedModel(two_steps)), journal=journal))
    model = ScriptedModel(two_steps)
    asyncio.run(gather_rollouts(TASKS, 1, **arguments(model, seed=4), journal=journal))
    assert len(model.requests) == 10


def test_what_has_no_verdict_is_a_row_and_is_played_again_by_whoever_goes_on() -> None:
    def broken(messages: Sequence[Message]) -> Any:
        return RuntimeError("gone") if messages[1].content == "question 2?" else two_steps(messages)

    journal = ListJournal()
    trajectories = asyncio.run(gather_rollouts(TASKS, 2, **arguments(ScriptedModel(broken)), journal=journal))
    assert [t.status for t in trajectories] == ["answered"] * 4 + ["failed"] * 2 + ["answered"] * 4
    assert [t.reward for t in trajectories][4:6] == [None, None]

    mended = ScriptedModel(two_steps)
    whole = asyncio.run(gather_rollouts(TASKS, 2, **arguments(ScriptedModel(two_steps))))
    assert strip(asyncio.run(gather_rollouts(TASKS, 2, **arguments(mended), journal=journal))) == strip(whole)
    assert len(mended.requests) == 2 * 2, "of the others none"
    idle = ScriptedModel(two_steps)
    assert strip(asyncio.run(gather_rollouts(TASKS, 2, **arguments(idle), journal=journal))) == strip(whole)
    assert idle.requests == []


def test_full_disk_stops_everything_and_what_was_written_resumes() -> None:
    journal = ListJournal(room=3)
    with pytest.raises(OSError, match="No space left"):
        asyncio.run(gather_rollouts(TASKS, 2, **arguments(ScriptedModel(two_steps)), journal=journal))
    assert len(journal.records()) == 3
    model = ScriptedModel(two_steps)
    again = asyncio.run(gather_rollouts(TASKS, 2, **arguments(model), journal=ListJournal(journal.records())))
    assert len(again) == 10
    assert len(model.requests) == 14


def test_cancel_leaves_finished_episodes_in_the_journal_and_no_other() -> None:
    journal = ListJournal()
    model = ScriptedModel(two_steps, delay=0.005)

    async def scene() -> None:
        def on_done(trajectory: Trajectory) -> None:
            if len(journal.records()) == 3:
                task.cancel()

        task = asyncio.create_task(
            gather_rollouts(TASKS, 2, **arguments(model, concurrency=2), journal=journal, on_done=on_done)
        )
        with pytest.raises(asyncio.CancelledError):
            await task
        written = len(journal.records())
        await asyncio.sleep(0.03)
        assert len(journal.records()) == written

    asyncio.run(scene())
    kept = len(journal.records())
    assert 3 <= kept <= 4
    rest = ScriptedModel(two_steps)
    assert len(asyncio.run(gather_rollouts(TASKS, 2, **arguments(rest), journal=journal))) == 10
    assert len(rest.requests) == 2 * (10 - kept)


def test_greedy_samples_at_temperature_zero() -> None:
    model = ScriptedModel(two_steps)
    asyncio.run(gather_rollouts(TASKS, 1, **arguments(model, settings=RolloutSettings(temperature=0.7)), greedy=True))
    assert {request.sampling.temperature for request in model.requests} == {0.0}


def test_repeated_task_ids_are_refused() -> None:
    with pytest.raises(DataError, match="'t0'"):
        asyncio.run(gather_rollouts([*TASKS, TASKS[0]], 1, **arguments(ScriptedModel(two_steps))))


def test_no_tasks_is_no_trajectory() -> None:
    assert asyncio.run(gather_rollouts([], 3, **arguments(ScriptedModel(two_steps)))) == []


def test_episode_seeds_are_stable_and_differ() -> None:
    assert episode_seed(0, "t", 0) == 7798805355288258114  # journals and common random numbers rest on it
    seeds = {episode_seed(seed, f"t{task}", rollout) for seed in range(5) for task in range(50) for rollout in range(4)}
    assert len(seeds) == 1000
    assert max(seeds) < 2**63


def test_conditions_start_task_by_task_and_come_back_apart() -> None:
    asked: list[tuple[str, float]] = []

    class Noting(ScriptedModel):
        async def generate(self, request: Any) -> Any:
            asked.append((request.messages[1].content, request.sampling.temperature))
            return await super().generate(request)

    settings, seed = RolloutSettings(), arguments(Noting(two_steps))["seed"]
    warm_play, cold_play = (
        played_here(Noting(two_steps), World(), Exact(), settings.model_copy(update={"temperature": temperature}))
        for temperature in (1.0, 0.0)
    )
    journal = ListJournal()
    conditions = [Condition(TASKS, 2, warm_play, seed, journal), Condition(TASKS, 1, cold_play, seed)]
    first, second = asyncio.run(gather_conditions(conditions, concurrency=3))
    assert {question for question, _ in asked[:3]} == {"question 0?"}
    assert sorted(temperature for _, temperature in asked[:3]) == [0.0, 1.0, 1.0]
    assert [t.id for t in first] == [f"t{n}#{r}" for n in range(5) for r in range(2)]
    assert [t.id for t in second] == [f"t{n}#0" for n in range(5)]
    assert len(journal.records()) == 10
    assert asyncio.run(gather_conditions([], concurrency=3)) == []


def test_an_episode_whose_model_was_closed_has_not_failed() -> None:
    """A run that is stopped closes its models while episodes wait for them: they are played when it goes on."""
    journal, model = ListJournal(), ScriptedModel(two_steps)

    def stop(trajectory: Trajectory) -> None:
        model.closed = True

    with pytest.raises(ClosedError):
        asyncio.run(gather_rollouts(TASKS, 1, **arguments(model, journal=journal, concurrency=1, on_done=stop)))
    assert [record["status"] for record in journal.records()] == ["answered"]
    again = asyncio.run(gather_rollouts(TASKS, 1, **arguments(ScriptedModel(two_steps), journal=journal)))
    assert [one.status for one in again] == ["answered"] * len(TASKS)
