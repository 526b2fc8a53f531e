"""Step ``scores``: held-out results, reported, and development results, for the gate (METHOD step 6).

Every condition draws from the same random numbers (``evaluation.seed``), so two policies on the same task differ by
what they are, not by luck. Held-out tasks decide nothing, and every iteration draws the same for them; for development tasks
every iteration draws anew, so that its evidence is new.
"""

from __future__ import annotations

import json

from evolve_dag.errors import StoreError
from evolve_dag.evaluation.metrics import counts, evaluate_summary, score_trajectories
from evolve_dag.records import Score, Trajectory
from evolve_dag.seeds import stable_hash
from evolve_dag.steps.body import StepContext
from evolve_dag.steps.policies import (
    adapter_folder,
    by_id,
    experience_source,
    open_policy,
    open_pool,
    roll_out,
    selector_statistics,
)
from evolve_dag.store.frames import save_trajectories, scores_to_frame
from evolve_dag.tasks.suites import Split, check_disjoint, load_split

DEVELOPMENT = ("development_candidate", "development_best")
"""Conditions that the gate compares: the candidate, and the best champion so far."""
AGAINST = "against"
"""Entry of the summary: iteration of the champion that the candidate is compared with."""


def run(context: StepContext) -> None:
    """Evaluate the candidate (adapter(k), E(k)), and on development tasks the best champion so far too."""
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

    def record(found: list[Trajectory], condition: str, split: Split) -> None:
        tasks = by_id(split.tasks)
        scores.extend(score_trajectories(found, tasks, condition))
        summary[condition] = evaluate_summary(found, tasks, evaluation)
        trajectories.extend(found)

    def evaluate(model: object, condition: str, split: Split, **how: object) -> list[Trajectory]:
        fresh = (context.iteration,) if split is development else ()
        found = roll_out(
            context,
            split,
            model,
            label=condition.replace("_", " "),
            seed=stable_hash("evaluation", evaluation.seed, *fresh),
            group_size=1 if condition == "greedy" else evaluation.rollouts,
            **how,  # type: ignore[arg-type]
        )
        record(found, condition, split)
        return found

    against, reference = _reference(context)
    with open_policy(context.store, reference, context.roles) as model:
        if context.iteration == 1:
            evaluate(model, "base", held_out)
        of_best = evaluate(model, "development_best", development)
    untrained = bool(context.inputs["adapter"].summary.get("unchanged")) and reference == context.entering.adapter
    with open_policy(context.store, context.inputs["adapter"].digest, context.roles) as model:
        source = experience_source(experiment, pool, context.roles)
        if untrained:  # the same weights and the same draws give the same rollouts
            record(of_best, "development_candidate", development)
        else:
            evaluate(model, "development_candidate", development)
        evaluate(model, "without", held_out)
        if evaluation.with_experience and source is not None:
            evaluate(model, "with", held_out, experience=source)
        if evaluation.greedy:
            evaluate(model, "greedy", held_out, greedy=True)
    folder = context.build.path
    scores_to_frame(scores).write_parquet(folder / "scores.parquet")
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    save_trajectories(folder, _distinct(trajectories, scores))
    note = counts(trajectories)
    context.build.note(
        tokens=note["tokens"],
        trajectories=note["trajectories"],
        judged=note["judged"],
        failed=note["failed"],
        conditions=list(summary),
        **{AGAINST: against},
        **selector_statistics(source),
    )


def _reference(context: StepContext) -> tuple[int, str | None]:
    """Iteration and adapter of the best champion so far; of the champion, where that one is gone from the store."""
    standing = context.entering.standing
    try:
        adapter_folder(context.store, standing.adapter)
    except StoreError:
        return standing.champion, context.entering.adapter
    return standing.best, standing.adapter


def _distinct(trajectories: list[Trajectory], scores: list[Score]) -> list[Trajectory]:
    """The same trajectories with their condition in the id: one task is rolled out under several."""
    from dataclasses import replace

    return [replace(t, id=f"{s.condition}/{t.id}") for t, s in zip(trajectories, scores, strict=True)]
