"""What every experience item of a lineage did, and the chain from a score row back to the trajectories that taught it.

Read from the artifacts that the iterations use now, as plain values for the audit page. What is counted here is
*observational*: an item is chosen where it seems to fit, so episodes with it differ from episodes without it in more than
the item.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from evolve_dag.agent.actions import parse_action
from evolve_dag.evaluation.intervals import Interval, share_interval
from evolve_dag.experience.features import Tracker
from evolve_dag.lineage import audit
from evolve_dag.records import ExperienceItem, PoolEdit, Step, ToolCall
from evolve_dag.steps.base import STEP_ORDER
from evolve_dag.steps.teacher_check import check_of
from evolve_dag.store.frames import edits_from_frame, items_from_frame
from evolve_dag.store.layout import CONTEXTS, DECISION, EDITS, ITEMS, SCORES, STEPS, TRAJECTORIES

if TYPE_CHECKING:
    import polars as pl

    from evolve_dag.experience.teacher_check import CheckedItem
    from evolve_dag.store.artifacts import Artifact, Store

STATES_FROM = 1000
"""Episodes per iteration whose steps are read for the states in which an item is chosen."""
STATES = 4
"""Features that an item's states are told by."""
SPELLED_OUT = 100
"""Trajectories of one table whose actions and observations are read; of the others only what is counted."""
TAUGHT = 3
"""Trajectories per edit that are shown in full."""


@dataclass(frozen=True, slots=True)
class Share:
    """Success over some episodes."""

    episodes: int
    """Judged ones."""
    success: float | None
    interval: Interval | None
    """95%, over tasks."""


@dataclass(frozen=True, slots=True)
class Contrast:
    """Success of episodes in which an item was chosen at least once, and of the others."""

    where: str
    """``teacher``: the rollouts that are learned from, before rejection. ``held-out``: evaluation, experience in context."""
    steps: int
    """Steps at which it was chosen."""
    of: int
    """All steps."""
    chosen: Share
    other: Share


@dataclass(frozen=True, slots=True)
class State:
    """One feature value of the situations in which an item is chosen."""

    feature: str
    value: str
    share: float
    """Of the steps at which it was chosen."""
    all: float
    """Of all steps."""


@dataclass(frozen=True, slots=True)
class Principle:
    """One item over all iterations."""

    item: ExperienceItem
    gone: int | None
    """Iteration that deleted or merged it; None while it is in the newest pool."""
    edits: tuple[PoolEdit, ...]
    states: tuple[State, ...]
    learned: Mapping[int, tuple[int, int]]
    """Iteration -> (learned steps where it stood in the teacher's context, all learned steps)."""
    contrasts: Mapping[int, tuple[Contrast, ...]]
    """Iteration -> success with and without it."""
    checks: Mapping[int, CheckedItem]
    """Iteration -> what it did to the teacher, against the student on the same tasks."""
    internalized: tuple[audit.Internalized, ...]
    """By iteration; empty before ``evolve audit``."""


@dataclass(frozen=True, slots=True)
class ShownStep:
    """One step of a trajectory."""

    index: int
    text: str
    """'' for a trajectory that is not spelled out, see :data:`SPELLED_OUT`."""
    observation: str | None
    selected: tuple[str, ...]
    action: str = ""
    """The tool call or the answer, in words; '' where the action was neither, or is not spelled out."""
    problem: str | None = None
    """Why the action was refused."""

    @property
    def thought(self) -> str:
        """What the policy wrote before its call or answer; all of it where it made none."""
        return parse_action(self.text).thought if self.action else self.text


@dataclass(frozen=True, slots=True)
class Shown:
    """A trajectory as a reader needs it."""

    id: str
    question: str
    status: str
    reward: float | None
    answer: str | None
    steps: tuple[ShownStep, ...]

    @property
    def items(self) -> tuple[str, ...]:
        """Ids of the items that stood in its context, in order of appearance."""
        return tuple(dict.fromkeys(name for step in self.steps for name in step.selected))


@dataclass(frozen=True, slots=True)
class ScoreRow:
    """One evaluation rollout."""

    condition: str
    id: str
    """``<task>#<rollout>``."""
    reward: float | None
    premature: bool
    shown: Shown | None
    """The rollout itself."""


@dataclass(frozen=True, slots=True)
class Chain:
    """One iteration: what was made of what."""

    iteration: int
    artifacts: Mapping[str, tuple[str, Mapping[str, Any]]]
    """Step -> (digest, summary), in the order of the loop."""
    entering: Mapping[str, Any]
    """policy(k) by value: base, adapter, experience."""
    decision: str | None
    reasons: tuple[str, ...]
    learned: tuple[Shown, ...]
    """Trajectories that the student learned from; their steps hold the learned ones only."""
    scores: tuple[ScoreRow, ...]
    """Held-out rollouts, without and with experience in context."""
    taught: Mapping[str, Shown]
    """Training rollouts that taught an item: id -> trajectory."""


@dataclass(frozen=True, slots=True)
class Facts:
    """Everything that the audit page shows."""

    experiment: str
    principles: tuple[Principle, ...]
    """The newest pool first, in its order; then those that are gone."""
    chains: tuple[Chain, ...]
    notes: tuple[str, ...] = field(default=())


def gather(store: Store, experiment: str, iterations: Sequence[int] | None = None) -> Facts:
    """Read a lineage; writes nothing.

    Args:
        iterations: those to read; None reads all that have references.

    Raises:
        OrderError: the experiment has not been run.
        StoreError: an artifact is missing or corrupt.
        DataError: an artifact was written by another version.
    """
    measured = audit.read(store, experiment)
    found: dict[int, dict[str, Artifact]] = {}
    for ref in store.refs(experiment):
        if iterations is None or ref.iteration in iterations:
            found.setdefault(ref.iteration, {})[ref.kind] = store.open(ref.kind, ref.digest)
    seen = _Seen()
    chains = [_chain(k, artifacts, seen) for k, artifacts in sorted(found.items()) if artifacts.keys() != {"policy"}]
    return Facts(experiment, seen.principles(measured), tuple(chains), measured.notes)


class _Seen:
    """What is gathered per item while the iterations are walked through."""

    def __init__(self) -> None:
        self.items: dict[str, ExperienceItem] = {}
        self.newest: tuple[str, ...] = ()
        self.edits: dict[str, dict[tuple[Any, ...], PoolEdit]] = {}
        self.learned: dict[str, dict[int, tuple[int, int]]] = {}
        self.contrasts: dict[str, dict[int, list[Contrast]]] = {}
        self.checks: dict[str, dict[int, CheckedItem]] = {}
        self.states: dict[str, Counter[tuple[str, str]]] = {}
        self.all_states: Counter[tuple[str, str]] = Counter()
        self.steps: Counter[str] = Counter()
        self.all_steps = 0

    def pool(self, experience: Artifact) -> None:
        """Items and edits of one pool; a pool carries the edits of its predecessors, which are told once."""
        items = items_from_frame(experience.frame(ITEMS))
        self.items |= {item.id: item for item in items}
        self.newest = tuple(item.id for item in items)
        for edit in edits_from_frame(experience.frame(EDITS)):
            key = (edit.operation, edit.iteration, edit.reason, edit.before, edit.after)
            self.edits.setdefault(edit.item_id, {}).setdefault(key, edit)

    def learn(self, iteration: int, contexts: pl.DataFrame) -> None:
        """Learned steps of one iteration."""
        counts: Counter[str] = Counter(name for names in contexts["selected"].to_list() for name in set(names))
        for name, count in counts.items():
            self.learned.setdefault(name, {})[iteration] = (count, contexts.height)

    def contrast(self, iteration: int, where: str, rolled: Sequence[Shown]) -> None:
        """Success of episodes with and without each item, and the states in which each was chosen."""
        # `<task>#<rollout>`, or `with/<task>#<rollout>`: intervals are over tasks, rollouts of one are no independent evidence
        tasks = [one.id.rpartition("#")[0] for one in rolled]
        rewards = [one.reward for one in rolled]
        held = [set(one.items) for one in rolled]
        steps = sum(len(one.steps) for one in rolled)
        counts: Counter[str] = Counter(name for one in rolled for step in one.steps for name in set(step.selected))
        for name in sorted(counts):
            inside = [name in names for names in held]
            shares = [
                _share([(task, reward) for task, reward, one in zip(tasks, rewards, inside, strict=True) if one is wanted])
                for wanted in (True, False)
            ]
            self.contrasts.setdefault(name, {}).setdefault(iteration, []).append(Contrast(where, counts[name], steps, *shares))

    def situations(self, rows: Iterable[tuple[Sequence[str], Mapping[str, str]]]) -> None:
        """(chosen items, features before the step) of many steps."""
        for names, features in rows:
            values = list(features.items())
            self.all_steps += 1
            self.all_states.update(values)
            for name in set(names):
                self.steps[name] += 1
                self.states.setdefault(name, Counter()).update(values)

    def principles(self, measured: audit.Audit) -> tuple[Principle, ...]:
        order = [*self.newest, *(name for name in self.items if name not in self.newest)]
        by_item: dict[str, list[audit.Internalized]] = {}
        for one in measured.items:
            by_item.setdefault(one.item, []).append(one)
        return tuple(
            Principle(
                self.items[name],
                None if name in self.newest else self._gone(name),
                tuple(sorted(self.edits.get(name, {}).values(), key=lambda edit: edit.iteration)),
                self._states(name),
                self.learned.get(name, {}),
                {k: tuple(contrasts) for k, contrasts in self.contrasts.get(name, {}).items()},
                self.checks.get(name, {}),
                tuple(by_item.get(name, ())),
            )
            for name in order
        )

    def _gone(self, name: str) -> int | None:
        ended = [edit.iteration for edit in self.edits.get(name, {}).values() if edit.operation in ("delete", "merge")]
        return max(ended, default=0)

    def _states(self, name: str) -> tuple[State, ...]:
        """Values that are common where it is chosen and rarer elsewhere."""
        own = self.states.get(name)
        if not own:
            return ()
        states = [
            State(feature, value, count / self.steps[name], self.all_states[feature, value] / self.all_steps)
            for (feature, value), count in own.items()
        ]
        # A value that is as common everywhere tells nothing of the item, and a rare one is not why it was chosen.
        telling = [state for state in states if state.share >= 0.25 and state.share > 1.1 * state.all]
        return tuple(sorted(telling, key=lambda state: (-(state.share - state.all), state.feature, state.value))[:STATES])


def _chain(iteration: int, artifacts: Mapping[str, Artifact], seen: _Seen) -> Chain:
    experience, contexts, scores = (artifacts.get(name) for name in ("experience", "contexts", "scores"))
    if experience is not None:
        seen.pool(experience)
    learned: list[Shown] = []
    if contexts is not None and CONTEXTS in contexts.manifest.files:
        learned = _learned(contexts, iteration, seen)
    rows: list[ScoreRow] = []
    if scores is not None:
        rows = _scores(scores, iteration, seen)
    decision = artifacts["promotion"].json(DECISION) if "promotion" in artifacts else {}
    policy = artifacts["policy"].manifest.config.get("policy") if "policy" in artifacts else None
    return Chain(
        iteration,
        {name: (artifacts[name].digest, artifacts[name].summary) for name in STEP_ORDER if name in artifacts},
        policy if isinstance(policy, Mapping) else {},
        decision.get("decision"),
        tuple(decision.get("reasons") or ()),
        tuple(learned),
        tuple(rows),
        _taught(artifacts.get("trajectories"), iteration, seen),
    )


def _learned(contexts: Artifact, iteration: int, seen: _Seen) -> list[Shown]:
    frame = _columns(contexts, CONTEXTS, "trajectory_id", "step", "selected")
    seen.learn(iteration, frame)
    check = check_of(contexts)
    for one in check.items if check is not None else ():
        seen.checks.setdefault(one.item, {})[iteration] = one
    rolled = _rolled(contexts, set(frame["trajectory_id"].unique(maintain_order=True).head(SPELLED_OUT)))
    if contexts.manifest.config.get("regime.source") == "teacher":
        # A student's own rollouts did not have the items in their context: their success says nothing about them.
        seen.contrast(iteration, "teacher", rolled)
    seen.situations(_situations(contexts, STATES_FROM))
    kept: dict[str, set[int]] = {}
    for name, step in frame.select("trajectory_id", "step").iter_rows():
        kept.setdefault(name, set()).add(step)
    return [
        Shown(
            one.id,
            one.question,
            one.status,
            one.reward,
            one.answer,
            tuple(step for step in one.steps if step.index in kept[one.id]),
        )
        for one in rolled
        if one.id in kept
    ]


def _scores(scores: Artifact, iteration: int, seen: _Seen) -> list[ScoreRow]:
    table = _columns(scores, SCORES, "task_id", "rollout", "condition", "reward", "premature").to_dicts()
    named = [(row, f"{row['task_id']}#{row['rollout']}") for row in table if row["condition"] in ("without", "with")]
    spelled: set[str] = set()
    for condition in ("without", "with"):
        spelled |= {f"{condition}/{id}" for row, id in [p for p in named if p[0]["condition"] == condition][:SPELLED_OUT]}
    rolled = {one.id: one for one in _rolled(scores, spelled)}
    seen.contrast(iteration, "held-out", [one for name, one in rolled.items() if name.startswith("with/")])
    return [
        ScoreRow(row["condition"], id, row["reward"], row["premature"], rolled.get(f"{row['condition']}/{id}"))
        for row, id in named
    ]


def _taught(trajectories: Artifact | None, iteration: int, seen: _Seen) -> dict[str, Shown]:
    """The first trajectories of every edit that this iteration made."""
    if trajectories is None:
        return {}
    wanted: list[str] = []
    for edits in seen.edits.values():
        wanted += [name for edit in edits.values() if edit.iteration == iteration for name in edit.trajectory_ids[:TAUGHT]]
    return {one.id: one for one in _rolled(trajectories, set(wanted)) if one.id in wanted} if wanted else {}


def _columns(artifact: Artifact, file: str, *names: str, of: Iterable[str] | None = None) -> pl.DataFrame:
    """Some columns of a Parquet file, those that it has, of the trajectories ``of`` alone where given; nothing else is read."""
    import polars as pl

    frame = pl.scan_parquet(artifact.file(file), glob=False)
    if of is not None:
        frame = frame.filter(pl.col("trajectory_id").is_in(list(of)))
    return frame.select([name for name in names if name in frame.collect_schema()]).collect()


def _rolled(artifact: Artifact, spelled: set[str]) -> list[Shown]:
    """All trajectories of an artifact, those of ``spelled`` with what was done and seen.

    Only the columns that are shown are read, so that any version of the file will do.
    """
    heads = _columns(artifact, TRAJECTORIES, "id", "question", "status", "reward", "answer")
    light = _columns(artifact, STEPS, "trajectory_id", "index", "selected")
    spelled_out = ("text", "observation", "tool", "arguments", "answer", "problem")
    heavy = _columns(artifact, STEPS, "trajectory_id", "index", *spelled_out, of=spelled)
    rows = {(row["trajectory_id"], row["index"]): row for row in heavy.iter_rows(named=True)}
    of: dict[str, list[ShownStep]] = {}
    for name, index, selected in light.iter_rows():
        of.setdefault(name, []).append(_shown_step(index, tuple(selected), rows.get((name, index), {})))
    return [
        Shown(name, question, status, reward, answer, tuple(sorted(of.get(name, ()), key=lambda step: step.index)))
        for name, question, status, reward, answer in heads.iter_rows()
    ]


def _shown_step(index: int, selected: tuple[str, ...], row: Mapping[str, Any]) -> ShownStep:
    call = _call(row)
    answer = None if row.get("answer") is None else f"answer: {row['answer']}"
    text, observation, problem = row.get("text") or "", row.get("observation"), row.get("problem")
    return ShownStep(index, text, observation, selected, str(call) if call is not None else answer or "", problem)


def _call(row: Mapping[str, Any]) -> ToolCall | None:
    return None if row.get("tool") is None else ToolCall(row["tool"], json.loads(row["arguments"] or "{}"))


def _situations(artifact: Artifact, most: int) -> Iterable[tuple[Sequence[str], Mapping[str, str]]]:
    """Chosen items and features before every step of the first ``most`` episodes."""
    questions = dict(_columns(artifact, TRAJECTORIES, "id", "question").head(most).iter_rows())
    names = ("trajectory_id", "index", "text", "tool", "arguments", "answer", "observation", "problem", "selected", "features")
    walks: dict[str, Tracker] = {}
    steps = _columns(artifact, STEPS, *names, of=questions)
    for row in steps.sort("trajectory_id", "index").iter_rows(named=True):
        name = row["trajectory_id"]
        walk = walks.setdefault(name, Tracker(questions[name], history=True))
        yield row["selected"], walk.features()
        walk.append(
            Step(
                row["index"],
                row["text"],
                (),
                (),
                call=_call(row),
                answer=row["answer"],
                observation=row["observation"],
                problem=row["problem"],
                features=json.loads(row.get("features") or "{}"),
            )
        )


def _share(pairs: Sequence[tuple[str, float | None]]) -> Share:
    judged = [(task, reward) for task, reward in pairs if reward is not None]
    if not judged:
        return Share(0, None, None)
    tasks, rewards = [task for task, _ in judged], [reward for _, reward in judged]
    return Share(len(judged), sum(rewards) / len(rewards), share_interval(tasks, rewards, resamples=500))
