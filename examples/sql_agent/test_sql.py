"""A database per episode, what a statement cannot reach, and what is learned from a policy that guesses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from evolve_sql import COLUMNS, Accounts, Databases, SqlEnvironment, tasks

from evolve_dag.agent.rollouts import gather_rollouts
from evolve_dag.config.loading import load_experiment
from evolve_dag.config.parts import CHOICES
from evolve_dag.config.schema import RolloutSettings, TaskSplit
from evolve_dag.experience.pool import Pool
from evolve_dag.inference.scripted import ScriptedModel
from evolve_dag.protocols import LanguageModel
from evolve_dag.records import Message, Task, ToolCall, Trajectory
from evolve_dag.steps import base, trajectories
from evolve_dag.store.artifacts import Store
from evolve_dag.verification.exact import ExactVerifier

TASKS = tasks(SqlEnvironment(), TaskSplit(count=12, world=1), "train")


def called(name: str, **arguments: Any) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def transfer(question: str, column: str) -> str:
    n, a, b = (question.removesuffix(".").split()[place] for place in (1, 3, 5))
    change = f"case owner when '{a}' then -{n} when '{b}' then {n} else 0 end"
    return called("execute", statement=f"update accounts set {column} = {column} + {change}")


def guesses(messages: Sequence[Message]) -> str:
    """Guesses the column; after an error it looks the columns up, or gives up where the number is even."""
    question, seen = messages[1].content.splitlines()[0], messages[-1].content
    tried = sum("update" in m.content for m in messages if m.role == "assistant")
    if "INTEGER" in seen:
        return transfer(question, seen.split("\n")[-1].split(" | ")[0])
    if "Error" in seen:
        return called("columns", table="accounts") if int(question.split()[1]) % 2 else called("finish")
    return called("finish") if tried else transfer(question, COLUMNS[0])


def play(script: Any, chosen: Sequence[Task] = TASKS, group: int = 1) -> list[Trajectory]:
    return asyncio.run(gather_rollouts(
        chosen, group, model=ScriptedModel(script), environment=Databases(), verifier=ExactVerifier(),
        settings=RolloutSettings(max_steps=8), seed=3, concurrency=4,
    ))  # fmt: skip


def test_the_database_is_the_episodes_own_and_judges_it() -> None:
    for t in play(guesses):
        n, looked = int(t.question.split()[1]), any("columns" in step.text for step in t.steps)
        failed = t.steps[0].features == {"answer": "an error"}
        assert (t.status, t.answer, looked) == ("ended", None, failed and n % 2 == 1)
        assert t.reward == (1.0 if looked or not failed else 0.0)


def test_half_a_transfer_is_worth_half_and_a_broken_table_nothing() -> None:
    task = TASKS[0]
    source, _, moved = task.answer.split()
    column = Accounts(task, 0).column
    half = called("execute", statement=f"update accounts set {column} = {column} - {moved} where owner = '{source}'")
    drop = called("execute", statement="drop table accounts")
    rewards = [play([action, called("finish")], [task])[0].reward for action in (half, drop, called("finish"))]
    assert rewards == [0.5, 0.0, 0.0]


@pytest.mark.parametrize(
    "statement",
    ["copy (select 1) to '{}'", "attach '{}'", "from read_text('{}')", "set enable_external_access = true", "install httpfs"],
)
def test_a_statement_reaches_nothing_outside(statement: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    result = Accounts(TASKS[0], 0).call(ToolCall("execute", {"statement": statement.format(path)}))
    assert result.features == {"answer": "an error"}
    assert not path.exists()


def test_a_wrong_type_is_told_to_the_policy() -> None:
    [t] = play([called("execute", statement="select 1", rows="many"), called("finish")], TASKS[:1])
    assert t.steps[0].problem == "the argument rows must be integer; execute takes statement, rows"


def test_the_experiment_finds_the_lesson(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rollouts by a script in place of the policy; the steps, the store and the miner are the real ones."""
    monkeypatch.setitem(CHOICES["environment"].rows, "sql", "evolve_sql:SQL")  # type: ignore[index]
    turn = iter(range(10**6))

    def undecided(messages: Sequence[Message]) -> str:
        """As :func:`guesses`, but in half of the episodes of a task it gives up after an error."""
        if "Error" in messages[-1].content:
            return called("columns", table="accounts") if next(turn) % 2 else called("finish")
        return guesses(messages)

    @contextmanager
    def scripted(*_: object) -> Iterator[LanguageModel]:
        yield ScriptedModel(undecided)

    monkeypatch.setattr(trajectories, "open_policy", scripted)
    experiment, store = load_experiment(Path(__file__).with_name("experiment.yaml")), Store(tmp_path / "store")
    made = {name: base.run_step(name, experiment, 1, store).artifact for name in ("policy", "trajectories", "experience")}
    assert made["trajectories"].summary["failed"] == 0
    pool = Pool.from_json(made["experience"].file("pool.json").read_text(), "pool.json")
    assert [item.text for item in pool.items] == ["Source: when the answer is an error, call columns."]
