"""Any OpenAI-compatible endpoint: many calls at once, tries again what is worth trying, writes down what it cost.

The official client carries the requests; retries are made here, because a pause must free the place of the call, a
``Retry-After`` holds for the whole endpoint and not for one call, and the ledger counts attempts. Answers are read from
the raw response: building the client's typed objects is a third of its CPU time (benchmarks/endpoint.py --bare).
"""

from __future__ import annotations

import asyncio
import json
import logging
import random
import re
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import openai

from evolve_dag.config.schema import OpenAIModelSettings
from evolve_dag.errors import ClosedError, ModelError, UnreachableError
from evolve_dag.inference.addresses import host_of, is_local, public_name
from evolve_dag.inference.ledger import Ledger, current_purpose
from evolve_dag.inference.outgoing import chat_messages, estimate, fit
from evolve_dag.inference.patience import retry_after
from evolve_dag.protocols import Completion, Request
from evolve_dag.records import Call
from evolve_dag.secrecy import describe_error, excerpt, read_key, without_keys

log = logging.getLogger(__name__)

http: Any = sys.modules[openai.DefaultAsyncHttpxClient.__mro__[1].__module__]
"""What the client speaks through: httpx2, or httpx in its version 2, which the library `verifiers` asks for."""
HARDER = 0.6
"""Share of the tokens that a conversation is cut to when the endpoint says that it is still too long."""
CHARACTERS_PER_TOKEN = 32
"""An answer with more characters than this per allowed token is cut: the endpoint did not keep to ``max_tokens``."""
_TRY_AGAIN = frozenset({408, 409, 425, 429})
_BOUNDS = frozenset({"pattern", "minLength", "maxLength", "minItems", "maxItems"})
"""Keywords that many endpoints refuse in a schema, OpenAI among them for some models; nobody judges an answer by them."""
_BROKEN_OFF = frozenset({"insufficient_system_resource", "error", "abort"})
"""What DeepSeek, gateways and vLLM call the end of an answer that is not whole."""
_OWN_FIELDS = ("messages", "model", "stream")
_TOO_LONG = re.compile(
    r"context[ _]?(?:length|window|size)|maximum (?:context|model) length|max_model_len|longer than the maximum|"
    r"(?:prompt|input|request) is too (?:long|large)|too many (?:input )?tokens|exceeds? the (?:available )?context",
    re.I,
)
_NO_MONEY = re.compile(
    r"insufficient[_ ](?:quota|balance|funds)|exceeded your current quota(?!.*\bretry (?:in|after)\b)", re.I | re.S
)
"""Some say the second of a minute's quota too, and then when to come again."""
_MOST_TOKENS = 10**12
"""No call has so many."""
_TOLD = 500
"""Most characters of an error that the ledger keeps."""


class OpenAIModel:
    """Implements :class:`~evolve_dag.protocols.LanguageModel`.

    Safe to use from many tasks, and from one event loop after another (connections belong to a loop and are closed with
    it). Bounds hold per loop.

    Args:
        role: who this is in the ledger, e.g. ``extractor``.
        ledger: where calls are recorded, one line for each :meth:`generate`; None records nothing.
        pause: seconds; the n-th retry of a call waits up to ``pause * 2**(n-1)``, drawn evenly (full jitter).
        longest_pause: bound of that wait.
        longest_wait: a ``Retry-After`` beyond this is not waited for. For so long an endpoint that refuses is left alone, where
            there are others; where all refuse the call fails.

    Raises:
        UnreachableError: the key's environment variable is not set though the endpoint is not a local one.
        ModelError: an address is no http(s) address, or ``extra`` holds a field that is ours.
    """

    def __init__(
        self,
        settings: OpenAIModelSettings,
        *,
        role: str,
        ledger: Ledger | None = None,
        pause: float = 0.5,
        longest_pause: float = 30.0,
        longest_wait: float = 600.0,
    ) -> None:
        self.settings = settings
        self._role, self._ledger = role, ledger
        self._pause, self._longest_pause, self._longest_wait = pause, longest_pause, longest_wait
        self._key = read_key(settings.key)
        self._check()
        self._connections: dict[asyncio.AbstractEventLoop, _Connections] = {}
        self._limit_field = "max_tokens"
        self._closed = False

    async def generate(self, request: Request) -> Completion:
        """Sample one answer.

        Returns:
            Without token ids and log-probabilities: an endpoint hides them. ``cut_characters`` tells how much of the
            request was cut to fit; the text that was sent says so too, at the place.

        Raises:
            UnreachableError: every attempt failed, or all endpoints refused (key, account, model).
            ModelError: it does not take this request. Such a call is in the ledger with outcome ``error``, as is one before.
        """
        if self._closed:
            raise ClosedError(f"the {self._role} model {self.settings.model} was closed", "open a new one")
        started = time.monotonic()
        tally = _Tally()
        try:
            completion = await self._ask(request, tally)
        except BaseException as error:
            if tally.attempts or isinstance(error, ModelError):  # a call that was cancelled while it waited is no call
                told = error.what if isinstance(error, ModelError) else describe_error(error)
                self._record(tally, started, excerpt(told, _TOLD))
            raise
        self._record(tally, started, None)
        return completion

    def release(self, session: str) -> None:
        """Nothing is kept per episode."""

    async def close(self) -> None:
        """Close the connections of the running event loop; those of a loop that ended were closed with it."""
        self._closed = True
        connections = self._connections.pop(asyncio.get_running_loop(), None)
        if connections is not None:
            await connections.close()

    async def _ask(self, request: Request, tally: _Tally) -> Completion:
        messages = chat_messages(request.messages)
        budget = self.settings.context_tokens - request.sampling.max_tokens
        fitted, tally.cut = fit(messages, budget)
        cut_harder, failures = False, 0
        connections = self._open()
        while True:
            try:
                async with connections.place(self._pause) as endpoint:
                    return await self._attempt(endpoint, self._body(request, fitted), request, tally)
            except _TooLongError as problem:
                if cut_harder:
                    raise self._refusal(
                        f"{problem} (though it was cut to {estimate(fitted)} tokens by estimate)",
                        "lower context_tokens of the model to what the endpoint has",
                    ) from None
                cut_harder = True
                fitted, tally.cut = fit(messages, round(HARDER * min(budget, estimate(fitted))))
                continue
            except _OtherFieldError:
                continue
            except UnreachableError as refusal:
                if not connections.do_without(endpoint, self._longest_wait):
                    raise
                log.warning("%s; the other endpoints are asked", refusal.what)
                continue
            except _TransientError as problem:
                failures += 1
                if failures >= self.settings.attempts:
                    raise self._unreachable(
                        f"{failures} of {failures} attempts failed, the last one: {problem}",
                        "see that the endpoint is up; `attempts`, `timeout_seconds` and `concurrency` of the model "
                        "say how patient and how demanding we are",
                    ) from None
            await asyncio.sleep(random.uniform(0, min(self._longest_pause, self._pause * 2 ** (failures - 1))))

    async def _attempt(self, endpoint: _Endpoint, body: dict[str, Any], request: Request, tally: _Tally) -> Completion:
        """One request.

        Raises:
            ModelError: no use to try again.
            _TransientError, _TooLongError, _OtherFieldError: there is.
        """
        tally.attempts += 1
        refused: openai.APIStatusError | None = None
        try:
            async with asyncio.timeout(self.settings.timeout_seconds):
                response = await endpoint.client.post("/chat/completions", body=body, cast_to=http.Response)
            completion = self._read(response.content, endpoint, request, tally)
        except (TimeoutError, openai.APITimeoutError):
            problem = _TransientError(f"{endpoint.name}: no answer within {self.settings.timeout_seconds:g} s")
        except openai.APIStatusError as error:
            refused = error  # looked at below: raised in here, ours would carry what the endpoint said wherever it goes
        except (openai.APIConnectionError, http.HTTPError) as error:
            problem = _TransientError(f"{endpoint.name}: connection lost: {_innermost(error)}")
        except _TransientError as error:
            problem = error
        else:
            endpoint.failures, endpoint.refuses = 0, False
            return completion
        if refused is not None:
            problem = self._status(endpoint, refused.status_code, refused.body, body, refused.response.headers)
        endpoint.failures += 1
        self._hold_back(endpoint, problem)
        raise problem

    def _hold_back(self, endpoint: _Endpoint, problem: _TransientError) -> None:
        """When the endpoint may be asked again, by anyone."""
        if problem.retry_after is not None:
            endpoint.hold(problem.retry_after)
            if problem.retry_after > self._longest_wait:
                raise self._unreachable(f"{problem}; it asks to wait {problem.retry_after:.0f} s", "try again later")
        elif endpoint.siblings and endpoint.failures > 1:
            # A dead endpoint is always the least busy one: without this it would get, and fail, most calls.
            endpoint.hold(random.uniform(0.5, 1) * min(self._longest_pause, self._pause * 2.0 ** min(endpoint.failures, 16)))

    def _read(self, content: bytes, endpoint: _Endpoint, request: Request, tally: _Tally) -> Completion:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            raise _TransientError(f"{endpoint.name}: the answer is not valid JSON ({len(content)} bytes)") from None
        error = answer.get("error") if isinstance(answer, dict) else None
        if error:  # some gateways wrap a failure of the model behind them in a 200
            raise self._status(endpoint, _status_within(error), error, {}, {})
        try:
            choice = answer["choices"][0]
            message = choice["message"]
            text = without_keys(_text(message.get("content")))  # some say back what they were sent
        except (KeyError, IndexError, TypeError, AttributeError):
            raise _TransientError(f"{endpoint.name}: the answer holds no choice with a message") from None
        usage = tally.add(answer.get("usage"))
        finish = choice.get("finish_reason")
        refusal = message.get("refusal")
        if finish == "content_filter" or (refusal and not text.strip()):
            told = f"{endpoint.name} withheld the answer: {refusal or 'content filter'}"
            raise self._refusal(told, "change the request or the model")
        if finish in _BROKEN_OFF:
            raise _TransientError(f"{endpoint.name}: the answer was broken off ({finish})")
        if not text.strip():
            if finish != "length":
                raise _TransientError(f"{endpoint.name}: the answer is empty")
            raise self._refusal(
                f"{endpoint.name}: {request.sampling.max_tokens} tokens and no answer, as of a model that thinks first",
                f"let it think less, or not at all: models.{self._role}.extra, e.g. thinking: {{type: disabled}} (DeepSeek) or "
                "chat_template_kwargs: {enable_thinking: false} (Qwen3)",
            )
        reason: Literal["stop", "length"] = "length" if finish == "length" else "stop"
        most = CHARACTERS_PER_TOKEN * request.sampling.max_tokens
        if len(text) > most:
            text, reason = text[:most], "length"
        return Completion(
            text=text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8"),
            token_ids=(),
            logprobs=(),
            finish_reason=reason,
            prompt_tokens=usage[0],
            cached_tokens=usage[1],
            cut_characters=tally.cut,
        )

    def _status(
        self, endpoint: _Endpoint, status: int, error: Any, body: Mapping[str, Any], headers: Mapping[str, str]
    ) -> _TransientError:
        """The exception for an HTTP status; raises the ones that end the call or change its request."""
        said = _said(error)
        problem = f"{endpoint.name} answers {status}" + (f": {excerpt(said)}" if said else "")
        if status in (400, 413, 422) and (_TOO_LONG.search(said) or _code(error) == "context_length_exceeded"):
            raise _TooLongError(problem)
        ours = "max_tokens" in body and "max_tokens" not in self.settings.extra  # else it would be sent again for ever
        if status == 400 and ours and _wants_other_limit(said):
            self._limit_field = "max_completion_tokens"
            raise _OtherFieldError(problem)
        key = self.settings.key
        if status in (401, 403):
            state = "holds a key that it does not take" if self._key else "is not set"
            raise self._unreachable(problem, f"the environment variable {key} {state}: put the key of {endpoint.name} there")
        if status == 402 or _NO_MONEY.search(f"{said} {_code(error)}"):
            raise self._unreachable(problem, f"the account behind {key} has no credit left: top it up")
        if status in (404, 405):
            raise self._unreachable(
                problem, f"see models.{self._role}.model ({self.settings.model}) and .endpoints: an address mostly ends in /v1"
            )
        if status not in _TRY_AGAIN and status < 500:
            raise self._refusal(
                problem,
                f"the endpoint does not take the request: see models.{self._role}.model (now {self.settings.model}), "
                f".structured (now {self.settings.structured}) and .extra, where a field set to null is not sent",
            )
        return _TransientError(problem, retry_after(headers))

    def _body(self, request: Request, messages: list[dict[str, str]]) -> dict[str, Any]:
        sampling = request.sampling
        body: dict[str, Any] = {
            "model": self.settings.model,
            "messages": messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            self._limit_field: sampling.max_tokens,
            "seed": sampling.seed % 2**31,  # some servers hold it in 32 bits
        }
        schema = request.answer_schema
        if schema is not None and self.settings.structured == "json_schema":
            schema = _without_bounds(schema)
            strict = {"strict": True} if _is_strict(schema) else {}
            body["response_format"] = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, **strict}}
        elif schema is not None and self.settings.structured == "json_object":
            body["response_format"] = {"type": "json_object"}
            if not any("json" in message["content"].lower() for message in messages):
                # Endpoints with this mode refuse a conversation that never names JSON.
                last = {**messages[-1], "content": f"{messages[-1]['content']}\nAnswer with a JSON object."}
                body["messages"] = [*messages[:-1], last]
        body.update(self.settings.extra)
        return {name: value for name, value in body.items() if value is not None}

    def _record(self, tally: _Tally, started: float, error: str | None) -> None:
        if self._ledger is None:
            return
        self._ledger.record(
            Call(
                role=self._role,
                model=self.settings.model,
                purpose=current_purpose(),
                outcome="ok" if error is None else "error",
                attempts=tally.attempts,
                prompt_tokens=tally.prompt,
                cached_tokens=tally.cached,
                completion_tokens=tally.completion,
                seconds=time.monotonic() - started,
                cost=tally.cost(self.settings),
                error=error,
                cut_characters=tally.cut,
            )
        )

    def _refusal(self, what: str, remedy: str, kind: type[ModelError] = ModelError) -> ModelError:
        return kind(excerpt(f"{self._role} model {self.settings.model}: {what}", _TOLD), remedy)

    def _unreachable(self, what: str, remedy: str) -> ModelError:
        """Where no other request would fare better."""
        return self._refusal(what, remedy, UnreachableError)

    def _check(self) -> None:
        settings = self.settings
        for address in settings.endpoints:
            host = host_of(address, f"models.{self._role}.endpoints")
            if not self._key and not is_local(host):
                raise self._unreachable(
                    f"the environment variable {settings.key} is not set",
                    f"put the key of {public_name(address)} there, or name another variable in models.{self._role}.key",
                )
        ours = [name for name in _OWN_FIELDS if name in settings.extra]
        if ours or settings.extra.get("n") not in (None, 1):
            raise self._refusal(f"extra sets {', '.join(ours) or 'n'}", "leave it out: that field is set for every call")

    def _open(self) -> _Connections:
        loop = asyncio.get_running_loop()
        connections = self._connections.get(loop)
        if connections is None:
            for ended in [other for other in list(self._connections) if other.is_closed()]:
                self._connections.pop(ended, None)
            connections = self._connections[loop] = _Connections(self.settings, self._key)
        return connections


@dataclass(slots=True)
class _Tally:
    """What one call has cost so far, over its attempts."""

    attempts: int = 0
    prompt: int = 0
    cached: int = 0
    completion: int = 0
    cut: int = 0
    stated: bool = False
    """Whether an answer stated its tokens."""
    unstated: bool = False
    """Whether one did not."""

    def add(self, usage: Any) -> tuple[int, int]:
        """Count an answer's tokens; returns its prompt tokens and how many of them were cached."""
        if not isinstance(usage, dict) or not usage:
            self.unstated = True
            return 0, 0
        self.stated = True
        details = usage.get("prompt_tokens_details")
        cached = _number(details.get("cached_tokens") if isinstance(details, dict) else usage.get("prompt_cache_hit_tokens"))
        prompt = _number(usage.get("prompt_tokens"))
        cached = min(cached, prompt)
        self.prompt += prompt
        self.cached += cached
        self.completion += _number(usage.get("completion_tokens"))
        return prompt, cached

    def cost(self, settings: OpenAIModelSettings) -> float | None:
        """US dollars; None where a price or a token count is unknown."""
        price, sampled = settings.price_prompt, settings.price_completion
        if price is None or sampled is None or self.unstated or not self.stated:
            return None
        cached = price if settings.price_cached is None else settings.price_cached
        return ((self.prompt - self.cached) * price + self.cached * cached + self.completion * sampled) / 1e6


@dataclass(slots=True)
class _Endpoint:
    """One address, within one event loop."""

    name: str
    """Address without any secret."""
    client: openai.AsyncOpenAI
    siblings: bool
    """Whether there are other endpoints."""
    busy: int = 0
    """Requests in flight."""
    used: int = 0
    """Requests sent; breaks ties, so that idle endpoints take turns."""
    failures: int = 0
    """In a row."""
    refuses: bool = False
    """Whether it said that no call is of use (key, account, model, a long wait)."""
    ready_at: float = 0.0
    """Monotonic clock, seconds; nobody asks it before."""

    def hold(self, seconds: float) -> None:
        self.ready_at = max(self.ready_at, time.monotonic() + seconds)


@dataclass
class _Connections:
    """Clients and the bound on calls in flight, of one event loop."""

    settings: OpenAIModelSettings
    key: str
    endpoints: list[_Endpoint] = field(init=False)
    places: asyncio.Semaphore = field(init=False)
    _guard: AsyncGenerator[None, None] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        self.places = asyncio.Semaphore(self.settings.concurrency)
        several = len(self.settings.endpoints) > 1
        self.endpoints = [_Endpoint(public_name(a), self._client(a), several) for a in self.settings.endpoints]

    def _client(self, address: str) -> openai.AsyncOpenAI:
        host = urlsplit(address).hostname or ""
        most = self.settings.concurrency
        client = openai.AsyncOpenAI(
            api_key=self.key or "none",
            base_url=address,
            max_retries=0,
            timeout=self.settings.timeout_seconds,
            http_client=openai.DefaultAsyncHttpxClient(
                limits=http.Limits(max_connections=most, max_keepalive_connections=most),
                timeout=self.settings.timeout_seconds,
                trust_env=not is_local(host),  # a proxy of the environment cannot reach this machine
            ),
        )
        if f".{host}".endswith(".openai.com"):
            return client
        # The client takes these from the environment and would tell them to anyone.
        client.organization = client.project = None
        client._custom_headers = {}  # of OPENAI_CUSTOM_HEADERS: we give none
        return client

    @asynccontextmanager
    async def place(self, pause: float) -> AsyncIterator[_Endpoint]:
        """A place among the calls in flight, at the least busy endpoint that may be asked now."""
        await self._close_with_loop()
        async with self.places:
            while True:
                now = time.monotonic()
                endpoint = min(self.endpoints, key=lambda e: (max(0.0, e.ready_at - now), e.busy, e.used))
                if endpoint.ready_at <= now:
                    break
                # Not all at the very moment.
                await asyncio.sleep(endpoint.ready_at - now + random.uniform(0, pause))
            endpoint.busy += 1
            endpoint.used += 1
            try:
                yield endpoint
            finally:
                endpoint.busy -= 1

    def do_without(self, endpoint: _Endpoint, seconds: float) -> bool:
        """Leave alone an endpoint that refuses; False where all do: then the next call asks them all again."""
        endpoint.refuses = True
        endpoint.hold(seconds)
        if not all(one.refuses for one in self.endpoints):
            return True
        for one in self.endpoints:
            one.refuses, one.ready_at = False, 0.0
        return False

    async def _close_with_loop(self) -> None:
        """Have the connections closed when ``asyncio.run`` ends: it closes asynchronous generators that are under way."""
        if self._guard is None:
            self._guard = self._until_closed()
            await anext(self._guard)

    async def _until_closed(self) -> AsyncGenerator[None, None]:
        try:
            yield
        finally:
            for endpoint in self.endpoints:
                await endpoint.client.close()

    async def close(self) -> None:
        if self._guard is not None:
            await self._guard.aclose()


class _TransientError(Exception):
    """Worth another attempt."""

    def __init__(self, what: str, retry_after: float | None = None) -> None:
        super().__init__(what)
        self.retry_after = retry_after


class _TooLongError(Exception):
    """The endpoint says that the request is longer than its context."""


class _OtherFieldError(Exception):
    """The endpoint wants the same under another name, which is known now."""


def _said(error: Any) -> str:
    """The message in an error's body, whole."""
    while isinstance(error, dict):
        inner = next((error[name] for name in ("message", "detail", "error") if error.get(name)), None)
        if inner is None:
            break
        error = inner
    try:
        return error if isinstance(error, str) else json.dumps(error, ensure_ascii=False) if error else ""
    except RecursionError:
        return ""


def _wants_other_limit(said: str) -> bool:
    """Whether an endpoint says that ``max_tokens`` is called ``max_completion_tokens`` there."""
    first = said.lower().find("max_tokens")
    return first >= 0 and said.lower().find("max_completion_tokens", first) >= 0


def _code(error: Any) -> str:
    return f"{error.get('code') or ''} {error.get('type') or ''}".strip().split(" ")[0] if isinstance(error, dict) else ""


def _status_within(error: Any) -> int:
    """The status that an error states which came with a 200: a number, also as text, or by what it says."""
    code = error.get("code") if isinstance(error, dict) else None
    if isinstance(code, int) or (isinstance(code, str) and re.fullmatch(r"[1-5][0-9][0-9]", code)):
        return int(code)
    return 400 if _code(error) == "context_length_exceeded" or _TOO_LONG.search(_said(error)) else 500


def _innermost(error: BaseException) -> str:
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return describe_error(cause)


def _text(content: Any) -> str:
    """Content as text; some endpoints send a list of parts."""
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


def _number(value: Any) -> int:
    """Tokens that an endpoint states; 0 where that can be no number of them (NaN, Infinity)."""
    stated = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < _MOST_TOKENS
    return int(value) if stated else 0


def _without_bounds(schema: Any) -> Any:
    """``schema`` without the keywords of ``_BOUNDS``; a property of such a name stays."""
    if isinstance(schema, Mapping):
        return {
            name: {key: _without_bounds(inner) for key, inner in value.items()}
            if name == "properties"
            else _without_bounds(value)
            for name, value in schema.items()
            if name not in _BOUNDS
        }
    return [_without_bounds(value) for value in schema] if isinstance(schema, (list, tuple)) else schema


def _is_strict(schema: Any) -> bool:
    """Whether a schema is of the kind that OpenAI enforces word by word: every property required, none besides."""
    if isinstance(schema, Mapping):
        if schema.get("type") == "object" or "properties" in schema:
            properties = schema.get("properties", {})
            if schema.get("additionalProperties") is not False or set(schema.get("required", ())) != set(properties):
                return False
        return all(_is_strict(value) for value in schema.values())
    return all(_is_strict(value) for value in schema) if isinstance(schema, (list, tuple)) else True
