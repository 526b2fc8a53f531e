"""An endpoint that says the key back, in any form and at any place: no more than three characters of it reach any sink."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evolve_dag import secrecy
from evolve_dag.config.schema import OpenAIModelSettings
from evolve_dag.errors import ModelError
from evolve_dag.inference.ledger import Ledger
from evolve_dag.inference.openai import OpenAIModel
from evolve_dag.inference.vllm_servers import Servers, server_key
from evolve_dag.protocols import Request, Sampling
from evolve_dag.records import Message

KEY = "Zq9vK2xWb7LmT4YpRg6N"
REQUEST = Request((Message("user", "Who?"),), Sampling(max_tokens=512))
POSITIONS = (*range(0, 240, 40), *range(240, 310), *range(400, 510, 5))
"""Of the key in what an endpoint says: every one at which a cut after 300 characters falls into it, some others. That of
:func:`~evolve_dag.secrecy.excerpt` itself is tried at every place in tests/test_secrecy.py."""


def said(place: int, key: str = KEY) -> str:
    return f"{'. ' * (place // 2)}{'.' * (place % 2)} key={key} is wrong. {'. ' * 40}"


Body = Callable[[str], bytes]
BODIES: dict[str, Body] = {
    "error.message": lambda text: json.dumps({"error": {"message": text, "type": "x", "code": None}}).encode(),
    "error": lambda text: json.dumps({"error": text}).encode(),
    "message": lambda text: json.dumps({"message": text}).encode(),
    "detail": lambda text: json.dumps({"detail": text}).encode(),
    "detail in a list": lambda text: json.dumps({"detail": [{"loc": ["body"], "msg": text}]}).encode(),
    "unknown field": lambda text: json.dumps({"reason": {"why": text}}).encode(),
    "list": lambda text: json.dumps([text]).encode(),
    "nested": lambda text: json.dumps({"error": {"error": {"error": {"message": text}}}}).encode(),
    "JSON within JSON": lambda text: json.dumps({"error": {"message": json.dumps({"error": text})}}).encode(),
    "escaped": lambda text: json.dumps({"error": text}).replace("Z", "\\u005a").encode(),
    "text": lambda text: text.encode(),
    "bytes": lambda text: b"\xff\xfe" + text.encode() + b"\xff",
    "page": lambda text: f"<html><body><h1>401</h1><p>{text}</p></body></html>".encode(),
    "cut off": lambda text: json.dumps({"error": text}).encode()[: 12 + len(text) // 2],
    "type": lambda text: json.dumps({"error": {"type": text, "code": text}}).encode(),
    "deep": lambda text: b'{"error": ' * 3000 + json.dumps(text).encode() + b"}" * 3000,
}
STATUSES = (200, 400, 401, 402, 404, 413, 418, 429, 500, 503)


def leaks(text: str) -> list[str]:
    return [KEY[n : n + 4] for n in range(len(KEY) - 3) if KEY[n : n + 4] in text]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(secrecy, "_keys", set())
    monkeypatch.setenv("ENDPOINT_WORD", KEY)  # a variable may be named like no secret
    yield
    secrecy._masker.cache_clear()


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[dict[str, Any]], httpx2.Response]]:
    """What the endpoint answers with, in place of a network; the last one stands."""
    given: list[Callable[[dict[str, Any]], httpx2.Response]] = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        assert request.headers["authorization"] == f"Bearer {KEY}"
        return given[-1](json.loads(request.content))

    monkeypatch.setattr(
        openai, "DefaultAsyncHttpxClient", lambda **_: httpx2.AsyncClient(transport=httpx2.MockTransport(handle))
    )
    return given


def model(ledger: Ledger, **changes: Any) -> OpenAIModel:
    values = {"backend": "openai", "model": "m", "endpoints": ("https://api.example/v1",), "key": "ENDPOINT_WORD", **changes}
    return OpenAIModel(OpenAIModelSettings(**values), role="judge", ledger=ledger, pause=0.0)


def ask(asked: OpenAIModel, places: Iterable[int] = POSITIONS) -> list[Any]:
    """One call for each place; the seed tells the endpoint which."""

    async def main() -> list[Any]:
        requests = (replace(REQUEST, sampling=replace(REQUEST.sampling, seed=place)) for place in places)
        try:
            return await asyncio.gather(*map(asked.generate, requests), return_exceptions=True)
        finally:
            await asked.close()

    return asyncio.run(main())


def everything(error: BaseException) -> str:
    """What a traceback, and Dagster's event, shows of it."""
    return "".join(traceback.format_exception(error)) + repr(error)


@pytest.mark.parametrize("form", BODIES)
def test_an_error_of_any_form_with_the_key_at_any_place(
    form: str, answers: list[Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    body = BODIES[form]
    ledger = Ledger(tmp_path / "calls.jsonl")
    status = STATUSES[sum(form.encode()) % len(STATUSES)]  # every form with one, every status below
    answers.append(lambda sent: httpx2.Response(status, content=body(said(sent["seed"]))))
    errors = ask(model(ledger, attempts=2, concurrency=32))
    for place, error in zip(POSITIONS, errors, strict=True):
        assert isinstance(error, ModelError)
        assert not leaks(everything(error)), place
    written = (tmp_path / "calls.jsonl").read_text()
    assert written.count("\n") == len(POSITIONS)
    assert not leaks(written)
    assert not leaks(caplog.text)


@pytest.mark.parametrize("status", STATUSES)
def test_every_status(status: int, answers: list[Any], tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "calls.jsonl")
    answers.append(lambda sent: httpx2.Response(status, content=BODIES["error"](said(sent["seed"]))))
    places = range(240, 310)
    for error in ask(model(ledger, attempts=1), places):
        assert isinstance(error, ModelError)
        assert not leaks(everything(error))
    assert not leaks((tmp_path / "calls.jsonl").read_text())


@pytest.mark.parametrize("kept", range(4, len(KEY) + 1))
def test_a_key_that_the_endpoint_itself_has_cut(kept: int, answers: list[Any]) -> None:
    answers.append(lambda sent: httpx2.Response(401, json={"error": {"message": f"wrong key {KEY[:kept]}"}}))
    (error,) = ask(model(Ledger()), range(1))
    assert not leaks(everything(error))


@given(place=st.integers(0, 40), kind=st.sampled_from(["protocol", "refused", "timeout", "unpack"]))
@settings(max_examples=30)
def test_exceptions_whose_words_hold_the_key(place: int, kind: str) -> None:
    kinds = {
        "protocol": httpx2.LocalProtocolError,
        "refused": httpx2.ConnectError,
        "timeout": httpx2.ReadTimeout,
        "unpack": httpx2.DecodingError,
    }

    def fail(request: httpx2.Request) -> httpx2.Response:
        raise kinds[kind](f"Illegal header value b'{'x' * place}Bearer {KEY}'")

    ledger = Ledger()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openai, "DefaultAsyncHttpxClient", lambda **_: httpx2.AsyncClient(transport=httpx2.MockTransport(fail)))
        (error,) = ask(model(ledger, attempts=2), range(1))
    assert isinstance(error, ModelError)
    assert not leaks(everything(error))
    assert not leaks(str(ledger.calls()))


def good(text: str, finish: str = "stop") -> dict[str, Any]:
    return {"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": {"prompt_tokens": 1}}


def test_a_good_answer_with_the_key_in_it(answers: list[Any]) -> None:
    answers.append(lambda sent: httpx2.Response(200, json=good(said(sent["seed"]))))
    done = ask(model(Ledger()), range(0, 560, 7))
    assert [completion.text for completion in done] == [said(place, "***") for place in range(0, 560, 7)]


def test_a_good_answer_that_ends_within_the_key(answers: list[Any]) -> None:
    """At the token limit, or where an answer is longer than was asked for and cut here."""
    answers.append(lambda sent: httpx2.Response(200, json=good(f"it is {KEY[: sent['seed']]}", "length")))
    for completion in ask(model(Ledger()), range(len(KEY) + 1)):
        assert not leaks(completion.text)
    answers.append(lambda sent: httpx2.Response(200, json=good("x" * (512 * 32 - sent["seed"]) + KEY + "x" * 90)))
    for completion in ask(model(Ledger()), range(len(KEY) + 4)):
        assert completion.finish_reason == "length"
        assert not leaks(completion.text)


def test_a_refusal_and_parts(answers: list[Any]) -> None:
    refusal = {"choices": [{"message": {"content": "", "refusal": said(290)}, "finish_reason": "stop"}]}
    answers.append(lambda sent: httpx2.Response(200, json=refusal))
    (error,) = ask(model(Ledger()), range(1))
    assert isinstance(error, ModelError)
    assert not leaks(everything(error))
    halves = [{"type": "text", "text": f"it is {KEY[:9]}"}, {"type": "text", "text": f"{KEY[9:]}."}]
    answers.append(lambda sent: httpx2.Response(200, json={"choices": [{"message": {"content": halves}}]}))
    (completion,) = ask(model(Ledger()), range(1))
    assert completion.text == "it is ***."


# -- vLLM servers


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evolve_dag.inference.vllm_servers._FIRST_PAUSE", 0.0)


@pytest.mark.parametrize("form", [*BODIES, "cards", "length"])
@pytest.mark.parametrize("status", [200, 401, 500])
def test_a_vllm_server_that_says_the_key_back(form: str, status: int, no_pauses: None) -> None:
    bodies = {
        **BODIES,
        "cards": lambda text: json.dumps({"data": [{"id": text, "max_model_len": 9}]}).encode(),
        "length": lambda text: json.dumps({"data": [{"id": "m", "max_model_len": text}]}).encode(),
    }
    for place in (0, 50, 60, 70, 270, 280, 285, 290, 295):
        content = bodies[form](said(place))
        transport = httpx.MockTransport(lambda _, content=content: httpx.Response(status, content=content))
        with pytest.raises(ModelError) as caught:
            Servers(["http://10.0.0.1:8000/v1"], model="other", key=server_key("ENDPOINT_WORD"), transport=transport)
        assert not leaks(everything(caught.value)), place


def test_a_servers_key_that_cannot_be_one_is_refused_before_a_header_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENDPOINT_WORD", f"{KEY}\n\x01{KEY}")
    with pytest.raises(ModelError, match="ENDPOINT_WORD holds characters") as caught:
        server_key("ENDPOINT_WORD")
    assert not leaks(everything(caught.value))
    monkeypatch.setenv("ENDPOINT_WORD", f"{KEY}\n")  # as a file of secrets gives it
    assert server_key("ENDPOINT_WORD") == KEY
    assert server_key("") == ""
