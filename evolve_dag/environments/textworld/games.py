"""Games by family and number, and one that is being played, through TextWorld's own Python API.

A game follows from its number alone and is built in this process in some hundredths of a second; a step takes a millisecond.
So no game is kept in a file: none can be missing, cut or of another version, and a kill leaves nothing behind. What TextWorld
would compile for an interpreter of Inform 7 (some 8 seconds a game) is the flowery text, which a small model pays by the token:
here the same state is told in one line (:func:`Play.view`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from evolve_dag.errors import ModelError

if TYPE_CHECKING:
    from textworld import Game

_LOCK = threading.RLock()
"""TextWorld keeps grammars and rules in globals, and its parser is not meant for several threads; episodes take turns."""
KEPT = 1024
"""Games kept in memory."""
TRAINING = "train"
"""TextWorld's name for the part of a family's words that training has."""
_FURTHER = 10_000_000
"""From a number that is not taken to the one that is tried in its place; hundreds of them stay within the 32 bits of a seed."""


def coin(number: int, part: str) -> Game:
    """TextWorld's Coin Collector: a chain of four rooms, a dead end beside each of them, a coin in the last. Its words have no
    parts: two games are hardly ever alike."""
    from textworld import GameOptions
    from textworld.challenges.tw_coin_collector import coin_collector
    from textworld.generator.data import KnowledgeBase

    options = GameOptions()
    options.seeds = number
    options.kb = KnowledgeBase.load(coin_collector.KB_PATH)
    options.grammar.allowed_variables_numbering = True
    options.quest_length, options.nb_rooms = 4, 8
    return coin_collector.make_game("simple", options)


def cooking(number: int, part: str) -> Game:
    """TextWorld's Cooking: in one kitchen, one ingredient of a recipe that stands in the cookbook, to be fetched and cooked.

    There are so few recipes and kitchens that games of other numbers are alike. So what is measured cooks what training never
    cooks: with TextWorld's parts ``valid`` and ``test``, which hold foods of training as well, a number is drawn on until the
    recipe asks for a food that training does not have.
    """
    from textworld import GameOptions
    from textworld.challenges.tw_cooking import cooking as challenge

    skills = {"recipe": 1, "take": 1, "cook": True, "cut": False, "open": False, "drop": False, "go": 1, "split": part}
    known = frozenset(challenge.FOODS_SPLITS[TRAINING])
    while True:
        options = GameOptions()
        options.seeds = number
        game = challenge.make({**skills, "recipe_seed": number + 1}, options)
        if part == TRAINING or known.isdisjoint(name for name, *_ in game.metadata["ingredients"]):
            return game
        number += _FURTHER


@lru_cache(maxsize=1)
def _load_once() -> Callable[..., Any]:
    """TextWorld's reader of the rules and words of a family, with a memory."""
    from textworld.generator.data import KnowledgeBase

    return lru_cache(maxsize=8)(KnowledgeBase.load)


def need_textworld() -> None:
    """Raises ModelError where TextWorld is not installed."""
    try:
        import textworld  # noqa: F401
    except ImportError as error:
        raise ModelError(f"TextWorld cannot be imported: {error}", "pip install 'evolve-dag[textworld]'") from None


@lru_cache(maxsize=KEPT)
def _built(make: Callable[[int, str], Game], number: int, part: str) -> Game:
    with _in_memory():
        return make(number, part)


@contextmanager
def _in_memory() -> Iterator[None]:
    """What is slow about a game is not the game. Its maker walks through it, so that TextWorld knows a way, and compiles it for
    that (8 seconds); and it parses the family's rules anew (93% of the rest)."""
    from textworld import GameMaker
    from textworld.generator.data import KnowledgeBase

    walk, load = GameMaker.set_walkthrough, KnowledgeBase.__dict__["load"]
    GameMaker.set_walkthrough, KnowledgeBase.load = _walked, staticmethod(_load_once())
    try:
        yield
    finally:
        GameMaker.set_walkthrough, KnowledgeBase.load = walk, load


def _walked(maker: Any, commands: Sequence[str]) -> None:
    """``GameMaker.set_walkthrough`` over the game in memory: which actions first bring about each event of its quests."""
    env, state = _played(maker.build(validate=True))
    events = {event: event.copy() for quest in maker.quests for event in quest.win_events}
    followed = [one for quest in state["_game_progression"].quest_progressions for one in quest.win_events]
    actions: list[Any] = []
    for count, command in enumerate(commands, 1):
        before = [one.triggered for one in followed]
        state, _, _ = env.step(command)
        actions.append(state["_last_action"])
        for one, was in zip(followed, before, strict=True):
            if one.triggered and not was:
                events[one.event].actions, events[one.event].commands = list(actions), list(commands[:count])
    for event, found in events.items():
        event.actions, event.commands = found.actions, found.commands


def _played(game: Game) -> tuple[Any, Any]:
    """A game in memory at its beginning: (TextWorld's environment, its state)."""
    from textworld import EnvInfos
    from textworld.envs import TextWorldEnv
    from textworld.generator.inform7 import Inform7Game

    env = TextWorldEnv(EnvInfos(policy_commands=True))
    env._game, env._inform7 = game, Inform7Game(game)  # what load() takes from a file
    return env, env.reset()


class Play:
    """A game from its beginning. Safe from any thread.

    Args:
        make: the family's maker.
        number: of the game in its family.
        part: of the family's words.

    Raises:
        ModelError: TextWorld is not installed.
    """

    def __init__(self, make: Callable[[int, str], Game], number: int, part: str = TRAINING) -> None:
        need_textworld()
        with _LOCK:
            self.game = _built(make, number, part)
            self._env, self._state = _played(self.game)
        self._seen = {self._place}

    def enter(self, command: str) -> bool:
        """Do what ``command`` says, in any case of letters; False, and nothing happens, where it cannot be done now."""
        meant = next((one for one in self.commands if one.lower() == command.lower()), None)
        if meant is None:
            return False
        with _LOCK:
            self._state, _, _ = self._env.step(meant)
        self._seen.add(self._place)
        return True

    @property
    def commands(self) -> tuple[str, ...]:
        """All that can be done now, in alphabetical order."""
        return tuple(self._state["admissible_commands"])

    @property
    def way(self) -> tuple[str, ...]:
        """The shortest way from here to the end of the game, as TextWorld knows it; empty where there is none any more."""
        return tuple(self._state.get("policy_commands") or ())

    @property
    def over(self) -> bool:
        """Won, or lost beyond remedy."""
        return bool(self._state["won"] or self._state["lost"])

    @property
    def points(self) -> tuple[int, int]:
        """(scored, most that can be scored)."""
        return int(self._state.get("score") or 0), int(self._state["max_score"])

    @property
    def facts(self) -> tuple[tuple[str, ...], ...]:
        """What holds now: (predicate, ids of what it holds of), e.g. ``("at", "P", "r_0")``."""
        return tuple((fact.name, *(one.name for one in fact.arguments)) for fact in self._state["_facts"])

    def name(self, id: str) -> str:
        """What the game calls the thing with that id."""
        return str(self.game.infos[id].name or id)

    @property
    def room(self) -> str:
        """Where the player stands."""
        return self.name(self._place)

    @property
    def _place(self) -> str:
        return next(fact[2] for fact in self.facts if fact[:2] == ("at", "P"))

    @property
    def unseen(self) -> frozenset[str]:
        """Ways from here (``north``) into rooms where the player has not been, as one knows who draws a map."""
        here = self._place
        exits = {fact[0].removesuffix("_of"): fact[1] for fact in self.facts if fact[0].endswith("_of") and fact[2:] == (here,)}
        return frozenset(way for way, room in exits.items() if room not in self._seen)

    @property
    def held(self) -> tuple[str, ...]:
        """Ids of what the player carries, in order."""
        return tuple(sorted(fact[1] for fact in self.facts if fact[0] == "in" and fact[2:] == ("I",)))

    def traits(self, id: str) -> frozenset[str]:
        """Predicates that hold of one thing alone, e.g. ``fried``."""
        return frozenset(fact[0] for fact in self.facts if fact[1:] == (id,))
