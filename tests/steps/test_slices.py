"""What is in the digest of a step is what its body can see: no more decides it, and no less."""

from __future__ import annotations

import asyncio
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import pytest

from evolve_dag import prompts
from evolve_dag.config.parts import CHOICES, SelectionSettings
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import SliceError
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.base import Selection, SelectorPart
from evolve_dag.inference.roles import Roles
from evolve_dag.protocols import Request, Sampling
from evolve_dag.records import ExperienceItem, Message
from evolve_dag.steps import base
from evolve_dag.steps.body import StepContext
from evolve_dag.steps.policies import experience_source
from evolve_dag.steps.slices import decisive, slice_of, visible
from evolve_dag.store.artifacts import Store

OPENAI = {"backend": "openai", "model": "m"}
LLM = {
    "extraction": {"extractor": "llm"},
    "selection": {"selector": "llm"},
    "models": {"extractor": OPENAI, "selector": OPENAI, "judge": OPENAI},
    "verification": {"kind": "judge"},
}
REFRESHED = {"regime": "on_policy", "distillation": {"refresh": 2}}
NAMES = ("train", "development", "held_out")


@pytest.fixture
def files(tmp_path: Path) -> dict[str, Any]:
    """Tasks in files, for environments that make none."""
    for name in NAMES:
        (tmp_path / f"{name}.jsonl").write_text(f'{{"question": "what is {name}?", "answer": "x"}}\n')
    return {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in NAMES}


def experiment(*changes: dict[str, Any]) -> Experiment:
    merged: dict[str, Any] = {"experiment": "x"}
    for change in changes:
        for key, value in change.items():
            merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    return Experiment.model_validate(merged)


def touched(old: Experiment, new: Experiment) -> set[str]:
    return {step for step in base.STEP_ORDER if base.settings_digest(step, old) != base.settings_digest(step, new)}


@pytest.mark.parametrize(
    ("before", "change", "steps"),
    [
        ({}, {"distillation": {"top_k": 8}}, {"contexts"}),
        ({}, {"distillation": {"retention": 0.1}}, {"contexts"}),
        ({"injection": "none"}, {"distillation": {"retention": 0.1, "top_k": 8}}, set()),
        ({}, {"distillation": {"drills": 0.1}}, {"contexts"}),
        ({"injection": "none"}, {"distillation": {"drills": 0.1}}, set()),
        ({}, {"distillation": {"retention_weight": 2.0}}, {"adapter"}),
        ({"distillation": {"retention": 0.0}}, {"distillation": {"retention_weight": 2.0}}, set()),
        ({"distillation": {"retention": 0.0, "drills": 0.1}}, {"distillation": {"retention_weight": 2.0}}, {"adapter"}),
        ({}, {"distillation": {"teacher_temperature": 0.5}}, {"adapter"}),
        ({"regime": {"divergence": "cross_entropy"}}, {"distillation": {"teacher_temperature": 0.5}}, set()),
        ({"regime": "on_policy"}, {"tasks": {"train": {"count": 5}}}, {"trajectories", "contexts"}),
        (REFRESHED, {"tasks": {"train": {"count": 5}}}, {"trajectories", "contexts", "adapter"}),
        ({}, {"regime": {"refused": True}}, {"contexts"}),
        ({}, {"evaluation": {"ceiling": True}}, {"scores"}),
        ({"evaluation": {"with_experience": False, "ceiling": True}}, {"selection": {"max_items": 2}}, {"contexts", "scores"}),
        ({}, {"extraction": {"placebo": True}}, {"experience"}),
        ({}, {"extraction": {"graduation": 0.5}}, {"experience"}),
        ({"granularity": "instance"}, {"extraction": {"graduation": 0.5}}, set()),
        ({}, {"teacher_check": {"confidence": 0.9}}, {"contexts"}),
        ({}, {"teacher_check": {"tasks": 5}}, set()),
        ({}, {"teacher_check": {"attempts": 1}}, {"contexts"}),
        ({}, {"teacher_check": {"must_help": True}}, {"contexts"}),
        ({"regime": "on_policy"}, {"teacher_check": {"tasks": 5}}, {"contexts"}),
        (LLM, {"teacher_check": {"tasks": 5}}, {"contexts"}),
        (
            {"teacher_check": {"enabled": False}},
            {"teacher_check": {"confidence": 0.9, "tasks": 5, "attempts": 1, "must_help": True}},
            set(),
        ),
        ({"injection": "none"}, {"teacher_check": {"enabled": False}}, set()),
        ({"injection": "none"}, {"teacher_check": {"attempts": 1}}, set()),
        ({}, {"distillation": {"jsd_weight": 0.2}}, set()),
        ({"regime": {"divergence": "jsd"}}, {"distillation": {"jsd_weight": 0.2}}, {"adapter"}),
        ({}, {"regime": {"rejection": False}}, {"contexts"}),
        ({"injection": "global"}, {"selection": {"selector": "lexical"}}, set()),
        ({"evaluation": {"with_experience": False}}, {"selection": {"max_items": 2}}, {"contexts"}),
        ({}, {"rollout": {"group_size": 9}}, {"trajectories", "contexts"}),
        ({}, {"rollout": {"frontier": 0.5}}, {"trajectories"}),
        (REFRESHED, {"rollout": {"frontier": 0.5}}, {"trajectories"}),
        ({"injection": "none"}, {"rollout": {"frontier": 0.5}}, {"trajectories"}),
        ({}, {"rollout": {"frontier": 0.0}}, set()),
        ({"granularity": "instance"}, {"extraction": {"min_support": 2, "confidence": 0.9}}, set()),
        ({"granularity": "instance"}, {"extraction": {"cap": 2}}, {"experience"}),
        ({}, {"models": {"judge": OPENAI, "selector": OPENAI, "extractor": OPENAI}}, set()),
        ({}, {"models": {"policy": {"quantize": "nf4"}}}, {"policy"}),
        ({}, {"models": {"policy": {"dtype": "bfloat16"}}}, {"policy"}),
        (LLM, {"selection": {"temperature": 0.5}}, {"contexts", "scores"}),
        (LLM, {"models": {"selector": OPENAI | {"extra": {"top_k": 1}}}}, {"contexts", "scores"}),
        (LLM, {"models": {"selector": OPENAI | {"timeout_seconds": 9.0}}}, set()),
        (LLM, {"models": {"extractor": OPENAI | {"context_tokens": 1000}}}, {"experience"}),
        (LLM, {"models": {"judge": OPENAI | {"model": "n"}}}, {"trajectories", "contexts", "scores"}),
        (LLM, {"verification": {"kind": "judge", "verdict": "json"}}, {"trajectories", "contexts", "scores"}),
    ],
    ids=lambda value: "+".join(sorted(value)) or "none",
)
def test_a_key_decides_the_steps_that_read_it(before: dict[str, Any], change: dict[str, Any], steps: set[str]) -> None:
    assert touched(experiment(before), experiment(before, change)) == steps


@pytest.mark.parametrize(
    "change", [{"extra": {"seed": 1}}, {"context_tokens": 1000}, {"model": "n"}], ids=lambda c: next(iter(c))
)
def test_whoever_sums_up_pages_decides_what_is_read_there(files: dict[str, Any], change: dict[str, Any]) -> None:
    web = {"environment": {"kind": "tools", "tools": ["visit"]}, "tasks": files, "models": {"extractor": OPENAI}}
    other = {"models": {"extractor": OPENAI | change}}
    assert touched(experiment(web), experiment(web, other)) == {"trajectories", "contexts", "scores"}
    plain = {"environment": {"kind": "tools", "tools": ["visit"], "summarize": False}}
    assert touched(experiment(web, plain), experiment(web, plain, other)) == set()


def test_a_key_that_came_later_is_in_no_digest_where_it_says_what_was_always_done() -> None:
    spec = base.SPECS["trajectories"]
    assert "frontier" not in decisive(spec, experiment())["rollout"]
    assert decisive(spec, experiment({"rollout": {"frontier": 0.5}}))["rollout"]["frontier"] == 0.5


def test_a_prompt_decides_the_steps_that_use_it(monkeypatch: pytest.MonkeyPatch) -> None:
    old = {step: base.settings_digest(step, experiment(LLM)) for step in base.STEP_ORDER}
    real = prompts._read
    reworded = prompts.Prompt("experience/select", "Choose {{most}}.")
    monkeypatch.setattr(prompts, "_read", lambda name: reworded if name == "experience/select" else real(name))
    assert {step for step in old if base.settings_digest(step, experiment(LLM)) != old[step]} == {"contexts", "scores"}
    assert "prompts.selection" not in decisive(base.SPECS["contexts"], experiment())


@pytest.mark.parametrize("name", base.STEP_ORDER)
def test_a_body_sees_the_keys_of_its_digest_and_no_others(name: str) -> None:
    whole = experiment(LLM)
    shown, named = visible(base.sources(name), whole)
    slices = [slice_of(spec, whole) for spec in base.sources(name)]
    for one in slices:
        for key in one.keys:
            value: Any = shown
            for part in key.split("."):
                value = getattr(value, part)
    assert shown.runtime == whole.runtime
    assert named == {prompt for one in slices for found in one.prompts.values() for prompt in found}
    for hidden in ("schedule", "tracking", "description"):
        with pytest.raises(SliceError, match=hidden):
            getattr(shown, hidden)


def run_body(monkeypatch: pytest.MonkeyPatch, store: Store, whole: Experiment, body: Any) -> None:
    """Run ``body`` as that of the first step that rolls out."""
    base.run_step("policy", whole, 1, store)
    monkeypatch.setattr(base, "_body", lambda name: body)
    base.run_step("trajectories", whole, 1, store)


READS = {
    "a key of another step": lambda context: context.experiment.gate.confidence,
    "a key below a section that is not read as a whole": lambda context: context.experiment.tasks.held_out,
    "a model that no part asks": lambda context: context.roles.model("extractor"),
    "what a model is": lambda context: context.roles.identity("selector"),
    "a key, where the fault is caught": lambda context: _caught(lambda: context.experiment.gate),
    "a model, where the fault is caught": lambda context: _caught(lambda: context.roles.later("extractor")()),
    "a prompt": lambda context: prompts.load("experience/select"),
    "a prompt, in the event loop": lambda context: context.roles.run(_load()),
    "a prompt, in a thread": lambda context: context.roles.run(asyncio.to_thread(prompts.load, "experience/select")),
}


def _caught(read: Any) -> None:
    """As an episode that fails: that is data, but never for this reason."""
    with suppress(Exception):
        read()


async def _load() -> prompts.Prompt:
    return prompts.load("experience/select")


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_what_is_not_in_the_digest_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read: Any) -> None:
    store = Store(tmp_path)
    with pytest.raises(SliceError) as caught:
        run_body(monkeypatch, store, experiment(LLM), read)
    assert caught.value.remedy
    assert [artifact.kind for artifact in store.artifacts()] == ["policy"]


def test_runtime_keys_of_a_model_in_the_slice_can_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def body(context: StepContext) -> None:
        judge = context.experiment.models.judge
        assert judge is not None
        seen.append((judge.timeout_seconds, context.experiment.runtime.threads, context.experiment.experiment))

    run_body(monkeypatch, Store(tmp_path), experiment(LLM), body)
    assert seen == [(180.0, 2, "x")]


class Forgetful(SelectionSettings):
    """Asks a model with a prompt; its row names neither."""

    selector: Literal["forgetful"] = "forgetful"


class ForgetfulSelector:
    def __init__(self, roles: Roles) -> None:
        self.roles = roles

    async def select(self, question: str, steps: Any, pool: Pool) -> Selection:
        text = prompts.load("experience/select").text
        await self.roles.model("selector").generate(Request((Message("user", text),), Sampling()))
        return Selection(pool.ids, "")


MAKE = {"settings": Forgetful, "make": lambda settings, roles, seed: ForgetfulSelector(roles)}
NO_MODEL = SelectorPart(**MAKE, prompts=lambda settings, e: ("experience/select",))
NO_PROMPT = SelectorPart(**MAKE, roles=lambda settings: ("selector",))


@pytest.mark.parametrize(("row", "wrong"), [("NO_MODEL", r"Models\.selector"), ("NO_PROMPT", "prompt experience/select")])
def test_a_selector_whose_author_forgot_what_it_uses_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, row: str, wrong: str
) -> None:
    """Before, it was served stale results: the digest held neither its model nor its prompt."""
    monkeypatch.setitem(sys.modules, "forgetful_part", sys.modules[__name__])
    monkeypatch.setitem(CHOICES["selector"].rows, "forgetful", f"forgetful_part:{row}")  # type: ignore[arg-type]
    whole = experiment({"selection": {"selector": "forgetful"}, "models": {"selector": OPENAI}})
    pool = Pool((ExperienceItem("p0001", "Search first: when nothing is known, search.", "principle"),))
    trajectory: Any = type("T", (), {"steps": (), "question": "?", "system": "", "id": "t", "history": lambda self, n: ()})()

    def body(context: StepContext) -> None:
        source = experience_source(context.experiment, pool, context.roles)
        assert source is not None
        context.roles.run(source.prepare(trajectory))

    monkeypatch.setitem(base.SPECS, "trajectories", _reading_selection())
    with pytest.raises(SliceError, match=wrong):
        run_body(monkeypatch, Store(tmp_path), whole, body)


def _reading_selection() -> Any:
    from dataclasses import replace

    spec = base.SPECS["trajectories"]
    return replace(spec, config=(*spec.config, "injection", "selection"))
