"""An experiment file and what it extends, read, merged and checked; all mistakes in one message."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evolve_dag.config.outside import beside
from evolve_dag.config.parts import CHOICES, UNUSABLE, Chosen, chosen
from evolve_dag.config.schema import (
    OF_LAUNCHERS,
    SHIPPED,
    Experiment,
    Launchers,
    PolicySettings,
    WarmupSettings,
    contradictions,
    for_all_steps,
)
from evolve_dag.config.section import PATH, PROGRAM, S, Section, marked
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
    merged, origin = _merged(path, over, stated_in or path, mistakes)
    if "arms" in merged:
        raise ConfigError(f"{path}: is a study, not an experiment", f"run it as one: evolve study {path}")
    merged.setdefault("experiment", path.stem)
    try:
        experiment = Experiment.model_validate(merged)
    except ValidationError as error:
        return None, mistakes + [_describe(item, merged, origin, path) for item in error.errors()]
    experiment = _absolute(experiment, "", lambda key: _origin(origin, key, path), mistakes)
    mistakes += [f"{_origin(origin, key, path)}: {key}: {what}" for key, what in contradictions(experiment)]
    return (None if mistakes else experiment), mistakes


def check_iterations(experiment: Experiment, count: int) -> None:
    """Look again at an experiment that is to go on for more iterations than its file says: what is right for a few nights may
    not be for many (a stream of training tasks that comes to those of another split).

    Raises:
        ConfigError: lists what does not hold for so many.
    """
    if count <= experiment.iterations:
        return
    wrong = [f"{key}: {what}" for key, what in contradictions(experiment.model_copy(update={"iterations": count}))]
    if wrong:
        told = (
            f"{experiment.experiment}: with {count} iterations, where its file says {experiment.iterations}: {numbered(wrong)}"
        )
        raise ConfigError(told, "mend the keys above, or ask for fewer iterations")


def stated_keys(path: Path, over: Mapping[str, Any], stated_in: Path) -> dict[str, Path]:
    """Dotted key -> the file whose word on it counts (absolute), of every key that an experiment file, what it extends or the
    mapping laid over it states. What follows from other keys (those of a preset) and defaults are not in it.

    Args:
        over: as of :func:`read_experiment`, one of them.
        stated_in: the file that states it.

    Raises:
        ConfigError: a file is missing or cannot be read at all.
    """
    return {key: file.resolve() for key, file in _merged(path, [over], stated_in, [])[1].items()}


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


def _merged(
    path: Path, over: Sequence[Mapping[str, Any]], stated_in: Path, mistakes: list[str]
) -> tuple[dict[str, Any], dict[str, Path]]:
    """What a file says with the mappings laid over it, and where each key comes from; adds to ``mistakes``."""
    merged, origin = _merge_chain(path, (), mistakes)
    for part in over:
        _overlay(merged, _located(_spelled_out(deepcopy(dict(part))), stated_in), "", stated_in, origin)
    return merged, origin


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
    if parent is None:
        base: dict[str, Any] = {}
        origin: dict[str, Path] = {}
    else:
        if not isinstance(parent, str):
            raise ConfigError(f"{path}: extends: must be the name of one file", "write e.g. `extends: pocket.yaml`")
        base, origin = _merge_chain(path.parent / parent, (*seen, resolved), mistakes)
        if "experiment" not in content:
            base.pop("experiment", None)
    _overlay(base, _located(_spelled_out(content), path), "", path, origin)
    return base, origin


def _spelled_out(content: dict[str, Any]) -> dict[str, Any]:
    """``content`` with a launcher that is said by its name alone, for all steps or for one, as the mapping that this is short
    for; changed. Only so can it lie beside the file, and another file's keys be laid over it."""
    for runtime in _below(content, ["runtime"]):
        if isinstance(runtime.get("launcher"), str):
            runtime["launcher"] = {"kind": runtime["launcher"]}
        for launcher in _below(runtime, ["launcher"]):
            for step in Launchers.model_fields.keys() & launcher.keys():
                if isinstance(launcher[step], str):
                    launcher[step] = {"kind": launcher[step]}
    return content


def _located(content: dict[str, Any], path: Path) -> dict[str, Any]:
    """``content`` with the parts that lie in a file beside ``path`` named by their place; changed."""
    for choice in CHOICES.values():
        for place in choice.places:
            *parents, last = place.split(".")
            for holder in _below(content, parents):
                if last in holder:
                    holder[last] = beside(holder[last], path)
    return content


def _below(content: Any, parents: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The mappings under dotted names, ``*`` being any."""
    if not isinstance(content, dict):
        return
    if not parents:
        yield content
        return
    for name in content if parents[0] == "*" else [parents[0]]:
        yield from _below(content.get(name), parents[1:])


def _absolute(section: S, prefix: str, base: Callable[[str], Path], mistakes: list[str]) -> S:
    """The section with its paths resolved against the file that states each (``base``); adds to ``mistakes``."""
    changes: dict[str, Any] = {}
    for name, field in type(section).model_fields.items():
        key, value = f"{prefix}{name}", getattr(section, name)
        if isinstance(value, Section):
            changes[name] = _absolute(value, f"{key}.", base, mistakes)
        elif (marked(field, PATH) and value and not _ships(section, value)) or (marked(field, PROGRAM) and "/" in value):
            place = base(key).parent / value
            try:
                changes[name] = str(place.resolve() if marked(field, PATH) else place.parent.resolve() / place.name)
            except (OSError, RuntimeError, ValueError) as error:  # links in a circle, a zero byte
                mistakes.append(f"{base(key)}: {key}: no file can be there: {error}")
    return section.model_copy(update=changes)


def _ships(section: Section, value: str) -> bool:
    """Whether a path is the name of a policy that ships: of a model only, any other path may be called so."""
    return value in SHIPPED and isinstance(section, (PolicySettings, WarmupSettings))


def _overlay(base: dict[str, Any], over: Mapping[str, Any], prefix: str, path: Path, origin: dict[str, Path]) -> None:
    for key, value in over.items():
        dotted = f"{prefix}{key}"
        origin[dotted] = path
        current = base.get(key)
        if key == "regime":  # a preset in a parent and a part in the child must combine
            current, value = _as_regime(current), _as_regime(value)
            if isinstance(value, dict) and "preset" in value:
                current = None
        if isinstance(value, dict) and isinstance(current, dict):
            merged = _inherited(dotted, current, value)
            _forget(origin, [f"{dotted}.{gone}" for gone in current.keys() - merged.keys()])
            _overlay(merged, value, f"{dotted}.", path, origin)
            base[key] = merged
        else:
            base[key] = value
            _forget(origin, [inner for inner in origin if inner.startswith(f"{dotted}.")])
            origin.update(dict.fromkeys(_keys(value, dotted), path))


def _forget(origin: dict[str, Path], gone: Sequence[str]) -> None:
    """Take out keys that no longer stand where they did, with all below them."""
    for key in [key for key in origin if any(key == one or key.startswith(f"{one}.") for one in gone)]:
        del origin[key]


def _inherited(dotted: str, current: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """What a section keeps of the one it is laid over: where it names another part, only the keys that this part has too.

    An environment that names its kind starts anew, whatever stood there; a launcher for all steps is one for all.
    """
    for_all = dotted == OF_LAUNCHERS
    chooser = _chooser(f"{OF_LAUNCHERS}.adapter" if for_all else dotted)
    if chooser is None or chooser.key not in value:
        return dict(current)
    if dotted == "environment":
        return {}
    settings = chooser.settings(value)
    if settings is None or (chooser.name(value) == chooser.name(current) and not for_all):
        return dict(current)
    return {key: inner for key, inner in current.items() if key in settings.model_fields}


def _chooser(dotted: str) -> Chosen | None:
    """What decides the class of the section at a dotted key; None where it is the same for all."""
    holder: Any = Experiment
    *parents, last = dotted.split(".")
    for name in parents:
        field = holder.model_fields.get(name)
        holder = field.annotation if field is not None else None
        if not (isinstance(holder, type) and issubclass(holder, Section)):
            return None
    field = holder.model_fields.get(last)
    return chosen(field) if field is not None else None


def _as_regime(value: Any) -> Any:
    return {"preset": value} if isinstance(value, str) else value


def _keys(value: Any, prefix: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield f"{prefix}.{key}"
            yield from _keys(inner, f"{prefix}.{key}")


def _origin(origin: Mapping[str, Path], key: str, default: Path) -> Path:
    """The file that states a key or, if none does, the section that it is in."""
    if key not in origin and for_all_steps(key) in origin:
        key = for_all_steps(key)
    while key:
        if key in origin:
            return origin[key]
        key = key.rpartition(".")[0]
    return default


def _describe(error: Any, merged: Mapping[str, Any], origin: Mapping[str, Path], path: Path) -> str:
    location = [str(part) for part in error["loc"]]
    return f"{_origin(origin, '.'.join(location), path)}: {described(error, Experiment, merged)}"


def described(error: Any, model: type[Section], content: Mapping[str, Any]) -> str:
    """One mistake that pydantic found in ``content``, as ``key: what is wrong``."""
    location = [str(part) for part in error["loc"]]
    key = ".".join(location)
    if error["type"] == "extra_forbidden":
        what = f"unknown key{_did_you_mean(location, model, content)}"
    elif error["type"] == "missing":
        what = "missing"
    else:
        # Where the name of an environment variable belongs, a mistake may be the secret itself.
        told = error["type"] == UNUSABLE
        hidden = told or isinstance(error["input"], (dict, list)) or location[-1] in ("key", "webhook")
        shown = "" if hidden else f", not {error['input']!r}"
        what = re.sub(r"^(Input|Value error,) ?", "", error["msg"]) + shown
        what = what.replace("a valid tuple", "a list").replace("a valid dictionary", "a mapping")  # YAML's words
    return f"{key or 'file'}: {what}"


def _did_you_mean(location: list[str], model: type[Section], whole: Mapping[str, Any]) -> str:
    """What an unknown key may be: one of another part, or one that reads alike."""
    import difflib

    *parents, last = location
    section: Any = model
    content: Any = whole
    for depth, name in enumerate(parents, 1):
        content = content.get(name) if isinstance(content, dict) else None
        field = section.model_fields.get(name) if isinstance(section, type) and issubclass(section, Section) else None
        chooser = chosen(field) if field is not None else None
        if chooser is not None and isinstance(content, dict):
            section, mine = chooser.settings(content), chooser.name(content)
            others = [other for other in chooser.names if last in chooser.fields(other)]
            if others and depth == len(parents):
                return f": it belongs to `{chooser.key}: {' or '.join(others)}`, and this is `{chooser.key}: {mine}`"
        else:
            section = field.annotation if field is not None else None
    if not (isinstance(section, type) and issubclass(section, Section)):
        return ""
    close = difflib.get_close_matches(last, list(section.model_fields), n=1)
    return f" (did you mean {close[0]!r}?)" if close else f"; known here: {', '.join(section.model_fields)}"
