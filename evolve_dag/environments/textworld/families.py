"""Families of games: the goal, what is listed, and what can be said of a state in words that hold in every game of a family.

What is the same in all games of a family is what can be learned about it. Nothing here tells it: neither the goal nor the
list of commands says which way is a dead end, or what goes with which tool.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from evolve_dag.environments.textworld.games import Play, coin, cooking

if TYPE_CHECKING:
    from textworld import Game

WAYS = ("north", "south", "east", "west")
NUMBERS = ("no", "one", "two", "three", "four")
SAME = frozenset({"examine cookbook", "prepare meal", "eat meal"})
"""Commands of Cooking that are the same in every game."""
COOKED = frozenset({"fried", "roasted", "grilled", "burned"})
_DIRECTION = re.compile(r"^\s*((?:fry|roast|grill) .+|prepare meal)$", re.M)


@dataclass(frozen=True, slots=True)
class Family:
    """What its games have in common."""

    make: Callable[[int, str], Game]
    """The game of a number, and of a part of the family's words."""
    goal: str
    """What is to be done, the same in every game."""
    listed: re.Pattern[str]
    """Commands that are listed; others work as well where the game takes them."""
    features: Callable[[Play, tuple[str, ...]], Mapping[str, str]]
    """(play, commands so far) -> what a reader sees of the state, see :class:`~evolve_dag.protocols.ToolResult`."""
    did: Callable[[Play, Mapping[str, str], str], str]
    """(play, features before a command, the command) -> what it comes to, in words that hold in every game."""
    read: Callable[[Play, str], str] = lambda play, command: ""
    """(play, command) -> what a command shows that changes nothing."""
    parts: Mapping[str, str] = field(default_factory=dict)
    """Split -> the part of the family's words that its games have, where it is not that of training."""
    version: str = "4"
    """Raise it when the same turns would become another episode; the steps' versions stand for all environments."""
    first: str = ""
    """A command that a good player gives first and that TextWorld's shortest way leaves out."""


def _coin_features(play: Play, done: tuple[str, ...]) -> dict[str, str]:
    exits, unseen = [way for way in WAYS if f"go {way}" in play.commands], play.unseen
    return {
        "coin": "here" if "take coin" in play.commands else "not here",
        "number of exits": NUMBERS[len(exits)],
        "onward": " or ".join(way for way in exits if way in unseen) or "nowhere new",
    }


def _cooking_features(play: Play, done: tuple[str, ...]) -> dict[str, str]:
    wanted = _wanted(play)
    traits = [play.traits(one) for one in play.held if play.name(one) in wanted]
    food = "cooked" if any(one & COOKED for one in traits) else "in hand" if traits else "not in hand"
    told = recipe(play) if "examine cookbook" in done else ""
    return {
        "recipe": f"to {told.split()[0]}" if told else "unread",
        "food": food,
        "meal": "in hand" if "meal" in map(play.name, play.held) else "not there",
    }


def _coin_did(play: Play, before: Mapping[str, str], command: str) -> str:
    word, _, way = command.partition(" ")
    return command if word != "go" else "go onward" if way in before["onward"].split(" or ") else "go back"


def _cooking_did(play: Play, before: Mapping[str, str], command: str) -> str:
    word, _, what = command.partition(" ")
    if word == "cook":
        return f"cook it with {what.rpartition(' with ')[2].lower()}"
    if word != "take":
        return command if command in SAME else word
    thing = what.partition(" from ")[0]
    known = before["recipe"] != "unread" and thing in _wanted(play)
    return "take the food" if known else "take something"


def _wanted(play: Play) -> frozenset[str]:
    """Names of the recipe's ingredients."""
    return frozenset(name for name, *_ in play.game.metadata["ingredients"])


def recipe(play: Play) -> str:
    """The directions of the cookbook that are left to do; cutting has been done before."""
    return ", then ".join(_DIRECTION.findall(play.game.metadata["recipe"]))


def _cookbook(play: Play, command: str) -> str:
    return f"The cookbook says: {recipe(play)}." if command == "examine cookbook" else ""


FAMILIES: Mapping[str, Family] = {
    "coin": Family(coin, "Find the coin and take it.", re.compile(r"go \w+|take coin"), _coin_features, _coin_did),
    "cooking": Family(
        cooking,
        "Cook the meal of the cookbook and eat it.",
        re.compile(r"examine cookbook|take (?!cookbook|knife).+|cook .+|prepare meal|eat meal"),
        _cooking_features,
        _cooking_did,
        _cookbook,
        parts={"development": "valid", "held_out": "test"},
        version="5",
        first="examine cookbook",
    ),
}
