"""The loop as assets: policy -> trajectories -> experience -> contexts -> adapter -> scores -> promotion.

The bodies only hand over to :mod:`evolve_dag.steps`. The loop closes outside Dagster's graph, which refuses cycles of
every kind: ``promotion[k]`` commits ``policy[k+1]`` and logs its materialization, and ``policy[k]`` declares no
dependency on ``promotion[k-1]`` but refuses to be made without it (docs/adr/0002-partitions.md).
"""

import warnings
from typing import Any

import dagster as dg
from dagster._core.definitions.data_version import (
    CODE_VERSION_TAG,
    DATA_VERSION_IS_USER_PROVIDED_TAG,
    DATA_VERSION_TAG,
    get_input_data_version_tag,
    get_input_event_pointer_tag,
)
from dagster_shared.utils.warnings import BetaWarning
from evolve_dag.assets import checks, partitions, preview, recovery
from evolve_dag.assets.resources import Session, SessionParam, StoreResource, failures
from evolve_dag.assets.settings import CONFIGURED_STEPS, OWNERS, settings_key

from evolve_dag.errors import OrderError
from evolve_dag.steps import base
from evolve_dag.store.artifacts import Store
from evolve_dag.tracking import mlflow_sync

GROUP = "loop"

KINDS: dict[str, set[str]] = {
    "policy": {"json"},
    "trajectories": {"parquet", "polars"},
    "experience": {"parquet", "polars"},
    "contexts": {"parquet", "polars"},
    "adapter": {"pytorch", "huggingface"},
    "scores": {"parquet", "polars"},
    "promotion": {"json"},
}


def _options(step: str) -> dict[str, Any]:
    """Everything about a step's asset that is not its text."""
    deps: list[Any] = [dg.AssetDep(name) for name in base.SPECS[step].inputs]
    if step in CONFIGURED_STEPS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", BetaWarning)  # the mapping is "beta"; tests pin what we rely on
            mapping = dg.MultiToSingleDimensionPartitionMapping(partition_dimension_name=partitions.EXPERIMENT)
        deps.append(dg.AssetDep(settings_key(step), partition_mapping=mapping))
    return {
        "deps": deps,
        "partitions_def": partitions.loop,
        "group_name": GROUP,
        "kinds": KINDS[step],
        "owners": list(OWNERS),
        "code_version": base.code_version(step),
        "check_specs": checks.specs(step),
        "tags": {"evolve/step": str(base.STEP_ORDER.index(step) + 1)},
    }


@dg.asset(**_options("policy"))
def policy(context: dg.AssetExecutionContext, store: StoreResource, session: SessionParam) -> dg.MaterializeResult:
    """What enters iteration k: base model, adapter(k-1) and experience pool(k-1); for k = 1 the bare base model."""
    return _materialize(context, store, session, "policy")


@dg.asset(**_options("trajectories"))
def trajectories(context: dg.AssetExecutionContext, store: StoreResource, session: SessionParam) -> dg.MaterializeResult:
    """A group of rollouts per training task, without experience, verified; a reward may be null: not judged."""
    return _materialize(context, store, session, "trajectories")


@dg.asset(**_options("experience"))
def experience(context: dg.AssetExecutionContext, store: StoreResource, session: SessionParam) -> dg.MaterializeResult:
    """The experience pool E(k), every pool edit, and which trajectories taught what."""
    return _materialize(context, store, session, "experience")


@dg.asset(**_options("contexts"))
def contexts(context: dg.AssetExecutionContext, store: StoreResource, session: SessionParam) -> dg.MaterializeResult:
    """Step-aligned contexts: the student's clean view, the teacher's view with experience, the shared action tokens."""
    return _materialize(context, store, session, "contexts")


@dg.asset(**_options("adapter"))
def adapter(context: dg.AssetExecutionContext, store: StoreResource, session: SessionParam) -> dg.MaterializeResult:
    """LoRA weights that make the student without experience act like the teacher with it, and the training curve."""
    return _materialize(context, store, session, "adapter")


@dg.asset(**_options("scores"))
def scores(context: dg.AssetExecutionContext, store: StoreResource, session: SessionParam) -> dg.MaterializeResult:
    """Held-out results of the candidate, without experience (internalized) and with it (in context), with intervals."""
    return _materialize(context, store, session, "scores")


@dg.asset(**_options("promotion"))
def promotion(context: dg.AssetExecutionContext, store: StoreResource, session: SessionParam) -> dg.MaterializeResult:
    """The gate's decision with its reasons: `promote`, `keep` (the champion stays) or `restore` (the best champion so far comes
    back). Commits the policy of the next iteration."""
    return _materialize(context, store, session, "promotion")


loop_assets = [policy, trajectories, experience, contexts, adapter, scores, promotion]


def _materialize(context: dg.AssetExecutionContext, store: StoreResource, session: Session, step: str) -> dg.MaterializeResult:
    name, iteration = partitions.split(context.partition_key)
    with failures():
        opened = store.open()
        recovery.hold(opened.root, context.run.run_id)
        experiment = session.experiment(opened.root, name)
        with session.lock(opened, name):
            with session.step(step, iteration) as progress:
                try:
                    outcome = base.run_step(step, experiment, iteration, opened, progress, {"dagster_run_id": context.run_id})
                except OrderError:
                    recovery.ask_for_another_turn(context)
                    raise
            if step == "promotion":
                _announce_policy(context, base.resolve("policy", experiment, iteration + 1, opened), opened)
        if step in ("policy", "promotion"):  # first for a place in MLflow that links can name, then for the results
            mlflow_sync.start_background_sync(opened.root, name)
        session.finished(step, iteration, outcome)
        return dg.MaterializeResult(
            data_version=dg.DataVersion(outcome.artifact.digest),
            metadata=preview.metadata(outcome.artifact, opened, name, iteration) | {"recomputed": outcome.recomputed},
            check_results=checks.evaluate(step, outcome.artifact, experiment),
        )


def _announce_policy(context: dg.AssetExecutionContext, policy: base.Resolved, store: Store) -> None:
    """Log that policy[k+1], which the promotion has committed, is made; within this run, so that it keeps the run's id.

    An external asset, reported from outside, would not make its dependents unsynced. The tags are those that Dagster
    sets when the asset's own body runs: without them it would compare times instead of data versions.
    """
    name, _ = partitions.split(context.partition_key)
    context.instance.add_dynamic_partitions(partitions.ITERATION, [partitions.iteration_key(policy.iteration)])
    tags = {
        DATA_VERSION_TAG: str(policy.digest),
        DATA_VERSION_IS_USER_PROVIDED_TAG: "true",
        CODE_VERSION_TAG: base.code_version("policy"),
    }
    settings = settings_key("policy")
    record = context.instance.get_latest_data_version_record(settings, is_source=False, partition_key=name)
    if record is not None:
        tags[get_input_data_version_tag(settings)] = (record.event_log_entry.tags or {}).get(DATA_VERSION_TAG, "")
        tags[get_input_event_pointer_tag(settings)] = str(record.storage_id)
    partition = partitions.loop_key(name, policy.iteration)
    metadata = preview.metadata(store.open("policy", str(policy.digest)), store, name, policy.iteration)
    context.log_event(dg.AssetMaterialization("policy", partition=partition, tags=tags, metadata=metadata))
