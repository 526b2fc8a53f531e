"""Rows of one forward pass as tensors, and their losses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evolve_dag.config.parts import part
from evolve_dag.distillation.dataset import DistillationRow
from evolve_dag.distillation.forward import Forward
from evolve_dag.errors import AlignmentError

if TYPE_CHECKING:
    from torch import Tensor

    from evolve_dag.distillation.losses import Teacher


@dataclass(frozen=True, slots=True)
class Losses:
    """Of every action token of some rows, in the order of the rows."""

    loss: Tensor
    """``(N,)`` nats: what is minimised."""
    divergence: Tensor
    """``(N,)`` nats, without gradient: forward KL from teacher to student; NaN without a teacher."""


def row_losses(forward: Forward, rows: Sequence[DistillationRow], divergence: str, **options: Any) -> Losses:
    """Losses of ``rows`` in one forward pass, whose output layer runs on action positions only.

    Args:
        divergence: its name, as in the experiment file.
        options: the divergence's own keys, e.g. ``jsd_weight``.

    Raises:
        AlignmentError: the rows' teachers are of different kinds or widths.
    """
    import numpy as np
    import torch

    from evolve_dag.distillation.losses import token_losses_from_hidden

    teacher = joined_teacher(rows, forward.device)
    sampled = None
    if part("divergence", divergence).loss is None:
        sampled = torch.tensor([one for row in rows for one in row.row.action_ids], device=forward.device)
    states_N_H = forward.states_at([row.row.ids for row in rows], [np.array(row.row.positions) - 1 for row in rows])
    with forward.output_layer() as head:
        return Losses(*token_losses_from_hidden(divergence, states_N_H, head, teacher=teacher, sampled_N=sampled, **options))


def joined_teacher(rows: Sequence[DistillationRow], device: Any = "cpu") -> Teacher | None:
    """The teachers of ``rows`` behind each other; None when no row has one.

    Raises:
        AlignmentError: they are of different kinds or widths.
    """
    import numpy as np
    import torch

    from evolve_dag.distillation.losses import Teacher

    targets = [row.teacher for row in rows if row.teacher is not None]
    shapes = {(target.kind, target.logprobs.shape[1]) for target in targets}
    if len(shapes) > 1 or len(targets) not in (0, len(rows)):
        raise AlignmentError(
            f"rows with different kinds of teacher: {sorted(shapes)}, {len(rows) - len(targets)} rows without",
            "score all rows with one distillation.top_k",
        )
    if not targets:
        return None

    def joined(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(target, name) for target in targets])).to(device)

    top = targets[0].ids is not None
    return Teacher(joined("logprobs"), joined("ids").long() if top else None, joined("tail") if top else None)


def step_divergences(model: Any, rows: Sequence[DistillationRow], *, tokens_per_pass: int = 4096) -> list[tuple[float, ...]]:
    """Mean forward KL per action token at every step, nats: how much of the teacher is not in ``model`` yet.

    Measured before and after training at the steps where an item was selected, it says how much of the item
    is inside the weights.

    Args:
        model: the student without experience; bare, merged or wrapped by peft.

    Returns:
        Per row, one value per kept step.

    Raises:
        AlignmentError: a row has no teacher.
    """
    import torch

    require_teachers(rows, "forward_kl")
    forward = Forward(model)
    found: list[tuple[float, ...]] = [()] * len(rows)
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), forward.ready():
            for chosen in forward.passes([row.row.ids for row in rows], tokens_per_pass):
                here = [rows[index] for index in chosen]
                tokens = row_losses(forward, here, "forward_kl").divergence
                values = iter(tokens.split([end - start for row in here for start, end in row.row.spans]))
                for index in chosen:
                    found[index] = tuple(float(next(values).mean()) for _ in rows[index].row.spans)
    finally:
        model.train(training)
    return found


def require_teachers(rows: Sequence[DistillationRow], divergence: str) -> None:
    """Raises: AlignmentError, a row has no teacher although the divergence needs one."""
    if part("divergence", divergence).loss is None:
        return
    for row in rows:
        if row.teacher is None:
            raise AlignmentError(
                f"trajectory {row.row.trajectory_id}: no teacher log-probabilities, which {divergence} needs",
                "score the contexts, or set regime.divergence to cross_entropy",
            )
