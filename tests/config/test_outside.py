"""Parts that others wrote: they come in by name or by file, are checked like ours, and cannot take the run with them."""

from __future__ import annotations

import asyncio
import math
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from outside_parts import forget, install

from evolve_dag import doctor
from evolve_dag.config import registry
from evolve_dag.config.fence import Fence
from evolve_dag.config.loading import load_experiment, read_experiment
from evolve_dag.config.outside import group
from evolve_dag.config.parts import CHOICES, altered, part, part_of, parts
from evolve_dag.config.reference import reference
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import ConfigError, ModelError, PartError
from evolve_dag.experience.pool import Pool
from evolve_dag.inference.roles import Roles
from evolve_dag.inference.scripted import ScriptedModel
from evolve_dag.protocols import Request, Sampling
from evolve_dag.records import ExperienceItem, Message, Task
from evolve_dag.steps import base

NEWEST = '''
from evolve_dag.config.parts import SelectionSettings
from evolve_dag.experience.selection.base import Selection, SelectorPart


class Newest(SelectionSettings):
    """The items that came last."""

    skip: int = 0
    """How many to pass over."""


class NewestSelector:
    def __init__(self, settings):
        self.settings = settings

    async def select(self, question, steps, pool):
        ids = pool.ids[::-1][self.settings.skip :][: self.settings.max_items]
        return Selection(ids, "newest")


NEWEST = SelectorPart(settings=Newest, make=lambda settings, roles, seed: NewestSelector(settings))
'''
POOL = Pool(tuple(ExperienceItem(f"p000{n}", f"Name {n}: when asked, search.", "principle") for n in (1, 2, 3)))


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)


def written(folder: Path, text: str, code: str = NEWEST) -> Path:
    (folder / "mine.py").write_text(code)
    (folder / "x.yaml").write_text(text)
    return folder / "x.yaml"


def told(folder: Path, text: str, code: str = NEWEST) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(written(folder, text, code))
    return str(caught.value)


def select(experiment: Experiment, pool: Pool = POOL) -> tuple[str, ...]:
    with Roles(experiment) as roles:
        selector = part_of("selector", experiment.selection).make(experiment.selection, roles, 0)
        return tuple(roles.run(selector.select("?", (), pool)).ids)


def test_a_file_beside_the_experiment_brings_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, "selection: {selector: 'mine:NEWEST', max_items: 2, skip: 1}")
    monkeypatch.chdir("/")
    experiment = load_experiment(path)
    assert select(experiment) == ("p0002", "p0001")
    page = reference(experiments=[experiment])
    assert "## `selection.selector: mine:NEWEST`\n\nThe items that came last." in page
    assert "`selection.skip` | whole number | `0` | How many to pass over." in page
    assert Experiment.model_validate_json(experiment.model_dump_json()) == experiment
    # the file that states it decides where it lies, also for one that extends it, and for an arm
    (tmp_path / "other").mkdir()
    (tmp_path / "other/y.yaml").write_text("extends: ../x.yaml\nselection: {skip: 0}")
    assert select(load_experiment(tmp_path / "other/y.yaml")) == ("p0003", "p0002")
    over = {"selection": {"selector": "mine:NEWEST"}}
    assert read_experiment(written(tmp_path, "seed: 1"), [over], tmp_path / "study.yaml")[1] == []
    assert over == {"selection": {"selector": "mine:NEWEST"}}


def test_an_installed_distribution_brings_a_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {"evolve_dag.selectors": {"newest": "evolve_newest:NEWEST"}}
    install(tmp_path / "site", monkeypatch, "evolve-newest", groups, NEWEST)
    experiment = load_experiment(written(tmp_path, "selection: {selector: newest}"))
    assert select(experiment) == ("p0003", "p0002", "p0001")
    assert any(name == "newest" for _, name, _ in parts())
    assert "selection.skip" not in reference()
    assert "`selection.skip` | whole number | `0` | How many to pass over." in reference(outside=True)
    assert "should be 'state', 'lexical', 'embedding', 'llm' or 'newest'" in told(tmp_path, "selection: {selector: oldest}")


def test_every_choice_has_a_group() -> None:
    assert {group(choice) for choice in CHOICES} == {
        f"evolve_dag.{name}"
        for name in ("environments", "verifiers", "selectors", "extractors", "divergences", "backends", "suites", "launchers")
    }


@pytest.mark.parametrize(
    ("text", "code", "wrong"),
    [
        ("selection: {selector: 'mine:NEWEST', skp: 1}", NEWEST, "selection.skp: unknown key (did you mean 'skip'?)"),
        ("selection: {selector: 'mine:NEWEST', skip: one}", NEWEST, "selection.skip: should be a valid integer, not 'one'"),
        ("selection: {selector: 'mine:OLDEST'}", NEWEST, "mine.py: has no OLDEST"),
        ("selection: {selector: 'theirs:NEWEST'}", NEWEST, "theirs.py: no such file"),
        ("selection: {selector: 'mine:X'}", "import nowhere_to_be_found", "ModuleNotFoundError: No module named"),
        ("selection: {selector: 'mine:X'}", "raise SystemExit(3)", "mine.py: SystemExit: 3"),
        ("selection: {selector: 'mine:X'}", "X = (", "mine.py: SyntaxError"),
        ("selection: {selector: 'mine:X'}", "class X: ...", "is the class X, not a row: a SelectorPart"),
        ("verification: {kind: 'mine:NEWEST'}", NEWEST, "is a SelectorPart, not a row: a VerifierPart"),
        (
            "selection: {selector: 'mine:X'}",
            "from evolve_dag.experience.selection.base import SelectorPart\nX = SelectorPart(settings=dict, make=print)",
            "its settings are no SelectionSettings",
        ),
        (
            "selection: {selector: 'mine:X'}",
            f"{NEWEST}X = SelectorPart(settings=Newest, make=print, mistakes=lambda s, e: 1 / 0)",
            "selection.selector: selector mine:X (file): ZeroDivisionError: division by zero",
        ),
        (
            "selection: {selector: 'mine:X'}",
            f"{NEWEST}def wrong(s, e):\n    yield 'one'\nX = SelectorPart(settings=Newest, make=print, mistakes=wrong)",
            "selection.selector: selector mine:X (file): ValueError: too many values to unpack",
        ),
        (
            "selection: {selector: 'mine:X'}",
            f"{NEWEST}X = SelectorPart(settings=Newest, make=print, prompts=lambda s, e: None)",
            "selection.selector: selector mine:X (file): TypeError: 'NoneType' object is not iterable",
        ),
        (
            "selection: {selector: 'mine:NEWEST'}",
            NEWEST.replace(
                "class NewestSelector", "    def model_post_init(self, _):\n        1 / 0\n\n\nclass NewestSelector"
            ),
            "its settings: ZeroDivisionError: division by zero",
        ),
        (
            "selection: {selector: 'mine:X'}",
            f"{NEWEST}X = SelectorPart(settings=Newest, make=print, seconds=0)",
            "`seconds` must be a positive number, not 0",
        ),
        ("selection: {selector: './mine.py:NEWEST'}", NEWEST, "should be 'state', 'lexical', 'embedding' or 'llm'"),
        (
            "selection: {selector: 'mine:X'}",
            f"{NEWEST}X = SelectorPart(settings=Newest, make=print, roles=lambda s: ('oracle',))",
            "its row asks models.oracle, which is no role",
        ),
        (
            "regime: {divergence: 'mine:X'}",
            "from evolve_dag.distillation.divergences import Divergence\nX = Divergence(abs, keys=('order',))",
            "regime.divergence: divergence mine:X (file): there is no key distillation.order",
        ),
        ("regime: {divergence: 'mine:X'}", "X = abs", "is a builtin_function_or_method, not a row: a Divergence"),
        ("tasks: {train: {suite: 'mine:X'}}", "X = 1", "tasks.train.suite: suite mine:X (file): is a int, not a row: a Suite"),
        ("models: {judge: {backend: 'mine:X'}}", "X = 1", "models.judge.backend: backend mine:X (file): is a int"),
    ],
)
def test_a_part_that_is_none_is_named_with_file_and_key(tmp_path: Path, text: str, code: str, wrong: str) -> None:
    message = told(tmp_path, text, code)
    assert "1 mistake\n" in message
    assert "x.yaml: " in message
    assert wrong in message


def test_a_file_that_was_mended_is_tried_again_and_one_that_was_loaded_stands(tmp_path: Path) -> None:
    text = "selection: {selector: 'mine:NEWEST'}"
    assert "NameError" in told(tmp_path, text, "nothing")
    experiment = load_experiment(written(tmp_path, text))
    digest = base.settings_digest("contexts", experiment)
    written(tmp_path, text, NEWEST.replace("[::-1]", ""))  # edited while the process lives: what was hashed is what runs
    assert select(load_experiment(tmp_path / "x.yaml")) == ("p0003", "p0002", "p0001")
    assert base.settings_digest("contexts", experiment) == digest


def test_what_a_part_is_decides_the_steps_that_use_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def digests(folder: str, code: str) -> dict[str, str]:
        forget(monkeypatch)
        (tmp_path / folder).mkdir(exist_ok=True)
        experiment = load_experiment(written(tmp_path / folder, "selection: {selector: 'mine:NEWEST'}", code))
        return {step: base.settings_digest(step, experiment) for step in base.STEP_ORDER}

    first = digests("a", NEWEST)
    assert digests("b", NEWEST) == first  # wherever it lies
    other = digests("a", NEWEST + "# another\n")
    assert {step for step in first if first[step] != other[step]} == {"contexts", "scores"}
    stated = NEWEST.replace("make=", "data=lambda settings: 'words-7', make=")
    assert digests("a", stated) != digests("a", stated.replace("words-7", "words-8"))


def test_version_and_code_of_a_distribution_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    groups = {"evolve_dag.divergences": {"mine": "evolve_mine:ROW"}}
    code = "from evolve_dag.distillation.divergences import FORWARD_KL as ROW\n"
    seen = []
    for number, (version, text) in enumerate([("1.0", code), ("1.1", code), ("1.1", code + "# edited in place\n")]):
        with monkeypatch.context() as patch:
            module = install(tmp_path / str(number), patch, "evolve-mine", groups, text, version)
            patch.delitem(sys.modules, "evolve_mine", raising=False)
            experiment = load_experiment(written(tmp_path, "regime: {divergence: mine}"))
            seen.append(base.settings("adapter", experiment)["regime.divergence"])
            assert altered() == []
            module.write_text(text + "# while it runs\n")
            assert altered() == [seen[-1]]
    assert [one.split(",")[0] for one in seen] == ["mine (evolve-mine 1.0", "mine (evolve-mine 1.1", "mine (evolve-mine 1.1"]
    assert len(set(seen)) == 3


def test_the_doctor_lists_what_was_found_and_why_what_was_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    selectors = {"good": "evolve_good:NEWEST", "lexical": "evolve_good:NEWEST", "twice": "evolve_good:NEWEST"}
    install(tmp_path / "1", monkeypatch, "evolve-good", {"evolve_dag.selectors": selectors}, NEWEST)
    broken = {"evolve_dag.verifiers": {"bad": "evolve_bad:X"}, "evolve_dag.selectors": {"twice": "evolve_bad:X"}}
    install(tmp_path / "2", monkeypatch, "evolve-bad", broken, "import nowhere_to_be_found")
    monkeypatch.setenv(registry.CONFIGS_VARIABLE, str(tmp_path))
    written(tmp_path, "selection: {selector: 'mine:NEWEST'}")
    found = {(finding.state, finding.text) for finding in doctor._parts(registry.scan(tmp_path)[0])}
    assert ("ok", "evolve-good 0.1, `selection.selector: good`") in found
    assert any(
        state == "note" and "`selection.selector: lexical`: not used, the name is one of" in text for state, text in found
    )
    assert any("evolve-bad 0.1 and evolve-good 0.1 both give this name" in text for _, text in found)
    assert any("bad (evolve-bad 0.1): ModuleNotFoundError: No module named 'nowhere_to_be_found'" in text for _, text in found)
    assert any(text.startswith("selector mine:NEWEST (file, sha256:") and text.endswith("by x.yaml") for _, text in found)
    assert part("selector", "lexical").settings.__module__.startswith("evolve_dag.")
    assert "both give this name" in told(tmp_path, "selection: {selector: twice}")


# -- limits


def forever() -> None:
    while True:
        time.sleep(0.01)


async def waiting() -> None:
    await asyncio.sleep(1e6)


def test_a_call_that_never_returns_is_given_up_and_holds_up_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evolve_dag.config.fence.GRACE", 0.1)
    fence = Fence("selector slow", 0.2)

    async def both() -> tuple[Any, ...]:
        return tuple(
            await asyncio.gather(fence.call(forever), fence.call(waiting), fence.call(lambda: 5), return_exceptions=True)
        )

    *late, good = asyncio.run(both())
    assert [str(error).partition("\n")[0] for error in late] == ["selector slow: no answer within 0.2 s"] * 2
    assert good == 5
    with pytest.raises(PartError, match=r"no answer within 0.2 s"):
        fence.run(forever)


def test_an_error_of_ours_stays_what_it_is_and_any_other_names_the_part() -> None:
    fence = Fence("selector odd", 5)

    def ours() -> None:
        raise ModelError("the endpoint is down")

    with pytest.raises(ModelError):
        fence.run(ours)
    for wrong in (KeyboardInterrupt, SystemExit, asyncio.CancelledError, TimeoutError, MemoryError):

        def theirs(wrong: type[BaseException] = wrong) -> None:
            raise wrong

        with pytest.raises(PartError, match=f"selector odd: {wrong.__name__}"):
            fence.run(theirs)


VERIFIER = '''
from evolve_dag.config.parts import VerificationSettings
from evolve_dag.verification.base import VerifierPart

class Odd:
    """Gives what it is told."""
    async def verify(self, task, answer):
        return eval(answer, {"sys": __import__("sys")})

X = VerifierPart(settings=VerificationSettings, make=lambda settings, roles: Odd())
'''


@pytest.mark.parametrize("reward", ["float('nan')", "float('inf')", "-0.1", "1.5", "'1'", "[1]", "1 / 0", "sys.exit()"])
def test_a_reward_that_is_none_is_an_error_of_its_episode(tmp_path: Path, reward: str) -> None:
    experiment = load_experiment(written(tmp_path, "verification: {kind: 'mine:X'}", VERIFIER))
    verifier = part_of("verifier", experiment.verification).make(experiment.verification, None)
    with pytest.raises(PartError, match=r"verifier mine:X \(file\)"):
        asyncio.run(verifier.verify(Task("t", "?", "!"), reward))
    for good in ("None", "0.0", "1", "0.25", "True"):
        value = asyncio.run(verifier.verify(Task("t", "?", "!"), good))
        assert value == eval(good)
        assert value is None or (type(value) is float and math.isfinite(value))


@pytest.mark.parametrize("chosen", ["('p0009',)", "('p0001', 'p0001')", "pool.ids * 2", "[pool]", "None", "pool.ids + (7,)"])
def test_a_choice_that_is_none_is_an_error_of_its_episode(tmp_path: Path, chosen: str) -> None:
    code = NEWEST.replace("Selection(ids,", f"Selection({chosen},")
    experiment = load_experiment(written(tmp_path, "selection: {selector: 'mine:NEWEST'}", code))
    with pytest.raises(PartError, match="selector mine:NEWEST"):
        select(experiment)


def test_more_items_than_the_experiment_allows_are_refused(tmp_path: Path) -> None:
    code = NEWEST.replace("[: self.settings.max_items]", "")
    experiment = load_experiment(written(tmp_path, "selection: {selector: 'mine:NEWEST', max_items: 2}", code))
    with pytest.raises(PartError, match=r"chose 3 items, and selection.max_items is 2"):
        select(experiment)


def test_a_selector_may_ask_a_model_from_its_own_thread(tmp_path: Path) -> None:
    code = NEWEST.replace('"newest"', "(await self.roles.model('selector').generate(self.request)).text")
    code = code.replace("def __init__(self, settings):", "def __init__(self, settings, roles):\n        self.roles = roles")
    code = code.replace("NewestSelector(settings)", "NewestSelector(settings, roles)")
    experiment = load_experiment(written(tmp_path, "selection: {selector: 'mine:NEWEST'}", code))
    with Roles(experiment) as roles, roles.policy(ScriptedModel(["because"]), None):
        selector = part_of("selector", experiment.selection).make(experiment.selection, roles, 0)
        selector.selector.request = Request((Message("user", "why?"),), Sampling())
        assert roles.run(selector.select("?", (), POOL)).rationale == "because"


@pytest.mark.parametrize(("loss", "wrong"), [("p.sum()", r"one loss a token, \(2,\)"), ("1 / 0", "ZeroDivisionError")])
def test_a_divergence_that_fails_is_named(tmp_path: Path, loss: str, wrong: str) -> None:
    import torch

    code = f"from evolve_dag.distillation.divergences import Divergence\nX = Divergence(lambda p, q: {loss})"
    experiment = load_experiment(written(tmp_path, "regime: {divergence: 'mine:X'}", code))
    with pytest.raises(PartError, match=wrong):
        part("divergence", experiment.regime.divergence).loss(torch.zeros(2, 3), torch.zeros(2, 3))


def test_a_row_that_a_suite_cannot_read_is_a_mistake_of_that_row(tmp_path: Path) -> None:
    from evolve_dag.errors import DataError
    from evolve_dag.tasks.suites import load_tasks_of

    code = """
from evolve_dag.tasks.formats import Suite
X = Suite(lambda row: {"question": row["q"], "answer": row["a"]} if "q" in row else None)
"""
    (tmp_path / "t.jsonl").write_text('{"q": "what?", "a": "this"}\n{"q": "no answer"}\n{}\n')
    tasks = "{path: t.jsonl, suite: 'mine:X'}"
    text = f"environment: {{kind: tools, tools: [visit]}}\ntasks: {{train: {tasks}, development: {tasks}, held_out: {tasks}}}"
    experiment = load_experiment(written(tmp_path, text, code))
    with pytest.raises(DataError) as caught:
        load_tasks_of(experiment, "train")
    assert "KeyError: 'a'" in str(caught.value)
    assert "a task is a mapping, not a NoneType" in str(caught.value)


OWN_TASKS = """
from evolve_dag.config.parts import EnvironmentSettings
from evolve_dag.environments.base import EnvironmentPart

X = EnvironmentPart(settings=EnvironmentSettings, make=lambda settings, place: None, tasks=lambda settings, split, name: ())
"""


def test_a_stream_of_an_environment_without_other_tasks_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN_TASKS)
    experiment = tmp_path / "experiment.yaml"
    experiment.write_text("environment: {kind: 'own:X'}\ntasks: {train: {count: 4, world: 1, stream: true}}\n")
    told = r"experiment\.yaml(.|\n)*tasks\.train\.stream: (.|\n)*own\.py:X makes (.|\n)*`fresh`"
    with pytest.raises(ConfigError, match=told):
        load_experiment(experiment)
