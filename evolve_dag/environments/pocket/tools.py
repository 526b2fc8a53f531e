"""The tools of the pocket world: search and visit, as over any corpus, and five that look up what stands under a mark."""

from __future__ import annotations

import hashlib
from functools import cached_property
from typing import Literal

from pydantic import Field

from evolve_dag.config.parts import EnvironmentSettings
from evolve_dag.config.schema import Experiment, TaskSplit
from evolve_dag.environments.base import EnvironmentPart, Place, world_tasks
from evolve_dag.environments.corpus import TOOLS as CORPUS_TOOLS
from evolve_dag.environments.corpus import CorpusSearch
from evolve_dag.environments.pocket.language import SYSTEM_PROMPT, TOOLS
from evolve_dag.environments.pocket.world import MINIMUM_MATCH, PRETRAINING_SEEDS, RESULTS, World
from evolve_dag.protocols import ToolSpec
from evolve_dag.records import Task, ToolCall

STREAM_WORLDS = 10_000
"""Distance between the worlds of neighbouring iterations of a stream. Worlds of the other splits lie below it."""
MOST_STREAM_ITERATIONS = 90
"""Iterations whose worlds lie below those of measuring and pretraining."""
CONSULTED = tuple(ToolSpec(name, "Look up what stands under a mark.", {"entry": "The marked name."}) for name in TOOLS)


class PocketTools:
    """An :class:`~evolve_dag.protocols.Environment` over one pocket world.

    Args:
        world: what is asked about.
        results: most pages that one search lists.
    """

    def __init__(self, world: World, results: int = RESULTS) -> None:
        self.world = world
        self.corpus = CorpusSearch(
            world.pages(), results=results, text_weight=0.0, minimum_match=MINIMUM_MATCH, system_prompt=SYSTEM_PROMPT
        )

    @property
    def tools(self) -> tuple[ToolSpec, ...]:
        """Search, visit and the five that consult."""
        return CORPUS_TOOLS + CONSULTED

    @property
    def system_prompt(self) -> str:
        """The one system message that the pocket policy knows."""
        return SYSTEM_PROMPT

    @cached_property
    def digest(self) -> str:
        """Hash of pages, ranking and everything that a consulted entry can answer."""
        world = self.world
        parts = [
            self.corpus.digest,
            *(f"{key} {entry} {world.views[entry[0], entry[1]]}" for key, entry in world.entries.items()),
        ]
        parts += [f"{mark} {tool}" for mark, tool in world.law.tools.items()]
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]

    async def call(self, call: ToolCall) -> str:
        """The observation of one call; an unknown name or entry is said in words."""
        if call.name in TOOLS:
            return self.world.consult(call.name, call.arguments["entry"])
        return await self.corpus.call(call)


class PocketEnvironment(EnvironmentSettings):
    """A generated closed corpus about invented entities."""

    kind: Literal["pocket"] = "pocket"
    """A generated world."""
    results: int = Field(3, ge=1, le=10)
    """Pages that one search lists."""


def _make(settings: PocketEnvironment, place: Place) -> PocketTools:
    return PocketTools(World(place.split.world or 0), settings.results)


def _tasks(settings: PocketEnvironment, split: TaskSplit, name: str) -> tuple[Task, ...]:
    return tuple(World(split.world or 0).tasks(split.count or 0, f"pocket/{name}"))


def _mistakes(settings: PocketEnvironment, experiment: Experiment) -> list[tuple[str, str]]:
    found = world_tasks(experiment, "the pocket world makes its own tasks (environment.kind: corpus reads files)")
    worlds = {name: split.world or 0 for name, split in experiment.tasks.splits.items()}
    for name, world in worlds.items():
        if world >= PRETRAINING_SEEDS:
            what = f"{world} is a pretraining world: use a number below {PRETRAINING_SEEDS}"
            found.append((f"tasks.{name}.world", what))
    if experiment.tasks.train.stream:
        if max(worlds.values()) >= STREAM_WORLDS:
            what = f"a stream goes on in steps of {STREAM_WORLDS}: number the worlds of all splits below that"
            found.append(("tasks.train.world", what))
        if experiment.iterations >= MOST_STREAM_ITERATIONS:
            what = f"the pocket world has fresh worlds for {MOST_STREAM_ITERATIONS - 1} iterations"
            found.append(("tasks.train.stream", what))
    return found


POCKET = EnvironmentPart(
    settings=PocketEnvironment,
    make=_make,
    tasks=_tasks,
    fresh=lambda split, iteration: {"world": (split.world or 0) + STREAM_WORLDS * (iteration - 1)},
    mistakes=_mistakes,
)
