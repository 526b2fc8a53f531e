"""How much of each experience item is inside the weights: teacher to student, before and after each iteration.

For every learned step of iteration k the contexts artifact holds what the teacher policy(k), with experience in its context,
would have done: its log-probabilities on the action tokens. The teacher is the one that adapter(k) was trained on: at its
``distillation.teacher_temperature``, where it read experience. A student without experience is laid beside it, KL(teacher ||
student) per action token: policy(k) itself *before* training, the candidate adapter(k) *after*, and the policy that the
lineage holds *now*. What is gone of the divergence is what the weights have taken over (METHOD: what no one measured)::

    share inside = 1 - after / before        summed over the tokens of the steps where the item stood in the teacher's context

A step with several items counts for each of them, so items that always stand together cannot be told apart. The steps are
those that were trained on: the share says what was learned there, held-out success says what it is good for.

A measurement is a function of two digests and the temperature, so it is kept:
``<store>/cache/audit/<contexts>-<adapter or base>.json``, with ``-<temperature>`` at the end of the name where it is not 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve_dag.config import registry
from evolve_dag.errors import ConfigError, DataError, StoreError
from evolve_dag.lineage.following import follows
from evolve_dag.store.disk import write_atomic
from evolve_dag.store.layout import DECISION, ITEMS

if TYPE_CHECKING:
    from rich.console import RenderableType
    from torch import nn

    from evolve_dag.config.schema import Experiment
    from evolve_dag.distillation.dataset import DistillationRow
    from evolve_dag.store.artifacts import Artifact, Store

FORMAT = 2
BASE = "base"
"""Stands for the bare base model in the name of a measurement."""
ALL, NONE = "", "-"
"""In place of an item's id: all steps, and the steps without any item. No item is named so."""
LEAST = 1e-5
"""Nats per token below which teacher and student are one: of rounding noise there is no share."""
RESAMPLES = 1000

Interval = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Sums:
    """Divergence over some steps of one task."""

    steps: int
    tokens: int
    """Action tokens."""
    nats: float
    """KL(teacher || student), summed over the tokens."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One student on the learned steps of one contexts artifact."""

    contexts: str
    adapter: str | None
    """Digest; None for the bare base model."""
    by: Mapping[str, Mapping[str, Sums]]
    """Item id (or :data:`ALL`, :data:`NONE`) -> task id -> sums."""
    temperature: float = 1.0
    """Of the teacher, where it read experience."""

    def mean(self, item: str = ALL) -> float | None:
        """Nats per action token at the steps of ``item``; None without a step."""
        tokens = sum(one.tokens for one in self.by.get(item, {}).values())
        return sum(one.nats for one in self.by[item].values()) / tokens if tokens else None


@dataclass(frozen=True, slots=True)
class Internalized:
    """One item in one iteration."""

    item: str
    """Id; :data:`ALL` for all steps together, :data:`NONE` for those without any item."""
    iteration: int
    text: str
    steps: int
    """Learned steps where it stood in the teacher's context."""
    tokens: int
    """Their action tokens."""
    before: float
    """Nats per token from the teacher to policy(k)."""
    after: float
    """To the candidate adapter(k)."""
    now: float | None
    """To the policy that the lineage holds now."""
    interval: Interval | None
    """Of ``share``, 95%, bootstrapped over tasks."""
    interval_now: Interval | None = None
    """Of ``share_now``."""
    temperature: float = 1.0
    """Of the teacher that adapter(k) was trained on, where it read experience."""

    @property
    def share(self) -> float | None:
        """Part of the divergence that adapter(k) took over; negative when it moved away; None when there was next to none."""
        return 1 - self.after / self.before if self.before >= LEAST else None

    @property
    def share_now(self) -> float | None:
        """The same for the policy that the lineage holds now."""
        return 1 - self.now / self.before if self.before >= LEAST and self.now is not None else None


@dataclass(frozen=True, slots=True)
class Audit:
    """What is known of a lineage."""

    experiment: str
    items: tuple[Internalized, ...]
    """By iteration; within it all steps together first, then by the nats that there were to take over."""
    notes: tuple[str, ...] = field(default=())
    """Iterations that could not be measured, and why."""


@dataclass(frozen=True, slots=True)
class _Iteration:
    number: int
    contexts: Artifact
    entering: str | None
    """Digest of the adapter of policy(k)."""
    base: str
    adapter: str
    now: str | None
    temperature: float
    """Of the teacher that the adapter was trained on."""


def measure(
    experiment: Experiment, store: Store, say: Callable[[str], object] | None = None, *, config: str | None = None
) -> Audit:
    """Measure what is not measured yet, and return all of it. A few seconds per iteration of the pocket default.

    Args:
        say: told a line per measurement that is made.
        config: the experiment file as the user calls it, for the command that runs it; None: the one on record.

    Raises:
        OrderError: the experiment has not been run.
        ConfigError: the experiment file names another base model than the one that was trained.
        StoreError: an artifact is missing or corrupt, or the measurement cannot be written.
    """
    wanted: dict[str, list[str | None]] = {}
    contexts: dict[str, _Iteration] = {}
    for one in _iterations(store, experiment.experiment, config):
        contexts[one.contexts.digest] = one
        students = wanted.setdefault(one.contexts.digest, [])
        students += [s for s in (one.entering, one.adapter, one.now) if _read(store, one, s) is None]
    todo = [(digest, student) for digest, students in wanted.items() for student in dict.fromkeys(students)]
    if todo:
        _measure(experiment, store, contexts, todo, say)
    return read(store, experiment.experiment)


def read(store: Store, experiment: str) -> Audit:
    """What has been measured of a lineage so far; computes and writes nothing.

    Raises:
        OrderError: the experiment has not been run.
        StoreError: an artifact of the lineage is missing or corrupt.
    """
    items: list[Internalized] = []
    notes: list[str] = []
    for one in _iterations(store, experiment):
        before, after = (_read(store, one, student) for student in (one.entering, one.adapter))
        if before is None or after is None:
            notes.append(f"iteration {one.number} is not measured: evolve audit {experiment}")
            continue
        if ALL not in before.by:
            notes.append(f"iteration {one.number} has no learned step that a teacher scored")
            continue
        now = _read(store, one, one.now)
        texts = _texts(store, one.contexts.inputs.get("experience"))
        rows = [_internalized(name, one.number, texts.get(name, ""), before, after, now) for name in before.by]
        items += sorted(rows, key=lambda row: (row.item != ALL, row.item == NONE, -row.before * row.tokens, row.item))
    if not items and not notes:
        notes.append("no iteration is trained yet: there is nothing to audit")
    return Audit(experiment, tuple(items), tuple(notes))


def to_dict(audited: Audit) -> dict[str, Any]:
    """JSON values: what ``evolve audit --json`` prints."""
    return {
        "experiment": audited.experiment,
        "unit": "nats per action token, KL(teacher || student)",
        "notes": list(audited.notes),
        "items": [
            {
                "item": {ALL: "all steps", NONE: "steps without an item"}.get(one.item, one.item),
                "iteration": one.iteration,
                "text": one.text,
                "steps": one.steps,
                "tokens": one.tokens,
                "before": one.before,
                "after": one.after,
                "now": one.now,
                "share": one.share,
                "interval": one.interval,
                "share_now": one.share_now,
                "interval_now": one.interval_now,
                "teacher_temperature": one.temperature,
            }
            for one in audited.items
        ],
    }


def render(audited: Audit) -> RenderableType:
    """A table for a rich console."""
    from rich import box
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    title = f"{audited.experiment}: teacher to student, nats per token, and how much of it is inside"
    table = Table(title=title, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in ("k", "item", "steps", "before", "after", "inside", "95%", "now"):
        table.add_column(name, justify="left" if name == "item" else "right", no_wrap=True)
    table.add_column("text", min_width=16)  # wraps: in a narrow terminal the numbers must stand
    for one in audited.items:
        table.add_row(
            str(one.iteration),
            {ALL: "all", NONE: "none"}.get(one.item, one.item),
            str(one.steps),
            f"{one.before:.4f}",
            f"{one.after:.4f}",
            _percent(one.share),
            "" if one.interval is None else f"{100 * one.interval[0]:.0f}–{100 * one.interval[1]:.0f}",
            _percent(one.share_now),
            Text(one.text),
            style="bold" if one.item == ALL else "",
        )
    lines: list[RenderableType] = [table] if audited.items else []
    sharp = sorted({one.temperature for one in audited.items} - {1.0})
    lines += [Text(f"The teacher is the one trained on: where it reads experience, at temperature {one:g}.") for one in sharp]
    return Group(*lines, *(Text(note, style="yellow") for note in audited.notes))


def sums(rows: list[DistillationRow], divergences: list[tuple[float, ...]]) -> dict[str, dict[str, Sums]]:
    """Divergences per step, summed by item and task.

    Args:
        rows: learned trajectories.
        divergences: per row, mean nats per action token of each kept step
            (:func:`evolve_dag.distillation.batch.step_divergences`).

    Returns:
        Item id (or :data:`ALL`, :data:`NONE`) -> task id -> sums. A step with several items counts for each of them.
    """
    found: dict[str, dict[str, Sums]] = {}
    for row, values in zip(rows, divergences, strict=True):
        task = row.row.trajectory_id.rpartition("#")[0] or row.row.trajectory_id
        for context, (start, end), mean in zip(row.contexts, row.row.spans, values, strict=True):
            tokens = end - start
            for item in (ALL, *(dict.fromkeys(context.selected) or (NONE,))):
                old = found.setdefault(item, {}).get(task, Sums(0, 0, 0.0))
                found[item][task] = Sums(old.steps + 1, old.tokens + tokens, old.nats + mean * tokens)
    return found


# -- inside


def _measure(
    experiment: Experiment,
    store: Store,
    contexts: Mapping[str, _Iteration],
    todo: list[tuple[str, str | None]],
    say: Callable[[str], object] | None,
) -> None:
    import torch

    from evolve_dag.distillation.batch import step_divergences
    from evolve_dag.distillation.dataset import load_contexts, sharpened
    from evolve_dag.distillation.trainer import load_model
    from evolve_dag.inference.folders import base_identity, model_folder

    settings, runtime = experiment.models.policy, experiment.runtime
    identity = base_identity(settings)
    for digest, _ in todo:
        if contexts[digest].base != identity:
            raise ConfigError(
                f"{experiment.experiment}: iteration {contexts[digest].number} was made from another base model than "
                f"models.policy names now ({contexts[digest].base[:24]}..., {identity[:24]}...)",
                "set models.policy back, or run the experiment again",
            )
    threads = torch.get_num_threads()
    torch.set_num_threads(runtime.threads)
    try:
        model = load_model(model_folder(settings), settings.dtype, settings.quantize, runtime.device).eval()
        loaded: tuple[str, list[DistillationRow]] | None = None
        for digest, student in todo:
            one = contexts[digest]
            if loaded is None or loaded[0] != digest:
                one.contexts.verify()
                taught = [row for row in load_contexts(one.contexts.path) if row.teacher is not None]
                loaded = (digest, sharpened(taught, one.temperature))
            rows = loaded[1]
            if say is not None:
                say(f"{experiment.experiment} iteration {one.number}: {_called(student)} on {len(rows)} trajectories")
            with_adapter = _Worn(model, store, student)
            with with_adapter as worn:
                divergences = step_divergences(worn, rows) if rows else []
            _write(store, Measurement(digest, student, sums(rows, divergences), one.temperature))
    finally:
        torch.set_num_threads(threads)


class _Worn:
    """The model with an adapter on, for the time of a ``with``; the bare model without one."""

    def __init__(self, model: nn.Module, store: Store, adapter: str | None) -> None:
        self.model, self.store, self.adapter = model, store, adapter
        self.wrapped: Any = None

    def __enter__(self) -> nn.Module:
        if self.adapter is None:
            return self.model
        from evolve_dag.distillation.adapter import load_adapter

        artifact = self.store.open("adapter", self.adapter, verify=True)
        self.wrapped = load_adapter(self.model, artifact.path)
        wrapped: nn.Module = self.wrapped
        return wrapped

    def __exit__(self, *_: object) -> None:
        if self.wrapped is not None:
            from evolve_dag.distillation.adapter import detach

            detach(self.wrapped)


def _iterations(store: Store, experiment: str, config: str | None = None) -> Iterator[_Iteration]:
    """Iterations that are trained, as far as they follow from each other."""
    from evolve_dag.errors import OrderError

    by_iteration: dict[int, dict[str, Artifact]] = {}
    for ref in store.refs(experiment):
        by_iteration.setdefault(ref.iteration, {})[ref.kind] = store.open(ref.kind, ref.digest)
    if not by_iteration:
        raise OrderError(
            f"experiment {experiment!r} has not been run in {store.root}",
            f"run it first: {registry.run_command(store.root, experiment, config)}",
        )
    sound: list[tuple[int, dict[str, Artifact]]] = []
    for number, found in sorted(by_iteration.items()):
        if not follows(found, by_iteration.get(number - 1, {})):
            break  # of what the experiment was before: neither its items nor its policy are this lineage's
        if {"policy", "contexts", "adapter"} <= found.keys():
            sound.append((number, found))
    for number, found in sound:
        policy = found["policy"].manifest.config.get("policy")
        if not isinstance(policy, Mapping):
            raise DataError(f"{found['policy'].path}: names no policy", "run the experiment again")
        adapter, base = found["adapter"], str(policy.get("base"))
        at = _temperature(adapter)
        yield _Iteration(number, found["contexts"], policy.get("adapter"), base, adapter.digest, _now(sound), at)


def _temperature(adapter: Artifact) -> float:
    """``distillation.teacher_temperature`` of an adapter; 1 where it was trained on what was sampled, without a teacher."""
    settings = adapter.manifest.config.get("distillation")
    return float(settings.get("teacher_temperature", 1.0)) if isinstance(settings, Mapping) else 1.0


def _now(sound: list[tuple[int, dict[str, Artifact]]]) -> str | None:
    """Adapter of the policy that the last decision left."""
    for _, found in reversed(sound):
        if "promotion" in found and found["promotion"].inputs.get("adapter") == found["adapter"].digest:
            leaving = found["promotion"].json(DECISION).get("policy") or {}
            adapter: str | None = leaving.get("adapter")
            return adapter
    policy = sound[0][1]["policy"].manifest.config.get("policy")
    return policy.get("adapter") if isinstance(policy, Mapping) else None


def _internalized(
    item: str, iteration: int, text: str, before: Measurement, after: Measurement, now: Measurement | None
) -> Internalized:
    own = before.by[item].values()
    return Internalized(
        item,
        iteration,
        text,
        steps=sum(one.steps for one in own),
        tokens=sum(one.tokens for one in own),
        before=max(0.0, before.mean(item) or 0.0),  # rounding can leave -1e-9
        after=max(0.0, after.mean(item) or 0.0),
        now=None if now is None else max(0.0, now.mean(item) or 0.0),
        interval=_interval(before.by[item], after.by.get(item, {})),
        interval_now=None if now is None else _interval(before.by[item], now.by.get(item, {})),
        temperature=before.temperature,
    )


def _interval(before: Mapping[str, Sums], after: Mapping[str, Sums]) -> Interval | None:
    """Of ``1 - after / before``, by a bootstrap over tasks; None with fewer than two tasks or nothing to take over."""
    import numpy as np

    tasks = sorted(set(before) & set(after))
    nats_T_2 = np.array([[before[task].nats, after[task].nats] for task in tasks])
    tokens = sum(before[task].tokens for task in tasks)
    if len(tasks) < 2 or nats_T_2[:, 0].sum() < LEAST * tokens:
        return None
    weights_R_T = np.random.default_rng(0).multinomial(len(tasks), np.full(len(tasks), 1 / len(tasks)), size=RESAMPLES)
    drawn_R_2 = weights_R_T @ nats_T_2
    drawn_R_2 = drawn_R_2[drawn_R_2[:, 0] > 0]
    low, high = np.quantile(1 - drawn_R_2[:, 1] / drawn_R_2[:, 0], [0.025, 0.975])
    return float(low), float(high)


def _texts(store: Store, experience: str | None) -> dict[str, str]:
    if experience is None:
        return {}
    frame = store.open("experience", experience).frame(ITEMS)
    return dict(zip(frame["id"].to_list(), frame["text"].to_list(), strict=True))


def _file(store: Store, contexts: str, adapter: str | None, temperature: float) -> Path:
    at = "" if temperature == 1 else f"-{temperature:g}"
    return store.root / "cache" / "audit" / f"{contexts}-{adapter or BASE}{at}.json"


def _read(store: Store, one: _Iteration, adapter: str | None) -> Measurement | None:
    """A kept measurement; None when there is none, or it cannot be read (it is made anew then)."""
    key = FORMAT, one.contexts.digest, adapter, one.temperature
    try:
        content = json.loads(_file(store, *key[1:]).read_text(encoding="utf-8"))
        if tuple(content[name] for name in ("format", "contexts", "adapter", "teacher_temperature")) != key:
            return None
        by = {
            item: {task: Sums(int(steps), int(tokens), float(nats)) for task, (steps, tokens, nats) in tasks.items()}
            for item, tasks in content["items"].items()
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return Measurement(one.contexts.digest, adapter, by, one.temperature)


def _write(store: Store, measured: Measurement) -> None:
    path = _file(store, measured.contexts, measured.adapter, measured.temperature)
    content = {
        "format": FORMAT,
        "contexts": measured.contexts,
        "adapter": measured.adapter,
        "teacher_temperature": measured.temperature,
        "items": {
            item: {task: [one.steps, one.tokens, one.nats] for task, one in tasks.items()}
            for item, tasks in measured.by.items()
        },
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(content, separators=(",", ":")).encode(), durable=False)
    except OSError as error:
        raise StoreError(f"{path}: cannot be written: {error.strerror or error}", "free room on that disk") from error


def _called(student: str | None) -> str:
    return "the base policy" if student is None else f"adapter {student[:12]}"


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.0f}%"
