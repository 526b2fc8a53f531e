"""A real HTTP server that speaks the OpenAI protocol and misbehaves on request.

Answers are a function of the request alone, and so is which attempt of it goes wrong: a run with faults meets the same
answers as one without, in whatever order its requests arrive. The server counts what it told the client, so a ledger can
be held against it.

As a program it serves until it is ended, and prints its address first:

    python tests/servers/misbehaving.py --latency 0.05 --act
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

Body = dict[str, Any]
Answer = Callable[[Body], str]

STATUS_WORDS = {
    200: "OK",
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    429: "Too Many Requests",
    500: "Internal Server Error",
    503: "Service Unavailable",
}
TRANSIENT = ("429", "500", "cut", "wrong_json", "empty")
"""Faults that a client should get over by asking again."""


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one request."""

    kind: str
    """A status (``429``), or

    - ``hang``: no answer for ``seconds``; ``close``: the connection ends without a word; ``cut``: it ends half-way through
    - ``wrong_json``: the body is no JSON; ``wrong_shape``: JSON without an answer; ``in_200``: an error with status 200
    - ``empty``: an answer of no characters; ``length``: nothing but a spent budget; ``filter``: withheld by a content filter;
      ``filter_late``: half of it is
    - ``broken_off``: half of the answer, with a ``finish_reason`` of the server's own
    - ``over_long``: far more text than was asked for; ``context``: the request is too long for the model
    """
    retry_after: str | None = None
    """Value of the header ``Retry-After``."""
    seconds: float = 30.0
    """How long a ``hang`` lasts."""
    message: str = ""
    """Text of the error."""
    code: int | str = 502
    """Status that ``in_200`` states in its body, or a word in its place."""


Script = Callable[[Body, int], Fault | None]
"""From the body of a request and how often this very body came before, to what goes wrong with it."""


def in_order(*faults: Fault | None) -> Script:
    """The faults one after the other, whatever is asked; then none."""
    waiting = iter(faults)
    return lambda body, seen: next(waiting, None)


def at_random(rate: float, kinds: Sequence[str] = TRANSIENT, seed: int = 0, retry_after: str | None = "0") -> Script:
    """Each request fails with probability ``rate``; which ones follows from ``seed`` and the request alone."""

    def script(body: Body, seen: int) -> Fault | None:
        draw = random.Random(f"{seed} {fingerprint(body)} {seen}")
        if draw.random() >= rate:
            return None
        kind = draw.choice(kinds)
        return Fault(kind, retry_after=retry_after if kind == "429" else None)

    return script


def fingerprint(body: Body) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def echo(body: Body) -> str:
    """Words that follow from the request: the same request, the same answer."""
    return f"answer {fingerprint(body)[:12]}"


def count(text: str) -> int:
    """Tokens, as this server counts them."""
    return len(text.split())


@dataclass
class Served:
    """What the server did, as a client could know it from complete, readable answers."""

    requests: int = 0
    """Model calls that arrived."""
    answers: int = 0
    """Good answers: neither a fault nor empty."""
    prompt_tokens: int = 0
    """Stated in answers, the empty ones included."""
    cached_tokens: int = 0
    completion_tokens: int = 0
    faults: Counter[str] = field(default_factory=Counter)
    most_at_once: int = 0
    """Most model calls in flight at one time."""
    answered: Counter[str] = field(default_factory=Counter)
    """Fingerprint of a request -> good answers to it."""


@dataclass(frozen=True)
class Arrival:
    """One request as it came."""

    path: str
    headers: Mapping[str, str]
    body: Body
    at: float
    """Monotonic clock, seconds."""


class Endpoint:
    """The server, in a thread of its own; a context manager.

    Args:
        answer: text of the answer to a request's body.
        script: what goes wrong.
        latency: seconds before any answer.
        context_tokens: longer requests are refused as OpenAI and vLLM refuse them; None: no limit.
        key: where set, requests without it get 401.
    """

    def __init__(
        self,
        answer: Answer = echo,
        *,
        script: Script | None = None,
        latency: float = 0.0,
        context_tokens: int | None = None,
        key: str | None = None,
        keep: bool = True,
    ) -> None:
        self.answer, self.script, self.latency = answer, script, latency
        self.context_tokens, self.key, self.keep = context_tokens, key, keep
        self.served = Served()
        self.arrivals: list[Arrival] = []
        self.port = 0
        self._seen: Counter[str] = Counter()
        self._now = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None
        self._up = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    @property
    def url(self) -> str:
        """What a client takes for its base address."""
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> Endpoint:
        self._thread.start()
        assert self._up.wait(10), "the server did not start"
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _main(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        talks: set[asyncio.Task[None]] = set()

        async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.current_task()
            assert task is not None
            talks.add(task)
            try:
                await self._talk(reader, writer)
            except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                pass
            finally:
                talks.discard(task)
                writer.close()

        server = await asyncio.start_server(talk, "127.0.0.1", 0, limit=2**26, backlog=512)
        self.port = server.sockets[0].getsockname()[1]
        self._up.set()
        await self._stop.wait()
        server.close()
        for task in list(talks):
            task.cancel()
        await asyncio.gather(*talks, return_exceptions=True)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Requests of one connection, one after the other."""
        while True:
            try:
                head = await reader.readuntil(b"\r\n\r\n")
            except asyncio.IncompleteReadError:
                return
            first, *lines = head.decode("latin-1").split("\r\n")
            _, path, _ = first.split(" ")
            headers = {
                name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines if line)
            }
            raw = await reader.readexactly(int(headers.get("content-length", 0)))
            arrival = Arrival(path, headers, json.loads(raw) if raw else {}, time.monotonic())
            if self.keep:
                self.arrivals.append(arrival)
            if not await self._serve(arrival, writer):
                return

    async def _serve(self, arrival: Arrival, writer: asyncio.StreamWriter) -> bool:
        """Answer one request; False when the connection is to end."""
        path = arrival.path.partition("?")[0]
        if path == "/v1/models":
            return await _send(writer, 200, {"object": "list", "data": [{"id": "misbehaving", "object": "model"}]})
        if path not in ("/v1/chat/completions", "/v1/completions"):
            return await _send(writer, 404, _error("no such path", "not_found"))
        self.served.requests += 1
        self._now += 1
        self.served.most_at_once = max(self.served.most_at_once, self._now)
        try:
            return await self._complete(arrival, writer, chat=path.endswith("/chat/completions"))
        finally:
            self._now -= 1

    async def _complete(self, arrival: Arrival, writer: asyncio.StreamWriter, *, chat: bool) -> bool:
        body = arrival.body
        name = fingerprint(body)
        seen = self._seen[name]
        self._seen[name] += 1
        fault = self.script(body, seen) if self.script is not None else None
        if self.latency:
            await asyncio.sleep(self.latency)
        if self.key is not None and arrival.headers.get("authorization") != f"Bearer {self.key}":
            fault = Fault("401")
        prompt = sum(count(str(m["content"])) for m in body["messages"]) if chat else count(str(body["prompt"]))
        if self.context_tokens is not None and prompt > self.context_tokens:
            fault = fault or Fault("context")
        kind = fault.kind if fault is not None else ""
        if fault is not None:
            self.served.faults[kind] += 1
            if kind == "hang":
                await asyncio.sleep(fault.seconds)
                return False
            if kind == "close":
                return False
            if kind == "context":
                said = f"This model's maximum context length is {self.context_tokens} tokens; the request has {prompt}"
                return await _send(writer, 400, _error(fault.message or said, "context_length_exceeded"))
            if kind.isdigit():
                text = fault.message or f"scripted {kind}; you sent {arrival.headers.get('authorization', 'no key')}"
                extra = {"Retry-After": fault.retry_after} if fault.retry_after is not None else {}
                return await _send(writer, int(kind), _error(text, f"scripted_{kind}"), extra)
            if kind == "wrong_json":
                return await _send(writer, 200, b'{"choices": [{"message": {"content": "half an ans')
            if kind == "in_200":
                return await _send(writer, 200, {"error": {"message": fault.message, "code": fault.code}})
            if kind == "wrong_shape":
                return await _send(writer, 200, {"object": "error", "choices": []})
        text, finish = self.answer(body), "stop"
        if kind == "over_long":
            text, finish = text + " and so on" * 20_000, "stop"
        elif kind == "length":
            text, finish = "", "length"
        elif kind == "filter":
            text, finish = "", "content_filter"
        elif kind == "broken_off":
            text, finish = text[: len(text) // 2], fault.message
        elif kind == "filter_late":
            text, finish = text[: len(text) // 2], "content_filter"
        elif kind == "empty":
            text = ""
        usage = {"prompt_tokens": prompt, "completion_tokens": count(text), "total_tokens": prompt + count(text)}
        usage_details = {**usage, "prompt_tokens_details": {"cached_tokens": prompt // 4}}
        if body.get("stream"):
            payload = _stream(body, text, finish, usage_details, chat)
        else:
            payload = json.dumps(_whole(body, text, finish, usage_details, chat)).encode()
        if kind == "cut":
            # The stated length never arrives.
            kind_of_body = "text/event-stream" if body.get("stream") else "application/json"
            writer.write(_head(200, len(payload), {"Content-Type": kind_of_body}) + payload[: len(payload) // 2])
            await writer.drain()
            return False
        self.served.prompt_tokens += prompt
        self.served.cached_tokens += prompt // 4
        self.served.completion_tokens += count(text)
        if not kind or kind == "over_long":
            self.served.answers += 1
            self.served.answered[name] += 1
        return await _send(writer, 200, payload, {"Content-Type": "text/event-stream"} if body.get("stream") else {})


def _whole(body: Body, text: str, finish: str, usage: Mapping[str, Any], chat: bool) -> Body:
    part = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {
        "id": "completion-1",
        "object": "chat.completion" if chat else "text_completion",
        "created": 1,
        "model": body.get("model", ""),
        "choices": [{"index": 0, "finish_reason": finish, **part}],
        "usage": usage,
    }


def _stream(body: Body, text: str, finish: str, usage: Mapping[str, Any], chat: bool) -> bytes:
    events: list[Any] = []
    for start in range(0, len(text), 8):
        piece = text[start : start + 8]
        events.append({"delta": {"content": piece}} if chat else {"text": piece})
    events.append({"delta": {}, "finish_reason": finish} if chat else {"text": "", "finish_reason": finish})
    chunks = [{"id": "completion-1", "model": body.get("model", ""), "choices": [{"index": 0, **e}]} for e in events]
    chunks.append({"id": "completion-1", "model": body.get("model", ""), "choices": [], "usage": usage})
    return b"".join(b"data: " + json.dumps(chunk).encode() + b"\n\n" for chunk in chunks) + b"data: [DONE]\n\n"


def _error(message: str, code: str) -> Body:
    return {"error": {"message": message, "type": "error", "param": None, "code": code}}


def _head(status: int, length: int, headers: Mapping[str, str]) -> bytes:
    fields = {"Content-Type": "application/json", **headers, "Content-Length": str(length)}
    lines = [f"HTTP/1.1 {status} {STATUS_WORDS[status]}", *(f"{name}: {value}" for name, value in fields.items())]
    return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


async def _send(
    writer: asyncio.StreamWriter, status: int, content: bytes | Body, headers: Mapping[str, str] | None = None
) -> bool:
    payload = content if isinstance(content, bytes) else json.dumps(content).encode()
    writer.write(_head(status, len(payload), headers or {}) + payload)
    await writer.drain()
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before any answer")
    parser.add_argument("--rate", type=float, default=0.0, help="share of requests that fail, with any transient fault")
    parser.add_argument("--act", action="store_true", help="answer as a policy in a corpus world does, not with an echo")
    arguments = parser.parse_args()
    answer = echo
    if arguments.act:
        from acting import act as answer  # type: ignore[no-redef,import-not-found]  # beside this file
    script = at_random(arguments.rate) if arguments.rate else None
    with Endpoint(answer, script=script, latency=arguments.latency, keep=False) as endpoint:
        print(endpoint.url, flush=True)
        threading.Event().wait()


if __name__ == "__main__":
    main()
