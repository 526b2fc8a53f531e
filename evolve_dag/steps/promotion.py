"""Step ``promotion``: the gate's recorded decision (METHOD step 7).

On ``promote`` the candidate becomes the champion, on ``keep`` the champion stays, on ``restore`` the best one comes back.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace

from evolve_dag.config.schema import Experiment
from evolve_dag.errors import AwayError, StoreError
from evolve_dag.evaluation.gate import GateDecision, decide, gate_from_json, gate_to_json
from evolve_dag.experience.pool import Proposal
from evolve_dag.records import Finding, PolicyRef, Standing
from evolve_dag.steps.body import StepContext
from evolve_dag.steps.policies import findings_of, open_pool, same_weights
from evolve_dag.steps.scores import AGAINST, DEVELOPMENT
from evolve_dag.steps.spec import Check, StepSpec, Verdict
from evolve_dag.store.artifacts import Artifact
from evolve_dag.store.frames import scores_from_frame
from evolve_dag.store.layout import DECISION, SCORES


def run(context: StepContext) -> None:
    """Compare candidate, best champion and champion on the development tasks and record what becomes of it."""
    scored = context.inputs["scores"]
    scores = scores_from_frame(scored.frame(SCORES))
    candidate, best, champion = ([s for s in scores if s.condition == condition] for condition in DEVELOPMENT)
    standing, gone = context.entering.standing, list[str]()
    if scored.summary[AGAINST] != standing.best:
        gone.append(f"{_gone(standing)}: the champion is the best from now on")
        standing = _champion_alone(context.entering)
    experiment, iteration = context.experiment, context.iteration
    adapters = context.inputs["adapter"].digest, standing.adapter, context.entering.adapter
    tonight, of_best, of_champion = (same_weights(context.store, one) for one in adapters)
    gate = decide(
        candidate,
        best,
        experiment.gate,
        experiment.seed,
        iteration=iteration,
        standing=standing,
        champion=champion,
        same=tonight == of_best,
        unchanged=tonight == of_champion,
    )
    if gate.decision == "restore" and (lost := _missing(context, gate.standing)):
        because = f"{_gone(gate.standing)} ({lost}), so the champion stays and is the best from now on"
        gate = replace(gate, decision="keep", reasons=(*gate.reasons, because), standing=_champion_alone(context.entering))
    leaving = _leaving(context, gate)
    if gate.standing.best == iteration:
        standing = replace(gate.standing, adapter=leaving.adapter, experience=leaving.experience)
        gate = replace(gate, standing=standing)
    gate = replace(gate, reasons=(*gate.reasons, *gone))
    policy = {key: value for key, value in leaving.content.items() if key != "iteration"}
    (context.build.path / DECISION).write_text(json.dumps({**gate_to_json(gate), "policy": policy}, indent=1) + "\n")
    after = gate.standing
    context.build.note(decision=gate.decision, reasons=list(gate.reasons), champion=after.champion, best=after.best)


def next_policy(promotion: Artifact, iteration: int) -> PolicyRef:
    """policy(k+1) as the promotion of iteration k recorded it."""
    content = promotion.json(DECISION)
    recorded = content["policy"]
    findings = tuple(Finding(**finding) for finding in recorded.get("findings", ()))
    policy = PolicyRef(iteration, **(recorded | {"findings": findings}))
    if "standing" in content:
        return replace(policy, standing=gate_from_json(content).standing)
    return replace(policy, standing=Standing(adapter=policy.adapter, experience=policy.experience))


def _leaving(context: StepContext, gate: GateDecision) -> PolicyRef:
    """The policy that the decision leaves; item ids count on, whoever's pool it has, and so does what was withdrawn."""
    pool, tonight = open_pool(context.inputs["experience"]), findings_of(context.inputs["contexts"])
    entering = replace(context.entering, next_item=pool.next_number)
    if gate.decision == "promote":
        adapter, experience = (context.inputs[kind].digest for kind in ("adapter", "experience"))
        return replace(entering, adapter=adapter, experience=experience, findings=tonight)
    found = (*entering.findings, *tonight)
    if gate.decision == "restore":  # what was found about habits was found of another policy
        marked = (Finding("withdraw", i.id, f"withdrawn in iteration {i.withdrawn}") for i in pool.items if i.withdrawn)
        found = tuple(finding for finding in (*marked, *found) if finding.operation == "withdraw")
        entering = replace(entering, adapter=gate.standing.adapter, experience=gate.standing.experience)
    return replace(entering, findings=_unentered(context, entering.experience, found))


def _unentered(context: StepContext, experience: str | None, found: Sequence[Finding]) -> tuple[Finding, ...]:
    """Of several findings about an item the last, where its item is in the pool and it does not say so already."""
    if experience is None or not found:
        return ()
    pool, last = open_pool(context.store.open("experience", experience)), {f.item_id: f for f in found}
    proposals = [Proposal(finding.operation, item_id=item) for item, finding in last.items()]
    entered = {edit.item_id for edit in pool.apply(proposals, iteration=context.iteration).edits}
    return tuple(finding for item, finding in last.items() if item in entered)


def _champion_alone(entering: PolicyRef) -> Standing:
    """The champion as the best, since the best one cannot come back."""
    champion = entering.standing.champion
    return Standing(champion, champion, entering.adapter, entering.experience)


def _missing(context: StepContext, best: Standing) -> str:
    """What the store lacks of the best champion, named without its path; empty where it has everything.

    Raises:
        AwayError: whether it lacks something cannot be told now.
    """
    for kind, digest in (("adapter", best.adapter), ("experience", best.experience)):
        if digest is None:
            continue
        try:
            context.store.open(kind, digest).verify()
        except AwayError:
            raise
        except StoreError:
            return f"{kind} {digest[:8]}"
    return ""


def _gone(best: Standing) -> str:
    return f"the best champion so far, of iteration {best.best}, cannot come back: it is gone from the store, or damaged"


def examine(artifact: Artifact, experiment: Experiment) -> Iterator[Verdict]:
    """Whether the candidate passed."""
    gate = gate_from_json(artifact.json(DECISION))
    evidence = {name: float(f"{value:.4g}") for name, value in gate.evidence.items() if value is not None}
    restored = gate.decision == "restore"
    yield Verdict("gate", gate.decision == "promote", evidence, "; ".join(gate.reasons), serious=restored)


SPEC = StepSpec(
    "promotion",
    "The gate's decision with its reasons: `promote`, `keep` (the champion stays) or `restore` (the best champion so far comes "
    "back). Commits the policy of the next iteration.",
    version="11",
    config=("gate", "seed"),
    inputs=("policy", "experience", "contexts", "adapter", "scores"),
    standing=tuple(field.name for field in fields(Standing)),
    run=run,
    kinds=frozenset({"json"}),
    checks=(Check("gate", "The candidate passed the gate; otherwise the champion stays, or the best one so far comes back."),),
    examine=examine,
    hidden=frozenset({"reasons"}),
)
