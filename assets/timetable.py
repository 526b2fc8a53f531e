"""``evolve schedule``: the schedules of the experiments, switched on the instance itself; no web interface need run."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import dagster as dg
import yaml
from dagster._check import CheckError
from dagster._core.remote_origin import CodeLocationOrigin
from dagster._core.remote_representation.external import RemoteSchedule
from dagster._core.remote_representation.external_data import ScheduleSnap
from dagster._core.remote_representation.handle import RepositoryHandle
from dagster._core.scheduler.instigation import InstigatorState, InstigatorTick, ScheduleInstigatorData, TickStatus
from dagster._core.workspace.load import location_origins_from_config, location_origins_from_yaml_paths
from dagster._time import get_current_timestamp
from dagster._utils.schedules import schedule_execution_time_iterator
from evolve_dag.assets import automation, launch, switches

from evolve_dag.config import registry, scheduling
from evolve_dag.config.schema import Experiment, ScheduleSettings
from evolve_dag.errors import ConfigError

DAEMON_SECONDS = 120.0
"""A daemon that was not heard of for longer than this counts as stopped."""
OVERDUE_SECONDS = 300.0
"""A tick that is due for longer than this was missed; a daemon makes it within seconds, after a pause within a minute."""


@dataclass(frozen=True, slots=True)
class Line:
    """One experiment's schedule as people see it."""

    experiment: str
    schedule: str
    """Name in Dagster."""
    on: bool
    cron: str
    timezone: str
    next_tick: datetime | None
    """In the schedule's own time zone; None while it is off."""
    decided: datetime | None
    """When it last decided; None: never."""
    decision: str
    """The last decision with its reason; empty: never."""
    problem: str = ""
    """What keeps it from running, e.g. a wrong time zone."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON values; times in ISO 8601 with their offset."""
        return {k: v.isoformat() if isinstance(v, datetime) else v for k, v in asdict(self).items()}


def listing(root: Path) -> tuple[list[Line], list[str]]:
    """All schedules, and what is wrong with the experiment files that are left out."""
    experiments, problems = automation.known_experiments(root)
    with launch.open_instance(root) as instance:
        known = {entry.name for entry in registry.entries(root)}
        switches.carry_over(instance, known | {e.experiment for e in experiments})
        origin = _origin(root)
        lines = [_line(instance, experiment, origin) for experiment in experiments]
        on = switches.switched_on(instance)
        for name in known - {e.experiment for e in experiments}:
            state = on.get(scheduling.schedule_name(name))
            if state is not None:
                lines.append(_left_on(name, state))
    return sorted(lines, key=lambda line: line.experiment), problems


def _line(instance: dg.DagsterInstance, experiment: Experiment, origin: CodeLocationOrigin) -> Line:
    name, settings = experiment.experiment, experiment.schedule
    remote = _remote(scheduling.schedule_name(name), settings.cron, settings.timezone, origin)
    problem = scheduling.check_schedule(settings.cron, settings.timezone) or ""
    state = instance.get_instigator_state(remote.get_remote_origin_id(), remote.selector_id)
    on = state is not None and state.is_running
    data = state.instigator_data if state is not None else None
    ticks = instance.get_ticks(remote.get_remote_origin_id(), remote.selector_id, limit=1)
    tick = ticks[0] if ticks else None
    if on and not problem and isinstance(data, ScheduleInstigatorData):
        if data.cron_schedule != settings.cron:
            problem = f"switched on with cron {data.cron_schedule!r}: reload the code location, then switch it on again"
        else:
            problem = _overdue(instance, settings, data, tick)
    return Line(
        name,
        remote.name,
        on,
        settings.cron,
        settings.timezone,
        _next(settings, get_current_timestamp()) if on and not problem else None,
        datetime.fromtimestamp(tick.timestamp, _zone(settings.timezone)) if tick is not None else None,
        _said(instance, tick) if tick is not None else "",
        problem,
    )


def _left_on(name: str, state: InstigatorState) -> Line:
    """A schedule that is on and whose experiment file is gone or has a mistake."""
    data = state.instigator_data
    cron = str(data.cron_schedule) if isinstance(data, ScheduleInstigatorData) else ""
    problem = f"on, and its file is gone or has a mistake: mend it, or switch it off: evolve schedule off {name}"
    return Line(name, state.name, True, cron, "", None, None, "", problem)


def switch_on(root: Path, name: str) -> tuple[Line, list[str]]:
    """Switch an experiment's schedule on; returns it and what else has to be done for it to work.

    Switching on what is on already acknowledges an earlier failure: the next tick tries the iteration again.

    Raises:
        ConfigError: no such experiment, its file is wrong, or its cron or time zone.
    """
    experiment = registry.load(root, name)
    settings = experiment.schedule
    problem = scheduling.check_schedule(settings.cron, settings.timezone)
    if problem:
        raise ConfigError(f"schedule of {name}: {problem}", "mend `schedule:` in the experiment file")
    with launch.open_instance(root) as instance:
        origin = _origin(root)
        remote = _remote(scheduling.schedule_name(name), settings.cron, settings.timezone, origin)
        # Off first: Dagster then notes a new moment of switching on, by which a failure is acknowledged.
        instance.stop_schedule(remote.get_remote_origin_id(), remote.selector_id, remote)
        instance.start_schedule(remote)
        return _line(instance, experiment, origin), [*_idle(instance, experiment), *_notes(instance)]


def switch_off(root: Path, name: str) -> None:
    """Switch an experiment's schedule off, whatever its file has come to; one that is off stays so.

    Raises:
        ConfigError: no such experiment.
    """
    known = {entry.name for entry in registry.entries(root)} | {e.experiment for e in automation.known_experiments(root)[0]}
    with launch.open_instance(root) as instance:
        switches.carry_over(instance, known)
        if not switches.switch_off(instance, name) and name not in known:
            registry.entry_of(root, name)  # tells that there is none


def _idle(instance: dg.DagsterInstance, experiment: Experiment) -> Iterator[str]:
    """Why no tick will run anything, until somebody changes something."""
    name, iterations = experiment.experiment, experiment.iterations
    at = scheduling.Situation(name, iterations, frozenset(automation.promoted_iterations(instance, name)))
    if not 1 < at.following <= iterations:
        yield scheduling.decide(at).reason


def _notes(instance: dg.DagsterInstance) -> Iterator[str]:
    if not _ticks(instance):
        yield "nothing ticks yet: start it with `evolve ui`, and leave that running"
        return
    yield "what is newer than the running `evolve ui` (experiment, cron, time zone) is seen after a reload of its code location"


def _ticks(instance: dg.DagsterInstance) -> bool:
    """Whether a daemon that makes the ticks was heard of just now."""
    beat = instance.get_daemon_heartbeats().get("SCHEDULER")
    return beat is not None and get_current_timestamp() - beat.timestamp <= DAEMON_SECONDS


def _origin(root: Path) -> CodeLocationOrigin:
    """The code location of the workspace that ``evolve ui`` or the daemon loads; a schedule's state is stored under its name.

    Where the workspace gives it the usual name nothing else of it is read: it may name variables that only its servers have.
    """
    file = launch.found_workspace(launch.prepare_home(root))
    own = location_origins_from_config(launch.own_workspace(), str(file))[launch.LOCATION]
    if file is None:
        return own
    try:
        locations = [one for entry in yaml.safe_load(file.read_text(encoding="utf-8"))["load_from"] for one in entry.values()]
        if any(isinstance(one, dict) and one.get("location_name") == launch.LOCATION for one in locations):
            return own
        return location_origins_from_yaml_paths([str(file)])[0]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError, CheckError, dg.DagsterError) as error:
        remedy = f"mend it, or name its code location: location_name: {launch.LOCATION}"
        raise ConfigError(f"{file}: not a workspace that can be read: {error}", remedy) from None


def _remote(schedule: str, cron: str, timezone: str, origin: CodeLocationOrigin) -> RemoteSchedule:
    """A schedule as the daemon sees it, without starting a code server (10 s) to ask for it."""
    snap = ScheduleSnap(
        name=schedule,
        cron_schedule=cron,
        job_name=automation.iteration_job.name,
        op_selection=None,
        mode=None,
        environment_vars=None,
        partition_set_name=None,
        execution_timezone=timezone,
        default_status=dg.DefaultScheduleStatus.STOPPED,
    )
    handle = RepositoryHandle(
        repository_name="__repository__", code_location_origin=origin, repository_python_origin=None, display_metadata={}
    )
    return RemoteSchedule(snap, handle)


def _zone(timezone: str) -> ZoneInfo:
    return ZoneInfo("UTC" if scheduling.check_timezone(timezone) else timezone)


def _next(settings: ScheduleSettings, after: float) -> datetime:
    times = schedule_execution_time_iterator(after, settings.cron, settings.timezone)
    return next(iter(times)).astimezone(_zone(settings.timezone))


def _overdue(
    instance: dg.DagsterInstance, settings: ScheduleSettings, data: ScheduleInstigatorData, tick: InstigatorTick | None
) -> str:
    """What keeps a schedule that is on from ticking; empty while no tick was missed."""
    seen = (data.start_timestamp or 0.0, data.last_iteration_timestamp or 0.0, tick.timestamp if tick is not None else 0.0)
    due = _next(settings, max(seen) + 1)
    if get_current_timestamp() - due.timestamp() < OVERDUE_SECONDS:
        return ""
    # The daemon ticks what the code location had when it was loaded: a file that had a mistake then is not among it.
    remedy = "reload the code location" if _ticks(instance) else "nothing ticks: start it with `evolve ui`"
    return f"no tick since {due:%Y-%m-%d %H:%M}, when one was due: {remedy}"


def _said(instance: dg.DagsterInstance, tick: InstigatorTick) -> str:
    if tick.status == TickStatus.SKIPPED:
        return f"skipped: {tick.skip_reason or 'no reason given'}"
    if tick.status == TickStatus.FAILURE:
        return f"failed: {tick.error.message.strip() if tick.error else 'no message'}"
    if tick.status == TickStatus.STARTED and not tick.run_ids:
        return "deciding"
    runs = [run for run in (instance.get_run_by_id(run_id) for run_id in tick.run_ids) if run is not None]
    return "; ".join(
        f"run {run.run_id[:8]} of {run.tags.get('dagster/partition')}: {run.status.value.lower()}" for run in runs
    ) or ("asked for a run that is gone")
