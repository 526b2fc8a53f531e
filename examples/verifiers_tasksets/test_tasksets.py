"""Each taskset played by a script that knows how: `make test-verifiers`."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("verifiers", reason="make verifiers")

from evolve_dag.agent.rollouts import gather_rollouts
from evolve_dag.config.schema import RolloutSettings, TaskSplit
from evolve_dag.environments.verifiers.environment import VERIFIERS, VerifiersEnvironment, VerifiersTasks
from evolve_dag.inference.scripted import ScriptedModel
from evolve_dag.records import Message, Trajectory
from evolve_dag.verification.exact import ExactVerifier


def play(script: Any, id: str, count: int, **args: Any) -> list[Trajectory]:
    settings, split = VerifiersEnvironment(id=id, args=args, seconds=120.0), TaskSplit(count=count)
    assert VERIFIERS.tasks is not None
    return asyncio.run(
        gather_rollouts(
            VERIFIERS.tasks(settings, split, "train"),
            1,
            model=ScriptedModel(script),
            environment=VerifiersTasks(settings, split),
            verifier=ExactVerifier(),
            settings=RolloutSettings(),
            seed=3,
            concurrency=4,
        )
    )


def test_a_family_of_reasoning_gym_gives_its_own_scores() -> None:
    pytest.importorskip("reasoning_gym")

    def adds(messages: Sequence[Message]) -> str:
        a, sign, b = messages[1].content.split(":")[1].rstrip(" =").split()
        return f"so <answer>{int(a) + int(b) if sign == '+' else int(a) - int(b)}</answer>"

    easy = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    assert [t.reward for t in play(adds, "evolve-reasoning", 3, settings=easy)] == [1.0] * 3
    assert [t.reward for t in play(["none"], "evolve-reasoning", 2, family="leg_counting")] == [0.0] * 2


def test_a_game_of_textarena_goes_on_until_it_is_won_or_lost() -> None:
    pytest.importorskip("textarena")

    def halves(messages: Sequence[Message]) -> str:
        low, high = 1, 20
        for said, heard in zip(messages[2::2], messages[3::2], strict=True):
            middle = int(re.findall(r"\d+", said.content)[0])
            low, high = (middle + 1, high) if "higher" in heard.content else (low, middle - 1)
        return f"[{(low + high) // 2}]"

    won = play(halves, "evolve-arena", 4)
    assert [(t.status, t.reward) for t in won] == [("answered", 1.0)] * 4
    assert len({t.turns for t in won}) > 1
    lost = play(["[1]"] * 4, "evolve-arena", 4)  # the same guess again is against the rules
    assert all(0 < (t.reward or 0) < 1 for t in lost if t.turns > 1)
    assert any(t.turns > 1 for t in lost)


def test_a_shop_has_tools_and_parts_of_a_reward(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))  # of the tool server, where the package is not installed

    def asks(messages: Sequence[Message]) -> str:
        wanted = re.findall(r"(\d) (\w+)", messages[1].content)
        asked = (len(messages) - 2) // 2
        if asked < len(wanted):
            call = {"name": "price", "arguments": {"item": wanted[asked][1], "count": int(wanted[asked][0])}}
            return f"<tool_call>{json.dumps(call)}</tool_call>"
        heard = [int(message.content.split(": ")[1].split()[0]) for message in messages if message.role == "tool"]
        return f"{sum(heard)}." if len(wanted[0][1]) > 4 else "I do not know."

    played = play(asks, "evolve-shop", 6)
    assert {t.answer == "I do not know." for t in played} == {True, False}
    for t in played:
        assert (t.turns, t.reward) == (3, pytest.approx(0.2 if t.answer == "I do not know." else 1.0))
