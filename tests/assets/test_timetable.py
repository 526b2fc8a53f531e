"""``evolve schedule list|on|off`` on an instance on disk, and the state as Dagster's scheduler would read it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import dagster as dg
import pytest
from assets_helpers import watch, write_config
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.definitions.selector import InstigatorSelector
from dagster._core.scheduler.instigation import ScheduleInstigatorData, TickData, TickStatus
from evolve_dag.assets import automation, launch, timetable
from typer.testing import CliRunner

from evolve_dag.cli import app
from evolve_dag.config import registry, scheduling
from evolve_dag.errors import ConfigError

ROOT = Path(".evolve")


@pytest.fixture(autouse=True)
def experiments(place: Path) -> None:
    """Two experiments of the configs folder."""
    write_config(place / "configs" / "tiny.yaml", schedule={"cron": "30 2 * * *", "timezone": "Europe/Berlin"})
    write_config(place / "configs" / "other.yaml")


def stored() -> dict[str, bool]:
    """Selector of what is stored -> whether it is on."""
    with launch.open_instance(ROOT) as instance:
        return {s.selector_id: s.is_running for s in instance.all_instigator_state(instigator_type=InstigatorType.SCHEDULE)}


def selector(schedule: str) -> str:
    """The key under which the daemon looks a schedule up, in the location that ``evolve ui`` loads."""
    return InstigatorSelector(location_name="evolve_dag", repository_name="__repository__", name=schedule).get_id()


def evolve(*arguments: str) -> str:
    result = CliRunner().invoke(app, [*arguments, "--store", str(ROOT)])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_schedule_is_switched_where_the_daemon_looks() -> None:
    said = evolve("schedule", "on", "tiny")
    assert said.startswith("tiny: on, 30 2 * * * (Europe/Berlin), next tick ")
    assert "evolve ui" in said, "no daemon was heard of"
    assert stored() == {selector("nightly_tiny"): True}
    assert evolve("schedule", "off", "tiny") == "tiny: off\n"
    assert stored() == {selector("nightly_tiny"): False}


@pytest.mark.parametrize(
    ("promoted", "told"),
    [
        (0, ["tiny: iteration 1 is not promoted: run it by hand first (nothing starts that nobody started)"]),
        (1, []),
        (2, ["tiny: all 2 iterations are promoted: raise `iterations` in its file to go on"]),
    ],
)
def test_switching_on_says_when_no_tick_will_run_anything(
    promoted: int, told: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(automation, "promoted_iterations", lambda instance, name: set(range(1, promoted + 1)))
    assert timetable.switch_on(ROOT, "tiny")[1][:-1] == told


def test_the_list_shows_all_of_them() -> None:
    evolve("schedule", "on", "configs/tiny.yaml")
    other, tiny = json.loads(evolve("schedule", "list", "--json"))
    assert (other["experiment"], other["on"], other["next_tick"], other["decision"]) == ("other", False, None, "")
    assert (tiny["experiment"], tiny["on"], tiny["cron"], tiny["timezone"]) == ("tiny", True, "30 2 * * *", "Europe/Berlin")
    assert tiny["next_tick"][11:16] == "02:30"
    table = evolve("schedule", "list")
    assert "Europe/Berlin" in table
    assert "other" in table


def test_the_last_decision_is_shown_with_its_reason() -> None:
    timetable.switch_on(ROOT, "tiny")
    with launch.open_instance(ROOT) as instance:
        [state] = instance.all_instigator_state(instigator_type=InstigatorType.SCHEDULE)
        told = {"skip_reason": "tiny: all 2 iterations are promoted"}
        for second, (status, extra) in enumerate([(TickStatus.STARTED, {}), (TickStatus.SKIPPED, told)]):
            instance.create_tick(
                TickData(
                    state.instigator_origin_id,
                    state.name,
                    InstigatorType.SCHEDULE,
                    status,
                    1_780_000_000.0 + second,
                    selector_id=state.selector_id,
                    **extra,
                )
            )
    line = next(line for line in timetable.listing(ROOT)[0] if line.experiment == "tiny")
    assert line.decision == "skipped: tiny: all 2 iterations are promoted"
    assert line.decided is not None
    assert str(line.decided.tzinfo) == "Europe/Berlin"
    assert "last decision" in evolve("schedule", "list")


def test_switching_on_again_acknowledges_what_has_failed() -> None:
    def since() -> float:
        with launch.open_instance(ROOT) as instance:
            return automation._switched_on(instance, "nightly_tiny")

    assert since() == 0.0
    timetable.switch_on(ROOT, "tiny")
    first = since()
    assert first > 0
    timetable.switch_on(ROOT, "tiny")
    assert since() > first


def set_on_for(seconds: float) -> None:
    """Make it look as if the one schedule that is on had been switched on that long ago."""
    with launch.open_instance(ROOT) as instance:
        [state] = instance.all_instigator_state(instigator_type=InstigatorType.SCHEDULE)
        data = state.instigator_data
        assert isinstance(data, ScheduleInstigatorData)
        assert data.start_timestamp is not None
        instance.update_instigator_state(
            state.with_data(ScheduleInstigatorData(data.cron_schedule, data.start_timestamp - seconds))
        )


def test_switching_needs_no_writable_home_and_leaves_a_workspace_as_it_is(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = place / "mine"
    home.mkdir()
    text = (Path(__file__).parents[2] / "docker" / "workspace.yaml").read_text()  # names variables that are not set here
    (home / "workspace.yaml").write_text(text)
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    evolve("schedule", "on", "tiny")
    assert stored() == {selector("nightly_tiny"): True}
    assert "tiny" in evolve("schedule", "list")
    assert (home / "workspace.yaml").read_text() == text
    (home / "workspace.yaml").unlink()
    evolve("schedule", "off", "tiny")
    assert stored() == {selector("nightly_tiny"): False}
    assert not list(home.glob("*workspace*"))


def test_a_workspace_that_gives_another_name_is_switched_under_it(place: Path) -> None:
    (place / "workspace.yaml").write_text("load_from: [{python_module: evolve_dag.definitions}]")
    timetable.switch_on(ROOT, "tiny")
    other = InstigatorSelector(
        location_name="evolve_dag.definitions", repository_name="__repository__", name="nightly_tiny"
    ).get_id()
    assert stored() == {other: True}
    (place / "workspace.yaml").write_text("evolve_dag: [")
    with pytest.raises(ConfigError, match="not a workspace that can be read"):
        timetable.switch_on(ROOT, "tiny")


@pytest.mark.parametrize(("daemon", "remedy"), [(False, "start it with `evolve ui`"), (True, "reload the code location")])
def test_a_tick_that_was_missed_is_told(daemon: bool, remedy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    timetable.switch_on(ROOT, "tiny")
    monkeypatch.setattr(timetable, "_ticks", lambda instance: daemon)
    set_on_for(2 * 86_400)
    line = next(line for line in timetable.listing(ROOT)[0] if line.experiment == "tiny")
    assert line.next_tick is None
    assert "no tick since" in line.problem
    assert "02:30, when one was due" in line.problem
    assert line.problem.endswith(remedy)
    with launch.open_instance(ROOT) as instance:
        [state] = instance.all_instigator_state(instigator_type=InstigatorType.SCHEDULE)
        tick = TickData(
            state.instigator_origin_id,
            state.name,
            InstigatorType.SCHEDULE,
            TickStatus.SKIPPED,
            time.time(),
            selector_id=state.selector_id,
        )
        instance.create_tick(tick)
    line = next(line for line in timetable.listing(ROOT)[0] if line.experiment == "tiny")
    assert line.problem == ""
    assert line.next_tick is not None


def test_a_cron_that_has_changed_since_is_told(place: Path) -> None:
    timetable.switch_on(ROOT, "tiny")
    write_config(place / "configs" / "tiny.yaml", schedule={"cron": "0 3 * * *"})
    line = next(line for line in timetable.listing(ROOT)[0] if line.experiment == "tiny")
    assert "switched on with cron '30 2 * * *': reload the code location" in line.problem
    with launch.open_instance(ROOT) as instance:
        [state] = instance.all_instigator_state(instigator_type=InstigatorType.SCHEDULE)
        assert isinstance(state.instigator_data, ScheduleInstigatorData)


def test_what_nobody_knows_is_refused() -> None:
    with pytest.raises(ConfigError, match="no experiment 'nope'"):
        timetable.switch_on(ROOT, "nope")
    assert stored() == {}


def test_one_is_switched_off_whatever_its_file_has_come_to(place: Path) -> None:
    file = place / "configs" / "tiny.yaml"
    evolve("schedule", "on", str(file))
    file.write_text("iteratons: 3\n")
    [line] = [line for line in timetable.listing(ROOT)[0] if line.experiment == "tiny"]
    assert (line.on, line.next_tick) == (True, None)
    assert "switch it off: evolve schedule off tiny" in line.problem
    assert "tiny" in evolve("schedule", "list")
    assert evolve("schedule", "off", str(file)) == "tiny: off\n"
    assert stored() == {selector("nightly_tiny"): False}
    assert "tiny" not in {line.experiment for line in timetable.listing(ROOT)[0]}, "left out, as its mistake says"
    write_config(file)
    evolve("schedule", "on", "tiny")
    file.unlink()
    assert evolve("schedule", "off", "tiny") == "tiny: off\n"
    assert stored() == {selector("nightly_tiny"): False}
    with pytest.raises(ConfigError, match="no experiment 'nope'"):
        timetable.switch_off(ROOT, "nope")


def test_one_whose_file_was_renamed_is_switched_by_its_name(place: Path) -> None:
    file = write_config(place / "configs" / "a.yaml", experiment="mine")
    evolve("schedule", "on", str(file))
    file.rename(file.with_name("b.yaml"))
    assert evolve("schedule", "on", "mine").startswith("mine: on, ")
    assert evolve("schedule", "off", "mine") == "mine: off\n"


def test_the_mistake_of_the_file_that_would_have_the_name_is_told(place: Path) -> None:
    (place / "configs" / "small.yaml").write_text("iteratons: 3\n")
    with pytest.raises(ConfigError, match="iteratons"):
        timetable.switch_on(ROOT, "small")


def test_another_experiment_does_not_switch_one_off(place: Path) -> None:
    write_config(place / "configs" / "my-exp.yaml")
    timetable.switch_on(ROOT, "my-exp")
    write_config(place / "configs" / "my_exp.yaml")
    assert {line.experiment: line.on for line in timetable.listing(ROOT)[0]}["my-exp"]
    assert not {line.experiment: line.on for line in timetable.listing(ROOT)[0]}["my_exp"]


@pytest.mark.parametrize("by", ["list", "watch"])
def test_what_is_on_under_the_name_of_an_earlier_version_stays_on(
    place: Path, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_config(place / "configs" / "my-exp.yaml")
    with monkeypatch.context() as before:
        before.setattr(scheduling, "schedule_name", scheduling.former_name)
        timetable.switch_on(ROOT, "my-exp")
    set_on_for(2 * 86_400)
    if by == "watch":
        with launch.open_instance(ROOT) as instance:
            watch(instance)
    line = next(line for line in timetable.listing(ROOT)[0] if line.experiment == "my-exp")
    assert line.on
    assert line.problem == "", "nothing is made up for"
    assert stored() == {selector("nightly_my_exp"): False, selector(scheduling.schedule_name("my-exp")): True}
    timetable.switch_off(ROOT, "my-exp")
    assert not any(stored().values())


def test_a_former_name_that_two_may_have_had_switches_neither_on(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_config(place / "configs" / "my-exp.yaml")
    with monkeypatch.context() as before:
        before.setattr(scheduling, "schedule_name", scheduling.former_name)
        timetable.switch_on(ROOT, "my-exp")
    write_config(place / "configs" / "my_exp.yaml")
    assert not any(line.on for line in timetable.listing(ROOT)[0])


def test_the_name_under_which_it_is_stored_is_that_of_the_definition() -> None:
    names = {s.name for s in automation.nightly_schedules(registry.default_store())}
    assert {line.schedule for line in timetable.listing(ROOT)[0]} == names
    assert dg.DefaultScheduleStatus.STOPPED in {s.default_status for s in automation.nightly_schedules(ROOT)}
