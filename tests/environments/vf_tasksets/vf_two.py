"""Two agents, which is one too many."""

import verifiers.v1 as vf

__all__ = ["Two", "TwoEnv"]


class TwoConfig(vf.EnvConfig):
    asker: vf.AgentConfig = vf.AgentConfig()
    solver: vf.AgentConfig = vf.AgentConfig()


class TwoEnv(vf.Env[TwoConfig]):
    async def run(self, task, agents):
        await agents.solver.run(task)


class Two(vf.Taskset[vf.Task[vf.TaskData, vf.State, vf.TaskConfig], vf.TasksetConfig]):
    def load(self):
        return []
