"""Writes docs/configuration.md from the settings classes: ``python -m evolve_dag.config.reference``."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel

from evolve_dag.config.schema import (
    CorpusEnvironment,
    Experiment,
    OpenAIModelSettings,
    PocketEnvironment,
    ToolsEnvironment,
    TransformersModelSettings,
    VllmModelSettings,
)
from evolve_dag.config.study import ArmSettings, StudySettings

INTRODUCTION = """# Every key of an experiment file

Made from `evolve_dag/config/schema.py` by `python -m evolve_dag.config.reference`; do not edit by hand.

An experiment file is YAML. `extends: other.yaml` starts from another file (a path relative to this one) and lays this
one's keys over it. Unknown keys, wrong types and combinations that cannot work are refused, all in one message.
Paths are relative to the file that states them. `regime` takes a preset (`off_policy`, `on_policy`), or a preset and
changes to it: `regime: {preset: off_policy, divergence: cross_entropy}`. Keys under `runtime` say how fast, never what:
they are in no digest.

| key | type | default | meaning |
|---|---|---|---|
"""
HEAD = INTRODUCTION[INTRODUCTION.rindex("| key |") :]


def reference() -> str:
    """The page."""
    parts = [INTRODUCTION, _table(_rows(Experiment, ""))]
    for title, section in (
        ("A model in this process: `backend: transformers`", TransformersModelSettings),
        ("A model that vLLM serves: `backend: vllm`", VllmModelSettings),
        ("A model behind an endpoint: `backend: openai`", OpenAIModelSettings),
        ("A study file, for `evolve study`", StudySettings),
        ("An arm of a study: an experiment file, or a mapping", ArmSettings),
    ):
        parts.append(f"\n## {title}\n\n{HEAD}{_table(_rows(section, ''))}")
    return "".join(parts)


def _table(rows: Iterator[tuple[str, str, str, str]]) -> str:
    return "".join(f"| `{key}` | {kind} | {default} | {meaning} |\n" for key, kind, default, meaning in rows)


def _rows(section: type[BaseModel], prefix: str) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        key = f"{prefix}{name}"
        inner = field.annotation
        if key == "environment":
            for kind in (PocketEnvironment, CorpusEnvironment, ToolsEnvironment):
                yield from _rows(kind, "environment.")
        elif prefix == "models.":
            default = "none" if field.default is None else _text(getattr(field.default, "path", field.default))
            kinds = "a model" if key == "models.policy" else "`policy` or a model" if field.default == "policy" else "a model"
            yield key, kinds, default, " ".join((field.description or "").split())
        elif isinstance(inner, type) and issubclass(inner, BaseModel):
            yield from _rows(inner, f"{key}.")
        else:
            default = "required" if field.is_required() else "none" if field.default_factory else _text(field.default)
            bounds = _bounds(field.metadata)
            yield key, _type(inner) + bounds, default, " ".join((field.description or "").split())


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return " \\| ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join("nothing" if a is type(None) else _type(a) for a in get_args(annotation))
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) is tuple:
        return f"list of {_type(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping"
    return {str: "text", int: "whole number", float: "number", bool: "true \\| false"}.get(annotation, str(annotation))


def _text(value: Any) -> str:
    if isinstance(value, tuple):
        return "`[" + ", ".join(map(str, value)) + "]`"
    return "none" if value is None else '""' if value == "" else f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _bounds(metadata: list[Any]) -> str:
    words = {Ge: "≥", Gt: ">", Le: "≤", Lt: "<"}
    found = [
        f"{sign} {getattr(m, cls.__name__.lower())}" for m in metadata for cls, sign in words.items() if isinstance(m, cls)
    ]
    return f", {', '.join(found)}" if found else ""


def main() -> None:
    """Write the page."""
    Path("docs/configuration.md").write_text(reference(), encoding="utf-8")


if __name__ == "__main__":
    main()
