"""Records as JSON values and back, by pydantic: the types of a record's fields are all that has to be said."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeVar

from evolve_dag.errors import DataError

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError
    from pydantic_core import ErrorDetails

Record = TypeVar("Record")
_ADAPTERS: dict[type, TypeAdapter[Any]] = {}
_WORDS = {"missing": "missing", "extra_forbidden": "unknown field", "model_type": "should be an object"}
"""Kind of mistake -> what is said of it, where pydantic speaks of Python."""


def to_values(record: Any) -> dict[str, Any]:
    """The fields of a record (a dataclass) as what JSON knows: objects, lists, numbers, text, null."""
    values: dict[str, Any] = _adapter(type(record)).dump_python(record, mode="json")
    return values


def from_values(kind: type[Record], values: object, what: str, remedy: str) -> Record:
    """The record of :func:`to_values`, also after a trip through JSON; fields that it does not know are left out.

    Args:
        what: begins the message of an error.

    Raises:
        DataError: a field is missing or holds something else; all of them are named.
    """
    from pydantic import ValidationError

    try:
        record: Record = _adapter(kind).validate_python(values)
    except ValidationError as error:
        raise DataError(f"{what}: {'; '.join(mistakes(error))}", remedy) from error
    return record


def mistakes(error: ValidationError) -> list[str]:
    """Everything that is wrong, each with its place."""
    return [": ".join(filter(None, (".".join(map(str, one["loc"])), _said(one)))) for one in error.errors()]


def _said(one: ErrorDetails) -> str:
    if one["type"] in _WORDS:
        return _WORDS[one["type"]]
    what = re.sub(r"^(Input|Value error,) ?", "", one["msg"])
    if not isinstance(one["input"], (Mapping, list)):
        what += ", not empty" if one["input"] == "" else f", not {repr(one['input'])[:60]}"
    return what


def is_finite(value: object) -> bool:
    """A finite number, and no truth value."""
    # compared, not converted: float() of a whole number with 400 digits raises
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e300 < value < 1e300


def _adapter(kind: type[Record]) -> TypeAdapter[Record]:
    from pydantic import TypeAdapter

    if kind not in _ADAPTERS:  # made once: it takes as long as reading thousands of records
        _ADAPTERS[kind] = TypeAdapter(kind)
    return _ADAPTERS[kind]
