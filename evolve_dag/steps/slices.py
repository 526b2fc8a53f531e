"""The part of an experiment that a step reads: what is in its digest, and what its body can see.

Both follow from the step's spec and from the rows of the parts that the experiment names (:mod:`evolve_dag.config.parts`):
the keys that the spec lists, the models that its parts ask, the prompts that they use. A body gets an experiment in which only
these keys exist, so a setting, a model or a prompt that nobody declared cannot decide anything: reading it is a
:class:`~evolve_dag.errors.SliceError`. Files stand in the digest by their content, models by their weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic.fields import FieldInfo

from evolve_dag import prompts
from evolve_dag.config.parts import CHOICES, identity, named_by, part_of
from evolve_dag.config.schema import Experiment, PolicySettings, TaskSplit
from evolve_dag.config.section import FOLDER, IDENTITY, LATER, PATH, RUNTIME, Section, marked, only
from evolve_dag.inference.folders import base_identity, turns_of
from evolve_dag.tasks.contents import file_digest, folder_digest, rows_digest

if TYPE_CHECKING:
    from evolve_dag.steps.spec import StepSpec

ALWAYS = ("experiment", "runtime")
"""Every body sees them: they say whose it is and how fast, never what."""


@dataclass(frozen=True, slots=True)
class Slice:
    """What one step reads under one experiment."""

    keys: tuple[str, ...]
    """Dotted; a key stands for all below it."""
    without: frozenset[str]
    """Keys below those that are not read after all."""
    prompts: Mapping[str, tuple[str, ...]]
    """Section -> prompts that the part there uses."""

    def holds(self, key: str) -> bool:
        """Whether a key is in it."""
        return any(_covers(mine, key) for mine in self.keys) and not any(_covers(other, key) for other in self.without)


def slice_of(spec: StepSpec, experiment: Experiment) -> Slice:
    """What the step reads: its keys, the models that the parts in them ask, and their prompts."""
    without = set(spec.unread(experiment))
    keys = [key for key in spec.config if key not in without]
    used: dict[str, tuple[str, ...]] = {}
    for choice, place in CHOICES.items():
        if place.section in keys:
            settings = getattr(experiment, place.section)
            row = part_of(choice, settings)
            keys += [f"models.{role}" for role in row.roles(settings)]
            without |= {f"{place.section}.{key}" for key in row.unread(settings, experiment)}
            used[place.section] = tuple(row.prompts(settings, experiment))
    return Slice(tuple(dict.fromkeys(keys)), frozenset(without), used)


def decisive(spec: StepSpec, experiment: Experiment) -> dict[str, Any]:
    """The slice as JSON values for the digest.

    Example:
        ``{"seed": 0, "tasks.train": {"count": 96, ...}, "models.judge": {...}, "prompts.verification": "sha256:..."}``

    Raises:
        DataError: a file that the experiment names is missing or wrong.
        ModelError: the weights of a model are missing.
        OrderError: a stream holds no tasks for this iteration yet.
    """
    part = slice_of(spec, experiment)
    values = {}
    for key in part.keys:
        section: Any = experiment
        *parents, last = key.split(".")
        for name in parents:
            section = getattr(section, name)
        values[key] = _value(section, last, key, part)
    names = {section: found for section, found in part.prompts.items() if found}
    return values | {f"prompts.{section}": prompts.digest(*found) for section, found in names.items()}


def visible(specs: Iterable[StepSpec], experiment: Experiment) -> tuple[Experiment, frozenset[str]]:
    """What the body of the first step may read: the experiment without any other key, and the names of its prompts.

    Args:
        specs: the step and all that it is made from, whose digests its own holds.
    """
    slices = [slice_of(spec, experiment) for spec in specs]
    keys = (*ALWAYS, *(key for spec in specs for key in spec.told))
    shown = only(experiment, lambda key: any(_covers(one, key) for one in keys) or any(part.holds(key) for part in slices))
    return shown, frozenset(name for part in slices for found in part.prompts.values() for name in found)


def _covers(key: str, inner: str) -> bool:
    return inner == key or inner.startswith(f"{key}.")


def _values(section: Section, prefix: str, part: Slice) -> Iterator[tuple[str, Any]]:
    """The decisive keys of a section: not those that say how fast or where, nor those that are not read."""
    for name, field in type(section).model_fields.items():
        key, value = f"{prefix}.{name}", getattr(section, name)
        if marked(field, RUNTIME) or marked(field, IDENTITY) or (not part.holds(key) and not isinstance(value, Section)):
            continue
        if marked(field, LATER) and value == field.default:
            continue
        if isinstance(section, TaskSplit) and name == "stream":
            continue  # which tasks it came to is said by the world, or by the rows' hash
        yield name, _content(section, field, value, key) if marked(field, PATH) and value else _value(section, name, key, part)


def _value(section: Section, name: str, key: str, part: Slice) -> Any:
    """What stands for one key: of a part from outside, what it is; of a section, its keys."""
    value = getattr(section, name)
    if isinstance(value, Section):
        return dict(_values(value, key, part))
    if (choice := named_by(section, name)) is not None:
        return identity(choice, value, section)
    return list(value) if isinstance(value, tuple) else value


def _content(section: Section, field: FieldInfo, path: str, key: str) -> str:
    if isinstance(section, PolicySettings):
        return f"{base_identity(section)} {turns_of(section)}".rstrip()
    if isinstance(section, TaskSplit) and (section.stream or section.percent is not None):
        return rows_digest(section, key)  # a row that falls into another part is no change
    return folder_digest(path, key) if marked(field, FOLDER) else file_digest(path, key)
