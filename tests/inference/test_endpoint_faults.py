"""Rollouts over an endpoint of which every fifth call fails end as over one that never does: nothing lost, nothing doubled."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from acting import act
from misbehaving import Endpoint, Fault, Script, at_random

from evolve_dag.agent.rollouts import gather_rollouts
from evolve_dag.config.schema import OpenAIModelSettings, RolloutSettings
from evolve_dag.environments.pocket.tools import PocketTools
from evolve_dag.environments.pocket.world import World
from evolve_dag.experience.injection import Injector
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.lexical import LexicalSelector
from evolve_dag.inference.ledger import Ledger
from evolve_dag.inference.openai import OpenAIModel
from evolve_dag.records import ExperienceItem, Task, Trajectory
from evolve_dag.verification.exact import ExactVerifier

TEXTS = (
    "Verify: when a search lists results, visit the page before you answer.",
    "Redirect: when a page says see another page, visit that page.",
    "Finish: when the page shows what is asked, answer with its two words.",
)
POOL = Pool(tuple(ExperienceItem(f"P{n}", text, "principle") for n, text in enumerate(TEXTS, 1)))


class ListJournal:
    def __init__(self) -> None:
        self.kept: list[dict[str, Any]] = []

    def append(self, record: dict[str, Any]) -> None:
        self.kept.append(record)

    def records(self) -> list[dict[str, Any]]:
        return list(self.kept)


@pytest.fixture(scope="module")
def world() -> World:
    return World(11)


@pytest.fixture(scope="module")
def environment(world: World) -> PocketTools:
    return PocketTools(world)


@pytest.fixture(scope="module")
def tasks(world: World) -> list[Task]:
    # The server's little policy knows no marks: questions about plain facts.
    return [task for task in world.tasks(120, "pocket/train") if task.metadata["depth"] == "0"][:20]


class Ran:
    """Rollouts over a server, and what both sides know of them."""

    def __init__(
        self,
        environment: PocketTools,
        tasks: list[Task],
        script: Script | None,
        path: Path,
        *,
        experience: bool = True,
        attempts: int = 10,
        concurrency: int = 16,
    ) -> None:
        self.journal = ListJournal()
        with Endpoint(act, script=script) as server:
            settings = OpenAIModelSettings(
                backend="openai", model="server", endpoints=(server.url,), key="NO_SUCH_KEY", timeout_seconds=20.0,
                attempts=attempts, concurrency=concurrency, price_prompt=1.0, price_completion=2.0,
            )  # fmt: skip
            model = OpenAIModel(settings, role="policy", ledger=Ledger(path), pause=0.001)
            self.trajectories: list[Trajectory] = asyncio.run(
                gather_rollouts(
                    tasks,
                    2,
                    model=model,
                    environment=environment,
                    verifier=ExactVerifier(),
                    settings=RolloutSettings(),
                    seed=3,
                    concurrency=concurrency,
                    experience=Injector("step_wise", POOL, LexicalSelector()) if experience else None,
                    journal=self.journal,
                )
            )
        self.served = server.served
        self.calls = Ledger(path).calls()
        self.totals = Ledger(path).totals()["policy"]

    def seen(self) -> list[Trajectory]:
        """The trajectories without their wall times."""
        return [replace(t, seconds=0.0, steps=tuple(replace(s, seconds=0.0) for s in t.steps)) for t in self.trajectories]


@pytest.fixture(scope="module")
def calm(environment: PocketTools, tasks: list[Task], tmp_path_factory: Any) -> Ran:
    return Ran(environment, tasks, None, tmp_path_factory.mktemp("calm") / "calls.jsonl")


@pytest.mark.parametrize("seed", [1, 2])
def test_a_fifth_of_the_calls_failing_changes_nothing(
    environment: PocketTools, tasks: list[Task], calm: Ran, tmp_path: Path, seed: int
) -> None:
    stormy = Ran(environment, tasks, at_random(0.2, seed=seed), tmp_path / "calls.jsonl")
    served, totals = stormy.served, stormy.totals

    failed = sum(served.faults.values())
    assert set(served.faults) == {"429", "500", "cut", "wrong_json", "empty"}
    assert failed / served.requests == pytest.approx(0.2, abs=0.08)

    assert stormy.seen() == calm.seen()
    assert [t.id for t in stormy.trajectories] == [f"{task.id}#{n}" for task in tasks for n in range(2)]
    assert len({record["id"] for record in stormy.journal.kept}) == len(stormy.journal.kept) == 40
    assert any(step.selected for t in stormy.trajectories for step in t.steps)

    # Every step is one call, answered well once; the ledger and the server agree on all of it.
    steps = sum(t.turns for t in stormy.trajectories)
    assert served.answered == calm.served.answered
    assert set(Counter(served.answered).values()) == {1}
    assert served.answers == totals["calls"] == calm.totals["calls"] == steps
    assert totals["errors"] == 0
    assert totals["attempts"] == served.requests == steps + failed
    assert totals["prompt_tokens"] == served.prompt_tokens
    assert totals["cached_tokens"] == served.cached_tokens
    assert totals["completion_tokens"] == served.completion_tokens
    assert totals["cost"] == pytest.approx((served.prompt_tokens + 2 * served.completion_tokens) / 1e6)


def test_the_ledger_of_a_run_without_faults_is_what_was_served(calm: Ran) -> None:
    served, totals = calm.served, calm.totals
    assert served.faults == {}
    assert (totals["attempts"], totals["calls"]) == (served.requests, served.answers)
    assert (totals["prompt_tokens"], totals["completion_tokens"]) == (served.prompt_tokens, served.completion_tokens)
    assert {t.status for t in calm.trajectories} == {"answered"}


def test_experience_in_context_reaches_the_policy(
    environment: PocketTools, tasks: list[Task], calm: Ran, tmp_path: Path
) -> None:
    # The policy of the server believes stale excerpts unless a hint tells it to visit: without hints it errs.
    bare = Ran(environment, tasks, None, tmp_path / "calls.jsonl", experience=False)
    rewards = [sum(t.reward or 0 for t in ran.trajectories) for ran in (calm, bare)]
    assert rewards[0] > rewards[1] > 0


def test_a_call_that_never_succeeds_fails_its_own_episode_alone(
    environment: PocketTools, tasks: list[Task], calm: Ran, tmp_path: Path
) -> None:
    unlucky = tasks[4].question

    def script(body: dict[str, Any], seen: int) -> Fault | None:
        return Fault("500") if body["messages"][1]["content"].startswith(unlucky) and len(body["messages"]) > 3 else None

    ran = Ran(environment, tasks, script, tmp_path / "calls.jsonl", attempts=3)
    failed = [n for n, t in enumerate(ran.trajectories) if t.status == "failed"]
    assert failed == [8, 9]
    for n in failed:
        trajectory = ran.trajectories[n]
        assert "3 of 3 attempts failed" in (trajectory.error or "")
        assert (trajectory.reward, trajectory.turns) == (None, 1)  # not judged, and the step that was made is kept
    assert [s for n, s in enumerate(ran.seen()) if n not in failed] == [s for n, s in enumerate(calm.seen()) if n not in failed]
    assert ran.totals["errors"] == 2
    assert [c.attempts for c in ran.calls if c.outcome == "error"] == [3, 3]
    assert ran.totals["attempts"] == ran.served.requests
    assert ran.totals["prompt_tokens"] == ran.served.prompt_tokens
