"""How much alike the policy acts with and without an item in its context: the evidence that it needs it no longer.

At a step where an item would have stood, an action a was sampled without it, from q. The mean of min(1, p(a) / q(a)), p being
the same policy with the item in its context, is one minus the total variation distance of p and q: the largest share of the
steps at which the two can be made to act the same. It needs no words for what the item advises, so it serves any item.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from math import exp
from typing import TYPE_CHECKING, Literal

import numpy as np

from evolve_dag.distillation.alignment import align_all, replay_injection
from evolve_dag.distillation.teacher import TeacherScorer, TeacherTargets
from evolve_dag.records import Step, Trajectory

if TYPE_CHECKING:
    from evolve_dag.inference.transformers import TransformersModel


def overlaps(
    trajectories: Sequence[Trajectory],
    items: Collection[str],
    model: TransformersModel,
    *,
    pattern: Literal["global", "step_wise"],
    top_k: int,
) -> dict[str, list[tuple[str, float]]]:
    """Item -> (task, min(1, p(a) / q(a)) in 0..1) at each of its steps. Several items of one step share it.

    Args:
        trajectories: sampled without experience at temperature 1; ``selected`` and ``injected`` of a step say what would have
            stood in its context. At another temperature the mean is that over what the policy does there.
        items: ids that are asked about.
        model: the policy that sampled them.
        top_k: a token that is not among so many most probable ones counts as all of the others together.

    Raises:
        AlignmentError: the two views do not share their action ids.
    """
    steps = {(t.id, step.index): (t.task_id, step) for t in trajectories for step in t.steps}

    def asked(trajectory: Trajectory, step: Step) -> bool:
        return len(step.logprobs) == len(step.token_ids) > 0 and not set(items).isdisjoint(step.selected)

    aligned = align_all(trajectories, model.chat, replay_injection(pattern), asked)
    scored = TeacherScorer(model.model, top_k=top_k).score([one.views for one in aligned])
    found: dict[str, list[tuple[str, float]]] = {}
    for one, targets in zip(aligned, scored, strict=True):
        start = 0
        for view in one.views:
            (task, step), end = steps[view.trajectory_id, view.step], start + len(view.action_ids)
            ratio = float(_logprobs(targets[start:end], np.array(view.action_ids)).sum()) - sum(step.logprobs)
            for item in set(items).intersection(view.selected):
                found.setdefault(item, []).append((task, exp(min(0.0, ratio))))
            start = end
    return found


def _logprobs(targets: TeacherTargets, ids_N: np.ndarray) -> np.ndarray:
    """Log-probabilities of the sampled tokens, (N,)."""
    if targets.ids is None or targets.tail is None:
        return targets.logprobs[np.arange(len(ids_N)), ids_N]
    hit_N_K = targets.ids == ids_N[:, None]
    return np.where(hit_N_K.any(axis=1), targets.logprobs.sum(axis=1, where=hit_N_K), targets.tail)
