"""Log-probabilities of the experience-aware teacher on every action token of a trajectory.

The teacher's views of a trajectory are its history with the experience of one step added, so nearly all of each is
shared with the others, and much of that with the other rollouts of the task. They go through the model packed as a prefix
tree (:mod:`evolve_dag.inference.prefix_tree`), every distinct beginning once; the values are those of one sequence per step.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evolve_dag.distillation.alignment import TeacherView
from evolve_dag.distillation.forward import Forward
from evolve_dag.errors import ModelError
from evolve_dag.inference.recording import Columns, Recording, distribution

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class TeacherTargets:
    """The teacher's distribution on the N action tokens of one trajectory, in span order."""

    logprobs: np.ndarray
    """float32 ``(N, K)`` nats, descending, of the K most probable tokens; ``(N, V)`` for the full vocabulary."""
    ids: np.ndarray | None = None
    """int32 ``(N, K)`` token ids of ``logprobs``; None for the full vocabulary."""
    tail: np.ndarray | None = None
    """float32 ``(N,)`` log of the probability of all other tokens together; None for the full vocabulary."""

    def __getitem__(self, part: slice) -> TeacherTargets:
        """The distributions of some of the action tokens."""
        return TeacherTargets(
            self.logprobs[part],
            None if self.ids is None else self.ids[part],
            None if self.tail is None else self.tail[part],
        )

    def sharpened(self, temperature: float, tokens_N: np.ndarray) -> TeacherTargets:
        """Its distribution at another temperature: p^(1/T), normalised, on the chosen tokens; the others stay.

        The tail of a top-k teacher counts as one class, so below 1 it keeps at least as much as its tokens would.

        Args:
            temperature: T; 1 changes nothing, below 1 the teacher is surer of what it prefers.
            tokens_N: bool ``(N,)``.
        """
        classes = self.logprobs if self.tail is None else np.concatenate([self.logprobs, self.tail[:, None]], axis=1)
        chosen = classes[tokens_N] / temperature
        classes = classes.copy()
        classes[tokens_N] = chosen - np.logaddexp.reduce(chosen, axis=1, keepdims=True)
        if self.tail is None:
            return TeacherTargets(classes)
        return TeacherTargets(np.ascontiguousarray(classes[:, :-1]), self.ids, classes[:, -1].copy())

    @property
    def kind(self) -> str:
        """``top_k`` or ``full``."""
        return "full" if self.ids is None else "top_k"

    def __len__(self) -> int:
        return int(self.logprobs.shape[0])


class TeacherScorer:
    """Scores teacher views in batches; the model is read, never changed.

    Args:
        model: a causal language model of transformers, bare or wrapped by peft: the weights of policy(k).
        top_k: tokens kept per action token; 0 (or the vocabulary's size and more) keeps all.
        tokens_per_pass: tokens of one forward pass. The default suits a CPU's cache; a GPU wants more.
        share: compute what views begin with once (the default), where the model can.

    Raises:
        ModelError: the model rescales its logits behind the output layer, which the scorer would miss.
    """

    def __init__(self, model: nn.Module, *, top_k: int = 64, tokens_per_pass: int = 4096, share: bool = True) -> None:
        self.forward = Forward(model, share=share)
        self.model: Any = model
        self.top_k = 0 if top_k >= self.forward.vocabulary else top_k
        self.tokens_per_pass = tokens_per_pass

    def score(
        self,
        views: Sequence[Sequence[TeacherView]],
        on_done: Callable[[int], None] | None = None,
        recording: Recording | None = None,
    ) -> list[TeacherTargets]:
        """Targets per trajectory, in the order given; rows of a trajectory follow its views.

        Args:
            views: of each trajectory. Rollouts of one task should be neighbours: they begin alike.
            on_done: called with the number of trajectories that were finished since the last call (progress).
            recording: of the same model with the same ``top_k``, made while it sampled. Views that it holds cost nothing.

        Raises:
            ModelError: the teacher's log-probabilities are not finite numbers.
        """
        import torch

        flat = [(owner, view) for owner, own in enumerate(views) for view in own]
        found = [None if recording is None else recording.get(view.ids, view.start) for _, view in flat]
        missing = [index for index, columns in enumerate(found) if columns is None]
        left = Counter(flat[index][0] for index in missing)
        if on_done is not None:
            on_done(len(views) - len(left))
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode(), self.forward.ready():
                for part in self.forward.passes([flat[index][1].ids for index in missing], self.tokens_per_pass):
                    chosen = [missing[at] for at in part]
                    for index, columns in zip(chosen, self._pass([flat[index][1] for index in chosen]), strict=True):
                        found[index] = columns
                    left.subtract(flat[index][0] for index in chosen)
                    if on_done is not None:
                        on_done(sum(left[owner] == 0 for owner in {flat[index][0] for index in chosen}))
        finally:
            self.model.train(training)
        parts = (columns for columns in found if columns is not None)
        return [_joined(own, [next(parts) for _ in own]) for own in views]

    def _pass(self, views: Sequence[TeacherView]) -> list[Columns]:
        """The columns of :class:`TeacherTargets` for each view of one forward pass."""
        import torch

        hidden_N_H = self.forward.states_at([view.ids for view in views], [slice(view.start - 1, -1) for view in views])
        columns = [torch.cat(column) for column in zip(*self._distributions(hidden_N_H), strict=True)]
        split = [
            [part.cpu().numpy() for part in column.split([len(view.ids) - view.start for view in views])] for column in columns
        ]
        return list(zip(*split, strict=True))

    def _distributions(self, hidden_N_H: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Per chunk of action tokens: (log-probabilities,) or (top log-probabilities, ids, log tail)."""
        from evolve_dag.distillation.losses import default_chunk

        for hidden in hidden_N_H.split(default_chunk(self.forward.vocabulary)):
            yield distribution(self.forward.head(hidden), self.top_k)


def _joined(views: Sequence[TeacherView], parts: Sequence[Columns]) -> TeacherTargets:
    columns = [np.concatenate(column) for column in zip(*parts, strict=True)]
    if np.isnan(columns[0]).any():
        raise ModelError(
            f"trajectory {views[0].trajectory_id}: the teacher's log-probabilities are not numbers",
            "the policy's weights or its number format are broken: try models.policy.dtype float32",
        )
    return TeacherTargets(*columns)
