"""Watch one episode: what the policy thinks, calls and sees, and the items in its context at each step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evolve_dag.errors import DataError

if TYPE_CHECKING:
    from rich.console import Console

    from evolve_dag.config.schema import Experiment
    from evolve_dag.records import Trajectory
    from evolve_dag.store.artifacts import Store


def play(
    experiment: Experiment,
    store: Store,
    *,
    iteration: int | None = None,
    task: str | None = None,
    seed: int = 0,
    with_experience: bool = True,
    console: Console | None = None,
) -> Trajectory:
    """Roll out one development task and print it.

    Args:
        iteration: policy(k) with its pool; None takes the newest policy that the store holds, else the base model.
        task: id of a development task; None takes one by ``seed``.
        with_experience: show the policy its experience, as the teacher sees it.

    Raises:
        DataError: no such task.
        OrderError: that iteration has not been reached.
    """
    from rich.console import Console

    from evolve_dag.agent.rollouts import gather_rollouts
    from evolve_dag.inference.roles import Roles
    from evolve_dag.steps.base import entering_policy
    from evolve_dag.steps.policies import experience_source, open_policy, open_pool
    from evolve_dag.tasks.suites import load_split

    console = console or Console()
    ref = entering_policy(experiment, iteration, store)
    pool = open_pool(store.open("experience", ref.experience) if ref.experience else None).without(ref.withdrawn)
    with Roles(experiment) as roles:
        split = load_split(experiment, "development", roles)
        tasks = {t.id: t for t in split.tasks}
        if task is not None and task not in tasks:
            raise DataError(f"no development task {task!r}", f"one of {', '.join(list(tasks)[:4])}, ...")
        chosen = tasks[task] if task is not None else split.tasks[seed % len(split.tasks)]
        with open_policy(store, ref.adapter, roles) as model:
            source = experience_source(experiment, pool, roles) if with_experience else None
            [trajectory] = roles.run(
                gather_rollouts(
                    [chosen],
                    1,
                    model=model,
                    environment=split.environment,
                    verifier=split.verifier,
                    settings=experiment.rollout,
                    seed=seed,
                    concurrency=1,
                    experience=source,
                )
            )
    title = (
        f"policy({ref.iteration}) of {experiment.experiment}, {len(pool.items)} items in its pool"
        if source
        else (f"policy({ref.iteration}) of {experiment.experiment}, without experience in context")
    )
    show(trajectory, chosen.answer, {item.id: item.text for item in pool.items}, title, console)
    return trajectory


def show(trajectory: Trajectory, reference: str, items: dict[str, str], title: str, console: Console) -> None:
    """Print one trajectory; text from the world is shown as it is, never as markup."""
    from rich.panel import Panel
    from rich.text import Text

    from evolve_dag.evaluation.metrics import told_reward

    console.print(Panel(Text(trajectory.question), title=Text(title), subtitle=Text(f"task {trajectory.task_id}")))
    for step in trajectory.steps:
        for item in step.selected:
            console.print(Text(f"   {item}  {items.get(item, '')}", style="yellow"))
        console.print(Text(f"{step.index + 1:>2} {step.text}", style="bold cyan"))
        if step.observation is not None:
            console.print(Text("\n".join(f"   {line}" for line in step.observation.splitlines()), style="dim"))
    word = told_reward(trajectory.reward)
    colour = {"right": "green", "wrong": "red", "not judged": "magenta"}.get(word, "yellow")
    console.print(Text(f"{word}: {trajectory.answer!r}, reference {reference!r}, {trajectory.turns} turns", style=colour))
