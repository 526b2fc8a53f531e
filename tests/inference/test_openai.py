"""The OpenAI backend against a real server that misbehaves."""

from __future__ import annotations

import asyncio
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from misbehaving import Endpoint, Fault, Served, at_random, echo, in_order

from evolve_dag.config.schema import OpenAIModelSettings
from evolve_dag.errors import ModelError, UnreachableError
from evolve_dag.inference.ledger import Ledger, purpose
from evolve_dag.inference.openai import CHARACTERS_PER_TOKEN, OpenAIModel, _is_strict, _Tally
from evolve_dag.protocols import Completion, LanguageModel, Request, Sampling
from evolve_dag.records import Call, Message

SECRET = "top-secret-key-0123456789"
MESSAGES = (Message("system", "Be brief."), Message("user", "Who is the mayor of Bado Keli?"))
REQUEST = Request(MESSAGES, Sampling(temperature=0.5, top_p=0.9, max_tokens=64, seed=2**40 + 7))


def settings(*urls: str, **changes: Any) -> OpenAIModelSettings:
    values = {"backend": "openai", "model": "some-model", "endpoints": urls, "key": "TEST_ENDPOINT_KEY", "timeout_seconds": 5.0}
    return OpenAIModelSettings(**{**values, **changes})


def build(*urls: str, ledger: Ledger | None = None, pause: float = 0.001, **changes: Any) -> OpenAIModel:
    return OpenAIModel(settings(*urls, **changes), role="judge", ledger=ledger, pause=pause)


def ask(model: LanguageModel, *requests: Request) -> list[Completion]:
    async def main() -> list[Completion]:
        try:
            return await asyncio.gather(*(model.generate(request) for request in requests))
        finally:
            await model.close()

    return asyncio.run(main())


def numbered(count: int) -> list[Request]:
    return [replace(REQUEST, sampling=replace(REQUEST.sampling, seed=n)) for n in range(count)]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_ENDPOINT_KEY", SECRET)


def test_what_is_sent_and_what_comes_back() -> None:
    ledger = Ledger()
    with Endpoint(key=SECRET) as server:
        model = build(server.url, ledger=ledger, extra={"chat_template_kwargs": {"enable_thinking": False}, "top_p": None})
        assert isinstance(model, LanguageModel)
        (completion,) = ask(model, REQUEST)
    (arrival,) = server.arrivals
    assert arrival.path == "/v1/chat/completions"
    assert arrival.body == {
        "model": "some-model",
        "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who is the mayor of Bado Keli?"}],
        "temperature": 0.5,
        "max_tokens": 64,
        "seed": 7,
        "chat_template_kwargs": {"enable_thinking": False},
    }
    assert completion == Completion(echo(arrival.body), (), (), "stop", 9, 2, 0)
    (call,) = ledger.calls()
    assert call == Call("judge", "some-model", "", "ok", 1, 9, 2, 2, call.seconds, None, None, 0)


@pytest.mark.parametrize("kind", ["429", "500", "503", "408", "409", "close", "cut", "wrong_json", "wrong_shape", "empty"])
def test_a_passing_fault_is_got_over_and_recorded_as_one_call(kind: str) -> None:
    ledger = Ledger()
    with Endpoint(script=in_order(Fault(kind), Fault(kind))) as server:
        (completion,) = ask(build(server.url, ledger=ledger), REQUEST)
    assert completion.text == echo(server.arrivals[-1].body)
    assert server.served.faults == {kind: 2}
    (call,) = ledger.calls()
    assert (call.outcome, call.attempts, call.error) == ("ok", 3, None)
    assert (call.prompt_tokens, call.cached_tokens, call.completion_tokens) == stated(server.served)
    assert completion.prompt_tokens == 9  # of the answer that counts alone


def stated(served: Served) -> tuple[int, int, int]:
    return served.prompt_tokens, served.cached_tokens, served.completion_tokens


def test_an_endpoint_that_hangs_is_left_after_the_timeout() -> None:
    with Endpoint(script=in_order(Fault("hang", seconds=20))) as server:
        started = time.monotonic()
        (completion,) = ask(build(server.url, timeout_seconds=0.3), REQUEST)
        assert time.monotonic() - started < 5
    assert completion.text.startswith("answer")
    assert server.served.requests == 2


def test_many_hangs_do_not_use_up_the_connections() -> None:
    with Endpoint(script=in_order(*[Fault("hang", seconds=20)] * 6)) as server:
        done = ask(build(server.url, timeout_seconds=0.3, concurrency=2), *numbered(8))
    assert len(done) == 8
    assert server.served.answers == 8


@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (Fault("400", message="unknown field seed"), ".structured (now json_schema) and .extra"),
        (Fault("401"), "TEST_ENDPOINT_KEY"),
        (Fault("403"), "TEST_ENDPOINT_KEY"),
        (Fault("404", message="no such model"), "models.judge.model"),
        (Fault("429", message="You exceeded your current quota, please check your plan"), "credit"),
        (
            Fault("400", message="the supported model names are a and b, you passed some-model"),
            "models.judge.model (now some-model)",
        ),
        (Fault("filter"), "change the request"),
        (Fault("filter_late"), "change the request"),
        (Fault("length"), "let it think less, or not at all: models.judge.extra"),
    ],
)
def test_what_asking_again_cannot_mend_is_not_asked_again(fault: Fault, named: str) -> None:
    ledger = Ledger()
    with Endpoint(script=in_order(fault)) as server, pytest.raises(ModelError) as caught:
        ask(build(server.url, ledger=ledger), REQUEST)
    assert server.served.requests == 1
    assert named in caught.value.remedy
    assert server.url in caught.value.what
    assert fault.message in caught.value.what
    (call,) = ledger.calls()
    assert (call.outcome, call.attempts, call.cost) == ("error", 1, None)
    assert call.error == caught.value.what


def test_a_quota_of_the_minute_is_waited_for() -> None:
    said = "You exceeded your current quota, please check your plan and billing details.\nPlease retry in 1.2s."
    with Endpoint(script=in_order(Fault("429", message=said))) as server:
        assert len(ask(build(server.url), REQUEST)) == 1


def test_a_call_that_never_succeeds_is_an_error_in_the_ledger() -> None:
    ledger = Ledger()
    said = r"4 of 4 attempts failed, the last one: .* answers 503: overloaded"
    with (
        Endpoint(script=lambda body, seen: Fault("503", message="overloaded")) as server,
        pytest.raises(ModelError, match=said) as caught,
    ):
        ask(build(server.url, ledger=ledger, attempts=4), REQUEST)
    assert "attempts" in caught.value.remedy
    (call,) = ledger.calls()
    assert (call.outcome, call.attempts) == ("error", 4) == ("error", server.served.requests)
    assert ledger.totals()["judge"]["errors"] == 1


def test_a_dead_address_is_named() -> None:
    with pytest.raises(ModelError, match=r"http://127\.0\.0\.1:9/v1: connection lost"):
        ask(build("http://127.0.0.1:9/v1", attempts=2), REQUEST)


def test_an_error_inside_of_a_200_is_an_error() -> None:
    # Gateways answer 200 and put the failure of the model behind them into the body.
    faults = (Fault("in_200", message="upstream is down", code=502), Fault("in_200", message="no such key", code=401))
    with Endpoint(script=in_order(*faults)) as server, pytest.raises(ModelError, match="answers 401: no such key"):
        ask(build(server.url), REQUEST)
    assert server.served.requests == 2


def test_an_error_inside_of_a_200_says_its_status_as_text_or_in_a_word() -> None:
    with Endpoint(script=in_order(Fault("in_200", message="no such key", code="401"))) as server:
        with pytest.raises(ModelError, match="answers 401: no such key"):
            ask(build(server.url), REQUEST)
        assert server.served.requests == 1
    too_long = Fault("in_200", message="the input does not fit", code="context_length_exceeded")
    long = Request((Message("user", "word " * 4000),), REQUEST.sampling)
    with Endpoint(script=in_order(too_long)) as server:
        [answer] = ask(build(server.url), long)
        assert answer.cut_characters > 0
        assert server.served.requests == 2


def test_retry_after_is_honoured_by_every_call() -> None:
    with Endpoint(script=in_order(Fault("429", retry_after="0.6"))) as server:

        async def main() -> None:
            model = build(server.url)
            first = asyncio.create_task(model.generate(REQUEST))
            while not server.served.faults:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            await asyncio.gather(first, *(model.generate(request) for request in numbered(3)))
            await model.close()

        asyncio.run(main())
    first, *others = [arrival.at for arrival in server.arrivals]
    assert len(others) == 4
    assert min(others) - first >= 0.6


def test_the_other_endpoint_is_asked_meanwhile() -> None:
    with Endpoint(script=in_order(Fault("429", retry_after="30"))) as slow, Endpoint() as ready:
        started = time.monotonic()
        done = ask(build(slow.url, ready.url), *numbered(4))
        assert time.monotonic() - started < 5
    assert len(done) == 4
    assert ready.served.answers + slow.served.answers == 4


def test_an_unreasonable_retry_after_ends_the_call() -> None:
    with Endpoint(script=in_order(Fault("429", retry_after="7200"))) as server, pytest.raises(ModelError, match="wait 7200 s"):
        ask(build(server.url), REQUEST)
    assert server.served.requests == 1


REFUSALS = [
    Fault("429", retry_after="7200"),
    Fault("429", message="insufficient_quota"),
    Fault("401"),
    Fault("in_200", code=402),
]


@pytest.mark.parametrize("fault", REFUSALS)
def test_where_one_endpoint_refuses_the_others_are_asked(fault: Fault) -> None:
    with Endpoint(script=lambda body, before: fault) as refusing, Endpoint() as ready:
        assert len(ask(build(refusing.url, ready.url, concurrency=1), *numbered(4))) == 4
    assert (refusing.served.requests, ready.served.answers) == (1, 4)


def test_where_all_endpoints_refuse_every_call_fails_at_once() -> None:
    with (
        Endpoint(script=lambda body, before: Fault("401")) as first,
        Endpoint(script=lambda body, before: Fault("404")) as second,
    ):

        async def main() -> list[Any]:
            model = build(first.url, second.url)
            failed = [await asyncio.gather(model.generate(REQUEST), return_exceptions=True) for _ in range(2)]
            await model.close()
            return failed

        failed = asyncio.run(main())
    assert all(isinstance(error, UnreachableError) for (error,) in failed)
    assert first.served.requests == second.served.requests == 2


def test_pauses_grow_and_are_jittered(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[tuple[float, float]] = []

    def uniform(low: float, high: float) -> float:
        drawn.append((low, high))
        return 0.0

    monkeypatch.setattr("evolve_dag.inference.openai.random.uniform", uniform)
    with Endpoint(script=in_order(*[Fault("500")] * 5)) as server:
        model = OpenAIModel(settings(server.url), role="judge", pause=1.0, longest_pause=6.0)
        ask(model, REQUEST)
    assert drawn == [(0, 1.0), (0, 2.0), (0, 4.0), (0, 6.0), (0, 6.0)]


def test_calls_in_flight_are_bounded_over_all_endpoints_and_spread() -> None:
    with Endpoint(latency=0.03) as first, Endpoint(latency=0.03) as second:
        ask(build(first.url, second.url, concurrency=6), *numbered(60))
    assert first.served.answers + second.served.answers == 60
    assert first.served.most_at_once + second.served.most_at_once <= 6
    assert abs(first.served.answers - second.served.answers) <= 12
    with Endpoint(latency=0.02) as alone:
        ask(build(alone.url, concurrency=5), *numbered(25))
    assert alone.served.most_at_once == 5


def test_a_dead_endpoint_does_not_draw_the_calls_to_itself() -> None:
    ledger = Ledger()
    with Endpoint(latency=0.02) as server:
        done = ask(build("http://127.0.0.1:9/v1", server.url, ledger=ledger, concurrency=4, pause=0.05), *numbered(40))
    assert len(done) == 40
    assert server.served.answers == 40
    # Least busy as it is, it would take every second attempt; it is asked now and then.
    assert ledger.totals()["judge"]["attempts"] <= 40 + 20


def test_one_model_serves_one_event_loop_after_the_other() -> None:
    with Endpoint() as server:
        model = build(server.url)

        async def main() -> str:
            return (await model.generate(REQUEST)).text

        assert asyncio.run(main()) == asyncio.run(main())
        asyncio.run(model.close())
        asyncio.run(model.close())
        with pytest.raises(ModelError, match="closed"):
            asyncio.run(main())
    assert server.served.answers == 2


@pytest.mark.filterwarnings("error::ResourceWarning")
@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
def test_connections_end_with_their_loop() -> None:
    import gc

    with Endpoint() as server:
        model = build(server.url)

        async def main(model: OpenAIModel) -> None:
            await asyncio.gather(*(model.generate(request) for request in numbered(4)))

        asyncio.run(main(model))
        asyncio.run(main(model))
        assert len(model._connections) == 1  # the first loop's are gone
        del model
        gc.collect()


def test_a_cancelled_call_is_in_the_ledger_when_it_was_sent() -> None:
    ledger = Ledger()
    with Endpoint(script=lambda body, seen: Fault("hang")) as server:

        async def main() -> None:
            model = build(server.url, ledger=ledger, concurrency=1)
            tasks = [asyncio.create_task(model.generate(request)) for request in numbered(3)]
            while not server.served.requests:
                await asyncio.sleep(0.01)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await model.close()

        asyncio.run(main())
    (call,) = ledger.calls()
    assert (call.outcome, call.attempts, call.error) == ("error", 1, "CancelledError")


@pytest.mark.parametrize("variable", ["TEST_ENDPOINT_KEY", "TEST_ENDPOINT_WORD"])
@pytest.mark.parametrize("kind", ["401", "403", "400", "500", "in_200"])
def test_the_key_is_in_no_error_and_no_ledger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str, kind: str
) -> None:
    monkeypatch.delenv("TEST_ENDPOINT_KEY")
    monkeypatch.setenv(variable, SECRET)  # a variable may be named like no secret
    ledger = Ledger(tmp_path / "calls.jsonl")
    fault = Fault(kind, message=f"you sent {SECRET}")  # some servers say the key back
    with Endpoint(script=lambda body, seen: fault) as server:
        address = server.url.replace("//", "//user:hidden-password@")
        model = build(address, ledger=ledger, attempts=2, key=variable)
        with pytest.raises(ModelError, match=r"you sent \*\*\*") as caught:
            ask(model, REQUEST)
    (call,) = ledger.calls()
    assert call.error == caught.value.what
    for shown in (str(caught.value), repr(caught.value.__cause__), (tmp_path / "calls.jsonl").read_text()):
        assert SECRET not in shown
        assert "hidden-password" not in shown


def test_a_missing_key_is_named_unless_the_endpoint_is_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TEST_ENDPOINT_KEY")
    with pytest.raises(ModelError, match="TEST_ENDPOINT_KEY is not set"):
        build("https://api.example.com/v1")
    for address in ("http://localhost:1/v1", "http://10.0.0.7/v1", "http://[::1]:8000/v1", "http://vllm:8000/v1"):
        build(address)
    with Endpoint() as server:
        ask(build(server.url), REQUEST)
        with Endpoint(key="another") as closed, pytest.raises(ModelError) as caught:
            ask(build(closed.url), REQUEST)
    assert "TEST_ENDPOINT_KEY is not set" in caught.value.remedy


@pytest.mark.parametrize("key", ["two words", "line\nbreak", "schl\u00fcssel"])
def test_a_value_that_cannot_be_a_key_is_refused_without_showing_it(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEST_ENDPOINT_KEY", key)
    with pytest.raises(ModelError, match="TEST_ENDPOINT_KEY holds characters") as caught:
        build("https://api.example.com/v1")
    assert key not in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"endpoints": ("api.example.com/v1",)}, "no http address"),
        ({"endpoints": ("file:///etc/passwd",)}, "no http address"),
        ({"endpoints": ("http://[::1/v1",)}, "no http address"),
        ({"endpoints": ("http://host:port/v1",)}, "no http address"),
        ({"extra": {"stream": True}}, "extra sets stream"),
        ({"extra": {"n": 4}}, "extra sets n"),
    ],
)
def test_settings_that_cannot_work_are_refused_at_once(changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ModelError, match=named):
        build("http://localhost:1/v1", **changes)


LOOSE = {"type": "object"}
STRICT = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"], "additionalProperties": False}


@pytest.mark.parametrize(
    ("structured", "schema", "expected"),
    [
        ("json_schema", STRICT, {"type": "json_schema", "json_schema": {"name": "answer", "schema": STRICT, "strict": True}}),
        (
            "json_schema",
            {"type": "object"},
            {"type": "json_schema", "json_schema": {"name": "answer", "schema": {"type": "object"}}},
        ),
        ("json_object", STRICT, {"type": "json_object"}),
        ("none", STRICT, None),
        ("json_schema", None, None),
    ],
)
def test_structured_answers_are_asked_for_as_the_endpoint_knows_them(structured: str, schema: Any, expected: Any) -> None:
    with Endpoint() as server:
        ask(build(server.url, structured=structured), replace(REQUEST, answer_schema=schema))
    body = server.arrivals[0].body
    assert body.get("response_format") == expected
    assert ("JSON" in body["messages"][-1]["content"]) == (structured == "json_object")


def test_bounds_of_a_schema_are_not_sent() -> None:
    text = {"type": "string", "pattern": "^a+$", "minLength": 1, "maxLength": 9}
    schema = {
        "type": "object",
        "properties": {"pattern": text, "ids": {"type": "array", "items": {"enum": ["a", None]}, "minItems": 1, "maxItems": 2}},
        "required": ["pattern", "ids"],
        "additionalProperties": False,
    }
    with Endpoint() as server:
        ask(build(server.url), replace(REQUEST, answer_schema=schema))
    sent = server.arrivals[0].body["response_format"]["json_schema"]
    assert sent["strict"] is True
    assert sent["schema"] == {
        **schema,
        "properties": {"pattern": {"type": "string"}, "ids": {"type": "array", "items": {"enum": ["a", None]}}},
    }


def test_strict_schemas_require_everything_everywhere() -> None:
    assert _is_strict(STRICT)
    assert _is_strict({"type": "array", "items": STRICT})
    assert not _is_strict({**STRICT, "required": []})
    assert not _is_strict({"type": "array", "items": {**STRICT, "additionalProperties": True}})


def test_an_endpoint_that_wants_the_newer_name_of_the_limit_gets_it() -> None:
    message = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."

    def script(body: dict[str, Any], seen: int) -> Fault | None:
        return Fault("400", message=message) if "max_tokens" in body else None

    with Endpoint(script=script) as server:
        ask(build(server.url, concurrency=1), *numbered(3))
    assert server.served.faults == {"400": 1}
    assert [arrival.body.get("max_completion_tokens") for arrival in server.arrivals] == [None, 64, 64, 64]


def test_a_limit_of_the_experiment_that_the_endpoint_does_not_know_is_refused_at_once() -> None:
    message = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    script = in_order(*[Fault("400", message=message)] * 3)
    with Endpoint(script=script) as server, pytest.raises(ModelError, match="Use 'max_completion_tokens' instead") as caught:
        ask(build(server.url, extra={"max_tokens": 4000}), REQUEST)
    assert ".extra" in caught.value.remedy
    assert len(server.arrivals) == 1


def test_an_answer_far_over_the_limit_is_cut_and_counts_as_cut_off() -> None:
    with Endpoint(script=in_order(Fault("over_long"))) as server:
        (long,) = ask(build(server.url), REQUEST)
    assert (len(long.text), long.finish_reason) == (CHARACTERS_PER_TOKEN * 64, "length")
    assert server.served.requests == 1


@pytest.mark.parametrize("reason", ["insufficient_system_resource", "error", "abort"])
def test_half_an_answer_is_asked_for_again(reason: str) -> None:
    with Endpoint(script=in_order(Fault("broken_off", message=reason))) as server:
        (whole,) = ask(build(server.url), REQUEST)
    assert whole.text == echo(server.arrivals[-1].body)
    assert server.served.requests == 2


def test_no_header_that_is_meant_for_openai_goes_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client takes these from the environment by itself."""
    monkeypatch.setenv("OPENAI_ORG_ID", "org-meant-for-openai")
    monkeypatch.setenv("OPENAI_PROJECT_ID", "project-meant-for-openai")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Gateway: meant-for-openai\nAuthorization: Bearer meant-for-openai")
    with Endpoint(key=SECRET) as server:
        ask(build(server.url), REQUEST)
    (arrival,) = server.arrivals
    assert "meant-for-openai" not in str(arrival.headers)


def test_a_request_that_is_too_long_keeps_head_and_tail_and_says_so() -> None:
    ledger = Ledger()
    page = f"HEAD {'word ' * 4_000}TAIL"
    request = replace(REQUEST, messages=(*MESSAGES, Message("assistant", "look"), Message("tool", page)))
    with Endpoint() as server:
        model = build(server.url, ledger=ledger, context_tokens=2_000)
        (completion,) = ask(model, request)
    sent = server.arrivals[0].body["messages"]
    assert [m["content"] for m in sent[:3]] == ["Be brief.", "Who is the mayor of Bado Keli?", "look"]
    assert sent[3]["content"].startswith("<tool_response>\nHEAD word")
    assert sent[3]["content"].endswith("TAIL\n</tool_response>")
    assert f"[... {completion.cut_characters:,} characters cut ...]" in sent[3]["content"]
    assert completion.cut_characters == ledger.calls()[0].cut_characters > 12_000
    assert ledger.totals()["judge"]["cut"] == 1
    assert request.messages[3].content == page


def test_what_the_endpoint_still_finds_too_long_is_cut_harder_once() -> None:
    ledger = Ledger()
    request = replace(REQUEST, messages=(*MESSAGES, Message("user", "HEAD " + "a " * 3_000 + "TAIL")))
    with Endpoint(context_tokens=2_000) as server:  # two bytes a token: denser than the estimate takes it for
        (completion,) = ask(build(server.url, ledger=ledger), request)
        assert server.served.faults == {"context": 1}
        assert 0 < completion.cut_characters < 4_000
        assert ledger.calls()[0].attempts == 2
    with Endpoint(context_tokens=20) as tiny, pytest.raises(ModelError, match="maximum context length is 20") as caught:
        ask(build(tiny.url), request)
    assert tiny.served.requests == 2
    assert "context_tokens" in caught.value.remedy


def test_cost_follows_from_prices_and_what_the_endpoint_states() -> None:
    ledger = Ledger()
    prices = {"price_prompt": 2.0, "price_cached": 0.5, "price_completion": 10.0}
    with Endpoint(script=in_order(Fault("empty"))) as server:
        ask(build(server.url, ledger=ledger, **prices), REQUEST)
        prompt, cached, completion = stated(server.served)  # the empty answer is paid as well
        assert (prompt, cached, completion) == (18, 4, 2)
        assert ledger.calls()[0].cost == pytest.approx((14 * 2.0 + 4 * 0.5 + 2 * 10.0) / 1e6)
        ask(build(server.url, ledger=ledger, **{**prices, "price_cached": None}), REQUEST)
        assert ledger.calls()[1].cost == pytest.approx((9 * 2.0 + 2 * 10.0) / 1e6)
        ask(build(server.url, ledger=ledger, price_prompt=2.0), REQUEST)
    assert ledger.calls()[2].cost is None


@pytest.mark.parametrize("odd", ["NaN", "Infinity", "-Infinity", "1" + "0" * 400, "-3", "true", '"many"', "null"])
def test_a_number_of_tokens_that_is_none_counts_as_not_stated(odd: str) -> None:
    usage = json.loads(
        f'{{"prompt_tokens": 9, "completion_tokens": {odd}, "prompt_tokens_details": {{"cached_tokens": {odd}}}}}'
    )
    tally = _Tally()
    assert tally.add(usage) == (9, 0)
    assert tally.cost(settings("http://127.0.0.1/v1", price_prompt=2.0, price_completion=10.0)) == pytest.approx(9 * 2e-6)


def test_a_call_is_recorded_with_what_it_is_for() -> None:
    ledger = Ledger()
    with Endpoint() as server:
        model = build(server.url, ledger=ledger)

        async def main() -> None:
            with purpose("verdict"):
                await model.generate(REQUEST)

        asyncio.run(main())
    assert ledger.calls()[0].purpose == "verdict"


def test_random_faults_lose_and_double_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "calls.jsonl")
    kinds = ("429", "500", "503", "cut", "close", "wrong_json", "wrong_shape", "empty")
    with Endpoint(script=at_random(0.3, kinds, seed=5), latency=0.005) as server:
        done = ask(build(server.url, ledger=ledger, attempts=12), *numbered(150))
    expected = {arrival.body["seed"]: echo(arrival.body) for arrival in server.arrivals}
    assert [completion.text for completion in done] == [expected[n] for n in range(150)]
    assert set(server.served.answered.values()) == {1}
    totals = Ledger(tmp_path / "calls.jsonl").totals()["judge"]
    assert (totals["calls"], totals["errors"], totals["attempts"]) == (150, 0, server.served.requests)
    assert (totals["prompt_tokens"], totals["cached_tokens"], totals["completion_tokens"]) == stated(server.served)
    assert sum(server.served.faults.values()) == server.served.requests - 150 > 30
