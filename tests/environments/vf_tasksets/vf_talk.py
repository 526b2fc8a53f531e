"""Several turns: the environment opens the conversation and says "higher" or "lower" until a guess is right."""

import re

import verifiers.v1 as vf

__all__ = ["Talk", "TalkEnv"]


class TalkData(vf.TaskData):
    number: int


class TalkTask(vf.Task[TalkData, vf.State, vf.TaskConfig]):
    pass


class TalkEnvConfig(vf.EnvConfig):
    guesser: vf.AgentConfig = vf.AgentConfig()


class TalkEnv(vf.Env[TalkEnvConfig]):
    async def run(self, task, agents):
        turns = 0
        async with agents.guesser.interaction(task) as talk:
            said = await talk.turn("I think of a number from 1 to 9.")
            while not said.terminated:
                turns += 1
                guess = int((re.findall(r"\d+", said.last_reply) or ["0"])[-1])
                if guess == task.data.number:
                    break
                said = await talk.turn("higher" if guess < task.data.number else "lower")
        talk.trace.record_reward("guessed", 1 / turns if not said.terminated else 0.0)


class Talk(vf.Taskset[TalkTask, vf.TasksetConfig]):
    def load(self):
        return [TalkTask(TalkData(id=f"number-{n}", name="guess", number=n), self.config.task) for n in range(1, 10)]
