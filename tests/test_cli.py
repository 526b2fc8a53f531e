"""The command line: quick help, clean messages, exit codes. What the commands do is tested beside what they call."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Protocol

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from evolve_dag import cli, doctor
from evolve_dag.config import registry
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import ConfigError, StoreError

HEAVY = ("torch", "dagster", "polars", "transformers", "duckdb", "plotly", "peft", "numpy")


class Evolve(Protocol):
    def __call__(self, *arguments: str, folder: Path) -> SimpleNamespace: ...


@pytest.fixture
def evolve(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Evolve:
    """``evolve`` as a process would run it, in this one: what it ends with, and what it says."""

    def run(*arguments: str, folder: Path) -> SimpleNamespace:
        for variable in (registry.STORE_VARIABLE, registry.CONFIGS_VARIABLE, "EVOLVE_DEBUG", "DAGSTER_HOME"):
            monkeypatch.delenv(variable, raising=False)
        monkeypatch.chdir(folder)
        monkeypatch.setattr("sys.argv", ["evolve", *arguments])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        said = capsys.readouterr()
        return SimpleNamespace(returncode=ended.value.code, stdout=said.out, stderr=said.err)

    return run


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
from evolve_dag import cli
for arguments in ([], ["run"], ["pocket"]):
    sys.argv = ["evolve", *arguments, "--help"]
    try:
        cli.main()
    except SystemExit as end:
        assert not end.code, end.code
loaded = sorted(set({HEAVY!r}) & set(sys.modules))
assert not loaded, loaded
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Usage: evolve") == 3


@pytest.mark.parametrize("own", [None, "active"])
def test_threads_that_wait_give_way_unless_the_user_wants_it_otherwise(own: str | None) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= {"OMP_WAIT_POLICY": own} if own else {}
    code = "import evolve_dag, os; print(os.environ['OMP_WAIT_POLICY'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=environment)
    assert done.stdout.strip() == (own or "passive")


def test_every_command_has_help() -> None:
    def walk(command: Any, path: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
        yield path
        for name, inner in getattr(command, "commands", {}).items():
            yield from walk(inner, (*path, name))

    every = list(walk(get_command(cli.app), ()))
    assert ("pocket", "play") in every
    for path in every:
        result = CliRunner().invoke(cli.app, [*path, "--help"])
        assert result.exit_code == 0, path
        assert "Usage" in result.output
        assert "Usage" in result.output


def test_a_wrong_config_lists_its_mistakes_and_exits_2(tmp_path: Path, evolve: Evolve) -> None:
    (tmp_path / "bad.yaml").write_text("iteratons: 3\nseed: many\n")
    done = evolve("run", "bad.yaml", folder=tmp_path)
    assert done.returncode == 2
    assert "bad.yaml: 2 mistakes" in done.stderr
    assert "iteratons" in done.stderr
    assert "remedy:" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == [tmp_path / "bad.yaml"], "nothing was made"


def test_a_study_with_an_invalid_arm_runs_nothing_and_exits_2(tmp_path: Path, evolve: Evolve) -> None:
    (tmp_path / "arm.yaml").write_text("sede: 1\n")
    (tmp_path / "grid.yaml").write_text("seeds: [1, 1]\niterations: 1\narms: {a: arm.yaml, b: gone.yaml}\n")
    done = evolve("study", "grid.yaml", folder=tmp_path)
    assert done.returncode == 2
    for expected in ("3 mistakes", "1 stands twice", "arms.a: arm.yaml: sede", "gone.yaml: no such file"):
        assert expected in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["arm.yaml", "grid.yaml"], "nothing was made"


def test_a_failed_cell_is_told_at_the_end_with_a_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evolve_dag.assets import studies

    arms = "{a: arm.yaml, b: {config: arm.yaml, set: {injection: global}}}"
    (tmp_path / "grid.yaml").write_text(f"seeds: [1]\niterations: 1\narms: {arms}\n")
    (tmp_path / "arm.yaml").write_text("iterations: 1\n")
    failed = studies.Finished(0, 0, {"grid.a-s1": "no room\n  remedy: make some"})
    monkeypatch.setattr(studies, "run", lambda *_: failed)
    command = ["study", str(tmp_path / "grid.yaml"), "--store", str(tmp_path / "s"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, command)
    assert result.exit_code == 1
    assert result.stderr.startswith("b against a: injection global (step_wise)\n"), "before anything runs"
    assert "failed: grid.a-s1: no room" in result.stderr
    page = tmp_path / "s/reports/grid~study.html"
    before = page.read_bytes()
    part = CliRunner().invoke(cli.app, [*command[:4], "--report-only", "--arm", "b"])
    assert part.exit_code == 0
    assert "grid~study-part.html" in part.stdout
    assert page.read_bytes() == before, "the whole report stays"
    assert "Not finished" in (tmp_path / "out/study.md").read_text()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "evolve_dag", "status", "absent.yaml"]
    environment = {**os.environ, "EVOLVE_DEBUG": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_wrong_usage_exits_2(tmp_path: Path, evolve: Evolve) -> None:
    assert evolve("run", "x.yaml", "--iterations", "0", folder=tmp_path).returncode == 2
    assert evolve("nonsense", folder=tmp_path).returncode == 2


def test_status_before_any_run_names_the_command(tmp_path: Path, evolve: Evolve) -> None:
    (tmp_path / "mine.yaml").write_text("description: mine\n")
    done = evolve("status", "mine.yaml", folder=tmp_path)
    assert done.returncode == 1
    assert "evolve run mine.yaml" in done.stderr
    assert not (tmp_path / ".evolve").exists(), "looking makes nothing"


@pytest.mark.parametrize("command", ["status", "report", "audit"])
@pytest.mark.parametrize(("seed", "told"), [((), ""), (("--seed", "7"), " --seed 7")])
def test_what_was_not_run_yet_is_run_by_the_file_that_was_named(
    command: str, seed: tuple[str, ...], told: str, tmp_path: Path, evolve: Evolve
) -> None:
    (tmp_path / "files").mkdir()
    (tmp_path / "files/my one.yaml").write_text("experiment: mine\n")
    done = evolve(command, "files/my one.yaml", *seed, folder=tmp_path)
    assert done.returncode == 1
    assert f"run it first: evolve run 'files/my one.yaml'{told}\n" in done.stderr


def test_a_folder_of_its_name_hides_no_experiment_and_a_long_name_is_told(tmp_path: Path, evolve: Evolve) -> None:
    (tmp_path / "mine.yaml").write_text("iterations: 1\n")
    registry.register(tmp_path / ".evolve", tmp_path / "mine.yaml")
    (tmp_path / "mine").mkdir()
    (tmp_path / "other").mkdir()
    assert "experiment 'mine' has not been run" in evolve("status", "mine", folder=tmp_path).stderr
    assert evolve("plan", "mine", folder=tmp_path).stdout.startswith("mine")
    assert "other: cannot be read: it is a folder" in evolve("status", "other", folder=tmp_path).stderr
    for command in ("status", "plan", "sync-mlflow"):
        done = evolve(command, "x" * 300, folder=tmp_path)
        assert done.returncode == 2
        assert "nobody foresaw" not in done.stderr


@pytest.mark.parametrize("command", ["run", "plan", "doctor", "warmup", "study", "audit", "pocket play"])
@pytest.mark.parametrize(
    ("given", "file"), [("first", "configs/first.yaml"), ("first.yaml", "configs/first.yaml"), ("my own", "'my own.yml'")]
)
def test_a_name_in_place_of_a_file_is_answered_with_the_file(
    command: str, given: str, file: str, tmp_path: Path, evolve: Evolve
) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/first.yaml").write_text("experiment: other\n")
    (tmp_path / "my own.yml").write_text("experiment: mine\n")
    done = evolve(*command.split(), given, folder=tmp_path)
    assert done.returncode == 2
    assert f"name the file: {file}\n" in done.stderr or f"name its file ({file})" in done.stderr
    assert not (tmp_path / ".evolve").exists()


def test_the_name_of_an_experiment_is_answered_with_its_file_and_seed(tmp_path: Path, evolve: Evolve) -> None:
    (tmp_path / "file.yaml").write_text("experiment: mine\n")
    registry.register(tmp_path / ".evolve", tmp_path / "file.yaml", 3)
    assert evolve("run", "mine-s3", folder=tmp_path).stderr.endswith("name the file: file.yaml --seed 3\n")
    assert "check the path given" in evolve("run", "nobody", folder=tmp_path).stderr


def test_outside_of_the_project_its_own_files_are_found(tmp_path: Path, evolve: Evolve) -> None:
    shipped = Path(cli.__file__).parents[1] / "configs/pocket.yaml"
    for given in ("pocket", "configs/pocket.yaml"):
        assert str(shipped) in evolve("run", given, folder=tmp_path).stderr


@pytest.mark.parametrize("arguments", [("doctor",), ("sql", "select '5\N{EN DASH}6\N{PILE OF POO}' as word"), ("--help",)])
def test_a_terminal_that_lacks_a_character_gets_the_others(arguments: tuple[str, ...], tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONIOENCODING": "latin-1", "EVOLVE_STORE": str(tmp_path)}
    command = [sys.executable, "-m", "evolve_dag", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, encoding="latin-1")
    assert "encode" not in done.stderr
    assert done.returncode == 0


def test_unknown_ids_and_wrong_sql_end_in_a_message(tmp_path: Path, evolve: Evolve) -> None:
    done = evolve("trace", "abcdef", folder=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    done = evolve("sql", "select * from nowhere", folder=tmp_path)
    assert (done.returncode, "Traceback" in done.stderr) == (1, False)
    assert "nowhere" in done.stderr


def test_sql_prints_tables_and_csv(tmp_path: Path) -> None:
    table = CliRunner().invoke(cli.app, ["sql", "select 1.5 as number, 'a' as word", "--store", str(tmp_path)])
    assert "number" in table.output
    assert "1.5" in table.output
    obeyed = CliRunner().invoke(cli.app, ["sql", "select chr(27) || '[2J' as word", "--store", str(tmp_path)])
    assert "\ufffd[2J" in obeyed.output
    assert "\x1b" not in obeyed.output
    csv = CliRunner().invoke(cli.app, ["sql", "select [1, 2] as list, 'a' as word", "--csv", "--store", str(tmp_path)])
    assert csv.output.splitlines() == ["list,word", '"[1, 2]",a']
    cut = CliRunner().invoke(cli.app, ["sql", "select * from range(9)", "--rows", "2", "--store", str(tmp_path)])
    assert "2 of 9 rows" in cut.output
    many = ", ".join(f"{n} as quite_a_long_name_{n}" for n in range(9))
    wide = CliRunner().invoke(cli.app, ["sql", f"select {many} from range(2)", "--store", str(tmp_path)])
    for n in range(9):  # a line each, in both rows
        assert [line.split() for line in wide.output.splitlines() if f"name_{n}" in line] == [
            [f"quite_a_long_name_{n}", str(n)]
        ] * 2
    none = CliRunner().invoke(cli.app, ["sql", f"select {many} where false", "--store", str(tmp_path)])
    assert "quite_a_long_name_8" in none.output
    assert "no rows" in none.output


def test_ctrl_c_says_how_to_resume(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from evolve_dag.assets import launch

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(launch, "run", interrupted)
    result = CliRunner().invoke(cli.app, ["run", "x.yaml", "--store", str(tmp_path)])
    assert result.exit_code == 130
    assert "run the same command to resume" in result.output


def test_doctor_says_what_is_missing_and_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "good.yaml").write_text("description: good\n")
    (tmp_path / "configs" / "bad.yaml").write_text("sede: 1\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", "not/absolute")
    before = sorted(tmp_path.rglob("*"))
    findings = list(doctor.examine(tmp_path / "store"))
    assert sorted(tmp_path.rglob("*")) == before
    text = {(finding.state, finding.subject): finding.text for finding in findings}
    assert "sede" in text["broken", "experiment file"]
    assert "good" in text["ok", "experiments"]
    assert f"{tmp_path / 'not/absolute'} (DAGSTER_HOME=not/absolute): not there yet" in text["note", "dagster home"]
    assert ("ok", "python") in text
    assert "torch" in text["ok", "packages"]
    assert ("ok", "store") in text


def test_doctor_tells_of_this_machine_before_experiments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And of the gate of the one that it was asked about, wherever its file lies, none but that."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "other.yaml").write_text("tasks: {development: {count: 6, world: 22}}\n")
    monkeypatch.chdir(tmp_path)
    subjects = [finding.subject for finding in doctor.examine(tmp_path / "store")]
    assert (subjects[0], subjects[-1]) == ("python", "gate")
    assert max(map(subjects.index, ("store", "python sandbox", "not needed"))) < subjects.index("experiments")
    mine = Experiment.model_validate({"experiment": "mine", "tasks": {"development": {"count": 5, "world": 22}}})
    [gate] = [finding for finding in doctor.examine(tmp_path / "store", mine) if finding.subject == "gate"]
    assert gate.text.startswith("mine: 5 development tasks are few for the gate")


def test_doctor_finds_broken_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evolve_dag.inference import folders

    monkeypatch.setattr(folders, "POCKET", tmp_path)
    missing, _ = doctor._weights()
    assert missing.state == "broken"
    assert "evolve pocket pretrain" in missing.text
    (tmp_path / "model.safetensors").write_bytes(b"\0" * 20)
    corrupt, _ = doctor._weights()
    assert corrupt.state == "broken"
    assert "model.safetensors" in corrupt.text


def test_doctor_holds_the_weights_against_their_recorded_digest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np
    from safetensors.numpy import save_file

    from evolve_dag.inference import folders

    monkeypatch.setattr(folders, "POCKET", tmp_path)
    save_file({"w": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    (tmp_path / "pretraining.json").write_text(json.dumps({"digest": folders.folder_digest(tmp_path)}))
    sound, _ = doctor._weights()
    assert (sound.state, "as recorded" in sound.text) == ("ok", True)
    save_file({"w": np.ones(3, np.float32)}, tmp_path / "model.safetensors")
    changed, _ = doctor._weights()
    assert changed.state == "broken"


def test_doctor_calculates_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = Experiment.model_validate({"experiment": "small"})
    monkeypatch.delenv("MALLOC_MMAP_THRESHOLD_", raising=False)
    monkeypatch.setattr("platform.libc_ver", lambda: ("glibc", "2.36"))
    training, rollouts = doctor._memory(experiment)
    assert (training.state, rollouts.state) == ("ok", "ok")
    assert "4 trajectories of 2048 tokens" in training.text
    assert "1.3 to 2.9 times that: MALLOC_MMAP_THRESHOLD_=262144 gives it back" in training.text
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "262144")
    assert "MALLOC" not in next(doctor._memory(experiment)).text
    assert "128 episodes of 2048 tokens" in rollouts.text
    two = experiment.model_copy(update={"runtime": experiment.runtime.model_copy(update={"processes": 2, "shard": True})})
    in_parts, same = doctor._memory(two)
    assert "in 2 processes of " in in_parts.text
    assert "(1/2 of the weights 2 MiB" in in_parts.text
    assert same == rollouts  # only training is shared
    monkeypatch.setattr(doctor, "_device_bytes", lambda device: 2**28)
    assert doctor._against_device("training", 2**29, "passes", "cpu", "take less").state == "broken"
    monkeypatch.setattr(doctor, "_device_bytes", lambda device: None)
    nowhere_else = doctor._against_device("training", 30 * 2**30, "", "cuda:0", "take less")
    assert "no cuda:0 here; fits cards of 48 GB, 80 GB" in nowhere_else.text
    nowhere = Experiment.model_validate({"experiment": "small", "models": {"policy": {"path": "nowhere"}}})
    [missing] = doctor._memory(nowhere)
    assert "nowhere/config.json is not there" in missing.text


@pytest.mark.parametrize(
    ("mib", "rows", "state"), [(2000, 89, "note"), (100, 4, "note"), (14, 1, "note"), (9, 1, "broken"), (4, 1, "broken")]
)
def test_doctor_calculates_rollouts_with_what_the_policy_holds_at_once(
    mib: int, rows: int, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The least room is that of one episode: more wait, and nothing breaks. The policy itself says how many it holds."""
    import torch
    from transformers import AutoConfig

    from evolve_dag.distillation.memory import cache_memory, training_memory
    from evolve_dag.inference import transformers as backend
    from evolve_dag.inference.folders import POCKET

    experiment = Experiment.model_validate({"experiment": "small"})
    config, there = AutoConfig.from_pretrained(POCKET), mib * 2**20
    weights = training_memory(config, dtype="float32", settings=experiment.distillation, rows=[64]).weights
    left = int(0.9 * there) - weights
    monkeypatch.setattr(backend, "host_memory", lambda: (there, left))
    budget = backend._cache_budget(config, torch.float32, torch.device("cpu"), None)
    assert min(128, backend.SlotPool(budget, 2048).rows_allowed(2048)) == rows
    monkeypatch.setattr(doctor, "_device_bytes", lambda device: there)
    _, found = doctor._memory(experiment)
    needed = doctor._size(weights + cache_memory(config, "float32", rows * 2048))
    assert found.text.startswith(
        f"{needed}: weights 4 MiB, keys and values of {rows} episode{'s' * (rows > 1)} of 2048 tokens at"
    )
    assert "of 128 (runtime.concurrency)" in found.text
    assert found.state == state
    remedy = "lower rollout.max_tokens, set models.policy.quantize: nf4 or take a smaller model"
    assert found.text.endswith(remedy) == (state == "broken")


def test_doctor_says_how_many_episodes_cards_hold_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_device_bytes", lambda device: None)
    runtime = {"device": "cuda:0", "concurrency": 3000}
    experiment = Experiment.model_validate({"experiment": "x", "runtime": runtime, "distillation": {"refresh": 2}})
    _, found = doctor._memory(experiment)
    assert found.state == "note"
    assert "with one episode of 2048 tokens (two copies of the weights 8 MiB); no cuda:0 here" in found.text
    assert "of 3000 at once (runtime.concurrency) 1105 on a card of 24 GB" in found.text
    monkeypatch.setattr(doctor, "CARDS", (2**-8,))
    assert "fits cards of no usual size" in list(doctor._memory(experiment))[1].text


@pytest.mark.parametrize(
    ("dtype", "took", "told"),
    [
        ("float32", {"float32": 4.0, "bfloat16": 1.0}, "note: this processor multiplies bfloat16 4.0 x as fast as float32"),
        ("float32", {"float32": 1.0, "bfloat16": 1.0}, "ok: float32; bfloat16 would not be multiplied much faster here"),
        ("float32", {"float32": 1.0, "bfloat16": 9.0}, "ok: float32"),
        ("bfloat16", {"float32": 1.0, "bfloat16": 3.0}, "note: this processor multiplies float32 3.0 x as fast as bfloat16"),
    ],
)
def test_doctor_says_which_number_format_is_fast_here(
    dtype: str, took: dict[str, float], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_seconds_of_product", took.__getitem__)
    (tmp_path / "model").mkdir()
    settings = {"experiment": "formats", "models": {"policy": {"path": str(tmp_path / "model"), "dtype": dtype}}}
    [found] = doctor._number_format(Experiment.model_validate(settings))
    assert f"{found.state}: {found.text}".startswith(told)
    ships = Experiment.model_validate({"experiment": "pocket"})  # and is meant to be in float32
    assert not list(doctor._number_format(ships))
    on_a_card = Experiment.model_validate(settings | {"runtime": {"device": "cuda:0"}})
    assert not list(doctor._number_format(on_a_card))


def test_doctor_times_a_product_without_changing_threads() -> None:
    import torch

    before = torch.get_num_threads()
    assert doctor._seconds_of_product("bfloat16", rows=2, width=8, tries=2) > 0
    assert torch.get_num_threads() == before


def test_doctor_looks_for_what_an_experiment_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    judged = {"models": {"judge": {"backend": "openai", "model": "m"}}, "verification": {"kind": "judge"}}
    tasks = {name: {"path": str(tmp_path / "gone.jsonl")} for name in ("train", "development", "held_out")}
    corpus = {"kind": "corpus", "pages": str(tmp_path / "gone.jsonl")}
    there = Experiment.model_validate({"experiment": "there"})
    assert [(one.state, one.subject) for one in doctor._needs(there)] == [("ok", "there")]
    lacking = Experiment.model_validate({"experiment": "x", "environment": corpus, "tasks": tasks, **judged})
    found = [(one.subject, one.text) for one in doctor._needs(lacking)]
    missing = {text.partition(":")[0] for subject, text in found if subject == "missing"}
    assert missing == {"environment.pages", "tasks.train.path", "tasks.development.path", "tasks.held_out.path"}
    assert ("key", "OPENAI_API_KEY is not set; models.judge (verification) may need it") in found
    policy = {"models": {"policy": {"path": str(tmp_path / "made")}}}
    warmed = Experiment.model_validate({"experiment": "x", "warmup": {"base": "/gone", "world": 1}, **policy})
    base, model = doctor._needs(warmed)
    assert base.text.startswith("warmup.base: /gone: no model there")
    assert (model.subject, model.state) == ("warm-up", "note")


def test_doctor_names_damaged_databases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    for name in ("dagster/history/runs.db", "mlflow/mlflow.db", "cache/memory.sqlite"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_bytes(b"\x07" * 9000)
    found = list(doctor._databases(tmp_path))
    assert [finding.text.partition(":")[0].rpartition("/")[2] for finding in found] == ["runs.db", "mlflow.db", "memory.sqlite"]
    assert {finding.state for finding in found} == {"broken"}


@pytest.mark.parametrize(("configured", "there"), [("~/kept", "home/kept"), ("kept", "kept")])
def test_doctor_looks_at_the_home_that_runs_make(
    configured: str, there: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evolve_dag.assets import launch

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("DAGSTER_HOME", configured)
    assert launch.prepare_home(tmp_path / "store") == tmp_path / there
    [found] = doctor._dagster_home(tmp_path / "store")
    assert found.state == "note"
    assert found.text.startswith(f"{tmp_path / there} (DAGSTER_HOME={configured}); Dagster's own commands take an absolute")
    (tmp_path / there / "history").mkdir()
    (tmp_path / there / "history/runs.db").write_bytes(b"\x07" * 9000)
    [damaged] = doctor._databases(tmp_path / "store")
    assert "history/runs.db: damaged" in damaged.text


def test_doctor_exits_1_when_something_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        doctor, "examine", lambda root, experiment: iter([doctor.Finding("broken", "store", "not writable [here]")])
    )
    result = CliRunner().invoke(cli.app, ["doctor", "--store", str(tmp_path)])
    assert result.exit_code == 1
    assert "not writable [here]" in result.output


@pytest.mark.parametrize("text", ["[]", '{"name": "mine", "config": "mine.yaml", "seed": "x"}'])
def test_a_registry_entry_edited_into_nonsense_is_told(tmp_path: Path, text: str) -> None:
    entry = tmp_path / "experiments" / "mine.json"
    entry.parent.mkdir()
    entry.write_text(text)
    with pytest.raises(StoreError, match=r"mine\.json: not a registry entry"):
        registry.load(tmp_path, "mine")
    assert list(registry.entries(tmp_path)) == []


def test_a_registered_file_that_now_names_another_experiment_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("description: mine\n")
    registry.register(tmp_path, path)
    path.write_text("experiment: other\n")
    with pytest.raises(ConfigError, match="'mine' was registered from it"):
        registry.load(tmp_path, "mine")


def test_an_experiment_file_that_is_a_link_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has the name of the link, and extends what lies beside the link."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "recipe.yaml").write_text("extends: base.yaml\n")
    (tmp_path / "base.yaml").write_text("description: mine\n")
    (tmp_path / "mine.yaml").symlink_to("shared/recipe.yaml")
    assert registry.load(tmp_path, registry.register(tmp_path, tmp_path / "mine.yaml").experiment).description == "mine"
    monkeypatch.chdir(tmp_path)
    (found,) = (entry for entry in registry.scan(Path())[0] if entry.name == "mine")
    assert (found.config, found.load().description) == (tmp_path / "mine.yaml", "mine")


def test_two_files_of_one_name_the_first_keeps_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("experiment: same\n")
    (tmp_path / "b.yaml").write_text("experiment: same\n")
    found, mistakes = registry.scan(tmp_path)
    assert [entry.config.name for entry in found] == ["a.yaml"]
    assert ["'same' is taken by a.yaml" in mistake.what for mistake in mistakes] == [True]


@pytest.mark.parametrize(
    "error", [StoreError("at https://me:hunter22@host", "say Zq9vK2xWb7LmT4Yp"), RuntimeError("Zq9vK2xWb7LmT4Yp")]
)
def test_no_message_on_the_terminal_holds_a_secret(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "Zq9vK2xWb7LmT4Yp")
    monkeypatch.delenv("EVOLVE_DEBUG", raising=False)

    def fail() -> None:
        raise error

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 1
    assert "***" in said
    assert "Zq9v" not in said
    assert "hunter22" not in said


def test_a_file_that_was_renamed_is_found_by_the_name_in_it(evolve: Evolve, tmp_path: Path) -> None:
    file = tmp_path / "configs" / "a.yaml"
    file.parent.mkdir()
    file.write_text("experiment: mine\niterations: 1\n")
    registry.register(tmp_path / ".evolve", file)
    file.rename(file.with_name("b.yaml"))
    said = evolve("plan", "mine", "--json", folder=tmp_path)
    assert said.returncode == 0, said
    assert json.loads(said.stdout)["experiment"] == "mine"
    file.with_name("b.yaml").unlink()
    assert "no experiment 'nobody'" in evolve("plan", "nobody", folder=tmp_path).stderr


def test_what_has_to_be_run_first_is_named_with_its_seed(evolve: Evolve, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    for file in ("configs/small.yaml", "elsewhere.yaml"):
        (tmp_path / file).write_text("iterations: 1\n")
        assert f"evolve run {file} --seed 9" in evolve("status", file, "--seed", "9", folder=tmp_path).stderr
    assert (
        "evolve run configs/small.yaml --seed 9" in evolve("audit", "configs/small.yaml", "--seed", "9", folder=tmp_path).stderr
    )


def test_the_list_of_schedules_names_every_experiment_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    from evolve_dag.assets import timetable

    name = "principle-step-wise-off-policy-with-a-name-that-goes-on"
    line = timetable.Line(name, "nightly", True, "0 2 * * 1-5", "America/Argentina/Buenos_Aires", None, None, "")
    monkeypatch.setattr(timetable, "listing", lambda root: ([line], []))
    shown = CliRunner().invoke(cli.app, ["schedule", "list"], env={"COLUMNS": "80"}).stdout
    assert "…" not in shown
    assert name in "".join(row.split()[0] for row in shown.splitlines() if row.strip())


def test_the_lineage_of_another_seed_is_pulled_by_name(evolve: Evolve, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from evolve_dag.store.artifacts import Store
    from evolve_dag.store.mirror import MirroredStore, configured

    monkeypatch.setenv("EVOLVE_MIRROR", f"file://{tmp_path}/mirror")
    remote = configured()
    assert remote is not None
    other = MirroredStore(tmp_path / "other", remote)
    for seed, name in enumerate(("tiny", "tiny-s1")):
        digest = Store.digest_of("scores", "1", {"seed": seed}, {})
        with other.build("scores", digest, code_version="1", config={"seed": seed}, inputs={}):
            pass
        other.set_ref(name, 1, "scores", digest)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text("iterations: 1\n")
    pulled = evolve("mirror", "pull", "tiny", "--seed", "1", folder=tmp_path)
    assert pulled.stdout.splitlines()[0] == f"scores {digest[:12]}"
    assert "fetched 1 artifacts" in pulled.stdout
    assert "of which experiment?" in evolve("mirror", "pull", "--seed", "1", folder=tmp_path).stderr


def test_a_seed_of_no_experiment_is_refused(evolve: Evolve, tmp_path: Path) -> None:
    said = evolve("trace", "p0001", "--seed", "3", folder=tmp_path)
    assert said.returncode == 2
    assert "--of CONFIG --seed 3" in said.stderr


def test_a_folder_that_no_database_can_lie_in_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    told = [finding.text for finding in doctor._databases(tmp_path / "job?main")]
    assert [text.partition(": ")[0].rpartition("/")[2] for text in told] == ["dagster", "mlflow"]
    assert list(doctor._databases(tmp_path / "plain")) == []
