"""What the library sees of us: a client that answers, a harness that asks, and an episode that waits for every turn.

The library runs an episode as it always does: its environment places an agent, its interception server stands before the model,
its rubric judges the trace. Two of its extension points are ours. The :class:`PolicyHarness` is a chat loop in this process, in
place of a program that would be installed and started for every episode. The :class:`PolicyClient` hands every request to the
:class:`Play` that it belongs to, where it waits until our loop has sampled the turn.

The one file that needs the library to be imported; nothing imports it before an experiment asks for it.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any, cast

import httpx
from verifiers.v1.clients import Client, EvalClientConfig, ModelContext
from verifiers.v1.clients.train import serialize_completion
from verifiers.v1.configs.harness import HarnessConfig
from verifiers.v1.dialects import Dialect
from verifiers.v1.dialects.chat import message_to_wire
from verifiers.v1.env import Env
from verifiers.v1.episode import Episode
from verifiers.v1.errors import ProviderError
from verifiers.v1.graph import PendingTurn
from verifiers.v1.harness import Harness
from verifiers.v1.harnesses.utils.mcp import call_mcp, connect_mcp
from verifiers.v1.interception import InterceptionServer
from verifiers.v1.runtimes import ProgramResult, Runtime
from verifiers.v1.session import RolloutSession
from verifiers.v1.task import Task, TaskData
from verifiers.v1.trace import Trace
from verifiers.v1.types import (
    AssistantMessage,
    Request,
    Response,
    SamplingConfig,
    ToolCall,
    TurnTokens,
    Usage,
)

from evolve_dag.agent.actions import reasoned
from evolve_dag.errors import SessionError
from evolve_dag.protocols import Completion
from evolve_dag.records import REPLY
from evolve_dag.records import ToolCall as OurCall

__all__ = ["PolicyHarness"]  # where the library looks for the harness of a module

HARNESS = "evolve_dag_policy"
"""Name of the harness, which the library takes for the name of a module."""
LEFT = "the policy takes no more turns"
"""Why a request is refused once our loop has come to its last step."""
CLOSING_SECONDS = 5.0
"""How long a tear-down may take."""
_MODEL = "policy"
_NOWHERE = EvalClientConfig(base_url="http://127.0.0.1:9/v1", api_key_var="EVOLVE_NO_KEY")
"""The endpoint that the library is told; no request is ever sent there."""

sys.modules.setdefault(HARNESS, sys.modules[__name__])


class PolicyHarness(Harness[HarnessConfig]):
    """Chat with tools until a turn calls none. The tools are those of the taskset's servers: no shell, no files."""

    APPENDS_SYSTEM_PROMPT = True
    SUPPORTS_MCP = True
    SUPPORTS_RESUME = True
    EXECUTES_CODE = False
    NEEDS_CONTAINER = False

    async def launch(
        self,
        ctx: ModelContext,
        trace: Trace,
        runtime: Runtime,
        endpoint: str,
        secret: str,
        mcp_urls: dict[str, str],
        data: TaskData,
    ) -> ProgramResult:
        messages = _opening(*self.resolve_prompt(data))
        async with AsyncExitStack() as stack:
            spec = {name: {"url": url, "timeout": self.config.tool_timeout} for name, url in mcp_urls.items()}
            tools, dispatch, servers = await connect_mcp({"mcpServers": spec}, stack)
            http = await stack.enter_async_context(httpx.AsyncClient(timeout=None, trust_env=False))
            while True:
                body = {"model": ctx.model, "messages": messages, **({"tools": tools} if tools else {})}
                given = await http.post(
                    f"{endpoint}/chat/completions", json=body, headers={"Authorization": f"Bearer {secret}"}
                )
                if given.status_code != 200:
                    return ProgramResult(0 if LEFT in given.text else 1, "", given.text)
                message = given.json()["choices"][0]["message"]
                messages.append(message)
                if not message.get("tool_calls"):
                    return ProgramResult(0, "", "")
                for call in message["tool_calls"]:
                    function = call["function"]
                    content = await call_mcp(servers, dispatch, function["name"], json.loads(function["arguments"]))
                    named = {"tool_call_id": call["id"], "name": function["name"]}
                    messages.append({"role": "tool", **named, "content": content})


def _opening(system: str | None, prompt: Any) -> list[dict[str, Any]]:
    head = [] if system is None else [{"role": "system", "content": system}]
    if isinstance(prompt, str):
        return [*head, {"role": "user", "content": prompt}]
    return [*head, *(message_to_wire(message) for message in prompt or ())]


class PolicyClient(Client):
    """Every request goes to the play that it belongs to."""

    def __init__(self) -> None:
        self.plays: dict[str, Play] = {}
        """Id of a trace -> its play."""

    async def get_response(
        self,
        dialect: Dialect,
        body: dict[str, Any],
        sampling: SamplingConfig,
        session_id: str | None = None,
        turn: PendingTurn | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> Response:
        response = await self.plays[session_id or ""].ask(dialect.parse_request(body))
        response.raw = serialize_completion(response, _MODEL)
        return response


class PolicyInterception(InterceptionServer):
    """The library's own server, with our client behind it, whatever endpoint an agent names."""

    def __init__(self, client: PolicyClient, secrets: tuple[str, ...]) -> None:
        super().__init__(state_service_secrets=secrets)
        self.policy = client

    def register(self, session: RolloutSession) -> tuple[str, str]:
        secrets = super().register(session)
        session.client = self.policy
        return cast(tuple[str, str], secrets)


class Play:
    """One episode of the library, which stands still whenever it waits for the policy. Lives in the library's event loop.

    Args:
        seconds: that it may take from one turn to the next request, or to its end.
    """

    def __init__(self, env: Env[Any], client: PolicyClient, task: Task, seconds: float) -> None:
        self._env, self._client, self._task, self.seconds = env, client, task, seconds
        self._requests: asyncio.Queue[Request] = asyncio.Queue()
        self._waiting: asyncio.Future[Response] | None = None
        self._running: asyncio.Task[Episode] | None = None
        self._left = False
        self.trace: Trace | None = None
        self.problem: SessionError | None = None
        """Why this environment cannot be played, where that showed."""

    async def begin(self) -> Request | None:
        """The first request; None: it ended without one."""
        context = ModelContext(model=_MODEL, client=_NOWHERE)
        self._running = asyncio.create_task(self._env.run_episode(self._task, context, on_trace=self._note))
        return await self._next()

    async def answer(self, response: Response) -> Request | None:
        """Give the turn that was asked for. What is asked next; None: the episode is over."""
        assert self._waiting is not None
        self._waiting.set_result(response)
        return await self._next()

    async def leave(self) -> Episode:
        """The episode as it ended, judged. One that waits for another turn is told that there is none."""
        assert self._running is not None
        self._left = True
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_exception(ProviderError(LEFT, status_code=400))
        await asyncio.wait({self._running}, timeout=self.seconds)
        if not self._running.done():
            raise self._too_long("did not end")
        return self._running.result()

    async def close(self) -> None:
        """Tear down: the library stops what it has started for this episode."""
        self._left = True
        if self._running is not None:
            self._running.cancel()
            await asyncio.wait({self._running}, timeout=CLOSING_SECONDS)
            if self._running.done() and not self._running.cancelled():
                self._running.exception()  # told already, or of no interest any more
        if self.trace is not None:
            self._client.plays.pop(self.trace.id, None)

    async def ask(self, request: Request) -> Response:
        """Called by the library: wait for the policy's turn."""
        if self._left:
            raise ProviderError(LEFT, status_code=400)
        if self._waiting is not None and not self._waiting.done():
            self._refuse("asks for two turns at once")
        self._waiting = asyncio.get_running_loop().create_future()
        self._requests.put_nowait(request)
        return await self._waiting

    def _note(self, trace: Trace) -> None:
        """Called by the library when a rollout begins."""
        if self.trace is not None:
            self._refuse("plays more than one rollout in an episode")
        self.trace = trace
        self._client.plays[trace.id] = self

    def _refuse(self, why: str) -> None:
        self.problem = SessionError(f"the environment {why}", "one conversation an episode is what can be learned from")
        raise ProviderError(why, status_code=400)

    async def _next(self) -> Request | None:
        assert self._running is not None
        asked = asyncio.ensure_future(self._requests.get())
        try:
            await asyncio.wait({asked, self._running}, timeout=self.seconds, return_when=asyncio.FIRST_COMPLETED)
            if asked.done():
                return asked.result()
        finally:
            asked.cancel()
        if not self._running.done():
            raise self._too_long("neither asked for a turn nor ended")
        return None

    def _too_long(self, what: str) -> SessionError:
        return SessionError(f"the environment {what} within {self.seconds:g} seconds", "mend it, or raise environment.seconds")


def response_of(call: OurCall, completion: Completion, number: int, before: tuple[int, ...]) -> Response:
    """One turn of ours, as the library wants it.

    Args:
        number: of the turn in its episode; names the call.
        before: ids that were sampled in earlier turns. They stand for the prompt: what else is in it is a matter of the chat
            format, and the library needs it only to tell conversations apart.
    """
    reasoning, said = reasoned(completion.text)
    calls = None
    if call.name == REPLY:
        said = call.arguments["text"]
    else:
        calls = [ToolCall(id=f"call_{number}", name=call.name, arguments=json.dumps(dict(call.arguments)))]
        said = said.partition("<tool_call>")[0].strip()
    message = AssistantMessage(
        content=said,
        reasoning_content=reasoning.removeprefix("<think>").strip() if reasoning else None,
        tool_calls=calls,
    )
    tokens = TurnTokens(
        prompt_ids=list(before),
        completion_ids=list(completion.token_ids),
        completion_logprobs=list(completion.logprobs),
    )
    finish = "length" if completion.finish_reason == "length" else "tool_calls" if calls else "stop"
    return Response(
        id=f"turn_{number}",
        created=0,
        model=_MODEL,
        message=message,
        finish_reason=finish,
        usage=Usage(prompt_tokens=completion.prompt_tokens, completion_tokens=len(completion.token_ids)),
        tokens=tokens if completion.token_ids else None,
    )
