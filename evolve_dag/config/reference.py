"""Writes docs/configuration.md from the settings classes: ``python -m evolve_dag.config.reference``.

With a file, ``python -m evolve_dag.config.reference mine.md``, it writes that one, with the parts of installed distributions;
experiment files after it, ``... mine.md a.yaml b.yaml``, add the parts that they name in files beside them.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt

from evolve_dag.config.loading import load_experiment
from evolve_dag.config.parts import CHOICES, Chosen, Part, chosen, known, parts_beside, usable
from evolve_dag.config.schema import LAUNCHER, Experiment, Models, WarmupSettings
from evolve_dag.config.section import Section
from evolve_dag.config.study import ArmSettings, StudySettings
from evolve_dag.errors import EvolveError

INTRODUCTION = """# Every key of an experiment file

Made from the settings classes by `python -m evolve_dag.config.reference`; do not edit by hand.

An experiment file is YAML. `extends: other.yaml` starts from another file (a path relative to this one) and lays this
one's keys over it. Unknown keys, wrong types and combinations that cannot work are refused, all in one message.
Paths are relative to the file that states them. `regime` takes a preset (`off_policy`, `on_policy`), or a preset and
changes to it: `regime: {preset: off_policy, divergence: cross_entropy}`. Keys under `runtime` say how fast, never what:
they are in no digest.

Some sections name a *part* (`selection.selector`, `environment.kind`, ...): they have the keys of that part, listed below the
table, and no others. Where a file names another part than the one it extends, it keeps of the section what this part has too;
an environment starts anew.

| key | type | default | meaning |
|---|---|---|---|
"""
HEAD = INTRODUCTION[INTRODUCTION.rindex("| key |") :]
VARIABLES = """
## Variables of the environment

Keys are in the environment too, under the names that the file gives (`key` of a model), and `SERPER_API_KEY`, `JINA_API_KEY`.

| variable | meaning |
|---|---|
| `EVOLVE_STORE` | Folder of the artifacts; unset: `.evolve` in the working folder. `--store` wins. |
| `EVOLVE_CONFIGS` | Folder whose experiments are known by name before they ran; unset: `configs` in the working folder. |
| `EVOLVE_MIRROR` | Address of the store's copy on object storage ([production.md](production.md)). |
| `EVOLVE_TRACKING` | `off`: nothing is sent to MLflow but by `evolve sync-mlflow`. |
| `MLFLOW_TRACKING_URI` | Where that is sent; unset: to sqlite in the store. |
| `EVOLVE_MLFLOW_UI` | Where a browser finds that MLflow, for links. |
| `EVOLVE_BASE_MODEL` | Folder of the base model, for a registered model that is loaded on a machine where it lies elsewhere. |
| `DAGSTER_HOME` | Folder of Dagster's instance; unset: `dagster` in the store. |
| `EVOLVE_OWNERS` | Who answers for the assets, as Dagster shows it: addresses or `team:<name>`, separated by commas. |
| `EVOLVE_DEBUG` | `1`: an error is shown with its traceback, for a report. |
"""


def reference(*, outside: bool = False, experiments: Iterable[Experiment] = ()) -> str:
    """The page.

    Args:
        outside: with the parts that installed distributions bring and that can be used.
        experiments: with the parts in files beside them that they name.
    """
    parts = [INTRODUCTION, _table(_rows(Experiment, "", outside=outside))]
    for name, field in Experiment.model_fields.items():
        if (chooser := chosen(field)) is not None:
            parts += _sections(chooser, f"{name}.", outside)
    policy = chosen(Models.model_fields["extractor"])
    assert policy is not None
    parts += _sections(policy, "", outside)
    beside = {found.identity: (choice, found) for one in experiments for choice, found in parts_beside(one)}
    for choice, found in beside.values():
        if isinstance(found.row, Part):
            parts += _section(CHOICES[choice].place, found.name, found.row.settings)
    parts += _sections(LAUNCHER, "runtime.launcher.*.", outside)
    for title, section, prefix in (
        ("`warmup`, for `evolve warmup`", WarmupSettings, "warmup."),
        ("A study file, for `evolve study`", StudySettings, ""),
        ("An arm of a study: an experiment file, or a mapping", ArmSettings, ""),
    ):
        parts.append(f"\n## {title}\n\n{HEAD}{_table(_rows(section, prefix))}")
    return "".join([*parts, VARIABLES])


def _sections(chooser: Chosen, prefix: str, outside: bool) -> Iterator[str]:
    """A table for every part that can be named."""
    for name in _of(chooser.choice, chooser.names, outside):
        settings = chooser.settings({chooser.key: name})
        assert settings is not None
        yield from _section(f"{prefix}{chooser.key}", name, settings)


def _section(place: str, name: str, settings: type[Section]) -> Iterator[str]:
    """The table of one part, which the key ``place`` names."""
    parents, _, key = place.rpartition(".")
    rows = _table(_rows(settings, f"{parents}." if parents else "", skip=key))
    yield f"\n## `{place}: {name}`\n\n{_line(settings.__doc__)}\n"
    yield f"\n{HEAD}{rows}" if rows else ""


def _table(rows: Iterator[tuple[str, str, str, str]]) -> str:
    return "".join(f"| `{key}` | {kind} | {default} | {meaning} |\n" for key, kind, default, meaning in rows)


def _of(choice: str, names: Iterable[str], outside: bool) -> list[str]:
    return [name for name in names if outside or name in CHOICES[choice].rows]


def _rows(section: type[Section], prefix: str, skip: str = "", outside: bool = False) -> Iterator[tuple[str, str, str, str]]:
    for name, field in section.model_fields.items():
        key, inner, says = f"{prefix}{name}", field.annotation, _line(field.description)
        if name == skip:
            continue
        if prefix == "models.":
            default = "none" if field.default is None else _text(getattr(field.default, "path", field.default))
            yield key, "`policy` or a model" if field.default == "policy" else "a model", default, says
        elif (chooser := chosen(field)) is not None:
            yield (
                f"{key}.{chooser.key}",
                _names(_of(chooser.choice, chooser.names, outside)),
                _text(chooser.default),
                " ".join((chooser.base.__doc__ or "").split()),
            )
        elif (named := known(field)) is not None:
            yield key, _names(_of(named.choice, usable(named.choice), outside)), _text(field.default), says
        elif WarmupSettings in get_args(inner):  # has a table of its own
            yield key, "section or nothing", "none", says
        elif isinstance(inner, type) and issubclass(inner, Section):
            yield from _rows(inner, f"{key}.", outside=outside)
        else:
            default = "required" if field.is_required() else "none" if field.default_factory else _text(field.default)
            yield key, _type(inner) + _bounds(field.metadata), default, says


def _line(text: str | None) -> str:
    return " ".join((text or "").split())


def _names(names: Iterable[str]) -> str:
    return " \\| ".join(f"`{name}`" for name in names)


def _type(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return _names(get_args(annotation))
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
    parser = argparse.ArgumentParser(
        prog="python -m evolve_dag.config.reference", description="Writes the reference of the configuration."
    )
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        help="with the parts of installed distributions; without it docs/configuration.md, without them",
    )
    parser.add_argument("experiments", nargs="*", type=Path, help="experiment files whose parts beside them are added")
    asked = parser.parse_args()
    try:
        page = reference(outside=asked.file is not None, experiments=map(load_experiment, asked.experiments))
    except EvolveError as error:
        parser.exit(2, f"error: {error}\n")
    (asked.file or Path("docs/configuration.md")).write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
