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
from evolve_dag.assets import checks, handover, partitions, preview, recovery
from evolve_dag.assets.resources import Session, SessionParam, StoreResource, failures
from evolve_dag.assets.settings import CONFIGURED_STEPS, OWNERS, settings_key

from evolve_dag.errors import OrderError
from evolve_dag.steps import base
from evolve_dag.steps.preflight import preflight
from evolve_dag.steps.spec import StepSpec
from evolve_dag.store.artifacts import Store
from evolve_dag.tracking import mlflow_sync

GROUP = "loop"


def _asset(spec: StepSpec) -> dg.AssetsDefinition:
    """The asset of one step; its body only hands over."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", BetaWarning)  # the mapping is "beta"; tests pin what we rely on
        mapping = dg.MultiToSingleDimensionPartitionMapping(partition_dimension_name=partitions.EXPERIMENT)
    deps: list[Any] = [dg.AssetDep(name) for name in spec.inputs]
    if spec.name in CONFIGURED_STEPS:
        deps.append(dg.AssetDep(settings_key(spec.name), partition_mapping=mapping))

    @dg.asset(
        name=spec.name,
        description=spec.description,
        deps=deps,
        partitions_def=partitions.loop,
        group_name=GROUP,
        kinds=set(spec.kinds),
        owners=list(OWNERS),
        code_version=spec.version,
        check_specs=checks.specs(spec),
        tags={"evolve/step": str(base.STEP_ORDER.index(spec.name) + 1)},
    )
    def step(context: dg.AssetExecutionContext, store: StoreResource, session: SessionParam) -> dg.MaterializeResult:
        return _materialize(context, store, session, spec.name)

    return step


loop_assets = [_asset(spec) for spec in base.STEPS]


def _materialize(context: dg.AssetExecutionContext, store: StoreResource, session: Session, step: str) -> dg.MaterializeResult:
    with failures():
        name, iteration = partitions.split(context.partition_key)
        opened = store.open()
        recovery.hold(opened.root, context.run.run_id)
        experiment = session.experiment(opened.root, name)
        with session.lock(opened, name):
            with session.step(step, iteration) as progress:
                if step == "policy":
                    preflight(experiment, iteration, opened)
                    handover.check(experiment)
                make, facts = handover.maker(context, experiment, step), {"dagster_run_id": context.run_id}
                try:
                    outcome = base.run_step(step, experiment, iteration, opened, progress, facts, make)
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
    partitions.add_iteration(context.instance, policy.iteration)
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
