"""Whether the tasks of an experiment are enough for its gate, and their rollouts for lessons, said before anything runs."""

from __future__ import annotations

from dataclasses import dataclass

from evolve_dag.config.schema import Experiment
from evolve_dag.errors import EvolveError
from evolve_dag.evaluation.gate import Evidence, gate_from_json
from evolve_dag.evaluation.intervals import POWER, detectable, spread_alone, tasks_for
from evolve_dag.experience.extraction.base import ONE_OF_A_KIND, groups_of_one, taught_by_groups
from evolve_dag.store.artifacts import Store
from evolve_dag.store.layout import DECISION
from evolve_dag.tasks.suites import load_tasks_of

LOSS = 0.05
"""Loss of success that one night should be able to show."""
TYPICAL_SD = 0.3
"""Of one task's difference between neighbouring policies, one rollout each under the same draws; 0.26 to 0.37 were measured in
the pocket world (docs/LOG.md)."""


@dataclass(frozen=True, slots=True)
class Power:
    """What one night can show."""

    tasks: int
    """Development tasks."""
    sd: float
    """Standard deviation of one task's difference."""
    measured: int | None
    """Iteration whose gate measured ``sd``; None: it is taken as :data:`TYPICAL_SD`."""
    smallest: float
    """Smallest loss beyond the margin that is significant in :data:`~evolve_dag.evaluation.intervals.POWER` of the cases; above
    1, none is."""
    needed: int
    """Tasks that show :data:`LOSS`."""


def power(experiment: Experiment, store: Store | None = None) -> Power | None:
    """What the gate of an experiment can show in one night; None where its tasks cannot be counted.

    Args:
        store: where the newest decision of the gate between two different policies is looked up.
    """
    try:
        count = experiment.tasks.development.count or len(load_tasks_of(experiment, "development"))
    except EvolveError:  # whatever is wrong with the file: the run itself says so
        return None
    confidence = experiment.gate.confidence
    measured, sd = _measured(experiment.experiment, store)
    if sd is None:
        sd = TYPICAL_SD / experiment.evaluation.rollouts**0.5
    smallest = detectable(sd, count, confidence=confidence)
    return Power(count, sd, measured, smallest, tasks_for(LOSS, sd, confidence=confidence))


def warning(experiment: Experiment, store: Store | None = None) -> str:
    """What to say where the tasks are too few; '' where they are enough, or not known."""
    found = power(experiment, store)
    if found is None or found.smallest <= LOSS:
        return ""
    source = f"as measured in iteration {found.measured}" if found.measured else "as is typical"
    seen = f"a loss of {100 * found.smallest:.0f} points" if found.smallest <= 1 else "no loss at all"
    return (
        f"{found.tasks} development tasks are few for the gate: they show {seen} in one night with {POWER:.0%} power "
        f"(SD of a task's difference {found.sd:.2f}, {source}); {100 * LOSS:.0f} points need "
        f"{found.needed}: raise tasks.development.count, or evaluation.rollouts"
    )


def few_rollouts(experiment: Experiment) -> str:
    """What to say where groups of rollouts can hardly hold both success and failure; '' elsewhere. (``contrast`` learns from
    nothing in groups of one: a mistake of the file.)"""
    if not taught_by_groups(experiment):
        return ""
    model = experiment.extraction.extractor == "llm"
    if model and groups_of_one(experiment):
        return (
            f"rollout.group_size is 1: {ONE_OF_A_KIND}, so something is learned only where a reward is between 0 and 1: "
            "set it to 2 or more"
        )
    if experiment.rollout.temperature == 0 and (model or experiment.granularity == "principle"):
        return (
            "rollout.temperature is 0: the rollouts of a group are all alike, unless the environment answers otherwise each "
            "time, and groups teach that hold both success and failure: set it above 0"
        )
    return ""


def _measured(name: str, store: Store | None) -> tuple[int | None, float | None]:
    """Newest iteration whose gate compared two different policies, and the SD that it found; (None, None) where there is none.
    What is damaged is told elsewhere."""
    if store is None:
        return None, None
    try:
        decided = [ref for ref in store.refs(name) if ref.kind == "promotion"]
        for ref in sorted(decided, key=lambda ref: ref.iteration, reverse=True):
            gate = gate_from_json(store.open("promotion", ref.digest).json(DECISION))
            if (sd := _sd_of(gate.evidence)) is not None:
                return ref.iteration, sd
    except EvolveError:
        pass
    return None, None


def _sd_of(evidence: Evidence) -> float | None:
    """SD of one task's difference as a gate found it; None where nothing was judged, or no task differed: the candidate of a
    night in which nothing was trained is the best itself."""
    sd, difference, tasks = (evidence.get(name) for name in ("success_sd", "success_difference", "judged_tasks"))
    if sd is None or difference is None or not tasks:
        return None
    return spread_alone(sd, difference, int(tasks)) or None
