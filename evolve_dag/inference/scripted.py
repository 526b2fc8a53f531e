"""A language model that reads its replies from a script, for tests and for transcripts."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from evolve_dag.errors import ClosedError, ModelError
from evolve_dag.protocols import Completion, Request
from evolve_dag.records import Message

if TYPE_CHECKING:
    from evolve_dag.inference.chat import ChatFormat

Reply = str | BaseException
"""What one call gives: a text, or an error that is raised in its place."""
Script = Callable[[Sequence[Message]], Reply] | Sequence[Reply] | Mapping[str, Sequence[Reply]]


class ScriptedModel:
    """Implements :class:`~evolve_dag.protocols.LanguageModel`.

    Args:
        script: a function from the conversation to the reply; or the replies of a session in order, the same
            for every session; or such a list per session (the part of the session's name before ``@``).
        chat: with it, completions carry token ids, and log-probabilities of 0 (a script is certain).
        delay: seconds that each call takes.
    """

    def __init__(self, script: Script, *, chat: ChatFormat | None = None, delay: float = 0.0) -> None:
        self._script = script
        self._chat = chat
        self._delay = delay
        self._calls: Counter[str] = Counter()
        self.requests: list[Request] = []
        """Every request in order of arrival, those that raised included."""
        self.released: list[str] = []
        """Sessions that were released, in order."""
        self.closed = False

    async def generate(self, request: Request) -> Completion:
        """The next reply of the script.

        Raises:
            ModelError: the script has no such reply, or the model was closed.
            BaseException: the reply, where it is an error.
        """
        if self.closed:
            raise ClosedError("the scripted model was closed", "make a new one")
        self.requests.append(request)
        position = self._calls[request.session]
        self._calls[request.session] += 1
        if self._delay:
            await asyncio.sleep(self._delay)
        reply = self._reply(request, position)
        if isinstance(reply, BaseException):
            raise reply
        finish: Literal["stop", "length"] = "stop"
        if self._chat is None:
            prompt = sum(len(message.content.split()) for message in request.messages)
            return Completion(reply, (), (), finish, prompt)
        ids = self._chat.encode_action(reply)
        if len(ids) > request.sampling.max_tokens:
            ids, finish = ids[: request.sampling.max_tokens], "length"
            reply = self._chat.decode_action(ids)
        return Completion(reply, tuple(ids), (0.0,) * len(ids), finish, len(self._chat.encode(request.messages)))

    def release(self, session: str) -> None:
        """Forget the position in the session's replies."""
        self.released.append(session)
        del self._calls[session]

    async def close(self) -> None:
        self.closed = True

    def _reply(self, request: Request, position: int) -> Reply:
        if callable(self._script):
            return self._script(request.messages)
        name = request.session.rpartition("@")[0] or request.session
        replies = self._script.get(name) if isinstance(self._script, Mapping) else self._script
        if replies is None or position >= len(replies):
            raise ModelError(f"the script has no reply {position + 1} for session {name!r}", "add it to the script")
        return replies[position]
