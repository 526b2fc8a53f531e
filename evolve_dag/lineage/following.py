"""Which of a lineage's iterations belong together: after a change of the experiment the first may be new and the later old."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from evolve_dag.store.layout import DECISION

if TYPE_CHECKING:
    from evolve_dag.store.artifacts import Artifact


def follows(iteration: Mapping[str, Artifact], before: Mapping[str, Artifact]) -> bool:
    """Whether every artifact of an iteration was made of those beside it, and its policy by the promotion before it.

    Args:
        iteration: by kind.
        before: those of the iteration before, by kind.
    """
    for artifact in iteration.values():
        if any(kind in iteration and iteration[kind].digest != digest for kind, digest in artifact.inputs.items()):
            return False
    if "policy" in iteration and "promotion" in before:
        decided = before["promotion"].json(DECISION).get("policy") or {}
        entered = iteration["policy"].summary
        return all(entered.get(key) == decided.get(key) for key in ("adapter", "experience"))
    return True
