"""vLLM servers that run already: calls are spread over them, and a failed one is asked again elsewhere."""

from __future__ import annotations

import asyncio
import math
import random
import secrets
import threading
import time
from collections.abc import Coroutine, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import httpx

from evolve_dag.errors import ClosedError, ModelError, UnreachableError
from evolve_dag.inference.addresses import host_of, public_name
from evolve_dag.inference.patience import retry_after
from evolve_dag.inference.vllm_source import Adapter, Ask, Check, Sampled
from evolve_dag.secrecy import describe_error, excerpt, read_key

_OPENING_ATTEMPTS = 6
"""Most tries of what a server is asked before it is sampled from: about half a minute."""
_CONNECT_SECONDS = 10.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_SLACK = 4
"""A session stays at its server, which holds its prefix, until that one has so many more calls than the least busy."""
_ENABLE = (
    "start it with --enable-lora, --max-lora-rank, --max-loras one above the adapters in use, and "
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True"
)
T = TypeVar("T")


class _PassingError(Exception):
    """This server cannot serve the call now; another one, or this one later, may.

    Args:
        pause: seconds that the server asked for.
    """

    def __init__(self, what: str, pause: float | None = None) -> None:
        super().__init__(what)
        self.pause = pause


class _AdapterGoneError(_PassingError):
    """The server does not know the adapter (any more: it was started anew)."""


class Servers:
    """Implements :class:`~evolve_dag.inference.vllm_source.Source`. All requests are made by one thread with an event loop of
    its own, so any number of event loops may ask, one after the other.

    Args:
        addresses: of the servers, ending in ``/v1``.
        model: name of the base model there; '' takes the first that is listed.
        key: bearer token, or ''.
        timeout_seconds: longest wait for one attempt, and how long a call that failed is tried again: as long as a server
            takes to start anew.

    Raises:
        ModelError: a server cannot be reached, or does not serve the model.
    """

    def __init__(
        self,
        addresses: Sequence[str],
        *,
        model: str = "",
        key: str = "",
        timeout_seconds: float = 600.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        if not addresses:
            raise ModelError("no server is named", "list the addresses of vLLM servers in models.policy.servers")
        for address in addresses:
            host_of(address, "models.policy.servers")
        self.timeout_seconds: float | None = None  # each attempt has its own limit
        self._patience = timeout_seconds
        self._closed = False
        self._homes: dict[str, _Server] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="evolve-vllm", daemon=True)
        self._thread.start()
        self._servers = [_Server(address, key, timeout_seconds, transport) for address in addresses]
        try:
            self._run(self._connect(model))
        except BaseException:
            self.close()
            raise
        self.max_context = min(server.max_context for server in self._servers)

    def load(self, adapter: Adapter | None, probe: Check | None) -> None:
        self._run(self._load_everywhere(adapter, probe))

    def submit(self, ask: Ask) -> Future[Sampled]:
        if self._closed:
            raise ClosedError("the connection to the vLLM servers was closed", "open the policy again")
        return asyncio.run_coroutine_threadsafe(self._sample(ask), self._loop)

    def late(self, seconds: float) -> None:
        """Nothing to do: a request that takes too long is asked again elsewhere."""

    def release(self, session: str) -> None:
        self._homes.pop(session, None)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._disconnect(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    # ------------------------------------------------------------------ in the thread

    async def _connect(self, model: str) -> None:
        for server in self._servers:
            await _persist(lambda server=server: server.look(model), server.address)

    async def _disconnect(self) -> None:
        mine = asyncio.current_task()
        others = [task for task in asyncio.all_tasks() if task is not mine]
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        for server in self._servers:
            await server.client.aclose()

    async def _load_everywhere(self, adapter: Adapter | None, probe: Check | None) -> None:
        await asyncio.gather(*(server.load(adapter, probe) for server in self._servers))

    async def _sample(self, ask: Ask) -> Sampled:
        try:
            return await self._sample_somewhere(ask)
        except asyncio.CancelledError:
            if self._closed:
                raise ClosedError("the connection to the vLLM servers was closed", "close it after the rollouts") from None
            raise

    async def _sample_somewhere(self, ask: Ask) -> Sampled:
        attempts, deadline = 0, math.inf
        while True:
            attempts += 1
            server = self._choose(ask.session)
            server.busy += 1  # at once: the next call must see it when it chooses
            try:
                if (rest := server.resting_until - time.monotonic()) > 0:
                    await asyncio.sleep(rest)
                answer = await server.sample(ask)
            except _PassingError as passing:
                deadline = min(deadline, time.monotonic() + self._patience)
                if time.monotonic() >= deadline:
                    raise UnreachableError(
                        f"no answer after {attempts} attempts, {len(self._servers)} servers; the last: {passing}",
                        "look at the servers' logs; raise models.policy.timeout_seconds if they take longer to come back",
                    ) from None
                server.rest(passing.pause)
                if isinstance(passing, _AdapterGoneError):
                    await server.load_again(ask.adapter)
                else:
                    self._homes.pop(ask.session, None)
            else:
                server.failures = 0
                return answer
            finally:
                server.busy -= 1

    def _choose(self, session: str) -> _Server:
        """The session's server, or the least busy one; of those that rest, the one that wakes first."""
        now = time.monotonic()
        awake = [server for server in self._servers if server.resting_until <= now]
        if not awake:
            return min(self._servers, key=lambda server: server.resting_until)
        least = min(awake, key=lambda server: server.busy)
        home = self._homes.get(session) if session else None
        if home is not None and home in awake and home.busy <= least.busy + _SLACK:
            return home
        if session:
            self._homes[session] = least
        return least


class _Server:
    """One server; touched by the thread's event loop alone."""

    def __init__(self, address: str, key: str, timeout: float, transport: httpx.AsyncBaseTransport | None) -> None:
        self.address = public_name(address.rstrip("/"))
        self.client = httpx.AsyncClient(
            base_url=address.rstrip("/") + "/",
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx.Timeout(timeout, connect=_CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=4.0),
            trust_env=self.address.startswith("https:"),  # no proxy between us and a plain address
            transport=transport,
        )
        self.busy = 0
        self.failures = 0
        self.resting_until = 0.0
        self.base = ""
        self.max_context = 0
        self._listed: set[str] = set()
        self._names: dict[str, str] = {}
        self._probes: dict[str, Check | None] = {}
        self._loading = asyncio.Lock()
        self._loads = 0

    async def look(self, model: str) -> None:
        """Which models are there?"""
        body = await self._ask("GET", "models")
        try:
            cards = {str(card["id"]): card for card in body["data"]}
            bases = [name for name, card in cards.items() if not card.get("parent")]
            chosen = model or bases[0]
            if chosen not in bases:
                raise ModelError(
                    f"{self.address}: serves {excerpt(', '.join(bases))}, not {chosen}",
                    "set models.policy.model to one of these",
                )
            self.max_context = int(cards[chosen]["max_model_len"])
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as problem:
            raise ModelError(
                f"{self.address}/models: not the answer of a vLLM server: {describe_error(problem)}",
                "check models.policy.servers",
            ) from None
        self.base = chosen
        self._listed = set(cards) - set(bases)

    async def load(self, adapter: Adapter | None, probe: Check | None) -> None:
        """Load and check; a stale adapter under the same name is passed over once."""
        if adapter is not None:
            self._probes[adapter.name] = probe
            await _persist(lambda: self._load_as(adapter, adapter.name), self.address)
        if probe is None:
            return
        try:
            await self._check(probe)
        except ModelError:
            if adapter is None or adapter.name not in self._listed:
                raise
            # Somebody loaded it earlier, when other files lay in the folder. Not in place: the server would go on using
            # keys and values that it cached for the old weights under this name.
            await _persist(lambda: self._load_as(adapter, f"{adapter.name}-{secrets.token_hex(4)}"), self.address)
            await self._check(probe)

    async def load_again(self, adapter: Adapter | None) -> None:
        """A server that was started anew knows no adapter; the first call that notices loads it for all."""
        assert adapter is not None
        loads = self._loads
        async with self._loading:
            if self._loads == loads:
                self._listed.clear()
                await self.load(adapter, self._probes.get(adapter.name))
                self._loads += 1

    async def _load_as(self, adapter: Adapter, name: str) -> None:
        if name not in self._listed:
            try:
                await self._ask("POST", "load_lora_adapter", {"lora_name": name, "lora_path": str(adapter.folder)})
            except ModelError as problem:
                if "already" not in problem.what:  # another process was faster; the check will tell what it is
                    raise ModelError(f"adapter {adapter.folder} is refused: {problem.what}", problem.remedy) from problem
                self._listed.add(name)
        self._names[adapter.name] = name

    async def _check(self, probe: Check) -> None:
        async def draw(ask: Ask) -> Sampled:
            return await _persist(lambda: self.sample(ask), self.address)

        probe.judge(await asyncio.gather(*(draw(ask) for ask in probe.asks)), self.address)

    async def sample(self, ask: Ask) -> Sampled:
        body = {
            **ask.parameters(),
            "model": self._names.get(ask.adapter.name, ask.adapter.name) if ask.adapter else self.base,
            "prompt": list(ask.ids),
            "add_special_tokens": False,
            "ignore_eos": True,  # stop_token_ids says when to stop
            "skip_special_tokens": False,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,
        }
        if ask.schema:
            body["structured_outputs"] = {"json": dict(ask.schema)}
        answer = await self._ask("POST", "completions", body)
        try:
            [choice] = answer["choices"]
            ids = choice.get("token_ids")
            if ids is None:
                raise ModelError(f"{self.address}: the answer holds no token_ids", "it needs vLLM 0.11 or later")
            logprobs = choice["logprobs"]["token_logprobs"]
            usage = answer.get("usage") or {}
            sampled = Sampled(
                tuple(map(int, ids)),
                tuple(map(float, logprobs)),
                int((usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0),
                tuple(_by_id(table) for table in choice["logprobs"].get("top_logprobs") or ()) if ask.top else (),
            )
            seen = choice.get("prompt_token_ids")
            finish = choice["finish_reason"]
        except (KeyError, TypeError, ValueError, AttributeError) as problem:
            raise _PassingError(f"{self.address}: unreadable answer: {describe_error(problem)}") from None
        if seen is not None and tuple(seen) != ask.ids:
            raise ModelError(
                f"{self.address}: answered another context than it was asked", "a proxy changes requests: ask the server itself"
            )
        if not sampled.ids or len(sampled.ids) != len(sampled.logprobs) or finish not in ("stop", "length"):
            raise _PassingError(f"{self.address}: answer of {len(sampled.ids)} tokens ended by {finish!r}")
        return sampled

    def rest(self, pause: float | None) -> None:
        """Leave the server alone for a while, longer each time."""
        if pause is None and time.monotonic() < self.resting_until:
            return  # calls that fail together count once
        self.failures += 1
        self.resting_until = max(self.resting_until, time.monotonic() + _wait(pause, self.failures))

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """One request.

        Raises:
            _PassingError: worth another try.
            ModelError: not worth one.
        """
        try:
            response = await self.client.request(method, path, json=body)
        except httpx.HTTPError as problem:
            raise _PassingError(f"{self.address}: {describe_error(problem)}") from None
        if response.status_code == 429 or response.status_code >= 500:
            note = _note(response)
            if path == "load_lora_adapter" and response.status_code == 500:
                raise ModelError(f"{self.address}: {note}", _explain(path, 500))
            raise _PassingError(f"{self.address}: HTTP {response.status_code}: {note}", retry_after(response.headers))
        if response.status_code != 200:
            note = _note(response)
            if path == "completions" and response.status_code == 404 and body is not None and body["model"] != self.base:
                raise _AdapterGoneError(f"{self.address}: {note}")
            kind = UnreachableError if response.status_code in (401, 403) else ModelError
            raise kind(f"{self.address}/{path}: HTTP {response.status_code}: {note}", _explain(path, response.status_code))
        if path == "load_lora_adapter":
            return None  # plain text
        try:
            return response.json()
        except (ValueError, RecursionError):
            raise _PassingError(f"{self.address}: not JSON: {excerpt(response.text, 80)!r}") from None


async def _persist(work: Any, address: str) -> Any:
    """Do ``work`` again while its server passes."""
    for attempt in range(1, _OPENING_ATTEMPTS + 1):
        try:
            return await work()
        except _PassingError as passing:
            if attempt == _OPENING_ATTEMPTS:
                raise UnreachableError(
                    f"{passing} ({attempt} attempts)", f"start the server, or take {address} out of models.policy.servers"
                ) from passing
            await asyncio.sleep(_wait(passing.pause, attempt))
    raise AssertionError


def _wait(asked: float | None, failures: int) -> float:
    """Seconds to leave a server alone after so many failures in a row: what it asked for, or longer each time."""
    wait = _FIRST_PAUSE * 2 ** min(failures - 1, 16) * random.uniform(0.75, 1.25) if asked is None else max(asked, _FIRST_PAUSE)
    return min(wait, _LONGEST_PAUSE)


def _explain(path: str, status: int) -> str:
    if status in (401, 403):
        return "set the environment variable that models.policy.key names"
    if path == "load_lora_adapter":
        return "the adapter's folder must be in the server's sight; " + _ENABLE
    return "compare models.policy with what the server was started with (model, --max-model-len)"


def _note(response: httpx.Response) -> str:
    """What the server said, shortened."""
    try:
        body = response.json()
        body = body.get("error", body)
        text = str(body.get("message", body)) if isinstance(body, dict) else str(body)
    except (ValueError, AttributeError, RecursionError):
        text = response.text
    return excerpt(text)


def _by_id(table: dict[str, float]) -> dict[int, float]:
    """``{"token_id:17": -0.1}`` -> ``{17: -0.1}``."""
    return {int(token.removeprefix("token_id:")): float(value) for token, value in table.items()}


def server_key(variable: str) -> str:
    """The key of the servers, from the environment.

    Raises:
        ModelError: the variable holds what can be no key.
    """
    return read_key(variable) if variable else ""
