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
from evolve_dag.distillation.batch import require_teachers, row_losses
from evolve_dag.distillation.dataset import DistillationRow, batches
from evolve_dag.distillation.forward import Forward
from evolve_dag.errors import ModelError

if TYPE_CHECKING:
    from torch import nn

BETAS = (0.9, 0.99)
"""Adam: runs are tens to hundreds of steps, so the second moment must forget faster than the usual 0.999."""

FINAL_FRACTION = 0.1
"""Learning rate of the last step, as a share of the peak."""

TOKENS_PER_PASS = 8192
"""Most tokens of one forward and backward pass; a larger batch is added up from several."""

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
    """What is minimised, nats: mean over the action tokens of the batch, where one of a retention row counts
    ``retention_weight`` times. NaN when the batch was skipped for it."""
    retention_loss: float
    """What of ``loss`` stands on retention rows."""
    divergence: float | None
    """Forward KL from teacher to student per action token of the clean rows, nats, whatever the loss is. None without
    a teacher."""
    learning_rate: float
    gradient_norm: float
    """Before clipping."""
    tokens: int
    """Tokens of the batch, those that several rows share counted in each."""
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
    """Tokens of the rows trained on, those that several rows share counted in each."""
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

    from evolve_dag.distillation.lora import fuse

    require_teachers(rows, regime.divergence)
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
        fuse(wrapped)
        run = _Run(wrapped, settings, regime, seed, iteration, threads)
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
    ) -> None:
        self.wrapped = wrapped
        self.settings = settings
        self.regime = regime
        self.options = {key: getattr(settings, key) for key in part("divergence", regime.divergence).keys}
        self.seed = seed
        self.iteration = iteration
        self.threads = threads
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
        self.forward = Forward(self.wrapped)
        self.parameters = [parameter for parameter in self.wrapped.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=settings.learning_rate, betas=BETAS, weight_decay=settings.weight_decay
        )
        total = sum(len(self._batches(rows, epoch)) for epoch in range(settings.epochs))
        curve: list[CurvePoint] = []
        in_a_row = 0
        for number in range(settings.refresh):
            if number > 0 and resample is not None:
                rows = self._refresh(number, rows, resample)
            until = total * (number + 1) // settings.refresh
            stream = self._stream(rows)
            while len(curve) < until:
                with self.forward.ready():
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
        return batches(rows, self.settings.tokens_per_batch, self.seed, epoch)

    def _stream(self, rows: Sequence[DistillationRow]) -> Iterator[list[DistillationRow]]:
        """Whole epochs, one behind the other, without end."""
        for epoch in count():
            for chosen in self._batches(rows, epoch):
                yield [rows[index] for index in chosen]

    def _refresh(self, number: int, rows: Sequence[DistillationRow], resample: Resample) -> Sequence[DistillationRow]:
        import torch

        fresh = resample(number, merge(copy.deepcopy(self.wrapped)))
        torch.set_num_threads(self.threads)  # whoever sampled may have set its own
        require_teachers(fresh, self.regime.divergence)
        self.refreshes += 1
        if not fresh:
            self.empty_refreshes += 1
        return fresh or rows

    def _step(self, rows: Sequence[DistillationRow], step: int, total: int, number: int) -> CurvePoint:
        import torch

        started = time.perf_counter()
        rate = learning_rate(self.settings, step, total, self.iteration)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        sums = self._accumulate(rows)
        norm = math.nan
        if math.isfinite(sums.loss):
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters, self.settings.gradient_clip))
        usable = math.isfinite(sums.loss) and math.isfinite(norm)
        if usable:
            self.optimizer.step()
        tokens = sum(row.tokens for row in rows)
        clean = sum(row.action_tokens for row in rows if not row.retention)
        scored = rows[0].teacher is not None
        return CurvePoint(
            step=step,
            round=number,
            loss=sums.loss,
            retention_loss=sums.retention_loss,
            divergence=sums.divergence / clean if scored and clean else None,
            learning_rate=rate,
            gradient_norm=norm,
            tokens=tokens,
            action_tokens=sum(row.action_tokens for row in rows),
            tokens_per_second=tokens / max(time.perf_counter() - started, 1e-9),
            skipped=not usable,
        )

    def _accumulate(self, rows: Sequence[DistillationRow]) -> _Sums:
        """Add up the gradients of one optimizer step, forward pass by forward pass.

        A pass whose loss is not finite ends it: the step is lost anyway.
        """
        import torch

        weights = [self.settings.retention_weight if row.retention else 1.0 for row in rows]
        total = sum(weight * row.action_tokens for weight, row in zip(weights, rows, strict=True))
        sums = _Sums()
        for chosen in self.forward.passes([row.row.ids for row in rows], TOKENS_PER_PASS):
            here = [rows[index] for index in chosen]
            found = row_losses(self.forward, here, self.regime.divergence, **self.options)
            counts = torch.tensor([row.action_tokens for row in here])
            weight_N = torch.tensor([weights[index] for index in chosen]).repeat_interleave(counts).to(found.loss)
            retention_N = torch.tensor([row.retention for row in here]).repeat_interleave(counts).to(found.loss.device)
            loss_N = found.loss * weight_N / total
            sums.loss += float(loss_N.sum().detach())
            sums.retention_loss += float(loss_N[retention_N].sum().detach())
            sums.divergence += float(found.divergence[~retention_N].sum())
            if not math.isfinite(sums.loss):
                break
            loss_N.sum().backward()
        return sums


@dataclass(slots=True)
class _Sums:
    """What one optimizer step adds up."""

    loss: float = 0.0
    retention_loss: float = 0.0
    divergence: float = 0.0
    """Of the clean rows, over their tokens."""
