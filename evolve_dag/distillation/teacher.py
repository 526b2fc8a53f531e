"""Log-probabilities of the experience-aware teacher on every action token of a trajectory.

Tree attention: all teacher views of a trajectory go through the model as one packed sequence, trunk first,
then every branch. A branch token attends to the trunk up to its branch point and to its own branch causally,
at the rotary positions it has in the unpacked sequence, so the values are those of one sequence per step
at about half the tokens. Views that lie wholly in the trunk (global or no injection) need no mask at all:
one ordinary row per trajectory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evolve_dag.distillation.alignment import TeacherTree
from evolve_dag.errors import ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

BOOL_MASK = ("sdpa", "evolve_grouped")
"""Attention implementations that take a boolean mask; the second is that of :mod:`evolve_dag.inference.transformers`."""

MASK_ELEMENTS = 1 << 26
"""Most elements of one batch's attention mask (64 MB as bool); a longer tree is scored one sequence per step."""

LOGIT_ELEMENTS = 1 << 25
"""Logits held at once (128 MB in float32)."""


@dataclass(frozen=True, slots=True)
class TeacherTargets:
    """The teacher's distribution on the N action tokens of one trajectory, in span order."""

    logprobs: np.ndarray
    """float32 ``(N, K)`` nats, descending, of the K most probable tokens; ``(N, V)`` for the full vocabulary."""
    ids: np.ndarray | None = None
    """int32 ``(N, K)`` token ids of ``logprobs``; None for the full vocabulary."""
    tail: np.ndarray | None = None
    """float32 ``(N,)`` log of the probability of all other tokens together; None for the full vocabulary."""

    @property
    def kind(self) -> str:
        """``top_k`` or ``full``."""
        return "full" if self.ids is None else "top_k"

    def __len__(self) -> int:
        return int(self.logprobs.shape[0])


@dataclass(frozen=True, slots=True)
class _Row:
    """One row of a scoring batch."""

    ids: Sequence[int]
    predictors: Sequence[int]
    """For each action token, the packed index of the token whose hidden state predicts it."""
    tree: TeacherTree | None
    """Given when the row is a packed tree with branches, which needs positions and a mask."""
    owner: int
    """Index of the trajectory."""
    part: int
    """Order within the trajectory."""


class TeacherScorer:
    """Scores teacher views in batches; the model is read, never changed.

    Args:
        model: a causal language model of transformers, bare or wrapped by peft: the weights of policy(k).
        top_k: tokens kept per action token; 0 (or the vocabulary's size and more) keeps all.
        tokens_per_batch: padded tokens of one forward pass.
        tree: pack step-wise views (the default). Models whose attention cannot take a custom mask
            (sliding windows, flash attention) are scored one sequence per step whatever this says.

    Raises:
        ModelError: the model rescales its logits behind the output layer, which the scorer would miss.
    """

    def __init__(self, model: nn.Module, *, top_k: int = 64, tokens_per_batch: int = 16384, tree: bool = True) -> None:
        self.decoder, self.head = decoder_and_head(model)
        self.model: Any = model
        self.config: Any = model.config
        self.vocabulary = int(self.head.weight.shape[0])
        self.top_k = 0 if top_k >= self.vocabulary else top_k
        self.tokens_per_batch = tokens_per_batch
        self.tree = tree and supports_tree(self.config)

    def score(self, trees: Sequence[TeacherTree], on_done: Callable[[int], None] | None = None) -> list[TeacherTargets]:
        """Targets per trajectory, in the order given; rows of a trajectory follow its branches.

        Args:
            on_done: called with the number of rows of each finished batch (progress).

        Raises:
            ModelError: the teacher's log-probabilities are not finite numbers.
        """
        import torch

        parts: list[dict[int, tuple[np.ndarray, ...]]] = [{} for _ in trees]
        training = self.model.training
        self.model.eval()
        try:
            with torch.inference_mode():
                for batch in self._batches(trees):
                    for row, arrays in zip(batch, self._forward(batch), strict=True):
                        parts[row.owner][row.part] = arrays
                    if on_done is not None:
                        on_done(len(batch))
        finally:
            self.model.train(training)
        targets = []
        for tree, found in zip(trees, parts, strict=True):
            columns = [np.concatenate(column) for column in zip(*(found[part] for part in sorted(found)), strict=True)]
            if np.isnan(columns[0]).any():
                raise ModelError(
                    f"trajectory {tree.trajectory_id}: the teacher's log-probabilities are not numbers",
                    "the policy's weights or its number format are broken: try models.policy.dtype float32",
                )
            targets.append(TeacherTargets(*columns))
        return targets

    def _batches(self, trees: Sequence[TeacherTree]) -> Iterator[list[_Row]]:
        rows: list[_Row] = []
        for owner, tree in enumerate(trees):
            branched = any(branch.ids for branch in tree.branches)
            if branched and not (self.tree and tree.tokens**2 <= MASK_ELEMENTS):
                for part, branch in enumerate(tree.branches):
                    rows.append(_Row(tree.sequence(branch), range(branch.start - 1, branch.end - 1), None, owner, part))
            else:
                ids, predictors = pack(tree)
                rows.append(_Row(ids, predictors, tree if branched else None, owner, 0))
        for masked in (False, True):
            group = sorted((row for row in rows if (row.tree is not None) == masked), key=lambda row: -len(row.ids))
            batch: list[_Row] = []
            for row in group:
                width = len(batch[0].ids) if batch else 0  # the longest comes first
                full = (len(batch) + 1) * width > self.tokens_per_batch
                if batch and (full or (masked and (len(batch) + 1) * width**2 > MASK_ELEMENTS)):
                    yield batch
                    batch = []
                batch.append(row)
            if batch:
                yield batch

    def _forward(self, batch: list[_Row]) -> list[tuple[np.ndarray, ...]]:
        import torch

        device = self.head.weight.device
        B, L = len(batch), max(len(row.ids) for row in batch)
        ids_B_L = torch.zeros((B, L), dtype=torch.long)
        for b, row in enumerate(batch):
            ids_B_L[b, : len(row.ids)] = torch.tensor(row.ids)
        extra: dict[str, Any] = {}
        if batch[0].tree is not None:
            mask_B_L_L = torch.zeros((B, L, L), dtype=torch.bool)
            positions_B_L = torch.zeros((B, L), dtype=torch.long)
            for b, row in enumerate(batch):
                assert row.tree is not None
                fill_mask(row.tree, mask_B_L_L[b], positions_B_L[b])
            extra["attention_mask"] = attention_argument(mask_B_L_L, self.config, self.head.weight.dtype).to(device)
            extra["position_ids"] = positions_B_L.to(device)
        # Padding stands on the right of a causal row: no real token sees it, and no mask is needed.
        hidden_B_L_H = self.decoder(input_ids=ids_B_L.to(device), use_cache=False, **extra).last_hidden_state
        flat = torch.tensor([b * L + at for b, row in enumerate(batch) for at in row.predictors], device=device)
        hidden_N_H = hidden_B_L_H.flatten(0, 1).index_select(0, flat)
        columns = [torch.cat(column) for column in zip(*self._distributions(hidden_N_H), strict=True)]
        sizes = [len(row.predictors) for row in batch]
        split = [[part.cpu().numpy() for part in column.split(sizes)] for column in columns]
        return list(zip(*split, strict=True))

    def _distributions(self, hidden_N_H: Tensor) -> Iterator[tuple[Tensor, ...]]:
        """Per chunk of action tokens: (log-probabilities,) or (top log-probabilities, ids, log tail)."""
        import torch

        for hidden in hidden_N_H.split(max(1, LOGIT_ELEMENTS // self.vocabulary)):
            logprobs = torch.log_softmax(self.head(hidden).float(), dim=-1)
            if self.top_k == 0:
                yield (logprobs,)
                continue
            top, ids = logprobs.topk(self.top_k, dim=-1)
            tail = logprobs.scatter(1, ids, -torch.inf).logsumexp(-1)
            yield top, ids.int(), tail


def pack(tree: TeacherTree) -> tuple[list[int], list[int]]:
    """The tree as one sequence, and for every action token the packed index of its predictor."""
    ids = list(tree.trunk)
    predictors: list[int] = []
    for branch in tree.branches:
        offset = len(ids) - branch.shared  # packed index = offset + index in the view, behind the branch point
        ids.extend(branch.ids)
        predictors.extend(at if at < branch.shared else offset + at for at in range(branch.start - 1, branch.end - 1))
    return ids, predictors


def fill_mask(tree: TeacherTree, mask_L_L: Tensor, positions_L: Tensor) -> None:
    """Write who may see whom, and the positions, of a packed tree; the rest of the row is padding.

    Args:
        mask_L_L: bool, all False on entry; ``[query, key]``.
        positions_L: long, all 0 on entry.
    """
    import torch

    end = len(tree.trunk)
    mask_L_L[:end, :end] = torch.ones((end, end), dtype=torch.bool).tril()
    positions_L[:end] = torch.arange(end)
    for branch in tree.branches:
        start, end = end, end + len(branch.ids)
        mask_L_L[start:end, : branch.shared] = True
        mask_L_L[start:end, start:end] = torch.ones((end - start, end - start), dtype=torch.bool).tril()
        positions_L[start:end] = branch.shared + torch.arange(end - start)
    # A row that may see nothing turns into NaN in some attention kernels: padding sees itself.
    mask_L_L[end:, end:].fill_diagonal_(True)


def attention_argument(mask_B_L_L: Tensor, config: Any, dtype: Any) -> Tensor:
    """The mask in the form that the model's attention takes: bool for sdpa, additive for eager."""
    import torch

    mask = mask_B_L_L[:, None]
    if config._attn_implementation in BOOL_MASK:
        return mask
    return torch.zeros(mask.shape, dtype=dtype).masked_fill_(~mask, torch.finfo(dtype).min)


def supports_tree(config: Any) -> bool:
    """Whether a custom mask reaches every layer of the model unchanged."""
    if getattr(config, "_attn_implementation", None) not in (*BOOL_MASK, "eager"):
        return False
    layer_types = getattr(config, "layer_types", None)
    if layer_types is not None:
        return all(kind == "full_attention" for kind in layer_types)
    return getattr(config, "sliding_window", None) is None


def decoder_and_head(model: nn.Module) -> tuple[Any, Any]:
    """The transformer body and the output layer of a causal language model, bare or wrapped by peft.

    Raises:
        ModelError: the architecture changes the logits behind its output layer, or is not a causal model.
    """
    base: Any = model
    if hasattr(base, "get_base_model"):
        base = base.get_base_model()
    head = base.get_output_embeddings() if hasattr(base, "get_output_embeddings") else None
    if head is None:
        raise ModelError(f"{type(base).__name__} has no output embeddings", "give a causal language model (…ForCausalLM)")
    for name, neutral in (("final_logit_softcapping", None), ("logit_scale", 1), ("logits_scaling", 1)):
        value = getattr(base.config, name, None)
        if value is not None and value != neutral:
            raise ModelError(
                f"{type(base).__name__} changes its logits behind the output layer ({name} = {value})",
                "use an architecture without it (Qwen, Llama, Mistral, SmolLM)",
            )
    return base.get_decoder(), head
