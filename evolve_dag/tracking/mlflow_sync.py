"""MLflow as a reader of the store: what it has not got yet is sent, by a process of its own.

The steps of an iteration write artifacts and nothing else, so MLflow being slow, down or absent cannot delay or fail one.
What is sent follows from the artifacts alone: it can be sent later, again, after a kill in the middle, or from another
machine that sees the store, and ends the same.

    MLflow experiment  one per experiment file
    parent run         one per lineage: an experiment under one config and one code (tag evolve.lineage)
    nested run         one per iteration: training curve, results, digests, datasets, traces
                       (both have the tag evolve.current: whether they are of what holds now in their store)
    registered model   one per experiment, a version per adapter, the alias ``champion``

Numbers of an iteration are sent when it is finished, i.e. promoted or declined.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from evolve_dag.config import registry
from evolve_dag.errors import ConcurrencyError, EvolveError, OrderError, StoreError
from evolve_dag.reporting.summary import IterationRow, LineageSummary, summarize
from evolve_dag.secrecy import describe_error
from evolve_dag.steps.body import Progress, Silent
from evolve_dag.store.artifacts import Store
from evolve_dag.store.layout import DECISION
from evolve_dag.store.mirror import open_store
from evolve_dag.tracking import mlflow_facts, mlflow_models, mlflow_traces
from evolve_dag.tracking.mlflow_facts import IterationFacts, Point
from evolve_dag.tracking.mlflow_server import (
    ADDRESS_VARIABLE,
    URI_VARIABLE,
    RefusedError,
    SentRecord,
    TrackingError,
    artifact_location,
    connect,
    mlflow_errors,
    read_facts,
    shown,
    tracking_uri,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from evolve_dag.config.schema import Experiment

log = logging.getLogger(__name__)

SWITCH_VARIABLE = "EVOLVE_TRACKING"
"""``off``: nothing is sent in the background, whatever the experiment files say."""
WAIT_SECONDS = 600.0
"""How long ``evolve sync-mlflow`` waits for a sync in the background."""
THREAD = "mlflow-sync"
"""Name of the threads that wait for processes in the background to end."""
LOG_BYTES = 1_000_000
"""The log of the background starts anew past this."""
_FAMILY = "evolve.experiment"
"""Tag of an MLflow experiment: the experiment file that it is of, whatever it is called by now."""
_TRAJECTORIES = 24
"""Traces per condition where the experiment file is not at hand."""


@dataclass(slots=True)
class Sent:
    """What one sync sent; all zero when MLflow had everything."""

    runs: int = 0
    """Runs made, parents included."""
    metrics: int = 0
    """Values of metrics."""
    datasets: int = 0
    traces: int = 0
    versions: int = 0
    """Versions of registered models."""
    artifacts: int = 0
    """Files."""
    skipped: list[str] = field(default_factory=list)
    """Experiments that were left out, and what was left out of one, with the reason."""
    failed: list[str] = field(default_factory=list)
    """Experiments whose file is wrong, whose artifacts could not be read or of which MLflow refuses something, with the
    reason."""

    def __str__(self) -> str:
        counts = [(getattr(self, name), name) for name in ("runs", "metrics", "datasets", "traces", "versions", "artifacts")]
        words = [f"{count} {name if count != 1 else name[:-1]}" for count, name in counts if count]
        return ", ".join(words) if words else "nothing to send"


def sync(store: Store, names: Sequence[str] | None = None, *, again: bool = False, progress: Progress | None = None) -> Sent:
    """Send what MLflow has not got yet.

    Args:
        store: where the artifacts are; only ``<store>/tracking`` (and the own database, ``<store>/mlflow``) is written.
        names: experiments; None: all that the store knows. One whose file says ``tracking.mlflow: false``, or said so when it
            was last read, is skipped; one of which nothing says what its file said is sent where it is named.
        again: send everything, also what the record says was sent. What is there already is not doubled.
        progress: told how far it is.

    Raises:
        TrackingError: MLflow cannot be reached or breaks off; what was sent stays, the next sync goes on from there.
        ConcurrencyError: another sync of this store did not end within ten minutes.
    """
    sent = Sent()
    wanted = _wanted(store, names, sent)
    if not wanted:
        return sent
    with _locked(store.root, WAIT_SECONDS) as held:
        if not held:
            raise ConcurrencyError(
                f"another process is sending to MLflow for {WAIT_SECONDS:.0f} s already (store {store.root})",
                "wait until it has ended, then give the same command again",
            )
        _send(store, wanted, sent, again, progress or Silent())
    return sent


def _wanted(store: Store, names: Sequence[str] | None, sent: Sent) -> list[tuple[str, Experiment | None]]:
    """The experiments that may be sent, each as its file stands; None where the file is gone or another experiment's by now."""
    wanted = []
    for name in known(store) if names is None else names:
        try:
            found = registry.find(store.root, name)
        except EvolveError as error:  # its file may say that nothing is to be sent
            sent.failed.append(f"{name}: nothing is sent while its file is wrong: {error.what}")
        else:
            experiment = found if found is not None and found.experiment == name else None
            may = _may_be_sent(store, name) if experiment is None else experiment.tracking.mlflow
            if may or (may is None and names is not None):
                wanted.append((name, experiment))
                continue
            sent.skipped.append(f"{name}: {_why_not(name, experiment, may)}")
        _withdraw(store.root, name)
    return wanted


def _may_be_sent(store: Store, name: str) -> bool | None:
    """What ``tracking.mlflow`` said when the file was last read, here or where the last iteration was made; None: unknown."""
    here = next((entry.mlflow for entry in registry.entries(store.root) if entry.name == name), None)
    if here is not None:
        return here
    decided = [ref for ref in store.refs(name) if ref.kind == "promotion"]
    said = max(decided, key=lambda ref: ref.iteration).facts.get("mlflow") if decided else None
    return said if isinstance(said, bool) else None


def _why_not(name: str, experiment: Experiment | None, may: bool | None) -> str:
    if may is None:
        return f"its file is gone, and nothing says whether it may be sent: to send it, name it: evolve sync-mlflow {name}"
    return "tracking.mlflow is false" if experiment is not None else "tracking.mlflow was false when its file was last read"


def _send(store: Store, wanted: Sequence[tuple[str, Experiment | None]], sent: Sent, again: bool, progress: Progress) -> None:
    uri = tracking_uri(store.root)
    requested = [name for name, _ in wanted if _withdraw(store.root, name)]
    try:
        client = connect(store.root, uri)
        sender = _Sender(store, client, uri, SentRecord(store.root, uri), again, progress, sent)
        for name, experiment in wanted:
            try:
                with mlflow_errors(uri):
                    sender.lineage(name, experiment)
            except RefusedError as error:  # of this lineage; the server takes the others
                sent.failed.append(f"{name}: {error.what}: {error.remedy}")
            except TrackingError:
                raise
            except EvolveError as error:  # a damaged artifact is one lineage's trouble
                sent.failed.append(f"{name}: {error.what}")
    except BaseException:
        for name in requested:  # the next sync in the background finds them again
            _request(store.root, name)
        raise


def known(store: Store) -> list[str]:
    """Experiments that are registered in the store or have an iteration in it."""
    registered = {entry.name for entry in registry.entries(store.root)}
    return sorted(registered | {path.name for path in (store.root / "refs").glob("*") if path.is_dir()})


def tracking_link(root: Path, experiment: str, iteration: int, made: Mapping[str, str] | None = None) -> str | None:
    """Where a person finds an iteration in MLflow: an address, ``mlflow run <id>``, or None while nothing is known.

    Reads the local record only. An iteration that was not sent yet gets the address of its MLflow experiment, filtered to
    the iteration's partition, so the link is good before the data are there. For the store's own database the address is
    that of the server named by ``EVOLVE_MLFLOW_UI``.

    Args:
        made: step -> digest of what the link is to tell of; a run that holds another one is not linked to.
    """
    uri = tracking_uri(root)
    facts = read_facts(root, uri)
    experiment_id = facts.get(f"experiment/{_family(root, experiment)}")
    run, holds = facts.get(f"run/{experiment}/{iteration}") or (None, dict[str, str]())
    wanted = dict(made or {})
    with contextlib.suppress(StoreError):
        ref = open_store(root).ref(experiment, iteration, "promotion")
        wanted["promotion"] = ref.digest if ref is not None else ""
    if any(holds.get(step) != digest for step, digest in wanted.items()):
        run = None  # made anew under another config since, and not sent yet
    address = os.environ.get(ADDRESS_VARIABLE, "")
    if not address and urlsplit(uri).scheme in ("http", "https"):
        address = shown(uri)
    if not address:
        return f"mlflow run {run}" if run else None
    address = address.rstrip("/")
    if run:
        return f"{address}/#/experiments/{experiment_id}/runs/{run}"
    if experiment_id is None:
        return None
    search = quote(f"tags.`evolve.partition` = '{experiment}|{iteration:02d}'")
    return f"{address}/#/experiments/{experiment_id}/runs?searchFilter={search}"


# -- in the background


def start_background_sync(root: Path, experiment: str) -> None:
    """Have an experiment sent to MLflow by a process of low priority; returns at once and never raises.

    One process a store: while it runs, a further request is left to it. What it says goes to ``<store>/tracking/sync.log``.
    Nothing happens when the experiment is unknown, its file says ``tracking.mlflow: false``, mlflow is not installed, or
    ``EVOLVE_TRACKING`` is ``off``.
    """
    try:
        if os.environ.get(SWITCH_VARIABLE, "").lower() in ("off", "0", "false"):
            return
        if importlib.util.find_spec("mlflow") is None or not registry.load(root, experiment).tracking.mlflow:
            return
        root = root.resolve()
        _request(root, experiment)
        with _locked(root, 0.0) as free:
            pass
        if free:
            _spawn(root)
    except Exception as error:  # whatever it is, an iteration must not fail for it
        log.debug("no sync in the background: %s", describe_error(error))


def main(root: Path) -> int:
    """The process in the background: serve requests until there are none; returns its exit code."""
    _lower_priority()
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    requests = root / "tracking" / "requests"
    store, worked = open_store(root), True
    while worked and any(requests.glob("*")):
        with _locked(root, 0.0) as free:
            pass
        if not free:
            return 0  # another process serves them: it looks again after it has let the lock go
        names = sorted(path.name for path in requests.glob("*"))
        try:
            sent = sync(store, names)
            log.info("%s: %s", ", ".join(names), sent)
            for problem in (*sent.failed, *sent.skipped):
                log.info("left out: %s", problem)
        except EvolveError as error:
            worked = False
            log.info("%s", error)
    return 0 if worked else 1


def serve_requests(root: Path) -> None:
    """Start the process in the background for requests that came while another sync held the store."""
    if any((root / "tracking" / "requests").glob("*")):
        with _locked(root, 0.0) as free:
            pass
        if free:
            _spawn(root.resolve())


def _request(root: Path, experiment: str) -> None:
    folder = root / "tracking" / "requests"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / experiment).touch()


def _withdraw(root: Path, experiment: str) -> bool:
    """Take a request away, before what it asks for is read: a later one stays. Returns whether there was one."""
    try:
        (root / "tracking" / "requests" / experiment).unlink()
    except FileNotFoundError:
        return False
    return True


def _spawn(root: Path) -> None:
    path = root / "tracking" / "sync.log"
    mode = "wb" if path.exists() and path.stat().st_size > LOG_BYTES else "ab"
    with path.open(mode) as stream:
        # A session of its own: Ctrl-C at the run, or its terminal going away, does not reach it.
        process = subprocess.Popen(
            [sys.executable, "-m", "evolve_dag.tracking.mlflow_sync", str(root)],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            start_new_session=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    # A long-lived host must not gather dead children.
    threading.Thread(target=process.wait, name=THREAD, daemon=True).start()


def _lower_priority() -> None:
    """Only what nobody else wants of the processor."""
    with contextlib.suppress(OSError, AttributeError):
        os.nice(19)
    with contextlib.suppress(OSError, AttributeError):
        os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


@contextlib.contextmanager
def _locked(root: Path, wait_seconds: float) -> Iterator[bool]:
    """One sender a store; yields whether the lock was had. It goes with its process, however that ends."""
    from filelock import FileLock, Timeout

    path = root / "tracking" / "sync.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=wait_seconds)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


# -- inside


class _Sender:
    """Sends lineages to one server."""

    def __init__(
        self, store: Store, client: MlflowClient, uri: str, record: SentRecord, again: bool, progress: Progress, sent: Sent
    ) -> None:
        self.store, self.client, self.uri, self.record = store, client, uri, record
        self.again, self.progress, self.sent = again, progress, sent

    def lineage(self, name: str, experiment: Experiment | None) -> None:
        """Everything of one lineage that is not there yet."""
        mlflow_experiment = self.mlflow_experiment(name)
        try:
            summary = summarize(self.store, name)
        except OrderError:
            return  # registered, nothing run yet: its place is made, so that links can point there
        found = mlflow_facts.iterations(self.store, summary)
        if not found:
            return
        lineage = found[0].lineage
        state = self._state(name, lineage)
        if self.again or state == "gone":
            self.record.forget("lineage", name, lineage)
            self.record.forget("run", name)
            self.record.put("current", name, None)
        elif state == "deleted":
            self.sent.skipped.append(f"{name}: its run was deleted in MLflow; --again sends it anew")
            return
        base = next((row for row in summary.rows if row.iteration == 0), None)
        parent = self.parent(mlflow_experiment, summary, found, experiment)
        for facts in found:
            self.iteration(mlflow_experiment, parent, facts, base, experiment)
        if self._missing(found[-1], "report"):
            self.pictures(parent, summary)
            self.client.set_terminated(parent, "FINISHED", found[-1].ended)
            self._done(found[-1], "report", True)
        holds = [lineage, found[-1].promotion]
        champion = next((facts for facts in found if facts.iteration == summary.champion), None)
        if self.record.get("current", name) != holds:  # also where all was sent once, and an earlier config holds again
            self.version(champion, experiment)
            self._supersede(mlflow_experiment, parent, name, {"evolve.kind": "lineage", "evolve.experiment": name})
            self.record.put("current", name, holds)
        self.champion(name, champion)

    def mlflow_experiment(self, name: str) -> str:
        """Id of the MLflow experiment of the lineage's experiment file: the one on record, also where it was renamed in MLflow,
        then the one of that name; made when there is none."""
        family = _family(self.store.root, name)
        found = self._on_record(family) or self.client.get_experiment_by_name(family)
        if found is None:
            tags = {_FAMILY: family, "evolve.version": mlflow_facts.version()}
            experiment_id = self.client.create_experiment(family, artifact_location(self.store.root, self.uri), tags=tags)
        else:
            experiment_id = found.experiment_id
            if found.lifecycle_stage == "deleted":
                self.client.restore_experiment(experiment_id)
            if found.tags.get(_FAMILY) != family:
                self.client.set_experiment_tag(experiment_id, _FAMILY, family)
        self.record.put("experiment", family, experiment_id)
        return str(experiment_id)

    def _on_record(self, family: str) -> Any:
        """MLflow's experiment that was sent to before; None: there is none, or the server has been set up anew since and gave
        its id to another one."""
        from mlflow.exceptions import MlflowException

        experiment_id = self.record.get("experiment", family)
        if experiment_id is None:
            return None
        try:
            found = self.client.get_experiment(experiment_id)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise
        made_here = found.name == family or "evolve.version" in found.tags  # before there was a tag with the name
        return found if found.tags.get(_FAMILY, family if made_here else None) == family else None

    def parent(
        self, experiment_id: str, summary: LineageSummary, found: Sequence[IterationFacts], experiment: Experiment | None
    ) -> str:
        """The lineage's run, with the config as parameters."""
        first = found[0]
        key = ("lineage", first.experiment, first.lineage, "parent")
        run_id: str | None = self.record.get(*key)
        if run_id is None:
            tags = {
                "evolve.kind": "lineage",
                "evolve.experiment": first.experiment,
                "evolve.lineage": first.lineage,
                "mlflow.source.name": "evolve-dag",
            }
            run_id = self._run(experiment_id, first.experiment, tags, first.started)
            self._log(run_id, params=mlflow_facts.params(mlflow_facts.settings(first)))
            self.client.set_tag(run_id, "mlflow.note.content", _note(summary))
            self.client.set_tag(run_id, "evolve.version", mlflow_facts.version())
            self.record.put(*key, run_id)
        if experiment is not None:
            tags = mlflow_facts.undecisive(experiment)
            if self.record.get(*key[:-1], "undecisive") != tags:
                self._log(run_id, tags=tags)
                self.record.put(*key[:-1], "undecisive", tags)
        return run_id

    def iteration(
        self,
        experiment_id: str,
        parent: str,
        facts: IterationFacts,
        base: IterationRow | None,
        experiment: Experiment | None,
    ) -> None:
        """The nested run of an iteration, its model version and its traces."""
        tags = {
            "evolve.kind": "iteration",
            "evolve.experiment": facts.experiment,
            "evolve.lineage": facts.lineage,
            "evolve.digest.promotion": facts.promotion,
            "mlflow.parentRunId": parent,
        }
        run_id: str | None = self.record.get("lineage", facts.experiment, facts.lineage, facts.promotion, "run")
        if run_id is None:
            run_id = self._run(experiment_id, f"iteration {facts.iteration:02d}", tags, facts.started)
            self._done(facts, "run", run_id)
        if self._missing(facts, "facts"):
            results = mlflow_facts.results(facts)
            on_parent = mlflow_facts.results(facts, base if facts.iteration == 1 else None)
            settings = mlflow_facts.settings(facts)
            self._log(run_id, params=mlflow_facts.params(settings), tags=mlflow_facts.tags(facts))
            self._log(run_id, metrics=[*mlflow_facts.curve(facts), *results])
            self._log(parent, metrics=on_parent)
            self._datasets(run_id, parent, facts)
            decision = facts.artifacts["promotion"].json(DECISION)
            self._files(run_id, {DECISION: decision, "config.json": settings})
            self.client.set_terminated(run_id, "FINISHED", facts.ended)
            self._done(facts, "facts", True)
        if self._missing(facts, "model"):
            self.sent.versions += mlflow_models.register(self.client, run_id, facts, experiment)
            self._done(facts, "model", True)
        holds = [run_id, {kind: ref.digest for kind, ref in facts.refs.items()}]
        if self.record.get("run", facts.experiment, facts.iteration) != holds:
            alike = {"evolve.kind": "iteration", "evolve.partition": facts.partition}
            self._supersede(experiment_id, run_id, facts.experiment, alike)
            self.record.put("run", facts.experiment, facts.iteration, holds)
        count = experiment.tracking.trajectories if experiment is not None else _TRAJECTORIES
        before = self.record.get("lineage", facts.experiment, facts.lineage, facts.promotion, "traces")
        if before is None or before < count:
            self._traces(experiment_id, run_id, facts, count)
            self._done(facts, "traces", count)

    def version(self, holds: IterationFacts | None, experiment: Experiment | None) -> None:
        """The version of the policy that holds; where a person has deleted it, it is made anew."""
        if holds is not None and mlflow_models.find(self.client, holds) is None:
            run_id = self.record.get("lineage", holds.experiment, holds.lineage, holds.promotion, "run")
            self.sent.versions += mlflow_models.register(self.client, run_id, holds, experiment)

    def champion(self, name: str, holds: IterationFacts | None) -> None:
        """The alias, on the version of the policy that holds; asked at every sync, since other stores may send there too."""

        def ours(tags: Mapping[str, str]) -> bool:
            persons_own = not {"evolve.lineage", "evolve.digest.promotion"} <= tags.keys()
            return persons_own or self._from_here(name, tags)

        foreign = mlflow_models.point_champion(self.client, name, holds, ours)
        if foreign is not None:
            self.sent.skipped.append(
                f"{name}: @{mlflow_models.ALIAS} of the model {name} stays on version {foreign}, which another store has sent: "
                f"give one of the two experiments another name (`experiment:`) or another server ({URI_VARIABLE}), or take the "
                "alias away in MLflow to have it set from here"
            )

    def pictures(self, parent: str, summary: LineageSummary) -> None:
        """The report and the figures, on the parent run."""
        from evolve_dag.reporting.report import write_report
        from evolve_dag.tracking.mlflow_figures import write_figures

        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_report([summary], folder / "report.html", store=self.store)
            drawn = write_figures(summary, folder / "figures")
            mask = mlflow_facts.masker()
            for page in folder.glob("*.html"):
                page.write_text(mask(page.read_text(encoding="utf-8")), encoding="utf-8")
            self.client.log_artifacts(parent, scratch)
            self.sent.artifacts += 1 + len(drawn)

    # -- parts

    def _state(self, name: str, lineage: str) -> str:
        """``known``, ``new``, ``deleted`` (by a person), or ``gone``: the server's data are not what they were."""
        from mlflow.exceptions import MlflowException

        run_id = self.record.get("lineage", name, lineage, "parent")
        if run_id is None:
            return "new"
        try:
            return "deleted" if self.client.get_run(run_id).info.lifecycle_stage == "deleted" else "known"
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return "gone"
            raise

    def _run(self, experiment_id: str, name: str, tags: dict[str, str], started: int) -> str:
        """The run with these tags; made when it is not there."""
        search = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items() if key.startswith("evolve."))
        present = self.client.search_runs([experiment_id], search, max_results=1)
        if present:
            return str(present[0].info.run_id)
        made = self.client.create_run(experiment_id, start_time=started, tags=tags, run_name=name)
        self.sent.runs += 1
        return str(made.info.run_id)

    def _from_here(self, name: str, tags: Mapping[str, str]) -> bool:
        """Whether the run or version with these tags is of this store, also where gc has removed what was sent. Another store
        may have an experiment of this name, and send it to the same server."""
        lineage, night = tags.get("evolve.lineage"), tags.get("evolve.digest.promotion")
        sent = (lineage, "parent") if night is None else (lineage, night, "run")
        return self.record.get("lineage", name, *sent) is not None or self.store.exists("promotion", str(night or lineage))

    def _supersede(self, experiment_id: str, run_id: str, name: str, alike: Mapping[str, str]) -> None:
        """The run of what holds now is marked; those with the same tags, of other configs or tasks, are not any more. What
        holds in another store is its own affair."""
        search = " and ".join(f"tags.`{key}` = '{value}'" for key, value in alike.items())
        for run in self.client.search_runs([experiment_id], search):
            if run.info.run_id != run_id and self._from_here(name, run.data.tags):
                self.client.set_tag(run.info.run_id, "evolve.current", "false")
        self.client.set_tag(run_id, "evolve.current", "true")

    def _log(
        self,
        run_id: str,
        *,
        params: dict[str, str] | None = None,
        tags: dict[str, str] | None = None,
        metrics: Sequence[Point] = (),
    ) -> None:
        """In batches that every server takes."""
        from mlflow.entities import Metric, Param, RunTag

        for part in _parts([Param(key, value) for key, value in (params or {}).items()], 100):
            self.client.log_batch(run_id, params=part)
        for part in _parts([RunTag(key, value) for key, value in (tags or {}).items()], 100):
            self.client.log_batch(run_id, tags=part)
        for part in _parts([Metric(p.key, p.value, p.milliseconds, p.step) for p in metrics], 1000):
            self.client.log_batch(run_id, metrics=part)
        self.sent.metrics += len(metrics)

    def _datasets(self, run_id: str, parent: str, facts: IterationFacts) -> None:
        from evolve_dag.tracking.mlflow_datasets import datasets

        inputs, tasks = datasets(facts)
        self.client.log_inputs(run_id, [*inputs, *tasks])
        self.client.log_inputs(parent, tasks)
        self.sent.datasets += len(inputs) + len(tasks)

    def _files(self, run_id: str, contents: dict[str, Any]) -> None:
        mask = mlflow_facts.masker()
        with tempfile.TemporaryDirectory() as scratch:
            for name, content in contents.items():
                text = json.dumps(content, indent=1, ensure_ascii=False)
                Path(scratch, name).write_text(mask(text) + "\n", encoding="utf-8")
            self.client.log_artifacts(run_id, scratch)
        self.sent.artifacts += len(contents)

    def _traces(self, experiment_id: str, run_id: str, facts: IterationFacts, count: int) -> None:
        chosen = mlflow_traces.samples(facts, count)
        if not chosen:
            return
        self.progress.start(f"{facts.partition} traces", len(chosen))
        try:
            self.sent.traces += mlflow_traces.send(
                self.client, experiment_id, run_id, facts, chosen, advance=self.progress.advance
            )
        except NotImplementedError as error:  # a server before 3.4 takes no spans; everything else still goes there
            self.sent.skipped.append(f"{facts.partition}: no traces: {describe_error(error)}")
        finally:
            self.progress.finish()

    def _missing(self, facts: IterationFacts, what: str) -> bool:
        return self.record.get("lineage", facts.experiment, facts.lineage, facts.promotion, what) is None

    def _done(self, facts: IterationFacts, what: str, value: Any) -> None:
        self.record.put("lineage", facts.experiment, facts.lineage, facts.promotion, what, value)


def _family(root: Path, name: str) -> str:
    """Name of the experiment file that a lineage belongs to: ``pocket`` for ``pocket-s3``."""
    return next((entry.family for entry in registry.entries(root) if entry.name == name), name)


def _note(summary: LineageSummary) -> str:
    return f"Lineage `{summary.experiment}` of evolve-dag.\n\n    {summary.command}\n\nThe report is among the artifacts."


def _parts(values: list[Any], size: int) -> Iterable[list[Any]]:
    return (values[start : start + size] for start in range(0, len(values), size))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
