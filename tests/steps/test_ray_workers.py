"""Actors that cannot be started, without Ray: what it raises is handed in."""

from __future__ import annotations

import asyncio
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from evolve_dag.errors import ModelError
from evolve_dag.records import Task
from evolve_dag.steps.ray_workers import _Crew

TASK = Task("t", "Who?", "Bado")


class DeadActorError(Exception):
    """What Ray raises where an actor is gone."""


class NoEnvironmentError(Exception):
    """What it raises where none comes to be: its class cannot be imported on the node, its environment cannot be set up."""


@pytest.fixture(autouse=True)
def ray(monkeypatch: pytest.MonkeyPatch) -> None:
    exceptions = ModuleType("ray.exceptions")
    exceptions.RayActorError = DeadActorError  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ray", ModuleType("ray"))
    monkeypatch.setitem(sys.modules, "ray.exceptions", exceptions)


def crew(hire: Any) -> _Crew:
    return _Crew(hire, 2, 1, None)


def failing(error: Exception) -> Any:
    async def remote() -> None:
        raise error

    class Actor:
        ready = SimpleNamespace(remote=remote)

    return Actor


async def played(workers: _Crew) -> Any:
    return await asyncio.wait_for(asyncio.gather(*(workers.play(TASK, rollout, 0) for rollout in range(3))), 20)


def test_a_worker_that_cannot_be_started_ends_the_step() -> None:
    async def scene() -> None:
        with pytest.raises(ModelError, match=r"cannot be started: NoEnvironmentError: no evolve_dag[\s\S]*all nodes"):
            await played(crew(failing(NoEnvironmentError("no evolve_dag"))))

    asyncio.run(scene())


def test_a_cluster_that_is_gone_when_another_worker_is_hired_ends_the_step() -> None:
    left = [failing(DeadActorError("gone")), failing(DeadActorError("gone"))]

    def hire() -> Any:
        if not left:
            raise ConnectionError("the cluster is gone")
        return left.pop()()

    async def scene() -> None:
        with pytest.raises(ModelError, match="cannot be started: ConnectionError: the cluster is gone"):
            await played(crew(hire))

    asyncio.run(scene())


def test_workers_that_die_are_replaced_a_few_times() -> None:
    async def scene() -> None:
        with pytest.raises(ModelError, match="6 rollout workers died"):
            await played(crew(failing(DeadActorError("gone"))))

    asyncio.run(scene())
