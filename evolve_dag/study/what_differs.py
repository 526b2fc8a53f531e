"""In which keys the arms of a study differ from those that they are contrasted with: what a contrast can be owed to.

It is found by comparing the experiments as they were resolved, so it also holds what nobody meant to change.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic_core import to_jsonable_python

from evolve_dag.config.parts import CHOICES
from evolve_dag.config.section import RUNTIME, Section, marked
from evolve_dag.steps.base import STEPS
from evolve_dag.steps.slices import slice_of
from evolve_dag.study.definition import SPLITS, Cell, Study

SCORED_ONLY = frozenset(f"evaluation.{key}" for key in ("base_temperatures", "ceiling", "greedy", "with_experience"))
"""Keys that say what else is scored, and change no other number."""
OF_THE_SEED = frozenset({"seed", *(f"tasks.{split}.world" for split in SPLITS)})
PRESET = "regime.preset"

Said = Literal["set", "config", "preset", "part", ""]


@dataclass(frozen=True, slots=True)
class Change:
    """One key in which an arm differs from a reference of its."""

    arm: str
    reference: str
    key: str
    """Dotted."""
    here: Any
    """The arm's value, a JSON value; None where it has no such key."""
    there: Any
    """The reference's."""
    said: Said
    """Which part of the arm's own entry states the key: its ``set``; its experiment file, where the reference is not made of
    that one too; a preset of the regime in one of these, which decides several keys; the name of another part
    (``extraction.extractor``), which brings settings of its own; '' where nothing does."""


def what_differs(study: Study) -> list[Change]:
    """Of every arm against each of its references: the keys with another value that a step of one of the two reads.

    Not those that say where or how fast it runs.
    """
    return [change for arm in study.arms for reference in study.references(arm) for change in _changes(study, arm, reference)]


def _changes(study: Study, arm: str, reference: str) -> Iterator[Change]:
    one, other = _cells_to_compare(study, arm, reference)
    here, there = (dict(_flat(cell.experiment, "")) for cell in (one, other))
    left_out = SCORED_ONLY if one.seed == other.seed else SCORED_ONLY | OF_THE_SEED
    slices = [slice_of(spec, cell.experiment) for spec in STEPS for cell in (one, other)]
    for key in dict.fromkeys((*here, *there)):
        a, b = here.get(key), there.get(key)
        if a != b and key not in left_out and any(part.holds(key) for part in slices):
            others = [name for name in _choosers(key) if here.get(name) != there.get(name)]
            yield Change(arm, reference, key, a, b, _said(study, arm, reference, key, others))


def _cells_to_compare(study: Study, arm: str, reference: str) -> tuple[Cell, Cell]:
    """Of the same seed, where there is one."""
    pairs = [(one, other) for one in study.of_arm(arm) for other in study.of_arm(reference)]
    return next((pair for pair in pairs if pair[0].seed == pair[1].seed), pairs[0])


def _flat(section: Section, prefix: str) -> Iterator[tuple[str, Any]]:
    """Dotted keys and their JSON values, but for those that say how fast or where."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _flat(value, f"{prefix}{name}.")
        elif not marked(field, RUNTIME):
            yield f"{prefix}{name}", to_jsonable_python(value)


def _choosers(key: str) -> list[str]:
    """What names the part whose settings a key is among: ``extraction.extractor`` of ``extraction.cap``."""
    section = key.partition(".")[0]
    return [choice.place for choice in CHOICES.values() if choice.section == section and choice.place != key]


def _said(study: Study, arm: str, reference: str, key: str, others: Sequence[str]) -> Said:
    """Where the arm's entry states a key; ``others`` name its part, and another one in the reference."""
    theirs = set(study.stated[reference].values()) - {study.file}
    own = {stated: file for stated, file in study.stated[arm].items() if file not in theirs}
    if key in own:
        return "set" if own[key] == study.file else "config"
    if key.startswith("regime.") and PRESET in own:
        return "preset"
    return "part" if any(name in own for name in others) else ""


def outline(study: Study) -> Iterator[str]:
    """A line for every arm and reference: ``global against pocket: injection global (step_wise)``."""
    changes = what_differs(study)
    for arm in study.arms:
        for reference in study.references(arm):
            told = [_line(c) for c in changes if (c.arm, c.reference) == (arm, reference)]
            yield f"{arm} against {reference}: {', '.join(told) or 'nothing differs'}"


def _line(change: Change) -> str:
    silent = {"preset": " by the regime's preset", "part": " with that part", "": " (NOT SAID)"}.get(change.said, "")
    return f"{change.key} {as_stated(change.here)} ({as_stated(change.there)}){silent}"


def as_stated(value: Any) -> str:
    """A value as an experiment file would say it; ``–`` where there is none."""
    if value is None:
        return "–"
    return value if isinstance(value, str) else json.dumps(value)
