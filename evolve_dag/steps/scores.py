"""Step ``scores``: held-out results, reported, and development results, for the gate (METHOD step 6).

On held-out tasks: ``without`` and ``with`` experience in context, ``greedy``; of the policy that entered the first iteration
``base`` and ``base_at_<temperature>``; of the policy that entered any iteration, with E(k) in context, ``ceiling``.

Every condition draws from the same random numbers (``evaluation.seed``), so two policies on the same task differ by
what they are, not by luck. Held-out tasks decide nothing, and every iteration draws the same for them; for development tasks
every iteration draws anew, so that its evidence is new.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from evolve_dag.config.schema import Experiment
from evolve_dag.errors import AwayError, StoreError
from evolve_dag.evaluation.gate import LEAST_JUDGED
from evolve_dag.evaluation.metrics import counts, evaluate_summary, score_trajectories
from evolve_dag.records import Score, Trajectory
from evolve_dag.seeds import stable_hash
from evolve_dag.steps.body import StepContext
from evolve_dag.steps.policies import (
    ANSWERED,
    FRONTIER,
    INJECTION_KEYS,
    TASK_KEYS,
    Rollouts,
    adapter_folder,
    answered,
    by_id,
    checked_pool,
    experience_source,
    injects,
    judged,
    open_policy,
    roll_out_together,
    same_weights,
    selector_statistics,
    without_choice,
)
from evolve_dag.steps.spec import Check, StepSpec, Table, Verdict
from evolve_dag.store.artifacts import Artifact
from evolve_dag.store.frames import load_trajectories, save_trajectories, scores_to_frame
from evolve_dag.store.layout import SCORES, SUMMARY
from evolve_dag.tasks.suites import Split, check_disjoint, left_out, load_split

if TYPE_CHECKING:
    from evolve_dag.experience.pool import Pool
    from evolve_dag.protocols import ExperienceSource

DEVELOPMENT = OF_CANDIDATE, OF_BEST, OF_CHAMPION = "development_candidate", "development_best", "development_champion"
"""Conditions that the gate compares: the candidate, the best champion so far, and the champion where it is neither."""
OF_CANDIDATES = (OF_CANDIDATE, "without", "with", "greedy")
"""Conditions of the policy that the gate decides about."""
AS_EVER = {"without": ("without", "base"), "greedy": ("greedy",)}
"""Condition on held-out tasks, of which every night draws the same -> those of other nights that ask for the same episodes."""
NIGHTLY = ("iteration", "standing")
"""Of a slice what is another every night."""
OF = "of"
"""Entry of the summary: condition on held-out tasks, without experience -> adapter of whom it scores; None: the bare base."""
TAKEN = "taken_over"
"""Entry of the summary: condition -> artifact that its episodes are from, of an earlier night or of another lineage."""
AGAINST = "against"
"""Entry of the summary: iteration of the champion that the candidate is compared with."""
BASE_AT = "base_at_"
"""Begins the conditions of the base policy at another temperature than that of the rollouts; the temperature follows."""


def run(context: StepContext) -> None:
    """Evaluate the candidate (adapter(k), E(k)), and on development tasks the best champion so far and the champion too."""
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
    if gone := left_out(experiment, "development"):
        context.build.note(left_out=len(gone))


def _split_of(condition: str) -> str:
    return "development" if condition in DEVELOPMENT else "held_out"


Episodes = dict[str, list[Trajectory]]
"""Condition -> its rollouts."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """One condition."""

    condition: str
    adapter: str | None
    """Digest of whose episodes they are; None: the bare base model."""
    injects: bool = False
    """With E(k) in context."""
    temperature: float | None = None
    """In place of the rollouts'."""


def _evaluate(context: StepContext, splits: Mapping[str, Split]) -> tuple[Episodes, dict[str, Any]]:
    """Roll out under every condition; also whom the gate compares with, and what the selector counted."""
    pool = checked_pool(context)
    against, best = _reference(context)
    asked = _asked(context, pool, best)
    episodes, origin = _taken_over(context, asked)
    statistics: dict[str, Any] = {OF: {one.condition: one.adapter for one in asked if one.condition in (*AS_EVER, "base")}}
    if origin:
        statistics[TAKEN] = origin
    left = [one for one in asked if one.condition not in episodes]
    for adapter in dict.fromkeys(one.adapter for one in left):
        own = {one.condition: one for one in left if one.adapter == adapter}
        with open_policy(context.store, adapter, context.roles) as model:
            sources = {name: experience_source(context.experiment, pool, context.roles) for name in own if own[name].injects}
            wanted = [_rollouts(context, splits, one, sources.get(name)) for name, one in own.items()]
            episodes |= zip(own, roll_out_together(context, wanted, model), strict=True)
        statistics |= selector_statistics(sources.get("with"))
    return {one.condition: episodes[one.condition] for one in asked}, {AGAINST: against} | statistics


def _asked(context: StepContext, pool: Pool, best: str | None) -> list[_Asked]:
    """Every condition, of whom. An adapter that training left as it was is the one that entered: the same weights."""
    experiment, settings = context.experiment, context.experiment.evaluation
    entering, best = (same_weights(context.store, one) for one in (context.entering.adapter, best))
    made = context.inputs["adapter"]
    candidate = entering if made.summary.get("unchanged") else made.digest
    teaches = injects(experiment, pool)
    found = []
    if context.iteration == 1:
        others = [one for one in dict.fromkeys(settings.base_temperatures) if one != experiment.rollout.temperature]
        found = [_Asked("base", entering), *(_Asked(f"{BASE_AT}{one:g}", entering, temperature=one) for one in others)]
    if settings.ceiling and teaches:
        found.append(_Asked("ceiling", entering, injects=True))
    found += [_Asked(OF_BEST, best), _Asked(OF_CANDIDATE, candidate), _Asked("without", candidate)]
    if entering not in (best, candidate):
        found.append(_Asked(OF_CHAMPION, entering))
    if settings.with_experience and teaches:
        found.append(_Asked("with", candidate, injects=True))
    if settings.greedy:
        found.append(_Asked("greedy", candidate, temperature=0.0))
    return found


def _taken_over(context: StepContext, asked: Sequence[_Asked]) -> tuple[Episodes, dict[str, str]]:
    """Episodes that somebody has played already, and the digest of the artifact that each condition's are from."""
    episodes, origin = _of_lineages_alike(context, asked) if context.iteration == 1 else ({}, {})
    own, own_origin = _of_earlier_nights(context, asked)
    return episodes | own, origin | own_origin


def _of_lineages_alike(context: StepContext, asked: Sequence[_Asked]) -> tuple[Episodes, dict[str, str]]:
    """Those of the policy that enters the first night, by another lineage that begins with it: all arms of a study do."""
    left = {one.condition for one in asked if one.condition in ("base", OF_BEST) or one.condition.startswith(BASE_AT)}
    episodes: Episodes = {}
    origin: dict[str, str] = {}
    with suppress(StoreError):  # a ref that cannot be read
        for ref in context.store.refs():
            if (ref.kind, ref.iteration) != ("scores", 1) or ref.experiment == context.experiment.experiment:
                continue
            with suppress(StoreError):  # damaged or gone
                other = context.store.open("scores", ref.digest)
                if _plays_alike(context, other) and (found := left.intersection(other.summary["conditions"])):
                    known, _ = _evaluated(other)
                    episodes |= {name: known[name] for name in found}
                    origin |= dict.fromkeys(sorted(found), ref.digest)
                    left -= found
            if not left:
                break
    return episodes, origin


def _plays_alike(context: StepContext, other: Artifact) -> bool:
    """Whether another lineage's scores are of the same entering policy, which met the same tasks in the same way; what it does
    with experience, and how its scores are averaged, does not matter."""

    def played(config: Mapping[str, Any]) -> dict[str, Any]:
        evaluation = {key: config["evaluation"][key] for key in ("seed", "rollouts")}
        beside = ("evaluation", *NIGHTLY, *INJECTION_KEYS)
        return {key: value for key, value in config.items() if key not in beside} | evaluation

    def weights(policy: Artifact) -> dict[str, Any]:
        of_experience = ("experience", "next_item", "findings")
        bare = {key: value for key, value in policy.manifest.config["policy"].items() if key not in of_experience}
        return {"models.policy": policy.manifest.config["models.policy"]} | bare

    found = other.manifest
    return (
        found.code_version == SPEC.version
        and played(found.config) == played(context.config)
        and weights(context.store.read("policy", found.inputs["policy"])) == weights(context.inputs["policy"])
    )


def _of_earlier_nights(context: StepContext, asked: Sequence[_Asked]) -> tuple[Episodes, dict[str, str]]:
    """Those of an earlier night of this lineage, where nothing was trained since."""
    episodes: Episodes = {}
    origin: dict[str, str] = {}
    wanted = {one.condition: one.adapter for one in asked if one.condition in AS_EVER}
    for night in range(context.iteration - 1, 0, -1) if context.inputs["adapter"].summary.get("unchanged") else ():
        with suppress(StoreError):  # damaged or gone: it is played again
            ref = context.store.ref(context.experiment.experiment, night, "scores")
            if ref is None or not _scored_alike(context, earlier := context.store.open("scores", ref.digest)):
                continue
            whose = earlier.summary.get(OF, {})
            found = {
                condition: name
                for condition, adapter in wanted.items()
                for name in AS_EVER[condition]
                if name in whose and whose[name] == adapter
            }
            if found:
                known, _ = _evaluated(earlier)
                episodes |= {condition: known[name] for condition, name in found.items()}
                origin |= dict.fromkeys(found, ref.digest)
                break
    return episodes, origin


def _scored_alike(context: StepContext, earlier: Artifact) -> bool:
    """Whether an earlier night's scores are of the same base policy, asked in the same way: all but the nightly is equal."""
    manifest = earlier.manifest
    bases = (context.inputs["policy"], context.store.read("policy", manifest.inputs["policy"]))
    base, earlier_base = (one.manifest.config["models.policy"] for one in bases)
    keys = {*context.config, *manifest.config} - set(NIGHTLY)
    asked_alike = all(context.config.get(key) == manifest.config.get(key) for key in keys)
    return asked_alike and base == earlier_base and manifest.code_version == SPEC.version


def _rollouts(context: StepContext, splits: Mapping[str, Split], asked: _Asked, source: ExperienceSource | None) -> Rollouts:
    """Development tasks get draws of this iteration's own."""
    settings, temperature = context.experiment.evaluation, asked.temperature
    if temperature is None:
        temperature = context.experiment.rollout.temperature
    fresh = (context.iteration,) if asked.condition in DEVELOPMENT else ()
    return Rollouts(
        asked.condition.replace("_", " "),
        splits[_split_of(asked.condition)],
        seed=stable_hash("evaluation", settings.seed, *fresh),
        group_size=1 if temperature == 0 else settings.rollouts,  # argmax says the same each time
        experience=source,
        temperature=asked.temperature,
        journal=f"{asked.condition}-{(asked.adapter or 'base')[:12]}",  # the best may be another when a killed step goes on
        on_trial=asked.condition in OF_CANDIDATES,
    )


def _reference(context: StepContext) -> tuple[int, str | None]:
    """Iteration and adapter of the best champion so far; of the champion, where that one is gone from the store.

    Raises:
        AwayError: whether it is gone cannot be told now.
    """
    standing = context.entering.standing
    try:
        adapter_folder(context.store, standing.adapter)
    except AwayError:
        raise
    except StoreError:
        return standing.champion, context.entering.adapter
    return standing.best, standing.adapter


def _evaluated(twin: Artifact) -> tuple[Episodes, dict[str, Any]]:
    """The episodes of an artifact that was evaluated alike; nothing is rolled out again for another interval."""
    episodes: Episodes = {}
    for trajectory in load_trajectories(twin):
        condition, _, own = trajectory.id.partition("/")
        episodes.setdefault(condition, []).append(replace(trajectory, id=own))
    return episodes, {key: value for key, value in twin.summary.items() if key in ("selector", AGAINST, OF, TAKEN)}


def _distinct(trajectories: list[Trajectory], scores: list[Score]) -> list[Trajectory]:
    """The same trajectories with their condition in the id: one task is rolled out under several."""
    return [replace(t, id=f"{s.condition}/{t.id}") for t, s in zip(trajectories, scores, strict=True)]


def examine(artifact: Artifact, experiment: Experiment) -> Iterator[Verdict]:
    """Whether enough could be judged, and who was asked did answer."""
    yield judged(artifact, SCORES)
    yield answered(artifact)


def _unread(experiment: Experiment) -> tuple[str, ...]:
    """``evaluation.rollouts`` stands in place of the group's size; without experience in context nobody injects any."""
    injected = experiment.evaluation.with_experience or experiment.evaluation.ceiling
    injection = without_choice(experiment) if injected else INJECTION_KEYS
    return ("rollout.group_size", FRONTIER, *injection)


SPEC = StepSpec(
    "scores",
    "Held-out results of the candidate, without experience (internalized) and with it (in context), with intervals.",
    version="11",
    config=("evaluation", *INJECTION_KEYS, "tasks.development", "tasks.held_out", *TASK_KEYS),
    inputs=("policy", "experience", "contexts", "adapter"),
    iteration=True,
    standing=("adapter",),  # whom it scores; how sure the gate is does not matter here
    run=run,
    kinds=frozenset({"parquet", "polars"}),
    unread=_unread,
    derived=("evaluation.bootstrap",),
    guard=check_disjoint,
    checks=(Check("judged", f"At least {LEAST_JUDGED:.0%} of the episodes could be judged."), ANSWERED),
    examine=examine,
    tables=(
        Table(
            SCORES,
            ("task_id", "condition", "reward", "premature", "status", "turns", "answer"),
            meanings={"condition": "`without` or `with` experience in context, `greedy`; `development_*` decide in the gate."},
        ),
    ),
)
