"""The tools of the pocket world: search and visit, as over any corpus, and five that look up what stands under a mark."""

from __future__ import annotations

import hashlib
from functools import cached_property

from evolve_dag.environments.corpus import TOOLS as CORPUS_TOOLS
from evolve_dag.environments.corpus import CorpusSearch
from evolve_dag.environments.pocket.language import SYSTEM_PROMPT, TOOLS
from evolve_dag.environments.pocket.world import MINIMUM_MATCH, RESULTS, World
from evolve_dag.protocols import ToolSpec
from evolve_dag.records import ToolCall

CONSULTED = tuple(ToolSpec(name, "Look up what stands under a mark.", {"entry": "The marked name."}) for name in TOOLS)


class PocketTools:
    """An :class:`~evolve_dag.environments.base.Environment` over one pocket world.

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
