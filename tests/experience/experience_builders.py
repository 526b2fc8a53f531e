"""Small builders of steps and trajectories for the tests of evolve_dag.experience."""

from __future__ import annotations

from evolve_dag.records import Step, ToolCall, Trajectory

QUESTION = "What is the mayor of the home of person Bado Keli?"


def call(tool: str, argument: str, observation: str, thought: str = "next") -> Step:
    name = "query" if tool == "search" else "page"
    return Step(0, f"{thought} <tool_call>...</tool_call>", (), (), ToolCall(tool, {name: argument}), observation=observation)


def search(query: str, observation: str, thought: str = "next") -> Step:
    return call("search", query, observation, thought)


def visit(page: str, observation: str, thought: str = "next") -> Step:
    return call("visit", page, observation, thought)


def answer(value: str) -> Step:
    return Step(0, f"<answer>{value}</answer>", (), (), answer=value)


def malformed(observation: str = "not a call: write one") -> Step:
    return Step(0, "gibberish", (), (), observation=observation, problem="no call and no answer")


def trajectory(
    task: str, rollout: int, steps: list[Step], reward: float | None, question: str = QUESTION, final: str | None = "Rato Miku"
) -> Trajectory:
    return Trajectory(
        f"{task}#{rollout}",
        task,
        rollout,
        rollout,
        "tools",
        question,
        tuple(steps),
        "answered",
        final if steps else None,
        reward,
    )
