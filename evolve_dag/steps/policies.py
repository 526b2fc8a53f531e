"""What several steps open: the policy that acts, the pool, rollouts with progress and journal, and the teacher's views."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from evolve_dag.agent.frontier import more_rollouts
from evolve_dag.agent.loop import NOT_JUDGED
from evolve_dag.agent.rollouts import Condition, gather_conditions, judged_here, played_here
from evolve_dag.agent.together import each
from evolve_dag.config.parts import part_of
from evolve_dag.errors import AwayError, PartError, StoreError, UnjudgedError, UnreachableError
from evolve_dag.evaluation.gate import LEAST_JUDGED
from evolve_dag.inference.backends import identity, open_backend, open_transformers
from evolve_dag.inference.ledger import metered
from evolve_dag.inference.patience import MOST_UNREACHABLE
from evolve_dag.protocols import LanguageModel
from evolve_dag.records import Finding, Step, Task, Trajectory, withdrawn
from evolve_dag.secrecy import describe_error
from evolve_dag.steps.spec import Check, Verdict
from evolve_dag.store.layout import CALLS, POOL
from evolve_dag.tasks.suites import load_tasks_of, verifier_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from evolve_dag.config.schema import Experiment
    from evolve_dag.experience.pool import Pool
    from evolve_dag.experience.selection.base import SelectorPart
    from evolve_dag.inference.roles import Roles
    from evolve_dag.inference.transformers import TransformersModel
    from evolve_dag.protocols import ExperienceSource
    from evolve_dag.steps.body import Playing, RolloutWorkers, StepContext
    from evolve_dag.store.artifacts import Artifact, Store
    from evolve_dag.store.journal import Journal
    from evolve_dag.tasks.suites import Split

Model = TypeVar("Model", bound=LanguageModel)

TASK_KEYS = ("environment", "rollout", "verification")
"""Config keys of whatever asks tasks."""
FRONTIER = "rollout.frontier"
"""Of the student's rollouts alone: whoever else asks tasks does not read it."""
INJECTION_KEYS = ("injection", "selection")
"""Config keys of whatever places experience in a context."""


@runtime_checkable
class Checked(Protocol):
    """An environment that can say beforehand what it lacks: a key, a library, a sandbox."""

    def check(self) -> None:
        """Raises: ModelError, with everything that is missing."""


@contextmanager
def open_policy(store: Store, adapter: str | None, roles: Roles) -> Iterator[LanguageModel]:
    """The policy with an adapter, as what samples; its memory is freed on leaving.

    Args:
        adapter: digest of the adapter artifact, or None for the bare base model.
        roles: of the experiment; its roles that say ``policy`` are answered by this one meanwhile.
    """
    experiment = roles.experiment
    folder = adapter_folder(store, adapter)
    settings = experiment.models.policy
    with closing(open_backend(settings, role="policy", runtime=experiment.runtime, adapter=folder), roles) as model:
        counted = model
        # What runs in this process costs time only, and the steps hold its tokens.
        if settings.backend != "transformers" and roles.ledger is not None:
            counted = metered(model, role="policy", model_name=identity(settings), ledger=roles.ledger)
        with roles.policy(model, adapter):
            yield counted


@contextmanager
def open_teacher(adapter: Path | None, roles: Roles, sampler: LanguageModel | None) -> Iterator[TransformersModel]:
    """The same policy as weights that can be looked into: the one that samples, where it is in this process."""
    from evolve_dag.inference.transformers import TransformersModel

    if isinstance(sampler, TransformersModel):
        yield sampler
        return
    experiment = roles.experiment
    with closing(open_transformers(experiment.models.policy, runtime=experiment.runtime, adapter=adapter), roles) as model:
        yield model


@contextmanager
def closing(model: Model, roles: Roles) -> Iterator[Model]:
    """Frees a model's memory and connections on leaving."""
    try:
        yield model
    finally:
        roles.run(model.close())


def adapter_folder(store: Store, digest: str | None) -> Path | None:
    """Folder of an adapter artifact, checked; None for the bare base model."""
    if digest is None:
        return None
    artifact = store.open("adapter", digest)
    artifact.verify()
    return artifact.path


def trainings(store: Store, adapter: str | None) -> int:
    """How many trainings made an adapter what it is, from one adapter to the one that it began with.

    Nights whose candidate was declined, and those that had nothing to learn, are none.
    """
    count = 0
    while adapter is not None:
        found = store.read("adapter", adapter)
        count += not found.summary.get("unchanged")
        adapter = began_with(store, found)
    return count


def began_with(store: Store, adapter: Artifact) -> str | None:
    """Digest of the adapter that the training of this one began with; None: the bare base model."""
    began: str | None = store.read("policy", adapter.manifest.inputs["policy"]).summary["adapter"]
    return began


def same_weights(store: Store, adapter: str | None) -> str | None:
    """The first adapter with the weights of ``adapter``: one that training left as it was is the one that entered.

    Raises:
        AwayError: which one that is cannot be told now.
    """
    while adapter is not None:
        try:
            found = store.read("adapter", adapter)
            if not found.summary.get("unchanged"):
                break
            adapter = began_with(store, found)
        except AwayError:
            raise
        except StoreError:  # whoever opens it says so
            break
    return adapter


def open_pool(artifact: Artifact | None, name: str = POOL) -> Pool:
    """The pool of an experience artifact, or an empty one."""
    from evolve_dag.experience.pool import Pool

    if artifact is None:
        return Pool()
    path = artifact.file(name)
    return Pool.from_json(path.read_text(encoding="utf-8"), str(path))


def findings_of(contexts: Artifact) -> tuple[Finding, ...]:
    """What the check of the teacher found about items of the pool."""
    return tuple(Finding(**finding) for finding in contexts.summary.get("findings", ()))


def checked_pool(context: StepContext) -> Pool:
    """E(k) without the items that the check of the teacher withdrew tonight."""
    return open_pool(context.inputs["experience"]).without(withdrawn(findings_of(context.inputs["contexts"])))


def injects(experiment: Experiment, pool: Pool) -> bool:
    """Whether anything can stand in the teacher's context."""
    return experiment.injection != "none" and bool(pool.active.items)


def experience_source(experiment: Experiment, pool: Pool, roles: Roles) -> ExperienceSource | None:
    """The pool as it stands in the teacher's context; None when there is nothing to inject.

    Args:
        roles: who is asked where the selector is a model; it says its identity now, so open the policy first.
    """
    from evolve_dag.experience.injection import Injector

    if not injects(experiment, pool):
        return None
    pool = pool.active
    if experiment.injection != "step_wise":
        return Injector(experiment.injection, pool)
    row: SelectorPart[Any] = part_of("selector", experiment.selection)
    return Injector(experiment.injection, pool, row.make(experiment.selection, roles, experiment.seed))


def without_choice(experiment: Experiment) -> tuple[str, ...]:
    """``selection``, where no item is chosen: the whole pool stands in the context, or none of it."""
    return () if experiment.injection == "step_wise" else ("selection",)


def selector_statistics(*sources: ExperienceSource | None) -> dict[str, Any]:
    """What selectors that ask a model counted, all together, under ``selector``; nothing for the others."""
    counted: dict[str, Any] = {}
    for source in sources:
        for name, value in dict(getattr(getattr(source, "selector", None), "statistics", None) or {}).items():
            adds = isinstance(value, (int, float)) and name in counted  # a selector from outside may tell texts as well
            counted[name] = counted[name] + value if adds else value
    return {"selector": counted} if counted else {}


def roll_out(
    context: StepContext,
    split: Split,
    model: Any,
    *,
    label: str,
    seed: int,
    group_size: int,
    experience: ExperienceSource | None = None,
    temperature: float | None = None,
    journal: str | None = None,
) -> list[Trajectory]:
    """Rollouts of all tasks of ``split``, resumed from the step's journal ``label``."""
    rollouts = Rollouts(label, split, seed, group_size, experience, temperature, journal, on_trial=experience is not None)
    (trajectories,) = roll_out_together(context, [rollouts], model)
    return trajectories


@dataclass(frozen=True, slots=True)
class Rollouts:
    """What a step wants rolled out."""

    label: str
    """For who watches."""
    split: Split
    seed: int
    group_size: int
    experience: ExperienceSource | None = None
    temperature: float | None = None
    """In place of the experiment's; 0 is argmax."""
    journal: str | None = None
    """Name of the journal; None: that of the label."""
    on_trial: bool = False
    """Whether episodes that fail may be the fault of whoever plays, which the gate or the check of the teacher judges."""


def roll_out_together(context: StepContext, wanted: Sequence[Rollouts], model: Any) -> list[list[Trajectory]]:
    """Rollouts of several conditions by one policy, side by side, each resumed from its own journal.

    Raises:
        UnjudgedError: too many have no verdict.
    """
    context.progress.start(", ".join(one.label for one in wanted), sum(len(one.split.tasks) * one.group_size for one in wanted))
    try:
        conditions = [condition_of(context, one, model) for one in wanted]
        found = _played(context, conditions, context.experiment.runtime.concurrency)
    finally:
        context.progress.finish()
    for one, trajectories in zip(wanted, found, strict=True):
        require_judged(one.label, trajectories, one.on_trial)
    return found


def _played(context: StepContext, conditions: Sequence[Condition], concurrency: int) -> list[list[Trajectory]]:
    """All episodes; those for which a model could not be asked once more, since it may be back after a moment."""
    found = context.roles.run(gather_conditions(conditions, concurrency))
    if any(map(unreachable, found)):
        again = [replace(one, on_done=None) for one in conditions]
        found = context.roles.run(gather_conditions(again, concurrency))
    return found


def unreachable(trajectories: Sequence[Trajectory]) -> list[str]:
    """What is told of the episodes that say nothing, since a model could not be asked."""
    told = [t.error for t in trajectories if t.reward is None and t.error is not None]
    # The type stands first; what follows may be anybody's words.
    return [error for error in told if error.removeprefix(NOT_JUDGED).startswith(f"{UnreachableError.__name__}: ")]


def require_judged(label: str, trajectories: Sequence[Trajectory], on_trial: bool = False) -> None:
    """That a night is not made of what an outage left of it: it would stand for good.

    Args:
        on_trial: where no verdict may be the doing of whoever plays; then the gate looks at how many there are.

    Raises:
        UnjudgedError: fewer than half of the episodes have a verdict, or a model could not be asked for more than
            :data:`~evolve_dag.inference.patience.MOST_UNREACHABLE` of them.
    """
    lost = [t.error or "the verifier gave none" for t in trajectories if t.reward is None]
    few = not on_trial and len(trajectories) - len(lost) < LEAST_JUDGED * len(trajectories)
    if not few:
        lost = unreachable(trajectories)
        if len(lost) <= MOST_UNREACHABLE * len(trajectories):
            return
    often, times = Counter(lost).most_common(1)[0]
    raise UnjudgedError(
        f"{label}: {len(lost)} of {len(trajectories)} episodes have no verdict; {times} of them: {often}",
        "mend that and give the same command: what has a verdict is kept, the others are played again",
    )


def condition_of(context: StepContext, wanted: Rollouts, model: LanguageModel) -> Condition:
    """Its episodes, played by ``model`` in this process and resumed from their journal."""
    settings, split = context.experiment.rollout, wanted.split
    if wanted.temperature is not None:
        settings = settings.model_copy(update={"temperature": wanted.temperature})
    if isinstance(split.environment, Checked):
        split.environment.check()
    return Condition(
        split.tasks,
        wanted.group_size,
        played_here(model, split.environment, split.verifier, settings, wanted.experience),
        wanted.seed,
        _journal(context, wanted.journal or wanted.label),
        lambda _: context.progress.advance(),
        judged_here(split.verifier),
    )


def _journal(context: StepContext, name: str) -> Journal:
    return context.build.journal(name.replace(" ", "_"))


def teacher_views(
    context: StepContext, trajectories: Sequence[Trajectory], source: ExperienceSource | None, label: str
) -> list[Trajectory]:
    """:func:`with_teacher_views` of a step.

    Raises:
        UnjudgedError: for too many there was no model that selects.
    """
    concurrency = context.experiment.runtime.concurrency
    viewed = context.roles.run(with_teacher_views(trajectories, source, concurrency))
    require_judged(label, viewed, on_trial=True)
    return viewed


async def with_teacher_views(
    trajectories: Sequence[Trajectory], source: ExperienceSource | None, concurrency: int
) -> list[Trajectory]:
    """Student trajectories with what the teacher would have had in its context recorded in every step.

    One for which a selector from outside fails, or the model that selects cannot be asked, is ``failed``, as it is where the
    teacher acts: nothing is learned from it.

    Args:
        concurrency: steps at a time, since a selector may ask a model; the steps of a trajectory do not wait for each other.
    """
    if source is None:
        return list(trajectories)
    failed: dict[int, str] = {}

    async def viewed(place: tuple[int, int]) -> Step:
        at, index = place
        trajectory = trajectories[at]
        step = trajectory.steps[index]
        if at not in failed:
            try:
                view = await source.prepare(replace(trajectory, steps=trajectory.steps[:index]))
                return replace(step, selected=view.selected, injected=view.text, rationale=view.rationale)
            except (PartError, UnreachableError) as error:
                failed.setdefault(at, describe_error(error))
        return step

    places = [(at, index) for at, trajectory in enumerate(trajectories) for index in range(len(trajectory.steps))]
    steps = iter(await each(viewed, places, concurrency))
    with_views = [replace(trajectory, steps=tuple(islice(steps, len(trajectory.steps)))) for trajectory in trajectories]
    return [
        replace(trajectory, status="failed", reward=None, error=failed[at]) if at in failed else with_views[at]
        for at, trajectory in enumerate(trajectories)
    ]


def play_students(context: StepContext, condition: Condition, concurrency: int) -> list[Trajectory]:
    """Rollouts to learn from, in the order of the tasks: as many of each; with ``rollout.frontier`` the later ones are of tasks
    whose first ones had mixed outcomes.

    Raises:
        UnjudgedError: too many have no verdict.
    """
    more, tasks, label = context.experiment.rollout.more, condition.tasks, "rollouts"
    first = condition.group_size - more
    context.progress.start(label, len(tasks) * condition.group_size)
    try:
        (found,) = _played(context, [replace(condition, group_size=first)], concurrency)
        require_judged(label, found)
        if more:
            rewards = [[one.reward for one in found[at : at + first]] for at in range(0, len(found), first)]
            extra = more_rollouts(rewards, more * len(tasks))
            again = {count: [task for task, own in zip(tasks, extra, strict=True) if own == count] for count in {*extra} - {0}}
            rounds = [replace(condition, tasks=asked, group_size=count, first=first) for count, asked in sorted(again.items())]
            place = {task.id: at for at, task in enumerate(tasks)}
            later = _played(context, rounds, concurrency)
            found = sorted(chain(found, *later), key=lambda one: (place[one.task_id], one.rollout))
            require_judged(label, found)
    finally:
        context.progress.finish()
    return found


def fan_out(context: StepContext, workers: RolloutWorkers, playing: Playing, *, seed: int, group_size: int) -> list[Trajectory]:
    """As :func:`play_students`: the episodes are played by ``workers``, and written down here."""
    tasks = load_tasks_of(context.experiment, playing.split)
    with workers.open(playing, context.roles.ledger) as (play, concurrency):
        # A verdict that is missing is asked for here: the episode itself is there.
        judge = judged_here(verifier_of(context.experiment, context.roles))
        journal = _journal(context, "rollouts")
        condition = Condition(tasks, group_size, play, seed, journal, lambda _: context.progress.advance(), judge)
        return play_students(context, condition, concurrency)


def by_id(tasks: Sequence[Task]) -> dict[str, Task]:
    """Task id -> task."""
    return {task.id: task for task in tasks}


def judged(artifact: Artifact, file: str) -> Verdict:
    """Whether enough episodes of a table of trajectories or scores could be judged."""
    frame = artifact.frame(file)
    known = frame["reward"].drop_nulls().len()
    share = known / frame.height if frame.height else 0.0
    failed = int((frame["status"] == "failed").sum())
    evidence = {"episodes": frame.height, "judged": known, "share": share, "failed_episodes": failed}
    return Verdict("judged", share >= LEAST_JUDGED, evidence)


ANSWERED = Check(
    "answered", f"At most {MOST_UNREACHABLE:.0%} of the calls to extractor, selector and judge failed, each by itself."
)
EARLIER = "calls_of_earlier_attempts"
"""Entry of a step's summary: calls from before it was ended and went on. What they were to answer has been asked again."""


def answered(artifact: Artifact) -> Verdict:
    """Whether the models that a step asked did answer; where one did not something else stood in, or something is missing.

    What the policy itself is asked is told by its episodes.
    """
    if CALLS not in artifact.manifest.files:
        return Verdict(ANSWERED.name, True, {"calls": 0})
    calls = artifact.frame(CALLS).slice(int(artifact.summary.get(EARLIER, 0)))
    asked, failed, errors = Counter[str](), Counter[str](), Counter[str]()
    for role, purpose, outcome, error in calls.select("role", "purpose", "outcome", "error").iter_rows():
        if role != "policy":
            what = f"{role}: {purpose}".removesuffix(": ")
            asked[what] += 1
            if outcome == "error":
                failed[what] += 1
                errors[error or ""] += 1
    evidence: dict[str, Any] = {"calls": asked.total(), "failed": failed.total()}
    if failed:
        evidence["failed_of"] = {what: f"{count} of {asked[what]}" for what, count in failed.most_common()}
        evidence["most_often"] = errors.most_common(1)[0][0]
    return Verdict(ANSWERED.name, all(failed[what] <= max(1, MOST_UNREACHABLE * asked[what]) for what in failed), evidence)
