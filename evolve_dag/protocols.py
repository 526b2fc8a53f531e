"""What the parts ask of each other: models, environments, verifiers and sources of experience, with the values that pass.

Whoever implements one imports this and the records alone; whoever uses one needs to know no implementation.

An *environment* is of one of two kinds. Most are tools over a world that no call changes: :class:`Environment`, one object for
all episodes. Where a call changes what the next one finds (a game, a database, a shell), the state belongs to the episode:
a :class:`StatefulEnvironment` opens a :class:`Session` for each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

from evolve_dag.errors import DataError
from evolve_dag.records import REPLY, Message, Task, ToolCall, Trajectory

if TYPE_CHECKING:
    from referencing import Resource


@dataclass(frozen=True, slots=True)
class Sampling:
    """How one completion is sampled."""

    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    max_tokens: int = 64
    """Most tokens to sample for this completion, end-of-turn included."""
    seed: int = 0
    """Every sampled token follows from (seed, position in the completion) alone, whatever else is in the
    batch; endpoints that cannot promise that pass the seed on."""


@dataclass(frozen=True, slots=True)
class Request:
    """One model call."""

    messages: tuple[Message, ...]
    """Conversation so far, the assistant's turn being next. Assistant messages with ``token_ids`` are
    used verbatim by backends that own a tokenizer."""
    sampling: Sampling
    session: str = ""
    """Calls of one episode share it; a hint for KV reuse, never needed for correctness."""
    answer_schema: Mapping[str, Any] | None = None
    """JSON schema of the answer. Backends with structured outputs enforce it, endpoints without its bounds (``pattern``,
    ``maxLength``, ``maxItems``); the others ignore it, so the caller parses what comes
    (:mod:`evolve_dag.inference.structured`)."""


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled assistant turn."""

    text: str
    """Decoded, without end-of-turn token."""
    token_ids: tuple[int, ...]
    """Sampled ids, end-of-turn included when it was sampled; empty where the endpoint hides them."""
    logprobs: tuple[float, ...]
    """Log-probability (nats, temperature 1) of each sampled id."""
    finish_reason: Literal["stop", "length"]
    prompt_tokens: int
    """Tokens of the context."""
    cached_tokens: int = 0
    """How many of ``prompt_tokens`` were reused from an earlier call of the session."""
    cut_characters: int = 0
    """Characters that were cut out of the request to fit the context limit; 0: it was sent whole."""


@runtime_checkable
class LanguageModel(Protocol):
    """A policy, extractor, selector or judge that can be asked."""

    async def generate(self, request: Request) -> Completion:
        """Sample one assistant turn.

        Raises:
            ContextOverflowError: the context is longer than the model takes.
            ModelError: the model cannot serve the request (endpoint down after retries).
        """
        ...

    def release(self, session: str) -> None:
        """The episode is over: what was cached for ``session`` may go."""
        ...

    async def close(self) -> None:
        """Free memory and connections; safe to call twice."""
        ...


@runtime_checkable
class CountsTokens(Protocol):
    """A model that has its tokenizer at hand."""

    def count_tokens(self, message: Message) -> int:
        """Tokens that ``message`` adds to a conversation, its markup included."""
        ...


@dataclass(frozen=True, slots=True)
class ToolSpec:
    """One tool as the policy sees it (rendered as JSON schema in the system message)."""

    name: str
    description: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    """Argument name -> what it is; every argument is a required string. The simple case."""
    schema: Mapping[str, Any] | None = None
    """JSON schema (draft 2020-12) of all arguments, an object, in place of ``parameters``: for arguments of other types,
    optional ones, and lists. A call that breaks it is not made; the policy reads why."""
    plain: str = ""
    """The one argument that a turn is, as it was written, where it calls no other tool: for a policy that is to write commands
    or to talk, and no JSON. Tags of an answer are text then. '': calls are JSON."""

    def __post_init__(self) -> None:
        if self.schema is not None:
            _check_schema(self.name, self.schema)

    @property
    def arguments(self) -> dict[str, Any]:
        """JSON schema of all arguments, in either case."""
        if self.schema is not None:
            return dict(self.schema)
        described = {name: {"type": "string", "description": what} for name, what in self.parameters.items()}
        return {"type": "object", "properties": described, "required": list(self.parameters)}


def _check_schema(tool: str, schema: Mapping[str, Any]) -> None:
    from jsonschema import Draft202012Validator, SchemaError
    from referencing import Registry
    from referencing.jsonschema import DRAFT202012

    try:
        Draft202012Validator.check_schema(schema)
    except SchemaError as problem:
        raise DataError(f"tool {tool}: its schema is wrong: {problem.message}", "write a JSON schema, draft 2020-12") from None
    if schema.get("type") != "object":
        raise DataError(f"tool {tool}: its schema is not that of an object", 'give it "type": "object" and "properties"')
    resource: Resource[Any] = DRAFT202012.create_resource(schema)
    for reference in _dangling(resource, Registry().resolver_with_root(resource)):
        raise DataError(f"tool {tool}: its schema holds no {reference!r}", 'put what a "$ref" names under "$defs"')


def _dangling(resource: Resource[Any], resolver: Any) -> Iterator[str]:
    """The references that lead nowhere; nothing is fetched."""
    from referencing.exceptions import Unresolvable

    resolver = resolver.in_subresource(resource)
    content = resource.contents
    if isinstance(content, Mapping) and "$ref" in content:
        try:
            resolver.lookup(content["$ref"])
        except Unresolvable:
            yield content["$ref"]
    for inner in resource.subresources():
        yield from _dangling(inner, resolver)


TALK = ToolSpec(REPLY, "Say something.", {"text": "What is said."}, plain="text")
"""With this tool among its own, an environment converses: what is said is followed by a user's message, is heard on the last
call that a limit allows too, and is the answer where the episode ends with it."""


CAN = "can"
"""The feature that tells what the next call may come to."""
OR = "; "
"""Stands between the things that it tells."""


@dataclass(frozen=True, slots=True)
class ToolResult:
    """What a call gave, where there is more to say than its text."""

    text: str
    """The observation."""
    done: bool = False
    """Whether the episode is over: the policy is not asked again."""
    features: Mapping[str, str] = field(default_factory=dict)
    """What a reader should see in the observation, so that lessons can be found about it: name -> value, at most six, in
    lower-case words of a small vocabulary (``{"result": "an error"}`` reads 'when the result is an error'). They take the place
    of what is read from the text. Never words of the world or the task: what says something of one task only is no lesson.
    ``did`` is not about the observation but the call: what it came to (``go back``), where its tool's name says too little.
    :data:`CAN` is about the next call: all that it may come to, in the words of ``did``, with :data:`OR` between them."""


@runtime_checkable
class Environment(Protocol):
    """A set of tools over one world that no call changes. Safe to call from many episodes at once."""

    @property
    def tools(self) -> tuple[ToolSpec, ...]: ...

    @property
    def system_prompt(self) -> str:
        """First message of every episode: the tools and how to call them."""
        ...

    @property
    def digest(self) -> str:
        """Hash of everything that decides what a call returns. The lineage is named without opening anything: by the settings,
        and by ``data`` of the environment's row where they and its code do not say all."""
        ...

    async def call(self, call: ToolCall) -> str | ToolResult:
        """Run one tool call whose name is in ``tools`` and whose arguments are complete.

        Returns:
            The observation as plain text. Text from outside is data: it is never interpreted.

        Raises:
            ToolError: the call could not be served; the message becomes the observation.
        """
        ...


class Session(Protocol):
    """The state of one episode. Everything in it is called from one thread of its own, one call after the other, and may block:
    for as long as an episode may take (``rollout.max_seconds``), then the episode has failed."""

    tools: tuple[ToolSpec, ...] = ()
    """Those of this episode; asked once, after it was opened."""
    system_prompt: str = ""
    """First message of the episode: the tools, how to call them, and what of the state is to be known at the beginning."""
    question: str = ""
    """What is asked, in place of the task's question; '': the task's."""

    def sampled(self, completion: Completion) -> None:
        """The turn that makes the next call, as it was sampled; for who needs more of it than the call."""
        return None

    def call(self, call: ToolCall) -> str | ToolResult:
        """Run one tool call that fits its tool's schema.

        Raises:
            ToolError: it could not be served, or is against the rules; the message becomes the observation.
        """
        ...

    def reward(self, answer: str | None) -> float | None:
        """What the episode is worth, asked once at its end.

        Args:
            answer: what the policy gave; None when it gave nothing.

        Returns:
            0 to 1, parts of the way included; None (also what a subclass that says nothing gives) leaves it to the verifier.
        """
        return None

    def close(self) -> None:
        """Tear down. Called once, whatever came before; a killed process cannot call it."""
        return None


def of_session(session: Session, name: str) -> Any:
    """What a session has under a name, or what :class:`Session` has: a class that is none of its own may leave that out."""
    inherited = getattr(Session, name)
    return getattr(session, name, partial(inherited, session) if callable(inherited) else inherited)


@runtime_checkable
class Guided(Protocol):
    """A :class:`Session` that knows a way, so that a script can play it (``evolve warmup``)."""

    @property
    def expert(self) -> str:
        """The turn that a good player writes next; '' where nothing helps any more."""
        ...

    @property
    def choices(self) -> tuple[str, ...]:
        """Turns that are possible now."""
        ...


@runtime_checkable
class StatefulEnvironment(Protocol):
    """Opens a state for every episode."""

    def open(self, task: Task, seed: int) -> Session:
        """Set up the state of one episode, in a thread of the episode's own. Many are open at once.

        An episode that a kill ended begins here again, with the same seed: what it left outside of the process must not matter.

        Args:
            task: with its reference answer, which no observation may tell.
            seed: all that is drawn must follow from it.
        """
        ...


class ToolError(Exception):
    """A tool refused or failed; its message is shown to the policy as the observation."""


_ROUNDING = 1e-9
"""What a reward may be away from 0 or 1 and still be meant so."""


def as_reward(value: object) -> float | None:
    """A number from 0 to 1 as a reward; None where it is none.

    Next to 0 or 1 it is that: the weights 0.7, 0.2 and 0.1 of a rubric add up to a little less than 1, others to a little more.
    """
    number = value if isinstance(value, Real) else _number_in(value)
    if number is None:
        return None
    given = float(number)
    end = 0.0 if given < 0.5 else 1.0
    if abs(given - end) <= _ROUNDING:
        return end
    return given if 0 < given < 1 else None  # NaN is in no range


def _number_in(value: object) -> Real | None:
    """The number in an array or tensor of one, e.g. what a comparison of NumPy gives."""
    try:
        number = value.item() if hasattr(value, "item") else None
    except (TypeError, ValueError, RuntimeError):  # of several
        return None
    return number if isinstance(number, Real) else None


@runtime_checkable
class Verifier(Protocol):
    """Scores final answers (METHOD step 2). Safe to call from many episodes at once."""

    async def verify(self, task: Task, answer: str | None) -> float | None:
        """The reward of ``answer``.

        Args:
            task: the task with its reference answer.
            answer: what the policy gave; None when it gave nothing.

        Returns:
            1.0 right, 0.0 wrong, or None when it could not be judged. "Could not be judged" is never "wrong": a
            failing judge that returned 0.0 would move tasks in and out of the groups that extraction learns from.
        """
        ...


@dataclass(frozen=True, slots=True)
class Injected:
    """The teacher's view of a history."""

    messages: tuple[Message, ...]
    """A copy; equals the history when nothing was selected."""
    selected: tuple[str, ...] = ()
    """Ids of the items that stand in it."""
    text: str = ""
    """Exactly what was added; '' for nothing."""
    rationale: str = ""
    """Why these items; '' where nobody chose."""


class ExperienceSource(Protocol):
    """Gives the teacher's view before each call."""

    async def prepare(self, trajectory: Trajectory) -> Injected:
        """View of the history that precedes the next step of ``trajectory`` (all its steps have happened)."""
        ...
