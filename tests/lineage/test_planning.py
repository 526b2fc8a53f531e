"""``evolve plan``: what it says is what a run then does."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quick_lineages import WORLDS, everything_below, experiment, fake_steps, run
from typer.testing import CliRunner

from evolve_dag import cli
from evolve_dag.config import registry
from evolve_dag.errors import ConfigError, DataError, OrderError, StoreError
from evolve_dag.lineage import planning
from evolve_dag.lineage.planning import Plan, plan
from evolve_dag.steps import base
from evolve_dag.steps.base import STEP_ORDER
from evolve_dag.store.artifacts import FileFact, Store
from evolve_dag.store.mirror import Mirror, MirroredStore


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    fake_steps(monkeypatch)
    return Store(tmp_path / "store")


def told(planned: Plan, action: str) -> set[tuple[int, str]]:
    return {(one.iteration, one.step) for one in planned.steps if one.action == action}


def check(planned: Plan, made: set[tuple[int, str]]) -> None:
    """Of what was told, nothing differs; what followed is free."""
    assert told(planned, "stop") == set()
    assert made - told(planned, "follows") == told(planned, "recompute")


def reasons(planned: Plan, iteration: int, step: str) -> list[tuple[str, str, Any, Any]]:
    [one] = [one for one in planned.steps if (one.iteration, one.step) == (iteration, step)]
    return [(reason.why, reason.key, reason.old, reason.new) for reason in one.reasons]


def test_before_the_first_run_nothing_is_there_and_nothing_is_written(store: Store) -> None:
    planned = plan(experiment(), store)
    assert told(planned, "recompute") == {(1, step) for step in STEP_ORDER}
    assert told(planned, "follows") == {(k, step) for k in (2, 3) for step in STEP_ORDER}
    assert {reason[0] for reason in reasons(planned, 1, "adapter")} == {"never_made"}
    assert planned.steps[-1].reasons[0].text == "follows promotion[quick|01]"
    assert not store.root.exists()
    check(planned, run(experiment(), store))


def test_more_iterations_than_there_are_tasks_for_are_no_plan(store: Store) -> None:
    endless = experiment(tasks=WORLDS | {"train": WORLDS["train"] | {"stream": True}})
    assert plan(endless, store, 89).iterations == 89
    with pytest.raises(
        ConfigError, match=r"(?s)with 90 iterations.*tasks\.train\.stream: the pocket world has fresh worlds for 89"
    ):
        plan(endless, store, 90)


def test_no_step_is_made_of_an_iteration_that_the_file_has_no_tasks_for(store: Store) -> None:
    """Whoever asks: the web interface, a backfill, a run that goes on until K, a worker."""
    endless = experiment(iterations=89, tasks=WORLDS | {"train": WORLDS["train"] | {"stream": True}})
    with pytest.raises(ConfigError, match="with 90 iterations, where its file says 89"):
        base.run_step("trajectories", endless, 90, store)
    with pytest.raises(OrderError):
        base.run_step("policy", endless, 90, store)


def test_after_a_run_there_is_nothing_to_do(store: Store) -> None:
    run(experiment(), store)
    before = everything_below(store.root)
    planned = plan(experiment(), store)
    assert planned.up_to_date
    assert "nothing to recompute: iterations 1 to 3 are up to date" in planning.headline(planned)
    assert everything_below(store.root) == before
    assert run(experiment(), store) == set()


@pytest.mark.parametrize(
    ("changes", "step", "expected"),
    [
        ({"selection": {"max_items": 2}}, "contexts", ("config", "selection.max_items", 3, 2)),
        ({"gate": {"max_turn_ratio": 3.0}}, "promotion", ("config", "gate.max_turn_ratio", 2.0, 3.0)),
        ({"seed": 7}, "trajectories", ("config", "seed", 0, 7)),
        ({"tasks": WORLDS | {"held_out": {"count": 7, "world": 32}}}, "scores", ("config", "tasks.held_out.count", 6, 7)),
        ({"extraction": {"cap": 5}}, "experience", ("config", "extraction.cap", 12, 5)),
    ],
    ids=["selector", "gate", "seed", "held-out", "extraction"],
)
def test_a_key_is_named_with_its_old_and_new_value(
    store: Store, changes: dict[str, Any], step: str, expected: tuple[str, str, Any, Any]
) -> None:
    run(experiment(), store)
    changed = experiment(**changes)
    planned = plan(changed, store)
    assert expected in reasons(planned, 1, step)
    own = [reason for reason in reasons(planned, 1, step) if reason[0] == "config"]
    assert own == [expected], "no other key is blamed"
    later = STEP_ORDER[STEP_ORDER.index(step) + 1 :]
    for name in later:
        if (1, name) in told(planned, "recompute"):
            assert {reason[0] for reason in reasons(planned, 1, name)} <= {"config", "upstream"}
    check(planned, run(changed, store))
    assert plan(changed, store).up_to_date


def test_an_upstream_digest_is_named(store: Store) -> None:
    run(experiment(), store)
    changed = experiment(selection={"max_items": 2})
    planned = plan(changed, store)
    old = store.ref("quick", 1, "contexts")
    assert old is not None
    new = base.resolve("contexts", changed, 1, store).digest
    assert ("upstream", "contexts", old.digest, new) in reasons(planned, 1, "adapter")
    assert {one.if_same for one in planned.of("follows")} == {None}, "another candidate: nothing can be said"
    assert "contexts changed" in str([one.reasons for one in planned.steps if one.step == "adapter"])


def test_runtime_keys_and_words_change_nothing(store: Store) -> None:
    run(experiment(), store)
    assert plan(experiment(runtime={"threads": 1}, description="other"), store).up_to_date


def test_more_iterations_follow_what_is_there(store: Store) -> None:
    run(experiment(), store, 2)
    planned = plan(experiment(), store)
    assert told(planned, "recompute") == {(3, step) for step in STEP_ORDER} - {(3, "policy")}, "it came with promotion 2"
    check(planned, run(experiment(), store))
    assert plan(experiment(), store, 2).up_to_date
    assert len(plan(experiment(), store, 4).steps) == 28


def test_a_gate_with_the_same_verdict_leaves_the_next_iteration_alone(store: Store) -> None:
    run(experiment(), store)
    changed = experiment(gate={"max_turn_ratio": 4.0})
    planned = plan(changed, store)
    assert told(planned, "recompute") == {(1, "promotion")}
    follows = planned.of("follows")
    assert {(one.step, one.if_same) for one in follows} == {
        (step, "recompute" if step == "promotion" else "reuse") for step in STEP_ORDER
    }
    assert follows[0].reasons[0].text == "follows promotion[quick|01]; if that decides as before: promotion recomputed"
    made = run(changed, store)
    assert made == {(k, "promotion") for k in (1, 2, 3)}
    check(planned, made)


def test_another_verdict_is_told_as_what_enters(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run(experiment(), store)
    changed = experiment(gate={"max_turn_ratio": 4.0})
    fake_steps(monkeypatch, lambda k: "keep")
    run(changed, store, 1)
    planned = plan(changed, store)
    assert told(planned, "recompute") >= {(2, "trajectories")}
    adapter = store.ref("quick", 1, "adapter")
    assert adapter is not None
    [entered] = [one for one in planned.steps if (one.iteration, one.step) == (2, "policy")]
    assert entered.action == "reuse", "the promotion committed it"
    assert reasons(planned, 2, "trajectories")[0][:2] == ("upstream", "policy")
    check(planned, run(changed, store))


def test_a_new_version_of_the_code_is_named(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run(experiment(), store)
    specs = dict(base.SPECS)
    old = specs["contexts"].version
    specs["contexts"] = replace(specs["contexts"], version="next")
    monkeypatch.setattr(base, "SPECS", specs)
    planned = plan(experiment(), store)
    assert reasons(planned, 1, "contexts") == [("code", "", old, "next")]
    check(planned, run(experiment(), store))


def test_a_changed_file_of_tasks_is_told_by_its_content(store: Store, tmp_path: Path) -> None:
    (tmp_path / "pages.jsonl").write_text(json.dumps({"title": "t", "text": "x"}) + "\n")
    tasks = {}
    for name in WORLDS:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": f"what is {name}?", "answer": "x"}) + "\n")
        tasks[name] = {"path": str(tmp_path / f"{name}.jsonl")}
    mine = experiment(environment={"kind": "corpus", "pages": str(tmp_path / "pages.jsonl")}, tasks=tasks)
    run(mine, store)
    assert plan(mine, store).up_to_date
    with (tmp_path / "held_out.jsonl").open("a") as stream:
        stream.write(json.dumps({"question": "and this?", "answer": "y"}) + "\n")
    planned = plan(mine, store)
    assert told(planned, "recompute") == {(1, "scores"), (1, "promotion")}
    [scores] = [one for one in planned.steps if (one.iteration, one.step) == (1, "scores")]
    assert scores.reasons[0].text.startswith("tasks.held_out.path: its content changed (")
    assert str(tmp_path) not in scores.reasons[0].text
    check(planned, run(mine, store))


def test_what_is_gone(store: Store) -> None:
    run(experiment(), store)
    contexts = store.ref("quick", 1, "contexts")
    assert contexts is not None
    shutil.rmtree(store.root / "objects" / "contexts" / contexts.digest)
    planned = plan(experiment(), store)
    assert told(planned, "recompute") == {(1, "contexts")}
    assert "is gone" in planned.steps[3].reasons[0].text
    check(planned, run(experiment(), store))


def test_a_damaged_artifact_stops_the_run_there(store: Store, tmp_path: Path) -> None:
    run(experiment(), store)
    ref = store.ref("quick", 1, "scores")
    assert ref is not None
    path = store.open("scores", ref.digest).path / "made.json"
    path.write_text("{")
    planned = plan(experiment(), store)
    assert told(planned, "stop") == {(1, "scores")}
    [one] = planned.of("stop")
    assert str(path) in one.reasons[0].text
    assert "delete folder" in one.reasons[0].text
    registry_file = tmp_path / "quick.yaml"
    registry_file.write_text(json.dumps(experiment().model_dump(mode="json", exclude_unset=True)))
    assert CliRunner().invoke(cli.app, ["plan", str(registry_file), "--store", str(store.root)]).exit_code == 1
    with pytest.raises(StoreError, match=r"made\.json"):
        run(experiment(), store)
    shutil.rmtree(path.parent)
    check(plan(experiment(), store), run(experiment(), store))


def test_a_stream_that_ends_stops_the_run_where_it_ends(store: Store, tmp_path: Path) -> None:
    for name in ("train", "development", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": f"{name}?", "answer": "x"}) + "\n")
    tasks: dict[str, Any] = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in WORLDS}
    tasks["train"] |= {"stream": True, "count": 1}
    (tmp_path / "pages.jsonl").write_text('{"title": "a", "text": "b"}\n')
    one_night = experiment(tasks=tasks, environment={"kind": "corpus", "pages": str(tmp_path / "pages.jsonl")})
    run(one_night, store, 1)
    planned = plan(one_night, store, 2)
    assert told(planned, "reuse") == {(1, step) for step in STEP_ORDER} | {(2, "policy")}, (
        "promoted, with no tasks for the next"
    )
    assert told(planned, "stop") == {(2, step) for step in STEP_ORDER[1:]}
    assert "no tasks left" in planned.of("stop")[0].reasons[0].text
    assert "6 without tasks: a run stops there" in planning.headline(planned)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write('{"question": 5}\n')
    with pytest.raises(DataError, match="'question' must be text"):
        plan(one_night, store, 2)


def test_a_damaged_decision_stops_too_and_the_rest_follows(store: Store) -> None:
    run(experiment(), store)
    ref = store.ref("quick", 1, "promotion")
    assert ref is not None
    (store.open("promotion", ref.digest).path / "decision.json").write_text("[]")
    planned = plan(experiment(), store)
    assert told(planned, "stop") == {(1, "promotion")}
    assert told(planned, "follows") == {(k, step) for k in (2, 3) for step in STEP_ORDER}


def test_a_damaged_manifest_or_reference_is_no_crash(store: Store) -> None:
    run(experiment(), store)
    ref = store.ref("quick", 1, "scores")
    assert ref is not None
    (store.root / "objects" / "scores" / ref.digest / "manifest.json").write_text("{}")
    changed = experiment(evaluation={"seed": 3})
    assert reasons(plan(changed, store), 1, "scores")[0][0] == "unknown"
    (store.root / "refs" / "quick" / "01" / "scores.json").write_text("?")
    [damaged, *_] = [one for one in plan(changed, store).steps if one.step == "scores"]
    assert "reference is damaged" in damaged.reasons[0].text


def test_what_another_experiment_made_is_reused_and_said(store: Store) -> None:
    run(experiment(), store)
    planned = plan(experiment("twin", gate={"max_turn_ratio": 3.0}), store)
    shared = [one for one in planned.steps if one.action == "reuse"]
    assert {one.step for one in shared} == set(STEP_ORDER) - {"promotion"}
    assert {reason.text for one in shared for reason in one.reasons} == {"made for quick|01"}
    check(planned, run(experiment("twin", gate={"max_turn_ratio": 3.0}), store))


CHANGES = st.fixed_dictionaries(
    {},
    optional={
        "seed": st.integers(0, 1),
        "granularity": st.sampled_from(["principle", "instance"]),
        "selection": st.fixed_dictionaries({"max_items": st.integers(2, 3)}),
        "gate": st.fixed_dictionaries({"max_turn_ratio": st.sampled_from([2.0, 3.0])}),
        "evaluation": st.fixed_dictionaries({"greedy": st.booleans()}),
        "distillation": st.fixed_dictionaries({"retention": st.sampled_from([0.0, 0.3])}),
        "iterations": st.integers(1, 3),
    },
)


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(history=st.lists(CHANGES, min_size=1, max_size=2), verdicts=st.lists(st.booleans(), min_size=3, max_size=3))
def test_plan_then_run_agree_over_any_history(
    history: list[dict[str, Any]],
    verdicts: list[bool],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_steps(monkeypatch, lambda k: "promote" if verdicts[k - 1] else "keep")
    store = Store(tmp_path_factory.mktemp("any"))
    for changes in history:
        e = experiment(**changes)
        check(plan(e, store), run(e, store))
        assert plan(e, store).up_to_date


# -- the command


def test_the_command_tells_and_writes_nothing(store: Store, tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text(json.dumps({"iterations": 2, "tasks": WORLDS}))
    first = CliRunner().invoke(cli.app, ["plan", str(tmp_path / "quick.yaml"), "--store", str(store.root)])
    assert first.exit_code == 0
    assert "7 of 14 steps would be recomputed" in first.output
    assert not store.root.exists()
    run(registry.register(store.root, tmp_path / "quick.yaml"), store)
    assert "nothing to recompute" in CliRunner().invoke(cli.app, ["plan", "quick", "--store", str(store.root)]).output
    (tmp_path / "quick.yaml").write_text(
        json.dumps({"iterations": 2, "tasks": WORLDS, "selection": {"selector": "lexical"}, "gate": {"confidence": 0.9}})
    )
    before = everything_below(store.root)
    changed = CliRunner().invoke(cli.app, ["plan", str(tmp_path / "quick.yaml"), "--store", str(store.root)])
    assert "selection.selector: state -> lexical" in changed.output
    assert "gate.confidence: 0.95 -> 0.9" in changed.output
    assert "follows promotion[quick|01]" in changed.output
    told_json = json.loads(
        CliRunner().invoke(cli.app, ["plan", "quick", "--json", "--store", str(store.root), "--seed", "4"]).output
    )
    assert told_json["experiment"] == "quick-s4"
    assert told_json["counts"] == {"reuse": 1, "recompute": 6, "follows": 7, "stop": 0}
    assert everything_below(store.root) == before


def test_the_command_refuses_pages_with_mistakes_as_a_run_does(tmp_path: Path) -> None:
    for name in WORLDS:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"question": f"{name}?", "answer": "x"}) + "\n")
    (tmp_path / "pages.jsonl").write_text('{"title": "a"}\n')
    tasks = {name: {"path": f"{name}.jsonl", "world": None} for name in WORLDS}
    content = {"tasks": tasks, "environment": {"kind": "corpus", "pages": "pages.jsonl"}}
    (tmp_path / "own.yaml").write_text(json.dumps(content))
    result = CliRunner().invoke(cli.app, ["plan", str(tmp_path / "own.yaml"), "--store", str(tmp_path / "none")])
    assert isinstance(result.exception, DataError)
    assert "'text' is missing" in result.exception.what


def test_it_needs_no_heavy_library(tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text("iterations: 3\n")
    code = f"""
import sys
from evolve_dag import cli
sys.argv = ["evolve", "plan", {str(tmp_path / "quick.yaml")!r}, "--store", {str(tmp_path / "none")!r}]
try:
    cli.main()
except SystemExit as end:
    assert not end.code, end.code
heavy = {{"torch", "dagster", "transformers", "peft", "polars", "duckdb", "mlflow", "plotly", "openai", "httpx"}}
assert not heavy & set(sys.modules), heavy & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "7 of 21 steps" in done.stdout
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("changes", [{}, {"selection": {"max_items": 2}}], ids=["nothing", "selector"])
def test_of_a_mirror_a_plan_fetches_the_decisions_alone(changes: dict[str, Any], store: Store, tmp_path: Path) -> None:
    """A new machine says the same as the one that made everything, the reasons too."""
    url, fetched = f"file://{tmp_path}/remote", []

    class Watched(Mirror):
        def _fetch_file(self, kind: str, digest: str, path: Path, fact: FileFact) -> None:
            fetched.append(kind)
            super()._fetch_file(kind, digest, path, fact)

    here = MirroredStore(store.root, Mirror(url))
    run(experiment(), here)
    there = MirroredStore(tmp_path / "there", Watched(url))
    assert plan(experiment(**changes), there) == plan(experiment(**changes), here)
    assert set(fetched) == {"promotion"}
