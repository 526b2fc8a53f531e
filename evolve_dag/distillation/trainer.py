"""Experience-aware teacher -> experience-free student, by LoRA (METHOD step 5).

The student starts from policy(k): the base model with adapter(k-1), which training continues. The teacher is
present as numbers only (its log-probabilities on the action tokens), so one model is in memory. The loss
stands on action tokens, and the output layer runs nowhere else.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve_dag.config.parts import part
from evolve_dag.config.schema import DistillationSettings, Regime
from evolve_dag.distillation.adapter import attach, detach, merge, save_adapter
from evolve_dag.distillation.dataset import DistillationRow, batches
from evolve_dag.distillation.teacher import decoder_and_head
from evolve_dag.errors import AlignmentError, ModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from evolve_dag.distillation.losses import Teacher

BETAS = (0.9, 0.99)
"""Adam: runs are tens to hundreds of steps, so the second moment must forget faster than the usual 0.999."""

FINAL_FRACTION = 0.1
"""Learning rate of the last step, as a share of the peak."""

MAX_SKIPPED_IN_A_ROW = 3
"""One bad batch is skipped and counted; more than this in a row is a broken run."""


@dataclass(frozen=True, slots=True)
class CurvePoint:
    """One optimizer step."""

    step: int
    """0-based."""
    round: int
    """0 for the stored trajectories, then one more for every resampling."""
    loss: float
    """What is minimised: mean over the action tokens of the batch, nats. NaN when the batch was skipped for it."""
    divergence: float | None
    """Forward KL from teacher to student per action token, nats, whatever the loss is. None without a teacher."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    tokens: int
    """Tokens of the batch without padding."""
    action_tokens: int
    """Tokens that the loss is on."""
    tokens_per_second: float
    skipped: bool = False
    """The loss or its gradient was not finite: no update was made."""


@dataclass(frozen=True, slots=True)
class DistillationResult:
    """What one training did."""

    adapter: Path
    """Folder of the adapter, in peft's format."""
    curve: tuple[CurvePoint, ...]
    rows: int
    """Trajectories given."""
    action_tokens: int
    """Action tokens of the trajectories given."""
    tokens: int
    """Tokens that went through the student, padding left out."""
    skipped: int
    """Batches skipped for a loss or gradient that was not finite."""
    refreshes: int
    """How often trajectories were sampled anew while training."""
    empty_refreshes: int
    """How many of these gave no row, so that training went on with the earlier ones."""
    unchanged: bool
    """No update was made (nothing to learn from): the adapter is the one that training began with."""
    seconds: float
    note: str = ""
    """Why nothing was learned, if so."""


Resample = Callable[[int, "nn.Module"], list[DistillationRow]]
"""(round from 1, student with its adapter merged in, a copy) -> rows on fresh student trajectories, scored by the
teacher policy(k) with experience. A share of ``epochs / refresh`` of the tasks is as much as a round can use."""


def distill(
    model: nn.Module | Path | str,
    rows: Sequence[DistillationRow],
    *,
    settings: DistillationSettings,
    regime: Regime,
    out: Path,
    init_adapter: Path | None = None,
    seed: int = 0,
    iteration: int = 1,
    threads: int = 1,
    device: str = "cpu",
    base: str = "",
    resample: Resample | None = None,
    on_step: Callable[[CurvePoint, int], None] | None = None,
) -> DistillationResult:
    """Train the student and save its adapter.

    The same model, rows, settings and seed give the same bytes on the same number of threads. A killed training
    starts again from its beginning.

    Args:
        model: base model, or a folder that ``from_pretrained`` reads. A model given as an object comes back as it was.
        rows: may be empty; then the adapter that training would have begun with is saved and the result says so.
        out: folder for the adapter.
        init_adapter: adapter(k-1); None starts with one that changes nothing.
        iteration: k; the learning rate falls by ``learning_rate_decay`` per iteration.
        base: identity of the base model, written into the adapter's config.
        resample: called ``refresh - 1`` times at even points of training (METHOD: on_policy).
        on_step: called after every step with the point and the number of steps to come in all.

    Raises:
        ModelError: the model cannot be loaded, or more than 3 batches in a row gave no finite gradient.
        AlignmentError: a row has no teacher although the divergence needs one.
        ConfigError, StoreError: ``init_adapter`` does not fit or is corrupt.
    """
    import torch

    _require_teachers(rows, regime)
    if settings.refresh > 1 and resample is None and rows:
        raise ModelError(
            f"distillation.refresh is {settings.refresh}, but nothing can sample trajectories",
            "give resample, or set distillation.refresh to 1",
        )
    started = time.perf_counter()
    threads_before = torch.get_num_threads()
    torch.set_num_threads(threads)
    given = model if isinstance(model, torch.nn.Module) else load_model(model)
    home = next(given.parameters()).device
    wrapped = attach(given.to(device), rank=settings.rank, alpha=settings.alpha, seed=seed, init_adapter=init_adapter)
    training = given.training
    try:
        # Dropout of the base would make the student another policy than the one that acts: none of it.
        wrapped.eval()
        run = _Run(wrapped, settings, regime, seed, iteration, threads, device)
        curve = run.train(rows, resample, on_step) if rows else []
        save_adapter(wrapped, out, base=base)
    finally:
        detach(wrapped)
        given.to(home).train(training)
        torch.set_num_threads(threads_before)
    skipped = sum(point.skipped for point in curve)
    unchanged = skipped == len(curve)
    note = "" if not unchanged else ("no trajectory was kept" if not rows else "every batch was skipped")
    return DistillationResult(
        adapter=out,
        curve=tuple(curve),
        rows=len(rows),
        action_tokens=sum(row.action_tokens for row in rows),
        tokens=sum(point.tokens for point in curve),
        skipped=skipped,
        refreshes=run.refreshes,
        empty_refreshes=run.empty_refreshes,
        unchanged=unchanged,
        seconds=time.perf_counter() - started,
        note=note,
    )


def learning_rate(settings: DistillationSettings, step: int, total: int, iteration: int = 1) -> float:
    """Learning rate of 0-based ``step`` of ``total``: warm-up, linear decay to 10%, and a factor per iteration."""
    peak = settings.learning_rate * settings.learning_rate_decay ** (iteration - 1)
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    progress = step / (total - 1) if total > 1 else 0.0
    return peak * warm * (1.0 - (1.0 - FINAL_FRACTION) * progress)


def step_divergences(
    model: nn.Module, rows: Sequence[DistillationRow], *, tokens_per_batch: int = 8192
) -> list[tuple[float, ...]]:
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

    from evolve_dag.distillation.losses import token_losses_from_hidden

    _require_teachers(rows, Regime(divergence="forward_kl"))
    decoder, head = decoder_and_head(model)
    found: list[tuple[float, ...]] = [()] * len(rows)
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for chosen in batches([row.tokens for row in rows], tokens_per_batch, seed=0):
                batch = collate([rows[index] for index in chosen], head.weight.device)
                _, divergence = token_losses_from_hidden(
                    "forward_kl", batch.hidden(decoder), head, teacher=batch.teacher, vocabulary=head.weight.shape[0]
                )
                values = iter(divergence.split([end - start for index in chosen for start, end in rows[index].row.spans]))
                for index in chosen:
                    found[index] = tuple(float(next(values).mean()) for _ in rows[index].row.spans)
    finally:
        model.train(training)
    return found


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of one optimizer step as tensors."""

    ids: Tensor
    """``(B, L)`` token ids, padded on the right. A causal row never sees its padding, so there is no mask."""
    predictors: Tensor
    """``(N,)`` flat index into ``(B * L)`` of the token before each action token."""
    sampled: Tensor
    """``(N,)`` the action tokens."""
    teacher: Teacher | None
    tokens: int
    """Without padding."""

    def hidden(self, decoder: Any) -> Tensor:
        """Hidden states that predict the action tokens, ``(N, H)``."""
        states = decoder(input_ids=self.ids, use_cache=False).last_hidden_state
        return states.flatten(0, 1).index_select(0, self.predictors)


def collate(rows: Sequence[DistillationRow], device: Any = "cpu") -> Batch:
    """Pad ``rows`` to one batch.

    Raises:
        AlignmentError: the rows' teachers are of different kinds or widths.
    """
    import numpy as np
    import torch

    from evolve_dag.distillation.losses import Teacher

    B, L = len(rows), max(row.tokens for row in rows)
    ids_B_L = torch.zeros((B, L), dtype=torch.long)
    predictors: list[int] = []
    for b, row in enumerate(rows):
        ids_B_L[b, : row.tokens] = torch.tensor(row.row.ids)
        predictors.extend(b * L + position - 1 for position in row.row.positions)
    predictors_N = torch.tensor(predictors)
    sampled_N = ids_B_L.flatten()[predictors_N + 1]
    targets = [row.teacher for row in rows if row.teacher is not None]
    shapes = {(target.kind, target.logprobs.shape[1]) for target in targets}
    if len(shapes) > 1 or len(targets) not in (0, len(rows)):
        raise AlignmentError(
            f"rows with different kinds of teacher: {sorted(shapes)}, {len(rows) - len(targets)} rows without",
            "score all rows with one distillation.top_k",
        )
    teacher = None
    if targets:

        def joined(name: str) -> Tensor:
            return torch.from_numpy(np.concatenate([getattr(target, name) for target in targets])).to(device)

        top = targets[0].ids is not None
        teacher = Teacher(joined("logprobs"), joined("ids").long() if top else None, joined("tail") if top else None)
    return Batch(ids_B_L.to(device), predictors_N.to(device), sampled_N.to(device), teacher, sum(row.tokens for row in rows))


def load_model(path: Path | str, dtype: str = "float32") -> nn.Module:
    """A causal language model from a folder.

    Raises:
        ModelError: transformers cannot read it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(str(path), dtype=getattr(torch, dtype), local_files_only=True)
    except Exception as error:  # whatever transformers, safetensors or the config parser raise: it is not loadable
        raise ModelError(f"{path}: not a model that transformers can load: {error}", "check models.policy.path") from error


def _require_teachers(rows: Sequence[DistillationRow], regime: Regime) -> None:
    if part("divergence", regime.divergence).loss is None:
        return
    for row in rows:
        if row.teacher is None:
            raise AlignmentError(
                f"trajectory {row.row.trajectory_id}: no teacher log-probabilities, which {regime.divergence} needs",
                "score the contexts, or set regime.divergence to cross_entropy",
            )


class _Run:
    """One training: optimizer, schedule and counters."""

    def __init__(
        self,
        wrapped: Any,
        settings: DistillationSettings,
        regime: Regime,
        seed: int,
        iteration: int,
        threads: int,
        device: str,
    ) -> None:
        self.wrapped = wrapped
        self.settings = settings
        self.regime = regime
        self.seed = seed
        self.iteration = iteration
        self.threads = threads
        self.device = device
        self.refreshes = 0
        self.empty_refreshes = 0

    def train(
        self,
        rows: Sequence[DistillationRow],
        resample: Resample | None,
        on_step: Callable[[CurvePoint, int], None] | None,
    ) -> list[CurvePoint]:
        import torch

        settings = self.settings
        self.decoder, self.head = decoder_and_head(self.wrapped)
        self.parameters = [parameter for parameter in self.wrapped.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, betas=BETAS, weight_decay=settings.weight_decay
        )
        epochs = [self._batches(rows, epoch) for epoch in range(settings.epochs)]
        total = sum(len(epoch) for epoch in epochs)
        curve: list[CurvePoint] = []
        in_a_row = 0
        for number in range(settings.refresh):
            if number > 0 and resample is not None:
                rows = self._refresh(number, rows, resample)
            until = total * (number + 1) // settings.refresh
            stream = self._stream(rows)
            while len(curve) < until:
                point = self._step(next(stream), len(curve), total, number)
                curve.append(point)
                in_a_row = in_a_row + 1 if point.skipped else 0
                if in_a_row > MAX_SKIPPED_IN_A_ROW:
                    raise ModelError(
                        f"training step {point.step}: {in_a_row} batches in a row without a finite loss and gradient "
                        f"(loss {point.loss}, gradient norm {point.gradient_norm})",
                        "lower distillation.learning_rate, or set models.policy.dtype to float32",
                    )
                if on_step is not None:
                    on_step(point, total)
        return curve

    def _batches(self, rows: Sequence[DistillationRow], epoch: int) -> list[list[int]]:
        return batches([row.tokens for row in rows], self.settings.tokens_per_batch, self.seed, epoch)

    def _stream(self, rows: Sequence[DistillationRow]) -> Iterator[list[DistillationRow]]:
        """Whole epochs, one behind the other, without end."""
        for epoch in count():
            for chosen in self._batches(rows, epoch):
                yield [rows[index] for index in chosen]

    def _refresh(self, number: int, rows: Sequence[DistillationRow], resample: Resample) -> Sequence[DistillationRow]:
        import torch

        fresh = resample(number, merge(copy.deepcopy(self.wrapped)))
        torch.set_num_threads(self.threads)  # whoever sampled may have set its own
        _require_teachers(fresh, self.regime)
        self.refreshes += 1
        if not fresh:
            self.empty_refreshes += 1
        return fresh or rows

    def _step(self, rows: Sequence[DistillationRow], step: int, total: int, number: int) -> CurvePoint:
        import torch

        from evolve_dag.distillation.losses import mean_over_tokens, token_losses_from_hidden

        started = time.perf_counter()
        rate = learning_rate(self.settings, step, total, self.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        batch = collate(rows, self.device)
        loss_N, divergence_N = token_losses_from_hidden(
            self.regime.divergence,
            batch.hidden(self.decoder),
            self.head,
            teacher=batch.teacher,
            sampled_N=batch.sampled,
            vocabulary=self.head.weight.shape[0],
            **{key: getattr(self.settings, key) for key in part("divergence", self.regime.divergence).keys},
        )
        loss = mean_over_tokens(loss_N)
        self.optimizer.zero_grad(set_to_none=True)
        value, norm = float(loss.detach()), math.nan
        if math.isfinite(value):
            loss.backward()
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.gradient_clip))
        usable = math.isfinite(value) and math.isfinite(norm)
        if usable:
            self.optimizer.step()
        return CurvePoint(
            step=step,
            round=number,
            loss=value,
            divergence=None if batch.teacher is None else float(divergence_N.mean()),
            learning_rate=rate,
            gradient_norm=norm,
            tokens=batch.tokens,
            action_tokens=len(batch.sampled),
            tokens_per_second=batch.tokens / max(time.perf_counter() - started, 1e-9),
            skipped=not usable,
        )
