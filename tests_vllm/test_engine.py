"""vLLM's engine in its own process against transformers + peft on the same files."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from conftest import PYTHON, ROOT, RUNTIME, SYSTEM, Bench, make_adapter, questions, settings
from peft import PeftModel
from transformers import AutoModelForCausalLM

from evolve_dag.agent.rollouts import gather_rollouts
from evolve_dag.config.schema import RolloutSettings
from evolve_dag.environments.pocket.tools import PocketTools
from evolve_dag.environments.pocket.world import World
from evolve_dag.errors import ModelError
from evolve_dag.inference.folders import POCKET
from evolve_dag.inference.transformers import TransformersModel
from evolve_dag.inference.vllm import VllmModel, open_vllm
from evolve_dag.inference.vllm_probe import make_probe
from evolve_dag.inference.vllm_process import EngineProcess
from evolve_dag.inference.vllm_source import Adapter
from evolve_dag.protocols import Completion, LanguageModel, Request, Sampling
from evolve_dag.records import Message
from evolve_dag.verification.exact import ExactVerifier


def ask(*pairs: tuple[LanguageModel, Sequence[Request]]) -> list[list[Completion]]:
    """All requests to all models at once."""

    async def scene() -> list[list[Completion]]:
        return await asyncio.gather(*(asyncio.gather(*(model.generate(r) for r in requests)) for model, requests in pairs))

    return asyncio.run(scene())


@torch.inference_mode()
def scored(adapter: Adapter | None, context: Sequence[int], ids: Sequence[int]) -> torch.Tensor:
    """Log-probability of each of ``ids`` after ``context``, by transformers + peft with the adapter beside the weights."""
    torch.set_num_threads(1)
    model = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32).eval()
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter.folder)).eval()
    logits = model(input_ids=torch.tensor([[*context, *ids]])).logits[0, len(context) - 1 : -1]
    return torch.log_softmax(logits.float(), -1).gather(-1, torch.tensor(list(ids))[:, None])[:, 0]


def gone(pid: int, seconds: float) -> bool:
    limit = time.monotonic() + seconds
    while time.monotonic() < limit:
        try:
            os.kill(pid, 0)
            # A child of ours that nobody has waited for yet is as good as gone.
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (ProcessLookupError, FileNotFoundError):
            return True
        if state == "Z":
            return True
        time.sleep(0.1)
    return False


def test_log_probabilities_equal_transformers_with_peft_in_mixed_batches(
    engine: EngineProcess, bench: Bench, record_property: object
) -> None:
    """Base and both adapters in the same batches: a request without adapter must not be given one."""
    which = (None, bench.a, bench.b)
    requests = questions(8, temperature=1.0)
    answers = ask(*((bench.model(engine, adapter), requests) for adapter in which))
    worst = 0.0
    for adapter, completions in zip(which, answers, strict=True):
        for request, completion in zip(requests, completions, strict=True):
            expected = scored(adapter, bench.chat.encode(request.messages), completion.token_ids)
            worst = max(worst, float((expected - torch.tensor(completion.logprobs)).abs().max()))
    print(f"largest difference of a log-probability, engine, fp32: {worst:.2g} nats")
    assert worst < 1e-3


def test_log_probabilities_are_those_of_temperature_one(engine: EngineProcess, bench: Bench) -> None:
    [requests] = [questions(4, temperature=0.4, top_p=0.8)]
    [completions] = ask((bench.model(engine, bench.a), requests))
    for request, completion in zip(requests, completions, strict=True):
        expected = scored(bench.a, bench.chat.encode(request.messages), completion.token_ids)
        assert torch.allclose(expected, torch.tensor(completion.logprobs), atol=1e-3)


def test_greedy_text_equals_the_model_in_this_process(engine: EngineProcess, bench: Bench) -> None:
    requests = questions(24, temperature=0.0, max_tokens=40)
    texts: set[tuple[str, ...]] = set()
    for adapter in (None, bench.a, bench.b):
        ours = TransformersModel.load(POCKET, adapter_dir=adapter.folder if adapter else None, threads=1)
        theirs, mine = ask((bench.model(engine, adapter), requests), (ours, requests))
        assert [c.token_ids for c in theirs] == [c.token_ids for c in mine]
        assert [(c.text, c.finish_reason, c.prompt_tokens) for c in theirs] == [
            (c.text, c.finish_reason, c.prompt_tokens) for c in mine
        ]
        texts.add(tuple(c.text for c in theirs))
        asyncio.run(ours.close())
    assert len(texts) == 3, "the adapters must change what is said, or the test proves nothing"


def test_an_answer_depends_on_its_seed_and_not_on_its_company(engine: EngineProcess, bench: Bench) -> None:
    model = bench.model(engine, bench.a)
    requests = questions(64, temperature=1.0)
    [together], [again] = ask((model, requests)), ask((model, requests))
    alone = [ask((model, [request]))[0][0] for request in requests[::8]]
    assert [c.token_ids for c in together] == [c.token_ids for c in again]
    assert [c.token_ids for c in together[::8]] == [c.token_ids for c in alone]
    assert len({c.token_ids for c in together}) > 8


def test_sampling_follows_the_model(engine: EngineProcess, bench: Bench) -> None:
    """First tokens over many seeds against their probabilities: no hidden top-k, penalty or temperature."""
    request = questions(1)[0]
    context = bench.chat.encode(request.messages)
    [completions] = ask(
        (bench.model(engine, bench.a), [Request(request.messages, Sampling(max_tokens=1, seed=seed)) for seed in range(1500)])
    )
    with torch.inference_mode():
        model = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32), str(bench.a.folder)
        )
        probabilities = torch.softmax(model(input_ids=torch.tensor([context])).logits[0, -1].double(), -1)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in completions]), minlength=len(probabilities)).double()
    distance = float((counts / 1500 - probabilities).abs().sum() / 2)
    # For 1500 draws the expected distance is below sum(sqrt(p (1 - p) / n)) / 2; four times that never happens by chance.
    assert distance < 4 * float((probabilities * (1 - probabilities) / 1500).sqrt().sum() / 2)


def test_later_turns_reuse_the_prefix(engine: EngineProcess, bench: Bench) -> None:
    model = bench.model(engine, bench.b)
    long = Message("user", "What is the mayor of city Bado Keli? " * 20)
    [[first]] = ask((model, [Request((SYSTEM, long), Sampling(max_tokens=8), "one")]))
    history = (SYSTEM, long, Message("assistant", first.text, first.token_ids), Message("user", "again"))
    [[second]] = ask((model, [Request(history, Sampling(max_tokens=8), "one")]))
    assert second.cached_tokens >= first.prompt_tokens // 2
    assert second.prompt_tokens > first.prompt_tokens


def endless(engine: EngineProcess, bench: Bench, adapter: Adapter | None) -> VllmModel:
    """A model whose answers end at ``max_tokens`` only."""
    model = bench.model(engine, adapter)
    model._stops = ()
    return model


def test_a_late_call_joins_the_running_batch(engine: EngineProcess, bench: Bench) -> None:
    model = endless(engine, bench, None)

    async def scene() -> list[str]:
        order: list[str] = []

        async def one(name: str, tokens: int) -> None:
            await model.generate(Request((SYSTEM, Message("user", name)), Sampling(max_tokens=tokens)))
            order.append(name)

        long = asyncio.create_task(one("long", 700))
        await asyncio.sleep(0.5)
        await one("short", 2)
        await long
        return order

    assert asyncio.run(scene()) == ["short", "long"]


def test_a_cancelled_call_leaves_the_engine_free(engine: EngineProcess, bench: Bench) -> None:
    model = endless(engine, bench, None)

    async def scene() -> Completion:
        task = asyncio.create_task(model.generate(Request((SYSTEM,), Sampling(max_tokens=1900))))
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await model.generate(questions(1)[0])

    assert asyncio.run(scene()).token_ids
    assert not engine._pending


def test_an_answer_can_be_held_to_a_schema(engine: EngineProcess, bench: Bench) -> None:
    schema = {
        "type": "object",
        "properties": {"ids": {"type": "array", "items": {"type": "integer"}, "maxItems": 3}},
        "required": ["ids"],
    }
    request = Request((SYSTEM, Message("user", "Which items?")), Sampling(1.0, max_tokens=200, seed=3), answer_schema=schema)
    [[completion]] = ask((bench.model(engine, None), [request]))
    assert completion.finish_reason == "length" or set(json.loads(completion.text)) == {"ids"}


def test_too_long_a_context_is_refused_with_a_remedy(engine: EngineProcess, bench: Bench) -> None:
    with pytest.raises(ModelError, match="2048 with the answer"):
        ask((bench.model(engine, None), [Request((Message("user", "word " * 3000),), Sampling())]))


def test_episodes_are_those_of_the_model_in_this_process(engine: EngineProcess, bench: Bench) -> None:
    """Rollouts through the agent loop, 16 at once: greedy, so both backends must write the same trajectories."""
    world = World(31)
    arguments = {
        "environment": PocketTools(world),
        "verifier": ExactVerifier(),
        "settings": RolloutSettings(max_steps=8),
        "seed": 0,
        "concurrency": 16,
    }
    tasks = world.tasks(16, "pocket/held_out")
    ours = TransformersModel.load(POCKET, threads=1)
    mine = asyncio.run(gather_rollouts(tasks, 1, model=ours, greedy=True, **arguments))
    theirs = asyncio.run(gather_rollouts(tasks, 1, model=bench.model(engine, None), greedy=True, **arguments))
    assert [[(s.token_ids, s.observation) for s in t.steps] for t in theirs] == [
        [(s.token_ids, s.observation) for s in t.steps] for t in mine
    ]
    assert [t.reward for t in theirs] == [t.reward for t in mine]
    assert all(t.status != "failed" for t in theirs)
    assert sum(t.turns for t in theirs) > 32
    sampled = asyncio.run(gather_rollouts(tasks, 2, model=bench.model(engine, bench.a), **arguments))
    assert all(t.status != "failed" and len(s.logprobs) == len(s.token_ids) > 0 for t in sampled for s in t.steps)
    asyncio.run(ours.close())


def test_the_check_passes_for_the_right_adapter_and_fails_for_another(
    engine: EngineProcess, bench: Bench, tmp_path: Path
) -> None:
    for adapter in (None, bench.a, bench.b):
        engine.load(adapter, make_probe(POCKET, adapter, bench.chat, dtype="float32"))
    # The folder's content is swapped between our look at it and vLLM's.
    for seed, scale, looks in ((7, 0.03, "something else"), (7, 0.0, "the bare base model")):
        folder = make_adapter(tmp_path / f"{seed}-{scale}", seed=3)
        meant = Adapter.read(folder)
        probe = make_probe(POCKET, meant, bench.chat, dtype="float32")
        make_adapter(folder, seed, scale)
        engine.unload(bench.b)
        with pytest.raises(ModelError, match=f"serves {looks}") as caught:
            engine.load(meant, probe)
        assert "restart the server" in caught.value.remedy
        engine.unload(meant)
        engine.load(bench.b, None)


def test_a_full_engine_refuses_one_more_adapter(engine: EngineProcess, bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="all 2 adapter slots are taken"):
        engine.load(Adapter.read(make_adapter(tmp_path, 9)), None)


def test_a_broken_adapter_is_named(engine: EngineProcess, bench: Bench, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "broken", 9)
    adapter = Adapter.read(folder)
    (folder / "adapter_model.safetensors").write_bytes(b"no tensors")
    engine.unload(bench.b)
    try:
        with pytest.raises(ModelError, match="refused a call"):
            engine.load(adapter, None)
    finally:
        engine.load(bench.b, None)


def test_an_engine_that_is_killed_starts_again_and_answers_what_it_was_asked(engine: EngineProcess, bench: Bench) -> None:
    model = bench.model(engine, bench.b)
    requests = questions(12, temperature=0.0)
    [before] = ask((model, requests))

    async def scene() -> list[Completion]:
        unfinished = endless(engine, bench, bench.a)
        tasks = [asyncio.create_task(unfinished.generate(Request(r.messages, Sampling(max_tokens=300)))) for r in requests]
        await asyncio.sleep(0.2)
        tasks = [*(asyncio.create_task(model.generate(r)) for r in requests), *tasks]
        await asyncio.sleep(0.05)
        assert not any(task.done() for task in tasks)
        old = engine.pid
        os.kill(old, signal.SIGKILL)
        answers = await asyncio.gather(*tasks)
        assert engine.pid != old
        assert gone(old, 5)
        return answers[: len(requests)]

    after = asyncio.run(scene())
    assert [c.token_ids for c in after] == [c.token_ids for c in before]


def test_opened_by_its_settings_and_gone_after_close(bench: Bench) -> None:
    model = open_vllm(settings(), runtime=RUNTIME, adapter=bench.a.folder)
    assert isinstance(model, LanguageModel)
    assert isinstance(model, VllmModel)
    source = model._source
    assert isinstance(source, EngineProcess)
    assert ask((model, questions(2)))[0][0].token_ids
    pid = source.pid
    asyncio.run(model.close())
    asyncio.run(model.close())
    assert gone(pid, 5)
    with pytest.raises(ModelError, match="closed"):
        ask((model, questions(1)))


def test_the_engine_goes_when_its_parent_is_killed(tmp_path: Path) -> None:
    code = """
import os, sys, time
from evolve_dag.inference.vllm_process import EngineProcess
from conftest import POCKET, RUNTIME, settings
engine = EngineProcess.start(settings(), RUNTIME, POCKET, ())
if os.fork() == 0:  # holds the pipe open after its parent's death
    time.sleep(30)
    os._exit(0)
print(engine.pid, flush=True)
time.sleep(600)
"""
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{Path(__file__).parent}", "EVOLVE_VLLM_PYTHON": PYTHON}
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    os.kill(pid, 0)
    parent.kill()
    parent.wait()
    assert gone(pid, 20)
    os.killpg(parent.pid, signal.SIGKILL)
