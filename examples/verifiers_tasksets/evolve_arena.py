"""Several turns: any game of textarena for one player. The library's own taskset has five, which download a word list."""

import copy
import itertools
import random
from collections.abc import Iterator

import textarena
import verifiers.v1 as vf
from verifiers.v1.tasksets.textarena import TextArenaData, TextArenaEnv, TextArenaTask

__all__ = ["Arena", "TextArenaEnv"]

PROMPT = "You play a game. Write each move within square brackets, for example [5], and nothing else in brackets."


class ArenaConfig(vf.TasksetConfig):
    game: str = "GuessTheNumber-v0"
    prompt: str = PROMPT


class Arena(vf.Taskset[TextArenaTask, ArenaConfig]):
    INFINITE = True

    def load(self) -> Iterator[TextArenaTask]:
        """Boards by seed; that of a board is its row, and the game is drawn from it again when it is played."""
        game = self.config.game
        template = textarena.make(env_id=game)
        for seed in itertools.count():
            random.seed(seed)
            board = copy.deepcopy(template)
            board.reset(num_players=1)
            text = str(board.get_observation()[1]).strip()
            info = {"game": game, "seed": seed}
            data = TextArenaData(name=f"{game}#{seed}", prompt=text, system_prompt=self.config.prompt, info=info)
            yield TextArenaTask(data, self.config.task)
