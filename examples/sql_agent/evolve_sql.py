"""An agent over a SQL database: each episode has one of its own, which its calls change; what is left in it is the reward."""

import random
from typing import Any, Literal

import duckdb

from evolve_dag.config.parts import EnvironmentSettings
from evolve_dag.config.schema import TaskSplit
from evolve_dag.environments.base import EnvironmentPart, tool_prompt
from evolve_dag.protocols import Session, ToolResult, ToolSpec
from evolve_dag.records import Task, ToolCall

NAMES, COLUMNS = ("Ada", "Bo", "Cleo", "Dan", "Eve"), ("balance", "saldo", "amount")
DESCRIBE = "select column_name, data_type from information_schema.columns where table_name = ?"
LOCKED: Any = {"enable_external_access": False, "lock_configuration": True, "memory_limit": "64MB", "threads": 1}
ARGUMENTS = {"statement": {"type": "string"}, "rows": {"type": "integer", "minimum": 1, "maximum": 50}}
TOOLS = (
    ToolSpec("columns", "The columns of a table.", {"table": "Name of the table."}),
    ToolSpec("execute", "Run a SQL statement and read the first rows of its result (5, or as many as given).",
             schema={"type": "object", "properties": ARGUMENTS, "required": ["statement"], "additionalProperties": False}),
    ToolSpec("finish", "Everything is done: this ends the task."),
)  # fmt: skip


class Accounts(Session):
    """One episode: a table of accounts, in which the balance has another name from task to task."""

    tools, system_prompt = TOOLS, tool_prompt(TOOLS)

    def __init__(self, task: Task, seed: int) -> None:
        self.column = random.Random(task.id).choice(COLUMNS)
        start = {name: random.Random(f"{seed} {name}").randrange(50, 100) for name in NAMES}
        self.database = duckdb.connect(":memory:", config=LOCKED)  # no file, no network, whatever a statement says
        self.database.execute(f"create table accounts (owner text, {self.column} integer)")
        self.database.executemany("insert into accounts values (?, ?)", list(start.items()))
        source, target, moved = task.answer.split()
        self.due = {**start, source: start[source] - int(moved), target: start[target] + int(moved)}

    def call(self, call: ToolCall) -> ToolResult:
        given = call.arguments
        if call.name == "finish":
            return ToolResult("finished", done=True)
        try:
            self.database.execute(*((DESCRIBE, [given["table"]]) if call.name == "columns" else (given["statement"],)))
            rows = self.database.fetchmany(given.get("rows", 5)) if self.database.description else []
        except duckdb.Error as problem:  # its later lines name the columns that there are
            return ToolResult(str(problem).splitlines()[0], features={"answer": "an error"})
        text = "\n".join(" | ".join(map(str, row)) for row in rows)
        return ToolResult(text[:2000], features={"answer": "a table" if rows else "empty"})

    def reward(self, answer: str | None) -> float:
        """Half of it for each of the two accounts; half is lost for every other one that was touched."""
        try:
            held = dict(self.database.execute(f"select owner, {self.column} from accounts").fetchall())
        except duckdb.Error:
            return 0.0
        return max(0.0, 1 - sum(held.get(name) != self.due[name] for name in NAMES) / 2)

    def close(self) -> None:
        self.database.close()


class Databases:
    open = staticmethod(Accounts)


class SqlEnvironment(EnvironmentSettings):
    """Transfers between the accounts of a SQL database, one for every episode."""

    kind: Literal["sql"] = "sql"


def tasks(settings: SqlEnvironment, split: TaskSplit, name: str) -> tuple[Task, ...]:
    draw = random.Random(f"{split.world} {name}")
    drawn = enumerate((*draw.sample(NAMES, 2), draw.randrange(1, 50)) for _ in range(split.count or 0))
    return tuple(Task(f"{name}/{i}", f"Move {n} from {a} to {b} in accounts.", f"{a} {b} {n}") for i, (a, b, n) in drawn)


SQL = EnvironmentPart(settings=SqlEnvironment, make=lambda settings, place: Databases(), tasks=tasks)
