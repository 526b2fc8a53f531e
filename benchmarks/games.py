"""What TextWorld's games cost, and what they are worth to players that need no model.

    python benchmarks/games.py --games 100
    python benchmarks/games.py --alike 0 1 2 4

CPU seconds, those of child processes included. The players: one that does anything that is listed; the script of the warm-up
without advice, at several skills (what a model scores that imitates it); one that follows the pool that ships to the letter
wherever an item is chosen, and else does anything (what a perfect reader gets out of it). `--alike`: held-out games of seed S
(world 300 + S) whose way to the full score is, letter for letter, that of a training game of three nights (world 100 + S) or of
the warm-up (world 1). Needs `evolve-dag[textworld]`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path

from evolve_dag.config.schema import TaskSplit, WarmupSettings
from evolve_dag.environments.textworld.families import FAMILIES
from evolve_dag.environments.textworld.games import Play
from evolve_dag.environments.textworld.tools import (
    GAMES,
    STREAM_WORLDS,
    TEXTWORLD,
    TextWorldEnvironment,
    TextWorlds,
    TextWorldSession,
)
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.state import StateSelector
from evolve_dag.records import Step, ToolCall
from evolve_dag.warmup.script import Hints, draw

POOLS = Path(__file__).parents[1] / "configs" / "textworld"
Player = Callable[[TextWorldSession, Sequence[Step], random.Random], str]


def cpu() -> float:
    """Seconds so far, of this process and its children."""
    now = os.times()
    return now.user + now.system + now.children_user + now.children_system


def skilled(skill: float) -> Player:
    """The script of the warm-up, without advice."""
    settings = WarmupSettings(base="-", world=1, advised=0.0, idle=0.0, skill=skill)
    return lambda game, steps, rng: draw(Hints(game.expert, game.choices), settings, (), rng).action


def reader(pool: Pool) -> Player:
    """Follows the items that are chosen for a step."""

    def act(game: TextWorldSession, steps: Sequence[Step], rng: random.Random) -> str:
        chosen = asyncio.run(StateSelector(2).select("Play.", steps, pool)).ids
        told = " ".join(step.observation or "" for step in steps if "cookbook says" in (step.observation or ""))
        meant = [command for one in chosen for command in advised(pool.get(one).text, game.choices, told)]
        return rng.choice(meant or list(game.choices))

    return act


def advised(text: str, choices: Sequence[str], recipe: str) -> list[str]:
    """The commands that an item means."""
    meant = text.partition(": ")[2].rstrip(".")
    advice = meant.partition(", ")[2] if meant.startswith("when ") else meant
    first, last = advice.split()[0], advice.split()[-1]
    if first == "go":
        return [one for one in choices if one.startswith("go ") and one[3:] in advice]
    if advice.startswith("cook it"):
        return [one for one in choices if one.startswith("cook") and one.endswith(last)]
    if advice.startswith("take the food"):
        return [one for one in choices if one.startswith("take") and one[5:].split(" from ")[0] in recipe]
    return [one for one in choices if one == advice]


def worth(family: str, player: Player, games: int) -> str:
    """Mean reward, games won and commands a game."""
    rewards, commands = [], 0
    for number in range(GAMES, GAMES + games):
        game, steps, rng = TextWorldSession(TextWorldEnvironment(family=family), number), list[Step](), random.Random(number)
        while True:
            command = player(game, steps, rng)
            call = ToolCall("act", {"command": command})
            result = game.call(call)
            steps.append(Step(len(steps), command, (), (), call, observation=result.text, features=result.features))
            if result.done:
                break
        rewards.append(game.reward(None))
        commands += len(steps)
    won = sum(one == 1 for one in rewards) / games
    return f"reward {sum(rewards) / games:.1%}, won {won:.1%}, {commands / games:.1f} commands"


def ways(family: str, split: str, world: int, count: int) -> list[tuple[str, ...]]:
    """What a good player is told and does, from the first line to the last, in each game of a world."""
    settings = TextWorldEnvironment(family=family)
    environment, found = TextWorlds(settings), []
    for task in TEXTWORLD.tasks(settings, TaskSplit(world=world, count=count), split):
        game = environment.open(task, 0)
        way, over = [game.system_prompt], False
        while game.expert and not over:
            way.append(game.expert)
            result = game.call(ToolCall("act", {"command": game.expert}))
            way.append(result.text)
            over = result.done
        found.append(tuple(way))
    return found


def alike(family: str, seed: int) -> str:
    """How many of 200 held-out games training has, too."""
    warmed = set(ways(family, "warmup", 1, 96))
    trained = {way for night in range(3) for way in ways(family, "train", 100 + seed + STREAM_WORLDS * night, 48)}
    held_out = ways(family, "held_out", 300 + seed, 200)
    seen = sum(way in trained | warmed for way in held_out)
    return f"seed {seed}: {seen} of 200 held-out games are like one of training or warm-up, {len(set(held_out))} are distinct"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", type=int, default=100)
    parser.add_argument("--alike", type=int, nargs="+", metavar="SEED")
    arguments = parser.parse_args()
    for family, seed in [(family, seed) for family in FAMILIES for seed in arguments.alike or ()]:
        print(f"{family}, {alike(family, seed)}", flush=True)
    if arguments.alike:
        return
    games = arguments.games
    for family, row in FAMILIES.items():
        begun = cpu()
        Play(row.make, 1)
        first, begun = cpu() - begun, cpu()
        for number in range(2, 22):
            Play(row.make, number)
        print(f"{family}: first game {first:.2f} s, each of the next 20 {(cpu() - begun) / 20:.3f} s", flush=True)
        pool = Pool.from_json((POOLS / f"{family}.json").read_text(), family)
        players = {"anything": skilled(0.0), "skill 0.3": skilled(0.3), "the pool, to the letter": reader(pool)}
        for name, player in players.items():
            print(f"  {name}: {worth(family, player, games)}", flush=True)


if __name__ == "__main__":
    main()
