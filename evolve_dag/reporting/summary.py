"""A lineage as plain values: what every table, status and report shows, read from the store once.

What is read, by kind of artifact (all of it optional, so that a lineage can be looked at while it grows):

    scores      summary.json   {"without": metrics, "with": metrics, "greedy": metrics, "ceiling": metrics, "base": metrics,
                               "base_at_0.3": metrics}, each of them optional; "base" is what entered iteration 1, without
                               experience
    promotion   decision.json  see evaluation.gate.gate_to_json
    experience  manifest.summary  items, added, updated, deleted, merged, locality {name: share};  items.parquet
    contexts    teacher_check.json; what was measured of it (evolve_dag.lineage.audit), from the store's cache
    adapter     manifest.summary  rows, kept, loss_first, loss_last, ...;  curve.parquet or curve.json, one record a step
    any         manifest.seconds, manifest.summary["tokens"] (sampled tokens), digests; manifest.summary["calls"], per role
                what was asked of other models and what it cost (evolve_dag.inference.ledger.summarize)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from decimal import Decimal
from math import isfinite
from typing import TYPE_CHECKING, Any, NamedTuple

from evolve_dag.config import registry
from evolve_dag.errors import DataError, OrderError
from evolve_dag.evaluation.gate import GateDecision, gate_from_json, gate_to_json
from evolve_dag.evaluation.intervals import Interval
from evolve_dag.evaluation.metrics import Metrics, ended_by_environment, metrics_from_json, metrics_to_json
from evolve_dag.lineage.following import follows
from evolve_dag.records import ExperienceItem
from evolve_dag.steps.base import STEP_ORDER
from evolve_dag.steps.scores import BASE_AT
from evolve_dag.steps.teacher_check import check_of
from evolve_dag.store.artifacts import joined_config
from evolve_dag.store.jsonvalues import to_values
from evolve_dag.store.layout import CURVE, DECISION, ITEMS, SCORES, SUMMARY

if TYPE_CHECKING:
    from evolve_dag.experience.teacher_check import TeacherCheck
    from evolve_dag.lineage.audit import Internalized
    from evolve_dag.store.artifacts import Artifact, Ref, Store

EDITS = ("added", "updated", "deleted", "merged", "graduated", "recalled", "withdrawn")
"""Counts of pool edits, as the experience artifact's summary names them."""


LOCALITY = ("url", "number", "entity", "strategy")
"""Shares of the pool's items, as :class:`evolve_dag.experience.locality.Locality` names them."""


@dataclass(frozen=True, slots=True)
class StepRow:
    """One step of one iteration, as its artifact tells."""

    name: str
    digest: str
    seconds: float
    """Wall time of the process that made the artifact, whichever experiment that was."""
    tokens: int | None = None
    """Sampled tokens, see :func:`sampled_tokens`; None or 0 where the step samples nothing."""
    recomputed: bool | None = None
    """Whether the last run made it (True) or found it (False); None when that is not known."""
    resumed: bool = False
    """Part of the work was taken from a killed predecessor, so ``seconds`` is too small."""
    created: str = ""
    """ISO 8601, UTC."""
    code_version: str = ""
    calls: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Role (extractor, selector, judge) -> calls, errors, prompt_tokens, completion_tokens, cost, ..."""

    @property
    def cost(self) -> float | None:
        """US dollars of the calls; None where there were none, or where the price of one is not known."""
        costs = [sums.get("cost") for sums in self.calls.values()]
        known = [float(cost) for cost in costs if cost is not None]
        return sum(known) if known and len(known) == len(costs) else None


@dataclass(frozen=True, slots=True)
class IterationRow:
    """One iteration of a lineage; 0 is the base policy that entered the first one."""

    iteration: int
    without: Metrics | None = None
    """Held-out results of the candidate without experience in context (internalized)."""
    with_experience: Metrics | None = None
    """The same with the pool in context."""
    greedy: Metrics | None = None
    """Argmax, without experience."""
    ceiling: Metrics | None = None
    """The policy that entered the iteration, with E(k) in context."""
    at_temperature: Mapping[float, Metrics] = field(default_factory=dict)
    """Of the base policy: temperature -> results, without experience."""
    pool_size: int | None = None
    """Items in the pool E(k)."""
    edits: Mapping[str, int] = field(default_factory=dict)
    """Pool edits of this iteration: name as in :data:`EDITS` -> count."""
    locality: Mapping[str, float] = field(default_factory=dict)
    """Share of the pool's items with a URL, a number, ... (name -> 0..1)."""
    gate: GateDecision | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    """The adapter's summary: rows, kept, loss_first, loss_last, ..."""
    curve: tuple[Mapping[str, float], ...] = ()
    """Training curve, one record an optimizer step: ``loss`` and, where known, ``step``."""
    items: tuple[ExperienceItem, ...] = ()
    """The pool's items."""
    internalized: tuple[Internalized, ...] = ()
    """How much of each item is inside the weights; empty before ``evolve audit``."""
    check: TeacherCheck | None = None
    """What experience in its context did to the teacher; None where it was not asked."""
    steps: tuple[StepRow, ...] = ()


class Distance(NamedTuple):
    """Success of the champion less that of the best champion so far, on the same development tasks, 1 = all of them."""

    difference: float
    low: float
    """Of its interval."""
    high: float


@dataclass(frozen=True, slots=True)
class LineageSummary:
    """One experiment, as far as it has come."""

    experiment: str
    rows: tuple[IterationRow, ...]
    """By iteration; the base policy first once iteration 1 is scored."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Config slices that the artifacts were made with, dotted key -> value."""
    command: str = ""
    """What makes this lineage again."""
    outdated: tuple[int, ...] = ()
    """Iterations left out of ``rows``: they do not follow from the iterations before them, the config has changed since."""

    @property
    def iterations(self) -> tuple[IterationRow, ...]:
        """The rows without the base policy."""
        return tuple(row for row in self.rows if row.iteration > 0)

    @property
    def base_by_temperature(self) -> str:
        """``success by temperature: 0 31.2%, 0.3 40.6% (best), 1 25.8%``; '' where one temperature was tried."""
        tried = {t: metrics.success for t, metrics in self.rows[0].at_temperature.items()} if self.rows else {}
        known = {t: success for t, success in tried.items() if success is not None}
        if len(known) < 2:
            return ""
        best = max(known, key=lambda t: known[t])
        told = (f"{t:g} {percent(success)}{' (best)' if t == best else ''}" for t, success in known.items())
        return f"success by temperature: {', '.join(told)}"

    @property
    def champion(self) -> int | None:
        """Iteration whose candidate holds; 0 is the base policy; None before the first decision."""
        holds: int | None = None
        for row in self.rows:
            if row.gate is not None:
                kept = {"promote": row.iteration, "keep": holds or 0, "restore": row.gate.standing.champion}
                holds = kept[row.gate.decision]
        return holds

    @property
    def held(self) -> IterationRow | None:
        """What the lineage is known by: the row of its champion, before the first decision the last one that is scored; None
        where that is not scored."""
        scored = [row for row in self.rows if row.without is not None and self.champion in (None, row.iteration)]
        return scored[-1] if scored else None

    @property
    def best(self) -> int | None:
        """Iteration of the best champion so far; 0 is the base policy; None where it is not known."""
        standing = next((row.gate.standing for row in reversed(self.rows) if row.gate is not None), None)
        if standing is None or standing.champion != self.champion:  # a decision of before the best was recorded
            return None
        return standing.best

    @property
    def distance(self) -> Distance | None:
        """How far the champion is from the best one, as it was measured when it was the candidate; None before a decision."""
        champion, best = self.champion, self.best
        if champion is None or best is None:
            return None
        gate = next((row.gate for row in self.rows if row.iteration == champion and row.gate is not None), None)
        if champion == best or gate is None:
            return Distance(0.0, 0.0, 0.0)
        found = [gate.evidence.get(f"success_{name}") for name in ("difference", "low", "high")]
        return Distance(*found) if all(value is not None for value in found) else None  # type: ignore[arg-type]

    @property
    def seconds(self) -> float:
        """Wall time of all steps."""
        return sum(step.seconds for row in self.rows for step in row.steps)

    @property
    def tokens(self) -> int:
        """Sampled tokens of all steps."""
        return sum(step.tokens or 0 for row in self.rows for step in row.steps)


def summarize(
    store: Store, experiment: str, *, config: str | None = None, recomputed: Mapping[tuple[int, str], bool] | None = None
) -> LineageSummary:
    """Read a lineage from its refs and artifacts; writes nothing.

    Args:
        store: where the artifacts are.
        experiment: name of the lineage.
        config: path of the experiment file as the user calls it, for the command that makes it again; None: the one on record.
        recomputed: (iteration, step) -> whether this run made it. Without an entry the ref's fact ``recomputed`` is taken.

    Raises:
        OrderError: nothing of that name has been run in this store.
        StoreError: an artifact is missing or corrupt.
        DataError: an artifact's JSON is not what the steps write.
    """
    refs = store.refs(experiment)
    if not refs:
        known = sorted({ref.experiment for ref in store.refs()})
        have = f"it holds {', '.join(known)}" if known else "it is empty"
        raise OrderError(
            f"experiment {experiment!r} has not been run in {store.root} ({have})",
            f"run it first: {registry.run_command(store.root, experiment, config)}",
        )
    by_iteration: dict[int, dict[str, tuple[Ref, Artifact]]] = {}
    for ref in refs:
        by_iteration.setdefault(ref.iteration, {})[ref.kind] = (ref, store.open(ref.kind, ref.digest))
    last = max(by_iteration)
    if last > 1 and by_iteration[last].keys() == {"policy"}:
        del by_iteration[last]  # a promotion commits the next policy at once; that iteration has not begun
    measured = _internalized(store, experiment)
    rows: list[IterationRow] = []
    settings: dict[str, Any] = {}
    outdated: list[int] = []
    for iteration, found in sorted(by_iteration.items()):
        artifacts, before = _artifacts(found), _artifacts(by_iteration.get(iteration - 1, {}))
        # Under a changed config the first iterations may be new and the later ones old: one curve must not show both.
        if outdated or not follows(artifacts, before):
            outdated.append(iteration)
            continue
        settings |= joined_config(artifacts.values())
        scores = _json(artifacts.get("scores"), SUMMARY)
        if iteration == 1 and scores.get("base") is not None:
            rows.append(_base_row(scores, artifacts["scores"]))
        row = _row(iteration, found, artifacts, scores, recomputed or {})
        rows.append(replace(row, internalized=tuple(one for one in measured if one.iteration == iteration)))
    for entry in ("iteration", "policy", "standing"):  # part of what is computed, no setting
        settings.pop(entry, None)
    return LineageSummary(
        experiment,
        tuple(rows),
        dict(sorted(settings.items())),
        f"{registry.run_command(store.root, experiment, config, settings.get('seed'))} --iterations {max(by_iteration)}",
        tuple(outdated),
    )


def _artifacts(found: Mapping[str, tuple[Ref, Artifact]]) -> dict[str, Artifact]:
    return {kind: artifact for kind, (_, artifact) in found.items()}


def _base_row(scores: Mapping[str, Any], artifact: Artifact) -> IterationRow:
    """The policy that entered the first iteration, at every temperature that was tried."""
    named = {name: name.removeprefix(BASE_AT) for name in scores if name.startswith(BASE_AT)}
    others = {float(said): _metrics(scores, name, artifact) for name, said in named.items()}
    own = (artifact.manifest.config.get("rollout") or {}).get("temperature", 1.0)
    found = {own: _metrics(scores, "base", artifact), **others}
    known = {temperature: metrics for temperature, metrics in sorted(found.items()) if metrics is not None}
    return IterationRow(0, without=known.get(own), greedy=known.get(0.0), at_temperature=known)


def _row(
    iteration: int,
    found: Mapping[str, tuple[Ref, Artifact]],
    artifacts: Mapping[str, Artifact],
    scores: Mapping[str, Any],
    recomputed: Mapping[tuple[int, str], bool],
) -> IterationRow:
    experience, adapter = artifacts.get("experience"), artifacts.get("adapter")
    pool = experience.summary if experience else {}
    shares = pool.get("locality") or {}
    decision = _json(artifacts.get("promotion"), DECISION)
    return IterationRow(
        iteration,
        without=_metrics(scores, "without", artifacts.get("scores")),
        with_experience=_metrics(scores, "with", artifacts.get("scores")),
        greedy=_metrics(scores, "greedy", artifacts.get("scores")),
        ceiling=_metrics(scores, "ceiling", artifacts.get("scores")),
        pool_size=int(pool["items"]) if pool.get("items") is not None else None,
        edits={name: int(pool[name]) for name in EDITS if pool.get(name) is not None},
        locality={name: float(shares[name]) for name in LOCALITY if shares.get(name) is not None},
        gate=gate_from_json(decision) if decision else None,
        training=dict(adapter.summary) if adapter else {},
        curve=_curve(adapter),
        items=_items(experience),
        check=check_of(artifacts["contexts"]) if "contexts" in artifacts else None,
        steps=tuple(
            StepRow(
                name=kind,
                digest=ref.digest,
                seconds=artifact.manifest.seconds,
                tokens=sampled_tokens(artifact),
                recomputed=recomputed.get((iteration, kind), ref.facts.get("recomputed")),
                resumed=artifact.manifest.resumed,
                created=artifact.manifest.created,
                code_version=artifact.manifest.code_version,
                calls=_calls(artifact),
            )
            for kind, (ref, artifact) in sorted(found.items(), key=lambda entry: _order(entry[0]))
        ),
    )


STAYS: Mapping[str, str] = {"keep": "the champion stays", "restore": "the best champion so far comes back"}
"""Decision -> what becomes of the champion, where the candidate does not take its place."""


def standing_note(summary: LineageSummary) -> str:
    """Who holds, how far it is from the best champion so far, and what the nights since say; '' before the first decision."""
    gate = next((row.gate for row in reversed(summary.rows) if row.gate is not None), None)
    if gate is None:
        return ""
    told = f"The champion is {_policy_of(summary.champion)}."
    if summary.best is None or summary.best == summary.champion:
        return told if summary.best is None else f"{told} It is the best so far."
    told += f" The best so far is {_policy_of(summary.best)}."
    if (distance := summary.distance) is not None:
        low, high = (f"{100 * bound:+.1f}" for bound in (distance.low, distance.high))
        told += f" Champion against best: {100 * distance.difference:+.1f} points ({low} to {high})."
    standing, evidence = gate.standing, {name: gate.evidence.get(f"drift_{name}") for name in ("evidence", "needed")}
    if standing.nights and None not in evidence.values():
        told_nights = f"{standing.nights} night{'s' if standing.nights > 1 else ''}"
        told += (
            f" Candidates since the best: {-100 * standing.lost:+z.1f} points on average over {told_nights}; "
            f"evidence of a drift {evidence['evidence']:.2g}, established from {evidence['needed']:.3g}."
        )
    return told


def _policy_of(iteration: int | None) -> str:
    return f"the candidate of iteration {iteration}" if iteration else "the base policy"


def status_json(summary: LineageSummary) -> dict[str, Any]:
    """The summary as JSON values: what ``evolve status --json`` prints."""
    return {
        "experiment": summary.experiment,
        "champion": summary.champion,
        "best": summary.best,
        "distance_to_best": summary.distance._asdict() if summary.distance else None,
        "command": summary.command,
        "seconds": summary.seconds,
        "tokens": summary.tokens,
        "iterations": [
            {
                "iteration": row.iteration,
                "without": metrics_to_json(row.without) if row.without else None,
                "with": metrics_to_json(row.with_experience) if row.with_experience else None,
                "greedy": metrics_to_json(row.greedy) if row.greedy else None,
                "ceiling": metrics_to_json(row.ceiling) if row.ceiling else None,
                "at_temperature": {f"{t:g}": metrics_to_json(metrics) for t, metrics in row.at_temperature.items()},
                "pool": {"items": row.pool_size, **row.edits, "locality": dict(row.locality)},
                "teacher_check": to_values(row.check) if row.check else None,
                "training": dict(row.training),
                "gate": gate_to_json(row.gate) if row.gate else None,
                "internalized": {
                    one.item: {"before": one.before, "after": one.after, "now": one.now, "share": one.share}
                    for one in row.internalized
                    if one.item
                },
                "steps": {
                    step.name: {
                        "digest": step.digest,
                        "seconds": step.seconds,
                        "tokens": step.tokens,
                        "recomputed": step.recomputed,
                        "resumed": step.resumed,
                        "created": step.created,
                        **({"calls": dict(step.calls), "cost": step.cost} if step.calls else {}),
                    }
                    for step in row.steps
                },
            }
            for row in summary.rows
        ],
    }


# -- how values are shown, the same in the terminal and in the report


def percent(value: float | None) -> str:
    """``0.6123`` -> ``61.2%``; unknown is a dash, never 0."""
    return "–" if value is None else f"{100 * value:.1f}%"


def percent_interval(interval: Interval | None) -> str:
    """``(0.551, 0.67)`` -> ``55.1–67.0``; '' when there is none."""
    return "" if interval is None else f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}"


def judged_of(metrics: Metrics) -> str:
    """``256 of 256``, or ``200 of 256 (17.8% of all right)``: what is not judged must not make a policy look better."""
    shares = f"{metrics.judged} of {metrics.n}"
    if metrics.judged == metrics.n or metrics.success_all is None:
        return shares
    return f"{shares} ({percent(metrics.success_all)} of all right)"


def number(value: float | None) -> str:
    """``5.213`` -> ``5.21``."""
    return "–" if value is None else f"{value:.2f}"


def number_interval(interval: Interval | None) -> str:
    """``(5.0, 5.4)`` -> ``5.00–5.40``."""
    return "" if interval is None else f"{interval[0]:.2f}–{interval[1]:.2f}"


def nats(value: float | None) -> str:
    """A divergence per token."""
    return "–" if value is None else f"{value:.4f}"


def plain(value: Any) -> str:
    """A fact of an artifact, whatever it is."""
    return "–" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


def duration(seconds: float) -> str:
    """``7.4 s``, ``3 min 05 s``, ``2 h 10 min``."""
    if seconds < 99.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def dollars(value: float | None) -> str:
    """``0.0123`` -> ``$0.012``; unknown is a dash, never 0."""
    return "–" if value is None else f"${value:.2f}" if value >= 0.995 or value == 0 else f"${Decimal(f'{value:.2g}'):f}"


def count(value: int | None) -> str:
    """``41200`` -> ``41.2k``; ``999_960`` is ``1.0M``, as it is rounded."""
    if value is None:
        return "–"
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**3)):
        if value >= 0.99995 * size:
            return f"{value / size:.1f}{unit}"
    return str(value)


def mean_count(value: float) -> str:
    """``7.333`` -> ``7.33``, ``1250.5`` -> ``1250``: a mean of counts."""
    return f"{value:.3g}" if value < 999.5 else f"{value:.0f}"


def step_names(rows: Iterable[IterationRow]) -> list[str]:
    """The steps that occur in ``rows``, in the order of the loop."""
    return sorted({step.name for row in rows for step in row.steps}, key=_order)


def recompute_note(summary: LineageSummary) -> str:
    """``0 of 21 steps recomputed``, or '' when the last run is not known."""
    known = [step.recomputed for row in summary.rows for step in row.steps if step.recomputed is not None]
    note = f"{sum(known)} of {len(known)} steps recomputed" if known else ""
    if summary.outdated:
        which = ", ".join(map(str, summary.outdated))
        left_out = f"iteration {which} left out: made under another config; run the experiment again"
        note = f"{note}\n{left_out}" if note else left_out
    return note


def sampled_tokens(artifact: Artifact) -> int | None:
    """Tokens that were sampled for an artifact: those of the policy, which the step counts itself wherever it runs, and those
    of every other role, also where the policy plays it (as extractor or selector). None: the step tells of none.

    A judge's are left out: its verdicts are remembered for the whole store, so that they would count where they were first
    asked for, whichever arm of a study or iteration came first.
    """
    own, calls = artifact.summary.get("tokens"), _calls(artifact)
    if own is None and not calls:
        return None
    others = (sums for role, sums in calls.items() if role not in ("policy", "judge"))
    return int(own or 0) + sum(int(sums.get("completion_tokens") or 0) for sums in others)


# -- inside


def _internalized(store: Store, experiment: str) -> tuple[Internalized, ...]:
    from evolve_dag.lineage import audit

    if not (store.root / "cache" / "audit").is_dir():
        return ()
    return audit.read(store, experiment).items


def _calls(artifact: Artifact) -> Mapping[str, Mapping[str, Any]]:
    calls = artifact.summary.get("calls")
    return {role: sums for role, sums in calls.items() if isinstance(sums, Mapping)} if isinstance(calls, Mapping) else {}


def _order(kind: str) -> tuple[int, str]:
    return (STEP_ORDER.index(kind) if kind in STEP_ORDER else len(STEP_ORDER), kind)


def _json(artifact: Artifact | None, name: str) -> Mapping[str, Any]:
    if artifact is None:
        return {}
    content = artifact.json(name)
    if not isinstance(content, Mapping):
        raise DataError(f"{artifact.path / name}: holds a {type(content).__name__}, not an object", "run this step again")
    return content


def _metrics(scores: Mapping[str, Any], condition: str, artifact: Artifact | None) -> Metrics | None:
    if scores.get(condition) is None:
        return None
    try:
        found = metrics_from_json(scores[condition])
    except DataError as error:
        where = artifact.path / SUMMARY if artifact else SUMMARY
        raise DataError(f"{where}: {condition}: {error.what}", error.remedy) from error
    if found.ended is not None or artifact is None or SCORES not in artifact.manifest.files:
        return found
    episodes = artifact.frame(SCORES)  # of an earlier version, which did not count them
    episodes = episodes.filter(episodes["condition"] == condition)
    if episodes.is_empty():
        return found
    ended, ended_solved = ended_by_environment(list(episodes["status"]), list(episodes["reward"]))
    return replace(found, ended=ended, ended_solved=ended_solved)


def _curve(adapter: Artifact | None) -> tuple[Mapping[str, float], ...]:
    if adapter is None:
        return ()
    if CURVE in adapter.manifest.files:
        records: Any = adapter.frame(CURVE).to_dicts()
    elif "curve.json" in adapter.manifest.files:
        records = adapter.json("curve.json")
    else:
        return ()
    numbers = [{k: float(v) for k, v in record.items() if isinstance(v, (int, float)) and isfinite(v)} for record in records]
    return tuple(record for record in numbers if "loss" in record)


def _items(experience: Artifact | None) -> tuple[ExperienceItem, ...]:
    if experience is None or ITEMS not in experience.manifest.files:
        return ()
    from evolve_dag.store.frames import items_from_frame

    return tuple(items_from_frame(experience.frame(ITEMS)))
