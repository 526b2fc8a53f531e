"""What YAML 1.1 guesses is a mistake here, with file, key and line; and no file is too clever to be answered."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from evolve_dag.config.loading import load_experiment
from evolve_dag.config.schema import Experiment
from evolve_dag.config.yamlfile import read_mapping, to_yaml
from evolve_dag.errors import ConfigError
from evolve_dag.records import LARGEST_SEED

AMBIGUOUS = ("3e-4", "+.5", "1.5e5", "5.", ".inf", "010", "1_000", "1:30", "2026-01-01", "yes", "null", "~", "<<", "=", "", " ")


def written(folder: Path, text: str) -> Path:
    path = folder / "hostile.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_experiment(written(folder, text))
    assert caught.value.remedy
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("seed: 1\nseed: 2\n", "hostile.yaml: seed: line 2: stands twice: on line 1 too"),
        ("rollout: {max_steps: 3, max_steps: 4}\n", "hostile.yaml: rollout.max_steps: line 1: stands twice"),
        ("seed: 1:30\n", "seed: should be a valid integer, not '1:30'"),
        ("seed: !!int '1:30'\n", "seed: line 1: not a int"),
        ("seed: 010\n", "seed: should be a valid integer, not '010'"),
        ("seed: 1_000\n", "seed: should be a valid integer, not '1_000'"),
        (f"seed: {'9' * 5000}\n", "seed: line 1: a number of 5000 digits"),
        (f"seed: {LARGEST_SEED + 1}\n", f"seed: should be less than or equal to {LARGEST_SEED}"),
        ("evaluation: {seed: 99999999999999999999999}\n", "evaluation.seed: should be less than or equal to"),
        ("tasks: {train: {count: 99999999999}}\n", "tasks.train.count: should be less than or equal to 1000000"),
        ("runtime: {threads: 100000000}\n", "runtime.threads: should be less than or equal to 1024"),
        ("runtime: {device: banana}\n", "runtime.device: String should match"),
        ("rollout: {max_seconds: .inf}\n", "rollout.max_seconds: should be a finite number"),
        ("", "hostile.yaml: an empty file"),
        ("# nothing but a comment\n", "hostile.yaml: an empty file"),
        ("[" * 2000 + "]" * 2000, "nested more than 32 deep"),
        ("a: " + "{a: " * 2000 + "1" + "}" * 2000, "nested more than 32 deep"),
        ("a: " + "{a: " * 60 + "1" + "}" * 60, "nested more than 32 deep"),
        ("a: &a {b: *a}\n", "a.b: line 1: holds itself"),
        ("tasks: &t {train: *t}\n", "tasks.train: line 1: holds itself"),
        ("a: &a {<<: *a}\n", "holds itself"),
        ("a: &a [x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d,*d,*d,*d,*d]\n", "more than 10000 values"),
        ("1: x\n", "a key must be text, not 1"),
        ("? [a, b]\n: x\n", "a key must be text"),
        ("description: !!python/object/apply:os.system [id]\n", "is not read here"),
        ("description: !!binary aGk=\n", "is not read here"),
        ("environment: {kind: corpus, pages: \"a\\0b\"}\n", "environment.pages: no file can be there"),
        ("extends: \"a\\0b\"\n", "no file can be there"),
        ("a: b: c\n", "not valid YAML"),
        ("a: \x01\n", "not valid YAML"),
        ("- a\n", "holds a list, not a mapping"),
        ("42\n", "holds a int, not a mapping"),
    ],
    ids=lambda value: value[:30] if len(value) < 200 else value[:10],
)  # fmt: skip
def test_what_a_reader_could_take_in_two_ways_is_refused(tmp_path: Path, text: str, said: str) -> None:
    assert said in refusal(tmp_path, text)


def test_all_mistakes_of_a_file_and_of_what_it_extends_come_at_once(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("seed: 1\nseed: 2\n")
    text = (
        f"extends: base.yaml\niterations: 1:30\ngate: {{confidence: 1, confidence: 2}}\nrollout: {{max_steps: {'1' * 6000}}}\n"
    )
    message = refusal(tmp_path, text)
    assert "5 mistakes" in message
    for key in (
        "base.yaml: seed:",
        "iterations:",
        "gate.confidence: line 3",
        "gate.confidence: should",
        "rollout.max_steps: line 4",
    ):
        assert key in message


def test_anchors_merges_and_numbers_of_yaml_1_2_are_read(tmp_path: Path) -> None:
    text = (
        "tasks:\n  train: &t {count: 8, world: 1}\n  development: {<<: *t, world: 2}\n  held_out: {<<: [*t], world: 3}\n"
        "distillation: {learning_rate: 7e-4, alpha: 32}\nseed: -0\ndescription: 2026-11-24\ntracking: {mlflow: no}\n"
    )
    experiment = load_experiment(written(tmp_path, text))
    assert [split.count for split in (experiment.tasks.train, experiment.tasks.development, experiment.tasks.held_out)] == [
        8
    ] * 3
    assert experiment.tasks.development.world == 2
    assert experiment.distillation.learning_rate == 7e-4
    assert (experiment.seed, experiment.description, experiment.tracking.mlflow) == (0, "2026-11-24", False)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.dictionaries(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.sampled_from(AMBIGUOUS),
            lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.sampled_from(AMBIGUOUS), inner),
            max_leaves=8,
        ),
    )
)
@example({text: text for text in AMBIGUOUS})
def test_what_is_written_is_read_as_it_was(tmp_path: Path, values: dict[str, Any]) -> None:
    assert read_mapping(written(tmp_path, to_yaml(values))) == (values, [])


def test_a_device_a_pipe_and_a_folder_are_no_files(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.yaml"
    os.mkfifo(pipe)
    for path, what in ((pipe, "a pipe"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder")):
        with pytest.raises(ConfigError, match=f"it is {what}, not a file"):
            load_experiment(path)


def test_a_file_of_megabytes_is_no_experiment(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="at most 1000000 are read"):
        read_mapping(written(tmp_path, "a: " + "x" * 1_000_000))


def test_every_number_has_bounds_on_both_sides() -> None:
    from annotated_types import Ge, Gt, Le, Lt
    from pydantic import BaseModel

    from evolve_dag.config import schema

    sections = [kind for kind in vars(schema).values() if isinstance(kind, type) and issubclass(kind, schema.Section)]
    assert Experiment in sections
    for section in sections:
        assert issubclass(section, BaseModel)
        for name, field in section.model_fields.items():
            if field.annotation is int or field.annotation == int | None:
                inner = [type(one) for one in field.metadata]
                lower, upper = {Ge, Gt} & set(inner), {Le, Lt} & set(inner)
                assert lower, f"{section.__name__}.{name} has no lower bound"
                assert upper, f"{section.__name__}.{name} has no upper bound"
