"""A study in several processes: shared, resumed after kills, with cells that fail alone."""

from __future__ import annotations

import io
import multiprocessing
import os
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import dagster as dg
import pytest
import study_workers
import yaml
from assets_helpers import write_config
from evolve_dag.assets import launch, studies
from rich.console import Console

from evolve_dag.config import registry
from evolve_dag.errors import ConcurrencyError, ConfigError
from evolve_dag.store.artifacts import Store
from evolve_dag.store.locks import locked
from evolve_dag.study import files
from evolve_dag.study.definition import Choice, Study, load_study

ROOT = Path(".evolve")
ARMS = {
    "plain": "configs/arm.yaml",
    "lexical": {"config": "configs/arm.yaml", "set": {"selection": {"selector": "lexical"}}},
    "greedy": {"config": "configs/arm.yaml", "set": {"rollout": {"temperature": 0.0}}},
}


@pytest.fixture
def study(place: Path) -> Study:
    write_config(place / "configs/arm.yaml")
    content = {"seeds": [4], "iterations": 2, "arms": ARMS, "processes": 2}
    return load_study(_write(place / "tiny.yaml", content))


def _write(path: Path, content: dict) -> Path:
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


LIGHT = multiprocessing.get_context("forkserver")
LIGHT.set_forkserver_preload(["evolve_dag.definitions", "evolve_dag.assets.studies"])


@pytest.fixture
def light(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that do not each import everything, which takes seconds."""
    monkeypatch.setattr(studies, "START", "forkserver")


def run(study: Study, work: object = study_workers.fake) -> tuple[studies.Finished, str]:
    printed = io.StringIO()
    finished = studies.run(study, ROOT, Console(file=printed, width=160), work)
    return finished, printed.getvalue()


def ran() -> list[str]:
    return Path("ran").read_text().splitlines() if Path("ran").exists() else []


def test_every_cell_is_an_experiment_in_dagster_and_nothing_is_made_twice(study: Study) -> None:
    finished, printed = run(study)
    assert (finished.iterations, finished.made, finished.failed) == (6, 6, {})
    assert max(Counter(ran()).values()) == 1
    store = Store(ROOT)
    shared = [store.ref(f"tiny.{arm}-s4", 1, "trajectories").digest for arm in ARMS]
    assert shared[0] == shared[1] != shared[2], "arms share what they have in common"
    with launch.open_instance(ROOT) as instance:
        keys = set(instance.get_materialized_partitions(dg.AssetKey("promotion")))
    assert keys == {f"tiny.{arm}-s4|0{k}" for arm in ARMS for k in (1, 2)}
    assert registry.load(ROOT, "tiny.greedy-s4") == study.cells[2].experiment, "the interface finds it by its name"
    assert "tiny.plain-s4 2/2" in printed
    assert "6 of 6, about 0 s left" in printed
    again, printed = run(study)
    assert (again.iterations, again.made, printed) == (6, 0, "")


@pytest.mark.usefixtures("light")
def test_a_cell_that_fails_or_takes_its_process_down_costs_itself_only(place: Path, study: Study) -> None:
    study = load_study(study.file, Choice(iterations=1))
    finished, printed = run(study, study_workers.two_of_three)
    assert finished.iterations == 1
    assert sorted(finished.failed) == ["tiny.greedy-s4", "tiny.lexical-s4"]
    assert "no room for [this] arm" in finished.failed["tiny.greedy-s4"]
    assert "killed by signal 9 (SIGKILL)" in finished.failed["tiny.lexical-s4"]
    assert "tiny.greedy-s4 1/1 failed" in printed
    assert "no room for" in files.logs(ROOT, study, study.cells[2]).read_text()
    finished, _ = run(study)
    assert (finished.iterations, finished.made, finished.failed) == (3, 2, {})


@pytest.mark.parametrize("begun", [True, False])
def test_a_worker_killed_before_it_reads_its_job_costs_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, begun: bool
) -> None:
    worker = studies.Worker(study_workers.fake)  # it imports for seconds, so it has not read yet
    job = studies.Job(tmp_path, tmp_path / "x.yaml", 1, tmp_path / "x.log")
    if begun:
        worker.begin(job)
    worker.process.kill()
    worker.process.join()
    if not begun:
        monkeypatch.setattr(worker.process, "is_alive", lambda: True)  # as when it dies just after the look
        worker.begin(job)
    assert "killed by signal 9 (SIGKILL)" in (worker.outcome().failure or "")
    worker.end()


@pytest.mark.usefixtures("light")
def test_the_gpus_of_a_machine_are_dealt_out(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    content = yaml.safe_load(study.file.read_text())
    on_gpus = _write(study.file, content | {"set": {"runtime": {"device": "cuda"}}})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3, 5")
    finished, printed = run(load_study(on_gpus), study_workers.seeing)
    assert (finished.failed, printed.count("steps were there")) == ({}, 6)
    seen = dict(line.split() for line in Path("seen").read_text().splitlines())
    assert sorted(seen.values()) == ["3", "5"], "a process keeps its own"


@pytest.mark.usefixtures("light")
def test_killed_at_any_moment_the_same_command_goes_on(study: Study) -> None:
    store = Store(ROOT)
    for least in (2, 9):
        Path("most").write_text(str(least + 2))  # it cannot finish before it is killed, however long that takes
        process = LIGHT.Process(target=study_workers.command, args=(study.file.resolve(),))
        process.start()
        deadline = time.monotonic() + 300
        while len(ran()) < least:
            assert process.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
        process.join()
        _wait_until_workers_are_gone()
        there, before = {digest for _, digest in store.listing()}, len(ran())
    finished, _ = run(load_study(study.file, Choice(("plain", "greedy"), iterations=1)))
    assert (finished.iterations, finished.failed) == (2, {})
    again = {line.split()[1] for line in ran()[before:]}
    assert not again & there, "what was there is not made again"
    assert {artifact.digest for artifact in store.artifacts()} == again | there


def _wait_until_workers_are_gone() -> None:
    """A worker holds its experiment until it is gone; its parent cannot end it any more."""
    deadline = time.monotonic() + 300
    for holder in (ROOT / "locks").glob("experiment-*.holder"):
        while True:
            try:
                with Store(ROOT).lock(holder.stem.removeprefix("experiment-")):
                    break
            except ConcurrencyError:
                assert time.monotonic() < deadline, "a worker outlives its parent"
                time.sleep(0.05)


@pytest.mark.parametrize(
    ("seconds", "told"),
    [(None, "not known yet"), (0.2, "0 s"), (89, "89 s"), (91, "2 min"), (3570, "1 h 0 min"), (45_000, "12 h 30 min")],
)
def test_the_time_left_is_told_in_what_can_be_known(seconds: float | None, told: str) -> None:
    assert told in studies.left(SimpleNamespace(seconds_left=lambda processes: seconds), 2)


def test_a_study_is_run_once_at_a_time(study: Study) -> None:
    code = (
        "import sys, time; from pathlib import Path; from evolve_dag.store.locks import locked\n"
        "with locked(Path('.evolve'), 'study-tiny', 'study', 0.0):\n    print('held', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=dict(os.environ))
    try:
        assert process.stdout is not None
        process.stdout.readline()
        with pytest.raises(ConcurrencyError, match=f"study 'tiny' is being run by process {process.pid}"):
            run(study)
    finally:
        process.kill()
        process.wait()
    with locked(ROOT, "study-tiny", "study", 0.0):
        pass


def test_names_belong_to_one_file_of_a_store(study: Study, place: Path) -> None:
    one = {"seeds": [1], "iterations": 1, "arms": {"plain": "configs/arm.yaml"}}
    other = _write(place / "other.yaml", {"study": "tiny", **one})
    files.write(ROOT, study)
    with pytest.raises(ConfigError, match=r"other\.yaml: the study name 'tiny' belongs to .*tiny\.yaml"):
        files.write(ROOT, load_study(other))
    assert not (files.folder(ROOT, study) / "plain-s1.yaml").exists()
    _write(place / "tiny.yaml", {"study": "renamed", **one})
    files.write(ROOT, load_study(other))
    assert registry.load(ROOT, "tiny.plain-s1").seed == 1


@pytest.mark.usefixtures("light")
def test_another_study_may_use_the_store_and_shares_it(study: Study, place: Path) -> None:
    run(load_study(study.file, Choice(("plain",), iterations=1)))
    before = len(ran())
    other = _write(place / "other.yaml", {"seeds": [4], "iterations": 1, "arms": {"same": "configs/arm.yaml"}})
    finished, _ = run(load_study(other))
    assert (finished.iterations, finished.made) == (1, 1)
    assert len(ran()) == before, "every artifact was there"


def test_a_cell_is_frozen_when_the_command_begins(study: Study, place: Path) -> None:
    files.write(ROOT, study)
    write_config(place / "configs/arm.yaml", granularity="instance")
    assert registry.load(ROOT, "tiny.plain-s4").granularity == "principle"
    files.write(ROOT, load_study(place / "tiny.yaml"))
    assert registry.load(ROOT, "tiny.plain-s4").granularity == "instance"
