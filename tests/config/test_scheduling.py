"""Cron and time zone as Dagster understands them, names of schedules, and the decision of a tick."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from itertools import islice

import pytest
from cronsim import CronSim
from dagster._core.definitions.utils import is_valid_name
from dagster._utils.schedules import is_valid_cron_schedule, schedule_execution_time_iterator
from hypothesis import given, settings
from hypothesis import strategies as st

from evolve_dag.config.scheduling import (
    LastRun,
    ScheduleDecision,
    Situation,
    check_schedule,
    decide,
    former_name,
    schedule_name,
)

LIMITS = ((0, 59), (0, 23), (1, 31), (1, 12), (0, 6))


@st.composite
def fields(draw: st.DrawFn, low: int, high: int) -> str:
    """One cron field in the forms that we promise."""
    number = st.integers(low, high)
    ranges = st.tuples(number, number).map(sorted)
    item = st.one_of(
        st.just("*"),
        number.map(str),
        ranges.map(lambda r: f"{r[0]}-{r[1]}"),
        st.integers(1, high).map(lambda n: f"*/{n}"),
        st.tuples(ranges, st.integers(1, high)).map(lambda x: f"{x[0][0]}-{x[0][1]}/{x[1]}"),
    )
    return ",".join(draw(st.lists(item, min_size=1, max_size=3)))


@given(st.tuples(*(fields(low, high) for low, high in LIMITS)))
def test_what_we_accept_dagster_accepts_and_it_ticks(parts: tuple[str, ...]) -> None:
    cron = " ".join(parts)
    if check_schedule(cron, "UTC") is None:
        assert is_valid_cron_schedule(cron)
        assert next(iter(schedule_execution_time_iterator(1_700_000_000, cron, "UTC"))).timestamp() >= 1_700_000_000
    else:
        told = str(check_schedule(cron, "UTC"))
        assert "never happens" in told or re.search(r"\b(\d+)-\1\b", cron), "what else is wrong with it"


TOKENS = st.sampled_from(
    ["*", "0", "1", "5", "7", "31", "60", "-", "/", ",", "mon", "FRI", "jan", "L", "W", "#", "?", "x", "٣"]
)


@given(st.lists(st.lists(TOKENS, min_size=1, max_size=4).map("".join), min_size=4, max_size=6).map(" ".join))
def test_nothing_that_dagster_would_refuse_passes(cron: str) -> None:
    if check_schedule(cron, "UTC") is None:
        assert is_valid_cron_schedule(cron)


@settings(deadline=None)
@given(st.tuples(*(fields(low, high) for low, high in LIMITS)), st.booleans(), st.integers(1_600_000_000, 1_900_000_000))
def test_cronsim_ticks_as_dagster_does(parts: tuple[str, ...], weekly: bool, start: int) -> None:
    """Which of day and weekday decide where one of them is ``*/2`` is read in two ways; where one is ``*`` it cannot be."""
    day, weekday = ("*", parts[4]) if weekly else (parts[2], "*")
    cron = " ".join((parts[0], parts[1], day, parts[3], weekday))
    if check_schedule(cron, "UTC") is not None:
        return
    dagsters = schedule_execution_time_iterator(start, cron, "UTC")
    cronsims = CronSim(cron, datetime.fromtimestamp(start - 1, UTC))
    assert [moment.timestamp() for moment in islice(dagsters, 3)] == [moment.timestamp() for moment in islice(cronsims, 3)]


@pytest.mark.parametrize(
    ("cron", "says"),
    [
        ("0 2 * *", "five fields"),
        ("0 0 2 * * *", "five fields"),
        ("", "five fields"),
        ("@daily", "five fields"),
        ("60 2 * * *", "minute '60': write 0 to 59"),
        ("0 24 * * *", "hour '24': write 0 to 23"),
        ("0 2 0 * *", "day of month '0': write 1 to 31"),
        ("0 2 * 13 *", "month '13': write 1 to 12"),
        ("0 2 * * mondays", "day of week 'mondays': write 0 to 7"),
        ("0 2 * * fri-mon", "day of week 'fri-mon'"),
        ("*/0 * * * *", "minute '*/0'"),
        ("every night * * *", "minute 'every'"),
        ("0 2 L * *", "day of month 'L'"),
        ("0 2 * * 5L", "day of week '5L'"),
        ("0 2 * * 5#2", "day of week '5#2'"),
        ("0 5-5 * * *", "hour '5-5'"),  # Dagster would tick every hour
        ("0 2 * * mon-1", "day of week 'mon-1'"),
        ("0 ٣ * * *", "hour '٣'"),
        ("0 2 30 2 *", "never happens: no such month has a day 30"),
        ("0 2 31 4,6,9,11 *", "never happens"),
        ("0 2 31 2 mon", "never happens"),
    ],
)
def test_a_wrong_cron_is_told_with_its_field(cron: str, says: str) -> None:
    assert says in str(check_schedule(cron, "UTC"))


@pytest.mark.parametrize("cron", ["0 2 * * *", "*/5 8-18 * * mon-fri", "0 2 29 2 *", "0 2 31 1,4 *", "0 0 * jan SUN"])
def test_a_good_cron_is_accepted_and_by_dagster_too(cron: str) -> None:
    assert check_schedule(cron, "Europe/Berlin") is None
    assert is_valid_cron_schedule(cron)


@pytest.mark.parametrize("timezone", ["", "Europe/Berlyn", "Europe", "/etc/passwd", "../UTC", "CEST+2"])
def test_a_wrong_time_zone_is_told(timezone: str) -> None:
    assert "IANA" in str(check_schedule("0 2 * * *", timezone))


experiments = st.text("ab-._", min_size=1, max_size=4).map(lambda text: "e" + text)


@given(st.sets(experiments, max_size=8))
def test_schedules_have_names_of_their_own_that_dagster_accepts(names: set[str]) -> None:
    found = {schedule_name(name) for name in names}
    assert len(found) == len(names), "none inherits the schedule of another"
    assert all(is_valid_name(schedule) and schedule.startswith("nightly_") for schedule in found)


@given(st.sets(experiments, max_size=8))
def test_no_name_of_an_earlier_version_is_another_experiments_now(names: set[str]) -> None:
    now = {schedule_name(name): name for name in names}
    assert all(now.get(former_name(name), name) == name for name in names)


def test_names_read_as_people_write_them() -> None:
    assert schedule_name("pocket") == "nightly_pocket"
    assert schedule_name("own_corpus") == "nightly_own_corpus_785e91"
    assert schedule_name("a-b") == "nightly_a_b_d44362"


def at(**changes: object) -> Situation:
    return Situation(**{"experiment": "tiny", "iterations": 3, "promoted": frozenset({1}), **changes})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("situation", "iteration", "reason"),
    [
        (at(), 2, "iteration 2 is next"),
        (at(promoted=frozenset()), None, "run it by hand first"),
        (at(promoted=frozenset({2, 3})), None, "iteration 1 is not promoted"),
        (at(promoted=frozenset({1, 3})), 2, "iteration 2 is next"),
        (at(promoted=frozenset({1, 2, 3})), None, "all 3 iterations are promoted"),
        (at(running="0123456789"), None, "run 01234567 is going on"),
        (at(missing="promotion[tiny|01]"), None, "promotion[tiny|01] is missing or out of date"),
        (at(last=LastRun("0123456789", "failed", "adapter")), None, "failed at adapter (run 01234567): mend it"),
        (at(last=LastRun("0123456789", "failed", "adapter", acknowledged=True)), 2, "again: run 01234567 was failed"),
        (at(last=LastRun("0123456789", "passing", "scores")), 2, "run 01234567 failed at scores for what may be over by now"),
        (at(last=LastRun("0123456789", "lost")), 2, "again: run 01234567 was lost"),
        (at(last=LastRun("0123456789", "canceled")), 2, "again: run 01234567 was canceled"),
        (at(last=LastRun("0123456789", "succeeded")), 2, "iteration 2 is next"),
    ],
)
def test_a_tick_decides_and_says_why(situation: Situation, iteration: int | None, reason: str) -> None:
    decision = decide(situation)
    assert decision.iteration == iteration
    assert reason in decision.reason
    assert decision.reason.startswith("tiny: ")


@given(st.frozensets(st.integers(1, 6)), st.integers(1, 6), st.booleans())
def test_an_iteration_starts_only_in_order_and_never_past_the_last(promoted: frozenset[int], last: int, busy: bool) -> None:
    decision: ScheduleDecision = decide(at(promoted=promoted, iterations=last, running="0123456789" if busy else None))
    if decision.iteration is not None:
        assert not busy
        assert decision.iteration <= last
        assert decision.iteration not in promoted
        assert set(range(1, decision.iteration)) <= promoted
