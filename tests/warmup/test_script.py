"""What the script does and reads."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_dag.config.schema import WarmupSettings
from evolve_dag.warmup.script import GOOD, IDLE, NOTHING, Hints, Turn, draw

HINTS = Hints("take coin", ("go east", "go west", "take coin"))
ELSEWHERE = ("take coin", "go north", "eat meal")


def drawn(count: int, hints: Hints = HINTS, **settings: float) -> list[Turn]:
    chosen = WarmupSettings(base="x", world=1, **settings)  # type: ignore[arg-type]
    return [draw(hints, chosen, ELSEWHERE, random.Random(n)) for n in range(count)]


def test_shares_are_those_that_are_set() -> None:
    turns = drawn(4000, advised=0.4, idle=0.2, skill=0.3)
    share = {kind: sum(turn.kind == kind for turn in turns) / len(turns) for kind in (GOOD, IDLE, "")}
    assert share == pytest.approx({GOOD: 0.4, IDLE: 0.2, "": 0.4}, abs=0.03)
    for kind in (IDLE, ""):  # skill, and what chance does in the others
        own = [turn.action == "take coin" for turn in turns if turn.kind == kind]
        assert sum(own) / len(own) == pytest.approx(0.3 + 0.7 / 3, abs=0.05)


def test_good_advice_is_followed_and_tells_only_what_is_possible() -> None:
    for turn in drawn(500, advised=1.0, idle=0.0):
        assert turn.action == "take coin"
        good = [line for line in turn.advice if line not in NOTHING]
        assert len(good) == 1
        assert "take" in good[0] or "coin" in good[0]
        assert "go east" not in good[0]
        assert "go west" not in good[0]


@given(st.integers(0, 10**6), st.lists(st.sampled_from(["a", "b c", "d"]), max_size=3), st.sampled_from(["", "b c", "z"]))
def test_every_state_has_a_turn(seed: int, choices: list[str], expert: str) -> None:
    settings = WarmupSettings(base="x", world=1)
    turn = draw(Hints(expert, tuple(choices)), settings, ELSEWHERE, random.Random(seed))
    assert turn.action in {*choices, expert}
    assert (turn.kind == "") == (turn.advice == ())
    assert not (turn.kind == GOOD and not expert)
