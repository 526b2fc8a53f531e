"""A loop without a model: the real digest chain, refs and gate; only what a model would do is made up. And Dagster at hand."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import dagster as dg
import numpy as np
import polars as pl
import yaml
from dagster._core.definitions.data_version import CachingStaleStatusResolver, StaleStatus
from dagster._core.loader import LoadingContextForTest
from evolve_dag.assets import automation, partitions
from safetensors.numpy import save_file

from evolve_dag.definitions import defs
from evolve_dag.distillation.alignment import StudentRow
from evolve_dag.distillation.dataset import DistillationRow, StepView, save_contexts
from evolve_dag.distillation.teacher import TeacherTargets
from evolve_dag.evaluation.metrics import evaluate_summary, score_trajectories
from evolve_dag.experience.pool import Pool
from evolve_dag.records import ExperienceItem, PoolEdit, Score, Step, Task, ToolCall, Trajectory
from evolve_dag.steps import base
from evolve_dag.store.frames import edits_to_frame, items_to_frame, scores_to_frame, trajectories_to_frames

CONFIG = {"iterations": 2, "evaluation": {"bootstrap": 100}}
TASKS = {f"t{n}": Task(f"t{n}", f"What is the mayor of city {n}?", "Rato Miku") for n in range(4)}


def trajectories(count: int = 2, injected: str = "") -> list[Trajectory]:
    """``count`` rollouts of every task, every other one right; two steps each."""
    made = []
    for task in TASKS.values():
        for rollout in range(count):
            answer = "Rato Miku" if rollout % 2 == 0 else "Zano Pile"
            call, found = ToolCall("search", {"query": "x"}), f"mayor: person {answer}"
            chosen = ("p0001",) if injected else ()
            steps = (
                Step(0, "search", (5, 6), (-0.1, -0.2), call=call, observation=found, selected=chosen, injected=injected),
                Step(1, answer, (7, 8, 9), (-0.1, -0.2, -0.3), answer=answer),
            )
            reward = float(rollout % 2 == 0)
            name = f"{task.id}#{rollout}"
            made.append(Trajectory(name, task.id, rollout, 1, "system", task.question, steps, "answered", answer, reward))
    return made


def save(folder: Path, rollouts: list[Trajectory]) -> None:
    """As the steps save trajectories."""
    for frame, name in zip(trajectories_to_frames(rollouts), ("trajectories.parquet", "steps.parquet"), strict=True):
        frame.write_parquet(folder / name)


class FakeSteps:
    """Bodies of the steps; counts how often each ran, and can be told to fail."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.fail: dict[str, BaseException] = {}
        self.items: tuple[str, ...] = ("Search first: when nothing is known, search.",)
        self.losses: tuple[float, ...] = (0.5, 0.25)
        self.hint = "\nhint:\nSearch first: when nothing is known, search."
        self.real: Callable[[str], base.Body] = base._body

    def body(self, name: str) -> base.Body:
        def run(context: base.StepContext) -> None:
            self.ran.append(f"{name}[{base.partition(context.experiment, context.iteration)}]")
            if name in self.fail:
                raise self.fail[name]
            context.progress.start(name, 1)
            (getattr(self, name, None) or self.real(name))(context)
            context.progress.advance()
            context.progress.finish()

        return run

    def trajectories(self, context: base.StepContext) -> None:
        save(context.build.path, trajectories())
        context.build.note(trajectories=8, tokens=40)

    def experience(self, context: base.StepContext) -> None:
        items = [ExperienceItem(f"p{n:04d}", text, "principle", created=1) for n, text in enumerate(self.items, 1)]
        items_to_frame(items).write_parquet(context.build.path / "items.parquet")
        (context.build.path / "pool.json").write_text(Pool(tuple(items)).to_json())
        edits = [PoolEdit("add", item.id, 1, None, item.text, "mined") for item in items]
        edits_to_frame(edits).write_parquet(context.build.path / "edits.parquet")
        context.build.note(items=len(items), added=len(items), updated=0, deleted=0, merged=0, locality={})

    def contexts(self, context: base.StepContext) -> None:
        sampled = trajectories(injected=self.hint)
        save(context.build.path, sampled)
        teacher = TeacherTargets(np.full((5, 2), np.log(0.5), np.float32))
        made = [
            DistillationRow(
                StudentRow(t.id, (1, 5, 6, 1, 7, 8, 9), (0, 1), ((1, 3), (4, 7))),
                (StepView(0, ("p0001",), self.hint, 3), StepView(1, (), "", 4)),
                teacher,
            )
            for t in sampled
        ]
        save_contexts(context.build.path, made)
        save_contexts(context.build.path / "retention", [])
        save_contexts(context.build.path / "drills", [])
        context.build.note(kept=len(made))

    def adapter(self, context: base.StepContext) -> None:
        curve = {"step": list(range(len(self.losses))), "loss": list(self.losses), "skipped": [False] * len(self.losses)}
        pl.DataFrame(curve).write_parquet(context.build.path / "curve.parquet")
        save_file({"weight": np.zeros(2, dtype=np.float32)}, context.build.path / "adapter_model.safetensors")
        context.build.note(rows=8, kept=8, loss_first=self.losses[0], loss_last=self.losses[-1])

    def scores(self, context: base.StepContext) -> None:
        made: list[Score] = []
        summary = {}
        for condition in ("base", "without", "with", "development_candidate", "development_best"):
            rollouts = trajectories(1)
            made += score_trajectories(rollouts, TASKS, condition)
            summary[condition] = evaluate_summary(rollouts, TASKS, context.experiment.evaluation)
        scores_to_frame(made).write_parquet(context.build.path / "scores.parquet")
        (context.build.path / "summary.json").write_text(json.dumps(summary))
        context.build.note(tokens=20, against=context.entering.standing.best)


def write_config(path: Path, **changes: object) -> Path:
    """An experiment file that needs no model."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump({**CONFIG, **changes}))
    return path


def execute(
    instance: dg.DagsterInstance, job: str, key: str, *, only: Sequence[str] | None = None, check: bool = True
) -> dg.ExecuteInProcessResult:
    """Run a job of the project's definitions for one partition."""
    return defs.resolve_job_def(job).execute_in_process(
        instance=instance,
        partition_key=key,
        asset_selection=[dg.AssetKey(name) for name in only] if only else None,
        raise_on_error=check,
        run_config={"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}},
    )


def iteration(
    instance: dg.DagsterInstance, k: int, *, only: Sequence[str] | None = None, check: bool = True
) -> dg.ExecuteInProcessResult:
    """One iteration of the experiment ``tiny``."""
    partitions.add_partitions(instance, ["tiny"], k)
    return execute(instance, "iteration", partitions.loop_key("tiny", k), only=only, check=check)


def config_job(instance: dg.DagsterInstance) -> dg.ExecuteInProcessResult:
    """Record the config slices of ``tiny``."""
    partitions.add_partitions(instance, ["tiny"], 1)
    return execute(instance, "experiment_config", "tiny")


def problems_of(result: dg.ExecuteInProcessResult) -> str:
    """What the failed steps said."""
    failures = [event.step_failure_data for event in result.get_step_failure_events()]
    return "\n".join(f"{f.user_failure_data.description if f.user_failure_data else f.error}" for f in failures)


def statuses(instance: dg.DagsterInstance, k: int) -> dict[str, StaleStatus]:
    """What the web interface shows of iteration k of ``tiny``."""
    resolver = CachingStaleStatusResolver(instance, defs.resolve_asset_graph(), LoadingContextForTest(instance))
    return {name: resolver.get_status(dg.AssetKey(name), partitions.loop_key("tiny", k)) for name in base.STEP_ORDER}


def unsynced(instance: dg.DagsterInstance, k: int) -> set[str]:
    """Steps of iteration k of ``tiny`` that Dagster calls stale."""
    return {name for name, status in statuses(instance, k).items() if status == StaleStatus.STALE}


def watch(instance: dg.DagsterInstance) -> dg.SensorResult | dg.SkipReason:
    """One tick of ``config_watch``, with what the daemon does of its result."""
    result = automation.config_watch(dg.build_sensor_context(instance=instance, resources=defs.resources))
    assert isinstance(result, dg.SensorResult | dg.SkipReason)
    if isinstance(result, dg.SensorResult):
        for request in result.dynamic_partitions_requests or []:
            instance.add_dynamic_partitions(request.partitions_def_name, request.partition_keys)
        for event in result.asset_events:
            instance.report_runless_asset_event(event)
    return result
