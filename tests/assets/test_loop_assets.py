"""The loop in Dagster: order, data versions, hand-over to the next iteration, and what a config change makes unsynced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest
from assets_helpers import FakeSteps, config_job, execute, iteration, problems_of, statuses, unsynced, watch, write_config
from dagster._core.definitions.data_version import StaleStatus
from evolve_dag.assets import automation, checks, partitions
from evolve_dag.assets.settings import CONFIGURED_STEPS, settings_key

from evolve_dag.config.loading import load_experiment
from evolve_dag.config.schema import Experiment
from evolve_dag.distillation.dataset import load_contexts, save_contexts
from evolve_dag.errors import ModelError, OrderError
from evolve_dag.steps import base
from evolve_dag.store.artifacts import Store


def test_an_iteration_records_digests_and_hands_the_policy_over(
    fake: FakeSteps, experiment: Experiment, store: Store, memory: dg.DagsterInstance
) -> None:
    assert config_job(memory).success
    result = iteration(memory, 1)
    for name, resolved in base.resolve_iteration(experiment, 1, store).items():
        assert automation.recorded_version(memory, dg.AssetKey(name), "tiny|01") == resolved.digest
    following = base.resolve("policy", experiment, 2, store).digest
    assert automation.recorded_version(memory, dg.AssetKey("policy"), "tiny|02") == following
    assert memory.has_dynamic_partition(partitions.ITERATION, "02")
    event = memory.get_latest_data_version_record(dg.AssetKey("policy"), partition_key="tiny|02")
    assert event is not None
    assert event.run_id == result.run_id, "the hand-over belongs to the run that decided it"
    assert statuses(memory, 1) == dict.fromkeys(base.STEP_ORDER, StaleStatus.FRESH)
    assert statuses(memory, 2)["policy"] == StaleStatus.FRESH
    assert statuses(memory, 2)["trajectories"] == StaleStatus.MISSING


def test_a_second_materialization_computes_nothing(fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance) -> None:
    iteration(memory, 1)
    ran = list(fake.ran)
    result = iteration(memory, 1)
    assert fake.ran == ran
    recomputed = {
        event.asset_key.to_user_string(): event.materialization.metadata["recomputed"].value
        for event in result.get_asset_materialization_events()
        if event.asset_key and "recomputed" in event.materialization.metadata
    }
    assert recomputed == dict.fromkeys(base.STEP_ORDER, False)


def test_metadata_tells_digest_cost_numbers_and_rows(
    fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance
) -> None:
    result = iteration(memory, 1)
    [event] = result.asset_materializations_for_node("experience")
    assert {"digest", "path", "seconds", "recomputed", "preview", "items"} <= set(event.metadata)
    assert event.metadata["items"].value == 1
    assert "Search first" in str(event.metadata["preview"].value)


def test_an_iteration_before_its_predecessor_fails_with_the_remedy(
    fake: FakeSteps, experiment: Experiment, store: Store, memory: dg.DagsterInstance
) -> None:
    with pytest.raises(dg.Failure) as caught:
        iteration(memory, 2)
    assert caught.value.description is not None
    assert "policy[tiny|02] is not promoted yet" in caught.value.description
    assert "materialize promotion[tiny|01] first" in caught.value.description
    assert caught.value.allow_retries is False
    assert isinstance(caught.value.__cause__, OrderError)
    assert fake.ran == []
    assert store.refs("tiny") == []


def test_a_single_asset_before_its_upstream_fails_with_the_remedy(
    fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance
) -> None:
    result = iteration(memory, 1, only=["contexts"], check=False)
    assert not result.success
    assert "materialize policy[tiny|01] first" in problems_of(result)


def test_an_unknown_experiment_fails_with_the_remedy(fake: FakeSteps, memory: dg.DagsterInstance) -> None:
    result = iteration(memory, 1, check=False)
    assert "no experiment 'tiny'" in problems_of(result)
    assert "evolve run" in problems_of(result)


def test_a_bug_keeps_its_traceback(fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance) -> None:
    fake.fail["experience"] = ZeroDivisionError("a bug")
    with pytest.raises(ZeroDivisionError, match="a bug"):
        iteration(memory, 1)


@pytest.mark.parametrize("kind", [ModelError, RuntimeError])
@pytest.mark.parametrize("link", ["itself", "cause", "context"])
def test_a_secret_in_an_exception_reaches_no_event(
    kind: type[Exception],
    link: str,
    fake: FakeSteps,
    experiment: Experiment,
    memory: dg.DagsterInstance,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Dagster writes an exception into its database with all that led to it."""
    monkeypatch.setenv("SOME_API_KEY", "Zq9vK2xWb7LmT4YpRg6N")
    behind = ValueError("Illegal header value b'Bearer Zq9vK2xWb7LmT4YpRg6N'")
    error = kind("Zq9vK2xWb7LmT4YpRg6N is wrong" if link == "itself" else "no answer")
    if link == "cause":
        error.__cause__ = behind
    elif link == "context":
        error.__context__ = behind
    fake.fail["experience"] = error
    result = iteration(memory, 1, check=False)
    assert not result.success
    events = "".join(str(entry) for entry in memory.all_logs(result.run_id))
    assert f"{'***' if link == 'itself' else 'no answer'}" in events
    assert "Zq9v" not in events


CHANGES: dict[str, tuple[dict[str, object], set[str]]] = {
    "extraction": ({"extraction": {"cap": 5}}, {"experience"}),
    "selector": ({"selection": {"selector": "lexical"}}, {"contexts", "scores"}),
    "training": ({"distillation": {"epochs": 3}}, {"adapter"}),
    "gate": ({"gate": {"max_turn_ratio": 3.0}}, {"promotion"}),
    "speed": ({"runtime": {"threads": 1}, "description": "other words"}, set()),
}


def test_a_config_change_makes_exactly_its_readers_unsynced(
    fake: FakeSteps, config: Path, experiment: Experiment, memory: dg.DagsterInstance
) -> None:
    watch(memory)
    iteration(memory, 1)
    assert unsynced(memory, 1) == set()
    for change, readers in CHANGES.values():
        write_config(config, **change)
        watch(memory)
        assert unsynced(memory, 1) == readers, change
        changed = load_experiment(config)
        told = {n for n in base.STEP_ORDER if base.settings_digest(n, changed) != base.settings_digest(n, experiment)}
        assert readers == told, "the table above must follow what the steps declare"
        write_config(config)
        watch(memory)
        assert unsynced(memory, 1) == set(), "taking the change back makes everything synced again"


def test_a_change_travels_down_the_loop_and_into_the_next_iteration(
    fake: FakeSteps, config: Path, experiment: Experiment, memory: dg.DagsterInstance
) -> None:
    watch(memory)
    iteration(memory, 1)
    iteration(memory, 2)
    write_config(config, distillation={"epochs": 3})
    watch(memory)
    assert unsynced(memory, 1) == {"adapter"}
    iteration(memory, 1, only=["adapter"])
    assert unsynced(memory, 1) == {"scores", "promotion"}
    iteration(memory, 1, only=["scores", "promotion"])
    assert unsynced(memory, 1) == set()
    assert {"trajectories", "experience", "contexts", "adapter"} <= unsynced(memory, 2), "they read policy[2], which is new"
    iteration(memory, 2)
    assert unsynced(memory, 2) == set()


def test_every_check_passes_on_sound_artifacts(fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance) -> None:
    result = iteration(memory, 1)
    found = {(e.asset_key.to_user_string(), e.check_name): e for e in result.get_asset_check_evaluations()}
    assert set(found) == {(spec.name, check.name) for spec in base.STEPS for check in spec.checks}
    assert all(evaluation.passed for evaluation in found.values()), found
    clean = found["contexts", "clean"].metadata
    assert (clean["steps"].value, clean["steps_with_experience"].value) == (16, 8)
    assert clean["experience_in_student_view"].value == "none"
    actions = found["contexts", "same_actions"].metadata
    assert (actions["action_tokens"].value, actions["teacher_distributions"].value) == (40, 40)


def test_experience_in_the_students_view_stops_the_run(
    fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance
) -> None:
    fake.hint = "mayor: person Rato Miku"  # text that stands in the clean history too
    result = iteration(memory, 1, check=False)
    [bad] = [e for e in result.get_asset_check_evaluations() if not e.passed]
    assert (bad.check_name, bad.blocking) == ("clean", True)
    assert len(bad.metadata["experience_in_student_view"].value) == 4
    assert not any(ran.startswith("adapter") for ran in fake.ran)


def test_action_ids_that_were_not_sampled_stop_the_run(
    fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fake.contexts

    def tampered(context: base.StepContext) -> None:
        whole(context)
        rows = load_contexts(context.build.path)
        other = replace(rows[0], row=replace(rows[0].row, ids=(1, 5, 9, 1, 7, 8, 9)))
        save_contexts(context.build.path, [other, *rows[1:]])

    monkeypatch.setattr(fake, "contexts", tampered)
    result = iteration(memory, 1, check=False)
    [bad] = [e for e in result.get_asset_check_evaluations() if not e.passed]
    assert (bad.check_name, bad.blocking) == ("same_actions", True)
    assert bad.metadata["other_action_ids"].value == ["t0#0 step 0"]
    assert not any(ran.startswith("adapter") for ran in fake.ran)


def test_a_loss_that_is_no_number_stops_the_run(fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance) -> None:
    fake.losses = (0.5, float("nan"))
    result = iteration(memory, 1, check=False)
    [bad] = [e for e in result.get_asset_check_evaluations() if not e.passed]
    assert (bad.check_name, bad.metadata["not_finite"].value) == ("finite_loss", [1])
    assert not any(ran.startswith("scores") for ran in fake.ran)


def test_a_pool_over_its_cap_or_with_trajectory_detail_is_found(
    fake: FakeSteps, experiment: Experiment, store: Store, memory: dg.DagsterInstance
) -> None:
    fake.items = ("Search first: when nothing is known, search.", "Go to http://a.b page 3", "Search first: when lost, search.")
    iteration(memory, 1, only=["policy", "trajectories", "experience"])
    artifact = store.open("experience", str(base.resolve("experience", experiment, 1, store).digest))
    strict = experiment.model_copy(update={"extraction": experiment.extraction.model_copy(update={"cap": 2})})
    found = {r.check_name: r for r in checks.evaluate("experience", artifact, strict)}
    assert not found["within_cap"].passed
    assert not found["detail"].passed
    assert list(found["detail"].metadata["wrong"].value) == ["p0002"]


def test_two_hosts_cannot_run_one_experiment_at_once(
    fake: FakeSteps, experiment: Experiment, store: Store, memory: dg.DagsterInstance
) -> None:
    with store.lock("tiny"):
        result = iteration(memory, 1, check=False)
    assert "'tiny' is being run by process" in problems_of(result)
    assert fake.ran == []


def test_settings_assets_hold_the_slices_as_the_steps_hash_them(experiment: Experiment, memory: dg.DagsterInstance) -> None:
    config_job(memory)
    for step in CONFIGURED_STEPS:
        assert automation.recorded_version(memory, settings_key(step), "tiny") == base.settings_digest(step, experiment)


def test_an_iteration_that_is_no_number_is_told_in_words(
    fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance
) -> None:
    partitions.add_partitions(memory, ["tiny"], 1)
    memory.add_dynamic_partitions(partitions.ITERATION, ["foo"])
    told = problems_of(execute(memory, "iteration", "tiny|foo", only=["policy"], check=False))
    assert told.startswith("tiny: iteration 'foo' is not a number\n  remedy: iterations count from 01")
