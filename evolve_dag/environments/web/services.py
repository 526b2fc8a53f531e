"""Calls to the services that the experiment file names (Serper, SearXNG, Jina): JSON in, JSON out, tried again when it helps.

Their addresses come from the experiment's owner, so no guard stands before them; they are followed nowhere.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

from evolve_dag.errors import UnreachableError
from evolve_dag.inference.patience import retry_after
from evolve_dag.protocols import ToolError
from evolve_dag.secrecy import without_keys

MAX_BYTES = 10_000_000
ATTEMPTS = 5
UNANSWERED = 2
"""Attempts that may end without an answer in time: an episode has not the time for five of them."""
MAX_PAUSE = 30.0
"""Longest pause between two attempts, whatever ``Retry-After`` says."""
KEY = ("does not accept the key", "set the right key in its environment variable; docs/configuration.md names it")


@dataclass(frozen=True, slots=True)
class Service:
    """How a service is called."""

    name: str
    """For messages."""
    seconds: float
    """Longest wait for one attempt."""
    attempts: int = ATTEMPTS
    pause: float = 1.0
    """Seconds before the second attempt; doubled before each further one, with jitter."""
    sleep: Callable[[float], Awaitable[None]] = asyncio.sleep

    async def ask(
        self,
        method: str,
        url: str,
        *,
        headers: Mapping[str, str] | None = None,
        content: Mapping[str, Any] | None = None,
        parameters: Mapping[str, str] | None = None,
        refused: Callable[[int], str | None] = lambda status: None,
        forbidden: tuple[str, str] = KEY,
        one_page: bool = False,
    ) -> Any:
        """The JSON that the service answers with.

        Args:
            content: sent as JSON.
            refused: words for the policy for a status that is no fault of the service; None: the usual ones.
            forbidden: what 401 and 403 say about the service, and the remedy.
            one_page: whether the call is about one page, which may be what is slow or breaks: then that is told to the policy.

        Raises:
            ToolError: it refuses this call, or its answer is too long; where it is about one page, also that none came.
            UnreachableError: it is down, hangs, is overloaded or gives no JSON through all attempts, does not accept the
                key, or has no credit: that says nothing about whoever called. No message holds a key.
        """
        problem, late, gone = "", 0, False
        for attempt in range(self.attempts):
            wait: float | None = None
            gone = False
            try:
                status, after, body = await self._once(method, url, headers or {}, content, parameters)
            except TimeoutError:
                problem = f"did not answer within {self.seconds:g} seconds"
                late += 1
                if late == UNANSWERED:
                    break
            except ConnectionError as error:
                problem, gone = str(error), True
            else:
                if status == 200:
                    try:
                        return _without_keys(json.loads(body))
                    except (ValueError, RecursionError):
                        problem = "answered with something that is not JSON"
                elif _no_credit(status, body) and refused(status) is None:
                    raise UnreachableError(
                        f"{self.name} has no credit left (status {status})", "fill the account, or name another service"
                    )
                elif status in (401, 403) and refused(status) is None:
                    what, remedy = forbidden
                    raise UnreachableError(f"{self.name} {what} (status {status})", remedy)
                elif status == 429 or status >= 500:
                    problem = "is overloaded (status 429)" if status == 429 else f"fails (status {status})"
                    wait = retry_after({"retry-after": after} if after else {})
                else:
                    raise ToolError(refused(status) or f"{self.name} refuses the call (status {status})")
            if attempt + 1 < self.attempts:
                jittered = self.pause * 2**attempt * random.uniform(0.5, 1.0)
                await self.sleep(min(MAX_PAUSE, max(jittered, wait or 0.0)))
        told = f"{self.name} {problem}; {attempt + 1} attempts were made"
        if one_page and not gone:
            raise ToolError(f"{told}, try another way")
        raise UnreachableError(told, f"look whether {self.name} is up and has room for `runtime.concurrency` episodes at once")

    async def _once(
        self,
        method: str,
        url: str,
        headers: Mapping[str, str],
        content: Mapping[str, Any] | None,
        parameters: Mapping[str, str] | None,
    ) -> tuple[int, str, bytes]:
        import httpx

        # A client of its own for each call: episodes may run in several event loops, and a client belongs to one.
        async with asyncio.timeout(self.seconds):
            try:
                async with (
                    httpx.AsyncClient(verify=_tls(), timeout=self.seconds, follow_redirects=False) as client,
                    client.stream(
                        method, url, headers=dict(headers), json=content, params=dict(parameters) if parameters else None
                    ) as response,
                ):
                    body = bytearray()
                    async for chunk in response.aiter_bytes():
                        body += chunk
                        if len(body) > MAX_BYTES:
                            raise ToolError(f"{self.name} answers with more than {MAX_BYTES} bytes")
                    return response.status_code, response.headers.get("retry-after", ""), bytes(body)
            except httpx.TimeoutException:
                raise TimeoutError from None
            except (httpx.HTTPError, httpx.StreamError, httpx.InvalidURL) as error:
                # The text of httpx's errors may hold the address with its parameters.
                raise ConnectionError(f"cannot be reached ({type(error).__name__})") from None


def _without_keys(value: Any) -> Any:
    """An answer without our keys: what a service says back would be remembered, and shown to the policy."""
    if isinstance(value, str):
        return without_keys(value)
    if isinstance(value, dict):
        return {name: _without_keys(inner) for name, inner in value.items()}
    return [_without_keys(inner) for inner in value] if isinstance(value, list) else value


def _no_credit(status: int, body: bytes) -> bool:
    return status == 402 or (status == 400 and b"credit" in body[:1000].lower())


def _tls() -> Any:
    from evolve_dag.environments.web.fetch import usual_tls

    return usual_tls()
