"""With tools: prices that a tool server of the task's own looks up, which counts what it was asked."""

import verifiers.v1 as vf

__all__ = ["Shop"]


class ShopState(vf.State):
    asked: int = 0


class ShopData(vf.TaskData):
    prices: dict[str, int]


class PricesConfig(vf.ToolsetConfig):
    pass


class Prices(vf.Toolset[PricesConfig, ShopState]):
    async def setup_task(self, task):
        self.prices = task.prices

    @vf.tool
    async def price(self, item: str, count: int = 1) -> str:
        """Price of some of an item."""
        self.state.asked += 1
        return str(self.prices[item] * count)


class ShopConfig(vf.TaskConfig):
    prices: PricesConfig = PricesConfig()


class ShopsConfig(vf.TasksetConfig):
    task: ShopConfig = ShopConfig()


class ShopTask(vf.Task[ShopData, ShopState, ShopConfig]):
    @classmethod
    def toolsets(cls, config):
        return [Prices(config.prices)]

    @vf.reward
    async def right(self, trace: vf.Trace) -> float:
        return float(trace.state.asked == 1 and trace.last_reply == str(3 * self.data.prices["pear"]))


class Shop(vf.Taskset[ShopTask, ShopsConfig]):
    def load(self):
        for n in range(4):
            yield ShopTask(ShopData(prompt="What do 3 pears cost?", prices={"pear": 5 + n}), self.config.task)


if __name__ == "__main__":
    Prices.run()
