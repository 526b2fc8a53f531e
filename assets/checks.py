"""Asset checks: invariants read again from what was written, with the evidence.

They run inside the step's own run. A blocking one keeps what follows in that run from starting; the gate decides for
itself again in ``promotion``, which may run alone.
"""

from collections.abc import Callable, Iterator, Mapping
from math import isfinite
from typing import Any

import dagster as dg

from evolve_dag.config.schema import Experiment
from evolve_dag.evaluation.gate import LEAST_JUDGED, gate_from_json
from evolve_dag.store.artifacts import Artifact

MAX_SKIPPED = 0.1
"""Largest share of optimizer steps without a finite gradient."""

SHOWN = 20
"""Culprits that a check names."""

SPECS: Mapping[str, Mapping[str, tuple[str, bool]]] = {
    "trajectories": {"judged": (f"At least {LEAST_JUDGED:.0%} of the trajectories could be judged.", False)},
    "experience": {
        "within_cap": ("The pool holds at most `extraction.cap` items, with distinct ids.", True),
        "form": ("Every principle reads `Name: when <situation>, <strategy>.`", False),
    },
    "contexts": {
        "clean": ("No clean row of the student holds experience.", True),
        "same_actions": ("Student and teacher share the action ids: those that were sampled, token for token.", True),
    },
    "adapter": {"finite_loss": ("Every loss of the training curve is a number.", True)},
    "scores": {"judged": (f"At least {LEAST_JUDGED:.0%} of the episodes could be judged.", False)},
    "promotion": {
        "gate": ("The candidate passed the gate; otherwise the champion stays, or the best one so far comes back.", False)
    },
}
"""Step -> check -> (what it says, whether it blocks)."""


def specs(step: str) -> list[dg.AssetCheckSpec]:
    """Checks of a step's asset."""
    return [
        dg.AssetCheckSpec(name, asset=step, description=description, blocking=blocking)
        for name, (description, blocking) in SPECS.get(step, {}).items()
    ]


def evaluate(step: str, artifact: Artifact, experiment: Experiment) -> list[dg.AssetCheckResult]:
    """Results of all checks of a step."""
    return list(_EVALUATE[step](artifact, experiment)) if step in SPECS else []


def _listed(culprits: list[Any] | dict[str, Any]) -> dg.MetadataValue:
    """The first culprits; in words when there is none, since Dagster hides even an empty list behind a click."""
    if not culprits:
        return dg.MetadataValue.text("none")
    return dg.MetadataValue.json(dict(list(culprits.items())[:SHOWN]) if isinstance(culprits, dict) else culprits[:SHOWN])


def _trajectories(artifact: Artifact, experiment: Experiment) -> Iterator[dg.AssetCheckResult]:
    yield _judged(artifact, "trajectories.parquet")


def _scores(artifact: Artifact, experiment: Experiment) -> Iterator[dg.AssetCheckResult]:
    yield _judged(artifact, "scores.parquet")


def _judged(artifact: Artifact, file: str) -> dg.AssetCheckResult:
    frame = artifact.frame(file)
    known = frame["reward"].drop_nulls().len()
    share = known / frame.height if frame.height else 0.0
    failed = int((frame["status"] == "failed").sum())
    evidence = {"episodes": frame.height, "judged": known, "share": share, "failed_episodes": failed}
    return dg.AssetCheckResult(
        check_name="judged", passed=share >= LEAST_JUDGED, severity=dg.AssetCheckSeverity.WARN, metadata=evidence
    )


def _experience(artifact: Artifact, experiment: Experiment) -> Iterator[dg.AssetCheckResult]:
    from evolve_dag.experience.pool import check_principle_form
    from evolve_dag.store.frames import ITEMS, items_from_frame

    items = items_from_frame(artifact.frame(ITEMS))
    cap, distinct = experiment.extraction.cap, len({item.id for item in items})
    yield dg.AssetCheckResult(
        check_name="within_cap",
        passed=len(items) <= cap and distinct == len(items),
        metadata={"items": len(items), "distinct_ids": distinct, "cap": cap},
    )
    objections = {item.id: check_principle_form(item.text) for item in items if item.granularity == "principle"}
    wrong = {item_id: mistakes for item_id, mistakes in objections.items() if mistakes}
    yield dg.AssetCheckResult(
        check_name="form",
        passed=not wrong,
        severity=dg.AssetCheckSeverity.WARN,
        metadata={"items": len(items), "wrong": _listed(wrong)},
    )


def _contexts(artifact: Artifact, experiment: Experiment) -> Iterator[dg.AssetCheckResult]:
    from evolve_dag.distillation.dataset import load_contexts
    from evolve_dag.steps.contexts import RETENTION
    from evolve_dag.store.frames import STEPS, TRAJECTORIES, trajectories_from_frames

    artifact.verify()
    rows = load_contexts(artifact.path)
    retention = load_contexts(artifact.path / RETENTION)
    trajectories = {t.id: t for t in trajectories_from_frames(artifact.frame(TRAJECTORIES), artifact.frame(STEPS))}
    steps, other_ids, seen = 0, [], []
    for one in rows:
        trajectory = trajectories[one.row.trajectory_id]
        for context, (start, end) in zip(one.contexts, one.row.spans, strict=True):
            steps += 1
            where = f"{trajectory.id} step {context.step}"
            if one.row.ids[start:end] != trajectory.steps[context.step].token_ids:
                other_ids.append(where)
            history = trajectory.history(len(trajectory.steps))
            if context.injected.strip() and any(context.injected.strip() in message.content for message in history):
                seen.append(where)
    for one in retention:  # these hold experience by design (docs/adr/0004-retention.md): only the actions must agree
        name, _, number = one.row.trajectory_id.rpartition("@")
        [(start, end)] = one.row.spans
        if one.row.ids[start:end] != trajectories[name].steps[int(number)].token_ids:
            other_ids.append(one.row.trajectory_id)
    yield dg.AssetCheckResult(
        check_name="clean",
        passed=not seen,
        metadata={
            "trajectories": len(rows),
            "steps": steps,
            "steps_with_experience": sum(bool(context.injected) for one in rows for context in one.contexts),
            "experience_in_student_view": _listed(seen),
        },
    )
    scored = sum(len(one.teacher) for one in rows if one.teacher is not None)
    yield dg.AssetCheckResult(
        check_name="same_actions",
        passed=not other_ids,
        metadata={
            "steps": steps,
            "action_tokens": sum(one.action_tokens for one in rows),
            "teacher_distributions": scored,
            "retention_rows": len(retention),
            "other_action_ids": _listed(other_ids),
        },
    )


def _adapter(artifact: Artifact, experiment: Experiment) -> Iterator[dg.AssetCheckResult]:
    curve = artifact.frame("curve.parquet")
    taken = curve.filter(~curve["skipped"])
    bad = [step for step, loss in taken.select("step", "loss").iter_rows() if loss is None or not isfinite(loss)]
    from safetensors.numpy import load_file

    weights = load_file(artifact.file("adapter_model.safetensors"))
    broken = [name for name, weight in weights.items() if not isfinite(float(abs(weight).max()))]
    skipped = curve.height - taken.height
    yield dg.AssetCheckResult(
        check_name="finite_loss",
        passed=not bad and not broken and skipped <= MAX_SKIPPED * curve.height,
        metadata={
            "broken_tensors": _listed(broken),
            "optimizer_steps": curve.height,
            "skipped": skipped,
            "not_finite": _listed(bad),
        },
    )


def _promotion(artifact: Artifact, experiment: Experiment) -> Iterator[dg.AssetCheckResult]:
    gate = gate_from_json(artifact.json("decision.json"))
    yield dg.AssetCheckResult(
        check_name="gate",
        passed=gate.decision == "promote",
        severity=dg.AssetCheckSeverity.ERROR if gate.decision == "restore" else dg.AssetCheckSeverity.WARN,
        description="; ".join(gate.reasons),
        metadata={name: float(f"{value:.4g}") for name, value in gate.evidence.items() if value is not None},
    )


_EVALUATE: Mapping[str, Callable[[Artifact, Experiment], Iterator[dg.AssetCheckResult]]] = {
    "trajectories": _trajectories,
    "experience": _experience,
    "contexts": _contexts,
    "adapter": _adapter,
    "scores": _scores,
    "promotion": _promotion,
}
