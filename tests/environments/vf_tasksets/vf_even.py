"""Two turns, worth a half for each whose number of characters is even: what a policy that knows nothing reaches by chance."""

import verifiers.v1 as vf

__all__ = ["Even", "EvenEnv"]


class EvenData(vf.TaskData):
    number: int


class EvenTask(vf.Task[EvenData, vf.State, vf.TaskConfig]):
    @vf.reward(weight=0.5)
    async def turns(self, trace: vf.Trace) -> float:
        return float(sum(len(message.content or "") % 2 == 0 for message in trace.assistant_messages))


class EvenEnvConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()


class EvenEnv(vf.Env[EvenEnvConfig]):
    async def run(self, task, agents):
        async with agents.agent.interaction(task) as talk:
            said = await talk.turn()
            if not said.terminated:
                await talk.turn("once more")


class Even(vf.Taskset[EvenTask, vf.TasksetConfig]):
    def load(self):
        for n in range(100):
            yield EvenTask(EvenData(prompt=f"Say {n}.", number=n), self.config.task)
