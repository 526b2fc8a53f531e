"""The gate: does the candidate replace the champion? (METHOD step 7)

Candidate and champion are compared on the same development tasks, task by task. Held-out scores never come here: a task that
decides something can no longer report anything.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from evolve_dag.errors import DataError
from evolve_dag.evaluation.intervals import by_task, paired_difference
from evolve_dag.records import Decision, Score
from evolve_dag.store.jsonvalues import from_values, to_values

if TYPE_CHECKING:
    from evolve_dag.config.schema import GateSettings

RESAMPLES = 4000
LEAST_JUDGED = 0.5
"""Share of the tasks that must be judged on both sides. A candidate that fails on the hard tasks must not win on the rest."""


@dataclass(frozen=True, slots=True)
class GateDecision:
    """What the gate decided, and on what."""

    decision: Decision
    """``promote``: the candidate becomes the champion. ``keep``: the champion stays."""
    reasons: tuple[str, ...]
    """Sentences for a reader: on ``keep`` what went wrong, on ``promote`` what was compared."""
    evidence: Mapping[str, float | None]
    """The numbers compared; None where a number is not known."""


def decide(candidate: Sequence[Score], champion: Sequence[Score], settings: GateSettings, seed: int) -> GateDecision:
    """Promote the candidate unless it lost something.

    Declines when too few tasks were judged on both sides, on a significant loss of success (the interval of the paired
    difference lies wholly below 0), on a rise of premature answers above ``max_premature_rise``, and on a ratio of mean turns
    above ``max_turn_ratio``. All checks run, so ``reasons`` names every one that failed.

    Args:
        candidate: scores of the new policy on the development tasks, of one condition.
        champion: scores of the policy that holds, on the same tasks.
        settings: thresholds.
        seed: decides the resamples of the interval.

    Raises:
        DataError: the two sides are not scores of the same tasks, or a side holds a rollout twice.
    """
    for name, scores in (("candidate", candidate), ("champion", champion)):
        _refuse_duplicates(name, scores)
    _refuse_mismatch({s.task_id for s in candidate}, {s.task_id for s in champion})

    rewards = [by_task([s.task_id for s in side], [s.reward for s in side]) for side in (candidate, champion)]
    tasks = len({s.task_id for s in candidate})
    judged = len(rewards[0].keys() & rewards[1].keys())
    evidence: dict[str, float | None] = {"tasks": tasks, "judged_tasks": judged, "confidence": settings.confidence}
    bad: list[str] = []
    good: list[str] = []

    compared = paired_difference(*rewards, resamples=RESAMPLES, confidence=settings.confidence, seed=seed)
    if judged == 0 or judged < LEAST_JUDGED * tasks:
        bad.append(
            f"too few to compare: {judged} of {tasks} development tasks were judged for both candidate and champion, "
            f"at least {LEAST_JUDGED:.0%} must be"
        )
    if compared is not None:
        difference, (low, high) = compared
        common = rewards[0].keys() & rewards[1].keys()
        means = [sum(sum(side[t]) / len(side[t]) for t in common) / len(common) for side in rewards]
        evidence |= {"success_candidate": means[0], "success_champion": means[1]}
        evidence |= {"success_difference": difference, "success_low": low, "success_high": high}
        sentence = (
            f"success {means[0]:.1%} against {means[1]:.1%}: {100 * difference:+.1f} points, "
            f"{settings.confidence:.0%} interval {100 * low:+.1f} to {100 * high:+.1f}"
        )
        (bad if high < 0 else good).append(f"significant loss of {sentence}" if high < 0 else sentence)

    if tasks:
        premature = [_task_mean(side, "premature") for side in (candidate, champion)]
        rise = premature[0] - premature[1]
        evidence |= {"premature_candidate": premature[0], "premature_champion": premature[1], "premature_rise": rise}
        evidence["max_premature_rise"] = settings.max_premature_rise
        sentence = f"premature answers {premature[0]:.1%} against {premature[1]:.1%}: {100 * rise:+.1f} points"
        limit = f"at most {100 * settings.max_premature_rise:+.1f} allowed"
        (bad if rise > settings.max_premature_rise else good).append(f"{sentence}, {limit}")

        turns = [_task_mean(side, "turns") for side in (candidate, champion)]
        ratio = turns[0] / turns[1] if turns[1] else None
        evidence |= {"turns_candidate": turns[0], "turns_champion": turns[1], "turn_ratio": ratio}
        evidence["max_turn_ratio"] = settings.max_turn_ratio
        if ratio is None:
            good.append(f"mean turns {turns[0]:.2f}; the champion took none, so there is no ratio")
        else:
            sentence = f"mean turns {turns[0]:.2f} against {turns[1]:.2f}: {ratio:.2f} times as many"
            limit = f"at most {settings.max_turn_ratio:.2f} allowed"
            (bad if ratio > settings.max_turn_ratio else good).append(f"{sentence}, {limit}")

    return GateDecision("keep" if bad else "promote", tuple(bad or good), evidence)


def gate_to_json(decision: GateDecision) -> dict[str, Any]:
    """``{"decision": "promote", "reasons": [...], "evidence": {"success_difference": 0.12, ...}}``."""
    return to_values(decision)


def gate_from_json(content: Mapping[str, Any]) -> GateDecision:
    """Read what :func:`gate_to_json` wrote; further keys are ignored.

    Raises:
        DataError: a key is missing or holds something else.
    """
    remedy = "the file was written by another version or changed by hand: run the promotion of this iteration again"
    return from_values(GateDecision, content, "gate decision", remedy)


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


def _refuse_mismatch(candidate: set[str], champion: set[str]) -> None:
    if candidate == champion:
        return
    alone = sorted(candidate ^ champion)
    side = "candidate" if alone[0] in candidate else "champion"
    raise DataError(
        f"gate: candidate and champion hold different tasks: {len(alone)} on one side only, first {alone[0]!r} ({side})",
        "score both on the same development tasks",
    )
