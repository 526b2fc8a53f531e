"""Driving Dagster from the command line: the same assets, in this process, recorded in the instance that the UI shows."""

import os
import sqlite3
import warnings
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from dagster._core.errors import DagsterExecutionInterruptedError
from dagster._core.instance.ref import InstanceRef
from dagster._core.storage.tags import MAX_RETRIES_TAG
from evolve_dag.assets import automation, databases, handover, partitions, recovery
from evolve_dag.assets.resources import Session, StoreResource
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TaskID, TextColumn, TimeElapsedColumn

from evolve_dag.config import registry
from evolve_dag.config.loading import check_iterations
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import ConfigError, EvolveError, StoreError
from evolve_dag.steps import base
from evolve_dag.steps.needs import require_files
from evolve_dag.steps.preflight import preflight
from evolve_dag.store.artifacts import Store
from evolve_dag.store.disk import write_atomic
from evolve_dag.store.faults import chain, damaged_databases, explained, is_disk_error
from evolve_dag.store.mirror import open_store

LINEAGE_TAG = "evolve/experiment"
"""On every run that the command line starts; runs with it are over once their experiment's lock is free."""

MODULE = "evolve_dag.definitions"
LOCATION = "evolve_dag"
"""Name of the code location."""

INSTANCE: dict[str, Any] = {
    "concurrency": {
        "runs": {
            "max_concurrent_runs": 2,
            "tag_concurrency_limits": [
                {"key": partitions.EXPERIMENT_TAG, "value": {"applyLimitPerUniqueValue": True}, "limit": 1}
            ],
        }
    },
    "run_monitoring": {"enabled": True, "start_timeout_seconds": 180},
    "run_retries": {"enabled": True, "max_retries": 3, "retry_on_asset_or_op_failure": False},
    "telemetry": {"enabled": False},
    "nux": {"enabled": False},
}
"""The project's ``dagster.yaml`` without its storage block, for where the package is used without the project."""

QUIET = {"loggers": {"console": {"config": {"log_level": "CRITICAL"}}}}
NO_COMPUTE_LOGS = {
    "compute_logs": {"module": "dagster._core.storage.noop_compute_log_manager", "class": "NoOpComputeLogManager", "config": {}}
}
"""Capturing output costs a process a step and garbles progress bars; runs that the UI starts do capture it."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """What a run of the command line did."""

    experiment: Experiment
    iterations: int
    runs: int
    """Dagster runs of iterations; 0: everything was there and recorded."""
    recomputed: dict[tuple[int, str], bool]
    """(iteration, step) -> whether it had to be made, for every step of iterations 1..K."""


def prepare_home(root: Path) -> Path:
    """``DAGSTER_HOME``, or ``<store>/dagster`` with the project's settings when that is unset."""
    home = registry.dagster_home(root)
    try:
        home = home.resolve()
        home.mkdir(parents=True, exist_ok=True)
        target = home / "dagster.yaml"
        if not os.environ.get(registry.HOME_VARIABLE):
            project = Path("dagster.yaml")
            found = yaml.safe_load(project.read_text(encoding="utf-8")) if project.is_file() else None
            # Not every dagster.yaml in a working folder is ours: what it leaves open of what these assets need is set.
            own = found if isinstance(found, dict) else {}
            content = INSTANCE | {key: value for key, value in own.items() if key in INSTANCE}
            if not target.exists() or _is_ours(target, content):
                write_atomic(target, yaml.safe_dump(content, sort_keys=False).encode())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"dagster.yaml: not valid YAML: {error}", "mend it, or run from another folder") from None
    except OSError as error:
        raise StoreError(
            f"{home}: cannot be used as Dagster's home: {error}", "set DAGSTER_HOME or --store to a folder you may write"
        ) from None
    return home


def _is_ours(target: Path, content: dict[str, Any]) -> bool:
    """Whether settings were written by an earlier version of this package and never touched: ours, but fewer; or none."""
    present = yaml.safe_load(target.read_text(encoding="utf-8") or "{}")  # empty: left by a kill or a full disk
    if not isinstance(present, dict) or not present.keys() < content.keys():
        return False
    return all(content[key] == value for key, value in present.items())


@contextmanager
def open_instance(root: Path) -> Iterator[dg.DagsterInstance]:
    """The Dagster instance of a store.

    Raises:
        StoreError: a database of it is damaged, is none or was not made to the end; names the files.
        ConcurrencyError: another process makes them and does not come to an end.
    """
    home = prepare_home(root)
    databases.prepare(home)
    try:
        with dg.DagsterInstance.from_ref(InstanceRef.from_dir(str(home), overrides=NO_COMPUTE_LOGS)) as instance:
            yield instance
    except Exception as error:
        behind = list(chain(error))
        broken = next((one for one in behind if isinstance(one, sqlite3.Error)), None)
        if broken is None or any(isinstance(one, EvolveError) or is_disk_error(one) or "locked" in str(one) for one in behind):
            raise
        raise _broken_database(home, broken) from error


def _broken_database(home: Path, error: sqlite3.Error) -> StoreError:
    found = damaged_databases(home) or [home / "history", home / "schedules"]
    names = " and ".join(map(str, found))
    return StoreError(f"Dagster's database cannot be used: {error} ({names})", databases.remedy(home, found))


class ConsoleSession(Session):
    """The command line as the host of the steps: one lock for the whole command, one reading of the experiment, bars."""

    def __init__(self, experiment: Experiment, iterations: int, console: Console) -> None:
        self._experiment = experiment
        self._iterations = iterations
        self._console = console
        self.recomputed = {(k, name): False for k in range(1, iterations + 1) for name in base.STEP_ORDER}

    def experiment(self, root: Path, name: str) -> Experiment:
        return self._experiment if name == self._experiment.experiment else super().experiment(root, name)

    def lock(self, store: Store, name: str) -> AbstractContextManager[object]:
        return nullcontext() if name == self._experiment.experiment else super().lock(store, name)

    @contextmanager
    def step(self, name: str, iteration: int) -> Iterator[base.Progress | None]:
        if not self._console.is_terminal:
            yield None
            return
        columns = (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
        )
        with Progress(*columns, console=self._console, transient=True) as bars:
            yield Bars(bars, self._label(name, iteration))

    def finished(self, name: str, iteration: int, outcome: base.StepOutcome) -> None:
        self.recomputed[iteration, name] = outcome.recomputed
        how = f"{outcome.seconds:7.1f} s" if outcome.recomputed else "   reused"
        self._console.print(f"{self._label(name, iteration)} {how}  {outcome.artifact.digest[:12]}", highlight=False)

    def _label(self, name: str, iteration: int) -> str:
        return f"{self._experiment.experiment} {iteration}/{self._iterations} {name:<12}"


class Bars:
    """A step's progress as bars of rich, one a phase."""

    def __init__(self, bars: Progress, label: str) -> None:
        self._bars = bars
        self._label = label
        self._task: TaskID = bars.add_task(label, total=None)

    def start(self, label: str, total: int) -> None:
        self._bars.reset(self._task, description=f"{self._label} {label}", total=total)

    def advance(self, n: int = 1) -> None:
        self._bars.advance(self._task, n)

    def finish(self) -> None:
        self._bars.reset(self._task, description=self._label, total=None)


def run(config: Path, *, seed: int | None, iterations: int | None, root: Path, console: Console) -> RunResult:
    """Bring iterations 1..K of an experiment up to date; what is up to date already is not touched.

    Raises:
        EvolveError: with the message for the user; ConcurrencyError when another run holds the experiment.
        KeyboardInterrupt: the user has stopped it; the same command goes on from there.
    """
    try:
        return _run(config, seed=seed, iterations=iterations, root=root, console=console)
    except Exception as error:
        if os.environ.get("EVOLVE_DEBUG"):
            raise
        if type(error).__name__ == "DagsterAssetCheckFailedError":
            evidence = "the check's evidence is in the web interface (evolve ui) under the asset's checks"
            raise EvolveError(str(error), evidence) from None
        raise explained(error) from None


def _run(config: Path, *, seed: int | None, iterations: int | None, root: Path, console: Console) -> RunResult:
    experiment = registry.load_seeded(config, seed)
    count = iterations or experiment.iterations
    check_iterations(experiment, count)
    store = open_store(root)
    # Mistakes in the user's files and missing weights show here, before anything is written.
    require_files(experiment)
    first = base.resolve_iteration(experiment, 1, store)
    if not all(step.exists for step in first.values()):
        preflight(experiment, 1, store)
        handover.check(experiment)
    name = experiment.experiment
    session = ConsoleSession(experiment, count, console)
    with store.lock(name), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Dagster's notes to developers
        registry.register(root, config, seed)
        with open_instance(root) as instance:
            _end_dead_runs(instance, name)
            recovery.clear_locks(instance, root)
            partitions.add_partitions(instance, [name], count)
            if any(True for _ in automation.settings_events(instance, experiment, store)):
                _execute(root, session, instance, automation.settings_job.name, name, name)
            runs = 0
            for k in range(1, count + 1):
                if not is_up_to_date(name, base.resolve_iteration(experiment, k, store), store, instance):
                    _execute(root, session, instance, automation.iteration_job.name, partitions.loop_key(name, k), name)
                    runs += 1
    return RunResult(experiment, count, runs, session.recomputed)


def is_up_to_date(
    name: str, iteration: Mapping[str, base.Resolved], store: Store, instance: dg.DagsterInstance, *, verify: bool = True
) -> bool:
    """Whether every artifact of an iteration is there, is what the lineage refers to, and Dagster has it on record.

    Args:
        name: of the experiment.
        iteration: step -> what is expected of it.
        verify: read every byte; else a damaged file shows only where it is read next.

    Raises:
        StoreError: with ``verify``, when an artifact is damaged.
    """
    for step, expected in iteration.items():
        if expected.digest is None or not expected.exists:
            return False
        store.open(step, expected.digest, verify=verify)  # a damaged one must be told, not passed over
        ref = store.ref(name, expected.iteration, step)
        if ref is None or ref.digest != expected.digest:
            return False
        key = partitions.loop_key(name, expected.iteration)
        if automation.recorded_version(instance, dg.AssetKey(step), key) != expected.digest:
            return False
    return True


def _execute(root: Path, session: Session, instance: dg.DagsterInstance, job: str, partition: str, name: str) -> None:
    from evolve_dag.assets.location import build

    definitions = build(StoreResource(root=str(root)), session)
    try:
        definitions.resolve_job_def(job).execute_in_process(
            instance=instance,
            partition_key=partition,
            run_config=QUIET,
            tags={LINEAGE_TAG: name, MAX_RETRIES_TAG: "0"},  # whoever gave the command gives it again
        )
    except DagsterExecutionInterruptedError:
        raise KeyboardInterrupt from None


def _end_dead_runs(instance: dg.DagsterInstance, name: str) -> None:
    """A killed command leaves its run 'started' for ever, and the queue would wait for it. We hold the lock: it is dead."""
    for dead in instance.get_runs(dg.RunsFilter(statuses=recovery.IN_PROGRESS, tags={LINEAGE_TAG: name})):
        instance.report_run_failed(dead, f"the command that ran {name} ended without a word (killed?)")


def found_workspace(home: Path) -> Path | None:
    """The ``workspace.yaml`` of the working folder or of Dagster's home that is about these assets; None: neither is."""
    for path in (Path("workspace.yaml"), home / "workspace.yaml"):
        if path.is_file() and LOCATION in path.read_text(encoding="utf-8", errors="replace") and not _wrote(path):
            return path.resolve()
    return None


def own_workspace() -> dict[str, Any]:
    """The workspace for where there is none; its code location has the name of the project's own, under which the state of
    schedules and sensors is stored."""
    module = {"module_name": MODULE, "attribute": "defs", "location_name": LOCATION, "working_directory": str(Path.cwd())}
    return {"load_from": [{"python_module": module}]}


def workspace_file(root: Path) -> Path:
    """The workspace that ``evolve ui`` loads: what is found, else one of our own, written to the store.

    Raises:
        StoreError: it cannot be written.
    """
    found = found_workspace(prepare_home(root))
    if found is not None:
        return found
    own = root.resolve() / "dagster" / "evolve_workspace.yaml"
    try:
        own.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(own, yaml.safe_dump(own_workspace(), sort_keys=False).encode())
    except OSError as error:
        raise StoreError(f"{own}: cannot be written: {error}", "check the folder's permissions and free space") from None
    return own


def _wrote(path: Path) -> bool:
    """Whether an earlier version has written it, for whatever working folder that was in."""
    try:
        [entry] = yaml.safe_load(path.read_text(encoding="utf-8"))["load_from"]
        [own] = own_workspace()["load_from"]
        where = entry["python_module"]["working_directory"]
        return bool(entry == {"python_module": own["python_module"] | {"working_directory": where}})
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
        return False
