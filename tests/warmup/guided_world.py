"""Three steps to the left or to the right, as the task says; two plain turns."""

from __future__ import annotations

from typing import Any, Literal

from evolve_dag.config.parts import EnvironmentSettings
from evolve_dag.config.schema import TaskSplit
from evolve_dag.environments.base import EnvironmentPart
from evolve_dag.protocols import Session, ToolResult, ToolSpec
from evolve_dag.records import Task, ToolCall

STEPS_IN_ALL = 3


class Steps(Session):
    tools = (ToolSpec("act", "Step.", {"turn": "left or right"}, plain="turn"),)
    system_prompt = "Step."
    choices = ("left", "right")

    def __init__(self, task: Task) -> None:
        self.expert = task.answer
        self.done, self.good = 0, 0

    def call(self, call: ToolCall) -> ToolResult:
        taken = call.arguments["turn"] in self.choices
        self.done += 1
        self.good += call.arguments["turn"] == self.expert
        return ToolResult("step", self.done == STEPS_IN_ALL, {"turn": "taken" if taken else "refused"})

    def reward(self, answer: str | None) -> float:
        return self.good / STEPS_IN_ALL


class World:
    def open(self, task: Task, seed: int) -> Steps:
        return Steps(task)


class StepsEnvironment(EnvironmentSettings):
    """Steps."""

    kind: Literal["steps"] = "steps"


def tasks(settings: Any, split: TaskSplit, name: str) -> tuple[Task, ...]:
    return tuple(
        Task(f"{split.world}-{n}", "Go.", ("left", "right")[(n + (split.world or 0)) % 2]) for n in range(split.count or 0)
    )


STEPS = EnvironmentPart(settings=StepsEnvironment, make=lambda settings, place: World(), tasks=tasks)
