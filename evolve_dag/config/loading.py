"""An experiment file and what it extends, read, merged and checked; all mistakes in one message."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ValidationError

from evolve_dag.config.schema import Experiment, contradictions
from evolve_dag.config.yamlfile import read_mapping
from evolve_dag.errors import ConfigError


def load_experiment(path: str | Path) -> Experiment:
    """Read, merge (``extends``) and check an experiment file.

    Paths inside the file are made absolute against the file that states them.

    Raises:
        ConfigError: lists every mistake with its file and key.
    """
    experiment, mistakes = read_experiment(path)
    if experiment is None:
        raise ConfigError(f"{path}: {numbered(mistakes)}", "mend the keys above; docs/configuration.md lists every key")
    return experiment


def read_experiment(
    path: str | Path, over: Sequence[Mapping[str, Any]] = (), stated_in: Path | None = None
) -> tuple[Experiment | None, list[str]]:
    """The experiment of a file with further keys laid over it; None where something is wrong, and every mistake.

    Args:
        over: mappings as in an experiment file, laid over it one after the other; not changed.
        stated_in: the file that states them: named in mistakes, and what their paths are relative to.

    Raises:
        ConfigError: a file is missing or cannot be read at all.
    """
    path = Path(path)
    mistakes: list[str] = []
    merged, origin = _merge_chain(path, (), mistakes)
    if "arms" in merged:
        raise ConfigError(f"{path}: is a study, not an experiment", f"run it as one: evolve study {path}")
    merged.setdefault("experiment", path.stem)
    for part in over:
        own, where = deepcopy(dict(part)), stated_in or path
        mistakes += _absolute_paths(own, where)
        _overlay(merged, own, "", where, origin)
    try:
        experiment = Experiment.model_validate(merged)
    except ValidationError as error:
        return None, mistakes + [_describe(item, merged, origin, path) for item in error.errors()]
    mistakes += [f"{_origin(origin, key, path)}: {key}: {what}" for key, what in contradictions(experiment)]
    return (None if mistakes else experiment), mistakes


def is_study(path: Path) -> bool:
    """Whether a file describes a study (``evolve study``), which stands beside the experiments that it is made of."""
    try:
        return "arms" in read_mapping(path)[0]
    except ConfigError:
        return False


def numbered(mistakes: Sequence[str]) -> str:
    """``2 mistakes`` and a line for each."""
    lines = "".join(f"\n  {n}. {m}" for n, m in enumerate(mistakes, 1))
    return f"{len(mistakes)} mistake{'s' if len(mistakes) > 1 else ''}{lines}"


_PATH_KEYS = (
    "start_pool",
    "environment.pages",
    "environment.files",
    *(f"tasks.{split}.path" for split in ("train", "development", "held_out")),
    *(f"models.{role}.path" for role in ("policy", "extractor", "selector", "judge", "embedding")),
)


def _merge_chain(path: Path, seen: tuple[Path, ...], mistakes: list[str]) -> tuple[dict[str, Any], dict[str, Path]]:
    """Content of ``path`` laid over what it extends, and the file that each dotted key came from; adds to ``mistakes``."""
    try:
        resolved = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a zero byte
        raise ConfigError(f"{str(path)!r}: no file can be there: {error}", "mend the name") from None
    if resolved in seen:
        raise ConfigError(
            f"{path}: extends itself through {' -> '.join(p.name for p in (*seen, resolved))}", "break the circle"
        )
    content, wrong_here = read_mapping(path)
    mistakes += [f"{path}: {wrong}" for wrong in wrong_here]
    parent = content.pop("extends", None)
    mistakes += _absolute_paths(content, path)
    if parent is None:
        base: dict[str, Any] = {}
        origin: dict[str, Path] = {}
    else:
        if not isinstance(parent, str):
            raise ConfigError(f"{path}: extends: must be the name of one file", "write e.g. `extends: pocket.yaml`")
        base, origin = _merge_chain(path.parent / parent, (*seen, resolved), mistakes)
        if "experiment" not in content:
            base.pop("experiment", None)
    _overlay(base, content, "", path, origin)
    return base, origin


def _absolute_paths(content: dict[str, Any], path: Path) -> list[str]:
    """Resolve every path in ``content`` against the file that states it; returns what is wrong with them."""
    found = ((dotted, _make_absolute(content, dotted, path)) for dotted in _PATH_KEYS)
    return [f"{path}: {dotted}: {wrong}" for dotted, wrong in found if wrong]


def _make_absolute(content: dict[str, Any], dotted: str, path: Path) -> str | None:
    """Resolve one path against the file that states it; returns what is wrong with it."""
    *parents, last = dotted.split(".")
    node: Any = content
    for part in parents:
        node = node.get(part) if isinstance(node, dict) else None
    if isinstance(node, dict) and isinstance(node.get(last), str) and node[last] not in ("", "pocket"):
        try:
            node[last] = str((path.parent / node[last]).resolve())
        except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a zero byte
            return f"no file can be there: {error}"
    return None


def _overlay(base: dict[str, Any], over: Mapping[str, Any], prefix: str, path: Path, origin: dict[str, Path]) -> None:
    for key, value in over.items():
        dotted = f"{prefix}{key}"
        origin[dotted] = path
        current = base.get(key)
        if key == "regime":  # a preset in a parent and a part in the child must combine
            current, value = _as_regime(current), _as_regime(value)
            if isinstance(value, dict) and "preset" in value:
                current = None
        replaces_kind = key == "environment" and isinstance(value, dict) and "kind" in value
        if isinstance(value, dict) and isinstance(current, dict) and not replaces_kind:
            merged = dict(current)
            _overlay(merged, value, f"{dotted}.", path, origin)
            base[key] = merged
        else:
            base[key] = value
            for inner in _keys(value, dotted):
                origin[inner] = path


def _as_regime(value: Any) -> Any:
    return {"preset": value} if isinstance(value, str) else value


def _keys(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{prefix}.{key}"
            yield from _keys(inner, f"{prefix}.{key}")


def _origin(origin: Mapping[str, Path], key: str, default: Path) -> Path:
    while key:
        if key in origin:
            return origin[key]
        key = key.rpartition(".")[0]
    return default


def _describe(error: Any, merged: Mapping[str, Any], origin: Mapping[str, Path], path: Path) -> str:
    location = [str(part) for part in error["loc"]]
    for depth, tag in ((1, "kind"), (2, "backend")):  # pydantic names a union's branch; the reader's key has no such part
        node: Any = merged
        for part in location[:depth]:
            node = node.get(part) if isinstance(node, dict) else None
        branch = node if isinstance(node, str) else node.get(tag, "transformers") if isinstance(node, dict) else None
        if len(location) > depth and location[0] == ("environment", "models")[depth - 1] and location[depth] == branch:
            del location[depth]
    return f"{_origin(origin, '.'.join(location), path)}: {described({**error, 'loc': location}, Experiment)}"


def described(error: Any, model: type[BaseModel]) -> str:
    """One mistake that pydantic found, as ``key: what is wrong``."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        what = f"unknown key{_did_you_mean(location, model)}"
    elif error["type"] == "missing":
        what = "missing"
    else:
        # Where the name of an environment variable belongs, a mistake may be the secret itself.
        hidden = isinstance(error["input"], (dict, list)) or location[-1] in ("key", "webhook")
        shown = "" if hidden else f", not {error['input']!r}"
        what = re.sub(r"^(Input|Value error,) ?", "", error["msg"]) + shown
    return f"{key or 'file'}: {what}"


def _did_you_mean(location: list[str], model: type[BaseModel]) -> str:
    import difflib

    node: Any = model
    for part in location[:-1]:
        field = node.model_fields.get(part) if isinstance(node, type) and issubclass(node, BaseModel) else None
        node = field.annotation if field is not None else None
    if not (isinstance(node, type) and issubclass(node, BaseModel)):
        return ""
    close = difflib.get_close_matches(location[-1], list(node.model_fields), n=1)
    return f" (did you mean {close[0]!r}?)" if close else f"; known here: {', '.join(node.model_fields)}"
