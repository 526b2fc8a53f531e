"""Step ``scores``: held-out results, reported, and development results, for the gate (METHOD step 6).

On held-out tasks: ``without`` and ``with`` experience in context, ``greedy``; of the policy that entered the first iteration
``base`` and ``base_at_<temperature>``; of the policy that entered any iteration, with E(k) in context, ``ceiling``.

Every condition draws from the same random numbers (``evaluation.seed``), so two policies on the same task differ by
what they are, not by luck. Held-out tasks decide nothing, and every iteration draws the same for them; for development tasks
every iteration draws anew, so that its evidence is new.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from evolve_dag.config.schema import Experiment
from evolve_dag.errors import StoreError
from evolve_dag.evaluation.gate import LEAST_JUDGED
from evolve_dag.evaluation.metrics import counts, evaluate_summary, score_trajectories
from evolve_dag.records import Score, Trajectory
from evolve_dag.seeds import stable_hash
from evolve_dag.steps.body import StepContext
from evolve_dag.steps.policies import (
    INJECTION_KEYS,
    TASK_KEYS,
    adapter_folder,
    by_id,
    checked_pool,
    experience_source,
    judged,
    open_policy,
    roll_out,
    selector_statistics,
    without_choice,
)
from evolve_dag.steps.spec import Check, StepSpec, Table, Verdict
from evolve_dag.store.artifacts import Artifact
from evolve_dag.store.frames import load_trajectories, save_trajectories, scores_to_frame
from evolve_dag.store.layout import SCORES, SUMMARY
from evolve_dag.tasks.suites import Split, check_disjoint, load_split

if TYPE_CHECKING:
    from evolve_dag.experience.pool import Pool
    from evolve_dag.protocols import LanguageModel

DEVELOPMENT = OF_CANDIDATE, OF_BEST = "development_candidate", "development_best"
"""Conditions that the gate compares: the candidate, and the best champion so far."""
AGAINST = "against"
"""Entry of the summary: iteration of the champion that the candidate is compared with."""
BASE_AT = "base_at_"
"""Begins the conditions of the base policy at another temperature than that of the rollouts; the temperature follows."""


def run(context: StepContext) -> None:
    """Evaluate the candidate (adapter(k), E(k)), and on development tasks the best champion so far too."""
    experiment = context.experiment
    splits = {name: load_split(experiment, name, context.roles) for name in ("development", "held_out")}
    if context.twin is None:
        episodes, statistics = _evaluate(context, splits)
    else:
        episodes, statistics = _evaluated(context.twin)
    scores: list[Score] = []
    summary: dict[str, object] = {}
    for condition, found in episodes.items():
        tasks = by_id(splits[_split_of(condition)].tasks)
        scores.extend(score_trajectories(found, tasks, condition))
        summary[condition] = evaluate_summary(found, tasks, experiment.evaluation)
    trajectories = [trajectory for found in episodes.values() for trajectory in found]
    folder = context.build.path
    scores_to_frame(scores).write_parquet(folder / SCORES)
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    save_trajectories(folder, _distinct(trajectories, scores))
    note = counts(trajectories)
    context.build.note(
        tokens=note["tokens"],
        trajectories=note["trajectories"],
        judged=note["judged"],
        failed=note["failed"],
        conditions=list(summary),
        **statistics,
    )


def _split_of(condition: str) -> str:
    return "development" if condition in DEVELOPMENT else "held_out"


Episodes = dict[str, list[Trajectory]]
"""Condition -> its rollouts."""


@dataclass
class _Rollouts:
    """Rolls out under one condition after the other."""

    context: StepContext
    splits: Mapping[str, Split]
    episodes: Episodes = field(default_factory=dict)

    def evaluate(self, model: LanguageModel, condition: str, temperature: float | None = None, **how: Any) -> None:
        """Roll out the tasks of a condition; development tasks under draws of this iteration's own."""
        settings = self.context.experiment.evaluation
        fresh = (self.context.iteration,) if condition in DEVELOPMENT else ()
        self.episodes[condition] = roll_out(
            self.context,
            self.splits[_split_of(condition)],
            model,
            label=condition.replace("_", " "),
            seed=stable_hash("evaluation", settings.seed, *fresh),
            group_size=1 if temperature == 0 else settings.rollouts,  # argmax says the same each time
            temperature=temperature,
            **how,
        )


def _evaluate(context: StepContext, splits: Mapping[str, Split]) -> tuple[Episodes, dict[str, Any]]:
    """Roll out under every condition; also whom the gate compares with, and what the selector counted."""
    experiment, made = context.experiment, _Rollouts(context, splits)
    pool = checked_pool(context)
    against, best = _reference(context)
    _of_entering(made, pool, best)
    if OF_BEST not in made.episodes:
        with open_policy(context.store, best, context.roles) as model:
            made.evaluate(model, OF_BEST)
    with open_policy(context.store, context.inputs["adapter"].digest, context.roles) as model:
        if best == context.entering.adapter and context.inputs["adapter"].summary.get("unchanged"):
            made.episodes[OF_CANDIDATE] = made.episodes[OF_BEST]  # the same weights and draws give the same rollouts
        else:
            made.evaluate(model, OF_CANDIDATE)
        made.evaluate(model, "without")
        source = experience_source(experiment, pool, context.roles) if experiment.evaluation.with_experience else None
        if source is not None:
            made.evaluate(model, "with", experience=source)
        if experiment.evaluation.greedy:
            made.evaluate(model, "greedy", temperature=0.0)
    return made.episodes, {AGAINST: against} | selector_statistics(source)


def _of_entering(made: _Rollouts, pool: Pool, best: str | None) -> None:
    """What is asked of the policy that entered: the baselines, its ceiling, and development where it is the best so far."""
    context = made.context
    settings, experiment = context.experiment.evaluation, context.experiment
    source = experience_source(experiment, pool, context.roles) if settings.ceiling else None
    is_best = best == context.entering.adapter
    if context.iteration > 1 and source is None and not is_best:
        return
    with open_policy(context.store, context.entering.adapter, context.roles) as model:
        if context.iteration == 1:
            made.evaluate(model, "base")
            for temperature in dict.fromkeys(settings.base_temperatures):
                if temperature != experiment.rollout.temperature:
                    made.evaluate(model, f"{BASE_AT}{temperature:g}", temperature=temperature)
        if source is not None:
            made.evaluate(model, "ceiling", experience=source)
        if is_best:
            made.evaluate(model, OF_BEST)


def _reference(context: StepContext) -> tuple[int, str | None]:
    """Iteration and adapter of the best champion so far; of the champion, where that one is gone from the store."""
    standing = context.entering.standing
    try:
        adapter_folder(context.store, standing.adapter)
    except StoreError:
        return standing.champion, context.entering.adapter
    return standing.best, standing.adapter


def _evaluated(twin: Artifact) -> tuple[Episodes, dict[str, Any]]:
    """The episodes of an artifact that was evaluated alike; nothing is rolled out again for another interval."""
    episodes: Episodes = {}
    for trajectory in load_trajectories(twin):
        condition, _, own = trajectory.id.partition("/")
        episodes.setdefault(condition, []).append(replace(trajectory, id=own))
    return episodes, {key: value for key, value in twin.summary.items() if key in ("selector", AGAINST)}


def _distinct(trajectories: list[Trajectory], scores: list[Score]) -> list[Trajectory]:
    """The same trajectories with their condition in the id: one task is rolled out under several."""
    return [replace(t, id=f"{s.condition}/{t.id}") for t, s in zip(trajectories, scores, strict=True)]


def examine(artifact: Artifact, experiment: Experiment) -> Iterator[Verdict]:
    """Whether enough could be judged."""
    yield judged(artifact, SCORES)


def _unread(experiment: Experiment) -> tuple[str, ...]:
    """``evaluation.rollouts`` stands in place of the group's size; without experience in context nobody injects any."""
    injected = experiment.evaluation.with_experience or experiment.evaluation.ceiling
    injection = without_choice(experiment) if injected else INJECTION_KEYS
    return ("rollout.group_size", *injection)


SPEC = StepSpec(
    "scores",
    "Held-out results of the candidate, without experience (internalized) and with it (in context), with intervals.",
    version="9",
    config=("evaluation", *INJECTION_KEYS, "tasks.development", "tasks.held_out", *TASK_KEYS),
    inputs=("policy", "experience", "contexts", "adapter"),
    iteration=True,
    standing=("adapter",),  # whom it scores; how sure the gate is does not matter here
    run=run,
    kinds=frozenset({"parquet", "polars"}),
    unread=_unread,
    derived=("evaluation.bootstrap",),
    guard=check_disjoint,
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
