"""Step ``scores``: held-out results, reported, and development results, for the gate (METHOD step 6).

On held-out tasks: ``without`` and ``with`` experience in context, ``greedy``; of the policy that entered the first iteration
``base`` and ``base_at_<temperature>``; of the policy that entered any iteration, with E(k) in context, ``ceiling``.

Every condition draws from the same random numbers (``evaluation.seed``), so two policies on the same task differ by
what they are, not by luck. Held-out tasks decide nothing, and every iteration draws the same for them; for development tasks
every iteration draws anew, so that its evidence is new.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
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

if TYPE_CHECKING:
    from evolve_dag.experience.pool import Pool
    from evolve_dag.protocols import LanguageModel

DEVELOPMENT = OF_CANDIDATE, OF_BEST = "development_candidate", "development_best"
"""Conditions that the gate compares: the candidate, and the best champion so far."""
AGAINST = "against"
"""Entry of the summary: iteration of the champion that the candidate is compared with."""
BASE_AT = "base_at_"
"""Begins the conditions of the base policy at another temperature than that of the rollouts; the temperature follows."""


class _Conditions:
    """Rolls out and keeps what every condition brings."""

    def __init__(self, context: StepContext) -> None:
        self.context = context
        self.trajectories: list[Trajectory] = []
        self.scores: list[Score] = []
        self.summary: dict[str, object] = {}

    def evaluate(
        self, model: LanguageModel, condition: str, split: Split, temperature: float | None = None, **how: object
    ) -> list[Trajectory]:
        """Roll out the tasks of a split; development tasks under draws of this iteration's own."""
        settings = self.context.experiment.evaluation
        fresh = (self.context.iteration,) if condition in DEVELOPMENT else ()
        found = roll_out(
            self.context,
            split,
            model,
            label=condition.replace("_", " "),
            seed=stable_hash("evaluation", settings.seed, *fresh),
            group_size=1 if temperature == 0 else settings.rollouts,  # argmax says the same each time
            temperature=temperature,
            **how,  # type: ignore[arg-type]
        )
        self.record(found, condition, split)
        return found

    def record(self, found: list[Trajectory], condition: str, split: Split) -> None:
        """Keep rollouts as those of a condition."""
        tasks = by_id(split.tasks)
        self.scores.extend(score_trajectories(found, tasks, condition))
        self.summary[condition] = evaluate_summary(found, tasks, self.context.experiment.evaluation)
        self.trajectories.extend(found)

    def write(self) -> dict[str, Any]:
        """Write everything into the artifact; what to note of it."""
        folder = self.context.build.path
        scores_to_frame(self.scores).write_parquet(folder / SCORES)
        (folder / "summary.json").write_text(json.dumps(self.summary, indent=1) + "\n")
        save_trajectories(folder, _distinct(self.trajectories, self.scores))
        note = counts(self.trajectories)
        return {name: note[name] for name in ("tokens", "trajectories", "judged", "failed")} | {
            "conditions": list(self.summary)
        }


def run(context: StepContext) -> None:
    """Evaluate the candidate (adapter(k), E(k)), and on development tasks the best champion so far too."""
    experiment = context.experiment
    check_disjoint(experiment)
    held_out, development = (load_split(experiment, split, context.roles) for split in ("held_out", "development"))
    made, pool = _Conditions(context), open_pool(context.inputs["experience"])
    against, best = _reference(context)
    of_best = _entering(made, held_out, development if best == context.entering.adapter else None, pool)
    if of_best is None:
        with open_policy(context.store, best, context.roles) as model:
            made.evaluate(model, OF_BEST, development)
    with open_policy(context.store, context.inputs["adapter"].digest, context.roles) as model:
        if of_best is not None and context.inputs["adapter"].summary.get("unchanged"):
            made.record(of_best, OF_CANDIDATE, development)  # the same weights and draws give the same rollouts
        else:
            made.evaluate(model, OF_CANDIDATE, development)
        made.evaluate(model, "without", held_out)
        source = experience_source(experiment, pool, context.roles)
        if experiment.evaluation.with_experience and source is not None:
            made.evaluate(model, "with", held_out, experience=source)
        if experiment.evaluation.greedy:
            made.evaluate(model, "greedy", held_out, temperature=0.0)
    context.build.note(**made.write(), **{AGAINST: against}, **selector_statistics(source))


def _entering(made: _Conditions, held_out: Split, development: Split | None, pool: Pool) -> list[Trajectory] | None:
    """What is asked of the policy that entered.

    Args:
        development: its tasks where that policy is the best champion so far.

    Returns:
        Its rollouts of the development tasks, if it was asked.
    """
    context = made.context
    settings, experiment = context.experiment.evaluation, context.experiment
    source = experience_source(experiment, pool, context.roles) if settings.ceiling else None
    if context.iteration > 1 and source is None and development is None:
        return None
    with open_policy(context.store, context.entering.adapter, context.roles) as model:
        if context.iteration == 1:
            made.evaluate(model, "base", held_out)
            for temperature in dict.fromkeys(settings.base_temperatures):
                if temperature != experiment.rollout.temperature:
                    made.evaluate(model, f"{BASE_AT}{temperature:g}", held_out, temperature=temperature)
        if source is not None:
            made.evaluate(model, "ceiling", held_out, experience=source)
        return made.evaluate(model, OF_BEST, development) if development is not None else None


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


def examine(artifact: Artifact, experiment: Experiment) -> Iterator[Verdict]:
    """Whether enough could be judged."""
    yield judged(artifact, SCORES)


SPEC = StepSpec(
    "scores",
    "Held-out results of the candidate, without experience (internalized) and with it (in context), with intervals.",
    version="7",
    config=("evaluation", *INJECTION_KEYS, "tasks.development", "tasks.held_out", *TASK_KEYS),
    inputs=("policy", "experience", "adapter"),
    iteration=True,
    standing=("adapter",),  # whom it scores; how sure the gate is does not matter here
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
