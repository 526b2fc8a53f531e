"""With tools: what a basket costs in a shop whose prices only its tools know. One tool server serves all episodes."""

import random
from collections.abc import Iterator

import verifiers.v1 as vf

__all__ = ["Shop"]

GOODS = ("apple", "bread", "cheese", "date", "egg", "fig", "grape", "honey")


def prices(seed: int) -> dict[str, int]:
    return {item: random.Random(f"{seed} {item}").randrange(2, 10) for item in GOODS}


class CounterConfig(vf.SharedToolsetConfig):
    seed: int = 0


class Counter(vf.Toolset[CounterConfig, vf.State]):
    TOOL_PREFIX = None  # the policy sees `price`, not `counter_price`

    @vf.tool
    async def price(self, item: str, count: int = 1) -> str:
        """Price of one item, or of `count` of it."""
        known = prices(self.config.seed)
        return f"{count} {item}: {known[item] * count}" if item in known else f"no {item}; there are {', '.join(GOODS)}"


class ShopData(vf.TaskData):
    answer: str
    steps: int


class ShopTask(vf.Task[ShopData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=0.8)
    async def total(self, trace: vf.Trace) -> float:
        return float(self.data.answer in trace.last_reply.replace(".", " ").split())

    @vf.reward(weight=0.2)
    async def asked(self, trace: vf.Trace) -> float:
        """How much of the basket was looked up."""
        return min(1.0, sum(not m.content.startswith("no ") for m in trace.tool_messages) / self.data.steps)


class ShopConfig(vf.TasksetConfig):
    counter: CounterConfig = CounterConfig()
    items: int = 2


class Shop(vf.Taskset[ShopTask, ShopConfig]):
    INFINITE = True

    @classmethod
    def toolsets(cls, config: ShopConfig) -> list[vf.Toolset]:
        return [Counter(config.counter)]

    def load(self) -> Iterator[ShopTask]:
        known, draw = prices(self.config.counter.seed), random.Random(self.config.counter.seed)
        while True:
            basket = {item: draw.randrange(1, 6) for item in draw.sample(GOODS, self.config.items)}
            listed = " and ".join(f"{count} {item}" for item, count in basket.items())
            total = sum(known[item] * count for item, count in basket.items())
            data = ShopData(prompt=f"What do {listed} cost together?", answer=str(total), steps=len(basket))
            yield ShopTask(data, self.config.task)


if __name__ == "__main__":
    Counter.run()
