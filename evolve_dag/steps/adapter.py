"""Step ``adapter``: context distillation into LoRA weights (METHOD step 5)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from math import isfinite
from typing import TYPE_CHECKING, Any

from evolve_dag.agent.rollouts import gather_rollouts
from evolve_dag.config.parts import CHOICES, part
from evolve_dag.config.schema import Experiment
from evolve_dag.distillation.alignment import select_rows
from evolve_dag.distillation.dataset import DistillationRow, load_contexts, sharpened
from evolve_dag.distillation.launch import Request, train
from evolve_dag.distillation.trainer import CurvePoint
from evolve_dag.inference.folders import model_folder
from evolve_dag.inference.freed import give_back
from evolve_dag.records import Task
from evolve_dag.seeds import stable_hash
from evolve_dag.steps.body import Silent, StepContext
from evolve_dag.steps.contexts import DRILLS, RETENTION, score
from evolve_dag.steps.policies import (
    ANSWERED,
    FRONTIER,
    adapter_folder,
    answered,
    checked_pool,
    closing,
    experience_source,
    open_policy,
    open_teacher,
    require_judged,
    teacher_views,
    trainings,
)
from evolve_dag.steps.spec import Check, StepSpec, Table, Verdict
from evolve_dag.store.artifacts import Artifact
from evolve_dag.store.layout import ADAPTER_WEIGHTS, CURVE
from evolve_dag.tasks.suites import Split, load_split

if TYPE_CHECKING:
    from torch import nn

MAX_SKIPPED = 0.1
"""Largest share of optimizer steps without a finite gradient."""


def run(context: StepContext) -> None:
    """Train the student, which starts from policy(k), on the stored contexts."""
    import polars as pl

    experiment, entering = context.experiment, context.entering
    context.inputs["contexts"].verify()
    contexts = context.inputs["contexts"].path
    rows = load_contexts(contexts)
    nothing_taught = not any(c.injected for row in rows for c in row.contexts)
    rows = _sharp(experiment, rows + load_contexts(contexts / RETENTION) + load_contexts(contexts / DRILLS))
    if nothing_taught and part("divergence", experiment.regime.divergence).loss is not None:
        rows = []  # teacher and student are one: Adam would turn rounding noise into full steps
    settings = experiment.models.policy
    started = False

    def on_step(point: CurvePoint, total: int) -> None:
        nonlocal started
        if not started:
            context.progress.start("distillation", total)
            started = True
        context.progress.advance()

    folder = context.build.path
    resample = _Resample(context) if experiment.distillation.refresh > 1 else None
    request = Request(
        model=model_folder(settings),
        out=folder,
        settings=experiment.distillation,
        regime=experiment.regime,
        dtype=settings.dtype,
        quantize=settings.quantize,
        init_adapter=adapter_folder(context.store, entering.adapter),
        seed=experiment.seed,
        training=1 + trainings(context.store, entering.adapter),
        base=entering.base,
        checkpoint=context.build.checkpoint("training"),
    )
    result = train(request, rows, experiment.runtime, resample=resample, on_step=on_step)
    give_back()
    if started:
        context.progress.finish()
    curve = pl.DataFrame([asdict(point) for point in result.curve], schema=_curve_schema())
    curve.write_parquet(folder / CURVE)
    losses = [p.loss for p in result.curve if not p.skipped]
    divergences = [p.divergence for p in result.curve if not p.skipped and p.divergence is not None]
    context.build.note(
        rows=result.rows,
        kept=context.inputs["contexts"].summary["kept"],
        action_tokens=result.action_tokens,
        tokens_trained=result.tokens,
        steps=len(result.curve),
        skipped=result.skipped,
        refreshes=result.refreshes,
        unchanged=result.unchanged,
        note=_note(context.inputs["contexts"], nothing_taught and not rows) or result.note,
        loss_first=_mean(losses[:5]),
        loss_last=_mean(losses[-5:]),
        divergence_first=_mean(divergences[:5]),
        divergence_last=_mean(divergences[-5:]),
        tokens=resample.tokens if resample else 0,
    )


def _note(contexts: Artifact, nothing: bool) -> str:
    """Why there was nothing to learn."""
    if refusal := contexts.summary.get("not_taught"):
        return f"nothing is taught: {refusal}"
    return "no experience stood in any context" if nothing else ""


def _sharp(experiment: Experiment, rows: list[DistillationRow]) -> list[DistillationRow]:
    if part("divergence", experiment.regime.divergence).loss is None:
        return rows
    return sharpened(rows, experiment.distillation.teacher_temperature)


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _curve_schema() -> dict[str, Any]:
    import polars as pl

    real, whole = pl.Float64(), pl.Int64()
    return {
        "step": whole,
        "round": whole,
        "loss": real,
        "retention_loss": real,
        "divergence": real,
        "learning_rate": real,
        "gradient_norm": real,
        "tokens": whole,
        "action_tokens": whole,
        "tokens_per_second": real,
        "skipped": pl.Boolean(),
    }


def share_of(tasks: Sequence[Task], number: int, refresh: int) -> Sequence[Task]:
    """The tasks of round ``number``, from 1, of the ``refresh - 1`` that sample anew: all of them come about once, in shares as
    even as can be. Fewer tasks than rounds: those without a share of their own take all."""
    return tasks[number - 1 :: refresh - 1] or tasks


class _Resample:
    """Fresh student trajectories while training, scored by the teacher policy(k) (METHOD: on_policy)."""

    def __init__(self, context: StepContext) -> None:
        self.context = context
        self.journal = context.build.journal("resampled")
        self.split: Split = load_split(context.experiment, "train", context.roles)
        self.pool = checked_pool(context)

    @property
    def tokens(self) -> int:
        """Sampled in all rounds, those of a killed predecessor included; one that a kill repeated counts once."""
        return sum({record["round"]: int(record["tokens"]) for record in self.journal.records()}.values())

    def __call__(self, number: int, student: nn.Module) -> list[DistillationRow]:
        from evolve_dag.inference.transformers import TransformersModel

        experiment, context = self.context.experiment, self.context
        runtime = experiment.runtime
        actor = TransformersModel.load(
            student,
            model_folder(experiment.models.policy),
            threads=runtime.threads,
            max_batch=runtime.concurrency,
            merge=False,  # it came ready to act
        )
        tasks = share_of(self.split.tasks, number, experiment.distillation.refresh)
        with closing(actor, context.roles):
            trajectories = context.roles.run(
                gather_rollouts(
                    tasks,
                    experiment.rollout.group_size,
                    model=actor,
                    environment=self.split.environment,
                    verifier=self.split.verifier,
                    settings=experiment.rollout,
                    seed=stable_hash("refresh", experiment.seed, context.iteration, number),
                    concurrency=runtime.concurrency,
                )
            )
        student.to("meta")  # its memory is the teacher's now; whoever called still holds the module
        give_back()
        require_judged(f"trajectories sampled anew, round {number}", trajectories)
        self.journal.append({"round": number, "tokens": sum(len(step.token_ids) for t in trajectories for step in t.steps)})
        adapter = context.entering.adapter
        with ExitStack() as opened:
            policy = opened.enter_context(open_policy(context.store, adapter, context.roles))
            source = experience_source(experiment, self.pool, context.roles)
            trajectories = teacher_views(context, trajectories, source, f"teacher views, round {number}")
            kept = select_rows(trajectories, experiment.regime.rejection).kept
            if experiment.models.policy.backend != "transformers":
                opened.close()
            with open_teacher(adapter_folder(context.store, adapter), context.roles, policy) as teacher:
                scored = score(experiment, kept, teacher, Silent())
        return _sharp(experiment, [*scored.rows, *scored.retention, *scored.drills])


def examine(artifact: Artifact, experiment: Experiment) -> Iterator[Verdict]:
    """That every loss and every weight is a number, and whether who was asked did answer."""
    from safetensors.numpy import load_file

    curve = artifact.frame(CURVE)
    taken = curve.filter(~curve["skipped"])
    bad = [step for step, loss in taken.select("step", "loss").iter_rows() if loss is None or not isfinite(loss)]
    weights = load_file(artifact.file(ADAPTER_WEIGHTS))
    broken = [name for name, weight in weights.items() if not isfinite(float(abs(weight).max()))]
    skipped = curve.height - taken.height
    evidence = {"broken_tensors": broken, "optimizer_steps": curve.height, "skipped": skipped, "not_finite": bad}
    yield Verdict("finite_loss", not bad and not broken and skipped <= MAX_SKIPPED * curve.height, evidence)
    yield answered(artifact)


def _unread(experiment: Experiment) -> tuple[str, ...]:
    """What decided the contexts alone, keys of other divergences, and what concerns rows, a teacher or a sampling that are not
    there."""
    settings, divergence = experiment.distillation, part("divergence", experiment.regime.divergence)
    own = divergence.keys
    others = {key for name in CHOICES["divergence"].rows for key in part("divergence", name).keys if key not in own}
    alone = experiment.injection == "none" or not (settings.retention or settings.drills)
    weight = ("retention_weight",) if alone else ()
    sharp = ("teacher_temperature",) if divergence.loss is None else ()
    keys = tuple(f"distillation.{key}" for key in ("top_k", "retention", "drills", *weight, *sharp, *others))
    return (*keys, FRONTIER) if settings.refresh > 1 else (*keys, FRONTIER, "tasks.train")


SPEC = StepSpec(
    "adapter",
    "LoRA weights that make the student without experience act like the teacher with it, and the training curve.",
    version="10",
    config=("seed", "regime.divergence", "distillation", "tasks.train"),
    inputs=("policy", "experience", "contexts"),
    run=run,
    kinds=frozenset({"pytorch", "huggingface"}),
    iteration=True,
    unread=_unread,
    checks=(Check("finite_loss", "Every loss of the training curve is a number.", blocking=True), ANSWERED),
    examine=examine,
    tables=(
        Table(
            CURVE,
            ("step", "loss", "divergence", "learning_rate", "gradient_norm", "tokens_per_second"),
            meanings={
                "step": "Optimizer step.",
                "round": "Number of the resampling round.",
                "loss": "Nats per action token.",
                "retention_loss": "What of the loss stands on rows in which the student reads experience or a drill.",
                "divergence": "Teacher to student without experience, nats per action token.",
                "learning_rate": "At this step.",
                "gradient_norm": "Before clipping.",
                "tokens": "Tokens that went through the model.",
                "action_tokens": "Tokens that were learned from.",
                "tokens_per_second": "Speed of this step.",
                "skipped": "The gradient was not finite; the weights stayed.",
            },
        ),
    ),
)
