"""The seven steps of an iteration as pure functions over the store, and the digest chain that links them.

``resolve`` says what digest a step *should* have under the present config, without running anything; ``run_step``
makes the artifact when it is not there. Dagster's assets and the command line both call these two, so there is one
code path. The chain through an iteration (METHOD, the loop)::

    policy -> trajectories -> experience -> contexts -> adapter -> scores -> promotion ..> policy of the next iteration

A step's digest covers its code version, the slice of config that it reads (slices.py: with files replaced by the hash of
their content, so it does not depend on where a checkout lies) and the digests of what it read. A policy's digest covers
what it *is* (base, adapter, pool), not how it was decided: a gate with another threshold and the same verdict leaves
the next iteration untouched. A digest names what decided an artifact, not its bytes: stored log-probabilities differ in
the sixth digit with concurrency and threads, and the first artifact that is published stands.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any

from evolve_dag import prompts
from evolve_dag.config.loading import check_iterations
from evolve_dag.config.parts import altered
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import OrderError, PartError, StoreError, no_slice_error
from evolve_dag.inference.folders import base_identity, how_short, how_worn
from evolve_dag.inference.ledger import Ledger
from evolve_dag.inference.roles import Roles
from evolve_dag.records import PolicyRef, Standing
from evolve_dag.steps import adapter, contexts, experience, policy, promotion, scores, trajectories
from evolve_dag.steps.body import Body, Progress, RolloutWorkers, Silent, StepContext
from evolve_dag.steps.policies import EARLIER
from evolve_dag.steps.slices import decisive, visible
from evolve_dag.steps.spec import StepSpec
from evolve_dag.store.artifacts import Artifact, Store
from evolve_dag.store.frames import calls_to_frame
from evolve_dag.store.layout import CALLS
from evolve_dag.store.memory import Memory
from evolve_dag.tasks.streams import facts_of, of_iteration, of_lineage
from evolve_dag.warmup.folder import require

STEPS: tuple[StepSpec, ...] = (
    policy.SPEC,
    trajectories.SPEC,
    experience.SPEC,
    contexts.SPEC,
    adapter.SPEC,
    scores.SPEC,
    promotion.SPEC,
)
"""The loop: its steps in the order in which an iteration makes them."""
SPECS: dict[str, StepSpec] = {spec.name: spec for spec in STEPS}
STEP_ORDER = tuple(SPECS)


def code_version(name: str) -> str:
    """Version of the step's code, part of its digest."""
    return SPECS[name].version


def settings(name: str, experiment: Experiment) -> dict[str, Any]:
    """The slice of config that the step reads, files and models replaced by the hash of their content."""
    return decisive(SPECS[name], experiment)


def settings_digest(name: str, experiment: Experiment, store: Store | None = None) -> str:
    """Digest of the config slice alone, for the config assets.

    Args:
        store: where a stream's first night keeps the file that it took; None: as before the first night.
    """
    first = of_iteration(experiment, 1) if store is None else of_lineage(experiment, 1, store)
    return Store.digest_of(f"config/{name}", "1", settings(name, first), {})


def sources(name: str) -> list[StepSpec]:
    """A step, and before it in the loop all that it is made from."""
    found = {name}
    for spec in reversed(SPECS.values()):
        found |= set(spec.inputs) if spec.name in found else set()
    return [spec for spec in SPECS.values() if spec.name in found]


@dataclass(frozen=True, slots=True)
class Resolved:
    """What a step's artifact should be under the present config."""

    name: str
    iteration: int
    digest: str | None
    """None when something earlier is missing, so that the digest is not known yet."""
    exists: bool
    inputs: Mapping[str, str] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    missing: str | None = None
    """What must be materialized first, e.g. ``promotion[pocket|01]``; None when nothing is."""


def partition(experiment: Experiment, iteration: int) -> str:
    """Partition key of one iteration: ``pocket|02``."""
    return f"{experiment.experiment}|{iteration:02d}"


def resolve(name: str, experiment: Experiment, iteration: int, store: Store) -> Resolved:
    """The expected digest of ``name`` in ``iteration``; runs nothing."""
    entering = _entering(experiment, iteration, store)
    return resolve_from(name, experiment, iteration, store, entering)


def resolve_iteration(experiment: Experiment, iteration: int, store: Store) -> dict[str, Resolved]:
    """All seven steps of one iteration, in order."""
    return resolve_all(experiment, iteration, store, _entering(experiment, iteration, store))


def resolve_all(experiment: Experiment, iteration: int, store: Store, entering: PolicyRef | str) -> dict[str, Resolved]:
    """:func:`resolve_iteration` where the entering policy is known already, or what is missing for it."""
    known: dict[str, Resolved] = {}
    for name in STEP_ORDER:
        known[name] = resolve_from(name, experiment, iteration, store, entering, known)
    return known


def resolve_lineage(experiment: Experiment, iterations: int, store: Store) -> Iterator[dict[str, Resolved]]:
    """All seven steps of iterations 1, 2, ...; the last one is the first that is not promoted, or number ``iterations``."""
    entering = first_policy(experiment)
    for k in range(1, iterations + 1):
        resolved = resolve_all(experiment, k, store, entering)
        yield resolved
        decided = resolved["promotion"]
        if decided.digest is None or not decided.exists:
            return
        entering = promotion.next_policy(store.open("promotion", decided.digest), k + 1)


def entering_policy(experiment: Experiment, iteration: int | None, store: Store) -> PolicyRef:
    """policy(k) by value; for ``iteration`` None the newest that the store holds.

    Raises:
        OrderError: iteration k-1 is not promoted; says which policies there are.
    """
    if iteration is not None:
        found = _entering(experiment, iteration, store)
        if isinstance(found, str):
            last = entering_policy(experiment, None, store).iteration
            there = f"policies 1 to {last}" if last > 1 else "policy 1 alone"
            raise OrderError(
                f"policy[{partition(experiment, iteration)}] is not promoted yet: with its present settings "
                f"{experiment.experiment} has {there} in {store.root}",
                f"choose one that is there, or bring iterations 1 to {iteration - 1} up to date first",
            )
        return found
    newest = _entering(experiment, 1, store)
    for k in count(2):  # the file may say fewer iterations by now than were made
        found = _entering(experiment, k, store)
        if isinstance(found, str):
            break
        newest = found
    assert isinstance(newest, PolicyRef)
    return newest


def first_policy(experiment: Experiment) -> PolicyRef:
    """policy(1): the bare base model, with the pool that the experiment starts from, if any.

    Raises:
        DataError: the file of the pool cannot be read.
        ModelError: the weights are missing, or have to be warmed up first.
    """
    require(experiment)
    ref = PolicyRef(iteration=1, base=base_identity(experiment.models.policy))
    if not experiment.start_pool:
        return ref
    from evolve_dag.interop.pools import pool_digest, pool_from_file

    path = Path(experiment.start_pool)
    pool = pool_from_file(path)
    digest = pool_digest(pool, path.name)
    return replace(ref, experience=digest, next_item=pool.next_number, standing=Standing(experience=digest))


def _entering(experiment: Experiment, iteration: int, store: Store) -> PolicyRef | str:
    """policy(k) as values, or the name of what is missing."""
    ref = first_policy(experiment)
    for k in range(1, iteration):
        decided = resolve_from("promotion", experiment, k, store, ref)
        if decided.digest is None or not decided.exists:
            return f"promotion[{partition(experiment, k)}]"
        ref = promotion.next_policy(store.open("promotion", decided.digest), k + 1)
    return ref


def resolve_from(
    name: str,
    experiment: Experiment,
    iteration: int,
    store: Store,
    entering: PolicyRef | str,
    known: dict[str, Resolved] | None = None,
) -> Resolved:
    """:func:`resolve` where the entering policy is known already, or what is missing for it.

    Args:
        known: steps of the same iteration that were resolved already; those that this one needs are added.
    """
    spec, known = SPECS[name], {} if known is None else known
    if isinstance(entering, str):
        return Resolved(name, iteration, None, False, missing=entering)
    try:
        config = settings(name, seen_by(name, experiment, iteration, store))
    except OrderError as error:  # a stream that holds no tasks for this iteration yet
        return Resolved(name, iteration, None, False, missing=error.what)
    inputs: dict[str, str] = {}
    missing = None
    if name == "policy":
        policy = experiment.models.policy
        config |= {"policy": entering.content | how_worn(policy) | how_short(policy)}
    else:
        for upstream in spec.inputs:
            if upstream not in known:
                known[upstream] = resolve_from(upstream, experiment, iteration, store, entering, known)
            found = known[upstream]
            if found.digest is None:
                return Resolved(name, iteration, None, False, missing=found.missing)
            inputs[upstream] = found.digest
            if not found.exists and missing is None:
                missing = found.missing or f"{upstream}[{partition(experiment, iteration)}]"
    if spec.iteration:
        config |= {"iteration": iteration}
    if spec.standing:
        config |= {"standing": {field: getattr(entering.standing, field) for field in spec.standing}}
    digest = Store.digest_of(name, spec.version, config, inputs)
    return Resolved(name, iteration, digest, store.exists(name, digest), inputs, config, missing)


def seen_by(name: str, experiment: Experiment, iteration: int, store: Store) -> Experiment:
    """What a step reads: the iteration's own tasks, but for the policy, which must be there before the next tasks are."""
    return experiment if name == "policy" else of_lineage(experiment, iteration, store)


@dataclass(frozen=True, slots=True)
class StepOutcome:
    """The artifact, and whether it had to be made."""

    artifact: Artifact
    recomputed: bool
    seconds: float


def _body(name: str) -> Body:
    return SPECS[name].run


def _twin(expected: Resolved, store: Store) -> Artifact | None:
    """A sound artifact that differs from the expected one in the ``derived`` keys of its step alone."""
    spec = SPECS[expected.name]
    if not spec.derived:
        return None
    wanted = _but_for(spec.derived, expected.config), dict(expected.inputs)
    for kind, digest in store.listing():
        if kind == spec.name:
            with suppress(StoreError):  # what is damaged is no twin; whoever needs it says so
                artifact = store.read(kind, digest)
                made = artifact.manifest
                same = (_but_for(spec.derived, made.config), dict(made.inputs)) == wanted
                if same and made.code_version == spec.version:
                    artifact.verify()
                    return artifact
    return None


def _but_for(keys: Sequence[str], config: Mapping[str, Any]) -> dict[str, Any]:
    """A slice without some of its keys, as it comes back from a manifest."""
    kept: dict[str, Any] = json.loads(json.dumps(dict(config)))
    for key in keys:
        section, _, last = key.rpartition(".")
        kept.get(section, {}).pop(last, None)
    return kept


@dataclass(frozen=True, slots=True)
class Due:
    """A step that has all that it needs, to be made."""

    experiment: Experiment
    """Whole, as its file says it."""
    seen: Experiment
    """As it is in this iteration, once for all: the folder of a stream may hold another file by the end of the step."""
    expected: Resolved
    entering: PolicyRef
    store: Store
    progress: Progress
    workers: RolloutWorkers | None = None
    """Where its episodes are played; None: here."""

    @property
    def digest(self) -> str:
        """Of the artifact."""
        assert self.expected.digest is not None  # what is missing was told before
        return self.expected.digest


def body_view(name: str, seen: Experiment) -> tuple[Experiment, frozenset[str]]:
    """What the body of a step may read of an experiment (:func:`seen_by`), and the names of its prompts."""
    return visible(sources(name), seen)


def make_here(due: Due) -> None:
    """Run the body of a step, in one event loop, and publish what it made."""
    expected, store, experiment = due.expected, due.store, due.seen
    name, spec = expected.name, SPECS[expected.name]
    spec.guard(experiment)
    inputs = {upstream: store.open(upstream, digest) for upstream, digest in expected.inputs.items()}
    with store.build(
        name, due.digest, code_version=spec.version, config=dict(expected.config), inputs=dict(expected.inputs)
    ) as build:
        if build.artifact is not None:
            return  # another process has made it while this one waited for the lock
        ledger = Ledger(build.ledger_path)
        earlier = len(ledger.calls())
        memory = Memory(store.root / "cache" / "memory.sqlite")
        shown, names = body_view(name, experiment)
        twin = _twin(expected, store)
        with Roles(shown, ledger=ledger, memory=memory) as roles, prompts.only(names), no_slice_error():
            _body(name)(
                StepContext(
                    shown,
                    expected.iteration,
                    store,
                    inputs,
                    build,
                    due.progress,
                    due.entering,
                    roles,
                    twin,
                    due.workers,
                    json.loads(json.dumps(dict(expected.config))),
                )
            )
        if changed := altered():
            what = f"{name}: {', '.join(changed)} was installed anew while the step was made, which may be of both"
            raise PartError(what, "run the same command again")
        if totals := ledger.totals():
            build.note(calls=totals, **({EARLIER: earlier} if earlier else {}))
            calls_to_frame(ledger.calls()).write_parquet(build.path / CALLS)


Make = Callable[[Due], None]
"""Makes a step that is due and publishes its artifact: in this process (:func:`make_here`) or elsewhere."""


def due_step(
    name: str,
    experiment: Experiment,
    iteration: int,
    store: Store,
    progress: Progress | None = None,
    workers: RolloutWorkers | None = None,
) -> Due:
    """A step as it is to be made, or as it is there already.

    Raises:
        OrderError: something upstream is not there under the present config; the message says what to materialize.
        ConfigError: the iteration lies beyond the file's last, and what the file says does not hold for so many.
    """
    if name != "policy":  # the one that the last iteration leaves is there before anybody asks for more
        check_iterations(experiment, iteration)
    entering = _entering(experiment, iteration, store)
    expected = resolve_from(name, experiment, iteration, store, entering)
    seen = seen_by(name, experiment, iteration, store)
    settings(name, seen)  # no tasks in the stream: says so
    if expected.missing is not None or expected.digest is None or isinstance(entering, str):
        what = "is not promoted yet" if name == "policy" else "cannot be made yet"
        raise OrderError(
            f"{name}[{partition(experiment, iteration)}] {what}: {expected.missing} is missing or out of date",
            f"materialize {expected.missing} first",
        )
    return Due(experiment, seen, expected, entering, store, progress or Silent(), workers)


def run_step(
    name: str,
    experiment: Experiment,
    iteration: int,
    store: Store,
    progress: Progress | None = None,
    facts: Mapping[str, Any] | None = None,
    make: Make = make_here,
) -> StepOutcome:
    """Make the artifact of ``name`` in ``iteration``, or find it in the store.

    Args:
        facts: kept with the ref, e.g. the run that asked.
        make: where it is made, if it has to be.

    Raises:
        OrderError, ConfigError: as :func:`due_step`.
        StoreError: an artifact is corrupt, or the disk is full; nothing half-written stays visible.
    """
    started = time.monotonic()
    due = due_step(name, experiment, iteration, store, progress)
    recomputed = not due.expected.exists
    if recomputed:
        make(due)
    artifact = store.open(name, due.digest)
    seconds = time.monotonic() - started
    remembered = {"recomputed": recomputed, "seconds": round(seconds, 3), **(facts or {})}
    if name == "trajectories":
        remembered |= facts_of(experiment, due.seen)
    if name == "promotion":
        remembered["mlflow"] = experiment.tracking.mlflow  # for whom the file is gone, or never was here
    store.set_ref(experiment.experiment, iteration, name, due.digest, **remembered)
    if name == "promotion":
        # The next policy is committed with the promotion itself, so no crash can leave a decision without its policy.
        run_step("policy", experiment, iteration + 1, store, facts=facts)
    return StepOutcome(artifact, recomputed, seconds)
