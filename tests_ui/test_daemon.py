"""The real daemon: the nightly schedule with a cron of a minute, 'until K', and a backfill that is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path

import dagster as dg
import pytest
from evolve_dag.assets import partitions, recovery
from living import Living, Place, wait

from evolve_dag.steps.base import STEP_ORDER
from evolve_dag.store.artifacts import Store
from evolve_dag.store.layout import STEPS

LAUNCH = """mutation($p: LaunchBackfillParams!){launchPartitionBackfill(backfillParams: $p){
  __typename ... on LaunchBackfillSuccess{backfillId} ... on PythonError{message}}}"""
BACKFILL = "query($id: String!){partitionBackfillOrError(backfillId: $id){... on PartitionBackfill{status}}}"
START_SENSOR = """mutation($s: SensorSelector!){startSensor(sensorSelector: $s){
  __typename ... on Sensor{sensorState{status}} ... on PythonError{message}}}"""
LAUNCH_RUN = """mutation($p: ExecutionParams!){launchRun(executionParams: $p){
  __typename ... on LaunchRunSuccess{run{runId}} ... on PythonError{message} ... on InvalidSubsetError{message}}}"""


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def materialized(instance: dg.DagsterInstance, step: str) -> Counter[str]:
    """Partition -> how often a step's asset was materialized."""
    records = instance.fetch_materializations(dg.AssetKey(step), limit=1000).records
    return Counter(str(record.partition_key) for record in records)


def promoted(place: Place) -> Counter[str]:
    with place.instance() as instance:
        return materialized(instance, "promotion")


def runs(place: Place) -> list[dg.DagsterRun]:
    """Runs of iterations, newest first."""
    with place.instance() as instance:
        return [run for run in instance.get_runs() if recovery.is_iteration(run)]


def selector() -> dict[str, str]:
    return {"repositoryLocationName": "evolve_dag", "repositoryName": "__repository__"}


def test_a_schedule_runs_the_next_iteration_and_stops_at_the_last(place: Place) -> None:
    place.config("tiny", iterations=2, schedule={"cron": "* * * * *", "timezone": "Europe/Berlin"})
    place.evolve("run", "configs/tiny.yaml", "--iterations", "1")
    assert promoted(place) == {"tiny|01": 1}
    switched = place.evolve("schedule", "on", "tiny")
    assert "tiny: on, * * * * * (Europe/Berlin), next tick " in switched
    assert "start it with `evolve ui`" in switched
    with place.ui("--no-mlflow") as ui:
        ui.wait_for("Ctrl-C ends it")
        wait(lambda: promoted(place)["tiny|02"], 400, "iteration 2 to be promoted by the schedule")

        def told() -> str:
            [line] = json.loads(place.evolve("schedule", "list", "--json"))
            assert line["on"]
            assert line["next_tick"].endswith(("+01:00", "+02:00"))
            return str(line["decision"])

        wait(lambda: "all 2 iterations are promoted" in told(), 150, "the schedule to say that it is done")
        assert place.evolve("schedule", "off", "tiny") == "tiny: off\n"
        [line] = json.loads(place.evolve("schedule", "list", "--json"))
        assert (line["on"], line["next_tick"]) == (False, None)
        assert ui.end(signal.SIGINT) == 0
    assert promoted(place) == {"tiny|01": 1, "tiny|02": 1}
    [second] = [run for run in runs(place) if recovery.iteration_of(run) == 2]
    assert second.tags["evolve/schedule"] == "nightly_tiny"


def test_a_run_with_the_tag_until_goes_on_by_itself(place: Place) -> None:
    place.config("tiny", iterations=2)
    place.evolve("run", "configs/tiny.yaml", "--iterations", "1")
    with place.ui("--no-mlflow") as ui:
        ui.wait_for("Ctrl-C ends it")
        started = ui.graphql(START_SENSOR, s={**selector(), "sensorName": "continue_until"})["startSensor"]
        assert started["sensorState"]["status"] == "RUNNING"
        params = {
            "selector": {**selector(), "jobName": "iteration"},
            "runConfigData": {},
            "executionMetadata": {
                "tags": [
                    {"key": key, "value": value}
                    for key, value in {
                        "evolve/until": "2",
                        "dagster/partition": "tiny|01",
                        partitions.EXPERIMENT_TAG: "tiny",
                        partitions.ITERATION_TAG: "01",
                    }.items()
                ]
            },
        }
        launched = ui.graphql(LAUNCH_RUN, p=params)["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        wait(lambda: promoted(place)["tiny|02"], 300, "iteration 2")
        wait(lambda: all(run.is_finished for run in runs(place)), 60, "its run to end")
    found = {recovery.iteration_of(run): run for run in runs(place)}
    assert set(found) == {1, 2}
    assert found[2].tags["evolve/until"] == "2"
    assert all(run.is_success for run in found.values())


def journalled(place: Place) -> dict[str, list[float]]:
    """Rollouts that stand in journals of unfinished artifacts: trajectory -> seconds that its steps took."""
    found = {}
    for path in place.store.glob("work/*/*/journals/*.jsonl"):
        for line in path.read_text().splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # the end of what a kill has torn
                continue
            if "steps" in record:
                found[f"{path.parts[-4]}/{path.parts[-3]}/{record['id']}"] = [step["seconds"] for step in record["steps"]]
    return found


def workers(place: Place, ui: Living) -> list[int]:
    """Processes of runs: they hold the run's lock file open."""
    found = []
    for pid in ui.members("multiprocessing.spawn"):
        opened = [str(link.readlink()) for link in Path(f"/proc/{pid}/fd").glob("*") if link.is_symlink()]
        if any("/locks/run-" in name for name in opened):
            found.append(pid)
    return found


def test_a_backfill_that_is_killed_completes_in_order_with_nothing_twice(place: Place) -> None:
    names, keys = ("left", "right"), ("01", "02", "03")
    for seed, name in enumerate(names):
        place.config(name, iterations=3, seed=seed)
    wanted = [f"{name}|{key}" for name in names for key in keys]

    with place.ui("--no-mlflow") as ui:
        ui.wait_for("Ctrl-C ends it")
        params = {"assetSelection": [{"path": [step]} for step in STEP_ORDER], "partitionNames": wanted, "tags": []}
        launched = ui.graphql(LAUNCH, p=params)["launchPartitionBackfill"]
        assert launched["__typename"] == "LaunchBackfillSuccess", launched
        backfill = launched["backfillId"]
        # First kill: daemon, code server and every run at once, as when the machine goes down. Nobody reports anything.
        wait(lambda: any(k.startswith("trajectories/") for k in journalled(place)), 300, "rollouts in a journal")
        for pid in [*ui.members("_daemon run"), *workers(place, ui), *ui.members("api grpc|code-server start")]:
            os.kill(pid, signal.SIGKILL)
        assert ui.process.wait(600) == 1, "evolve ui tells that Dagster has ended"
        assert "Dagster has ended by itself" in ui.output.read_text()
        wait(lambda: not ui.left(), 30, "everything to end")
    before = journalled(place)
    assert before
    assert [run for run in runs(place) if run.status == dg.DagsterRunStatus.STARTED], "they count as started; nobody told"

    with place.ui("--no-mlflow") as ui:
        ui.wait_for("Ctrl-C ends it")
        # Second kill: a run alone, in the middle of a step, after the first promotion.
        wait(lambda: sum(promoted(place).values()) and journalled(place) and workers(place, ui), 500, "a later run at work")
        os.kill(workers(place, ui)[0], signal.SIGKILL)

        def status() -> str:
            return str(ui.graphql(BACKFILL, id=backfill)["partitionBackfillOrError"]["status"])

        wait(lambda: status().startswith(("COMPLETED", "FAILED", "CANCELED")), 900, "the backfill to complete")
        assert status() == "COMPLETED_SUCCESS"
        assert ui.end(signal.SIGINT) == 0

    assert promoted(place) == Counter(wanted), "every iteration is promoted, and once"
    store = Store(place.store)
    with place.instance() as instance:
        for step in STEP_ORDER[1:]:
            made = materialized(instance, step)
            assert set(made) == set(wanted)
            assert made == Counter(wanted), f"{step} is materialized once for every iteration"
        order: dict[str, list[str]] = {name: [] for name in names}
        events = instance.fetch_materializations(dg.AssetKey("promotion"), limit=100).records
        for record in sorted(events, key=lambda record: record.storage_id):
            name, _, key = str(record.partition_key).partition("|")
            order[name].append(key)
        assert order == {name: list(keys) for name in names}
    for step in STEP_ORDER[1:]:
        digests = {store.ref(name, int(key), step).digest for name in names for key in keys}  # type: ignore[union-attr]
        assert digests == {path.name for path in (place.store / "objects" / step).iterdir()}, "nothing was made twice"
        for digest in digests:
            store.open(step, digest, verify=True)
    assert not [path for path in place.store.glob("work/*/*/journals/*") if path.stat().st_size], "no work is left over"
    for name, seconds in before.items():
        kind, digest, trajectory = name.split("/")
        frame = store.open(kind, digest).frame(STEPS).filter(trajectory_id=trajectory)
        assert frame["seconds"].to_list() == seconds, "what the journal held was taken over, not sampled again"
