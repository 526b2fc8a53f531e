"""What every part of an experiment file is made of: strict, frozen sections, and the marks that a key can bear."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Strict
from pydantic.fields import FieldInfo

from evolve_dag.errors import SliceError

MOST = 10_000_000
"""Bound of every number that counts something: a slip of the hand, not a need, lies above it."""
Strings = Annotated[tuple[str, ...], Strict(False)]
"""YAML knows lists only."""
RUNTIME: dict[str, Any] = {"runtime": True}
"""Marks a key that says how fast or where, never what: it is in no slice, so in no digest."""
PATH: dict[str, Any] = {"path": True}
"""Marks a key that names a file or folder: relative to the file that states it, and in a digest by its content."""
IDENTITY: dict[str, Any] = {"identity": True}
"""Marks a key that stands in the identity of the section's path, and not beside it."""
LATER: dict[str, Any] = {"later": True}
"""Marks a key that came later and whose default says what was always done: at its default it is in no digest, so that what was
made before it came is not made again."""
FOLDER: dict[str, Any] = {**PATH, "folder": True}
"""Marks one that names a folder, with all that is in it."""

PROGRAM: dict[str, Any] = {**RUNTIME, "program": True}
"""Marks one that names a program: relative to the file that states it, its links as they are (an environment's interpreter is
one); a name alone is looked for as the system does."""


class Section(BaseModel):
    """A part of an experiment file; unknown keys, silent type conversions and endless numbers are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)

    if not TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            if name in type(self).model_fields:  # left out by `only`
                raise SliceError(
                    f"{type(self).__name__}.{name} is read by a step, but is not in its digest",
                    "name the key in the step's spec (evolve_dag/steps), or a model under `roles` of the part that asks it",
                )
            return super().__getattr__(name)


S = TypeVar("S", bound=Section)


def only(section: S, wanted: Callable[[str], bool], prefix: str = "") -> S:
    """The section with the wanted keys alone; reading another raises :class:`SliceError`.

    Args:
        wanted: says so of a dotted key, e.g. ``distillation.rank``.
    """
    kept = section.model_copy()
    for name in type(section).model_fields:
        value = kept.__dict__.pop(name)
        if isinstance(value, Section):
            value = only(value, wanted, f"{prefix}{name}.")
            if value.__dict__:
                kept.__dict__[name] = value
        elif wanted(f"{prefix}{name}"):
            kept.__dict__[name] = value
    return kept


def marked(field: FieldInfo, mark: dict[str, Any]) -> bool:
    """Whether a key bears a mark, i.e. :data:`RUNTIME` or :data:`PATH`."""
    extra = field.json_schema_extra
    return isinstance(extra, dict) and mark.items() <= extra.items()
