"""Driving Dagster from the command line: resume, no-op, locks, leftovers of killed runs."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import nullcontext
from itertools import cycle
from pathlib import Path

import dagster as dg
import pytest
import yaml
from assets_helpers import FakeSteps, write_config
from evolve_dag.assets import launch, recovery
from rich.console import Console

from evolve_dag.config import registry
from evolve_dag.definitions import defs
from evolve_dag.errors import ConcurrencyError, ConfigError, DataError, StoreError, out_of_memory
from evolve_dag.steps import base
from evolve_dag.store.artifacts import Store
from evolve_dag.store.faults import UnexpectedError

ROOT = Path(".evolve")


@pytest.fixture(autouse=True)
def instance_in_memory(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One instance a test, in memory: on disk every event costs an fsync. ``on_disk`` keeps the real one."""
    if "on_disk" in request.fixturenames:
        yield
        return
    with dg.DagsterInstance.ephemeral() as instance:
        monkeypatch.setattr(launch, "open_instance", lambda root: nullcontext(instance))
        yield


@pytest.fixture
def on_disk() -> None:
    """Ask for it to test with the instance that users have."""


def run(config: Path, *, iterations: int | None = None, seed: int | None = None) -> tuple[launch.RunResult, str]:
    """``evolve run`` without the tables; returns what it printed as well."""
    printed = io.StringIO()
    result = launch.run(config, seed=seed, iterations=iterations, root=ROOT, console=Console(file=printed, width=120))
    return result, printed.getvalue()


def test_a_run_makes_everything_and_the_next_one_nothing(fake: FakeSteps, config: Path) -> None:
    result, printed = run(config)
    assert result.runs == 2
    assert all(result.recomputed[key] for key in result.recomputed if key != (2, "policy"))
    assert result.recomputed[2, "policy"] is False, "the promotion has committed it"
    assert "tiny 2/2 promotion" in printed
    ran = list(fake.ran)
    again, printed = run(config)
    assert (again.runs, printed, fake.ran) == (0, "", ran)
    assert set(again.recomputed.values()) == {False}


def test_more_iterations_run_only_the_new_ones(fake: FakeSteps, config: Path) -> None:
    run(config, iterations=1)
    result, _ = run(config, iterations=2)
    assert result.runs == 1
    assert [ran for ran in fake.ran if ran.startswith("trajectories")] == ["trajectories[tiny|01]", "trajectories[tiny|02]"]


def test_more_iterations_than_the_file_has_tasks_for_are_refused_at_once(fake: FakeSteps, config: Path) -> None:
    config.write_text(config.read_text() + "tasks: {train: {count: 4, world: 1, stream: true}}\n")
    with pytest.raises(ConfigError, match=r"tiny: with 95 iterations, where its file says 2: 1 mistake\n.*fresh worlds for 89"):
        run(config, iterations=95)
    assert fake.ran == []
    assert not ROOT.exists()


def test_artifacts_without_a_record_are_recorded_but_not_recomputed(
    fake: FakeSteps, config: Path, on_disk: None, monkeypatch: pytest.MonkeyPatch, place: Path
) -> None:
    run(config, iterations=1)
    ran = list(fake.ran)
    assert (ROOT / "dagster" / "dagster.yaml").is_file()
    monkeypatch.setenv("DAGSTER_HOME", str(place / "another_home"))
    result, _ = run(config, iterations=1)
    assert result.runs == 1
    assert set(result.recomputed.values()) == {False}
    assert fake.ran == ran


def test_a_damaged_database_is_named_and_the_run_goes_on_without_it(fake: FakeSteps, config: Path, on_disk: None) -> None:
    run(config, iterations=1)
    ran = list(fake.ran)
    for database in (ROOT / "dagster" / "schedules" / "schedules.db", ROOT / "dagster" / "history" / "runs.db"):
        database.write_bytes(b"\x07" * 9000)
        with pytest.raises(StoreError, match="file is not a database") as caught:
            run(config, iterations=1)
        assert f"move {database.resolve()} away" in caught.value.remedy
        database.unlink()
        run(config, iterations=1)
    assert fake.ran == ran, "what is in the store is recorded anew, not made anew"


def test_mistakes_in_pages_show_before_anything_is_stored(place: Path) -> None:
    tasks = {name: {"path": f"{name}.jsonl", "world": None} for name in ("train", "development", "held_out")}
    for name in tasks:
        (place / f"{name}.jsonl").write_text(f'{{"question": "{name}?", "answer": "x"}}\n')
    (place / "pages.jsonl").write_text('{"title": "a"}\n')
    config = write_config(place / "own.yaml", environment={"kind": "corpus", "pages": "pages.jsonl"}, tasks=tasks)
    with pytest.raises(DataError, match="'text' is missing"):
        run(config)
    assert not ROOT.exists()


def test_a_failed_step_leaves_its_predecessors_and_the_next_run_goes_on(fake: FakeSteps, config: Path) -> None:
    fake.fail["adapter"] = DataError("the disk of doom", "mend it")
    with pytest.raises(DataError, match="the disk of doom") as caught:
        run(config, iterations=1)
    assert caught.value.remedy == "mend it"
    del fake.fail["adapter"]
    result, _ = run(config, iterations=1)
    assert [name for (_, name), made in result.recomputed.items() if made] == ["adapter", "scores", "promotion"]


def test_ctrl_c_ends_the_run_and_leaves_nothing_started(fake: FakeSteps, config: Path) -> None:
    fake.fail["experience"] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        run(config, iterations=1)
    del fake.fail["experience"]
    result, _ = run(config, iterations=1)
    assert result.runs == 1
    with launch.open_instance(ROOT) as instance:
        assert not instance.get_runs(dg.RunsFilter(statuses=recovery.IN_PROGRESS))


def test_two_runs_of_one_experiment_at_once_are_refused(fake: FakeSteps, config: Path) -> None:
    with Store(ROOT).lock("tiny"), pytest.raises(ConcurrencyError, match="'tiny' is being run"):
        run(config)
    assert fake.ran == []


def test_the_run_of_a_killed_command_is_ended(fake: FakeSteps, config: Path) -> None:
    with launch.open_instance(ROOT) as instance:
        dead = instance.create_run_for_job(
            job_def=defs.resolve_job_def("iteration"),
            status=dg.DagsterRunStatus.STARTED,
            tags={launch.LINEAGE_TAG: "tiny"},
        )
    left = ROOT / "locks" / f"run-{dead.run_id}.lock"
    left.parent.mkdir(parents=True)
    left.touch()
    run(config, iterations=1)
    assert not left.exists()
    with launch.open_instance(ROOT) as instance:
        found = instance.get_run_by_id(dead.run_id)
        assert found is not None
        assert found.status == dg.DagsterRunStatus.FAILURE


def test_another_seed_is_another_lineage_that_shares_what_it_can(fake: FakeSteps, config: Path) -> None:
    run(config, iterations=1)
    result, _ = run(config, iterations=1, seed=5)
    assert result.experiment.experiment == "tiny-s5"
    assert result.experiment.seed == 5
    made = {name for (_, name), made in result.recomputed.items() if made}
    assert "policy" not in made, "the base policy does not depend on the seed"
    assert "trajectories" in made
    assert registry.load(ROOT, "tiny-s5").seed == 5


def test_the_files_own_seed_keeps_the_name(fake: FakeSteps, config: Path) -> None:
    result, _ = run(config, iterations=1, seed=0)
    assert result.experiment.experiment == "tiny"


def test_a_name_that_another_file_holds_is_refused(fake: FakeSteps, config: Path, place: Path) -> None:
    run(config, iterations=1)
    other = write_config(place / "elsewhere" / "tiny.yaml", granularity="instance")
    with pytest.raises(ConfigError, match="belongs to"):
        run(other)
    config.unlink()
    result, _ = run(other, iterations=1)
    assert result.experiment.granularity == "instance", "the name is free once its file is gone"


def test_mistakes_in_the_users_files_leave_no_store(config: Path, place: Path) -> None:
    (place / "pages.jsonl").write_text('{"title": "a", "text": "b"}\n')
    (place / "tasks.jsonl").write_text("not json\n")
    splits = {name: {"path": "../tasks.jsonl", "count": None, "world": None} for name in ("train", "development", "held_out")}
    write_config(config, environment={"kind": "corpus", "pages": "../pages.jsonl"}, tasks=splits)
    with pytest.raises(DataError, match=r"tasks\.jsonl"):
        run(config)
    assert not ROOT.exists()


def test_the_store_gets_the_projects_dagster_settings_without_its_storage(place: Path) -> None:
    (place / "dagster.yaml").write_text("storage: {sqlite: {base_dir: elsewhere}}\nnux: {enabled: false}\n")
    home = launch.prepare_home(place / "store")
    assert yaml.safe_load((home / "dagster.yaml").read_text()) == launch.INSTANCE | {"nux": {"enabled": False}}
    (home / "dagster.yaml").write_text("nux: {enabled: true}\n")
    launch.prepare_home(place / "store")
    assert "true" in (home / "dagster.yaml").read_text(), "what the user changed there stays"


@pytest.mark.parametrize("theirs", ["telemetry: {enabled: false}\n", "- a list\n", ""])
def test_beside_another_projects_settings_runs_are_still_limited_and_retried(place: Path, theirs: str) -> None:
    (place / "dagster.yaml").write_text(theirs)
    home = launch.prepare_home(place / "store")
    assert yaml.safe_load((home / "dagster.yaml").read_text()) == launch.INSTANCE


def test_settings_that_are_no_text_are_told(place: Path) -> None:
    (place / "dagster.yaml").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"dagster\.yaml: not valid YAML"):
        launch.prepare_home(place / "store")


def test_settings_of_an_earlier_version_get_what_is_new_and_only_those(place: Path) -> None:
    target = place / "store" / "dagster" / "dagster.yaml"
    target.parent.mkdir(parents=True)
    earlier = {key: launch.INSTANCE[key] for key in ("concurrency", "telemetry", "nux")}
    target.write_text(yaml.safe_dump(earlier))
    launch.prepare_home(place / "store")
    assert yaml.safe_load(target.read_text()) == launch.INSTANCE
    target.write_text("")
    launch.prepare_home(place / "store")
    assert yaml.safe_load(target.read_text()) == launch.INSTANCE, "an empty file is what a full disk leaves"
    touched = {**earlier, "telemetry": {"enabled": True}}
    target.write_text(yaml.safe_dump(touched))
    launch.prepare_home(place / "store")
    assert yaml.safe_load(target.read_text()) == touched


def test_the_workspace_is_the_projects_own_or_one_that_names_the_same_location(place: Path) -> None:
    other = place / "workspace.yaml"
    other.write_text("load_from: [{python_file: other.py}]")
    own = launch.workspace_file(ROOT)
    assert own.is_relative_to(place / ROOT)
    [entry] = yaml.safe_load(own.read_text())["load_from"]
    assert entry["python_module"]["location_name"] == launch.LOCATION
    assert other.read_text() == "load_from: [{python_file: other.py}]"
    other.write_text("load_from: [{python_module: evolve_dag.definitions}]")
    assert launch.workspace_file(ROOT) == other, "now it is about these assets"


def test_a_workspace_in_dagsters_home_is_used_and_stays_as_it_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = place / "mine"
    home.mkdir()
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    theirs = home / "workspace.yaml"
    text = (Path(__file__).parents[2] / "docker" / "workspace.yaml").read_text()
    theirs.write_text(text)
    assert launch.workspace_file(ROOT) == theirs
    assert theirs.read_text() == text
    elsewhere = launch.own_workspace()
    elsewhere["load_from"][0]["python_module"]["working_directory"] = "/another/folder"
    theirs.write_text(yaml.safe_dump(elsewhere))
    assert launch.workspace_file(ROOT) != theirs, "an earlier version has written it, for another working folder"


def test_a_dagster_home_of_the_users_own_is_used_as_it_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(place / "mine"))
    assert launch.prepare_home(place / "store") == place / "mine"
    assert not (place / "mine" / "dagster.yaml").exists()


def test_bars_follow_a_steps_phases() -> None:
    from rich.progress import Progress

    bars = Progress(console=Console(file=io.StringIO()))
    shown = launch.Bars(bars, "tiny 1/2 adapter")
    shown.start("distillation", 10)
    shown.advance(4)
    [task] = bars.tasks
    assert (task.description, task.completed, task.total) == ("tiny 1/2 adapter distillation", 4, 10)
    shown.finish()
    shown.start("scoring", 3)
    assert (task.completed, task.total) == (0, 3)
    progress: base.Progress = shown
    progress.advance()
    assert task.completed == 1


FAULTS = (RuntimeError("boom"), ValueError("boom"), RuntimeError("CUDA out of memory. Tried 2 GiB\nof"), MemoryError())


@pytest.mark.parametrize(("step", "fault"), zip(base.STEP_ORDER, cycle(FAULTS)), ids=repr)
def test_a_fault_in_any_step_ends_with_a_message_and_the_next_run_goes_on(
    fake: FakeSteps, config: Path, step: str, fault: BaseException
) -> None:
    fake.fail[step] = fault
    with pytest.raises(UnexpectedError, match="out of memory" if out_of_memory(fault) else "boom") as caught:
        run(config, iterations=1)
    assert caught.value.remedy
    del fake.fail[step]
    result, _ = run(config, iterations=1)
    later = base.STEP_ORDER[base.STEP_ORDER.index(step) :]
    assert [name for (_, name), made in result.recomputed.items() if made] == list(later)


def test_a_fault_through_the_command_is_a_line_and_a_code(
    fake: FakeSteps, config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from evolve_dag import cli

    fake.fail["contexts"] = RuntimeError("boom")
    monkeypatch.setattr("sys.argv", ["evolve", "run", str(config)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert "error: RuntimeError: boom" in said
    assert "EVOLVE_DEBUG=1" in said
    assert "Traceback" not in said


def test_a_fault_with_debug_keeps_its_traceback(fake: FakeSteps, config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.fail["contexts"] = RuntimeError("boom")
    monkeypatch.setenv("EVOLVE_DEBUG", "1")
    with pytest.raises(RuntimeError, match="boom") as caught:
        run(config)
    assert not isinstance(caught.value, UnexpectedError)
