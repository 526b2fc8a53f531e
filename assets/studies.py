"""Running a study: its cells side by side, each iteration as `evolve run` would, in processes that can fail alone."""

import faulthandler
import multiprocessing as mp
import os
import signal
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass
from itertools import cycle, takewhile
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnContext
from pathlib import Path
from typing import NamedTuple

from evolve_dag.assets import launch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from evolve_dag.errors import EvolveError
from evolve_dag.reporting.summary import duration
from evolve_dag.steps import base
from evolve_dag.store.artifacts import Store
from evolve_dag.store.faults import explained
from evolve_dag.store.locks import locked
from evolve_dag.store.mirror import open_store
from evolve_dag.study import devices, files
from evolve_dag.study.agenda import Agenda, Unit
from evolve_dag.study.definition import Study

START = "spawn"
"""How workers start: a fork of a process with threads (polars, torch) can hang."""
LOOK_SECONDS = 2.0
"""Between two looks at how far the units are that go on."""


class Job(NamedTuple):
    """What a worker is asked for: one iteration of one experiment."""

    root: Path
    file: Path
    """Experiment file of the cell."""
    iteration: int
    log: Path


class Done(NamedTuple):
    """What became of a job."""

    made: dict[str, float]
    """Step -> seconds, of the artifacts that were made."""
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Finished:
    """What became of a study."""

    iterations: int
    """Iterations that are up to date now."""
    made: int
    """Of them, how many this command worked on."""
    failed: dict[str, str]
    """Lineage -> why it could not be finished."""


def run(study: Study, root: Path, console: Console, work: Callable[[Job], Done] | None = None) -> Finished:
    """Bring every cell up to date. Killed at any moment, the same call goes on from there.

    A cell that fails costs the rest of its own iterations only.

    Args:
        work: what a worker does with a job; another one in tests.

    Raises:
        EvolveError: nothing ran: a lineage's name is taken, the store cannot be written, another process runs this study.
        KeyboardInterrupt: the user has stopped it; no worker is left.
    """
    store = open_store(root)
    with locked(root, f"study-{study.name}", f"study {study.name!r} is being run", 0.0):
        files.write(root, study)
        agenda = Agenda(study, store, dict(_up_to_date(study, root, store)))
        _remember(agenda, study, store)
        before = agenda.done
        with ExitStack() as stack:
            show = stack.enter_context(_progress(study, agenda, console))
            crew = stack.enter_context(_crew(min(study.settings.processes, agenda.unfinished), study, work or do))
            _work_off(study, agenda, crew, root, show)
    return Finished(agenda.done, agenda.done - before, dict(agenda.failed))


def _up_to_date(study: Study, root: Path, store: Store) -> Iterator[tuple[str, int]]:
    """Cell's name -> its leading iterations that are there and on Dagster's record."""
    with warnings.catch_warnings(), launch.open_instance(root) as instance:
        warnings.simplefilter("ignore")  # Dagster's notes to developers
        for cell in study.cells:
            lineage = base.resolve_lineage(cell.experiment, cell.iterations, store)
            current = (launch.is_up_to_date(cell.name, iteration, store, instance, verify=False) for iteration in lineage)
            yield cell.name, sum(1 for _ in takewhile(bool, current))


def _remember(agenda: Agenda, study: Study, store: Store) -> None:
    """How long the artifacts of the study took that are on this machine already."""
    for cell in study.cells:
        for ref in store.refs(cell.name):
            if store.folder(ref.kind, ref.digest).is_dir():
                manifest = store.read(ref.kind, ref.digest).manifest
                if not manifest.resumed:
                    agenda.pace.observe(cell.arm, ref.kind, manifest.seconds)


def _work_off(study: Study, agenda: Agenda, crew: "list[Worker]", root: Path, show: "Show") -> None:
    idle, busy = list(crew), dict[Worker, Unit]()
    while True:
        while idle and (unit := agenda.take()) is not None:
            worker = idle.pop()
            busy[worker] = unit
            worker.begin(Job(root, files.cell_file(root, study, unit.cell), unit.iteration, files.logs(root, study, unit.cell)))
        if not busy:
            return
        for worker in _ready(busy):
            unit = busy.pop(worker)
            done = worker.outcome()
            agenda.finish(unit, done.made, done.failure)
            show.finished(unit, done)
            idle.append(worker)
        show.look()


def _ready(busy: "dict[Worker, Unit]") -> "list[Worker]":
    """Workers that have answered or died, after a short wait."""
    ends: dict[object, Worker] = {}
    for worker in busy:
        ends[worker.connection] = ends[worker.process.sentinel] = worker
    return list(dict.fromkeys(ends[end] for end in wait(list(ends), LOOK_SECONDS)))  # type: ignore[arg-type]


# -- a worker


class Worker:
    """A process that does one job after another; when it dies, a new one takes its place."""

    def __init__(self, work: Callable[[Job], Done], gpus: str | None = None) -> None:
        self._work = work
        self._gpus = gpus
        self._busy = False
        self._start()

    def _start(self) -> None:
        context: SpawnContext = mp.get_context(START)  # type: ignore[assignment]
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self._work, self._gpus), daemon=True)
        self.process.start()
        theirs.close()

    def begin(self, job: Job) -> None:
        """Hand over a job."""
        if not self.process.is_alive():
            self._start()
        self._log, self._busy = job.log, True
        with suppress(ConnectionError):  # it has died since: its outcome tells
            self.connection.send(job)

    def outcome(self) -> Done:
        """What became of the job that it had."""
        self._busy = False
        try:
            done: Done = self.connection.recv()
        except (EOFError, OSError):  # the second: it died with the job unread, or in the middle of its answer
            self.process.join()
            code = self.process.exitcode or 0
            how = f"killed by signal {-code} ({signal.Signals(-code).name})" if code < 0 else f"ended with exit code {code}"
            remedy = "give the command again; if it was out of memory, with fewer `processes`"
            return Done({}, str(EvolveError(f"the process that worked on it was {how} (its words: {self._log})", remedy)))
        return done

    def end(self) -> None:
        """An idle one leaves by itself and cleans up; one at work is killed: the next command resumes what it was doing."""
        self.connection.close()
        if self._busy:
            self.process.kill()
        self.process.join()


@contextmanager
def _crew(count: int, study: Study, work: Callable[[Job], Done]) -> Iterator[list[Worker]]:
    # Read when the libraries are loaded, so before: more threads than asked for only wait for each other.
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "POLARS_MAX_THREADS"):
        os.environ[name] = str(study.settings.threads)
    gpus = cycle(devices.shares(study) or (None,))
    crew = [Worker(work, own) for own, _ in zip(gpus, range(count), strict=False)]
    try:
        yield crew
    finally:
        for worker in crew:
            worker.end()


def _serve(connection: Connection, work: Callable[[Job], Done], gpus: str | None) -> None:
    """Body of a worker's process; it ends with its parent, however that went."""
    if gpus is not None:
        os.environ[devices.VISIBLE] = gpus
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C goes to the whole group: the parent ends its workers
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            job: Job = connection.recv()
        except EOFError:
            return
        connection.send(work(job))


def _end_with_parent() -> None:
    parent = mp.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def do(job: Job) -> Done:
    """Bring an experiment up to an iteration, as `evolve run` does; what is said on the way goes to the job's log."""
    with job.log.open("a", encoding="utf-8", buffering=1) as log:
        _speak_into(log.fileno())
        faulthandler.enable(log)
        try:
            result = launch.run(
                job.file, seed=None, iterations=job.iteration, root=job.root, console=Console(file=log, width=120)
            )
        except BaseException as error:
            failure = error if isinstance(error, EvolveError) else explained(error)
            log.write(f"error: {failure}\n")
            return Done({}, str(failure))
        finally:
            faulthandler.disable()
        store = open_store(job.root)
        made = [name for (k, name), recomputed in result.recomputed.items() if k == job.iteration and recomputed]
        refs = (store.ref(result.experiment.experiment, job.iteration, name) for name in made)
        return Done({ref.kind: store.read(ref.kind, ref.digest).manifest.seconds for ref in refs if ref is not None})


def _speak_into(descriptor: int) -> None:
    """Standard output and error of this process, also what libraries write past Python."""
    for stream in (1, 2):
        os.dup2(descriptor, stream)


# -- what is shown


class Show:
    """The bar, and a line for every iteration that ends."""

    def __init__(self, study: Study, agenda: Agenda, console: Console, bar: Progress | None) -> None:
        self._agenda = agenda
        self._console = console
        self._bar = bar
        self._processes = study.settings.processes
        self._task = bar.add_task(study.name, total=agenda.total, left="") if bar else None
        self.look()

    def look(self) -> None:
        """Show how far it is."""
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=self._agenda.done, left=left(self._agenda, self._processes))

    def finished(self, unit: Unit, done: Done) -> None:
        """Say what became of a unit."""
        where = f"{unit.cell.name} {unit.iteration}/{unit.cell.iterations}"
        if done.failure is not None:
            self._console.print(f"{where} [red]failed[/red]: {escape(done.failure)}", highlight=False)
            return
        shared = len(base.STEP_ORDER) - len(done.made)
        how = f"{duration(sum(done.made.values()))}, {shared} of {len(base.STEP_ORDER)} steps were there"
        so_far = "" if self._bar else f"; {self._agenda.done} of {self._agenda.total}, {left(self._agenda, self._processes)}"
        self._console.print(f"{where} {how}{so_far}", highlight=False)


def left(agenda: Agenda, processes: int) -> str:
    """``about 1 h 20 min left``: at the pace of what was made so far."""
    seconds = agenda.seconds_left(processes)
    if seconds is None:
        return "time left not known yet"
    if seconds < 90:
        return f"about {seconds:.0f} s left"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"about {hours} h {minutes} min left" if hours else f"about {minutes} min left"


@contextmanager
def _progress(study: Study, agenda: Agenda, console: Console) -> Iterator[Show]:
    columns: Sequence[object] = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("iterations,"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]}"),
    )
    bar = Progress(*columns, console=console, transient=True) if console.is_terminal else None  # type: ignore[arg-type]
    with bar or nullcontext():
        yield Show(study, agenda, console, bar)
