"""What is sent, as values: parameters, sampling, the record of what was sent. No server, no mlflow."""

from __future__ import annotations

import json
import posixpath
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_dag.config.schema import Experiment
from evolve_dag.experience.teacher_check import Comparison, TeacherCheck
from evolve_dag.records import Trajectory
from evolve_dag.reporting.drawing import Figure
from evolve_dag.reporting.summary import IterationRow
from evolve_dag.tracking.mlflow_facts import (
    PARAM_CHARACTERS,
    IterationFacts,
    _calls,
    _flat,
    masker,
    params,
    results,
    undecisive,
)
from evolve_dag.tracking.mlflow_server import (
    RefusedError,
    SentRecord,
    TrackingError,
    mlflow_errors,
    read_facts,
    record_path,
    shown,
    tracking_uri,
)
from evolve_dag.tracking.mlflow_traces import sample


def trajectory(number: int, reward: float | None) -> Trajectory:
    return Trajectory(f"t{number}#0", f"t{number}", 0, number, "", "?", (), "answered", reward=reward)


def test_params_are_flat_and_short_enough_for_every_server() -> None:
    found = params(
        {"regime": {"source": "teacher", "rejection": True}, "seed": 0, "x": {"y": {"z": [1, 2]}}, "long": "a" * 900}
    )
    assert found == {
        "regime.source": "teacher",
        "regime.rejection": "true",
        "seed": "0",
        "x.y.z": "[1, 2]",
        "long": "a" * (PARAM_CHARACTERS - 1) + "…",
    }


@given(st.dictionaries(st.text(max_size=300), st.integers() | st.dictionaries(st.text(max_size=4), st.integers(), max_size=3)))
def test_names_of_params_are_such_as_mlflow_takes(free: dict[str, Any]) -> None:
    found = params({"models.extractor": {"extra": free, "path": "x"}})
    assert len(found) == 1 + len(list(_flat(free)))
    assert found["models.extractor.path"] == "x"
    for name in found:
        assert re.fullmatch(r"[/\w.\- ]{1,250}", name)
        assert posixpath.normpath(name) == name
        assert name != "."
        assert not name.startswith(("..", "/"))


def test_names_that_become_equal_are_told_apart() -> None:
    found = params({"extra": {"a?": 1, "a!": 2, "a_": 3, "https://x": 4, "y" * 250: 5, "y" * 251: 6}, "..": 7, "/z": 8})
    assert found == {
        "extra.a_": "3",
        "extra.a__2": "2",
        "extra.a__3": "1",
        "extra.https___x": "4",
        f"extra.{'y' * 244}": "5",
        f"extra.{'y' * 242}_2": "6",
        "_..": "7",
        "_z": "8",
    }


def test_what_may_change_within_a_lineage_is_no_param() -> None:
    tags = undecisive(Experiment.model_validate({"experiment": "x", "iterations": 5, "runtime": {"threads": 3}}))
    assert tags["config.iterations"] == "5"
    assert tags["config.runtime.threads"] == "3"
    assert tags["config.tracking.trajectories"] == "24"
    assert not any(key.startswith("config.seed") for key in tags)


def test_secrets_are_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "hunter2hunter2")
    mask = masker()
    assert mask("the key is hunter2hunter2!") == "the key is ***!"
    assert "abc" not in mask("http://user:abcdefgh@host/v1")
    assert mask("nothing here") == "nothing here"


@given(
    rewards=st.lists(st.sampled_from([1.0, 0.0, None]), max_size=40),
    count=st.integers(0, 12),
    order=st.randoms(use_true_random=False),
)
def test_a_sample_is_half_successes_and_depends_on_no_order(rewards: list, count: int, order) -> None:
    trajectories = [trajectory(n, reward) for n, reward in enumerate(rewards)]
    chosen = sample(trajectories, count)
    assert len(chosen) == min(count, len(trajectories))
    good, had = sum(t.reward == 1.0 for t in chosen), sum(r == 1.0 for r in rewards)
    other = len(chosen) - good
    assert abs(good - other) <= 1 or good == had or other == len(rewards) - had
    shuffled = list(trajectories)
    order.shuffle(shuffled)
    assert {t.id for t in sample(shuffled, count)} == {t.id for t in chosen}


def test_what_experience_did_to_the_teacher_is_sent() -> None:
    refused = (Comparison(64, 0.1, 0.3, -0.2, -0.3, -0.1),)
    check = TeacherCheck(Comparison(64, 0.3, 0.1, 0.2, 0.1, 0.3), earlier=refused)
    facts = IterationFacts("x", 3, "d", IterationRow(3, check=check, edits={"withdrawn": 2}), {}, {}, 0, 9)
    sent = {point.key: point.value for point in results(facts)}
    told = {"teacher": 0.3, "student": 0.1, "difference": 0.2, "low": 0.1, "high": 0.3, "attempts": 2.0}
    assert {key: value for key, value in sent.items() if key.startswith("teacher/")} == {
        f"teacher/{k}": v for k, v in told.items()
    }
    assert sent["pool/withdrawn"] == 2
    unchecked = IterationFacts("x", 3, "d", IterationRow(3, check=TeacherCheck(None)), {}, {}, 0, 9)
    assert not [point for point in results(unchecked) if point.key.startswith("teacher/")]


def test_calls_add_up_and_an_unknown_price_is_no_price() -> None:
    class Fake:
        def __init__(self, calls: dict) -> None:
            self.summary = {"calls": calls}

    one = {"judge": {"calls": 3, "cost": 0.5}}
    found = _calls({"a": Fake(one), "b": Fake({"judge": {"calls": 1, "cost": 0.25}})})  # type: ignore[dict-item]
    assert found == {"calls/judge_calls": 4.0, "calls/judge_usd": 0.75, "cost/usd": 0.75}
    found = _calls({"a": Fake(one), "b": Fake({"judge": {"calls": 1, "cost": None}})})  # type: ignore[dict-item]
    assert found == {"calls/judge_calls": 4.0}


def test_the_record_outlives_a_torn_line_and_forgets_on_demand(tmp_path: Path) -> None:
    uri = "http://user:password-here@host"
    record = SentRecord(tmp_path, uri)
    record.put("lineage", "pocket", "abc", "parent", "run1")
    record.put("lineage", "pocket", "abcd", "parent", "run2")
    record.put("link", "pocket", 1, ["run1", "digest"])
    with record_path(tmp_path, uri).open("ab") as stream:
        stream.write(b'{"key":"lineage/pocket/abc/pa')
    assert read_facts(tmp_path, uri)["link/pocket/1"] == ["run1", "digest"]
    again = SentRecord(tmp_path, uri)
    assert again.get("lineage", "pocket", "abc", "parent") == "run1"
    again.forget("lineage", "pocket", "abc")
    third = SentRecord(tmp_path, uri)
    assert third.get("lineage", "pocket", "abc", "parent") is None
    assert third.get("lineage", "pocket", "abcd", "parent") == "run2"
    assert "password-here" not in record_path(tmp_path, uri).read_text()
    assert json.loads(record_path(tmp_path, uri).read_text().splitlines()[0])["value"] == "http://host"
    assert SentRecord(tmp_path, "http://other").get("link", "pocket", 1) is None


def test_addresses_lose_their_passwords() -> None:
    assert shown("postgresql://u:p@host:5432/db") == "postgresql://host:5432/db"
    assert shown("sqlite:////a/b@c/mlflow.db") == "sqlite:////a/b@c/mlflow.db"
    assert shown("postgresql://host/mlflow?user=u&password=p") == "postgresql://host/mlflow"
    assert shown("https://u:p@host/mlflow?token=p") == "https://host/mlflow"


def test_a_password_in_the_query_of_an_address_is_not_written_down(tmp_path: Path) -> None:
    record = SentRecord(tmp_path, "postgresql://host/mlflow?user=me&password=password-here")
    assert json.loads(record.path.read_text())["value"] == "postgresql://host/mlflow"


def test_the_store_has_a_database_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path.resolve()}/mlflow/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://host")
    assert tracking_uri(tmp_path) == "http://host"


def test_what_a_server_raises_is_told_without_secrets() -> None:
    with pytest.raises(TrackingError, match="ValueError: no") as caught, mlflow_errors("http://u:secret-word@host"):
        raise ValueError("no: api_key=secret-word")
    assert "secret-word" not in str(caught.value)
    assert "evolve sync-mlflow" in caught.value.remedy


@pytest.mark.parametrize(("code", "refused"), [("INVALID_PARAMETER_VALUE", True), ("TEMPORARILY_UNAVAILABLE", False)])
def test_a_refusal_is_told_from_a_server_that_cannot(code: str, refused: bool) -> None:
    class MlflowLikeError(Exception):
        error_code = code

    with pytest.raises(TrackingError) as told, mlflow_errors("http://mlflow"):
        raise MlflowLikeError("no")
    assert isinstance(told.value, RefusedError) == refused


def test_figures_are_drawn_as_png(tmp_path: Path) -> None:
    from evolve_dag.reporting.pictures import draw

    axis = {"title": {"text": "iteration"}}
    line = {
        "type": "scatter", "mode": "lines+markers", "x": [0, 1], "y": [3, 4], "name": "a", "meta": {"slot": 0, "paint": "line"},
    }  # fmt: skip
    band = {"type": "scatter", "x": [0, 1, 1, 0], "y": [4, 5, 3, 2], "meta": {"slot": 0, "paint": "band"}}
    bars = {"type": "bar", "x": ["1", "2"], "y": [2, -1], "name": "b", "meta": {"slot": 1, "paint": "bar"}}
    for name, data in {"lines": [band, line], "bars": [bars, bars]}.items():
        figure: Figure = {"data": data, "layout": {"xaxis": axis, "yaxis": {"range": [-3, 6]}}}
        assert draw(figure, "title", tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
