"""Settings -> selector."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from evolve_dag.config.schema import SelectionSettings
from evolve_dag.errors import ConfigError
from evolve_dag.experience.selection.base import Selector
from evolve_dag.experience.selection.state import StateSelector

if TYPE_CHECKING:
    from pathlib import Path

    from evolve_dag.protocols import LanguageModel
    from evolve_dag.store.memory import Memory
from evolve_dag.experience.selection.lexical import LexicalSelector


def make_selector(
    settings: SelectionSettings,
    *,
    model: Callable[[], LanguageModel] | None = None,
    identity: str = "",
    embedding_folder: Path | None = None,
    memory: Memory | None = None,
    seed: int = 0,
) -> Selector:
    """The selector that the experiment names.

    Args:
        model: for ``llm``: gives the model when it is first needed.
        identity: for ``llm``: what the model is, for the keys of remembered choices.
        embedding_folder: for ``embedding``: folder of the model.
        memory: for ``llm``: where choices are remembered; None: in this process only.
        seed: for ``llm``: of sampling.

    Raises:
        ConfigError: the selector needs a model that is not given.
    """
    if settings.selector == "state":
        return StateSelector(max_items=settings.max_items)
    if settings.selector == "lexical":
        return LexicalSelector(max_items=settings.max_items)
    if settings.selector == "embedding":
        if embedding_folder is None:
            raise ConfigError("selection.selector: embedding needs a model", "name one under models.embedding")
        from evolve_dag.experience.selection.embedding import Embedder, EmbeddingSelector

        return EmbeddingSelector(Embedder(embedding_folder), settings.max_items)
    if model is None:
        raise ConfigError("selection.selector: llm needs a model", "name one under models.selector")
    from evolve_dag.experience.selection.llm import LLMSelector

    return LLMSelector(settings, model, identity, memory=memory, seed=seed, characters=settings.max_characters)
