"""What one step of the loop is: everything that is said of it, beside its body.

A new step is its module (a body and its ``SPEC``) and its line in :data:`evolve_dag.steps.base.STEPS`. Digests, Dagster's
assets with their checks and previews, the plan, the trace and the reports read it there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from evolve_dag.config.schema import Experiment
from evolve_dag.steps.body import Body
from evolve_dag.store.artifacts import Artifact


@dataclass(frozen=True, slots=True)
class Check:
    """An invariant that is read again from what a step wrote."""

    name: str
    description: str
    """One sentence: what holds when it passes."""
    blocking: bool = False
    """Whether what follows in the same run must not start when it fails; else it only warns."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of one check."""

    check: str
    passed: bool
    evidence: Mapping[str, Any]
    """JSON values: counts, and culprits as a list or a mapping."""
    text: str = ""
    """Why, where the numbers do not say it."""
    serious: bool = False
    """Whether a failure is shown as an error though it stops nothing."""


Examine = Callable[[Artifact, Experiment], Iterator[Verdict]]
"""Reads an artifact and gives one verdict for every check of the step."""


@dataclass(frozen=True, slots=True)
class Table:
    """A table of the artifact that people look at."""

    file: str
    columns: tuple[str, ...]
    """Those that are shown."""
    rows: int = 8
    """How many are shown."""
    meanings: Mapping[str, str] = field(default_factory=dict)
    """Column -> what it means here, where that is not what its name means elsewhere."""


def _no_verdict(artifact: Artifact, experiment: Experiment) -> Iterator[Verdict]:
    return iter(())


def _no_key(experiment: Experiment) -> tuple[str, ...]:
    return ()


def _no_guard(experiment: Experiment) -> None:
    return None


@dataclass(frozen=True, slots=True)
class StepSpec:
    """One step of the loop."""

    name: str
    description: str
    """What its artifact holds, in a sentence."""
    version: str
    """Raise it when the code of the step makes something else of the same inputs."""
    config: tuple[str, ...]
    """Config keys that the step reads; the models and prompts of the parts in them come by themselves (slices.py)."""
    inputs: tuple[str, ...]
    """Steps of the same iteration whose artifacts it reads."""
    run: Body
    kinds: frozenset[str]
    """What its artifact is made of, as Dagster shows it."""
    iteration: bool = False
    """Does the number of the iteration enter (fresh draws in every iteration)?"""
    unread: Callable[[Experiment], Iterable[str]] = _no_key
    """Which of these keys, or of those below them, it does not read under this experiment."""
    told: tuple[str, ...] = ()
    """Keys that it reads besides, because what comes of them is in its digest in another form."""
    derived: tuple[str, ...] = ()
    """Keys that decide only what is computed from what it sampled: an artifact that differs in them alone is its twin."""
    guard: Callable[[Experiment], None] = _no_guard
    """What must hold of the whole experiment before the step is made; it raises, and decides nothing of what is made."""
    standing: tuple[str, ...] = ()
    """Fields of the gate's :class:`~evolve_dag.records.Standing` that the step reads."""
    checks: tuple[Check, ...] = ()
    examine: Examine = _no_verdict
    tables: tuple[Table, ...] = ()
    """The first is the main one."""
    hidden: frozenset[str] = frozenset()
    """Entries of its summary that are shown in a better form."""
