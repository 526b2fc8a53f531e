"""Step ``adapter``: context distillation into LoRA weights (METHOD step 5)."""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from evolve_dag.agent.rollouts import run_rollouts
from evolve_dag.distillation.alignment import select_rows
from evolve_dag.distillation.dataset import DistillationRow, load_contexts
from evolve_dag.distillation.trainer import CurvePoint, distill, load_model
from evolve_dag.inference.folders import model_folder
from evolve_dag.seeds import stable_hash
from evolve_dag.steps.body import Silent, StepContext
from evolve_dag.steps.contexts import RETENTION, score, with_teacher_views
from evolve_dag.steps.policies import adapter_folder, experience_source, open_policy, open_pool, open_teacher
from evolve_dag.tasks.suites import Split, load_split

if TYPE_CHECKING:
    from torch import nn

    from evolve_dag.config.schema import Experiment


def run(context: StepContext) -> None:
    """Train the student, which starts from policy(k), on the stored contexts."""
    import polars as pl

    experiment, entering = context.experiment, context.entering
    context.inputs["contexts"].verify()
    contexts = context.inputs["contexts"].path
    rows = load_contexts(contexts)
    nothing_taught = not any(c.injected for row in rows for c in row.contexts)
    if _learns_distributions(experiment):
        # Without an item in any context teacher and student are one: Adam would turn rounding noise into full steps.
        rows = [] if nothing_taught else rows + load_contexts(contexts / RETENTION)
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
    result = distill(
        load_model(model_folder(settings), settings.dtype),
        rows,
        settings=experiment.distillation,
        regime=experiment.regime,
        out=folder,
        init_adapter=adapter_folder(context.store, entering.adapter),
        seed=experiment.seed,
        iteration=context.iteration,
        threads=experiment.runtime.threads,
        device=experiment.runtime.device,
        base=entering.base,
        checkpoint=context.build.checkpoint("training"),
        resample=resample,
        on_step=on_step,
    )
    if started:
        context.progress.finish()
    curve = pl.DataFrame([asdict(point) for point in result.curve], schema=_curve_schema())
    curve.write_parquet(folder / "curve.parquet")
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
        note="no experience stood in any context" if nothing_taught and not rows else result.note,
        loss_first=_mean(losses[:5]),
        loss_last=_mean(losses[-5:]),
        divergence_first=_mean(divergences[:5]),
        divergence_last=_mean(divergences[-5:]),
        tokens=resample.tokens if resample else 0,
    )


def _learns_distributions(experiment: Experiment) -> bool:
    """Cross-entropy learns sampled tokens; a retention row would have no anchor there (docs/adr/0004-retention.md)."""
    return experiment.regime.divergence != "cross_entropy"


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


class _Resample:
    """Fresh student trajectories while training, scored by the teacher policy(k) (METHOD: on_policy)."""

    def __init__(self, context: StepContext) -> None:
        self.context = context
        self.journal = context.build.journal("resampled")
        self.split: Split = load_split(context.experiment, "train", context.roles)
        self.pool = open_pool(context.inputs["experience"])

    @property
    def tokens(self) -> int:
        """Sampled in all rounds, those of a killed predecessor included; one that a kill repeated counts once."""
        return sum({record["round"]: int(record["tokens"]) for record in self.journal.records()}.values())

    def __call__(self, number: int, student: nn.Module) -> list[DistillationRow]:
        from evolve_dag.inference.transformers import TransformersModel

        experiment, context = self.context.experiment, self.context
        runtime = experiment.runtime
        actor = TransformersModel.load(
            student, model_folder(experiment.models.policy), threads=runtime.threads, max_batch=runtime.concurrency
        )
        refresh = experiment.distillation.refresh
        tasks = self.split.tasks[number - 1 :: refresh] or self.split.tasks
        trajectories = run_rollouts(
            tasks,
            experiment.rollout.group_size,
            model=actor,
            environment=self.split.environment,
            verifier=self.split.verifier,
            settings=experiment.rollout,
            seed=stable_hash("refresh", experiment.seed, context.iteration, number),
            concurrency=runtime.concurrency,
        )
        asyncio.run(actor.close())
        self.journal.append({"round": number, "tokens": sum(len(step.token_ids) for t in trajectories for step in t.steps)})
        adapter = context.entering.adapter
        with ExitStack() as opened:
            policy = opened.enter_context(open_policy(context.store, adapter, context.roles))
            source = experience_source(experiment, self.pool, context.roles)
            trajectories = asyncio.run(with_teacher_views(trajectories, source))
            kept = select_rows(trajectories, experiment.regime.rejection).kept
            if experiment.models.policy.backend != "transformers":
                opened.close()
            with open_teacher(experiment, adapter_folder(context.store, adapter), policy) as teacher:
                clean, retention = score(experiment, kept, teacher, Silent())
        return clean + retention if _learns_distributions(experiment) else clean
