"""What a policy did on a set of tasks: success, and the ways of going wrong.

Every share is over all episodes (``n``) except success, which is over the judged ones (``judged``): an answer that
could not be judged is not a wrong answer. ``success_all`` stands beside it, so that no policy looks better for what was
not judged.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import comb
from typing import TYPE_CHECKING, Any

from evolve_dag.errors import DataError
from evolve_dag.evaluation.intervals import Interval, mean_interval, share_interval
from evolve_dag.plain import LAST_STEP, spaced
from evolve_dag.records import Score, Step, Task, Trajectory, solved
from evolve_dag.store.jsonvalues import from_values, to_values

if TYPE_CHECKING:
    from evolve_dag.config.schema import EvaluationSettings
from typing import TYPE_CHECKING

ALIASES = "aliases"
"""Metadata key of further right answers, ``|`` between them (see :mod:`evolve_dag.verification.exact`); no breakdown."""

MOST_VALUES = 12
"""A metadata key with more values than this (an id, a URL) is no breakdown."""

_LISTING = re.compile(r"\s*(no|\d+) results?\b", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Breakdown:
    """Results of the tasks that share one metadata value."""

    n: int
    """Episodes."""
    judged: int
    """Episodes with a reward."""
    success: float | None
    """Mean reward of the judged ones; None when none was judged."""
    interval: Interval | None
    """95% interval of ``success``."""
    premature: float
    """Share of the episodes."""


@dataclass(frozen=True, slots=True)
class Metrics:
    """Results of one policy under one condition on one set of tasks."""

    n: int
    """Episodes."""
    tasks: int
    """Different tasks among them."""
    judged: int
    """Episodes with a reward; what ``success`` is the mean of."""
    success: float | None = None
    """Mean reward of the judged episodes, 0..1; None when none was judged."""
    solved: float | None = None
    """Share of the judged episodes with reward 1, where parts of a reward are given; None where every reward is 0 or 1:
    ``success`` says it."""
    success_all: float | None = None
    """Mean reward of all episodes, with 0 for those that were not judged: what success is at least."""
    premature: float | None = None
    """Share of episodes that answered freely before any tool result held the answer, see :func:`is_premature`."""
    no_tool: float | None = None
    """Share of episodes that answered freely before any tool call (the paper's 63.82% under global injection)."""
    forced: float | None = None
    """Share of episodes that answered only when a limit demanded it."""
    unanswered: float | None = None
    """Share of episodes that never answered."""
    failed: float | None = None
    """Share of episodes that an error ended."""
    ended: float | None = None
    """Share of episodes that the environment ended; None also where an earlier version measured."""
    ended_solved: float | None = None
    """Share of episodes that the environment ended and that are solved; None as ``ended``."""
    turns: float | None = None
    """Mean assistant turns."""
    tokens: float | None = None
    """Mean sampled tokens."""
    problems: float | None = None
    """Mean refused actions (malformed, unknown tool, bad argument)."""
    intervals: Mapping[str, Interval | None] = field(default_factory=dict)
    """Name of a field above -> its interval over tasks."""
    by: Mapping[str, Mapping[str, Breakdown]] = field(default_factory=dict)
    """Metadata key (``hops``) -> value -> results."""
    pass_at: Mapping[int, float] = field(default_factory=dict)
    """k -> pass@k, the chance that one of k rollouts of a task is right; empty with one rollout a task (``success``, or where
    parts of a reward are given ``solved``, is Pass@1, and with several rollouts mean@n)."""


def stands_in(value: str, text: str) -> bool:
    """Whether ``value`` stands in ``text`` as whole words; case, width, spacing, the encoding of accents and a full stop behind
    ``value`` do not matter.

    >>> stands_in("rato  miku", "mayor: person Rato Miku"), stands_in("5", "built in 1995")
    (True, False)
    """
    whole = _normal(value)
    wanted = whole.rstrip(".,;:!?").strip("\"'") or whole
    if not wanted:
        return False
    before = r"(?<!\w)" if spaced(wanted[0]) else ""
    after = r"(?!\w)" if spaced(wanted[-1]) else ""
    return re.search(before + re.escape(wanted) + after, _normal(text)) is not None


def is_listing(observation: str) -> bool:
    """Whether an observation is a search listing: its first line counts results (``2 results``, ``no results``)."""
    return _LISTING.match(observation) is not None


def read_text(step: Step) -> str:
    """The part of a step's observation that can be evidence; '' when nothing was read.

    Not evidence: a listing (its snippets may be cut or stale), what was said about a refused action, the notice of a limit,
    and a one-line answer that only repeats what the call itself asked for (``no page named person Rato Miku``).
    """
    if step.call is None or step.problem is not None or step.observation is None or is_listing(step.observation):
        return ""
    lines = [line for line in step.observation.splitlines() if line.strip() and line.strip() != LAST_STEP]
    if len(lines) == 1:
        alone = _normal(lines[0])
        for asked in sorted((_normal(v) for v in step.call.texts.values()), key=len, reverse=True):
            alone = alone.replace(asked, " ") if asked else alone
        return alone
    return "\n".join(lines)


def is_premature(trajectory: Trajectory, references: Sequence[str] = ()) -> bool:
    """Whether the policy answered before any tool result held the answer's evidence.

    True when it answered of its own accord (status ``answered``; a forced answer has its own rate) and no observation before
    the answer holds the answer as text, see :func:`read_text` for which observations count. A right answer may be worded
    differently from the page: for an answer judged right (reward 1) one of ``references`` standing in the page will do.
    Never where the episode offers no tool: an answer there comes out of the question, and nothing was left unread.

    An answer that no page states (a count, yes or no) counts as premature whatever was read; compare such suites by
    :attr:`Metrics.no_tool`.

    Source: the premature answers of METHOD "What it found".
    """
    if trajectory.status != "answered" or trajectory.answer is None or not trajectory.offers_tools:
        return False
    values = [trajectory.answer, *(references if solved(trajectory.reward) else ())]
    read = [read_text(step) for step in _before_answer(trajectory)]
    return not any(stands_in(value, text) for text in read for value in values)


def answered_without_tool(trajectory: Trajectory) -> bool:
    """Whether the policy answered of its own accord before it made any tool call."""
    return trajectory.status == "answered" and not any(step.call is not None for step in _before_answer(trajectory))


def score_trajectories(trajectories: Iterable[Trajectory], tasks: Mapping[str, Task], condition: str) -> list[Score]:
    """One score row per trajectory, in the order given.

    Args:
        trajectories: verified rollouts.
        tasks: task id -> task.
        condition: ``without``, ``with`` or ``greedy``.

    Raises:
        DataError: a trajectory's task is not in ``tasks``.
    """
    scores = []
    for t in trajectories:
        task = _task_of(t, tasks)
        scores.append(
            Score(
                task_id=t.task_id,
                rollout=t.rollout,
                condition=condition,
                reward=t.reward,
                premature=is_premature(t, _references(task)),
                status=t.status,
                turns=t.turns,
                tokens=_sampled_tokens(t),
                answer=t.answer,
                metadata=dict(task.metadata),
            )
        )
    return scores


def measure(
    trajectories: Sequence[Trajectory],
    tasks: Mapping[str, Task],
    *,
    resamples: int = 2000,
    confidence: float = 0.95,
    seed: int = 0,
) -> Metrics:
    """Metrics of trajectories of one condition, with an interval over tasks for each.

    Args:
        trajectories: verified rollouts; several per task are one cluster.
        tasks: task id -> task; may hold more tasks than were rolled out.
        resamples: bootstrap resamples of an interval.
        confidence: level of the intervals.
        seed: decides the resamples.

    Returns:
        Metrics with every share None when there is no episode.

    Raises:
        DataError: a trajectory's task is not in ``tasks``.
    """
    references = [_task_of(t, tasks) for t in trajectories]
    ids = [t.task_id for t in trajectories]
    rewards = [t.reward for t in trajectories]
    if not trajectories:
        return Metrics(n=0, tasks=0, judged=0)
    premature = [float(is_premature(t, _references(task))) for t, task in zip(trajectories, references, strict=True)]
    shares: dict[str, Sequence[float | None]] = {
        "success": rewards,
        "success_all": [reward or 0.0 for reward in rewards],
        "premature": premature,
        "no_tool": [float(answered_without_tool(t)) for t in trajectories],
        **{status: [float(t.status == status) for t in trajectories] for status in ("forced", "unanswered", "failed")},
    }
    means: dict[str, Sequence[float | None]] = {
        "turns": [float(t.turns) for t in trajectories],
        "tokens": [float(_sampled_tokens(t)) for t in trajectories],
        "problems": [float(sum(step.problem is not None for step in t.steps)) for t in trajectories],
    }

    def over(interval: Callable[..., Interval | None], values: Sequence[float | None], which: Sequence[int]) -> Interval | None:
        return interval(
            [ids[i] for i in which], [values[i] for i in which], resamples=resamples, confidence=confidence, seed=seed
        )

    def breakdown(which: Sequence[int]) -> Breakdown:
        known = [rewards[i] for i in which]
        return Breakdown(
            n=len(which),
            judged=sum(r is not None for r in known),
            success=_mean(known),
            interval=over(share_interval, rewards, which),
            premature=sum(premature[i] for i in which) / len(which),
        )

    everything = range(len(trajectories))
    ended, ended_solved = ended_by_environment([t.status for t in trajectories], rewards)
    return Metrics(
        n=len(trajectories),
        tasks=len(set(ids)),
        judged=sum(r is not None for r in rewards),
        ended=ended,
        ended_solved=ended_solved,
        solved=_mean([None if r is None else float(solved(r)) for r in rewards]) if partial(rewards) else None,
        **{name: _mean(values) for name, values in (shares | means).items()},
        intervals={
            **{name: over(share_interval, values, everything) for name, values in shares.items()},
            **{name: over(mean_interval, values, everything) for name, values in means.items()},
        },
        by={
            key: {value: breakdown(which) for value, which in groups.items()}
            for key, groups in _groups([task.metadata for task in references]).items()
        },
        pass_at=pass_at(ids, rewards),
    )


def ended_by_environment(statuses: Sequence[str], rewards: Sequence[float | None]) -> tuple[float, float]:
    """``ended`` and ``ended_solved`` of :class:`Metrics`; of at least one episode."""
    found = [reward for status, reward in zip(statuses, rewards, strict=True) if status == "ended"]
    return len(found) / len(statuses), sum(map(solved, found)) / len(statuses)


def partial(rewards: Iterable[float | None]) -> bool:
    """Whether parts of a reward were given: then a mean reward is a score, and no share of episodes that are right."""
    return any(reward is not None and 0 < reward < 1 for reward in rewards)


def told_reward(reward: float | None) -> str:
    """``right``, ``wrong``, ``0.37 of 1`` or ``not judged``."""
    if reward is None:
        return "not judged"
    return {1.0: "right", 0.0: "wrong"}.get(reward, f"{reward:.2f} of 1")


def pass_at(task_ids: Sequence[str], rewards: Sequence[float | None]) -> dict[int, float]:
    """pass@k for k = 1, 2, 4, ... and the most rollouts that every judged task has; {} when that is one. Right is what is
    :func:`~evolve_dag.records.solved`.

    The unbiased estimate of one task with n judged rollouts, c of them right, is 1 - C(n-c, k) / C(n, k); its mean over tasks.
    """
    judged: dict[str, list[bool]] = {}
    for task_id, reward in zip(task_ids, rewards, strict=True):
        if reward is not None:
            judged.setdefault(task_id, []).append(solved(reward))
    most = min((len(known) for known in judged.values()), default=0)
    if most < 2:
        return {}
    ks = sorted({2**power for power in range(most.bit_length()) if 2**power <= most} | {most})
    counts = [(len(known), sum(known)) for known in judged.values()]
    return {k: sum(1 - comb(n - c, k) / comb(n, k) for n, c in counts) / len(counts) for k in ks}


def evaluate_summary(
    trajectories: Sequence[Trajectory], tasks: Mapping[str, Task] | Iterable[Task], settings: EvaluationSettings
) -> dict[str, Any]:
    """:func:`measure` with the experiment's settings, as JSON values: what a step writes under one condition.

    Raises:
        DataError: a trajectory's task is not in ``tasks``.
    """
    known = tasks if isinstance(tasks, Mapping) else {task.id: task for task in tasks}
    return metrics_to_json(measure(trajectories, known, resamples=settings.bootstrap, seed=settings.seed))


def metrics_to_json(metrics: Metrics) -> dict[str, Any]:
    """Plain JSON values; the shape is::

        {"n": 256, "tasks": 256, "judged": 256, "success": 0.61, "success_all": 0.61, ..., "problems": 0.02,
         "intervals": {"success": [0.55, 0.67], "premature": [...], ..., "turns": [...]},
         "by": {"hops": {"1": {"n": 90, "judged": 90, "success": 0.8, "interval": [0.71, 0.88], "premature": 0.05}}}}

    A share that is not known (no episode, none judged) is null.
    """
    return to_values(metrics)


def metrics_from_json(content: Mapping[str, Any]) -> Metrics:
    """Read what :func:`metrics_to_json` wrote.

    Raises:
        DataError: a key is missing or of another shape.
    """
    remedy = "the file was written by another version or changed by hand: run the evaluation of this iteration again"
    return from_values(Metrics, content, "metrics", remedy)


def _normal(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def _before_answer(trajectory: Trajectory) -> list[Step]:
    steps: list[Step] = []
    for step in trajectory.steps:
        if step.answer is not None:
            break
        steps.append(step)
    return steps


def _references(task: Task) -> list[str]:
    return [task.answer, *task.metadata.get(ALIASES, "").split("|")]


def _sampled_tokens(trajectory: Trajectory) -> int:
    return sum(len(step.token_ids) for step in trajectory.steps)


def _task_of(trajectory: Trajectory, tasks: Mapping[str, Task]) -> Task:
    task = tasks.get(trajectory.task_id)
    if task is None:
        raise DataError(
            f"trajectory {trajectory.id!r}: task {trajectory.task_id!r} is not among the {len(tasks)} tasks of this evaluation",
            "give the tasks that the trajectories were rolled out on",
        )
    return task


def _groups(metadata: Sequence[Mapping[str, str]]) -> dict[str, dict[str, list[int]]]:
    """Metadata key -> value -> rows, both sorted; keys with too many values left out."""
    found: dict[str, dict[str, list[int]]] = {}
    for row, facts in enumerate(metadata):
        for key, value in facts.items():
            found.setdefault(key, {}).setdefault(str(value), []).append(row)
    wanted = (key for key, values in sorted(found.items()) if len(values) <= MOST_VALUES and key != ALIASES)
    return {key: dict(sorted(found[key].items())) for key in wanted}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None


def counts(trajectories: Sequence[Trajectory]) -> dict[str, Any]:
    """Numbers for a manifest: episodes, judged, success, turns, sampled tokens, failures."""
    judged = [t.reward for t in trajectories if t.reward is not None]
    return {
        "trajectories": len(trajectories),
        "judged": len(judged),
        "success": sum(judged) / len(judged) if judged else None,
        "turns": sum(t.turns for t in trajectories) / max(1, len(trajectories)),
        "failed": sum(t.status == "failed" for t in trajectories),
        "unanswered": sum(t.status == "unanswered" for t in trajectories),
        "tokens": sum(len(s.token_ids) for t in trajectories for s in t.steps),
    }
