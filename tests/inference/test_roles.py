"""Models by role, and the one event loop that they live in."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from evolve_dag.config.schema import Experiment
from evolve_dag.errors import ModelError
from evolve_dag.inference import roles as module
from evolve_dag.inference.roles import Roles
from evolve_dag.inference.scripted import ScriptedModel

OWN = Experiment.model_validate({"experiment": "x", "models": {"selector": {"backend": "openai", "model": "m"}}})


async def loop() -> asyncio.AbstractEventLoop:
    return asyncio.get_running_loop()


class Closing(ScriptedModel):
    def __init__(self) -> None:
        super().__init__([])
        self.closed: list[asyncio.AbstractEventLoop] = []

    async def close(self) -> None:
        self.closed.append(asyncio.get_running_loop())


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Closing:
    """What every backend opens."""
    made = Closing()
    monkeypatch.setattr(module, "open_backend", lambda settings, **_: made)
    return made


def test_everything_runs_in_one_loop_and_leaving_closes_models_and_loop(model: Closing) -> None:
    with Roles(OWN) as roles:
        first = roles.run(loop())
        assert roles.model("selector") is roles.model("selector") is model
        assert roles.run(loop()) is first
        assert not first.is_closed()
    assert model.closed == [first]
    assert first.is_closed()


def test_what_decides_an_answer_is_part_of_who_gave_it() -> None:
    def identity(**changes: Any) -> str:
        model = {"backend": "openai", "model": "m", **changes}
        return Roles(Experiment.model_validate({"experiment": "x", "models": {"selector": model}})).identity("selector")

    usual = identity()
    assert usual == identity(concurrency=3, key="OTHER", endpoints=["http://127.0.0.1:9/v1"]) == "openai:m"
    others = [identity(extra={"seed": None}), identity(structured="none"), identity(context_tokens=4096), identity(model="n")]
    assert len({usual, *others}) == 5


def test_a_fault_inside_closes_them_too(model: Closing) -> None:
    async def broken() -> Any:
        raise ZeroDivisionError

    def use() -> None:
        with Roles(OWN) as roles:
            roles.model("selector")
            roles.run(broken())

    with pytest.raises(ZeroDivisionError):
        use()
    assert len(model.closed) == 1


def test_the_policy_answers_while_it_is_open(model: Closing) -> None:
    with Roles(OWN) as roles:
        with pytest.raises(ModelError, match="no policy is open"):
            roles.model("extractor")
        with roles.policy(model, "abc"):
            assert roles.model("extractor") is model
            assert roles.identity("extractor").endswith("+abc")
            assert roles.identity("selector") == "openai:m"
