"""The row of an environment, what one is opened with, and how it tells a policy of its tools."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from evolve_dag.config.fence import Fence
from evolve_dag.config.parts import EnvironmentSettings, Part
from evolve_dag.config.schema import Experiment, PolicySettings, Tasks, TaskSplit
from evolve_dag.environments.fenced import FencedEnvironment
from evolve_dag.inference.roles import Roles
from evolve_dag.protocols import Environment, StatefulEnvironment, ToolSpec
from evolve_dag.records import Task


@dataclass(frozen=True, slots=True)
class Place:
    """Where an environment is opened."""

    split: TaskSplit
    """The tasks that are asked in it."""
    policy: PolicySettings
    """Who asks."""
    roles: Roles | None
    """The models that it may ask; None: none is needed now."""


S = TypeVar("S", bound=EnvironmentSettings)


def _no_file(settings: Any) -> None:
    return None


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentPart(Part[S]):
    """The row of an environment."""

    make: Callable[[S, Place], Environment | StatefulEnvironment]
    """(settings, place) -> what answers the tool calls of one split."""
    tasks: Callable[[S, TaskSplit, str], tuple[Task, ...]] | None = None
    """(settings, split, its name) -> tasks that the environment makes itself, other ones for every split; None: from files."""
    one_world: bool = False
    """Whether such tasks are about the same world in every split, so that the same question with the same answer is the same
    task: what is trained on must not be asked again (:func:`evolve_dag.tasks.suites.left_out`)."""
    fresh: Callable[[TaskSplit, int], Mapping[str, Any]] | None = None
    """(split, iteration) -> what of the split of a stream of such tasks is another in that iteration."""
    check: Callable[[S], object] = _no_file
    """Reads what it names as a run will, so that their mistakes show before one begins. Raises DataError."""

    def held(self, made: Any, fence: Fence) -> Any:
        """An environment without state within limits; one with a state has a thread an episode."""
        return FencedEnvironment(made, fence) if hasattr(made, "call") else made


def file_tasks(experiment: Experiment) -> list[tuple[str, str]]:
    """What cannot work where tasks are read from files."""
    found = []
    for name, split in experiment.tasks.splits.items():
        if split.path is None:
            found.append((f"tasks.{name}.path", "missing: a file of tasks"))
        elif split.stream and split.count is None and not Path(split.path).is_dir():
            found.append((f"tasks.{name}.count", "missing: how many rows of the file an iteration takes"))
    return found + _met_by_the_stream(experiment.tasks)


def _met_by_the_stream(tasks: Tasks) -> list[tuple[str, str]]:
    """Splits of the file that training tasks are a stream of: sooner or later it comes to the tasks of theirs."""
    train = tasks.train
    if not train.stream or train.path is None:
        return []
    low, high = train.percent or (0, 100)
    found = []
    for name, split in tasks.splits.items():
        if split is train:
            continue
        first, last = split.percent or (0, 100)
        if split.path == train.path and low < last and first < high:
            what = (
                "the stream of tasks.train reads the same file and would come to its tasks: give each a part of its own, "
                "e.g. tasks.train.percent: [0, 90] and here [90, 100]"
            )
            found.append((f"tasks.{name}.percent", what))
    return found


def world_tasks(experiment: Experiment, makes: str) -> list[tuple[str, str]]:
    """What cannot work where an environment makes the tasks of a split from the number of its world.

    Args:
        makes: that it does so, for the message: ``TextWorld makes its own games``.
    """
    found: list[tuple[str, str]] = []
    owner: dict[int, str] = {}
    for name, split in experiment.tasks.splits.items():
        key = f"tasks.{name}"
        for files in ("path", "suite", "fields", "skip", "percent"):
            if getattr(split, files) != TaskSplit.model_fields[files].default:
                found.append((f"{key}.{files}", f"is for files; {makes}"))
        if split.count is None:
            found.append((f"{key}.count", "missing: how many tasks"))
        if split.world is None:
            found.append((f"{key}.world", "missing: the number of the world that the tasks are of"))
        elif owner.setdefault(split.world, name) != name:
            found.append((f"{key}.world", f"the same world as tasks.{owner[split.world]}: splits must not share a world"))
    return found


def tool_prompt(tools: Sequence[ToolSpec]) -> str:
    """System message: the tools, the call's form, the answer's form."""
    return (
        "Answer the question with the tools below. Before each step, say in a few words what you need next; "
        "then either call one tool or give the final answer.\n\n"
        f"{tools_section(tools)}\n\n"
        "For the final answer, write the answer alone within <answer></answer> XML tags:\n"
        "<answer>the answer</answer>"
    )


def tools_section(tools: Sequence[ToolSpec]) -> str:
    """Tools as JSON schema and the form of a call, in the words of Qwen3's chat template."""
    functions = [{"name": tool.name, "description": tool.description, "parameters": tool.arguments} for tool in tools]
    listing = "\n".join(json.dumps({"type": "function", "function": one}, ensure_ascii=False) for one in functions)
    return (
        "# Tools\n\n"
        "You are provided with function signatures within <tools></tools> XML tags:\n"
        f"<tools>\n{listing}\n</tools>\n\n"
        "For a function call, return a json object with function name and arguments within <tool_call></tool_call> XML tags:\n"
        '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
    )
