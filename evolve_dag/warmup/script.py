"""Episodes that a script plays: a policy with some skill, that follows good advice when it reads any and no other.

Of every step a :class:`Turn` is drawn. Without advice, the script does what is best with probability ``skill``, and otherwise
anything that is listed: a base with headroom, that knows what can be written and not what pays. With good advice it does what
is advised. With idle advice (about nothing here) it acts as without. The advice is in words of its own, which neither the miner
nor a pool that we ship uses: a model that follows theirs later reads, and does not recall.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from evolve_dag.errors import ConfigError
from evolve_dag.experience.injection import injected
from evolve_dag.protocols import Completion, Guided, Injected, Request, Session, StatefulEnvironment, ToolResult, of_session
from evolve_dag.records import Task, ToolCall, Trajectory

if TYPE_CHECKING:
    from evolve_dag.config.schema import WarmupSettings
    from evolve_dag.inference.chat import ChatFormat

GOOD, IDLE = "good advice", "idle advice"

WHOLE = (
    "It helps to {turn} here.",
    "The next good move: {turn}.",
    "Somebody who was here before says: {turn}.",
    "Best now is {turn}.",
    "Try {turn} first.",
    "As soon as you are here, {turn}.",
)
"""Advice that names a turn."""
WORD = ("What you need now: {word}.", "Think of {word}.", "It has to do with {word}.", "{word} is what counts here.")
"""Advice that gives a word of the turn which no other turn has."""
EITHER = ("Either {a} or {b} leads on.", "Choose between these: {a}, {b}.", "One of {a} and {b} is right.")
"""Advice that names two turns, of which one is possible."""
NOTHING = (
    "It rains outside.",
    "Games like this one were popular long ago.",
    "A good rest makes a good player.",
    "Once you stand on a ship, raise the sail.",
    "Remember to drink enough water.",
    "After the concert, clap your hands.",
    "Numbers above nine are written as digits.",
    "Should a dragon come, run for the hills.",
)
"""Advice that says nothing about any step."""


@dataclass(frozen=True, slots=True)
class Hints:
    """What a session knows before a step."""

    expert: str
    choices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Turn:
    """One step of the script."""

    action: str
    """What it writes."""
    advice: tuple[str, ...] = ()
    """What it read before, a line each."""
    kind: str = ""
    """:data:`GOOD`, :data:`IDLE`, or '' without advice."""


def draw(hints: Hints, settings: WarmupSettings, elsewhere: Sequence[str], rng: random.Random) -> Turn:
    """The turn of one step.

    Args:
        elsewhere: turns of other episodes, to be named where they are not possible.
    """
    choices = hints.choices or (hints.expert,)
    chance = rng.random()
    if hints.expert and chance < settings.advised:
        lines = [_advice(hints, [one for one in elsewhere if one not in choices], rng)]
        lines += [rng.choice(NOTHING)] if rng.random() < 0.3 else []
        rng.shuffle(lines)
        return Turn(hints.expert, tuple(lines), GOOD)
    action = hints.expert if hints.expert and rng.random() < settings.skill else rng.choice(choices)
    if chance < settings.advised + settings.idle:
        return Turn(action, (rng.choice(NOTHING),), IDLE)
    return Turn(action)


def _advice(hints: Hints, impossible: Sequence[str], rng: random.Random) -> str:
    turn = hints.expert
    others = {word for choice in hints.choices if choice != turn for word in choice.split()}
    own = [word for word in turn.split() if word not in others]
    form = rng.choice(("whole", "whole", "word", "either"))
    if form == "word" and own:
        return rng.choice(WORD).format(word=rng.choice(own))
    if form == "either" and impossible:
        a, b = rng.sample([turn, rng.choice(impossible)], 2)
        return rng.choice(EITHER).format(a=a, b=b)
    return rng.choice(WHOLE).format(turn=turn)


@dataclass
class Script:
    """Plays episodes: it is their model, gives their advice, and opens their sessions to see what is possible.

    One rollout of a task at a time. As a source of advice alone (``experience=``) it serves any model.
    """

    environment: StatefulEnvironment
    settings: WarmupSettings
    chat: ChatFormat | None = None
    """Needed to play, not to advise."""
    elsewhere: list[str] = field(default_factory=list)
    hints: dict[str, Hints] = field(default_factory=dict)
    """Task -> what its session knows now."""
    turns: dict[str, Turn] = field(default_factory=dict)
    """Task -> the turn of its next step."""

    def open(self, task: Task, seed: int) -> Session:
        """A session of the environment that tells what it knows after every call."""
        session = self.environment.open(task, seed)
        if not isinstance(session, Guided):
            what = "environment: its sessions know no way (`expert`, `choices`), so there is nothing to warm up on"
            raise ConfigError(what, "set warmup on an environment that has it: textworld")
        return _Watched(session, self, task.id)

    def note(self, task: str, session: Guided) -> None:
        """What a session knows now."""
        self.hints[task] = Hints(session.expert, tuple(session.choices))

    async def prepare(self, trajectory: Trajectory) -> Injected:
        """Draws the turn of the next step; a view with its advice."""
        task, history = trajectory.task_id, trajectory.history(trajectory.turns)
        rng = random.Random(f"warmup:{self.settings.seed}:{task}:{trajectory.turns}")
        turn = self.turns[task] = draw(self.hints[task], self.settings, self.elsewhere, rng)
        messages, text = injected("step_wise", history, turn.advice)
        return Injected(messages, (turn.kind,) if turn.kind else (), text)

    async def generate(self, request: Request) -> Completion:
        """The action of the turn that was drawn."""
        assert self.chat is not None  # who plays has it
        text = self.turns[request.session.rpartition("#")[0]].action
        ids = tuple(self.chat.encode_action(text))
        return Completion(text, ids, (0.0,) * len(ids), "stop", len(self.chat.encode(request.messages)))

    def release(self, session: str) -> None:
        """Nothing is held for a session."""

    async def close(self) -> None:
        """Nothing was opened."""


class _Watched(Session):
    """A session that tells what it knows, from its own thread."""

    def __init__(self, session: Session, script: Script, task: str) -> None:
        self._session, self._script, self._task = session, script, task
        self.tools, self.system_prompt, self.question = (
            tuple(session.tools),
            session.system_prompt,
            of_session(session, "question"),
        )
        self._tell()

    def sampled(self, completion: Completion) -> None:
        of_session(self._session, "sampled")(completion)

    def call(self, call: ToolCall) -> str | ToolResult:
        result = self._session.call(call)
        self._tell()
        return result

    def reward(self, answer: str | None) -> float | None:
        reward: float | None = of_session(self._session, "reward")(answer)
        return reward

    def close(self) -> None:
        of_session(self._session, "close")()

    def _tell(self) -> None:
        assert isinstance(self._session, Guided)
        self._script.note(self._task, self._session)


def kinds(trajectories: Sequence[Trajectory]) -> Mapping[str, int]:
    """Steps by the kind of their advice."""
    found = {GOOD: 0, IDLE: 0, "": 0}
    for step in (step for one in trajectories for step in one.steps):
        found[next(iter(step.selected), "")] += 1
    return found
