"""The gate: does the candidate replace the champion, or does the best champion so far come back? (METHOD step 7)

The candidate is compared with the best champion so far, task by task, on the same development tasks under the same draws.
Held-out scores never come here: a task that decides something can no longer report anything.

Two questions are asked. *Tonight*: has the candidate lost something against the best, or against the champion that it comes
from? Then it is declined and the champion stays. (The champion may be far above the best without being known to be: whoever
falls from there to the best one's level has lost nothing against *that*.) *Over the nights*: have the candidates since the best
lost something that no single night could show? What they lost adds up in :mod:`evolve_dag.evaluation.betting`, and when that is
established the best comes back.

A candidate takes the best one's place only when it is significantly better, not when it looks better: one that was chosen for
its luck falls back without having lost anything, and the evidence would begin anew with every lucky night.

Where candidates of the champion were declined for a loss, the burden of proof turns: the next one must not look worse than the
champion. Else a fault that makes every candidate somewhat worse needs one lucky night in five or ten to pass, and has it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from evolve_dag.errors import DataError
from evolve_dag.evaluation import betting
from evolve_dag.evaluation.betting import Capital
from evolve_dag.evaluation.intervals import POWER, Floats, by_task, detectable, difference_interval, paired, spread
from evolve_dag.records import Decision, Score, Standing
from evolve_dag.store.jsonvalues import from_values, to_values

if TYPE_CHECKING:
    from evolve_dag.config.schema import GateSettings

RESAMPLES = 4000
LEAST_JUDGED = 0.5
"""Share of the tasks that must be judged on both sides. A candidate that fails on the hard tasks must not win on the rest."""
MOST_OF_A_DECLINED = 4.0
"""Factor by which a candidate that is declined may raise the evidence of a drift: one night that went wrong is no drift."""
TURNS = 2
"""Candidates of a champion in a row that were declined for a loss, from which on the next one must not look worse."""

Evidence = Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class GateDecision:
    """What the gate decided, and on what."""

    decision: Decision
    """``promote``: the candidate becomes the champion. ``keep``: the champion stays. ``restore``: the best champion so far
    comes back."""
    reasons: tuple[str, ...]
    """Sentences for a reader: on ``keep`` and ``restore`` what went wrong, on ``promote`` what was compared."""
    evidence: Evidence
    """The numbers compared; None where a number is not known."""
    standing: Standing = field(default_factory=Standing)
    """Who holds and who is the best from now on, and the evidence that goes on."""


@dataclass(frozen=True, slots=True)
class _Finding:
    """One thing that was looked at."""

    sentence: str
    bad: bool
    evidence: Evidence
    loss: bool = False
    """What is bad is a loss of success."""


@dataclass(frozen=True, slots=True)
class Night:
    """Candidate and best champion on the same development tasks: what is compared."""

    tasks: int
    candidate: Floats
    """(T,) Success of each task that was judged for both, 0..1."""
    best: Floats
    """(T,) The same tasks' success of the best champion."""
    everything: tuple[Floats, Floats] | None
    """Success of candidate and best on all tasks, with 0 for what was not judged; None where everything was judged."""
    premature: tuple[float, float]
    """Rate of premature answers of candidate and best, 0..1."""
    turns: tuple[float, float]
    """Mean turns of candidate and best."""
    champion: tuple[Floats, Floats] | None = None
    """Success of candidate and champion on the tasks that were judged for both; None where the champion is the best, or the
    candidate is the champion unchanged."""
    same: bool = False
    """Candidate and best champion have the same weights, so that nothing can have been lost."""
    unchanged: bool = False
    """Candidate and champion have the same weights: nothing was trained."""


def decide(
    candidate: Sequence[Score],
    best: Sequence[Score],
    settings: GateSettings,
    seed: int,
    *,
    iteration: int = 1,
    standing: Standing = Standing(),
    champion: Sequence[Score] = (),
    same: bool = False,
    unchanged: bool = False,
) -> GateDecision:
    """Promote the candidate unless it lost something, or those since the best did.

    Declined is a candidate when too few tasks were judged on both sides, on a significant loss of success (the interval of the
    paired difference lies wholly below ``-margin``: against the best among the judged tasks or among all, or against the
    champion), where the last ``TURNS`` candidates of the champion were declined for a loss on any success more than ``margin``
    below the champion's, and, where success is not significantly better than the best's, on a rise of premature answers above
    ``max_premature_rise`` and on a ratio of mean turns above ``max_turn_ratio``.
    All checks run, so ``reasons`` names every one that failed.

    Args:
        candidate: scores of the new policy on the development tasks, of one condition.
        best: scores of the best champion so far, on the same tasks, under the same draws.
        settings: thresholds.
        seed: decides the resamples of the interval.
        iteration: the candidate's.
        standing: who holds, who is the best, and the evidence so far.
        champion: scores of the champion, where it is neither the best nor what the candidate is.
        same: the candidate is the best champion: nothing was trained, and that one held.
        unchanged: the candidate is the champion: nothing was trained.

    Raises:
        DataError: the two sides are not scores of the same tasks, or a side holds a rollout twice.
    """
    for name, scores in (("candidate", candidate), ("best champion", best), ("champion", champion)):
        _refuse_duplicates(name, scores)
    for name, scores in (("best champion", best), *([("champion", champion)] if champion else [])):
        _refuse_mismatch({s.task_id for s in candidate}, {s.task_id for s in scores}, name)
    night = replace(_night(candidate, best, champion), same=same, unchanged=unchanged)
    return decide_on(night, settings, seed, iteration=iteration, standing=standing)


def decide_on(
    night: Night, settings: GateSettings, seed: int, *, iteration: int = 1, standing: Standing = Standing()
) -> GateDecision:
    """:func:`decide` on what is compared."""
    findings = list(_findings(night, settings, seed))
    if not any(finding.bad for finding in findings):
        findings += _burden(night, settings, standing)
    bad = tuple(finding.sentence for finding in findings if finding.bad)
    drift, after = _drift(night, settings, standing, declined=bool(bad))
    after = replace(after, declined=standing.declined + any(finding.bad and finding.loss for finding in findings))
    evidence: dict[str, float | None] = {"confidence": settings.confidence, "margin": settings.margin}
    for finding in (*findings, drift):
        evidence |= finding.evidence
    back = replace(after, champion=standing.best, capital=(), began=1.0, nights=0, lost=0.0)
    if drift.bad and standing.champion != standing.best:
        return GateDecision("restore", (drift.sentence, *bad), evidence, replace(back, declined=0))
    if drift.bad:  # nothing to go back to: the champion is the best
        return GateDecision("keep", (*bad, drift.sentence), evidence, back)
    if bad:
        return GateDecision("keep", bad, evidence, after)
    good = [finding.sentence for finding in findings if finding.sentence]
    good += [drift.sentence] if after.nights > 1 or night.same else []
    if _better(evidence):
        anew = Capital(after.capital).restarted()
        new_best = Standing(iteration, iteration, capital=anew.logs, began=anew.total)
        return GateDecision("promote", tuple(good), evidence, new_best)
    declined = after.declined if night.unchanged else 0
    return GateDecision("promote", tuple(good), evidence, replace(after, champion=iteration, declined=declined))


def gate_to_json(decision: GateDecision) -> dict[str, Any]:
    """``{"decision": "promote", "reasons": [...], "evidence": {"success_difference": 0.12, ...}, "standing": {...}}``."""
    return to_values(decision)


def gate_from_json(content: Mapping[str, Any]) -> GateDecision:
    """Read what :func:`gate_to_json` wrote; further keys are ignored, and earlier versions wrote no standing.

    Raises:
        DataError: a key is missing or holds something else.
    """
    remedy = "the file was written by another version or changed by hand: run the promotion of this iteration again"
    return from_values(GateDecision, content, "gate decision", remedy)


def _night(candidate: Sequence[Score], best: Sequence[Score], champion: Sequence[Score]) -> Night:
    """What is compared of the sides' scores."""
    sides = candidate, best
    every = [by_task([s.task_id for s in side], [s.reward or 0.0 for s in side]) for side in sides]
    candidate_T, best_T = paired(*map(_judged, sides))
    premature, turns = (
        (_task_mean(candidate, field), _task_mean(best, field)) if candidate else (0.0, 0.0) for field in ("premature", "turns")
    )
    all_T = paired(*every) if any(s.reward is None for side in sides for s in side) else None
    tasks = len({s.task_id for s in candidate})
    against = paired(_judged(candidate), _judged(champion)) if champion else None
    return Night(tasks, candidate_T, best_T, all_T, premature, turns, against)


def _judged(scores: Sequence[Score]) -> dict[str, list[float]]:
    """Task -> the rewards of its rollouts that were judged."""
    return by_task([s.task_id for s in scores], [s.reward for s in scores])


def _better(evidence: Mapping[str, float | None]) -> bool:
    """Whether success is significantly above that of the best champion."""
    return (evidence.get("success_low") or 0.0) > 0


def _findings(night: Night, settings: GateSettings, seed: int) -> Iterator[_Finding]:
    """Everything that is asked about tonight."""
    common = len(night.candidate)
    few = common == 0 or common < LEAST_JUDGED * night.tasks
    sentence = (
        f"too few to compare: {common} of {night.tasks} development tasks were judged for both candidate and best champion, "
        f"at least {LEAST_JUDGED:.0%} must be"
    )
    yield _Finding(sentence if few else "", few, {"tasks": night.tasks, "judged_tasks": common})
    better = False
    if common:
        success = _success(night.candidate, night.best, settings, seed)
        better = _better(success.evidence)
        yield success
    if night.everything is not None:
        what = "success of all, unjudged ones counted as wrong,"
        yield _success(*night.everything, settings, seed, of="all_", what=what)
    if night.champion is not None and len(night.champion[0]):
        yield _success(*night.champion, settings, seed, of="champion_", whose=" of the champion")
    if night.tasks:
        yield _premature(night.premature, settings, better=better)
        yield _turns(night.turns, settings, better=better)


def _success(
    candidate_T: Floats,
    other_T: Floats,
    settings: GateSettings,
    seed: int,
    *,
    of: str = "",
    what: str = "success",
    whose: str = "",
) -> _Finding:
    """Has the candidate lost more than the margin? ``of`` stands in the names of the evidence."""
    differences_T = candidate_T - other_T
    low, high = difference_interval(differences_T, resamples=RESAMPLES, confidence=settings.confidence, seed=seed)
    means, difference, sd = (
        [float(side.mean()) for side in (candidate_T, other_T)],
        float(differences_T.mean()),
        spread(differences_T),
    )
    smallest = settings.margin + detectable(sd, len(differences_T), confidence=settings.confidence)
    sentence = (
        f"{what} {means[0]:.1%} against {means[1]:.1%}{whose}: {100 * difference:+.1f} points, "
        f"{settings.confidence:.0%} interval {100 * low:+.1f} to {100 * high:+.1f} "
        f"(a loss of {100 * smallest:.1f} points would be seen with {POWER:.0%} power)"
    )
    bad = high < -settings.margin
    numbers = {"difference": difference, "low": low, "high": high, "sd": sd, "detectable": smallest}
    numbers |= {} if whose else {"candidate": means[0], "best": means[1]}
    evidence = {f"success_{of}{name}": value for name, value in numbers.items()}
    return _Finding(f"significant loss of {sentence}" if bad else sentence, bad, evidence, loss=True)


def _burden(night: Night, settings: GateSettings, standing: Standing) -> Iterator[_Finding]:
    """Does the candidate look worse than the champion, where those before it were declined?"""
    candidate_T, champion_T = night.champion or (night.candidate, night.best)
    if standing.declined < TURNS or night.unchanged or not len(candidate_T):
        return
    candidate, champion = float(candidate_T.mean()), float(champion_T.mean())
    sentence = (
        f"{standing.declined} candidates in a row had lost against this champion, so the next one must not look worse: success "
        f"{candidate:.1%} against {champion:.1%}, at most {100 * settings.margin:g} points below allowed"
    )
    yield _Finding(sentence, candidate < champion - settings.margin, {"declined_in_a_row": standing.declined}, loss=True)


def _premature(rates: tuple[float, float], settings: GateSettings, *, better: bool) -> _Finding:
    """Does the candidate answer unread much more often, and nothing for it? Answers that no tool states (a sum of what was
    looked up) count as unread, and a policy that used to come to none learns to give them."""
    candidate, best = rates
    rise, most = candidate - best, settings.max_premature_rise
    numbers = {"premature_candidate": candidate, "premature_best": best, "premature_rise": rise, "max_premature_rise": most}
    sentence = f"premature answers {candidate:.1%} against {best:.1%}: {100 * rise:+.1f} points, at most {100 * most:+.1f}"
    return _but_for_success(f"{sentence} allowed", rise > most, numbers, better=better)


def _turns(means: tuple[float, float], settings: GateSettings, *, better: bool) -> _Finding:
    """Does the candidate take many more turns, and nothing for it? A policy that used to give up early learns to take them."""
    candidate, best = means
    ratio, most = candidate / best if best else None, settings.max_turn_ratio
    numbers = {"turns_candidate": candidate, "turns_best": best, "turn_ratio": ratio, "max_turn_ratio": most}
    if ratio is None:
        return _Finding(f"mean turns {candidate:.2f}; the best champion took none, so there is no ratio", False, numbers)
    sentence = f"mean turns {candidate:.2f} against {best:.2f}: {ratio:.2f} times as many, at most {most:.2f} allowed"
    return _but_for_success(sentence, ratio > most, numbers, better=better)


def _but_for_success(sentence: str, bad: bool, numbers: Evidence, *, better: bool) -> _Finding:
    """What is a fault only where nothing was won by it."""
    if better:
        return _Finding(f"{sentence}, or more where success is significantly better, as it is", False, numbers)
    return _Finding(sentence, bad, numbers)


def _drift(night: Night, settings: GateSettings, standing: Standing, *, declined: bool) -> tuple[_Finding, Standing]:
    """Have the candidates since the best, this one included, lost more than the margin on average?"""
    losses_T = night.best - night.candidate
    needed = 1 / (1 - settings.confidence)
    before = Capital(standing.capital) if standing.capital else Capital()
    if night.same:
        # To bet on it could only cost the margin. Whether it is left out is known before the bet, so no bet is chosen by how it
        # went, and the bound on false alarms stands.
        sentence = f"nothing is lost against the best champion, which the candidate is: evidence {before.total:.2g} as before"
        known = {"drift_evidence": before.total, "drift_needed": needed, "drift_nights": standing.nights}
        return _Finding(sentence, False, known | {"drift_loss": standing.lost, "drift_detectable": None}), standing
    capital = before.after(losses_T, settings.margin)
    if declined:
        capital = capital.at_most(max(before.total, 1 / needed) * MOST_OF_A_DECLINED)
    nights = standing.nights + 1
    lost = (standing.lost * standing.nights + float(losses_T.mean())) / nights if len(losses_T) else standing.lost
    plays, level = max(1, len(losses_T)) * nights, standing.began / needed
    smallest = settings.margin + betting.detectable(spread(losses_T), plays, level=level)
    bad = capital.total >= needed
    since = f"iteration {standing.best}" if standing.best else "the base policy"
    sentence = (
        f"over {nights} night{'s' if nights > 1 else ''} the candidates since {since} lost {100 * lost:.1f} points on average "
        f"against it: evidence {capital.total:.2g}, {'established at' if bad else 'established from'} {needed:.3g} "
        f"(an average of {100 * smallest:.1f} points would be with {POWER:.0%} power)"
    )
    numbers = {"drift_evidence": capital.total, "drift_needed": needed, "drift_nights": nights, "drift_loss": lost}
    return (
        _Finding(sentence, bad, numbers | {"drift_detectable": smallest}),
        replace(standing, capital=capital.logs, nights=nights, lost=lost),
    )


def _task_mean(scores: Sequence[Score], field: str) -> float:
    """Mean over tasks of the task's mean, so that both sides weigh the tasks alike."""
    values = by_task([s.task_id for s in scores], [float(getattr(s, field)) for s in scores])
    return sum(sum(row) / len(row) for row in values.values()) / len(values)


def _refuse_duplicates(name: str, scores: Sequence[Score]) -> None:
    counts = Counter((s.task_id, s.rollout) for s in scores)
    twice = sorted(key for key, count in counts.items() if count > 1)
    if twice:
        task, rollout = twice[0]
        raise DataError(
            f"gate: {name} scores hold {len(twice)} rollouts more than once, first rollout {rollout} of task {task!r}",
            "give the scores of one condition, each rollout once",
        )


def _refuse_mismatch(candidate: set[str], other: set[str], name: str) -> None:
    if candidate == other:
        return
    alone = sorted(candidate ^ other)
    side = "candidate" if alone[0] in candidate else name
    raise DataError(
        f"gate: candidate and {name} hold different tasks: {len(alone)} on one side only, first {alone[0]!r} ({side})",
        "score both on the same development tasks",
    )
