"""One turn: any of the task families that reasoning-gym generates, judged by its own scores."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import reasoning_gym
import verifiers.v1 as vf
from pydantic import Field
from reasoning_gym.utils import extract_answer

__all__ = ["Reasoning"]

PROMPT = "Think in a few words. Then write the answer alone within answer tags: <answer>the answer</answer>"


class ReasoningConfig(vf.TasksetConfig):
    family: str = "chain_sum"
    seed: int = 0
    settings: dict[str, Any] = Field(default_factory=dict)
    """Of the family: how hard its tasks are."""
    prompt: str = PROMPT
    size: int = 100_000
    """Rows; they are generated when they are read."""


class ReasoningData(vf.TaskData):
    answer: str
    place: int
    family: str
    seed: int
    settings: dict[str, Any]
    size: int


@lru_cache(maxsize=8)
def dataset(family: str, seed: int, size: int, settings: tuple[tuple[str, Any], ...]) -> Any:
    return reasoning_gym.create_dataset(family, size=size, seed=seed, **dict(settings))


class ReasoningTask(vf.Task[ReasoningData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def solved(self, trace: vf.Trace) -> float:
        """The family's own score, 0 to 1, of what stands within answer tags; without them, of the last word."""
        data, said = self.data, (trace.last_reply.split() or [""])[-1].rstrip(".")
        rows = dataset(data.family, data.seed, data.size, tuple(data.settings.items()))
        return float(rows.score_answer(answer=extract_answer(trace.last_reply) or said, entry=rows[data.place]))


class Reasoning(vf.Taskset[ReasoningTask, ReasoningConfig]):
    def load(self) -> Iterator[ReasoningTask]:
        c = self.config
        rows = dataset(c.family, c.seed, c.size, tuple(c.settings.items()))
        made = {"family": c.family, "seed": c.seed, "settings": c.settings, "size": c.size, "system_prompt": c.prompt}
        for place in range(c.size):
            row = rows[place]
            data = ReasoningData(prompt=row["question"], answer=str(row["answer"]), place=place, **made)
            yield ReasoningTask(data, c.task)
