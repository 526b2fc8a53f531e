"""What the columns of the artifacts' tables mean, for the schemas that Dagster shows.

Columns bear the names of the records they hold (:mod:`evolve_dag.records`), so one description serves every table;
where a name means something else in one table, the table's own comes first.
"""

from collections.abc import Mapping

import dagster as dg
import polars as pl

from evolve_dag.steps import base

DESCRIPTIONS: Mapping[str, str] = {
    # trajectories and their steps
    "id": "Never changes: `<task>#<rollout>` of a trajectory, `p0001` of an experience item.",
    "task_id": "The question that was asked.",
    "trajectory_id": "The trajectory this belongs to.",
    "trajectory_ids": "Trajectories that taught it.",
    "rollout": "0-based, within the group of one task.",
    "seed": "Every sampled token of this trajectory follows from it.",
    "system": "System message of the clean history.",
    "question": "First user message of the clean history.",
    "status": "`answered`; `forced`: only when a limit demanded it; `ended`: by the environment; `unanswered`; `failed`.",
    "answer": "The final answer, if there was one.",
    "reward": "1 right, 0 wrong, between them a part of it; empty: could not be judged.",
    "error": "What went wrong in a failed rollout.",
    "seconds": "Wall time, s.",
    "turns": "Model calls.",
    "offers_tools": "Whether the episode had a tool to ask; without one no answer is premature.",
    "tokens": "Sampled tokens.",
    # experience
    "text": "What the teacher reads.",
    "granularity": "`principle` or `instance`.",
    "condition": "Feature and value under which the item applies.",
    "evidence": "What the extractor measured: support, lift, interval.",
    "created": "Iteration that added it.",
    "graduated": "Iteration that took it out of the context, since the weights hold it; 0: none did.",
    "withdrawn": "Iteration that took it out of the context, since the teacher did worse with it; 0: none did.",
    "updated": "Iteration that last changed it.",
    # contexts
    "step": "0-based position in the trajectory.",
    "start": "First action token in the student's row.",
    "end": "After the last action token in the student's row.",
    "selected": "Items that stood in the teacher's context at this step.",
    "injected": "Text that only the teacher saw at this step.",
    "teacher_tokens": "Tokens of the teacher's context.",
    # scores
    "premature": "Answered before any page that was read held the answer.",
    "metadata": "Facts about the task, for breakdowns.",
}

OWN: Mapping[str, Mapping[str, str]] = {table.file: table.meanings for spec in base.STEPS for table in spec.tables}
"""File -> what its columns mean where that differs, as its step says."""


def describe(file: str, column: str) -> str | None:
    """Meaning of a column of one of the artifact's tables; None when nobody wrote one."""
    return OWN.get(file, {}).get(column) or DESCRIPTIONS.get(column)


def schema(file: str, frame: pl.DataFrame | pl.LazyFrame) -> dg.TableSchema:
    """The schema of a table, described."""
    return dg.TableSchema(
        [dg.TableColumn(name, str(kind), description=describe(file, name)) for name, kind in frame.collect_schema().items()]
    )
