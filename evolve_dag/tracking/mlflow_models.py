"""Adapters in MLflow's model registry: a version each, the alias ``champion`` on the promoted one."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve_dag.inference.folders import folder_digest, shipped
from evolve_dag.store.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS, TRAJECTORIES
from evolve_dag.tracking.mlflow_facts import IterationFacts, version
from evolve_dag.tracking.mlflow_policy import DEFAULTS, write_policy

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from evolve_dag.config.schema import Experiment

ALIAS = "champion"
FOLDER = "policy"
"""Artifact folder of a run that holds the model."""
_DIGEST = "evolve.digest.adapter"
_ADAPTER_FILES = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)


def register(client: MlflowClient, run_id: str, facts: IterationFacts, experiment: Experiment | None) -> bool:
    """Make the iteration's adapter a version of the model that is named like its lineage; False: it was there.

    Raises:
        Exception: whatever MLflow raises.
    """
    adapter = facts.artifacts["adapter"]
    if find(client, facts) is not None:
        return False
    _ensure_model(client, facts.experiment)
    adapter.verify()
    with tempfile.TemporaryDirectory() as scratch:
        data, model = Path(scratch, "data"), Path(scratch, FOLDER)
        about = description(facts, experiment)
        write_policy(data, adapter.path, _ADAPTER_FILES, about)
        _save(model, data, {**DEFAULTS, "max_tokens": about["max_tokens"]})
        client.log_artifacts(run_id, str(model), FOLDER)
    client.create_model_version(
        facts.experiment,
        source=f"runs:/{run_id}/{FOLDER}",
        run_id=run_id,
        tags=lineage_tags(facts),
        description=f"Adapter of iteration {facts.iteration} of {facts.experiment}: "
        + ("promoted." if facts.promoted else "declined by the gate."),
    )
    return True


def find(client: MlflowClient, facts: IterationFacts) -> str | None:
    """Number of the version that holds the iteration's adapter, or None."""
    digest = facts.artifacts["adapter"].digest
    filter_string = f"name = '{facts.experiment}' and tag.`{_DIGEST}` = '{digest}'"
    versions = client.search_model_versions(filter_string)
    mine = [v.version for v in versions if v.tags.get("evolve.lineage") == facts.lineage]
    return min(mine, key=int) if mine else None


def lineage_tags(facts: IterationFacts) -> dict[str, str]:
    """Where a version comes from."""
    policy = facts.artifacts["policy"].summary
    success = facts.row.without.success if facts.row.without else None
    return {
        _DIGEST: facts.artifacts["adapter"].digest,
        "evolve.decision": "promoted" if facts.promoted else "declined",
        "evolve.experiment": facts.experiment,
        "evolve.lineage": facts.lineage,
        "evolve.iteration": str(facts.iteration),
        "evolve.partition": facts.partition,
        "evolve.base": str(policy.get("base") or ""),
        "evolve.parent.adapter": str(policy.get("adapter") or "none"),
        "evolve.parent.experience": str(policy.get("experience") or "none"),
        "evolve.digest.experience": facts.artifacts["experience"].digest,
        "evolve.digest.promotion": facts.promotion,
        "evolve.version": version(),
        **({"evolve.success_without": f"{success:.4f}"} if success is not None else {}),
    }


def point_champion(
    client: MlflowClient, name: str, champion: IterationFacts | None, ours: Callable[[Mapping[str, str]], bool]
) -> str | None:
    """Set the alias on the champion's version, or take it away where the base policy holds.

    Args:
        ours: tells by its tags whether a version is of the store that is sent. Another store may have an experiment of this
            name and send it to the same server; where its version has the alias, that stays.

    Returns:
        Number of the other store's version that has the alias, None where the alias is as it should be. Where a person has
        deleted the champion's version, it stays as it is.

    Raises:
        Exception: whatever MLflow raises.
    """
    wanted = find(client, champion) if champion is not None else None
    model = next(iter(client.search_registered_models(f"name = '{name}'")), None)  # none: a person has deleted it
    present = dict(model.aliases).get(ALIAS) if model is not None else None
    if str(present) == str(wanted) or (champion is not None and wanted is None):
        return None
    if present is not None and not ours(client.get_model_version(name, present).tags):
        return str(present)
    if wanted is None:
        client.delete_registered_model_alias(name, ALIAS)
    else:
        client.set_registered_model_alias(name, ALIAS, wanted)
    return None


def description(facts: IterationFacts, experiment: Experiment | None) -> dict[str, Any]:
    """``policy.json`` of the model."""
    base = str(facts.artifacts["policy"].summary["base"])
    own = (name for name, folder in shipped().items() if folder_digest(folder).startswith(base.split(":")[1]))
    path = next(own, experiment.models.policy.path if experiment is not None else "")
    trajectories = facts.artifacts["trajectories"].frame(TRAJECTORIES)
    rollout = facts.artifacts["trajectories"].manifest.config.get("rollout") or {}
    return {
        "base": base,
        "path": path,
        "dtype": base.split(":")[2],
        "quantize": (*base.split(":"), "none")[3],
        "system": trajectories["system"][0] if trajectories.height else "",
        "max_tokens": rollout.get("max_action_tokens", DEFAULTS["max_tokens"]),
        "adapter": facts.artifacts["adapter"].digest,
        "partition": facts.partition,
    }


def _ensure_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(
            name, tags={"evolve.experiment": name}, description=f"Adapters of {name}; @{ALIAS} is the promoted one."
        )
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _save(model: Path, data: Path, defaults: Mapping[str, Any]) -> None:
    import mlflow.pyfunc
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec

    specs = [ParamSpec(name, "double" if isinstance(value, float) else "long", value) for name, value in defaults.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it asks for an example, which it would run
        mlflow.pyfunc.save_model(
            str(model),
            loader_module="evolve_dag.tracking.mlflow_policy",
            data_path=str(data),
            pip_requirements=[f"evolve-dag=={version()}"],  # given, so that MLflow does not load the model to guess them
            signature=ModelSignature(params=ParamSchema(specs)),
        )
