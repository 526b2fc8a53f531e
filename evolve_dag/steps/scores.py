"""Step ``scores``: held-out results, reported, and development results, for the gate (METHOD step 6).

On held-out tasks: ``without`` and ``with`` experience in context, ``greedy``; of the policy that entered the first iteration
``base`` and ``base_at_<temperature>``; of the policy that entered any iteration, with E(k) in context, ``ceiling``.

Every condition draws from the same random numbers (``evaluation.seed``), so two policies on the same task differ by
what they are, not by luck. Held-out tasks decide nothing.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

from evolve_dag.config.schema import Experiment
from evolve_dag.evaluation.gate import LEAST_JUDGED
from evolve_dag.evaluation.metrics import counts, evaluate_summary, score_trajectories
from evolve_dag.records import Score, Trajectory
from evolve_dag.seeds import stable_hash
from evolve_dag.steps.body import StepContext
from evolve_dag.steps.policies import (
    INJECTION_KEYS,
    TASK_KEYS,
    by_id,
    experience_source,
    judged,
    open_policy,
    open_pool,
    roll_out,
    selector_statistics,
)
from evolve_dag.steps.spec import Check, StepSpec, Table, Verdict
from evolve_dag.store.artifacts import Artifact
from evolve_dag.store.frames import SCORES, save_trajectories, scores_to_frame
from evolve_dag.tasks.suites import Split, check_disjoint, load_split

DEVELOPMENT = ("development_candidate", "development_champion")
"""Conditions that the gate compares."""
BASE_AT = "base_at_"
"""Begins the conditions of the base policy at another temperature than that of the rollouts; the temperature follows."""


def run(context: StepContext) -> None:
    """Evaluate the candidate (adapter(k), E(k)), and on development tasks the champion too."""
    experiment = context.experiment
    check_disjoint(experiment)
    evaluation = experiment.evaluation
    held_out, development = (
        load_split(experiment, "held_out", context.roles),
        load_split(experiment, "development", context.roles),
    )
    pool = open_pool(context.inputs["experience"])
    trajectories: list[Trajectory] = []
    scores: list[Score] = []
    summary: dict[str, object] = {}

    def evaluate(model: object, condition: str, split: Split, temperature: float | None = None, **how: object) -> None:
        seed = stable_hash("evaluation", evaluation.seed)
        found = roll_out(
            context,
            split,
            model,
            label=condition.replace("_", " "),
            seed=seed,
            group_size=1 if temperature == 0 else evaluation.rollouts,  # argmax says the same each time
            temperature=temperature,
            **how,  # type: ignore[arg-type]
        )
        tasks = by_id(split.tasks)
        scores.extend(score_trajectories(found, tasks, condition))
        summary[condition] = evaluate_summary(found, tasks, evaluation)
        trajectories.extend(found)

    with open_policy(context.store, context.entering.adapter, context.roles) as model:
        if context.iteration == 1:
            evaluate(model, "base", held_out)
            for temperature in dict.fromkeys(evaluation.base_temperatures):
                if temperature != experiment.rollout.temperature:
                    evaluate(model, f"{BASE_AT}{temperature:g}", held_out, temperature=temperature)
        if evaluation.ceiling and (source := experience_source(experiment, pool, context.roles)) is not None:
            evaluate(model, "ceiling", held_out, experience=source)
        evaluate(model, "development_champion", development)
    with open_policy(context.store, context.inputs["adapter"].digest, context.roles) as model:
        source = experience_source(experiment, pool, context.roles)
        evaluate(model, "development_candidate", development)
        evaluate(model, "without", held_out)
        if evaluation.with_experience and source is not None:
            evaluate(model, "with", held_out, experience=source)
        if evaluation.greedy:
            evaluate(model, "greedy", held_out, temperature=0.0)
    folder = context.build.path
    scores_to_frame(scores).write_parquet(folder / SCORES)
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    save_trajectories(folder, _distinct(trajectories, scores))
    note = counts(trajectories)
    context.build.note(
        tokens=note["tokens"],
        trajectories=note["trajectories"],
        judged=note["judged"],
        failed=note["failed"],
        conditions=list(summary),
        **selector_statistics(source),
    )


def _distinct(trajectories: list[Trajectory], scores: list[Score]) -> list[Trajectory]:
    """The same trajectories with their condition in the id: one task is rolled out under several."""
    from dataclasses import replace

    return [replace(t, id=f"{s.condition}/{t.id}") for t, s in zip(trajectories, scores, strict=True)]


def examine(artifact: Artifact, experiment: Experiment) -> Iterator[Verdict]:
    """Whether enough could be judged."""
    yield judged(artifact, SCORES)


SPEC = StepSpec(
    "scores",
    "Held-out results of the candidate, without experience (internalized) and with it (in context), with intervals.",
    version="6",
    config=("evaluation", *INJECTION_KEYS, "tasks.development", "tasks.held_out", *TASK_KEYS),
    inputs=("policy", "experience", "adapter"),
    run=run,
    kinds=frozenset({"parquet", "polars"}),
    checks=(Check("judged", f"At least {LEAST_JUDGED:.0%} of the episodes could be judged."),),
    examine=examine,
    tables=(
        Table(
            SCORES,
            ("task_id", "condition", "reward", "premature", "status", "turns", "answer"),
            meanings={"condition": "`without` or `with` experience in context, `greedy`; `development_*` decide in the gate."},
        ),
    ),
)
