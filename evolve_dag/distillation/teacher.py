"""Log-probabilities of the experience-aware teacher on every action token of a trajectory.

Tree attention: the common trunk of a trajectory's teacher views goes through the model once, causally; then all
branches follow as one packed sequence on top of the trunk's keys and values. A branch token attends to the
trunk up to its branch point and to its own branch causally, at the rotary positions it has in the unpacked
sequence, so the values are those of one sequence per step at about half the tokens. Two passes and not one:
a single packed sequence would spend most of its attention on pairs that the mask forbids.

Views that lie wholly in the trunk (global or no injection) need no second pass: one row per trajectory.
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

TAKES_A_MASK = ("sdpa", "eager", "evolve_grouped")
"""Attention implementations that take a custom mask; the last is that of :mod:`evolve_dag.inference.transformers`."""

MASK_ELEMENTS = 1 << 26
"""Most elements of one batch's attention mask (256 MB in float32); a larger tree is scored one sequence per step."""

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

    def __getitem__(self, part: slice) -> TeacherTargets:
        """The distributions of some of the action tokens."""
        return TeacherTargets(
            self.logprobs[part],
            None if self.ids is None else self.ids[part],
            None if self.tail is None else self.tail[part],
        )

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
    """Given when the row is a packed tree with branches, which needs a second pass."""
    owner: int
    """Index of the trajectory."""
    part: int
    """Order within the trajectory."""


class TeacherScorer:
    """Scores teacher views in batches; the model is read, never changed.

    Args:
        model: a causal language model of transformers, bare or wrapped by peft: the weights of policy(k).
        top_k: tokens kept per action token; 0 (or the vocabulary's size and more) keeps all.
        tokens_per_batch: padded tokens of one forward pass. The default suits a CPU's cache; a GPU wants more.
        tree: pack step-wise views (the default). Models whose attention cannot take a custom mask
            (sliding windows, flash attention) are scored one sequence per step whatever this says.

    Raises:
        ModelError: the model rescales its logits behind the output layer, which the scorer would miss.
    """

    def __init__(self, model: nn.Module, *, top_k: int = 64, tokens_per_batch: int = 4096, tree: bool = True) -> None:
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
            if branched and not (self.tree and _mask_elements([tree]) <= MASK_ELEMENTS):
                for part, branch in enumerate(tree.branches):
                    rows.append(_Row(tree.sequence(branch), range(branch.start - 1, branch.end - 1), None, owner, part))
            else:
                ids, predictors = pack(tree)
                rows.append(_Row(ids, predictors, tree if branched else None, owner, 0))
        for packed in (False, True):
            group = sorted((row for row in rows if (row.tree is not None) == packed), key=lambda row: -len(row.ids))
            batch: list[_Row] = []
            for row in group:
                if batch and not self._fits([*batch, row]):
                    yield batch
                    batch = []
                batch.append(row)
            if batch:
                yield batch

    def _fits(self, batch: list[_Row]) -> bool:
        trees = [row.tree for row in batch if row.tree is not None]
        if not trees:
            return len(batch) * max(len(row.ids) for row in batch) <= self.tokens_per_batch
        return len(trees) * sum(_widths(trees)) <= self.tokens_per_batch and _mask_elements(trees) <= MASK_ELEMENTS

    def _forward(self, batch: list[_Row]) -> list[tuple[np.ndarray, ...]]:
        import torch

        trees = [row.tree for row in batch if row.tree is not None]
        hidden_B_L_H, at = self._tree_hidden(batch, trees) if trees else self._row_hidden(batch)
        L = hidden_B_L_H.shape[1]
        flat = torch.tensor([b * L + position for b, row in enumerate(at) for position in row], device=hidden_B_L_H.device)
        hidden_N_H = hidden_B_L_H.flatten(0, 1).index_select(0, flat)
        columns = [torch.cat(column) for column in zip(*self._distributions(hidden_N_H), strict=True)]
        sizes = [len(row.predictors) for row in batch]
        split = [[part.cpu().numpy() for part in column.split(sizes)] for column in columns]
        return list(zip(*split, strict=True))

    def _row_hidden(self, batch: list[_Row]) -> tuple[Tensor, list[Sequence[int]]]:
        """Hidden states of plain rows. Padding stands on the right: no real token sees it, no mask is needed."""
        ids_B_L = _padded([row.ids for row in batch], self.head.weight.device)
        return self.decoder(input_ids=ids_B_L, use_cache=False).last_hidden_state, [row.predictors for row in batch]

    def _tree_hidden(self, batch: list[_Row], trees: list[TeacherTree]) -> tuple[Tensor, list[Sequence[int]]]:
        """Hidden states of trunks (padded to T) and, behind them, of packed branches (padded to S)."""
        import torch

        device = self.head.weight.device
        T, S = _widths(trees)
        trunk = self.decoder(input_ids=_padded([tree.trunk for tree in trees], device), use_cache=True)
        mask_B_S_K = torch.zeros((len(trees), S, T + S), dtype=torch.bool)
        positions_B_S = torch.zeros((len(trees), S), dtype=torch.long)
        for b, tree in enumerate(trees):
            fill_mask(tree, mask_B_S_K[b], positions_B_S[b])
        branches = self.decoder(
            input_ids=_padded([row.ids[len(tree.trunk) :] for row, tree in zip(batch, trees, strict=True)], device),
            attention_mask=additive(mask_B_S_K, trunk.last_hidden_state.dtype).to(device),
            position_ids=positions_B_S.to(device),
            past_key_values=trunk.past_key_values,
            use_cache=True,
        )
        at: list[Sequence[int]] = []
        for row, tree in zip(batch, trees, strict=True):
            end = len(tree.trunk)
            at.append([position if position < end else position - end + T for position in row.predictors])
        return torch.cat([trunk.last_hidden_state, branches.last_hidden_state], dim=1), at

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


def fill_mask(tree: TeacherTree, mask_S_K: Tensor, positions_S: Tensor) -> None:
    """Write whom the branch tokens of one tree may see, and their positions.

    Args:
        mask_S_K: bool ``[query, key]``, all False on entry. Keys are T trunk tokens, then the S branch tokens;
            T and S may be larger than this tree's (padding).
        positions_S: long, all 0 on entry.
    """
    import torch

    T = mask_S_K.shape[1] - mask_S_K.shape[0]
    end = 0
    for branch in tree.branches:
        start, end = end, end + len(branch.ids)
        mask_S_K[start:end, : branch.shared] = True
        mask_S_K[start:end, T + start : T + end] = torch.ones((end - start, end - start), dtype=torch.bool).tril()
        positions_S[start:end] = branch.shared + torch.arange(end - start)
    # A query that may see nothing turns into NaN in some attention kernels: padding sees itself.
    mask_S_K[end:, T + end :].fill_diagonal_(True)


def _widths(trees: Sequence[TeacherTree]) -> tuple[int, int]:
    """(T, S): longest trunk and most branch tokens."""
    return max(len(tree.trunk) for tree in trees), max(tree.tokens - len(tree.trunk) for tree in trees)


def _mask_elements(trees: Sequence[TeacherTree]) -> int:
    T, S = _widths(trees)
    return len(trees) * S * (T + S)


def _padded(rows: Sequence[Sequence[int]], device: Any) -> Tensor:
    import torch

    ids_B_L = torch.zeros((len(rows), max(map(len, rows))), dtype=torch.long)
    for b, row in enumerate(rows):
        ids_B_L[b, : len(row)] = torch.tensor(row, dtype=torch.long)
    return ids_B_L.to(device)


def additive(mask_B_S_K: Tensor, dtype: Any) -> Tensor:
    """The mask as what is added to the attention scores, ``(B, 1, S, K)``.

    Every kind of attention takes this form, and sdpa would make it anew from a bool mask in every layer, which
    costs a fifth of the scoring on a CPU.
    """
    import torch

    scores = torch.full(mask_B_S_K.shape, torch.finfo(dtype).min, dtype=dtype)
    return scores.masked_fill_(mask_B_S_K, 0.0)[:, None]


def supports_tree(config: Any) -> bool:
    """Whether a custom mask reaches every layer of the model unchanged."""
    if getattr(config, "_attn_implementation", None) not in TAKES_A_MASK:
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
