"""The folder of a warmed-up model: what decides it, and whether it is what the experiment file asks for.

Its identity in every digest is the hash of its weights, as of any model. ``warmup.json`` beside them says what made them, so a
folder that was made under other settings is not taken for the one that is asked for.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve_dag.config.parts import identity
from evolve_dag.errors import ConfigError, ModelError
from evolve_dag.inference.folders import base_identity, model_folder, shipped
from evolve_dag.store.artifacts import Store

if TYPE_CHECKING:
    from evolve_dag.config.schema import Experiment, PolicySettings, WarmupSettings

KIND = "warmup"
READ = tuple(
    f"rollout.{key}" for key in ("temperature", "top_p", "max_steps", "max_tokens", "max_action_tokens", "plain_answers")
)
"""What decides an episode. Neither the experiment's seed nor how it injects is among it: all arms and seeds share one model."""
VERSION = "1"
"""Raise it when the same settings would become another model."""
NOTE = "warmup.json"
"""It has seconds in it, and is in no hash of the model (:func:`evolve_dag.inference.folders.folder_digest`)."""


def section(experiment: Experiment) -> WarmupSettings:
    """The experiment's ``warmup``.

    Raises:
        ConfigError: it has none.
    """
    if experiment.warmup is None:
        raise ConfigError(f"{experiment.experiment}: there is no section `warmup`", "docs/configuration.md has its keys")
    return experiment.warmup


def start(experiment: Experiment) -> PolicySettings:
    """The model that a warm-up starts from: the policy's settings over ``warmup.base``.

    Never in 4 bit: what it makes are whole weights, with what was learned added in.
    """
    return experiment.models.policy.model_copy(update={"path": section(experiment).base, "quantize": "none"})


def config(experiment: Experiment) -> dict[str, Any]:
    """What decides the model, as JSON values.

    Raises:
        ModelError: the model to start from is missing.
    """
    values = experiment.slice("warmup", "environment", *READ)
    played = identity("environment", experiment.environment.kind, experiment.environment)
    return values | {
        "warmup": {**values["warmup"], "base": base_identity(start(experiment))},
        "environment": {**values["environment"], "kind": played},
    }


def digest(experiment: Experiment) -> str:
    """32 hex digits that stand for the model."""
    return Store.digest_of(KIND, VERSION, config(experiment), {})


def target(experiment: Experiment) -> Path:
    """Where the model lies, or would lie.

    Raises:
        ConfigError: the policy is one that ships, which is no folder to write to, or the model to start from.
    """
    path = experiment.models.policy.path
    if path in shipped() or Path(path) == Path(section(experiment).base):
        raise ConfigError(f"models.policy.path: {path}: a warm-up cannot write there", "name a folder of its own")
    return Path(path)


def outdated(experiment: Experiment) -> str | None:
    """Why ``evolve warmup`` has to run before the experiment; None where it need not."""
    folder = target(experiment)
    try:
        model_folder(experiment.models.policy)
    except ModelError:
        return f"{folder}: there is no warmed-up model yet"
    try:
        told = json.loads((folder / NOTE).read_text(encoding="utf-8"))["digest"]
    except (OSError, ValueError, KeyError, TypeError):
        return f"{folder}: holds a model, but no {NOTE} that says how it was made"
    try:
        model_folder(start(experiment))
    except ModelError:
        return None  # the model it was made from is gone: what was made of it stands
    return None if told == digest(experiment) else f"{folder}: was warmed up under other settings"


def absent_base(experiment: Experiment) -> str:
    """``warmup.base: path: what is missing`` where a warm-up has to run and there is nothing to start from; '' elsewhere."""
    if experiment.warmup is None or outdated(experiment) is None:
        return ""
    try:
        model_folder(start(experiment))
    except ModelError:
        return f"warmup.base: {experiment.warmup.base}: no model there (config.json, tokenizer.json, *.safetensors)"
    return ""


def require(experiment: Experiment) -> None:
    """Raises ModelError where the experiment's policy has to be warmed up first."""
    if experiment.warmup is not None and (why := outdated(experiment)) is not None:
        file = f"the file of {experiment.experiment}, or in a study with that of the arm"
        raise ModelError(why, f"run `evolve warmup FILE` first, with {file}")
