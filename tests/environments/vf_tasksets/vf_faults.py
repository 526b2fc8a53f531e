"""Every way of breaking, by name."""

import asyncio
import time

import verifiers.v1 as vf

__all__ = ["Faults", "FaultsEnv"]


class FaultsConfig(vf.TasksetConfig):
    fault: str = ""


class FaultData(vf.TaskData):
    fault: str


class Fault(vf.Task[FaultData, vf.State, vf.TaskConfig]):
    @vf.reward
    async def given(self, trace: vf.Trace) -> float:
        kinds = {"nan": float("nan"), "two": 2.0, "below": -0.5}
        if self.data.fault == "rubric":
            raise ValueError("no rubric today")
        return kinds.get(self.data.fault, 1.0)

    async def setup(self, trace, runtime):
        if self.data.fault == "set-up":
            raise RuntimeError("cannot set up")


class FaultsEnvConfig(vf.EnvConfig):
    agent: vf.AgentConfig = vf.AgentConfig()


class FaultsEnv(vf.Env[FaultsEnvConfig]):
    async def run(self, task, agents):
        fault = task.data.fault
        if fault == "waits":
            await asyncio.Event().wait()
        if fault == "blocks":
            time.sleep(3600)
        if fault == "spins":
            while True:
                pass
        if fault == "exits":
            raise SystemExit(3)
        if fault == "twice":
            await agents.agent.run(task)
        async with agents.agent.interaction(task) as talk:
            said = await talk.turn()
            while fault == "endless" and not said.terminated:
                said = await talk.turn("go on")
            if fault == "crash":
                raise RuntimeError("the board fell over")
            if fault == "rewrites":
                talk.trace.nodes[-1].message.content = "I never said that"
                await talk.turn("go on")
            if fault == "no ids":
                for node in talk.trace.nodes:
                    node.token_ids, node.mask = [], []


class Faults(vf.Taskset[Fault, FaultsConfig]):
    def load(self):
        fault = self.config.fault
        if fault == "licence":
            input("Accept the licence? ")
        if fault == "load":
            raise OSError("gated: accept the terms first")
        if fault == "shots":
            prompt = [vf.UserMessage(content="1?"), vf.AssistantMessage(content="1"), vf.UserMessage(content="2?")]
        elif fault == "image":
            url = vf.ImageUrlContentPart(image_url=vf.ImageUrlSource(url="data:image/png;base64,AAAA"))
            prompt = [vf.UserMessage(content=[url])]
        else:
            prompt = "Say something."
        more = {"image": "python:3.11"} if fault == "container" else {}
        yield Fault(FaultData(prompt=prompt, fault=fault, **more), self.config.task)
