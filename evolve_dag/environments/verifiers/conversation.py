"""One episode as our loop sees it: what the library asks is what the policy reads, and what is said must stay said."""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from evolve_dag.environments.base import tools_section
from evolve_dag.errors import SessionError
from evolve_dag.plain import one_line
from evolve_dag.protocols import TALK, Completion, Session, ToolResult, ToolSpec, as_reward
from evolve_dag.records import ToolCall

if TYPE_CHECKING:
    from verifiers.v1.types import Message, Request

    from evolve_dag.environments.verifiers.library import Play
    from evolve_dag.environments.verifiers.stage import Stage

TEAR_DOWN_SECONDS = 8.0
"""More than the library's own limit for it."""
MEND = "mend the environment"
ALIEN = "only a conversation of text, with one agent, can be played"


class Talk(Session):
    """A conversation between the policy and an environment of the library.

    Args:
        stage: where the library runs.
        play: the episode, not begun yet.
        part: of the rubric, that counts alone; '' for the sum.
    """

    tools: tuple[ToolSpec, ...] = ()
    system_prompt: str = ""

    def __init__(self, stage: Stage, play: Play, part: str) -> None:
        self._stage, self._play, self._part = stage, play, part
        self._given: list[Completion] = []
        try:
            first = self._run(play.begin())
            if first is None:
                self._judged()  # which says what broke
                raise SessionError("the environment ended before it asked for a turn", MEND)
            self._begin(first)
        except BaseException:
            with contextlib.suppress(SessionError):  # what broke first is what is told
                self.close()
            raise

    def _begin(self, request: Request) -> None:
        head = [_text(message) for message in request.messages if message.role == "system"]
        asked = [message for message in request.messages if message.role != "system"]
        if not asked or any(message.role != "user" for message in asked):
            raise SessionError("the environment begins with turns of an assistant", ALIEN)
        tools = _tools(request)
        self.tools = (*tools, TALK)
        self.question = "\n\n".join(map(_text, asked))
        self.system_prompt = "\n\n".join([*head, *([tools_section(tools)] if tools else [])])
        self._said: list[tuple[Any, ...]] = [_signature(message) for message in request.messages]

    def sampled(self, completion: Completion) -> None:
        self._given.append(completion)

    def call(self, call: ToolCall) -> ToolResult:
        library = importlib.import_module("evolve_dag.environments.verifiers.library")
        *earlier, completion = self._given
        before = tuple(index for given in earlier for index in given.token_ids)
        response = library.response_of(call, completion, len(earlier), before)
        self._said.append(_signature(response.message))
        request = self._run(self._play.answer(response))
        return ToolResult("", done=True) if request is None else ToolResult(self._news(request))

    def _news(self, request: Request) -> str:
        """What came after the policy's turn; everything before it must be as it was."""
        signatures = [_signature(message) for message in request.messages]
        news = request.messages[len(self._said) :]
        if signatures[: len(self._said)] != self._said or any(message.role not in ("user", "tool") for message in news):
            raise SessionError("the environment changed what was said before", ALIEN)
        if (*_tools(request), TALK) != self.tools:
            raise SessionError("the environment changed its tools in the middle of an episode", ALIEN)
        self._said = signatures
        return "\n\n".join(map(_text, news))

    def reward(self, answer: str | None) -> float | None:
        """What the rubric gives; None where it has no part at all.

        Raises:
            SessionError: it broke, gives no number from 0 to 1, or its trace holds other turns than the policy took.
        """
        trace = self._judged()
        parts = {name: reward for name, reward in trace.rewards.items() if reward is not None}
        if self._part and self._part not in parts:
            what = f"the rubric has no part {self._part!r}: it has {', '.join(parts) or 'none'}"
            raise SessionError(what, "correct environment.reward")
        if not parts:
            return None
        given = float(parts[self._part].score if self._part else trace.reward)
        reward = as_reward(given)
        if reward is None:
            told = ", ".join(f"{name} {one.score:g} x {one.weight:g}" for name, one in parts.items())
            remedy = "name the part that counts alone in environment.reward, or mend the rubric"
            raise SessionError(f"the rubric gave {given:g}, which is not from 0 to 1 ({one_line(told)})", remedy)
        return reward

    def _judged(self) -> Any:
        """The trace of an episode that ended well, which must be ours."""
        episode = self._run(self._play.leave())
        trace = self._play.trace
        if self._play.problem is not None:
            raise self._play.problem
        errors = [*episode.errors, *(trace.errors if trace is not None else ())]
        if errors or trace is None or not episode.ok:
            told = f"{errors[-1].type}: {errors[-1].message}" if errors else "it says not why"
            raise SessionError(f"the environment failed: {one_line(told)}", MEND)
        sampled = [node for node in trace.nodes if node.sampled]
        ids = [tuple(i for i, own in zip(node.token_ids, node.mask, strict=True) if own) for node in sampled]
        if ids != [given.token_ids for given in self._given]:
            what = "no token ids" if not any(ids) else "other token ids than were sampled"
            raise SessionError(f"the environment's trace holds {what}", ALIEN)
        return trace

    def close(self) -> None:
        self._stage.run(self._play.close(), TEAR_DOWN_SECONDS)

    def _run(self, work: Any) -> Any:
        return self._stage.run(work, self._play.seconds)


def _tools(request: Request) -> tuple[ToolSpec, ...]:
    """Those of a request; Raises DataError for a schema that is none."""
    return tuple(ToolSpec(tool.name, tool.description, schema=tool.parameters) for tool in request.tools or ())


def _text(message: Message) -> str:
    content = message.content or ""
    if isinstance(content, str):
        return content
    if any(part.type != "text" for part in content):
        raise SessionError("the environment shows images", ALIEN)
    return "\n".join(part.text for part in content)


def _signature(message: Message) -> tuple[Any, ...]:
    """What a message says, whatever it was written by."""
    calls: Sequence[Any] = getattr(message, "tool_calls", None) or ()
    return message.role, _text(message), tuple((call.name, call.arguments) for call in calls)
