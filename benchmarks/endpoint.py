"""How many episodes a second an endpoint with latency serves, and what a model call costs us in CPU time.

Needs nothing but the repository: the server of the tests runs in a process of its own, plays the policy and takes
``--latency`` seconds for every answer. The world is a pocket world; the lexical selector chooses experience at every step.

    python benchmarks/endpoint.py --latency 0.05 --concurrency 64

One at a time and many at once answer the same tasks. CPU time is that of this process alone (client, agent loop, search,
selector, ledger), per model call. ``--profile`` prints where it goes; ``--bare`` adds the official client's typed call and
its raw response, with nothing of ours around.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import pstats
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from evolve_dag.agent.rollouts import gather_rollouts
from evolve_dag.config.schema import OpenAIModelSettings, RolloutSettings
from evolve_dag.environments.corpus import CorpusSearch
from evolve_dag.environments.pocket.tools import PocketTools
from evolve_dag.environments.pocket.world import World
from evolve_dag.experience.injection import Injector
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.lexical import LexicalSelector
from evolve_dag.inference.ledger import Ledger
from evolve_dag.inference.openai import OpenAIModel
from evolve_dag.records import ExperienceItem, Task
from evolve_dag.verification.exact import ExactVerifier

SERVER = Path(__file__).resolve().parents[1] / "tests" / "servers" / "misbehaving.py"
PRINCIPLES = (
    "Verify: when a search lists results, visit the page before you answer.",
    "Redirect: when a page says see another page, visit that page.",
    "Respell: when a search shows no results, search the bare name.",
    "Chain: when the question asks through several things, begin with the last one.",
    "Finish: when the page shows what is asked, answer with its two words.",
    "Doubt: when two results share a name, compare their kinds.",
)


def pool() -> Pool:
    return Pool(tuple(ExperienceItem(f"P{n}", text, "principle") for n, text in enumerate(PRINCIPLES, 1)))


def measure(environment: CorpusSearch, tasks: list[Task], url: str, concurrency: int, folder: Path) -> dict[str, Any]:
    """Roll ``tasks`` out, ``concurrency`` episodes at a time."""
    settings = OpenAIModelSettings(backend="openai", model="server", endpoints=(url,), concurrency=concurrency)
    ledger = Ledger(folder / "calls.jsonl")
    model = OpenAIModel(settings, role="policy", ledger=ledger)
    cpu, wall = time.process_time(), time.perf_counter()
    done = asyncio.run(
        gather_rollouts(
            tasks,
            1,
            model=model,
            environment=environment,
            verifier=ExactVerifier(),
            settings=RolloutSettings(),
            seed=1,
            concurrency=concurrency,
            experience=Injector("step_wise", pool(), LexicalSelector()),
        )
    )
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    calls = ledger.totals()["policy"]["calls"]
    assert calls == sum(t.turns for t in done)
    assert all(t.error is None for t in done), next(t.error for t in done if t.error)
    return {
        "concurrency": concurrency,
        "episodes": len(done),
        "calls": calls,
        "episodes_per_s": round(len(done) / wall, 2),
        "calls_per_s": round(calls / wall, 1),
        "cpu_ms_per_call": round(1000 * cpu / calls, 2),
        "success": round(sum(t.reward or 0 for t in done) / len(done), 2),
    }


def fastest(runs: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return max(runs, key=lambda run: run["episodes_per_s"])


def bare(url: str, calls: int, concurrency: int) -> dict[str, float]:
    """CPU milliseconds per call of the official client alone."""
    import httpx2
    import openai

    client = openai.AsyncOpenAI(api_key="none", base_url=url, max_retries=0)
    question = {"role": "user", "content": "What is the mayor of city Bado Keli?"}
    body: dict[str, Any] = {"model": "server", "max_tokens": 48, "messages": [question]}

    async def typed(number: int) -> None:
        await client.chat.completions.create(**body, seed=number)

    async def raw(number: int) -> None:
        response = await client.post("/chat/completions", body={**body, "seed": number}, cast_to=httpx2.Response)
        json.loads(response.content)

    async def drive(call: Any) -> float:
        numbers = iter(range(calls))

        async def work() -> None:
            for number in numbers:
                await call(number)

        await asyncio.gather(*(work() for _ in range(concurrency)))  # warm
        numbers = iter(range(calls))
        cpu = time.process_time()
        await asyncio.gather(*(work() for _ in range(concurrency)))
        return round(1000 * (time.process_time() - cpu) / calls, 2)

    async def both() -> dict[str, float]:
        found = {"typed_ms": await drive(typed), "raw_ms": await drive(raw)}
        await client.close()
        return found

    return asyncio.run(both())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds that the server takes for an answer")
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--episodes", type=int, default=512, help="episodes of the concurrent run")
    parser.add_argument("--single", type=int, default=24, help="episodes of the run one at a time")
    parser.add_argument("--repeat", type=int, default=3, help="runs of each kind; the fastest counts (machines are shared)")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--bare", action="store_true")
    arguments = parser.parse_args()

    world = World(11)
    tasks = world.tasks(arguments.episodes, "pocket/train")
    command = [sys.executable, str(SERVER), "--act", "--latency", str(arguments.latency)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            measure(PocketTools(world), tasks[:8], url, 4, folder / "warm")  # imports and first connections
            single = tasks[: arguments.single]
            one = fastest(measure(PocketTools(world), single, url, 1, folder / f"one{n}") for n in range(arguments.repeat))
            print(json.dumps(one), flush=True)
            profile = cProfile.Profile()
            if arguments.profile:
                profile.enable()
            most = arguments.concurrency
            many = fastest(measure(PocketTools(world), tasks, url, most, folder / f"many{n}") for n in range(arguments.repeat))
            profile.disable()
            print(json.dumps(many), flush=True)
        print(json.dumps({"speedup": round(many["episodes_per_s"] / one["episodes_per_s"], 1)}))
        if arguments.bare:
            print(json.dumps(bare(url, 1000, arguments.concurrency)))
        if arguments.profile:
            pstats.Stats(profile).sort_stats("tottime").print_stats(35)
    finally:
        server.kill()
        server.wait()


if __name__ == "__main__":
    main()
