"""Records as JSON values: what a reader of an error needs to know. That nothing is lost is shown in test_frames."""

from __future__ import annotations

import pytest

from evolve_dag.errors import DataError
from evolve_dag.records import PoolEdit, Step, ToolCall
from evolve_dag.store.jsonvalues import from_values, is_finite, to_values


def test_every_mistake_is_named_with_its_place() -> None:
    values = {"index": 0, "text": "x", "token_ids": [1, "two"], "call": {"name": 3}, "answer": ""}
    with pytest.raises(DataError) as caught:
        from_values(Step, values, "steps.parquet", "run it again")
    assert caught.value.what == (
        "steps.parquet: token_ids.1: should be a valid integer, unable to parse string as an integer, not 'two'; "
        "logprobs: missing; call.name: should be a valid string, not 3; call.arguments: missing"
    )
    assert caught.value.remedy == "run it again"


def test_what_is_no_object_is_told() -> None:
    with pytest.raises(DataError, match="x: should be "):
        from_values(Step, None, "x", "")


def test_text_that_is_not_unicode_and_numbers_that_are_not_finite_survive() -> None:
    step = Step(0, "\ud83d", (), (float("-inf"),), ToolCall("search", {"query": "\udc00"}))
    assert from_values(Step, to_values(step), "", "") == step


def test_a_field_of_another_version_is_left_out() -> None:
    edit = PoolEdit("add", "p1", 1, None, "x", "r")
    assert from_values(PoolEdit, to_values(edit) | {"mood": "good"}, "", "") == edit


@pytest.mark.parametrize(
    ("value", "finite"),
    [(1, True), (0.5, True), (True, False), ("1", False), (None, False), (float("nan"), False), (10**400, False)],
)
def test_what_is_a_finite_number(value: object, finite: bool) -> None:
    assert is_finite(value) == finite
