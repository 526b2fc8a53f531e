"""Step ``promotion``: the gate's recorded decision; on ``keep`` the champion stays (METHOD step 7)."""

from __future__ import annotations

import json
from collections.abc import Iterator

from evolve_dag.config.schema import Experiment
from evolve_dag.evaluation.gate import decide, gate_from_json, gate_to_json
from evolve_dag.records import PolicyRef
from evolve_dag.steps.body import StepContext
from evolve_dag.steps.policies import open_pool
from evolve_dag.steps.scores import DEVELOPMENT
from evolve_dag.steps.spec import Check, StepSpec, Verdict
from evolve_dag.store.artifacts import Artifact
from evolve_dag.store.frames import SCORES, scores_from_frame


def run(context: StepContext) -> None:
    """Compare candidate and champion on the development tasks and record what becomes of it."""
    scores = scores_from_frame(context.inputs["scores"].frame(SCORES))
    candidate, champion = ([s for s in scores if s.condition == condition] for condition in DEVELOPMENT)
    decision = decide(candidate, champion, context.experiment.gate, context.experiment.seed)
    entering = context.entering
    promoted = decision.decision == "promote"
    leaving = {
        "base": entering.base,
        "adapter": context.inputs["adapter"].digest if promoted else entering.adapter,
        "experience": context.inputs["experience"].digest if promoted else entering.experience,
        "next_item": open_pool(context.inputs["experience"]).next_number,
    }
    content = {**gate_to_json(decision), "policy": leaving}
    (context.build.path / "decision.json").write_text(json.dumps(content, indent=1) + "\n")
    context.build.note(decision=decision.decision, reasons=list(decision.reasons))


def next_policy(promotion: Artifact, iteration: int) -> PolicyRef:
    """policy(k+1) as the promotion of iteration k recorded it."""
    leaving = promotion.json("decision.json")["policy"]
    return PolicyRef(iteration, leaving["base"], leaving["adapter"], leaving["experience"], leaving["next_item"])


def examine(artifact: Artifact, experiment: Experiment) -> Iterator[Verdict]:
    """Whether the candidate passed."""
    gate = gate_from_json(artifact.json("decision.json"))
    evidence = {name: float(f"{value:.4g}") for name, value in gate.evidence.items() if value is not None}
    yield Verdict("gate", gate.decision == "promote", evidence, "; ".join(gate.reasons))


SPEC = StepSpec(
    "promotion",
    "The gate's decision with its reasons; on `keep` the champion stays. Commits the policy of the next iteration.",
    version="2",
    config=("gate", "seed"),
    inputs=("policy", "experience", "adapter", "scores"),
    run=run,
    kinds=frozenset({"json"}),
    checks=(Check("gate", "The candidate passed the gate; otherwise the champion stays."),),
    examine=examine,
    hidden=frozenset({"reasons"}),
)
