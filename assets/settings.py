"""The config slice of every step, as an asset of its own.

A step asset depends on the slice that it reads. So an edit of an experiment file makes unsynced exactly the steps
that read the changed keys: ``config_watch`` reports the slice's new data version, and Dagster compares.
"""

import os

import dagster as dg
from evolve_dag.assets.partitions import experiments
from evolve_dag.assets.resources import SessionParam, StoreResource, failures

from evolve_dag.config.schema import Experiment
from evolve_dag.steps.base import SPECS, STEPS, settings_digest
from evolve_dag.steps.slices import slice_of


def _owners(named: str) -> tuple[str, ...]:
    return tuple(one.strip() for one in named.split(",") if one.strip()) or ("team:evolve-dag",)


OWNERS = _owners(os.environ.get("EVOLVE_OWNERS", ""))
"""Who answers for the assets, as Dagster shows it: `EVOLVE_OWNERS`, addresses or `team:<name>`, separated by commas."""
GROUP = "config"
CONFIGURED_STEPS = tuple(spec.name for spec in STEPS if spec.config)
"""Steps that read settings, in the order of the loop."""


def settings_key(step: str) -> dg.AssetKey:
    """Key of the asset that holds a step's config slice."""
    return dg.AssetKey([GROUP, step])


def settings_metadata(step: str, experiment: Experiment) -> dict[str, dg.MetadataValue]:
    """What the slice says, for people."""
    return {
        "settings": dg.MetadataValue.json(experiment.slice(*slice_of(SPECS[step], experiment).keys)),
        "experiment": dg.MetadataValue.text(experiment.experiment),
    }


def _settings_asset(step: str) -> dg.AssetsDefinition:
    @dg.asset(
        key=settings_key(step),
        group_name=GROUP,
        partitions_def=experiments,
        kinds={"yaml"},
        owners=list(OWNERS),
        description=f"Keys of the experiment file that `{step}` reads: {', '.join(f'`{key}`' for key in SPECS[step].config)}.",
    )
    def settings(context: dg.AssetExecutionContext, store: StoreResource, session: SessionParam) -> dg.MaterializeResult:
        with failures():
            experiment = session.experiment(store.path, context.partition_key)
            return dg.MaterializeResult(
                data_version=dg.DataVersion(settings_digest(step, experiment, store.open())),
                metadata=settings_metadata(step, experiment),
            )

    return settings


settings_assets = [_settings_asset(step) for step in CONFIGURED_STEPS]
