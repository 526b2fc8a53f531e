"""When the next iteration runs by itself, and why it does not: pure rules over values, without Dagster.

The schedule asks :func:`decide` once per tick. ``evolve schedule list`` shows the reason that came out.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from datetime import datetime
from typing import Literal
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError

_FIELDS = (
    ("minute", "0 to 59"),
    ("hour", "0 to 23"),
    ("day of month", "1 to 31"),
    ("month", "1 to 12 or jan to dec"),
    ("day of week", "0 to 7 or sun to sat"),
)
_TERM = re.compile(r"(\*|\d+|[a-z]{3}|(?!(\w+)-\2\b)(\d+-\d+|[a-z]{3}-[a-z]{3}))(/\d+)?", re.ASCII | re.IGNORECASE)
"""What cronsim and Dagster read alike: no ``L``, ``W`` or ``#``, and no ``5-5``, which is every value to Dagster."""


def check_schedule(cron: str, timezone: str) -> str | None:
    """What is wrong with a cron expression of five fields or with the name of a time zone; None when nothing is."""
    return check_cron(cron) or check_timezone(timezone)


def check_cron(cron: str) -> str | None:
    """What is wrong with a cron expression (minute, hour, day of month, month, day of week); None when nothing is.

    Narrower than what cronsim reads: Dagster, which ticks by it, must understand the same.
    """
    parts = cron.split()
    if len(parts) != len(_FIELDS):
        return f"cron {cron!r}: five fields are wanted (minute, hour, day of month, month, day of week), e.g. '0 2 * * *'"
    for place, (part, (name, values)) in enumerate(zip(parts, _FIELDS, strict=True)):
        alone = " ".join(part if place == other else "*" for other in range(len(_FIELDS)))
        if not all(map(_TERM.fullmatch, part.split(","))) or not _reads(alone):
            return f"cron {cron!r}: {name} {part!r}: write {values}, `*`, `1-5`, `*/10` or a list of these with commas"
    if not _reads(f"* * {parts[2]} {parts[3]} *"):
        return f"cron {cron!r}: never happens: no such month has a day {parts[2]}"
    return None


def _reads(cron: str) -> bool:
    try:
        CronSim(cron, datetime(2026, 1, 1))
    except CronSimError:
        return False
    return True


def check_timezone(timezone: str) -> str | None:
    """What is wrong with the name of a time zone; None when nothing is."""
    try:
        ZoneInfo(timezone)
    except (KeyError, ValueError, OSError):  # unknown; a path or empty; a folder such as "Europe"
        return f"timezone {timezone!r}: no such name in the IANA database: write e.g. 'Europe/Berlin' or 'UTC'"
    return None


PREFIX = "nightly_"


def schedule_name(experiment: str) -> str:
    """The name of an experiment's schedule: ``pocket`` -> ``nightly_pocket``, ``a-b`` -> ``nightly_a_b_d44362``.

    Dagster's names know letters, digits and underscores only. A name with anything but letters and digits gets a part of its
    hash, so that none inherits from another (``a_b``) that it was switched on, and none loses it when another comes.
    """
    if experiment.isalnum():
        return PREFIX + experiment
    return f"{former_name(experiment)}_{hashlib.sha256(experiment.encode()).hexdigest()[:6]}"


def former_name(experiment: str) -> str:
    """What an earlier version called the schedule, where no two experiments met in it."""
    return PREFIX + re.sub(r"[.-]", "_", experiment)


@dataclass(frozen=True, slots=True)
class LastRun:
    """The newest run of the iteration that is next, now over."""

    id: str
    state: Literal["succeeded", "failed", "passing", "lost", "canceled"]
    """``failed``: a step said why. ``passing``: what it said may be over by now (a model, a judge or the mirror could not be
    asked, another run held the experiment, it was not its turn). ``lost``: the run never started, or its process died without
    a word."""
    step: str = ""
    """The step that failed."""
    acknowledged: bool = False
    """Whether the schedule was switched on after the run had ended: somebody has looked."""


@dataclass(frozen=True, slots=True)
class Situation:
    """What the schedule knows of an experiment at a tick."""

    experiment: str
    iterations: int
    """Where the experiment's file says that the lineage stops."""
    promoted: frozenset[int]
    """Iterations with a recorded decision of the gate."""
    running: str | None = None
    """Id of a run of the experiment that is queued, going on, or about to be tried again by Dagster."""
    missing: str | None = None
    """What the next iteration lacks under the present config, e.g. ``promotion[pocket|01]``."""
    last: LastRun | None = None
    """Newest run of the iteration that is next."""

    @property
    def following(self) -> int:
        """The first iteration that is not promoted."""
        return next(k for k in range(1, len(self.promoted) + 2) if k not in self.promoted)


@dataclass(frozen=True, slots=True)
class ScheduleDecision:
    """Run an iteration, or skip; and why."""

    iteration: int | None
    """None: skip."""
    reason: str


def decide(at: Situation) -> ScheduleDecision:
    """The next iteration of an experiment, or why there is none now.

    A failure that a step has explained waits for a person: the same night after night would give the same. What was lost or
    canceled, or failed for what passes, is tried again; the store resumes where it ended.
    """
    name, following = at.experiment, at.following
    if following == 1:
        return ScheduleDecision(
            None, f"{name}: iteration 1 is not promoted: run it by hand first (nothing starts that nobody started)"
        )
    if following > at.iterations:
        return ScheduleDecision(
            None, f"{name}: all {at.iterations} iterations are promoted: raise `iterations` in its file to go on"
        )
    if at.running:
        return ScheduleDecision(None, f"{name}: run {at.running[:8]} is going on")
    if at.missing:
        return ScheduleDecision(
            None, f"{name}: {at.missing} is missing or out of date under the present config: `evolve run` it first"
        )
    last = at.last
    if last is None or last.state == "succeeded":
        return ScheduleDecision(following, f"{name}: iteration {following} is next")
    if last.state == "failed" and not last.acknowledged:
        return ScheduleDecision(
            None,
            f"{name}: iteration {following} failed at {last.step or 'a step'} (run {last.id[:8]}): mend it, then run it by "
            f"hand or switch the schedule on again: evolve schedule on {name}",
        )
    return ScheduleDecision(following, f"{name}: iteration {following} again: {_told(last)}")


def _told(last: LastRun) -> str:
    if last.state == "passing":
        return f"run {last.id[:8]} failed at {last.step or 'a step'} for what may be over by now"
    return f"run {last.id[:8]} was {last.state}"
