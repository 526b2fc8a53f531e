"""Tasks and trajectories as MLflow datasets: schema, size and digest; the rows stay in the store."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

from evolve_dag.store.layout import TRAJECTORIES
from evolve_dag.tracking.mlflow_facts import IterationFacts

if TYPE_CHECKING:
    import polars as pl
    from mlflow.entities import DatasetInput

CONTEXTS = {"trajectories": "training", "contexts": "distillation", "scores": "evaluation"}
"""Kind of artifact -> what its trajectories are for."""


def datasets(facts: IterationFacts) -> tuple[list[DatasetInput], list[DatasetInput]]:
    """The trajectories of an iteration, with their artifact's digest, and the tasks that they are about.

    The digest of a set of tasks is the hash of its ids and questions, so the iterations of a lineage share the dataset.
    """
    trajectories, tasks = [], []
    for kind, context in CONTEXTS.items():
        artifact = facts.artifacts[kind]
        frame = artifact.frame(TRAJECTORIES)
        trajectories.append(_input(frame, f"{facts.experiment} {kind}", artifact.digest, context, kind))
        if kind == "contexts":
            continue  # the training tasks again
        for use, part in _uses(frame, kind):
            questions = part.select("task_id", "question").unique(maintain_order=True).sort("task_id")
            digest = hashlib.sha256(questions.write_ndjson().encode()).hexdigest()[:32]
            tasks.append(_input(questions, f"{facts.experiment} tasks, {use}", digest, use, kind))
    return trajectories, tasks


def _uses(frame: pl.DataFrame, kind: str) -> list[tuple[str, pl.DataFrame]]:
    """Training tasks; in scores those of the gate and those held out, by the condition that begins the trajectory's id."""
    import polars as pl

    if kind == "trajectories":
        return [("training", frame)]
    gate = pl.col("id").str.starts_with("development_")
    parts = [("development", frame.filter(gate)), ("held-out", frame.filter(~gate))]
    return [(use, part) for use, part in parts if part.height]


def _input(frame: pl.DataFrame, name: str, digest: str, context: str, kind: str) -> DatasetInput:
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.polars_dataset import from_polars
    from mlflow.entities import DatasetInput, InputTag

    source = CodeDatasetSource({"evolve.artifact": f"{kind}", "evolve.digest": digest})
    dataset = from_polars(frame, source=source, name=name, digest=digest)
    return DatasetInput(dataset._to_mlflow_entity(), [InputTag("mlflow.data.context", context)])
