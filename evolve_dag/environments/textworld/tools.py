"""TextWorld as an environment: a game for every task, played by commands."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from evolve_dag.config.parts import EnvironmentSettings
from evolve_dag.config.schema import Experiment, TaskSplit
from evolve_dag.environments.base import EnvironmentPart, tool_prompt, world_tasks
from evolve_dag.environments.textworld.families import FAMILIES, Family
from evolve_dag.environments.textworld.games import TRAINING, Play, need_textworld
from evolve_dag.protocols import CAN, OR, Session, ToolResult, ToolSpec
from evolve_dag.records import Task, ToolCall

GAMES = 1000
"""Numbers of games that a world has: world w holds the games w * 1000 to w * 1000 + 999."""
STREAM_WORLDS = 10_000
"""Distance between the worlds of neighbouring iterations of a stream; worlds of the other splits lie below it."""
MOST_ITERATIONS = 90
"""Iterations of a stream: their games' numbers stay within the 32 bits of a seed."""
MOST_SHOWN = 60
"""Characters of a command that is repeated to the policy."""
QUESTION = "Play."
"""What is asked in every game; what is to be done in it stands in the system message."""
PLAIN_PROMPT = "You play a text game: {goal} In each turn, write one command, and nothing else."


class TextWorldEnvironment(EnvironmentSettings):
    """Games that TextWorld makes (``pip install 'evolve-dag[textworld]'``)."""

    kind: Literal["textworld"] = "textworld"
    """Games that TextWorld makes."""
    family: Literal["coin", "cooking"] = "coin"
    """``coin``: find a coin in a maze of eight rooms. ``cooking``: read a recipe, fetch its ingredient, cook, prepare, eat."""
    limit: int = Field(8, ge=1, le=200)
    """Commands after which a game ends by itself, those that it did not take included; less than ``rollout.max_steps``."""
    admissible: bool = True
    """Whether each observation lists what can be done."""
    form: Literal["plain", "call"] = "plain"
    """``plain``: a turn is a command. ``call``: it calls the tool ``act``, as JSON."""


class TextWorldSession(Session):
    """One game.

    Args:
        number: of the game in its family.
        part: of the family's words.

    Raises:
        ModelError: TextWorld is not installed.
    """

    tools: tuple[ToolSpec, ...] = ()
    system_prompt: str = ""

    def __init__(self, settings: TextWorldEnvironment, number: int, part: str = TRAINING) -> None:
        self._settings = settings
        self._family: Family = FAMILIES[settings.family]
        self._play = Play(self._family.make, number, part)
        self._done: tuple[str, ...] = ()
        self._count = 0
        plain = "command" if settings.form == "plain" else ""
        act = ToolSpec("act", "Give the game a command.", {"command": "The command, as a player types it."}, plain=plain)
        self.tools = (act,)
        goal = self._family.goal
        rules = PLAIN_PROMPT.format(goal=goal) if plain else f"{tool_prompt(self.tools)}\n\nYou play a text game: {goal}"
        self.system_prompt = f"{rules}\n{self._view()}"

    def call(self, call: ToolCall) -> ToolResult:
        """What the game shows after a command; a command that it does not take counts as one."""
        command = " ".join(str(call.arguments["command"]).lower().split()).rstrip(".")
        self._count += 1
        before = self._family.features(self._play, self._done)
        did = self._family.did(self._play, before, command)
        taken = self._play.enter(command)
        if taken:
            self._done = (*self._done, command)
            told = self._family.read(self._play, command)
        else:
            told = f"You cannot {command[:MOST_SHOWN] or 'do nothing'} now."
        over = self._play.over or self._count >= self._settings.limit
        text = "The game is over." if over else self._view()
        said = {"command": "done", "did": did} if taken else {"command": "refused"}
        now = self._family.features(self._play, self._done)
        can = OR.join(dict.fromkeys(self._family.did(self._play, now, one.lower()) for one in self._play.commands))
        features = {**said, CAN: can, **now}
        return ToolResult(f"{told} {text}".strip(), over, features)

    def reward(self, answer: str | None) -> float:
        """Score over the most that can be scored."""
        scored, most = self._play.points
        return min(1.0, max(0.0, scored / most))

    @property
    def expert(self) -> str:
        """What a good player does next; '' where the game is lost."""
        first = self._family.first
        if first and first not in self._done and first in self._play.commands:
            return first
        return next(iter(self._play.way), "")

    @property
    def choices(self) -> tuple[str, ...]:
        """What can be done now, as far as it is listed."""
        return tuple(command for command in self._play.commands if self._family.listed.fullmatch(command))

    def _view(self) -> str:
        play = self._play
        held = ", ".join(" ".join((*sorted(play.traits(one) & SHOWN), play.name(one))) for one in play.held)
        parts = [f"You are in the {play.room}."]
        parts += [f"You hold: {held}."] if held else []
        parts += [f"You can: {', '.join(self.choices)}."] if self._settings.admissible else []
        return " ".join(parts)


SHOWN = frozenset({"raw", "fried", "roasted", "grilled", "burned"})
"""Traits of what is carried that are told."""


class TextWorlds:
    """Opens the game that a task is about."""

    def __init__(self, settings: TextWorldEnvironment) -> None:
        self._settings = settings

    def open(self, task: Task, seed: int) -> TextWorldSession:
        """The game from its beginning; it has no chance in it, so ``seed`` decides nothing."""
        return TextWorldSession(self._settings, int(task.metadata["game"]), str(task.metadata.get("part", TRAINING)))


def _tasks(settings: TextWorldEnvironment, split: TaskSplit, name: str) -> tuple[Task, ...]:
    first = (split.world or 0) * GAMES
    numbers = range(first, first + (split.count or 0))
    parts = FAMILIES[settings.family].parts
    part = {"part": parts[name]} if name in parts else {}
    return tuple(Task(f"game-{n}", QUESTION, "", f"textworld/{name}", {"game": str(n), **part}) for n in numbers)


def _mistakes(settings: TextWorldEnvironment, experiment: Experiment) -> list[tuple[str, str]]:
    found = world_tasks(experiment, "TextWorld makes its own games")
    for name, split in experiment.tasks.splits.items():
        if (split.world or 0) >= STREAM_WORLDS:
            what = f"number the worlds below {STREAM_WORLDS}: a stream goes on in steps of that"
            found.append((f"tasks.{name}.world", what))
        if (split.count or 0) > GAMES:
            found.append((f"tasks.{name}.count", f"a world has no more than {GAMES} games"))
    if experiment.tasks.train.stream and experiment.iterations > MOST_ITERATIONS:
        found.append(("tasks.train.stream", f"TextWorld has games for {MOST_ITERATIONS} iterations"))
    if experiment.rollout.max_steps <= settings.limit:
        what = f"the game ends after {settings.limit} commands: set it higher, so that no call is told to answer"
        found.append(("rollout.max_steps", what))
    for key in ("episodes", "development") if experiment.warmup is not None else ():
        if getattr(experiment.warmup, key) > GAMES:
            found.append((f"warmup.{key}", f"a world has no more than {GAMES} games"))
    if experiment.warmup is not None and settings.form != "plain":
        found.append(("environment.form", "the script of the warm-up writes plain commands: set it to plain"))
    if experiment.rollout.plain_answers and settings.form == "plain":
        found.append(("rollout.plain_answers", "a plain turn is a command here: set it to false, or environment.form to call"))
    return found


TEXTWORLD = EnvironmentPart(
    settings=TextWorldEnvironment,
    make=lambda settings, place: TextWorlds(settings),
    tasks=_tasks,
    fresh=lambda split, iteration: {"world": (split.world or 0) + STREAM_WORLDS * (iteration - 1)},
    mistakes=_mistakes,
    libraries={"textworld": "textworld"},
    check=lambda settings: need_textworld(),
    data=lambda settings: FAMILIES[settings.family].version,
)
