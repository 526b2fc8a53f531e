"""What a study has come to, as plain values: read from the store once, for tables, figures and statistics.

An iteration is read by the digests that the study file asks for now, not by what its lineage last used. So what was made under
another definition of an arm is *not there*; it is never mixed in.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from evolve_dag.evaluation.metrics import ALIASES, MOST_VALUES, Metrics, metrics_from_json
from evolve_dag.reporting.summary import sampled_tokens
from evolve_dag.steps import base, promotion
from evolve_dag.steps.scores import BASE_AT
from evolve_dag.store.artifacts import Artifact, Store
from evolve_dag.store.layout import DECISION, SCORES, SUMMARY
from evolve_dag.study.definition import Cell, Study

Column = Mapping[int, Mapping[str, float]]
"""Seed -> task -> mean reward of its judged rollouts, 0..1: one policy under one condition."""

SCORED = ("without", "with", "ceiling", "greedy")
"""Conditions that every iteration is scored under (:mod:`evolve_dag.steps.scores`): the night's candidate; ``ceiling``: whoever
entered the night."""
HELD: Mapping[str, str] = {"held": "without", "held_with": "with", "held_greedy": "greedy"}
"""Conditions of what the loop holds once the gate has decided -> those of the night whose candidate that was. Held-out tasks
are drawn alike in every iteration, so a champion that stays has the scores of its own night."""
HELD_OUT = (*HELD, *SCORED)
"""All of them, in the order of a report."""


@dataclass(frozen=True, slots=True)
class Result:
    """One iteration of one cell; 0 is the base policy, known by its conditions alone."""

    arm: str
    seed: int
    iteration: int
    rewards: Mapping[str, Mapping[str, float]]
    """Condition -> task -> mean reward of its judged rollouts. Of iteration 0: ``held`` and ``without``, which are the same,
    and ``base_at_<temperature>``."""
    metrics: Mapping[str, Metrics]
    """Condition -> its metrics."""
    items: int | None = None
    """Items in the pool E(k)."""
    decision: str = ""
    """Of the gate; '' for the base policy."""
    champion: int = 0
    """Iteration whose candidate the loop holds after it; 0: the base policy."""
    sampled: int = 0
    """Tokens sampled to learn from: rollouts, teacher rollouts, refreshes, what extractor and selector wrote. Not: evaluation,
    verdicts."""
    trained: int = 0
    """Tokens of the rows that were trained on, every epoch counted."""
    seconds: float = 0.0
    """Wall time of the processes that made its artifacts; what arms share counts in each."""


@dataclass(frozen=True, slots=True)
class Results:
    """All iterations of a study that are there."""

    study: Study
    rows: tuple[Result, ...]
    """By arm, seed and iteration, 0 first."""
    facts: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Held-out task -> facts to break results down by (``depth``)."""
    missing: Mapping[str, int] = field(default_factory=dict)
    """Lineage -> iterations that are not there (yet)."""

    @property
    def shared(self) -> bool:
        """Whether every seed is asked the same held-out tasks."""
        return self.study.same_tasks

    def of(self, arm: str, iteration: int) -> tuple[Result, ...]:
        """One iteration of an arm, by seed."""
        return tuple(row for row in self.rows if (row.arm, row.iteration) == (arm, iteration))

    def iterations(self, arm: str) -> tuple[int, ...]:
        """Iterations of an arm that every one of its seeds has, without the base policy.

        A mean over other seeds at every iteration would move for that reason alone.
        """
        seeds = {row.seed for row in self.rows if row.arm == arm}
        found = sorted({row.iteration for row in self.rows if row.arm == arm and row.iteration})
        return tuple(k for k in found if {row.seed for row in self.of(arm, k)} == seeds)

    def column(self, arm: str, iteration: int, condition: str = "held") -> Column:
        """Rewards of one policy of an arm under one condition; seeds where it was not measured are left out."""
        return {row.seed: row.rewards[condition] for row in self.of(arm, iteration) if condition in row.rewards}

    def base_columns(self, arm: str) -> dict[str, Column]:
        """An arm's base policy by temperature, as the arm measured it; what it did not measure, as arms did that begin with the
        same policy and roll it out alike.

        A temperature that some of the arm's seeds lack is left out: the best of several is chosen and measured on the seeds
        that all of them have, and would stand for fewer seeds than the arm.
        """
        found: dict[str, dict[int, Mapping[str, float]]] = {}
        bare = sorted((row for row in self.rows if row.iteration == 0), key=lambda row: row.arm != arm)
        for row in bare:
            for condition, rewards in row.rewards.items() if self._same_base(arm, row.arm) else ():
                if condition not in HELD and (row.arm == arm or temperature_of(condition)):
                    found.setdefault(condition, {}).setdefault(row.seed, rewards)
        seeds = {row.seed for row in bare if row.arm == arm}
        return {condition: column for condition, column in found.items() if seeds <= column.keys()}

    def _same_base(self, arm: str, other: str) -> bool:
        """Whether both begin with the same policy, and roll it out alike but for the temperature."""
        a, b = (self.study.of_arm(name)[0].experiment for name in (arm, other))
        mine, theirs = (one.rollout.model_dump(exclude={"group_size", "frontier", "temperature"}) for one in (a, b))
        return a.models.policy == b.models.policy and mine == theirs


def read(study: Study, store: Store) -> Results:
    """Read what the store holds of a study; writes nothing.

    Raises:
        StoreError: an artifact is missing or corrupt.
        DataError: an artifact's content is not what the steps write.
    """
    rows: list[Result] = []
    facts: dict[str, Mapping[str, str]] = {}
    missing: dict[str, int] = {}
    order = {arm: place for place, arm in enumerate(study.arms)}
    for cell in sorted(study.cells, key=lambda cell: (order[cell.arm], cell.seed)):
        found = list(_cell(cell, store, facts))
        rows += found
        if absent := cell.iterations - sum(row.iteration > 0 for row in found):
            missing[cell.name] = absent
    return Results(study, tuple(rows), facts, missing)


@dataclass(frozen=True, slots=True)
class _Scores:
    """Results by condition."""

    rewards: Mapping[str, Mapping[str, float]]
    metrics: Mapping[str, Metrics]

    def named(self, names: Mapping[str, str]) -> _Scores:
        """Some of the conditions under names of their own: name -> condition; those that are not there are left out."""
        known = {name: condition for name, condition in names.items() if condition in self.rewards}
        return _Scores(
            {name: self.rewards[condition] for name, condition in known.items()},
            {name: self.metrics[condition] for name, condition in known.items()},
        )

    def holding(self, champion: _Scores, *, pool: bool) -> _Scores:
        """The same with the conditions of the champion.

        Args:
            pool: whether its pool is as it was when it was scored with it.
        """
        held = champion.named({name: of for name, of in HELD.items() if pool or of != "with"})
        return _Scores({**held.rewards, **self.rewards}, {**held.metrics, **self.metrics})


def _cell(cell: Cell, store: Store, facts: dict[str, Mapping[str, str]]) -> Iterator[Result]:
    nights: list[_Scores] = []
    """By iteration, the base policy first."""
    withdrawn = [frozenset[str]()]
    """Items that were taken out of each one's pool when it was scored."""
    for k, resolved in enumerate(base.resolve_lineage(cell.experiment, cell.iterations, store), 1):
        if not all(step.digest and step.exists for step in resolved.values()):
            return
        made = {name: store.open(name, str(step.digest)) for name, step in resolved.items()}
        scores = _scores(made["scores"], facts)
        if k == 1:
            at = {name: name for name in scores.rewards if name.startswith(BASE_AT)}
            nights.append(scores.named({"without": "base", **at}))
            bare = nights[0].holding(nights[0], pool=True)
            yield Result(cell.arm, cell.seed, 0, bare.rewards, bare.metrics)
        leaving = promotion.next_policy(made["promotion"], k + 1)
        champion = leaving.standing.champion
        nights.append(scores.named({name: name for name in SCORED}))
        withdrawn.append(leaving.withdrawn)
        night = nights[k].holding(nights[champion], pool=withdrawn[champion] == leaving.withdrawn)
        yield Result(
            cell.arm,
            cell.seed,
            k,
            night.rewards,
            night.metrics,
            items=int(made["experience"].summary.get("items") or 0),
            decision=str(made["promotion"].json(DECISION)["decision"]),
            champion=champion,
            sampled=sum(sampled_tokens(made[kind]) or 0 for kind in ("trajectories", "experience", "contexts", "adapter")),
            trained=int(made["adapter"].summary.get("tokens_trained") or 0),
            seconds=sum(artifact.manifest.seconds for artifact in made.values()),
        )


def _scores(scores: Artifact, facts: dict[str, Mapping[str, str]]) -> _Scores:
    """The held-out conditions as they were scored; adds to ``facts``."""
    import polars as pl

    frame = scores.frame(SCORES).filter(~pl.col("condition").str.starts_with("development"))
    for task, told in frame.unique("task_id").select("task_id", "metadata").iter_rows():
        facts.setdefault(task, json.loads(told) if told else {})
    judged = frame.filter(pl.col("reward").is_not_null()).group_by("condition", "task_id").agg(pl.col("reward").mean())
    found: dict[str, dict[str, float]] = {}
    for condition, task, reward in judged.sort("condition", "task_id").iter_rows():
        found.setdefault(condition, {})[task] = reward
    return _Scores(found, {name: metrics_from_json(content) for name, content in scores.json(SUMMARY).items()})


def breakdowns(results: Results) -> dict[str, list[str]]:
    """Facts of held-out tasks that have several values, few enough to break results down by: name -> values."""
    values: dict[str, set[str]] = {}
    for told in results.facts.values():
        for name, value in told.items():
            values.setdefault(name, set()).add(str(value))
    return {name: sorted(found) for name, found in sorted(values.items()) if 1 < len(found) <= MOST_VALUES and name != ALIASES}


def temperature_of(condition: str) -> str:
    """Which temperature a condition of the base policy was sampled at; '' for that of the rollouts."""
    return condition.removeprefix(BASE_AT) if condition.startswith(BASE_AT) else ""
