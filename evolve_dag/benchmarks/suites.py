"""Task suites by experiment: the tasks of a split and the environment they are asked in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

from evolve_dag.config import CorpusEnvironment, Experiment, PocketEnvironment
from evolve_dag.environments.base import Environment
from evolve_dag.errors import ConfigError, DataError
from evolve_dag.records import Task
from evolve_dag.verification.base import Verifier

SplitName = Literal["train", "development", "held_out"]
SPLITS: tuple[SplitName, ...] = ("train", "development", "held_out")


@dataclass(frozen=True, slots=True)
class Split:
    """Tasks of one use, with what answers their tool calls and what judges their answers."""

    tasks: tuple[Task, ...]
    environment: Environment
    verifier: Verifier


def load_split(experiment: Experiment, name: SplitName) -> Split:
    """Tasks, environment and verifier of one split.

    Raises:
        DataError: a file of tasks or pages is wrong; lists the lines.
    """
    from evolve_dag.verification.exact import ExactVerifier

    split = getattr(experiment.tasks, name)
    if isinstance(experiment.environment, PocketEnvironment):
        from evolve_dag.environments.pocket.world import PRETRAINING_SEEDS, World

        assert split.world is not None
        assert split.count is not None
        if split.world >= PRETRAINING_SEEDS:
            raise ConfigError(
                f"tasks.{name}.world: {split.world} is a pretraining world", f"use a number below {PRETRAINING_SEEDS}"
            )
        world = World(split.world)
        tasks = tuple(world.tasks(split.count, f"pocket/{name}"))
        return Split(tasks, world.environment(experiment.environment.results), ExactVerifier())
    from evolve_dag.benchmarks.jsonl import load_tasks

    assert split.path is not None
    tasks = tuple(load_tasks(Path(split.path), suite=f"{experiment.experiment}/{name}", count=split.count))
    return Split(tasks, _corpus(experiment, experiment.environment), ExactVerifier())


def check_disjoint(experiment: Experiment) -> None:
    """Held-out and development tasks must not be trained on.

    Raises:
        DataError: two splits share a question; names them.
    """
    from evolve_dag.benchmarks.jsonl import refuse_shared_questions

    if isinstance(experiment.environment, PocketEnvironment):
        return  # each split asks about a world of its own (config.py): the same words there ask about other facts
    refuse_shared_questions({name: load_split(experiment, name).tasks for name in SPLITS})


def _corpus(experiment: Experiment, settings: CorpusEnvironment) -> Environment:
    from evolve_dag.environments.corpus import CorpusSearch
    from evolve_dag.environments.pocket.language import SYSTEM_PROMPT
    from evolve_dag.inference.folders import is_pocket

    return CorpusSearch.from_jsonl(
        Path(settings.pages),
        results=settings.results,
        snippet_characters=settings.snippet_characters,
        title_weight=settings.title_weight,
        text_weight=settings.text_weight,
        minimum_match=settings.minimum_match,
        # The pocket policy knows one system message; any other model is told the tools in full.
        system_prompt=SYSTEM_PROMPT if is_pocket(experiment.models.policy) else None,
    )


def data_digests(experiment: Experiment) -> dict[str, str]:
    """Config key of every user's file -> hash of its content."""
    files: dict[str, str] = {}
    if isinstance(experiment.environment, CorpusEnvironment):
        files["environment.pages"] = experiment.environment.pages
    for name in SPLITS:
        path = getattr(experiment.tasks, name).path
        if path is not None:
            files[f"tasks.{name}.path"] = path
    return {key: _file_digest(Path(path), key) for key, path in files.items()}


def _file_digest(path: Path, key: str) -> str:
    try:
        stat = path.stat()
    except OSError:
        raise DataError(f"{path}: no such file", f"correct {key} in the experiment file") from None
    return _hash(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _hash(path: str, size: int, modified: int) -> str:
    with Path(path).open("rb") as handle:
        return f"sha256:{hashlib.file_digest(handle, 'sha256').hexdigest()[:32]}"
