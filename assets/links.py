"""Addresses inside a materialization's metadata: what it was made of, what it decided, where its numbers are plotted."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

import dagster as dg
from evolve_dag.assets import partitions

from evolve_dag.errors import StoreError
from evolve_dag.store.artifacts import Artifact, Store

SHORT = 12
"""Digits of a digest that are shown; `evolve trace` takes them too."""


def asset_page(step: str, partition: str) -> str:
    """Dagster's page of one partition of an asset, relative to its address."""
    return f"/assets/{step}?view=partitions&partition={quote(partition, safe='')}"


def asset_link(step: str, partition: str) -> str:
    """``[policy[pocket|02]](...)``, for Markdown outside a table."""
    return f"[{step}\\[{partition}\\]]({asset_page(step, partition)})"


def upstream(artifact: Artifact, partition: str) -> dict[str, Any]:
    """The digests it was made of, each with a link to the asset that holds it."""
    if not artifact.inputs:
        return {}
    lines = ["| made of | digest |", "| --- | --- |"]
    lines += [f"| [{name}]({asset_page(name, partition)}) | `{digest[:SHORT]}` |" for name, digest in artifact.inputs.items()]
    return {"upstream": dg.MetadataValue.md("\n".join(lines))}


def hand_over(artifact: Artifact, store: Store, experiment: str, iteration: int) -> dict[str, Any]:
    """The edge that closes the loop, which Dagster's graph cannot hold, from both of its ends.

    ``promotion[k]`` names policy[k+1], which it commits; ``policy[k+1]`` names the promotion that decided it, and where its
    adapter and its pool were made: a champion that stayed is older than one iteration.
    """
    if artifact.kind == "promotion":
        return {"commits": dg.MetadataValue.md(asset_link("policy", str(partitions.loop_key(experiment, iteration + 1))))}
    if artifact.kind != "policy":
        return {}
    if iteration == 1:
        return {"decided_by": "nothing comes before iteration 1: this is the bare base model"}
    found = {"decided_by": dg.MetadataValue.md(asset_link("promotion", str(partitions.loop_key(experiment, iteration - 1))))}
    for kind in ("adapter", "experience"):
        digest = artifact.summary.get(kind)
        made = _where(store, experiment, kind, digest) if digest else None
        if digest and made:
            found[kind] = dg.MetadataValue.md(f"{asset_link(kind, made)} `{digest[:SHORT]}`")
    return found


def _where(store: Store, experiment: str, kind: str, digest: str) -> str | None:
    """Partition whose artifact has that digest."""
    with suppress(StoreError):  # a damaged reference must not fail a step whose artifact is sound
        for ref in store.refs(experiment):
            if (ref.kind, ref.digest) == (kind, digest):
                return str(partitions.loop_key(experiment, ref.iteration))
    return None


def mlflow(root: Path, experiment: str, iteration: int, made: Artifact) -> dict[str, Any]:
    """Where MLflow has, or will have, the iteration with what was made in it."""
    from evolve_dag.tracking.mlflow_sync import tracking_link

    try:
        link = tracking_link(root, experiment, iteration, {made.kind: made.digest})
    except Exception as error:  # whatever is wrong with the tracking, a step must not fail for it
        return {"mlflow": f"not known: {type(error).__name__}"}
    if link is None:
        return {}
    return {"mlflow": dg.MetadataValue.url(link) if link.startswith("http") else dg.MetadataValue.text(link)}


def report(root: Path, experiment: str) -> Mapping[str, Any]:
    """Where the experiment's report lies, once it is written."""
    path = (root / "reports" / f"{experiment}.html").resolve()
    return {"report": dg.MetadataValue.path(path)} if path.is_file() else {}
