"""A study file: arms x seeds x iterations, checked as a whole before anything runs.

An *arm* is an experiment file, or one with keys laid over it. A *cell* is one arm under one seed: an ordinary experiment with
a lineage of its own, named ``<study>.<arm>-s<seed>``.
"""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evolve_dag.config.loading import described, numbered, read_experiment, stated_keys
from evolve_dag.config.parts import part_of
from evolve_dag.config.schema import Experiment, contradictions
from evolve_dag.config.study import ArmSettings, StudySettings
from evolve_dag.config.yamlfile import read_mapping
from evolve_dag.environments.base import EnvironmentPart
from evolve_dag.errors import ConfigError

SPLITS = ("train", "development", "held_out")


@dataclass(frozen=True, slots=True)
class Cell:
    """One arm under one seed."""

    arm: str
    seed: int
    experiment: Experiment

    @property
    def name(self) -> str:
        """Of its lineage: the partition key in Dagster."""
        return self.experiment.experiment

    @property
    def iterations(self) -> int:
        return self.experiment.iterations


@dataclass(frozen=True, slots=True)
class Choice:
    """A part of a study, or a smaller one: what the command line says in place of the file."""

    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    iterations: int | None = None
    held_out: int | None = None
    processes: int | None = None

    def options(self) -> Iterator[str]:
        """As the command line says what decides the content of the report."""
        for name, values in (("--arm", self.arms), ("--seed", self.seeds)):
            for value in values:
                yield from (name, str(value))
        for name, number in (("--iterations", self.iterations), ("--held-out", self.held_out)):
            if number is not None:
                yield from (name, str(number))


@dataclass(frozen=True, slots=True)
class Study:
    """A study file, resolved and checked."""

    file: Path
    """Absolute."""
    settings: StudySettings
    cells: tuple[Cell, ...]
    """Seed by seed, arms in the order of the file."""
    stated: Mapping[str, Mapping[str, Path]] = field(default_factory=dict)
    """Arm -> dotted key that its experiment file or its own ``set`` states -> the file that does (the study's for ``set``)."""
    part: Choice | None = None
    """What the command line said, where that asks otherwise than the file; None: the whole study."""

    @property
    def name(self) -> str:
        return self.settings.study

    @property
    def arms(self) -> tuple[str, ...]:
        """Names of the arms that have a cell, in the order of the file."""
        return tuple(dict.fromkeys(name for name in self.settings.arms if any(cell.arm == name for cell in self.cells)))

    @property
    def reference(self) -> str:
        """The arm that the others are contrasted with, where they name none of their own; '' where it has no cell here: another
        one must not take its place without a word."""
        return self.settings.reference if self.settings.reference in self.arms else ""

    @property
    def leading(self) -> str:
        """The arm that is shown in most detail: the reference, or the first where that one has no cell here."""
        return self.reference or self.arms[0]

    @property
    def command(self) -> str:
        """What makes the report, for a shell."""
        return shlex.join(["evolve", "study", self.file.name, *(self.part.options() if self.part is not None else ())])

    def references(self, arm: str) -> tuple[str, ...]:
        """The arms that one is contrasted with: those that it names, of which some may have no cell here, or the study's."""
        named = self.settings.arms[arm].reference or (self.reference,)
        return tuple(other for other in dict.fromkeys(named) if other in self.arms and other != arm)

    @property
    def same_tasks(self) -> bool:
        """Whether several seeds are asked the same held-out tasks: those of a file, or of an environment that has one world."""
        asked = [cell.experiment.tasks.held_out.model_copy(update={"count": None}) for cell in self.cells]
        return len({cell.seed for cell in self.cells}) > 1 and all(one == asked[0] for one in asked)

    def of_arm(self, arm: str) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.arm == arm)


def load_study(path: Path | str, choice: Choice | None = None) -> Study:
    """Read a study file with every experiment that it asks for.

    Raises:
        ConfigError: lists every mistake of the study and of its arms, with file and key.
    """
    path = Path(path)
    content, mistakes = read_mapping(path)
    mistakes = [f"{path}: {mistake}" for mistake in mistakes]
    if "arms" not in content:
        raise ConfigError(f"{path}: is no study: it has no `arms`", f"run an experiment with: evolve run {path}")
    try:
        settings = StudySettings.model_validate({"study": path.stem, **content})
    except ValidationError as error:
        mistakes += [f"{path}: {described(item, StudySettings, content)}" for item in error.errors()]
        raise _refused(path, mistakes) from None
    mistakes += [f"{path}: {mistake}" for mistake in _contradictions(settings)]
    whole = settings.model_copy(update={"reference": settings.reference or next(iter(settings.arms))})
    settings, unknown = _chosen(whole, choice or Choice())
    mistakes += unknown
    cells: list[Cell] = []
    for name, arm in settings.arms.items():
        found, wrong = _cells(path, settings, name, arm)
        cells += found
        mistakes += [f"{path}: arms.{name}: {line}" for line in wrong]
    mistakes += dict.fromkeys(_asked_otherwise(path, cells))
    if mistakes:
        raise _refused(path, mistakes)
    order = {seed: place for place, seed in enumerate(dict.fromkeys(cell.seed for cell in cells))}
    stated = {name: stated_keys(path.parent / arm.config, arm.set, path.resolve()) for name, arm in settings.arms.items()}
    part = choice if _content(settings) != _content(whole) else None
    return Study(path.resolve(), settings, tuple(sorted(cells, key=lambda cell: order[cell.seed])), stated, part)


def _refused(path: Path, mistakes: Sequence[str]) -> ConfigError:
    return ConfigError(
        f"{path}: {numbered(mistakes)}", "mend the keys above; docs/configuration.md lists those of experiments and of studies"
    )


def _asked_otherwise(path: Path, cells: Sequence[Cell]) -> Iterator[str]:
    """Arms whose held-out tasks are others than the first arm's, not fewer or more: differences are paired by task."""
    first = {cell.seed: cell for cell in reversed(cells)}
    for cell in cells:
        asked, expected = (one.experiment.slice("environment", "tasks.held_out") for one in (cell, first[cell.seed]))
        expected["tasks.held_out"]["count"] = asked["tasks.held_out"]["count"]
        for key in asked:
            if asked[key] != expected[key]:
                what = f"{key}: asks otherwise than in arm {first[cell.seed].arm}, and arms are compared on the same tasks"
                yield f"{path}: arms.{cell.arm}: {what}: give it a study of its own"


def _twice(values: Sequence[int]) -> list[int]:
    return [value for value, count in Counter(values).items() if count > 1]


def _contradictions(settings: StudySettings) -> Iterator[str]:
    for key, seeds in (("seeds", settings.seeds), *((f"arms.{n}.seeds", a.seeds) for n, a in settings.arms.items())):
        if seeds is not None and not seeds:
            yield f"{key}: none: name at least one"
        for seed in _twice(seeds or ()):
            yield f"{key}: {seed} stands twice: a seed is one replicate"
    own = [(f"arms.{name}.reference", other) for name, arm in settings.arms.items() for other in arm.reference]
    for key, arm in (("reference", settings.reference), *((f"paper.{n}", a) for n, a in settings.paper), *own):
        if arm and arm not in settings.arms:
            yield f"{key}: no arm {arm!r}: {', '.join(settings.arms)}"
    yield from _unmatched(settings)
    for key, values in (("set", settings.set), *((f"arms.{n}.set", a.set) for n, a in settings.arms.items())):
        yield from (f"{key}.{own}: the study says it itself: {why}" for own, why in _OWN.items() if _states(values, own))


def _unmatched(settings: StudySettings) -> Iterator[str]:
    """Arms that the report lays beside the paper's recipe, and that are contrasted with another one."""
    recipe, common = settings.paper.step_wise, settings.reference or next(iter(settings.arms))
    for key, name in settings.paper:
        arm = settings.arms.get(name or "")
        if recipe and arm is not None and name != recipe and recipe not in (arm.reference or (common,)):
            yield f"paper.{key}: {name!r} is matched to another arm than paper.step_wise, {recipe!r}: see its `reference`"


_OWN: Mapping[str, str] = {
    "experiment": "lineages are named after study, arm and seed",
    "extends": "the arm's `config`",
    "seed": "`seeds`",
    "iterations": "`iterations`",
    "runtime.threads": "`threads`",
    "tasks.held_out.count": "`held_out`",
    **{f"tasks.{split}.world": "`worlds`" for split in SPLITS},
}
"""Keys of an experiment that a study decides -> where."""


def _states(values: Mapping[str, Any], dotted: str) -> bool:
    node: Any = values
    for part in dotted.split("."):
        if not isinstance(node, dict) or part not in node:
            return False
        node = node[part]
    return True


def _chosen(settings: StudySettings, choice: Choice) -> tuple[StudySettings, list[str]]:
    """The settings with what the command line says laid over them, and what is wrong with that."""
    wrong = [f"--arm {name}: no such arm: {', '.join(settings.arms)}" for name in choice.arms if name not in settings.arms]
    wrong += [f"--seed {seed} stands twice" for seed in _twice(choice.seeds)]
    arms = {name: arm for name, arm in settings.arms.items() if not choice.arms or name in choice.arms}
    if choice.seeds:
        arms = {name: arm.model_copy(update={"seeds": choice.seeds}) for name, arm in arms.items()}
    if choice.iterations:
        arms = {name: arm.model_copy(update={"iterations": choice.iterations}) for name, arm in arms.items()}
    over = {"arms": arms, "held_out": choice.held_out or settings.held_out, "processes": choice.processes or settings.processes}
    return settings.model_copy(update=over), wrong


def _content(settings: StudySettings) -> tuple[Any, ...]:
    """What a choice can take away: arms with their seeds and iterations, and the number of held-out tasks."""
    arms = {
        name: (sorted(settings.seeds if arm.seeds is None else arm.seeds), arm.iterations or settings.iterations)
        for name, arm in settings.arms.items()
    }
    return arms, settings.held_out


def _cells(path: Path, settings: StudySettings, name: str, arm: ArmSettings) -> tuple[list[Cell], list[str]]:
    """The cells of one arm, and what is wrong with it; a mistake that every seed shares is told once."""
    cells: list[Cell] = []
    wrong: list[str] = []
    for seed in dict.fromkeys(settings.seeds if arm.seeds is None else arm.seeds):
        try:
            experiment, mistakes = _experiment(path, settings, name, arm, seed)
        except ConfigError as error:  # the file is not there, or cannot be read
            return [], [error.what]
        wrong += mistakes
        if experiment is not None:
            cells.append(Cell(name, seed, experiment))
    return cells, list(dict.fromkeys(wrong))


def _experiment(
    path: Path, settings: StudySettings, name: str, arm: ArmSettings, seed: int
) -> tuple[Experiment | None, list[str]]:
    """The arm's file, then ``set``, then what the study says itself: over the whole experiment with its defaults."""
    stated, mistakes = read_experiment(path.parent / arm.config, [settings.set, arm.set], path)
    if stated is None:
        return None, mistakes
    values = stated.model_dump()
    values |= {"experiment": f"{settings.study}.{name}-s{seed}", "seed": seed}
    values["iterations"] = arm.iterations or settings.iterations
    values["runtime"]["threads"] = settings.threads
    if settings.held_out is not None:
        values["tasks"]["held_out"]["count"] = settings.held_out
    environment: EnvironmentPart[Any] = part_of("environment", stated.environment)
    of_worlds = environment.tasks is not None and not environment.one_world
    for split, own in stated.tasks.splits.items() if of_worlds else ():
        first = getattr(settings.worlds, split) if stated.environment.kind == "pocket" else own.world
        values["tasks"][split]["world"] = (first or 0) + seed
    try:
        experiment = Experiment.model_validate(values)
    except ValidationError as error:
        return None, [described(item, Experiment, values) for item in error.errors()]
    wrong = [f"{key}: {what}" for key, what in contradictions(experiment)]
    return (None if wrong else experiment), wrong
