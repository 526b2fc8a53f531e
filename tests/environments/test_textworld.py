"""TextWorld: its games follow from their number, are played by commands, and are judged by their score."""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from evolve_dag.agent.loop import run_episode
from evolve_dag.agent.rollouts import gather_rollouts
from evolve_dag.agent.sessions import checked_result
from evolve_dag.config.loading import load_experiment
from evolve_dag.config.schema import RolloutSettings, TaskSplit, WarmupSettings
from evolve_dag.environments.textworld.families import FAMILIES
from evolve_dag.environments.textworld.tools import TEXTWORLD, TextWorldEnvironment, TextWorlds, TextWorldSession
from evolve_dag.errors import ConfigError, ModelError
from evolve_dag.experience.extraction.mining import ContrastExtraction, extract
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.state import StateSelector
from evolve_dag.inference.chat import ChatFormat
from evolve_dag.inference.scripted import ScriptedModel
from evolve_dag.protocols import Guided
from evolve_dag.records import Step, ToolCall
from evolve_dag.steps.slices import decisive
from evolve_dag.steps.trajectories import SPEC
from evolve_dag.store.artifacts import Store
from evolve_dag.verification.exact import ExactVerifier
from evolve_dag.warmup.script import Script
from evolve_dag.warmup.training import warm_up

sys.path.append(str(Path(__file__).parents[1] / "agent"))
from tiny_tokenizers import byte_level

CONFIGS = Path(__file__).parents[2] / "configs"
SPLIT = TaskSplit(world=3, count=2)


def test_without_the_package_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textworld", None)
    with pytest.raises(ModelError, match=r"pip install 'evolve-dag\[textworld\]'"):
        TextWorlds(TextWorldEnvironment()).open(TEXTWORLD.tasks(TextWorldEnvironment(), SPLIT, "train")[0], 0)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"tasks": {"train": {"world": None}}}, "tasks.train.world: missing"),
        ({"tasks": {"train": {"world": 10_000}}}, "number the worlds below"),
        ({"tasks": {"train": {"count": 1001}}}, "no more than 1000 games"),
        ({"tasks": {"held_out": {"world": 200}}}, "tasks.held_out.world: the same world as tasks.development"),
        ({"tasks": {"held_out": {"path": "x.jsonl"}}}, "makes its own games"),
        ({"rollout": {"max_steps": 8}}, "the game ends after 8 commands"),
        ({"rollout": {"plain_answers": True}}, "a plain turn is a command"),
        ({"environment": {"kind": "textworld", "form": "call"}}, "writes plain commands"),
        ({"iterations": 91}, "games for 90 iterations"),
        ({"warmup": {"episodes": 1001}}, "warmup.episodes: a world has no more than 1000 games"),
        ({"warmup": {"development": 1001}}, "warmup.development: a world has no more than 1000 games"),
    ],
)
def test_mistakes_in_the_file(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"extends": str(CONFIGS / "textworld_coin.yaml"), **changes}))
    with pytest.raises(ConfigError, match=told):
        load_experiment(path)


def test_its_own_version_is_in_the_digests_of_what_plays_it() -> None:
    file = load_experiment(CONFIGS / "textworld_coin.yaml")
    assert decisive(SPEC, file)["environment"]["kind"] == f"textworld {FAMILIES['coin'].version}"


def test_a_warm_up_shares_no_games_with_a_later_night(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(yaml.safe_dump({"extends": str(CONFIGS / "textworld_coin.yaml"), "warmup": {"world": 10_100}}))
    with pytest.raises(ConfigError, match=r"tasks.train.world: 10100 in iteration 2 is a world of the warm-up"):
        warm_up(load_experiment(path), Store(tmp_path / "store"))


def test_the_pools_that_ship_are_small_and_speak_of_no_game() -> None:
    for name in ("coin", "cooking"):
        pool = Pool.from_json((CONFIGS / "textworld" / f"{name}.json").read_text(), name)
        assert 0 < len(pool) <= 15
        assert all(item.condition and item.granularity == "principle" for item in pool.items)


# -- with TextWorld itself


@pytest.fixture(scope="module")
def textworld() -> Any:
    return pytest.importorskip("textworld")


BACK = {"go north": "go south", "go south": "go north", "go east": "go west", "go west": "go east"}


def session(family: str, number: int = 3, **settings: Any) -> TextWorldSession:
    return TextWorldSession(TextWorldEnvironment(family=family, **settings), number)


def enter(game: TextWorldSession, command: str) -> Any:
    return checked_result(game.call(ToolCall("act", {"command": command})))


@pytest.mark.parametrize("family", ["coin", "cooking"])
def test_the_way_leads_to_the_full_score_in_parts(textworld: Any, family: str) -> None:
    game = session(family)
    assert isinstance(game, Guided)
    rewards = [game.reward(None)]
    for _ in range(8):
        result = enter(game, game.expert)
        rewards.append(game.reward(None))
        if result.done:
            break
    assert rewards[-1] == 1.0
    assert rewards == sorted(rewards)
    assert len(set(rewards)) == (2 if family == "coin" else 5)


@pytest.mark.parametrize("family", ["coin", "cooking"])
def test_a_pool_that_ships_leads_through_a_game(textworld: Any, family: str) -> None:
    """At every step, an item is chosen that names the expert's command or a word of it."""
    import asyncio

    pool = Pool.from_json((CONFIGS / "textworld" / f"{family}.json").read_text(), family)
    game, steps = session(family), []
    while game.expert:
        chosen = asyncio.run(StateSelector(2).select("Play.", steps, pool)).ids
        words = " ".join(pool.get(one).text for one in chosen)
        if steps or family == "cooking":
            assert set(game.expert.split()) & set(words.replace(".", "").replace(",", "").split()), (game.expert, words)
        command = game.expert
        result = enter(game, command)
        call = ToolCall("act", {"command": command})
        steps.append(Step(len(steps), command, (), (), call, observation=result.text, features=result.features))


def test_a_command_is_told_by_what_it_comes_to(textworld: Any) -> None:
    game, told = session("cooking"), []
    while game.expert:
        told.append(enter(game, game.expert).features["did"])
    whole = ["examine cookbook", "take the food", "cook it", "prepare meal", "eat meal"]
    assert [one.split(" with ")[0] for one in told] == whole
    coin = session("coin")
    first = next(one for one in coin.choices if one.startswith("go "))
    there = enter(coin, first)
    back = enter(coin, BACK[first])
    assert (there.features["did"], back.features["did"]) == ("go onward", "go back")


def test_onward_is_where_the_player_has_not_been(textworld: Any) -> None:
    """Rooms of a game do not lie on a grid: in game 0 the room with the coin would lie where a dead end does."""
    for number in range(6):
        game, draw = session("coin", number, limit=40), random.Random(number)
        seen = {game.system_prompt.partition("You are in the ")[2].split(".")[0]}
        onward: tuple[str, ...] = ()
        for step in range(30):
            ways = [one for one in game.choices if one.startswith("go ")]
            command = draw.choice(ways)
            told = enter(game, command)
            room = told.text.partition("You are in the ")[2].split(".")[0]
            assert told.features["did"] == ("go back" if room in seen else "go onward")
            if step:
                assert (command.removeprefix("go ") in onward) == (room not in seen)
            seen.add(room)
            onward = tuple(told.features["onward"].split(" or "))
    game = session("coin", 0, limit=20)
    for command in ("go north", "go south", "go west", "go north"):
        last = enter(game, command)
    assert game.expert == "go east"
    assert last.features["onward"] == "east or west"


@pytest.mark.parametrize("family", ["coin", "cooking"])
def test_what_can_be_done_is_told_in_the_words_of_what_was_done(textworld: Any, family: str) -> None:
    game, can = session(family), None
    while game.expert:
        told = enter(game, game.expert).features
        assert can is None or told["did"] in can.split("; ")
        can = told["can"]
    assert can is not None


@pytest.mark.parametrize(("family", "lesson"), [("coin", "take coin"), ("cooking", "prepare meal")])
def test_the_miner_finds_lessons_in_games_of_a_player_with_some_skill(textworld: Any, family: str, lesson: str) -> None:
    """Groups of four games each, played as the warm-up's script plays without advice."""
    environment = TextWorlds(TextWorldEnvironment(family=family))  # type: ignore[arg-type]
    tasks = TEXTWORLD.tasks(TextWorldEnvironment(), TaskSplit(world=5, count=16), "train")  # type: ignore[misc]
    played = []
    for rollout in range(4):
        skilled = WarmupSettings(base="-", world=5, seed=rollout, advised=0.0, idle=0.0, skill=0.4)
        script = Script(environment, skilled, ChatFormat.from_tokenizer(byte_level()))
        found = asyncio.run(gather_rollouts(
            tasks, 1, model=script, environment=script, verifier=ExactVerifier(), settings=RolloutSettings(max_steps=9),
            seed=0, concurrency=8, experience=script,
        ))  # fmt: skip
        played += [replace(one, rollout=rollout, id=f"{one.task_id}#{rollout}") for one in found]
    settings = ContrastExtraction(min_support=5, cap=15)
    pool = extract(played, Pool(), granularity="principle", settings=settings, iteration=1, seed=0).pool
    texts = [item.text for item in pool.items]
    assert any(text.startswith("Do: when ") and text.endswith(f", {lesson}.") for text in texts), texts


@pytest.mark.parametrize("family", ["coin", "cooking"])
def test_the_instance_arms_hold_the_games_that_were_won_in_mixed_groups(textworld: Any, family: str) -> None:
    experiment = load_experiment(CONFIGS / f"textworld_{family}_instance.yaml")
    environment = TextWorlds(experiment.environment)
    tasks, played, ways = TEXTWORLD.tasks(experiment.environment, SPLIT, "train"), [], []
    for task in tasks:
        game, way = environment.open(task, 0), list[str]()
        while game.expert:
            way.append(game.expert)
            game.call(ToolCall("act", {"command": game.expert}))
        ways.append(f" path {', then '.join(way)}.")
        for rollout, commands in enumerate((way, ["look"] * experiment.environment.limit)):
            played.append(asyncio.run(run_episode(
                task, rollout, model=ScriptedModel(commands), environment=environment, verifier=ExactVerifier(),
                settings=experiment.rollout, seed=0,
            )))  # fmt: skip
    settings = experiment.extraction
    pool = extract(played, Pool(), granularity="instance", settings=settings, iteration=1, seed=0).pool
    assert {item.trajectory_ids for item in pool.items} == {(f"{task.id}#0",) for task in tasks}
    assert all(item.text.startswith("Case: Play. You are in the ") for item in pool.items)
    assert all(any(item.text.endswith(way) for item in pool.items) for way in ways)
    chosen = asyncio.run(StateSelector(2).select("Play.", [], pool))
    assert set(chosen.ids) == set(pool.ids), "it is read before the first command"


@pytest.mark.parametrize("name", ["development", "held_out"])
def test_what_is_measured_in_cooking_cooks_what_training_never_cooks(textworld: Any, name: str) -> None:
    """Of the games of other numbers a fifth had a way to the meal that some game of training had, letter for letter."""
    from textworld.challenges.tw_cooking.cooking import FOODS_SPLITS

    settings = TextWorldEnvironment(family="cooking")
    environment = TextWorlds(settings)

    def foods(split: str, world: int) -> list[str]:
        tasks = TEXTWORLD.tasks(settings, TaskSplit(world=world, count=12), split)  # type: ignore[misc]
        return [environment.open(task, 0)._play.game.metadata["ingredients"][0][0] for task in tasks]

    known = set(FOODS_SPLITS["train"])
    assert known.issuperset(foods("train", 5))
    assert known.issuperset(foods("warmup", 6))
    assert known.isdisjoint(foods(name, 7))
    one = environment.open(TEXTWORLD.tasks(settings, TaskSplit(world=7, count=1), name)[0], 0)  # type: ignore[misc]
    while one.expert:
        enter(one, one.expert)
    assert one.reward(None) == 1.0


def test_what_cannot_be_done_is_told_and_counts(textworld: Any) -> None:
    game = session("coin", limit=2)
    assert game.choices == tuple(sorted(game.choices))
    first = enter(game, f"fly to the {'moon' * 100}")
    assert first.text.startswith("You cannot fly to the moon")
    assert len(first.text) < 300
    assert first.features["command"] == "refused"
    assert not first.done
    assert enter(game, "").text == "You cannot do nothing now. The game is over."
    assert game.reward(None) == 0.0


def test_neither_goal_nor_observation_tells_the_lesson(textworld: Any) -> None:
    """TextWorld's own objective tells the whole way; ours must not."""
    game = session("coin")
    assert "Your task" not in game.system_prompt
    assert game.system_prompt.count("go ") == len(game.choices)
    silent = session("coin", admissible=False)
    assert "go " not in silent.system_prompt


def test_a_spoilt_meal_loses(textworld: Any) -> None:
    game = session("cooking")
    enter(game, "examine cookbook")
    enter(game, game.expert)
    right = game.expert
    wrong = next(one for one in game.choices if one.startswith("cook") and one != right)
    assert enter(game, wrong).done
    assert 0 < game.reward(None) < 1


def test_episodes_side_by_side_are_those_one_by_one(textworld: Any) -> None:
    tasks = TEXTWORLD.tasks(TextWorldEnvironment(), TaskSplit(world=4, count=6), "train")  # type: ignore[misc]

    def play(concurrency: int) -> list[tuple[float | None, str, tuple[str | None, ...]]]:
        def act(messages: Any) -> str:
            """The last of the listed commands."""
            listed = messages[0].content if len(messages) == 2 else messages[-1].content
            return str(listed.rpartition("You can: ")[2].rstrip(".").split(", ")[-1])

        found = asyncio.run(gather_rollouts(
            tasks, 1, model=ScriptedModel(act), environment=TextWorlds(TextWorldEnvironment(limit=4)),
            verifier=ExactVerifier(), settings=RolloutSettings(max_steps=5), seed=0, concurrency=concurrency,
        ))  # fmt: skip
        return [(one.reward, one.status, tuple(step.observation for step in one.steps)) for one in found]

    assert play(6) == play(1)
    assert {status for _, status, _ in play(6)} == {"ended"}


def test_a_game_is_the_same_in_every_process(textworld: Any) -> None:
    """Whatever the order of its sets: the hash seed of the other process is another."""
    code = (
        "from evolve_dag.environments.textworld.games import Play, coin, cooking\n"
        "for order in ((8, 7),):\n"
        "    plays = {n: (Play(coin, n), Play(cooking, n)) for n in order}\n"
        "print([(p.room, p.commands, p.way, sorted(p.facts)) for p in plays[7]])"
    )
    made = [
        subprocess.run(
            [sys.executable, "-c", code.replace("(8, 7)", order)], env={"PYTHONHASHSEED": seed, "PATH": ""},
            capture_output=True, text=True, check=True,
        ).stdout
        for seed, order in (("1", "(8, 7)"), ("2", "(7, 8)"))
    ]  # fmt: skip
    assert made[0] == made[1] != ""


def test_splits_and_nights_share_no_game(textworld: Any) -> None:
    assert TEXTWORLD.tasks is not None
    assert TEXTWORLD.fresh is not None
    train = TaskSplit(world=100, count=1000, stream=True)
    nights = [train.model_copy(update=dict(TEXTWORLD.fresh(train, k))) for k in (1, 2, 90)]
    splits = [*nights, TaskSplit(world=200, count=1000), TaskSplit(world=300, count=1000)]
    ids = [task.metadata["game"] for split in splits for task in TEXTWORLD.tasks(TextWorldEnvironment(), split, "x")]
    assert len(set(ids)) == len(ids)
    assert max(map(int, ids)) < 2**32
