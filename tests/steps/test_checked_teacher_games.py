"""A pool of harmful advice in TextWorld's games, through the real steps: it is withdrawn, and the student does not fall.

A script takes the place of the policy: it plays with some skill, and obeys advice.
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

pytest.importorskip("textworld")

BACK = {"north": "south", "south": "north", "east": "west", "west": "east"}
WAIT = "Patience: look around, and touch nothing."


def play(messages: Sequence[Message]) -> str:
    """The coin where it lies, else onward; in the kitchen whatever is listed last."""
    if any("touch nothing" in message.content for message in messages):
        return "look"
    told = [message.content for message in messages if "You can: " in message.content][-1]
    listed = told.partition("You can: ")[2].split("\n")[0].rstrip(".").split(", ")
    came = next((one.content for one in reversed(messages) if one.role == "assistant"), "").removeprefix("go ")
    onward = [command for command in listed if command.startswith("go ") and command != f"go {BACK.get(came)}"]
    return "take coin" if "take coin" in listed else (onward or listed)[-1]


@pytest.fixture
def player(monkeypatch: pytest.MonkeyPatch) -> None:
    play_by(play, ChatFormat.from_tokenizer(byte_level()), monkeypatch)


@pytest.mark.parametrize("injection", ["step_wise", "global"])
@pytest.mark.parametrize(("family", "condition"), [("coin", {"env:coin": "not here"}), ("cooking", {"env:meal": "not there"})])
def test_harmful_advice_is_withdrawn_and_the_student_does_not_fall(
    player: None, tmp_path: Path, family: str, condition: dict[str, str], injection: str
) -> None:
    worlds = {
        "train": {"count": 32, "world": 1},
        "development": {"count": 8, "world": 2},
        "held_out": {"count": 12, "world": 3},
    }
    game = {"kind": "textworld", "family": family, "limit": 8}
    assert_refused(tmp_path, WAIT, condition, environment=game, tasks=worlds, injection=injection)
