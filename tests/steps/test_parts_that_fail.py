"""A part from outside that fails costs what it touched: an episode, a step; never what is stored."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_lineage import copy_of, small

from evolve_dag.agent.loop import run_episode
from evolve_dag.config.fence import Fence
from evolve_dag.config.loading import load_experiment
from evolve_dag.config.schema import Experiment, RolloutSettings
from evolve_dag.environments.fenced import FencedEnvironment
from evolve_dag.errors import ConfigError, ModelError, PartError, UnjudgedError, UnreachableError
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.base import FencedSelector, Selection
from evolve_dag.inference.backends import FencedModel
from evolve_dag.inference.scripted import ScriptedModel
from evolve_dag.protocols import Injected, Request, Sampling
from evolve_dag.records import Call, Message, Step, Task, ToolCall, Trajectory
from evolve_dag.steps import base
from evolve_dag.steps.policies import EARLIER, answered, require_judged, teacher_views, with_teacher_views
from evolve_dag.store.artifacts import Store
from evolve_dag.store.frames import calls_to_frame
from evolve_dag.store.layout import CALLS
from evolve_dag.tasks.suites import load_split
from evolve_dag.verification.base import FencedVerifier

TASK = Task("t", "Who?", "Rato Miku")
FENCE = Fence("part odd (file)", 5.0)


class World:
    tools = ()
    system_prompt = "Answer."
    digest = ""


class Verifier:
    def __init__(self, reward: Any) -> None:
        self.reward = reward

    async def verify(self, task: Task, answer: str | None) -> Any:
        return self.reward


class Source:
    """Fails for one trajectory."""

    async def prepare(self, trajectory: Trajectory) -> Injected:
        if trajectory.id == "bad":
            raise PartError("selector odd (file): KeyError: 'x'")
        return Injected((), ("p0001",), "\nhint:\nSearch.")


def episode(reward: Any) -> Trajectory:
    return asyncio.run(
        run_episode(
            TASK,
            0,
            model=ScriptedModel(["<answer>Rato Miku</answer>"]),
            environment=World(),  # type: ignore[arg-type]
            verifier=FencedVerifier(Verifier(reward), FENCE),
            settings=RolloutSettings(),
            seed=1,
        )
    )


def test_an_episode_whose_verifier_gives_nonsense_is_not_judged() -> None:
    wrong = episode(float("nan"))
    assert (wrong.status, wrong.reward) == ("answered", None)
    assert "part odd (file): a reward is a number from 0 to 1, or None, not nan" in str(wrong.error)
    assert episode(1).reward == 1.0
    assert episode(0.8 + 0.05 + 0.05 + 0.1).reward == 1.0, "rounding is no nonsense"


DOWN = "not judged: UnreachableError: judge model m: 5 of 5 attempts failed"
BROKEN = "SessionError: the world broke"


@pytest.mark.parametrize(
    ("errors", "on_trial", "told"),
    [
        ([None] * 100, False, None),
        ([BROKEN] * 50 + [None] * 50, False, None),
        ([BROKEN] * 51 + [None] * 49, False, "51 of 100 episodes have no verdict; 51 of them: SessionError"),
        ([BROKEN] * 100, True, None),  # who plays may have broken it: the gate sees how many there are
        ([DOWN] * 10 + [None] * 90, False, None),
        ([DOWN] * 11 + [None] * 89, False, "11 of 100 episodes have no verdict; 11 of them: not judged: UnreachableError"),
        ([DOWN] * 11 + [BROKEN] * 80 + [None] * 9, True, "11 of 100 episodes have no verdict"),
        ([], False, None),
    ],
)
def test_a_night_is_not_made_of_what_an_outage_left_of_it(errors: list[str | None], on_trial: bool, told: str | None) -> None:
    episodes = [
        Trajectory(f"t{i}#0", f"t{i}", 0, 0, "", "", (), "answered", "x", None if error else 0.0, error)
        for i, error in enumerate(errors)
    ]
    if told is None:
        require_judged("rollouts", episodes, on_trial)
    else:
        with pytest.raises(UnjudgedError, match=told):
            require_judged("rollouts", episodes, on_trial)


def made(*calls: tuple[str, str, int, int], earlier: int = 0) -> Any:
    """An artifact with calls: (role, purpose, how many, how many of them failed)."""
    rows = [
        Call(role, "m", purpose, "error" if n < failed else "ok", 1, 1, 0, 1, 0.1, None, "no answer" if n < failed else None, 0)
        for role, purpose, count, failed in calls
        for n in range(count)
    ]
    manifest = SimpleNamespace(files=(CALLS,))
    return SimpleNamespace(manifest=manifest, summary={EARLIER: earlier}, frame=lambda name: calls_to_frame(rows))


@pytest.mark.parametrize(("failed", "passed"), [(0, True), (2, True), (3, False), (20, False)])
def test_calls_that_fail_are_told(failed: int, passed: bool) -> None:
    """What stands in for an answer (the beginning of a page, a lexical choice) must not go unseen."""
    verdict = answered(made(("extractor", "page", 20, failed)))
    assert verdict.passed is passed
    assert verdict.evidence["failed"] == failed
    if failed:
        assert verdict.evidence["failed_of"] == {"extractor: page": f"{failed} of 20"}
        assert verdict.evidence["most_often"] == "no answer"


def test_calls_for_one_purpose_do_not_hide_behind_those_for_another() -> None:
    assert not answered(made(("judge", "verdict", 500, 0), ("extractor", "page", 40, 20))).passed
    assert not answered(made(("policy", "", 5000, 0), ("extractor", "page", 40, 20))).passed
    assert answered(made(("policy", "", 100, 100), ("extractor", "page", 40, 0))).passed  # its overflows are its own affair


def test_calls_that_were_asked_again_after_an_outage_are_no_alarm() -> None:
    outage, after = ("selector", "select", 60, 40), ("selector", "select", 40, 0)
    assert answered(made(outage, after, earlier=60)).passed
    assert not answered(made(outage, after)).passed


def test_a_trajectory_whose_selector_fails_is_failed_and_the_others_stand() -> None:
    steps = (Step(0, "look", (), ()), Step(1, "answer", (), ()))
    made = [Trajectory(name, "t", 0, 0, "", "?", steps, "answered", "a", 1.0) for name in ("good", "bad")]
    good, bad = asyncio.run(with_teacher_views(made, Source(), 2))
    assert [step.selected for step in good.steps] == [("p0001",)] * 2
    assert (bad.status, bad.reward) == ("failed", None)
    assert "selector odd (file): KeyError" in str(bad.error)
    assert bad.steps == steps


def test_a_trajectory_whose_selector_cannot_be_asked_counts_as_one_of_an_outage() -> None:
    class Down:
        async def prepare(self, trajectory: Trajectory) -> Injected:
            raise UnreachableError("selector model m: the account has no credit left")

    made = [Trajectory("a", "t", 0, 0, "", "?", (Step(0, "look", (), ()),), "answered", "a", 1.0)]
    context: Any = SimpleNamespace(
        roles=SimpleNamespace(run=asyncio.run), experiment=SimpleNamespace(runtime=SimpleNamespace(concurrency=2))
    )
    with pytest.raises(UnjudgedError, match=r"^teacher check: 1 of 1 .* no credit left"):
        teacher_views(context, made, Down(), "teacher check")


def test_the_views_of_several_trajectories_are_made_at_once_and_no_more_than_asked() -> None:
    asked: list[str] = []
    both = asyncio.Event()

    class Waits:
        """Answers once two trajectories have asked."""

        async def prepare(self, trajectory: Trajectory) -> Injected:
            asked.append(trajectory.id)
            if len(asked) == 2:
                both.set()
            await asyncio.wait_for(both.wait(), 5)
            return Injected((), ("p0001",), "")

    made = [Trajectory(name, "t", 0, 0, "", "?", (Step(0, "look", (), ()),), "answered", "a", 1.0) for name in "abc"]
    viewed = asyncio.run(with_teacher_views(made, Waits(), 2))
    assert [one.id for one in viewed] == asked == ["a", "b", "c"]


def test_the_steps_of_one_trajectory_do_not_wait_for_each_other() -> None:
    asked: list[int] = []
    all_of_them = asyncio.Event()

    class Waits:
        """Answers once every step has asked; names what it was asked about."""

        async def prepare(self, trajectory: Trajectory) -> Injected:
            asked.append(len(trajectory.steps))
            if len(asked) == 4:
                all_of_them.set()
            await asyncio.wait_for(all_of_them.wait(), 5)
            return Injected((), (f"before-{len(trajectory.steps)}",), "")

    steps = tuple(Step(index, "look", (), ()) for index in range(3))
    made = [Trajectory(name, "t", 0, 0, "", "?", own, "answered", "a", 1.0) for name, own in (("a", steps), ("b", steps[:1]))]
    viewed = asyncio.run(with_teacher_views(made, Waits(), 4))
    assert [[step.selected for step in one.steps] for one in viewed] == [
        [("before-0",), ("before-1",), ("before-2",)],
        [("before-0",)],
    ]


def test_a_step_whose_part_was_installed_anew_meanwhile_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path)
    monkeypatch.setattr(base, "altered", lambda: ["hybrid (evolve-hybrid 0.1, sha256:0)"])
    with pytest.raises(PartError, match=r"policy: hybrid .* was installed anew while the step was made"):
        base.run_step("policy", Experiment(experiment="x"), 1, store)
    assert list(store.artifacts()) == []
    monkeypatch.undo()
    assert base.run_step("policy", Experiment(experiment="x"), 1, store).recomputed


EXTRACTOR = '''
from evolve_dag.config.parts import ExtractionSettings
from evolve_dag.experience.extraction.base import Extraction, ExtractorPart

class Settings(ExtractionSettings):
    """Finds nothing, or nonsense."""

async def make(settings, material):
    return "lessons" if settings.cap == 1 else Extraction(material.pool, (), {"groups": len(material.tasks)})

X = ExtractorPart(settings=Settings, make=make)
'''


def test_an_extractor_that_fails_ends_its_step_and_nothing_is_stored(tmp_path: Path, small_lineage: Store) -> None:
    (tmp_path / "mine.py").write_text(EXTRACTOR)
    store, extractor = copy_of(small_lineage, tmp_path / "store"), f"{tmp_path / 'mine.py'}:X"
    before = {artifact.digest for artifact in store.artifacts()}
    with pytest.raises(PartError, match=r"extractor mine:X \(file\): what it extracted is no Extraction, but a str"):
        base.run_step("experience", small(extraction={"extractor": extractor, "cap": 1}), 1, store)
    assert {artifact.digest for artifact in store.artifacts()} == before
    made = base.run_step("experience", small(extraction={"extractor": extractor, "cap": 2}), 1, store).artifact
    assert made.summary["statistics"] == {"groups": 12}
    assert made.manifest.config["extraction"]["extractor"].startswith("mine:X (file, sha256:")


ENVIRONMENT = '''
from evolve_dag.config.parts import EnvironmentSettings
from evolve_dag.environments.base import EnvironmentPart, file_tasks
from evolve_dag.protocols import ToolError, ToolSpec

class Settings(EnvironmentSettings):
    """Says it again."""

    broken: bool = False
    """Whether every call fails."""

class Echo:
    tools = (ToolSpec("say", "says it again", {"text": "what"}),)
    system_prompt, digest = "Say it.", "echo"

    def __init__(self, settings):
        self.broken = settings.broken

    async def call(self, call):
        if call.arguments["text"] == "nothing":
            raise ToolError("say something")
        return call.arguments["text"] + "!" if not self.broken else 1 / 0

X = EnvironmentPart(settings=Settings, make=lambda settings, place: Echo(settings), mistakes=lambda settings, e: file_tasks(e))
'''


def test_a_call_that_blocks_costs_its_episode(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evolve_dag.config.fence.GRACE", 0.1)

    class Blocking(World):
        async def call(self, call: ToolCall) -> str:
            while True:
                time.sleep(0.01)

    environment = FencedEnvironment(Blocking(), Fence("environment slow (file)", 0.2))  # type: ignore[arg-type]
    with pytest.raises(PartError, match=r"environment slow \(file\): no answer within 0.2 s"):
        asyncio.run(environment.call(ToolCall("say", {})))


def test_an_environment_from_outside_answers_and_one_that_breaks_costs_its_episode(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(ENVIRONMENT)
    names = ("train", "development", "held_out")
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(f'{{"question": "what is {name}?", "answer": "x"}}\n')
    tasks = f"tasks: {{{', '.join(f'{name}: {{path: {name}.jsonl}}' for name in names)}}}\n"
    say = '<tool_call>\n{"name": "say", "arguments": {"text": "well"}}\n</tool_call>'
    found = []
    for broken in ("false", "true"):
        (tmp_path / "x.yaml").write_text(f"{tasks}environment: {{kind: 'mine:X', broken: {broken}}}\n")
        split = load_split(load_experiment(tmp_path / "x.yaml"), "train")
        model, settings = ScriptedModel([say.replace("well", "nothing"), say, "<answer>x</answer>"]), RolloutSettings()
        parts: dict[str, Any] = {"model": model, "environment": split.environment, "verifier": split.verifier}
        found.append(asyncio.run(run_episode(split.tasks[0], 0, settings=settings, seed=1, **parts)))
    good, bad = found
    assert (good.status, good.reward) == ("answered", 1.0)
    assert [step.observation for step in good.steps] == ["say something", "well!", None]
    assert (bad.status, bad.reward) == ("failed", None)
    assert "ZeroDivisionError" in str(bad.error)
    (tmp_path / "x.yaml").write_text("environment: {kind: 'mine:X'}\n")
    with pytest.raises(ConfigError, match=r"tasks.train.path: missing"):
        load_experiment(tmp_path / "x.yaml")


def test_a_selector_that_blocks_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evolve_dag.config.fence.GRACE", 0.1)

    class Blocking:
        async def select(self, question: str, steps: Any, pool: Pool) -> Selection:
            while True:
                pass

    selector = FencedSelector(Blocking(), 3, Fence("selector slow (file)", 0.2))
    with pytest.raises(PartError, match=r"selector slow \(file\): no answer within 0.2 s"):
        asyncio.run(selector.select("?", (), Pool()))


def test_a_model_from_outside_is_held_to_its_protocol() -> None:
    class Model(ScriptedModel):
        async def generate(self, request: Request) -> Any:
            if request.session == "slow":
                await asyncio.sleep(1e6)
            return "just text" if request.session == "odd" else await super().generate(request)

    model = FencedModel(Model(["yes"]), Fence("backend odd", 0.2))
    ask = Request((Message("user", "?"),), Sampling())
    assert asyncio.run(model.generate(ask)).text == "yes"
    for session, wrong in (("slow", "no answer within"), ("odd", "no Completion, but a str")):
        with pytest.raises(PartError, match=wrong):
            asyncio.run(model.generate(Request(ask.messages, ask.sampling, session)))
    assert model.count_tokens(Message("tool", "four words are here")) > 0
    with pytest.raises(ModelError):  # the script has no second reply: an error of ours stays what it is
        asyncio.run(model.generate(ask))
