"""Whether the gate can see what it should, before it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from quick_lineages import experiment
from typer.testing import CliRunner

from evolve_dag import cli, doctor
from evolve_dag.config import registry
from evolve_dag.config.schema import GateSettings
from evolve_dag.evaluation.gate import GateDecision, decide, gate_to_json
from evolve_dag.lineage import power
from evolve_dag.lineage.planning import plan
from evolve_dag.records import Score
from evolve_dag.store.artifacts import Store

CONFIGS = Path(__file__).parents[2] / "configs"


def with_tasks(count: int, **changes: object):
    worlds = {"train": {"count": 10, "world": 12}, "development": {"count": count, "world": 22}}
    return experiment(tasks=worlds | {"held_out": {"count": 6, "world": 32}}, **changes)


def test_the_number_that_is_asked_for_is_enough() -> None:
    found = power.power(with_tasks(64))
    assert found is not None
    assert found.measured is None
    assert found.smallest == pytest.approx(2.801585 * 0.3 / 8)
    assert found.needed == 283
    assert power.warning(with_tasks(282)).endswith("5 points need 283: raise tasks.development.count, or evaluation.rollouts")
    assert power.warning(with_tasks(283)) == ""


def test_rollouts_count_too() -> None:
    assert power.warning(with_tasks(142, evaluation={"rollouts": 2})) == ""
    assert power.warning(with_tasks(142))


def decided(store: Store, iteration: int, content: str) -> None:
    digest = Store.digest_of("promotion", "1", {"iteration": iteration}, {})
    with store.build("promotion", digest, code_version="1", config={"iteration": iteration}, inputs={}) as build:
        (build.path / "decision.json").write_text(content)
    store.set_ref("quick", iteration, "promotion", digest)


def measured(sd: float, tasks: int = 128) -> str:
    """A decision whose tasks differed by ``sd``; two invented ones are counted in what it wrote."""
    spread = ((sd**2 * tasks + 2) / (tasks + 2)) ** 0.5
    evidence = {"judged_tasks": tasks, "success_difference": 0.0, "success_sd": spread}
    return json.dumps(gate_to_json(GateDecision("keep", ("x",), evidence)))


def test_what_the_last_gate_measured_takes_the_place_of_what_is_typical(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    for iteration, sd in ((1, 0.1), (2, 0.5)):
        decided(store, iteration, measured(sd))
    assert "SD of a task's difference 0.50, as measured in iteration 2" in power.warning(with_tasks(300), store)
    decided(store, 3, "{}")
    assert power.warning(with_tasks(300), store) == "", "a damaged decision is told elsewhere"


@pytest.mark.parametrize("rewards", [[1.0, 0.0] * 3, [None] * 6], ids=["untrained", "not judged"])
def test_a_night_that_compared_nothing_measured_nothing(rewards: list[float | None], tmp_path: Path) -> None:
    sides = [
        [Score(f"t{i}", 0, side, reward, False, "answered", 3, 10, None, {}) for i, reward in enumerate(given)]
        for side, given in (("candidate", rewards), ("best", [1.0, 0.0] * 3))
    ]
    nothing = json.dumps(gate_to_json(decide(*sides, GateSettings(), 0)))
    store = Store(tmp_path / "store")
    decided(store, 1, nothing)
    assert "SD of a task's difference 0.30, as is typical" in power.warning(with_tasks(6), store)
    decided(store, 2, measured(0.5))
    decided(store, 3, nothing)
    assert "SD of a task's difference 0.50, as measured in iteration 2" in power.warning(with_tasks(6), store)


@pytest.mark.parametrize(("tasks", "shown"), [(2, "no loss at all"), (3, "no loss at all"), (4, "a loss of 98 points")])
def test_a_loss_that_cannot_be_is_not_told(tasks: int, shown: str, tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    decided(store, 1, measured(0.7))
    assert f": they show {shown} in one night with 80% power" in power.warning(with_tasks(tasks), store)


def test_a_file_that_is_missing_is_told_elsewhere(tmp_path: Path) -> None:
    split = {"path": str(tmp_path / "none.jsonl")}
    e = experiment(
        environment={"kind": "corpus", "pages": str(tmp_path / "none.jsonl")},
        tasks={"train": split, "development": split, "held_out": split},
    )
    assert power.power(e) is None
    assert power.warning(e) == ""


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rollout": {"temperature": 0.0}}, True),
        ({"rollout": {"temperature": 0.0}, "extraction": {"extractor": "llm"}, "granularity": "instance"}, True),
        ({"rollout": {"temperature": 0.3}}, False),
        ({"rollout": {"temperature": 0.0}, "granularity": "instance"}, False),
        ({"rollout": {"temperature": 0.0}, "start_pool": "pool.json"}, False),
    ],
)
def test_groups_that_argmax_makes_alike_are_told(changes: dict[str, object], told: bool) -> None:
    assert power.few_rollouts(experiment(**changes)).startswith("rollout.temperature is 0") is told


def test_plan_and_doctor_say_it_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Store(tmp_path / "store")
    [note] = plan(with_tasks(16), store).notes
    assert note.startswith("16 development tasks are few for the gate")
    assert plan(with_tasks(300), store).notes == ()
    [note] = plan(with_tasks(300, rollout={"group_size": 1}, extraction={"extractor": "llm"}), store).notes
    assert note.startswith("rollout.group_size is 1: a group of one rollout never holds both")
    configs = tmp_path / "configs"
    configs.mkdir()
    (configs / "small.yaml").write_text(
        "tasks: {development: {count: 16, world: 21}, train: {count: 4, world: 11}, held_out: {count: 4, world: 31}}\n"
        "rollout: {group_size: 1}\nextraction: {extractor: llm}\nselection: {selector: lexical}\n"
    )
    monkeypatch.setenv(registry.CONFIGS_VARIABLE, str(configs))
    few, alone = doctor._gates(tmp_path / "store", registry.scan(configs)[0].values())
    assert (few.state, few.subject) == ("note", "gate")
    assert few.text.startswith("small: 16 development tasks are few")
    assert (alone.state, alone.subject) == ("note", "extraction")
    result = CliRunner().invoke(cli.app, ["plan", str(configs / "small.yaml"), "--store", str(tmp_path / "store")])
    assert "16 development tasks are few for the gate" in " ".join(result.output.split())


def test_plan_says_it_also_where_the_policy_has_to_be_warmed_up_first(tmp_path: Path) -> None:
    (tmp_path / "coin.yaml").write_text(
        f"extends: {CONFIGS / 'textworld_coin.yaml'}\nmodels: {{policy: {{path: not-there-yet}}}}\n"
    )
    result = CliRunner().invoke(cli.app, ["plan", str(tmp_path / "coin.yaml"), "--store", str(tmp_path / "store")])
    assert "no warmed-up model yet" in str(result.exception)
    assert "64 development tasks are few for the gate" in " ".join(result.output.split())
