"""``evolve warmup``: rounds of supervised fine-tuning on scripted episodes, until the model is good enough and not better.

It is made as a step is: under a digest, with a journal and checkpoints, so a killed one goes on where it was; then the model
appears whole at ``models.policy.path``.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from evolve_dag.agent.rollouts import gather_rollouts
from evolve_dag.config.parts import part_of
from evolve_dag.config.schema import DistillationSettings, Experiment, Regime, TaskSplit, WarmupSettings
from evolve_dag.distillation.alignment import align_all, no_injection, replay_injection
from evolve_dag.distillation.dataset import DistillationRow, make_rows, retention_rows
from evolve_dag.environments.base import EnvironmentPart, Place
from evolve_dag.errors import ConfigError, ModelError
from evolve_dag.inference.folders import base_identity, model_folder
from evolve_dag.inference.prefix_tree import prefix_tree
from evolve_dag.protocols import StatefulEnvironment
from evolve_dag.records import Step, Task, Trajectory
from evolve_dag.seeds import stable_hash
from evolve_dag.store.disk import write_atomic
from evolve_dag.tasks.streams import of_iteration
from evolve_dag.verification.exact import ExactVerifier
from evolve_dag.warmup import folder
from evolve_dag.warmup.script import Script, kinds

if TYPE_CHECKING:
    from evolve_dag.distillation.trainer import CurvePoint
    from evolve_dag.inference.chat import ChatFormat
    from evolve_dag.inference.transformers import TransformersModel
    from evolve_dag.store.artifacts import Build, Store

REGIME = Regime(source="student", divergence="cross_entropy", rejection=False, refused=True)
REFUSED = "refused"
"""Value of a feature by which an environment says that it did not take a turn."""
Advance = Callable[[str, int, int], None]
"""(what is being done, units done, units in all)."""


@dataclass(frozen=True, slots=True)
class Round:
    """What the model can do after one pass over the episodes."""

    round: int
    """1-based."""
    reward: float
    """Mean over the development episodes, without advice."""
    advised: float
    """The same with good advice before every step."""
    refused: float
    """Share of the actions without advice that the environment did not take."""
    loss: float | None
    """Mean of the pass, nats per token; None where no step was taken."""
    seconds: float
    """Of measuring it."""


@dataclass(frozen=True, slots=True)
class WarmedUp:
    """What ``evolve warmup`` has made, or found."""

    folder: Path
    digest: str
    rounds: tuple[Round, ...]
    made: bool
    """False: it was there already."""


def warm_up(
    experiment: Experiment,
    store: Store,
    advance: Advance = lambda what, done, total: None,
    begin: Callable[[int], None] = lambda tokens: None,
) -> WarmedUp:
    """Make the model of the experiment's ``warmup``, or find that it is there.

    Args:
        begin: called once before the first round, with the tokens of a pass.

    Raises:
        ConfigError: there is no such section, its world is one of a split's, the environment knows no way, or the folder holds
            something else.
        ModelError: the model to start from is missing, or cannot be trained.
        StoreError: it cannot be written; nothing half-written stays visible.
    """
    _refuse_shared_worlds(experiment)
    out = folder.target(experiment)
    if out.exists() and not (out / folder.NOTE).is_file():
        raise ConfigError(f"{out}: is there, and no warm-up made it", "name another folder under models.policy.path")
    if folder.outdated(experiment) is None:
        told = json.loads((out / folder.NOTE).read_text(encoding="utf-8"))
        return WarmedUp(out, told["digest"], tuple(Round(**one) for one in told["rounds"]), made=False)
    if absent := folder.absent_base(experiment):
        raise ModelError(absent, "put it there (SmolLM2-135M-Instruct: `make smollm2`), or correct the key")
    digest, config = folder.digest(experiment), folder.config(experiment)
    with store.build(folder.KIND, digest, code_version=folder.VERSION, config=config, inputs={}) as build:
        if build.artifact is None:
            rounds = _Warmup(experiment, build, advance).run(begin)
            build.note(rounds=[asdict(one) for one in rounds])
    artifact = store.open(folder.KIND, digest)
    told = artifact.summary["rounds"]
    _publish(artifact.path, out, {"digest": digest, "rounds": told, "config": config})
    return WarmedUp(out, digest, tuple(Round(**one) for one in told), made=True)


def _refuse_shared_worlds(experiment: Experiment) -> None:
    own = {folder.section(experiment).world, folder.section(experiment).world + 1}
    made = experiment.tasks.train.world is not None
    for night in range(1, experiment.iterations + 1):
        tasks = of_iteration(experiment, night).tasks if made else experiment.tasks
        for name, split in tasks.splits.items():
            if split.world in own:
                when = f" in iteration {night}" if night > 1 else ""
                what = f"tasks.{name}.world: {split.world}{when} is a world of the warm-up"
                raise ConfigError(
                    f"{what}: {min(own)} to learn, {max(own)} to measure", "give the splits, or the warm-up, other worlds"
                )


def _publish(made: Path, out: Path, note: dict[str, Any]) -> None:
    """The model's files at ``out``, all at once; what was there before goes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        new, old = Path(scratch) / "new", Path(scratch) / "old"
        shutil.copytree(made, new, copy_function=_link, ignore=shutil.ignore_patterns("manifest.json"))
        write_atomic(new / folder.NOTE, (json.dumps(note, indent=1) + "\n").encode())
        if out.exists():
            out.rename(old)
        new.rename(out)


def _link(source: str, target: str) -> None:
    """The file once more, without its bytes where the disk allows."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


class _Warmup:
    """One warm-up."""

    def __init__(self, experiment: Experiment, build: Build, advance: Advance) -> None:
        self.experiment, self.build, self.advance = experiment, build, advance
        self.settings: WarmupSettings = folder.section(experiment)
        self.start = folder.start(experiment)
        self.journal = build.journal("rounds")
        self.work = build.checkpoint("work")

    def run(self, begin: Callable[[int], None]) -> list[Round]:
        """All rounds, and the model of the last one in the build."""
        rounds = [Round(**record) for record in self.journal.records()]
        rows = self._rows()
        begin(prefix_tree([row.row.ids for row in rows]).tokens)
        while not rounds or (len(rounds) < self.settings.rounds and rounds[-1].reward < self.settings.target):
            number = len(rounds) + 1
            rounds.append(self._measured(number, self._trained(number, rows)))
        self._merged(self.adapter(rounds[-1].round))
        return rounds

    def adapter(self, number: int) -> Path:
        """Folder of the adapter after a round."""
        return self.work / f"round-{number:02d}"

    def _environment(self, world: int) -> StatefulEnvironment:
        row: EnvironmentPart[Any] = part_of("environment", self.experiment.environment)
        made = row.make(self.experiment.environment, Place(TaskSplit(world=world), self.start, None))
        if row.tasks is None or not isinstance(made, StatefulEnvironment):
            raise ConfigError("warmup: environment.kind must make its own tasks, with a state", "textworld does")
        return made

    def _script(self, world: int, settings: WarmupSettings, chat: ChatFormat | None = None) -> Script:
        return Script(self._environment(world), settings, chat)

    def _tasks(self, world: int, count: int) -> tuple[Task, ...]:
        row: EnvironmentPart[Any] = part_of("environment", self.experiment.environment)
        assert row.tasks is not None
        return tuple(row.tasks(self.experiment.environment, TaskSplit(world=world, count=count), "warmup"))

    def _rows(self) -> list[DistillationRow]:
        """The scripted episodes, as rows that are learned from."""
        from evolve_dag.inference.chat import read_chat

        chat = read_chat(model_folder(self.start))
        world, count = self.settings.world, self.settings.episodes
        script = self._script(world, self.settings, chat)
        tasks = self._tasks(world, count)
        for task in tasks[:8]:  # turns to name where they are not possible
            session = script.open(task, 0)
            script.elsewhere += script.hints[task.id].choices
            session.close()
        script.elsewhere = sorted(set(script.elsewhere))
        episodes = self._played(tasks, script, script, "scripted episodes")
        self.build.note(steps=dict(kinds(episodes)), episodes=count, reward=fmean(one.reward or 0.0 for one in episodes))
        return _rows_of(episodes, chat)

    def _played(self, tasks: Sequence[Task], model: Any, script: Script, what: str, *, advice: bool = True) -> list[Trajectory]:
        done = iter(range(1, len(tasks) + 1))
        played = asyncio.run(
            gather_rollouts(
                tasks,
                1,
                model=model,
                environment=script,
                verifier=ExactVerifier(),
                settings=self.experiment.rollout,
                seed=stable_hash("warmup", self.settings.seed),
                concurrency=self.experiment.runtime.concurrency,
                experience=script if advice else None,
                on_done=lambda _: self.advance(what, next(done), len(tasks)),
            )
        )
        failed = [one.error for one in played if one.status == "failed"]
        if failed:  # not a game that was lost: what it was worth is not known
            raise ModelError(f"{what}: {len(failed)} of {len(tasks)} broke, the first: {failed[0]}", "mend it, and run again")
        return played

    def _trained(self, number: int, rows: Sequence[DistillationRow]) -> float | None:
        """One pass over the rows; the mean loss."""
        from evolve_dag.distillation.launch import Request, train

        s, out = self.settings, self.adapter(number)
        before = self.adapter(number - 1)
        shutil.rmtree(out, ignore_errors=True)  # of a killed one; its checkpoint stands
        request = Request(
            model=model_folder(self.start),
            out=out,
            settings=DistillationSettings(
                rank=s.rank,
                alpha=s.alpha,
                learning_rate=s.learning_rate,
                epochs=1,
                tokens_per_batch=s.tokens_per_batch,
                learning_rate_decay=1.0,
            ),
            regime=REGIME,
            dtype=self.start.dtype,
            init_adapter=before if number > 1 else None,
            seed=stable_hash("warmup", s.seed, number) % 2**31,
            base=base_identity(self.start),
            checkpoint=self.work / f"training-{number:02d}",
        )

        def on_step(point: CurvePoint, total: int) -> None:
            self.advance(f"round {number}: training", point.step + 1, total)

        result = train(request, rows, self.experiment.runtime, on_step=on_step)
        losses = [point.loss for point in result.curve if not point.skipped]
        return fmean(losses) if losses else None

    def _measured(self, number: int, loss: float | None) -> Round:
        """What the model can do, written down."""
        begun = time.monotonic()
        model = self._opened(number)
        plain, advised = (self._rolled_out(number, model, advice=advice) for advice in (False, True))
        steps: list[Step] = [step for one in plain for step in one.steps]
        refused = fmean(step.problem is not None or REFUSED in step.features.values() for step in steps) if steps else 1.0
        reward, with_advice = (fmean(one.reward or 0.0 for one in found) for found in (plain, advised))
        found = Round(number, reward, with_advice, refused, loss, round(time.monotonic() - begun, 1))
        self.journal.append(asdict(found))
        return found

    def _opened(self, number: int) -> TransformersModel:
        """The model after a round."""
        from evolve_dag.inference.transformers import TransformersModel

        runtime = self.experiment.runtime
        return TransformersModel.load(
            model_folder(self.start),
            adapter_dir=self.adapter(number),
            dtype=self.start.dtype,
            device=runtime.device,
            threads=runtime.threads,
            max_batch=runtime.concurrency,
        )

    def _rolled_out(self, number: int, model: TransformersModel, *, advice: bool) -> list[Trajectory]:
        """Episodes of the world after the script's, with good advice before every step or none."""
        world, count = self.settings.world + 1, self.settings.development
        script = self._script(world, self.settings.model_copy(update={"advised": 1.0, "idle": 0.0}))
        what = f"round {number}: episodes {'with' if advice else 'without'} advice"
        return self._played(self._tasks(world, count), model, script, what, advice=advice)

    def _merged(self, adapter: Path) -> None:
        """The model with the adapter in its weights, in the build. Added in float32, and rounded afterwards where the model is
        in half precision: it is not quite what the last round measured then."""
        import torch
        from transformers import AutoTokenizer

        from evolve_dag.distillation.adapter import load_adapter
        from evolve_dag.distillation.trainer import load_model
        from evolve_dag.inference.lora import merge

        source = model_folder(self.start)
        model: Any = merge(load_adapter(load_model(source), adapter))
        model.to(getattr(torch, self.start.dtype)).save_pretrained(self.build.path)
        AutoTokenizer.from_pretrained(source, trust_remote_code=False).save_pretrained(self.build.path)


def _rows_of(episodes: Sequence[Trajectory], chat: ChatFormat) -> list[DistillationRow]:
    """Steps without advice as clean rows; steps with advice as rows in which the student reads it too."""
    clean = align_all(episodes, chat, no_injection, lambda _, step: not step.injected)
    read = align_all(episodes, chat, replay_injection("step_wise"), lambda _, step: bool(step.injected))
    return [*make_rows(clean, None), *retention_rows(make_rows(read, None), read, 1.0, 0)]
