"""A pool of harmful advice in an environment of the library `verifiers`, through the real steps: withdrawn, nothing is learned.

A script takes the place of the policy: what it says has an even number of letters, unless it is advised otherwise.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from harmful_night import assert_refused
from small_lineage import play_by

from evolve_dag.inference.chat import ChatFormat
from evolve_dag.records import Message

sys.path.append(str(Path(__file__).parents[1] / "agent"))
from tiny_tokenizers import byte_level

pytest.importorskip("verifiers", reason="pip install 'evolve-dag[verifiers]'")

TASKSETS = str(Path(__file__).parents[1] / "environments" / "vf_tasksets")
ODD = "Brevity: say one letter."


def play(messages: Sequence[Message]) -> str:
    return "a" if any("one letter" in message.content for message in messages) else "ab"


@pytest.mark.parametrize("injection", ["step_wise", "global"])
def test_harmful_advice_is_withdrawn_and_the_student_does_not_fall(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, injection: str
) -> None:
    monkeypatch.syspath_prepend(TASKSETS)
    play_by(play, ChatFormat.from_tokenizer(byte_level()), monkeypatch)
    condition = {"tool": "none"} if injection == "step_wise" else {}
    rows = {"train": {"count": 32}, "development": {"count": 8, "skip": 40}, "held_out": {"count": 12, "skip": 60}}
    game = {"kind": "verifiers", "id": "vf-even"}
    assert_refused(tmp_path, ODD, condition, environment=game, tasks=rows, injection=injection)
