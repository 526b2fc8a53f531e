"""The nouns of evolve-dag: frozen records that every part reads and none mutates.

Nothing here imports a heavy library. A record that reaches disk has one Parquet or JSON shape,
written and read by :mod:`evolve_dag.store.artifacts`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

LARGEST_SEED = 2**64 - 1
"""What torch takes; numpy and random take more."""

Role = Literal["system", "user", "assistant", "tool"]
Granularity = Literal["principle", "instance"]
InjectionPattern = Literal["none", "global", "step_wise"]
Source = Literal["teacher", "student"]
TrajectoryStatus = Literal["answered", "forced", "ended", "unanswered", "failed"]
REPLY = "reply"
"""Tool name under which a turn of a conversation stands that is text and calls no tool: ``{"text": ...}``."""
PoolOperation = Literal["add", "update", "delete", "merge", "graduate", "recall", "withdraw"]
Decision = Literal["promote", "keep", "restore"]


@dataclass(frozen=True, slots=True)
class Task:
    """A question with its reference answer."""

    id: str
    """Unique within a suite; never derived from the position in a file."""
    question: str
    """What the policy is asked, as plain text."""
    answer: str
    """Reference answer; never shown to the policy."""
    suite: str = ""
    """Name of the task suite, e.g. ``pocket/train``."""
    metadata: Mapping[str, str] = field(default_factory=dict)
    """Facts for breakdowns (``hops``, ``difficulty``); never shown to the policy."""


@dataclass(frozen=True, slots=True)
class ToolCall:
    """One parsed tool call."""

    name: str
    """Tool name exactly as the policy wrote it."""
    arguments: Mapping[str, Any]
    """Argument name -> value: text, or any JSON value where the tool's schema asks for one."""

    @property
    def texts(self) -> dict[str, str]:
        """The arguments as text: what is text as it is, any other value as JSON."""
        return {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in self.arguments.items()}

    def __str__(self) -> str:
        """``search(query: Rato Miku)``."""
        return f"{self.name}({', '.join(f'{name}: {value}' for name, value in self.texts.items())})"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Role
    content: str
    """Text of the turn, without any chat-template markup."""
    token_ids: tuple[int, ...] = ()
    """Sampled ids of an assistant turn, end-of-turn token included when it was sampled. Rendered
    verbatim, so nothing is re-tokenized between rollout and training. Empty for other roles."""


@dataclass(frozen=True, slots=True)
class Step:
    """One model call and the observation that follows."""

    index: int
    """0-based position in the trajectory."""
    text: str
    """Decoded action, without the end-of-turn token."""
    token_ids: tuple[int, ...]
    """Sampled token ids of the action (end-of-turn included when sampled)."""
    logprobs: tuple[float, ...]
    """Log-probability (nats, temperature 1, of the model that sampled, in the context it saw) of each
    sampled id; same length as ``token_ids``, or empty when the backend does not report it."""
    call: ToolCall | None = None
    """The tool call, or None for a final answer or a malformed action."""
    answer: str | None = None
    """Final answer when this step gave one."""
    observation: str | None = None
    """What came back: tool output, or what was wrong with the action. None after the last step."""
    problem: str | None = None
    """Why the action was refused (malformed, unknown tool, bad argument), or None."""
    selected: tuple[str, ...] = ()
    """Ids of the experience items that stood in the context of this call."""
    injected: str = ""
    """Exact text that was added to the copy of the history for this call; '' without experience."""
    rationale: str = ""
    """Why the selector chose ``selected``; '' without one."""
    prompt_tokens: int = 0
    """Tokens of the context of this call."""
    seconds: float = 0.0
    """Wall time from request to observation."""
    features: Mapping[str, str] = field(default_factory=dict)
    """Name -> value of what the environment says of the observation, see :class:`~evolve_dag.protocols.ToolResult`; empty: the
    text alone speaks."""


@dataclass(frozen=True, slots=True)
class Trajectory:
    """The record of one rollout. A failed rollout is a row with its error, not a crash."""

    id: str
    """Unique in an artifact: ``<task id>#<rollout>``."""
    task_id: str
    rollout: int
    """0-based index within its group (the trajectories of one task in one iteration)."""
    seed: int
    """Seed from which every sampled token of this trajectory follows."""
    system: str
    """System message of the clean history (never holds experience)."""
    question: str
    """First user message of the clean history (never holds experience)."""
    steps: tuple[Step, ...]
    status: TrajectoryStatus
    """``answered``; ``forced``: answered only when a limit demanded it; ``ended``: by the environment, before an answer;
    ``unanswered``: the policy came to no answer, its own doing; ``failed``: something else broke (a tool, an endpoint)."""
    answer: str | None = None
    reward: float | None = None
    """1.0 right, 0.0 wrong, between them where an environment gives part of it; None not judged (never 0 for 'could not be
    judged')."""
    error: str | None = None
    """What ended a failed rollout, overflowed the context, or kept the judge from judging; holds no secret."""
    seconds: float = 0.0
    offers_tools: bool = True
    """Whether there was any tool in this episode; without one nothing can be read before the answer."""

    def history(self, step: int) -> tuple[Message, ...]:
        """Clean history h_{t-1} that precedes ``step``: system, question, then action and observation pairs."""
        messages = [Message("system", self.system), Message("user", self.question)]
        for earlier in self.steps[:step]:
            messages.append(Message("assistant", earlier.text, earlier.token_ids))
            if earlier.observation is not None:
                replied = earlier.call is not None and earlier.call.name == REPLY
                messages.append(Message("user" if replied else "tool", earlier.observation))
        return tuple(messages)

    @property
    def turns(self) -> int:
        """Assistant turns."""
        return len(self.steps)


def solved(reward: float | None) -> bool:
    """Whether an episode counts as a success: it has the whole reward. Parts of it are none, nor is what was not judged."""
    return reward == 1


@dataclass(frozen=True, slots=True)
class ExperienceItem:
    """One lesson of the experience pool."""

    id: str
    """Never changes and is never reused within a lineage."""
    text: str
    """What the teacher reads. A principle that we write reads ``Name: when <situation>, <strategy>.``"""
    granularity: Granularity
    """Whether the text holds trajectory detail (``instance``) or none; how it is phrased does not matter."""
    condition: Mapping[str, str] = field(default_factory=dict)
    """Feature -> value under which the item applies (used by the ``state`` selector); may be empty."""
    evidence: Mapping[str, float] = field(default_factory=dict)
    """``support``, ``lift``, ``low``, ``high`` and the like, as the extractor measured them."""
    trajectory_ids: tuple[str, ...] = ()
    """Trajectories that taught it."""
    created: int = 0
    """Iteration that added it."""
    updated: int = 0
    """Iteration that last changed it."""
    graduated: int = 0
    """Iteration that took it out of the context, since the weights hold it; 0: none did."""
    withdrawn: int = 0
    """Iteration that took it out of the context, since the teacher did worse with it; 0: none did."""

    @property
    def active(self) -> bool:
        """Whether it may stand in a context."""
        return not self.graduated and not self.withdrawn


@dataclass(frozen=True, slots=True)
class PoolEdit:
    """One change of the pool, kept for ever."""

    operation: PoolOperation
    item_id: str
    iteration: int
    before: str | None
    """Text before the edit; None for ``add``."""
    after: str | None
    """Text after the edit; None for ``delete``."""
    reason: str
    """Why, in words a reader understands (e.g. ``over the cap of 12: lowest lift``)."""
    trajectory_ids: tuple[str, ...] = ()
    """Trajectories that caused the edit."""
    into: str | None = None
    """For ``merge``: id of the item that absorbed this one."""


@dataclass(frozen=True, slots=True)
class Finding:
    """What the check of the teacher found about an item of the pool; the next extraction begins by entering it."""

    operation: Literal["withdraw", "graduate", "recall"]
    item_id: str
    reason: str
    """The evidence, in words."""


def withdrawn(findings: Iterable[Finding]) -> frozenset[str]:
    """Ids of the items that are to be withdrawn."""
    return frozenset(finding.item_id for finding in findings if finding.operation == "withdraw")


@dataclass(frozen=True, slots=True)
class Standing:
    """What the gate carries from night to night: who holds, who was the best, how sure it is that things got worse since."""

    champion: int = 0
    """Iteration whose candidate holds; 0: the base policy."""
    best: int = 0
    """Iteration of the best champion so far."""
    adapter: str | None = None
    """Digest of the best one's adapter; None for the bare base model."""
    experience: str | None = None
    """Digest of the best one's experience pool; None for an empty one."""
    capital: tuple[float, ...] = ()
    """What bettors on a loss have made since then, see :mod:`evolve_dag.evaluation.betting`; () at the start."""
    began: float = 1.0
    """What those bets began with; less than 1 where an earlier best was lost on."""
    nights: int = 0
    """Candidates since the best that were compared with it."""
    lost: float = 0.0
    """Success that these lost against it, mean over the nights; negative: gained."""
    declined: int = 0
    """Candidates in a row, up to the last one, that came from the champion and were declined for a loss of success."""


@dataclass(frozen=True, slots=True)
class PolicyRef:
    """What enters iteration k: policy(k) = base model + adapter(k-1) + experience pool(k-1)."""

    iteration: int
    """k, 1-based."""
    base: str
    """Identity of the base model: the path as configured plus the digest of its weights."""
    adapter: str | None = None
    """Digest of the adapter artifact, or None for the bare base model."""
    experience: str | None = None
    """Digest of the experience artifact, or None for an empty pool."""
    next_item: int = 1
    """First number that an item of E(k) may bear. It counts past the items of declined candidates, whose pool is gone but
    whose ids stay in the record: an id is never given twice."""
    findings: tuple[Finding, ...] = ()
    """What E(k-1) was found to hold after it was made; an item that is to be withdrawn stands in no context any more."""
    standing: Standing = Standing()
    """The gate's affair: it decides what the gate compares, and nothing of what the policy is."""

    @property
    def content(self) -> dict[str, Any]:
        """What the policy is, as plain values."""
        values = asdict(self)
        del values["standing"]
        if not self.findings:  # a policy without any is named as it was before there were findings
            del values["findings"]
        return values

    @property
    def withdrawn(self) -> frozenset[str]:
        """Ids of items of its pool that are to be withdrawn."""
        return withdrawn(self.findings)


@dataclass(frozen=True, slots=True)
class Score:
    """The result of one evaluation rollout of one task."""

    task_id: str
    rollout: int
    condition: str
    """``without`` or ``with`` experience in context, or ``greedy`` (argmax, without experience)."""
    reward: float | None
    """None: not judged."""
    premature: bool
    """Answered before any tool result held the answer's evidence, see evaluation.metrics."""
    status: TrajectoryStatus
    turns: int
    tokens: int
    """Sampled tokens."""
    answer: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Call:
    """The outcome of one model call, all its attempts together."""

    role: str
    """Who was asked: ``policy``, ``extractor``, ``selector``, ``judge``."""
    model: str
    """The model's name as configured."""
    purpose: str
    """What for, e.g. ``critique``; '' where nobody said (:func:`evolve_dag.inference.ledger.purpose`)."""
    outcome: Literal["ok", "error"]
    attempts: int
    """Requests that were sent, the failed ones included."""
    prompt_tokens: int
    """Tokens of the context, over all attempts whose answer stated them (an empty answer is paid too)."""
    cached_tokens: int
    """How many of ``prompt_tokens`` the backend had in its cache."""
    completion_tokens: int
    """Sampled tokens, over all attempts whose answer stated them."""
    seconds: float
    """Wall time from request to outcome: waiting for its turn and pauses between attempts included."""
    cost: float | None
    """US dollars; None: unknown (no price in the config, or the endpoint did not state its tokens)."""
    error: str | None
    """Why it failed; holds no secret. None when it did not."""
    cut_characters: int
    """Characters that were cut out of the request to fit the context limit."""
