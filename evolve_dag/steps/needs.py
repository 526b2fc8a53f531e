"""What an experiment needs and this machine has not: files, model folders, programs, keys. Nothing is opened, nobody asked."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from evolve_dag.config.parts import CHOICES, part_of
from evolve_dag.config.schema import SHIPPED, Experiment, OpenAIModelSettings, VllmModelSettings, for_all_steps
from evolve_dag.config.section import PATH, PROGRAM, Section, marked
from evolve_dag.errors import DataError, EvolveError
from evolve_dag.secrecy import read_key


def require_files(experiment: Experiment) -> None:
    """Whether all that decides a digest is there; what is not is told at once.

    Raises:
        DataError: lists the files and model folders that are missing, with their keys.
    """
    if missing := absent_files(experiment):
        raise DataError(
            f"{experiment.experiment}: needs what is not there\n  " + "\n  ".join(missing),
            "put it there, or correct the key; docs/benchmarks.md says where tasks come from, README.md (Real models) where "
            "models do; `evolve doctor` with the same file looks for keys and programs too",
        )


def absent_files(experiment: Experiment) -> list[str]:
    """``key: path: what is missing`` of the files and folders that the experiment reads. What `evolve warmup` makes, and makes
    it from, is its affair."""
    roles = {"policy", *(role for _, role in _asked(experiment))}
    found = []
    for key, value in _named(experiment, PATH):
        of_model = key.startswith("models.")
        if (of_model and key.split(".")[1] not in roles) or (
            experiment.warmup is not None and key in ("models.policy.path", "warmup.base")
        ):
            continue
        if of_model and value not in SHIPPED and not any(Path(value).glob("*.safetensors")):
            found.append(f"{key}: {value}: no model there (config.json, tokenizer.json, *.safetensors)")
        elif not of_model and not Path(value).exists():
            found.append(f"{key}: {value}: no such file or folder")
    return found


def absent_programs(experiment: Experiment) -> list[str]:
    """``key: name: no such program`` of those that the experiment starts."""
    policy = experiment.models.policy
    served = isinstance(policy, VllmModelSettings) and policy.servers  # no engine of our own is started
    named = [(key, name) for key, name in _named(experiment, PROGRAM) if not (served and key == "models.policy.python")]
    absent = [(key, name) for key, name in named if shutil.which(name) is None]
    times = Counter((for_all_steps(key), name) for key, name in absent)
    told = ((for_all_steps(key) if times[for_all_steps(key), name] > 1 else key, name) for key, name in absent)
    return [f"{key}: {name}: no such program" for key, name in dict.fromkeys(told)]


def unset_keys(experiment: Experiment) -> Mapping[str, list[str]]:
    """Environment variables for keys that are not set -> who may read them (``models.judge``, ``environment``)."""
    readers: dict[str, list[str]] = {}
    for section, role in _asked(experiment):
        model = experiment.models.settings(role) if role != "policy" else None
        if isinstance(model, OpenAIModelSettings):
            readers.setdefault(model.key, []).append(f"models.{role} ({section})")
    for choice, place in CHOICES.items():
        if place.section is not None:
            for name in part_of(choice, getattr(experiment, place.section)).variables:
                readers.setdefault(name, []).append(place.section)
    return {name: told for name, told in readers.items() if not _is_set(name)}


def _asked(experiment: Experiment) -> Iterator[tuple[str, Any]]:
    """(section, role) of every model that a part of the experiment asks."""
    for choice, place in CHOICES.items():
        if place.section is not None:
            settings = getattr(experiment, place.section)
            yield from ((place.section, role) for role in part_of(choice, settings).roles(settings))


def _named(section: Section, mark: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Dotted key and value of every key with a mark that is not empty."""
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, Section):
            yield from _named(value, mark, f"{prefix}{name}.")
        elif marked(field, mark) and value:
            yield f"{prefix}{name}", value


def _is_set(variable: str) -> bool:
    try:
        return bool(read_key(variable))
    except EvolveError:
        return True  # it holds something; what is wrong with it is told where it is used
