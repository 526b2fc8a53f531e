"""The scripted model: what it replies, when it raises."""

from __future__ import annotations

import asyncio

import pytest

from evolve_dag.errors import ModelError
from evolve_dag.inference.chat import ChatFormat
from evolve_dag.inference.scripted import ScriptedModel
from evolve_dag.protocols import LanguageModel, Request, Sampling
from evolve_dag.records import Message

ASK = Request((Message("user", "two words"),), Sampling(), "a@1")


def reply(model: ScriptedModel, request: Request = ASK) -> str:
    return asyncio.run(model.generate(request)).text


def test_list_is_read_per_session_until_it_is_released() -> None:
    model = ScriptedModel(["one", "two"])
    assert isinstance(model, LanguageModel)
    other = Request(ASK.messages, Sampling(), "b@2")
    assert [reply(model), reply(model, other), reply(model)] == ["one", "one", "two"]
    with pytest.raises(ModelError, match="no reply 3"):
        reply(model)
    model.release("a@1")
    assert reply(model) == "one"
    assert len(model.requests) == 5


def test_mapping_is_by_session_without_its_number() -> None:
    model = ScriptedModel({"a": ["one"]})
    assert reply(model) == "one"
    with pytest.raises(ModelError, match="session 'c'"):
        reply(model, Request((), Sampling(), "c@0"))


def test_function_sees_the_messages() -> None:
    assert reply(ScriptedModel(lambda messages: messages[-1].content.upper())) == "TWO WORDS"


def test_raises_on_request() -> None:
    with pytest.raises(TimeoutError, match="slow"):
        reply(ScriptedModel([TimeoutError("slow")]))


def test_ids_with_a_chat_format(chat: ChatFormat) -> None:
    completion = asyncio.run(ScriptedModel(["yes"], chat=chat).generate(ASK))
    assert completion.token_ids == tuple(chat.encode_action("yes"))
    assert completion.logprobs == (0.0,) * len(completion.token_ids)
    assert completion.prompt_tokens == len(chat.encode(ASK.messages))
    short = Request(ASK.messages, Sampling(max_tokens=2), "b")
    cut = asyncio.run(ScriptedModel(["a long reply"], chat=chat).generate(short))
    assert (cut.finish_reason, len(cut.token_ids)) == ("length", 2)
    assert "a long reply".startswith(cut.text)


def test_closed() -> None:
    model = ScriptedModel(["one"])
    asyncio.run(model.close())
    with pytest.raises(ModelError, match="closed"):
        reply(model)
