"""Partitions: {experiment x iteration}. Both are dynamic: see docs/adr/0002-partitions.md.

A loop asset's key reads ``pocket|02`` (Dagster sorts the two dimensions by name).
"""

import dagster as dg

from evolve_dag.errors import ConfigError

EXPERIMENT = "experiment"
ITERATION = "iteration"

EXPERIMENT_TAG = f"dagster/partition/{EXPERIMENT}"
"""Run tag that Dagster sets by itself; ``dagster.yaml`` limits concurrency on it."""
ITERATION_TAG = f"dagster/partition/{ITERATION}"
"""Run tag that Dagster sets by itself."""

experiments = dg.DynamicPartitionsDefinition(name=EXPERIMENT)
iterations = dg.DynamicPartitionsDefinition(name=ITERATION)
loop = dg.MultiPartitionsDefinition({EXPERIMENT: experiments, ITERATION: iterations})


def iteration_key(iteration: int) -> str:
    """Zero-padded, so that keys sort as numbers do."""
    return f"{iteration:02d}"


def iteration_keys(count: int) -> list[str]:
    """Keys of iterations 1..count."""
    return [iteration_key(k) for k in range(1, count + 1)]


def loop_key(experiment: str, iteration: int) -> dg.MultiPartitionKey:
    """Partition of one iteration of one experiment."""
    return dg.MultiPartitionKey({EXPERIMENT: experiment, ITERATION: iteration_key(iteration)})


def split(partition_key: str) -> tuple[str, int]:
    """``pocket|02`` -> ``("pocket", 2)``.

    Raises:
        ConfigError: somebody has added a key that is no number.
    """
    experiment, _, iteration = partition_key.rpartition("|")
    try:
        return experiment, int(iteration)
    except ValueError:
        raise ConfigError(
            f"{experiment}: iteration {iteration!r} is not a number",
            "iterations count from 01; delete the other key in Dagster",
        ) from None


def add_partitions(instance: dg.DagsterInstance, names: list[str], iterations_up_to: int) -> None:
    """Make experiments and iterations 1..n known to Dagster; adding twice is harmless."""
    _add(instance, EXPERIMENT, names)
    _add(instance, ITERATION, iteration_keys(iterations_up_to))


def add_iteration(instance: dg.DagsterInstance, iteration: int) -> None:
    """Make one iteration known to Dagster; adding twice is harmless."""
    _add(instance, ITERATION, [iteration_key(iteration)])


def _add(instance: dg.DagsterInstance, definition: str, keys: list[str]) -> None:
    """Add keys, also while other processes add the same ones.

    Dagster looks which are new and then inserts them all, in two statements: who comes second in between fails on the key
    that is there by then. Each time that this happens at least one more key is there, so it ends.
    """
    from sqlalchemy.exc import IntegrityError

    for _ in keys:
        try:
            return instance.add_dynamic_partitions(definition, keys)
        except IntegrityError:
            continue
    return instance.add_dynamic_partitions(definition, keys)
