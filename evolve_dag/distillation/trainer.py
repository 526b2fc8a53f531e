"""Experience-aware teacher -> experience-free student, by LoRA (METHOD step 5).

The student starts from policy(k): the base model with adapter(k-1), which training continues. The teacher is
present as numbers only (its log-probabilities on the action tokens), so one model is in memory. The loss
stands on action tokens, and the output layer runs nowhere else.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, astuple, dataclass
from itertools import accumulate, count, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve_dag.config.parts import part
from evolve_dag.config.schema import DistillationSettings, Regime
from evolve_dag.distillation.adapter import attach, detach, save_adapter
from evolve_dag.distillation.batch import require_teachers, row_losses
from evolve_dag.distillation.checkpoint import Checkpoint, State, fingerprint
from evolve_dag.distillation.dataset import DistillationRow, batches
from evolve_dag.distillation.forward import Forward
from evolve_dag.distillation.parallel import Processes
from evolve_dag.distillation.sharding import Sharded
from evolve_dag.errors import ConfigError, ModelError, exhausted, first_line, out_of_memory
from evolve_dag.inference.quantization import is_quantized

if TYPE_CHECKING:
    from torch import nn

log = logging.getLogger(__name__)

BETAS = (0.9, 0.99)
"""Adam: runs are tens to hundreds of steps, so the second moment must forget faster than the usual 0.999."""

FINAL_FRACTION = 0.1
"""Learning rate of the last step, as a share of the peak."""

COUNTERS = ("round", "refreshes", "empty_refreshes")
"""What a checkpoint keeps of a run beside weights, moments and curve."""

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
    """Why nothing was learned or training ended early, why a checkpoint was not used, that memory ran out."""


Resample = Callable[[int, "nn.Module"], list[DistillationRow]]
"""(round from 1, student with its adapter, a copy) -> rows on fresh student trajectories, scored by the
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
    training: int = 1,
    threads: int = 1,
    device: str = "cpu",
    tokens_per_pass: int = 8192,
    activation_checkpointing: bool = False,
    shard: bool = False,
    base: str = "",
    checkpoint: Path | None = None,
    resample: Resample | None = None,
    on_step: Callable[[CurvePoint, int], None] | None = None,
) -> DistillationResult:
    """Train the student and save its adapter.

    The same model, rows, settings and seed give the same bytes on the same number of threads, also where a training was
    killed at any moment and goes on from ``checkpoint``. Where torch.distributed is set up, all its processes call this with
    the same arguments: they share the work, and the first one writes the files.

    Args:
        model: base model, or a folder that ``from_pretrained`` reads. A model given as an object comes back as it was.
        rows: may be empty; then the adapter that training would have begun with is saved and the result says so.
        out: folder for the adapter.
        init_adapter: adapter(k-1); None starts with one that changes nothing.
        training: how many trainings the adapter has had, this one included; the learning rate falls by
            ``learning_rate_decay`` with each.
        tokens_per_pass: most distinct tokens of one forward and backward pass (more if one row alone is longer); the gradients
            of a batch are added up over as many as it takes. Where memory runs out, passes are halved once.
        activation_checkpointing: see :class:`Forward`; the same adapter from less memory and more time.
        shard: every process keeps a part of the base model's weights (:mod:`evolve_dag.distillation.sharding`), and a model
            given as an object does not come back. Where memory runs out, training ends: none can halve its passes alone.
        base: identity of the base model, written into the adapter's config.
        checkpoint: folder in which the state is kept while training (how often: :meth:`Checkpoint.due`). What a killed
            training of the same arguments left there is used; what another left is refused, and the result's note says so.
        resample: called ``refresh - 1`` times at even points of training (METHOD: on_policy).
        on_step: called after every step with the point and the number of steps in all; for those of an earlier, killed
            process as well.

    Raises:
        ModelError: the model cannot be loaded, more than 3 batches in a row gave no finite gradient, or memory ran out again.
        AlignmentError: a row has no teacher although the divergence needs one.
        ConfigError, StoreError: ``init_adapter`` does not fit or is corrupt.
    """
    import torch

    from evolve_dag.inference.lora import fuse

    require_teachers(rows, regime.divergence)
    if shard:
        _require_can_be_spread(model, resample)
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
    wrapped = attach(
        given if shard else given.to(device), rank=settings.rank, alpha=settings.alpha, seed=seed, init_adapter=init_adapter
    )
    was_training = given.training
    try:
        # Dropout of the base would make the student another policy than the one that acts: none of it.
        wrapped.eval()
        fuse(wrapped)
        recompute = activation_checkpointing
        forward = Sharded(wrapped, device=device, recompute=recompute) if shard else Forward(wrapped, recompute=recompute)
        run = _Run(wrapped, forward, rows, settings, regime, seed, training, threads, tokens_per_pass)
        kept = None
        if checkpoint is not None:
            decided = {"settings": settings.model_dump(), "regime": regime.model_dump(), "seed": seed, "training": training}
            kept = Checkpoint(checkpoint, fingerprint(rows, run.parameters, base=base, **decided))
        if rows:
            run.train(resample, kept, on_step or (lambda point, total: None))
        if run.processes.leads:
            save_adapter(wrapped, out, base=base)
    finally:
        if not shard:
            detach(wrapped)
            given.to(home).train(was_training)
        torch.set_num_threads(threads_before)
    curve = run.curve
    skipped = sum(point.skipped for point in curve)
    unchanged = skipped == len(curve)
    notes = [kept.refused if kept is not None else "", run.halved, run.enough]
    if unchanged:
        notes.append("no trajectory was kept" if not rows else "every batch was skipped")
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
        note="; ".join(filter(None, notes)),
    )


def _require_can_be_spread(model: nn.Module | Path | str, resample: Resample | None) -> None:
    if Processes.here().count == 1:
        raise ConfigError(
            "the base model is to be spread over processes, and there is one",
            "start several (torchrun --nproc-per-node N), or set shard to false",
        )
    if resample is not None:
        raise ConfigError(
            "a base model that is spread over processes cannot sample trajectories while it is trained",
            "set distillation.refresh to 1, or shard to false",
        )
    if is_quantized(model):
        raise ConfigError(
            "a base model in 4 bit cannot be spread over processes",
            "set shard to false (every process keeps all of it), or quantize to none",
        )


def learning_rate(settings: DistillationSettings, step: int, total: int, training: int = 1) -> float:
    """Learning rate of 0-based ``step`` of ``total``: warm-up, linear decay to 10%, and a factor per training."""
    peak = settings.learning_rate * settings.learning_rate_decay ** (training - 1)
    warm = min(1.0, (step + 1) / settings.warmup_steps) if settings.warmup_steps else 1.0
    progress = step / (total - 1) if total > 1 else 0.0
    return peak * warm * (1.0 - (1.0 - FINAL_FRACTION) * progress)


def load_model(path: Path | str, dtype: str = "float32", quantize: str = "none", device: str = "cpu") -> nn.Module:
    """A causal language model from a folder.

    Args:
        quantize: how it is kept (``models.policy.quantize``).
        device: where it is made.

    Raises:
        ModelError: transformers cannot read it, or it cannot be kept so here.
    """
    from evolve_dag.inference.quantization import pretrained, require

    require(quantize, device)
    try:
        model: nn.Module = pretrained(path, dtype=dtype, quantize=quantize, device=device)
        return model
    except ModelError:
        raise
    except Exception as error:  # whatever transformers, safetensors or the config parser raise: it is not loadable
        if out_of_memory(error):
            raise exhausted(str(path), error) from error
        raise ModelError(f"{path}: not a model that transformers can load: {error}", "check models.policy.path") from error


class _Run:
    """One training: optimizer, schedule and counters."""

    def __init__(
        self,
        wrapped: Any,
        forward: Forward,
        rows: Sequence[DistillationRow],
        settings: DistillationSettings,
        regime: Regime,
        seed: int,
        training: int,
        threads: int,
        tokens_per_pass: int,
    ) -> None:
        import torch

        self.wrapped = wrapped
        self.forward = forward
        self.rows = rows
        self.settings = settings
        self.regime = regime
        self.options = {key: getattr(settings, key) for key in part("divergence", regime.divergence).keys}
        self.seed = seed
        self.training = training
        self.threads = threads
        self.tokens_per_pass = tokens_per_pass
        self.processes = Processes.here()
        self.halved = ""
        """That and where passes were halved; '' as long as memory was enough."""
        self.enough = ""
        """That training ended early, and why."""
        self.parameters = {name: one for name, one in wrapped.named_parameters() if one.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=settings.learning_rate,
            betas=BETAS,
            weight_decay=settings.weight_decay,
            **_stepping(next(iter(self.parameters.values())).device.type),
        )
        self.curve: list[CurvePoint] = []
        self.round = 0
        self.rows_of = 0
        """Round in which ``rows`` were sampled."""
        self.refreshes = 0
        self.empty_refreshes = 0

    def train(
        self,
        resample: Resample | None,
        checkpoint: Checkpoint | None,
        on_step: Callable[[CurvePoint, int], None],
    ) -> None:
        """Train to the end, from where ``checkpoint`` stands if there is one."""
        passes = list(accumulate(len(self._batches(epoch)) for epoch in range(self.settings.epochs)))
        total = passes[-1]
        state = checkpoint.load() if checkpoint is not None else None
        if checkpoint is not None and state is not None:
            self._restore(state)
            for point in self.curve:
                on_step(point, total)
        for number in range(self.round, self.settings.refresh):
            if number > self.round and resample is not None:
                self._refresh(number, resample, checkpoint)
            # Where no round brought other rows, passes over those that are there go on: none of them may be left out.
            began, until = (total * at // self.settings.refresh for at in (self.rows_of, number + 1))
            for rows in islice(self._stream(), len(self.curve) - began, until - began):
                if self._learned(passes):
                    return
                with self.forward.ready():
                    self.curve.append(self._step(rows, len(self.curve), total, number))
                self._check()
                if checkpoint is not None and self.processes.leads and checkpoint.due(len(self.curve), total):
                    checkpoint.save(self._state(), len(self.curve))
                on_step(self.curve[-1], total)

    def _learned(self, passes: Sequence[int]) -> bool:
        """Whether a pass has just ended that had little left to learn.

        Args:
            passes: number of steps after which each ends.
        """
        target, taken = self.settings.target_divergence, len(self.curve)
        if not target or taken not in passes:
            return False
        number = passes.index(taken)
        own = self.curve[passes[number - 1] if number else 0 :]
        found = [point.divergence for point in own if not point.skipped and point.divergence is not None]
        if not found or (mean := sum(found) / len(found)) > target:
            return False
        self.enough = f"ended after {number + 1} of {len(passes)} passes, with a mean divergence of {mean:.2g} nats"
        return True

    def _check(self) -> None:
        last = self.curve[-MAX_SKIPPED_IN_A_ROW - 1 :]
        if len(last) > MAX_SKIPPED_IN_A_ROW and all(point.skipped for point in last):
            raise ModelError(
                f"training step {last[-1].step}: {len(last)} batches in a row without a finite loss and gradient "
                f"(loss {last[-1].loss}, gradient norm {last[-1].gradient_norm})",
                "lower distillation.learning_rate, or set models.policy.dtype to float32",
            )

    def _batches(self, epoch: int) -> list[list[int]]:
        return batches(self.rows, self.settings.tokens_per_batch, self.seed, epoch)

    def _stream(self) -> Iterator[list[DistillationRow]]:
        """Whole epochs, one behind the other, without end."""
        for epoch in count():
            for chosen in self._batches(epoch):
                yield [self.rows[index] for index in chosen]

    def _refresh(self, number: int, resample: Resample, checkpoint: Checkpoint | None) -> None:
        import torch

        from evolve_dag.inference.lora import merge

        fresh = resample(number, merge(copy.deepcopy(self.wrapped)))
        torch.set_num_threads(self.threads)  # whoever sampled may have set its own
        require_teachers(fresh, self.regime.divergence)
        self.round = number
        self.refreshes += 1
        if fresh:
            self.rows, self.rows_of = fresh, number
        else:
            self.empty_refreshes += 1
        if checkpoint is not None:  # sampling is dear: keep it at once
            checkpoint.save_rows(number, fresh)
            checkpoint.save(self._state(), len(self.curve))

    def _state(self) -> State:
        tensors = {f"weight/{name}": one for name, one in self.parameters.items()}
        for name, one in self.parameters.items():
            tensors |= {f"{key}/{name}": value for key, value in self.optimizer.state[one].items()}
        facts = {name: getattr(self, name) for name in COUNTERS}
        facts["curve"] = [asdict(point) for point in self.curve]
        return State(tensors, facts, self.rows_of, self.rows if self.rows_of else ())

    def _restore(self, state: State) -> None:
        import torch

        with torch.no_grad():
            for name, one in self.parameters.items():
                one.copy_(state.tensors[f"weight/{name}"])
        for name, one in self.parameters.items():
            moments = {key: state.tensors.get(f"{key}/{name}") for key in ("step", "exp_avg", "exp_avg_sq")}
            if moments["step"] is not None:
                self.optimizer.state[one] = {key: value.to(one.device) for key, value in moments.items() if value is not None}
        for name in COUNTERS:
            setattr(self, name, state.facts[name])
        self.curve = [CurvePoint(**point) for point in state.facts["curve"]]
        if state.rows_of:
            self.rows, self.rows_of = state.rows, state.rows_of

    def _step(self, rows: Sequence[DistillationRow], step: int, total: int, number: int) -> CurvePoint:
        import torch

        started = time.perf_counter()
        rate = learning_rate(self.settings, step, total, self.training)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        weight = sum(self._weight(row) * row.action_tokens for row in rows)
        sums = self._gradients(self.processes.own(rows), weight, step)
        sums = _Sums(*self.processes.add_up(self.parameters.values(), astuple(sums)))
        norm = math.nan
        if math.isfinite(sums.loss):
            norm = float(torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.gradient_clip))
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

    def _gradients(self, rows: Sequence[DistillationRow], weight: float, step: int) -> _Sums:
        """:meth:`_accumulate` from nothing; where memory runs out, once more in smaller passes.

        Raises:
            ModelError: memory ran out a second time, or no pass can be smaller.
        """
        while True:
            self.optimizer.zero_grad(set_to_none=True)
            try:
                return self._accumulate(rows, weight)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                told = first_line(error)
            self._halve(rows, step, told)  # out of the handler: the traceback held every tensor of the pass

    def _halve(self, rows: Sequence[DistillationRow], step: int, told: str) -> None:
        ids, tokens = [row.row.ids for row in rows], self.tokens_per_pass
        before = len(self.forward.passes(ids, tokens))
        while tokens > 1 and len(self.forward.passes(ids, tokens)) == before:
            tokens //= 2
        if self.halved or tokens == 1 or self.forward.collective:  # the others wait in the middle of this pass
            again = " again" if self.halved else ""
            raise ModelError(
                f"training step {step}: memory ran out{again} in passes of {self.tokens_per_pass} tokens: {told}",
                "set runtime.activation_checkpointing, lower runtime.tokens_per_pass or rollout.max_tokens, or free memory "
                "(`evolve doctor` with the experiment file calculates what it takes)",
            )
        self.halved = f"out of memory at step {step}: passes of {tokens} tokens in place of {self.tokens_per_pass} since then"
        log.warning("%s", self.halved)
        self.tokens_per_pass = tokens

    def _weight(self, row: DistillationRow) -> float:
        """What one of its action tokens counts for."""
        return self.settings.retention_weight if row.retention else 1.0

    def _accumulate(self, rows: Sequence[DistillationRow], weight: float) -> _Sums:
        """Add up the gradients of ``rows``, forward pass by forward pass.

        A pass whose loss is not finite ends it, unless others wait for the rest: the step is lost anyway.

        Args:
            weight: of the whole batch, its action tokens added up.
        """
        import torch

        sums = _Sums()
        passes = self.forward.passes([row.row.ids for row in rows], self.tokens_per_pass)
        collective = self.forward.collective
        idle = self.processes.most(len(passes), self.forward.device) - len(passes) if collective else 0
        # Through float16 gradients go back undivided: what one token among thousands adds would be 0 there.
        raised = weight if self.forward.head.weight.dtype == torch.float16 else 1.0
        for chosen in passes:
            here = [rows[index] for index in chosen]
            found = row_losses(self.forward, here, self.regime.divergence, **self.options)
            counts = torch.tensor([row.action_tokens for row in here])
            weight_N = torch.tensor([self._weight(row) for row in here]).repeat_interleave(counts).to(found.loss)
            retention_N = torch.tensor([row.retention for row in here]).repeat_interleave(counts).to(found.loss.device)
            loss_N = found.loss * weight_N / weight
            loss = loss_N.sum()
            loss.backward(torch.full_like(loss, raised))
            sums.loss += float(loss.detach())  # after the way back was asked for, since a GPU is waited for here
            sums.retention_loss += float(loss_N[retention_N].sum().detach())
            sums.divergence += float(found.divergence[~retention_N].sum())
            if not (math.isfinite(sums.loss) or collective):
                break
        for _ in range(idle):
            self.forward.idle()
        if raised != 1:
            for one in self.parameters.values():
                if one.grad is not None:
                    one.grad /= raised
        return sums


def _stepping(device: str) -> dict[str, bool]:
    """How Adam goes over its matrices: on a CPU several at once, the same bytes as one after the other in half the time; on a
    GPU all in one kernel."""
    return {"fused": True} if device == "cuda" else {"foreach": True}


@dataclass(slots=True)
class _Sums:
    """What one optimizer step adds up."""

    loss: float = 0.0
    retention_loss: float = 0.0
    divergence: float = 0.0
    """Of the clean rows, over their tokens."""
