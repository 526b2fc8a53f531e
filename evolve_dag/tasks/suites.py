"""Task suites by experiment: the tasks of a split and the environment they are asked in."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from evolve_dag.config.schema import CorpusEnvironment, Experiment, PocketEnvironment, TaskSplit, ToolsEnvironment
from evolve_dag.errors import ConfigError, DataError
from evolve_dag.protocols import Environment, Verifier
from evolve_dag.records import Task
from evolve_dag.store.disk import regular

if TYPE_CHECKING:
    from evolve_dag.environments.pocket.world import World
    from evolve_dag.inference.roles import Roles

SplitName = Literal["train", "development", "held_out"]
SPLITS: tuple[SplitName, ...] = ("train", "development", "held_out")


@dataclass(frozen=True, slots=True)
class Split:
    """Tasks of one use, with what answers their tool calls and what judges their answers."""

    tasks: tuple[Task, ...]
    environment: Environment
    verifier: Verifier


def load_split(experiment: Experiment, name: SplitName, roles: Roles | None = None) -> Split:
    """Tasks, environment and verifier of one split.

    Args:
        roles: who is asked where a model judges answers or sums up pages.

    Raises:
        DataError: a file of tasks or pages is wrong; lists the lines.
    """
    from evolve_dag.verification.choose import make_verifier

    verifier = make_verifier(experiment.verification, roles)
    settings = experiment.environment
    tasks = load_tasks_of(experiment, name)
    if isinstance(settings, PocketEnvironment):
        from evolve_dag.environments.pocket.tools import PocketTools

        return Split(tasks, PocketTools(_world(experiment, name), settings.results), verifier)
    if isinstance(settings, ToolsEnvironment):
        from evolve_dag.environments.web.tools import ToolsWorld

        asks = settings.summarize and roles is not None
        world = ToolsWorld(
            settings,
            extractor=roles.later("extractor") if roles is not None and asks else None,
            identity=(lambda: roles.identity("extractor")) if roles is not None and asks else "",
            memory=roles.memory if roles is not None else None,
        )
        return Split(tasks, world, verifier)
    return Split(tasks, _corpus(experiment, settings), verifier)


def load_tasks_of(experiment: Experiment, name: SplitName) -> tuple[Task, ...]:
    """The tasks of one split alone.

    Raises:
        DataError: a file of tasks is wrong; lists the lines.
    """
    split = getattr(experiment.tasks, name)
    if isinstance(experiment.environment, PocketEnvironment):
        return tuple(_world(experiment, name).tasks(split.count, f"pocket/{name}"))
    from evolve_dag.tasks.formats import load_suite

    return tuple(load_suite(split, suite=f"{experiment.experiment}/{name}"))


def _world(experiment: Experiment, name: SplitName) -> World:
    from evolve_dag.environments.pocket.world import PRETRAINING_SEEDS, World

    number = getattr(experiment.tasks, name).world
    if number >= PRETRAINING_SEEDS:
        raise ConfigError(f"tasks.{name}.world: {number} is a pretraining world", f"use a number below {PRETRAINING_SEEDS}")
    return World(number)


def check_files(experiment: Experiment) -> None:
    """Read the files of tasks and pages as a run will, so that their mistakes show before anything is made.

    Raises:
        DataError: a file is wrong, or two splits share a question.
    """
    if isinstance(experiment.environment, CorpusEnvironment):
        from evolve_dag.environments.corpus import load_pages

        load_pages(experiment.environment.pages)
    check_disjoint(experiment)


def check_disjoint(experiment: Experiment) -> None:
    """Held-out and development tasks must not be trained on.

    Raises:
        DataError: two splits share a question; names them.
    """
    from evolve_dag.tasks.jsonl import refuse_shared_questions

    if isinstance(experiment.environment, PocketEnvironment):
        return  # each split asks about a world of its own (config.py): the same words there ask about other facts
    refuse_shared_questions({name: load_tasks_of(experiment, name) for name in SPLITS})


def _corpus(experiment: Experiment, settings: CorpusEnvironment) -> Environment:
    from evolve_dag.environments.corpus import CorpusSearch
    from evolve_dag.environments.pocket.language import CORPUS_PROMPT
    from evolve_dag.inference.folders import is_pocket

    return CorpusSearch.from_jsonl(
        Path(settings.pages),
        results=settings.results,
        snippet_characters=settings.snippet_characters,
        title_weight=settings.title_weight,
        text_weight=settings.text_weight,
        minimum_match=settings.minimum_match,
        # The pocket policy knows one system message for a corpus; any other model is told the tools in full.
        system_prompt=CORPUS_PROMPT if is_pocket(experiment.models.policy) else settings.system or None,
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
    train = experiment.tasks.train
    rows = files.pop("tasks.train.path") if train.stream and train.path is not None else None
    digests = {key: _file_digest(Path(path), key) for key, path in files.items()}
    if rows is not None:
        digests["tasks.train.path"] = _rows_digest(experiment, Path(rows))
    if isinstance(experiment.environment, ToolsEnvironment) and experiment.environment.files:
        folder = Path(experiment.environment.files)
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder", "correct environment.files in the experiment file")
        listed = sorted(p for p in folder.rglob("*") if p.is_file())
        content = [f"{p.relative_to(folder).as_posix()}\0{_file_digest(p, 'environment.files')}" for p in listed]
        digests["environment.files"] = f"sha256:{hashlib.sha256(chr(10).join(content).encode()).hexdigest()[:32]}"
    return digests


def _rows_digest(experiment: Experiment, path: Path) -> str:
    """Hash of the tasks that one iteration of a stream takes, whatever else the file holds."""
    _file_digest(path, "tasks.train.path")
    stat = path.stat()
    return _tasks_digest(experiment.tasks.train.model_dump_json(), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=256)
def _tasks_digest(split: str, size: int, modified: int) -> str:
    from evolve_dag.tasks.formats import load_suite

    tasks = load_suite(TaskSplit.model_validate_json(split), suite="stream")
    content = "\n".join(f"{t.id}\0{t.question}\0{t.answer}\0{sorted(t.metadata.items())}" for t in tasks)
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()[:32]}"


def _file_digest(path: Path, key: str) -> str:
    try:
        stat = regular(path)
    except FileNotFoundError:
        raise DataError(f"{path}: no such file", f"correct {key} in the experiment file") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}", f"correct {key} in the experiment file") from None
    return _hash(str(path), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=64)
def _hash(path: str, size: int, modified: int) -> str:
    with Path(path).open("rb") as handle:
        return f"sha256:{hashlib.file_digest(handle, 'sha256').hexdigest()[:32]}"
