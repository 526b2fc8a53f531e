"""The order of work: whole seeds first, nothing side by side that would be made twice, an honest rest."""

from __future__ import annotations

from pathlib import Path

import pytest
from studies import study

from evolve_dag.steps.base import STEP_ORDER, resolve_iteration
from evolve_dag.store.artifacts import Store
from evolve_dag.study.agenda import Agenda, Pace, Unit
from evolve_dag.study.definition import Study

ARMS = {
    "plain": "arm.yaml",
    "lexical": {"config": "arm.yaml", "set": {"selection": {"selector": "lexical"}}},
    "greedy": {"config": "arm.yaml", "set": {"rollout": {"temperature": 0.0}}},
}


@pytest.fixture
def agenda(tmp_path: Path) -> Agenda:
    return Agenda(study(tmp_path, arms=ARMS), Store(tmp_path / "store"), {})


def named(unit: Unit | None) -> str | None:
    return None if unit is None else f"{unit.cell.arm} {unit.cell.seed} {unit.iteration}"


def exist(store: Store, found: Study, cell: int, steps: tuple[str, ...]) -> None:
    """Make folders as if the steps of a cell's first iteration had been made."""
    for name, one in resolve_iteration(found.cells[cell].experiment, 1, store).items():
        if name in steps:
            store.folder(name, str(one.digest)).mkdir(parents=True)


def test_what_would_be_made_twice_waits_while_there_is_something_else(agenda: Agenda) -> None:
    assert named(agenda.take()) == "plain 4 1"
    assert named(agenda.take()) == "greedy 4 1", "lexical 4 needs the trajectories that plain 4 makes"
    assert [named(agenda.take()) for _ in range(2)] == ["plain 5 1", "greedy 5 1"]
    assert named(agenda.take()) == "lexical 4 1", "with nothing else to do the store's lock sorts it out"


def test_arms_go_side_by_side_once_what_they_share_is_there(tmp_path: Path) -> None:
    found, store = study(tmp_path, arms=ARMS), Store(tmp_path / "store")
    agenda = Agenda(found, store, {})
    assert named(agenda.take()) == "plain 4 1"
    exist(store, found, 0, ("trajectories", "experience"))
    assert named(agenda.take()) == "lexical 4 1"


def test_a_cell_goes_on_iteration_by_iteration_and_a_failed_one_not_at_all(agenda: Agenda) -> None:
    first = agenda.take()
    agenda.finish(first, {"policy": 1.0})
    assert (agenda.done, agenda.total) == (1, 12)
    second = agenda.take()
    assert named(second) == "lexical 4 1", "all arms of a seed before the next iteration"
    agenda.finish(second, {}, "no room")
    assert agenda.failed == {"tiny.lexical-s4": "no room"}
    units = []
    while (unit := agenda.take()) is not None:
        units.append(named(unit))
        agenda.finish(unit, {})
    assert len(units) == len(set(units)) == 12 - 1 - 2
    assert units.index("plain 4 2") < units.index("plain 5 1"), "seed by seed"
    assert agenda.done == 10
    assert not any(name.startswith("lexical 4") for name in units)


def test_what_was_done_before_is_not_done_again(tmp_path: Path) -> None:
    found = study(tmp_path)
    agenda = Agenda(found, Store(tmp_path / "store"), {cell.name: 2 for cell in found.cells[:3]} | {found.cells[3].name: 1})
    assert (agenda.done, agenda.unfinished) == (7, 1)
    unit = agenda.take()
    assert named(unit) == "greedy 5 2"
    assert agenda.take() is None


def test_the_time_left_is_not_guessed_before_anything_was_timed(agenda: Agenda) -> None:
    assert agenda.seconds_left(2) is None
    unit = agenda.take()
    agenda.finish(unit, dict.fromkeys(STEP_ORDER, 10.0))
    assert agenda.seconds_left(1) == pytest.approx(11 * 70)
    assert agenda.seconds_left(2) == pytest.approx(11 * 70 / 2)
    assert agenda.seconds_left(99) == pytest.approx(140), "two iterations of one cell follow one another"


def test_what_is_shared_costs_no_time(tmp_path: Path) -> None:
    found, store = study(tmp_path, arms={name: ARMS[name] for name in ("plain", "lexical")}, seeds=[4], iterations=1), None
    store = Store(tmp_path / "store")
    agenda = Agenda(found, store, {})
    exist(store, found, 0, STEP_ORDER)
    agenda.finish(agenda.take(), dict.fromkeys(STEP_ORDER, 10.0))
    assert agenda.seconds_left(1) == pytest.approx(40), "contexts, adapter, scores, promotion of the other arm"


def test_an_arm_is_expected_to_take_what_it_took(tmp_path: Path) -> None:
    pace = Pace()
    assert pace.expected("a", "adapter") is None
    pace.observe("a", "adapter", 10.0)
    pace.observe("a", "adapter", 20.0)
    assert pace.expected("a", "adapter") == 15.0
    assert pace.expected("b", "adapter") == 15.0, "as others, until it has one of its own"
    pace.observe("b", "adapter", 100.0)
    assert pace.expected("b", "adapter") == 100.0
