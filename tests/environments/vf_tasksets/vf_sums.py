"""Single turn: sums, some of them twice; half of the reward is for brevity."""

import verifiers.v1 as vf

__all__ = ["Sums"]


class SumsConfig(vf.TasksetConfig):
    count: int = 20
    weight: float = 1.0
    placed: bool = False
    """Whether every row says its place, so that none is the twin of another."""
    named: str = ""
    """Begins the ids of the rows; '': they have none."""


class SumData(vf.TaskData):
    answer: int
    place: int | None = None


class SumConfig(vf.TaskConfig):
    pass


class Sum(vf.Task[SumData, vf.State, SumConfig]):
    @vf.reward(weight=0.75)
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.last_reply.removesuffix(".").endswith(str(self.data.answer)))

    @vf.reward(weight=0.25)
    async def short(self, trace: vf.Trace) -> float:
        return float(len(trace.last_reply) < 4)


class Sums(vf.Taskset[Sum, SumsConfig]):
    def load(self):
        for number in range(self.config.count):
            a, b = number // 2, 3  # every sum twice
            data = SumData(prompt=f"What is {a} + {b}?", system_prompt="Answer with a number.", answer=a + b)
            place = number if self.config.placed else None
            named = {"id": f"{self.config.named}{a}"} if self.config.named else {}
            yield Sum(data.model_copy(update={"place": place, **named}), self.config.task)
