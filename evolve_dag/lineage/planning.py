"""What a run would recompute, and why, said before anything runs (``evolve plan``).

The digests that decide it are those of :func:`evolve_dag.steps.base.resolve`, the same that a run follows: a step whose
artifact is in the store is reused, any other is made. The *reason* is found by laying the settings that are expected now
beside the manifest of the artifact that the iteration used so far. Nothing is written, and no heavy library is imported; of a
mirror only refs, manifests and the decisions of the gate are read.

What an iteration starts from is decided by the promotion before it. While that promotion has to be made anew, the later
iterations cannot be told: they *follow*.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from evolve_dag.config.loading import check_iterations
from evolve_dag.errors import StoreError
from evolve_dag.lineage import power, recipe
from evolve_dag.steps import base
from evolve_dag.steps.needs import absent_programs, require_files
from evolve_dag.steps.promotion import next_policy
from evolve_dag.store.layout import DECISION, MANIFEST

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import RenderableType

    from evolve_dag.config.schema import Experiment
    from evolve_dag.records import PolicyRef
    from evolve_dag.store.artifacts import Ref, Store

Action = Literal["reuse", "recompute", "follows", "stop"]
Why = Literal["never_made", "config", "code", "upstream", "missing", "corrupt", "unknown", "follows", "shared", "no_tasks"]

_HASH = re.compile(r"(?:sha256:)?[0-9a-f]{32,64}(?![0-9a-f])")
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Reason:
    """One cause."""

    why: Why
    """``never_made``: this iteration has not come so far. ``config``, ``code``, ``upstream``: what decides the step changed.
    ``missing``, ``corrupt``: the artifact is not what was written. ``unknown``: what it used so far cannot be read.
    ``follows``: decided by a promotion that is not made yet. ``shared``: another iteration or experiment has made it.
    ``no_tasks``: the stream of tasks holds none for this iteration yet."""
    text: str
    """One line for people."""
    key: str = ""
    """For ``config``: dotted key of the experiment file. For ``upstream``: the step, or the part of the policy."""
    old: Any = None
    """For ``config``, ``code``, ``upstream``: what the artifact in use was made with; None where it was not there."""
    new: Any = None
    """What is expected now."""


@dataclass(frozen=True, slots=True)
class PlannedStep:
    """What a run would do with one step of one iteration."""

    step: str
    iteration: int
    action: Action
    """``reuse``: it is in the store. ``recompute``: a run makes it. ``follows``: told once the promotion before it is made.
    ``stop``: a run stops there: the artifact is damaged, and it says what to delete; or there are no tasks yet."""
    digest: str | None
    """Digest that it should have; None where it follows, and where there are no tasks yet."""
    reasons: tuple[Reason, ...] = ()
    seconds_before: float | None = None
    """What the artifact in use took, as a guess of what a recomputation takes; None when there is none."""
    if_same: Action | None = None
    """For ``follows``: what becomes of it if the promotion, about the same candidate, decides as before. None: another one."""
    digest_if_same: str | None = None
    """The digest that it should have then."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What a run of an experiment would do."""

    experiment: str
    iterations: int
    """K: iterations 1..K are brought up to date."""
    steps: tuple[PlannedStep, ...]
    """Seven an iteration, in the order of the run."""
    notes: tuple[str, ...] = ()
    """What should be known before the run, e.g. that the gate is short of tasks."""

    def of(self, action: Action) -> tuple[PlannedStep, ...]:
        """The steps with one action."""
        return tuple(step for step in self.steps if step.action == action)

    @property
    def up_to_date(self) -> bool:
        """Whether a run would compute nothing."""
        return all(step.action == "reuse" for step in self.steps)

    def to_dict(self) -> dict[str, Any]:
        """JSON values: what ``evolve plan --json`` prints."""
        return {
            "experiment": self.experiment,
            "iterations": self.iterations,
            "up_to_date": self.up_to_date,
            "notes": list(self.notes),
            "counts": {action: len(self.of(action)) for action in ("reuse", "recompute", "follows", "stop")},
            "steps": [
                {
                    "step": one.step,
                    "iteration": one.iteration,
                    "action": one.action,
                    "digest": one.digest,
                    "seconds_before": one.seconds_before,
                    **({"if_same": one.if_same} if one.if_same else {}),
                    "reasons": [
                        {
                            "why": reason.why,
                            "text": reason.text,
                            **({"key": reason.key} if reason.key else {}),
                            **({"old": reason.old, "new": reason.new} if reason.why in ("config", "code", "upstream") else {}),
                        }
                        for reason in one.reasons
                    ],
                }
                for one in self.steps
            ],
        }


def plan(experiment: Experiment, store: Store, iterations: int | None = None) -> Plan:
    """What ``evolve run`` would do now; reads manifests and sizes, writes nothing but a mirror's refs and decisions.

    Args:
        iterations: K; None takes the experiment's.

    Raises:
        ConfigError: what the experiment's file says does not hold for so many iterations.
        DataError: files or model folders that the experiment names are missing; lists them.
    """
    require_files(experiment)
    count = experiment.iterations if iterations is None else iterations
    check_iterations(experiment, count)
    entering: PolicyRef | str = base.entering_policy(experiment, 1, store)
    assumed: PolicyRef | None = None
    steps: list[PlannedStep] = []
    for k in range(1, count + 1):
        if isinstance(entering, str):
            same: dict[str, PlannedStep] = {}
            if assumed is not None:
                resolved = base.resolve_all(experiment, k, store, assumed)
                same = {name: _planned(expected, experiment, store) for name, expected in resolved.items()}
                assumed = _as_before(same["promotion"], experiment, store)
            text = f"follows {entering}"
            if same:
                again = [name for name, one in same.items() if one.action != "reuse"]
                text += f"; if that decides as before: {f'{_and(again)} recomputed' if again else 'all reused'}"
            for name in base.STEP_ORDER:
                follows = PlannedStep(name, k, "follows", None, (Reason("follows", text),))
                if name in same:
                    follows = replace(follows, if_same=same[name].action, digest_if_same=same[name].digest)
                steps.append(follows)
            continue
        # The digests that a run itself would ask for; from the policy that is known here, so that K iterations cost K.
        resolved = base.resolve_all(experiment, k, store, entering)
        steps += [_planned(expected, experiment, store) for expected in resolved.values()]
        entering = _leaving(steps[-1], experiment, store)
        if isinstance(entering, str):
            assumed = _as_before(steps[-1], experiment, store)
    return Plan(experiment.experiment, count, tuple(steps), (*advice(experiment, store), *absent_programs(experiment)))


def advice(experiment: Experiment, store: Store) -> tuple[str, ...]:
    """What its file alone lets foresee: too few tasks or rollouts, a rate that suits another model."""
    told = (power.warning(experiment, store), power.few_rollouts(experiment), *recipe.warnings(experiment))
    return tuple(filter(None, told))


def render(planned: Plan, *, reuse: bool = False) -> RenderableType:
    """The plan for a rich console.

    Args:
        reuse: name the steps that are reused one by one; else they are counted.
    """
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    lines: list[RenderableType] = [Text(headline(planned), style="bold")]
    lines += [Text(note, style="yellow") for note in planned.notes]
    styles = {"reuse": "green", "recompute": "bold yellow", "stop": "bold red", "follows": "dim"}
    for k in range(1, planned.iterations + 1):
        rows = [step for step in planned.steps if step.iteration == k]
        if rows[0].action == "follows":
            lines.append(Text(f"\niteration {k}  {rows[0].reasons[0].text}", style="dim"))
            continue
        shown = [step for step in rows if reuse or step.action != "reuse" or step.reasons]
        note = f"  {len(rows) - len(shown)} of {len(rows)} steps reused" if len(shown) < len(rows) else ""
        lines.append(Text.assemble(f"\niteration {k}", (note, "green")))
        table = Table.grid(padding=(0, 2))
        for step in shown:
            texts = Text("\n".join(reason.text for reason in step.reasons))  # Text: what was configured is data
            took = f"{step.seconds_before:.0f} s before" if step.action == "recompute" and step.seconds_before else ""
            table.add_row("", Text(step.step), Text(step.action, style=styles[step.action]), texts, Text(took, style="dim"))
        if shown:
            lines.append(table)
    return Group(*lines)


def headline(planned: Plan) -> str:
    """One line: ``pocket: 4 of 21 steps would be recomputed, 14 follow``."""
    name, total = planned.experiment, len(planned.steps)
    stop, again, follow = (len(planned.of(action)) for action in ("stop", "recompute", "follows"))
    if planned.up_to_date:
        which = "iteration 1 is" if planned.iterations == 1 else f"iterations 1 to {planned.iterations} are"
        return f"{name}: nothing to recompute: {which} up to date"
    parts = [f"{again} of {total} steps would be recomputed"]
    if follow:
        parts.append(f"{follow} follow from a decision that is not made yet")
    if stop:
        damaged = any(reason.why == "corrupt" for step in planned.of("stop") for reason in step.reasons)
        parts.append(f"{stop} {'damaged' if damaged else 'without tasks'}: a run stops there")
    known = sum(step.seconds_before or 0.0 for step in planned.of("recompute"))
    if known >= 1:
        parts.append(f"what is replaced took {known:.0f} s")
    return f"{name}: {', '.join(parts)}"


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """An artifact's manifest alone, or None: to compare settings, the files beside it need not be sound."""
    try:
        return _parsed((folder / MANIFEST).read_bytes())
    except OSError:
        return None


# -- inside


def _parsed(manifest: bytes | None) -> dict[str, Any] | None:
    try:
        content = json.loads(manifest or b"")
    except ValueError:
        return None
    sound = isinstance(content, dict) and isinstance(content.get("config"), dict) and isinstance(content.get("inputs"), dict)
    return content if sound else None


def _leaving(promotion: PlannedStep, experiment: Experiment, store: Store) -> PolicyRef | str:
    """policy(k+1), or the name of the promotion that has to be made first."""
    here = f"promotion[{base.partition(experiment, promotion.iteration)}]"
    if promotion.action != "reuse" or promotion.digest is None:
        return here
    return next_policy(store.open("promotion", promotion.digest), promotion.iteration + 1)


def _as_before(promotion: PlannedStep, experiment: Experiment, store: Store) -> PolicyRef | None:
    """policy(k+1) as the promotion in use left it, when a new one would decide about the same candidate; else None."""
    ref, _ = _ref(experiment, promotion.iteration, "promotion", store)
    if ref is None or any(reason.why not in ("config", "code", "missing", "shared") for reason in promotion.reasons):
        return None
    try:
        return next_policy(store.open("promotion", ref.digest), promotion.iteration + 1)
    except StoreError:
        return None


def _and(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _planned(expected: base.Resolved, experiment: Experiment, store: Store) -> PlannedStep:
    name, k = expected.name, expected.iteration
    if expected.digest is None:
        return PlannedStep(name, k, "stop", None, (Reason("no_tasks", str(expected.missing)),))
    ref, broken = _ref(experiment, k, name, store)
    used = None if ref is None else _parsed(store.manifest(name, ref.digest))
    seconds = used.get("seconds") if used else None
    seconds = float(seconds) if isinstance(seconds, (int, float)) else None
    if expected.exists:
        try:
            if name == "promotion":
                store.open(name, expected.digest).json(DECISION)  # the next policy is read from it
            elif store.folder(name, expected.digest).is_dir():  # what only the mirror has is checked when it is fetched
                store.open(name, expected.digest)
        except StoreError as error:
            return PlannedStep(name, k, "stop", expected.digest, (Reason("corrupt", f"{error.what}; {error.remedy}"),))
        reasons: tuple[Reason, ...] = ()
        if ref is None or ref.digest != expected.digest:
            reasons = (Reason("shared", _made_by(store, name, expected.digest)),)
        return PlannedStep(name, k, "reuse", expected.digest, reasons, seconds)
    if ref is None:
        found = [Reason("unknown", broken) if broken else Reason("never_made", "never made")]
    elif ref.digest == expected.digest:
        found = [Reason("missing", f"its artifact {ref.digest[:12]} is gone")]
    elif used is None:
        found = [Reason("unknown", f"the artifact in use, {ref.digest[:12]}, cannot be read: what changed is not known")]
    else:
        found = list(_changes(expected, used))
    return PlannedStep(name, k, "recompute", expected.digest, tuple(found), seconds)


def _ref(experiment: Experiment, iteration: int, name: str, store: Store) -> tuple[Ref | None, str]:
    try:
        return store.ref(experiment.experiment, iteration, name), ""
    except StoreError as error:  # a run writes it anew
        return None, f"its reference is damaged: {error.what}"


def _made_by(store: Store, kind: str, digest: str) -> str:
    places = []
    for path in sorted((store.root / "refs").glob(f"*/*/{kind}.json")):
        try:
            if json.loads(path.read_text(encoding="utf-8")).get("digest") == digest:
                places.append(f"{path.parts[-3]}|{path.parts[-2]}")
        except (OSError, ValueError, AttributeError):
            continue
    return f"made for {', '.join(places[:3])}" if places else "made before, under these settings"


def _changes(expected: base.Resolved, used: Mapping[str, Any]) -> Iterator[Reason]:
    """What differs between the settings now and those of the artifact in use; at least one reason."""
    told = False
    version = base.code_version(expected.name)
    if used.get("code_version") != version:
        told = True
        text = f"code version: {used.get('code_version')} -> {version}"
        yield Reason("code", text, old=used.get("code_version"), new=version)
    for key, old, new in _differences(used["config"], expected.config, ""):
        told = True
        before, after = (None if value is _ABSENT else value for value in (old, new))
        if key.startswith("policy."):
            part = key.removeprefix("policy.")
            yield Reason("upstream", f"{part} that enters: {_short(old)} -> {_short(new)}", part, before, after)
        elif key.startswith("standing"):
            text = f"what the gate carries over, {key.removeprefix('standing.')}: {_short(old)} -> {_short(new)}"
            yield Reason("upstream", text, "standing", before, after)
        elif _is_hash(old) and _is_hash(new):
            yield Reason("config", f"{key}: its content changed ({_short(old)} -> {_short(new)})", key, before, after)
        else:
            yield Reason("config", f"{key}: {_short(old)} -> {_short(new)}", key, before, after)
    inputs = used["inputs"]
    for name in dict.fromkeys([*expected.inputs, *inputs]):
        old, new = inputs.get(name), expected.inputs.get(name)
        if old != new:
            told = True
            yield Reason("upstream", f"{name} changed: {_short(old)} -> {_short(new)}", name, old, new)
    if not told:  # e.g. edited by hand
        yield Reason("unknown", f"the artifact in use, {str(used.get('digest'))[:12]}, was made otherwise; how is not recorded")


def _differences(old: Any, new: Any, prefix: str) -> Iterator[tuple[str, Any, Any]]:
    """Dotted key, old and new value of every difference; ``_ABSENT`` where a side lacks the key."""
    if isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys([*new, *old]):
            yield from _differences(old.get(key, _ABSENT), new.get(key, _ABSENT), f"{prefix}.{key}" if prefix else str(key))
    elif isinstance(old, (list, tuple)) and isinstance(new, (list, tuple)):
        if list(old) != list(new):
            yield prefix, list(old), list(new)
    elif old is _ABSENT or new is _ABSENT or old != new or isinstance(old, bool) != isinstance(new, bool):
        yield prefix, old, new


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and _HASH.match(value) is not None


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "(not there)"
    if value is None:
        return "none"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    text = _HASH.sub(lambda found: found[0].removeprefix("sha256:")[:12], " ".join(text.split()))
    return text if len(text) <= 70 else text[:69] + "…"
