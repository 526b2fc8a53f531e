"""vLLM's own server, two of them at once."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import torch
from conftest import RUNTIME, SYSTEM, Bench, Server, make_adapter, questions, settings, start_server, stop, wait_for
from test_engine import ask, scored

from evolve_dag.errors import ModelError
from evolve_dag.inference.folders import POCKET
from evolve_dag.inference.transformers import TransformersModel
from evolve_dag.inference.vllm import open_vllm
from evolve_dag.inference.vllm_probe import make_probe
from evolve_dag.inference.vllm_servers import Servers
from evolve_dag.inference.vllm_source import Adapter
from evolve_dag.protocols import Completion, Request, Sampling
from evolve_dag.records import Message


@pytest.fixture(scope="module")
def roomy(servers: list[Server], bench: Bench) -> Iterator[Servers]:
    """A connection to the server that has slots to spare, with both adapters loaded and checked."""
    source = Servers([servers[0].address])
    for adapter in (bench.a, bench.b):
        source.load(adapter, make_probe(POCKET, adapter, bench.chat, dtype="float32"))
    yield source
    source.close()


def load_by_hand(server: Server, name: str, folder: Path) -> None:
    body = {"lora_name": name, "lora_path": str(folder)}
    httpx.post(f"{server.address}/load_lora_adapter", json=body, timeout=60).raise_for_status()


def test_log_probabilities_equal_transformers_with_peft_in_mixed_batches(roomy: Servers, bench: Bench) -> None:
    which = (None, bench.a, bench.b)
    requests = questions(6, temperature=0.9, top_p=0.95)
    answers = ask(*((bench.model(roomy, adapter), requests) for adapter in which))
    worst = 0.0
    for adapter, completions in zip(which, answers, strict=True):
        for request, completion in zip(requests, completions, strict=True):
            expected = scored(adapter, bench.chat.encode(request.messages), completion.token_ids)
            worst = max(worst, float((expected - torch.tensor(completion.logprobs)).abs().max()))
    print(f"largest difference of a log-probability, server, fp32: {worst:.2g} nats")
    assert worst < 1e-3


def test_greedy_text_equals_the_model_in_this_process(roomy: Servers, bench: Bench) -> None:
    requests = questions(16, temperature=0.0, max_tokens=40)
    for adapter in (None, bench.a, bench.b):
        ours = TransformersModel.load(POCKET, adapter_dir=adapter.folder if adapter else None, threads=1)
        theirs, mine = ask((bench.model(roomy, adapter), requests), (ours, requests))
        assert [(c.token_ids, c.text, c.finish_reason) for c in theirs] == [
            (c.token_ids, c.text, c.finish_reason) for c in mine
        ]
        asyncio.run(ours.close())


def test_a_server_reports_what_it_had_cached(roomy: Servers, bench: Bench) -> None:
    model = bench.model(roomy, bench.a)
    request = Request((SYSTEM, Message("user", "What is the home of person Rato Miku? " * 20)), Sampling(max_tokens=4))
    ask((model, [request]))
    [[second]] = ask((model, [request]))
    assert second.cached_tokens > second.prompt_tokens // 2


def test_calls_of_many_sessions_are_spread_and_stay(servers: list[Server], bench: Bench) -> None:
    model = open_vllm(settings(servers=tuple(s.address for s in servers)), runtime=RUNTIME, adapter=bench.a.folder)
    source = model._source
    assert isinstance(source, Servers)

    async def scene() -> list[Completion]:
        requests = questions(48, temperature=0.0, max_tokens=12)
        first = await asyncio.gather(*(model.generate(request) for request in requests))
        homes = {session: server.address for session, server in source._homes.items()}
        counts = Counter(homes.values())
        assert len(counts) == 2
        assert min(counts.values()) >= 16
        second = await asyncio.gather(*(model.generate(request) for request in requests))
        kept = sum(source._homes[session].address == address for session, address in homes.items())
        assert kept >= 40
        for request in requests:
            model.release(request.session)
        assert not source._homes
        assert [c.token_ids for c in first] == [c.token_ids for c in second]
        return first

    from_both = asyncio.run(scene())
    ours = TransformersModel.load(POCKET, adapter_dir=bench.a.folder, threads=1)
    [mine] = ask((ours, questions(48, temperature=0.0, max_tokens=12)))
    assert [c.token_ids for c in from_both] == [c.token_ids for c in mine]
    asyncio.run(model.close())


def test_a_stale_adapter_under_the_same_name_is_passed_over(servers: list[Server], bench: Bench, tmp_path: Path) -> None:
    """Another run loaded the name when other files lay in the folder; nothing of it may be served, cached prefixes neither."""
    folder = make_adapter(tmp_path / "stale", seed=11)
    meant = Adapter.read(folder)
    make_adapter(folder, seed=12)
    load_by_hand(servers[0], meant.name, folder)
    make_adapter(folder, seed=11)
    requests = questions(6, temperature=0.0)
    # Prefixes of the stale weights are in the server's cache under that name.
    stale = Servers([servers[0].address])
    ask((bench.model(stale, meant), requests))
    stale.close()
    model = open_vllm(settings(servers=(servers[0].address,)), runtime=RUNTIME, adapter=folder)
    [theirs] = ask((model, requests))
    for request, completion in zip(requests, theirs, strict=True):
        expected = scored(meant, bench.chat.encode(request.messages), completion.token_ids)
        assert torch.allclose(expected, torch.tensor(completion.logprobs), atol=1e-3)
    asyncio.run(model.close())


def test_a_folder_swapped_behind_the_server_is_noticed(servers: list[Server], bench: Bench, tmp_path: Path) -> None:
    for number, (scale, looks) in enumerate(((0.03, "something else"), (0.0, "the bare base model"))):
        folder = make_adapter(tmp_path / str(number), seed=20 + number)
        meant = Adapter.read(folder)
        probe = make_probe(POCKET, meant, bench.chat, dtype="float32")
        make_adapter(folder, 30, scale)
        source = Servers([servers[0].address])
        with pytest.raises(ModelError, match=f"serves {looks}"):
            source.load(meant, probe)
        source.close()


def test_full_slots_give_the_base_model_an_adapter_and_are_noticed(servers: list[Server], bench: Bench) -> None:
    """``--max-loras 2`` with two adapters: calls without adapter that share a batch are given one of them."""
    first = open_vllm(settings(servers=(servers[1].address,)), runtime=RUNTIME, adapter=bench.a.folder)
    with pytest.raises(ModelError, match="calls without adapter are off") as caught:
        open_vllm(settings(servers=(servers[1].address,)), runtime=RUNTIME, adapter=bench.b.folder)
    assert "--max-loras" in caught.value.remedy
    asyncio.run(first.close())


def test_another_base_model_is_noticed(servers: list[Server], bench: Bench, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = AutoModelForCausalLM.from_pretrained(POCKET, dtype=torch.float32)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(0.7)
    other.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(POCKET).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="calls without adapter are off"):
        open_vllm(
            settings(servers=(servers[0].address,)).model_copy(update={"path": str(tmp_path)}), runtime=RUNTIME, adapter=None
        )


def test_refusals_say_what_to_mend(servers: list[Server], bench: Bench, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"serves pocket, not qwen") as caught:
        Servers([servers[0].address], model="qwen")
    assert "models.policy.model" in caught.value.remedy
    gone = Adapter(f"{bench.a.name}-gone", tmp_path / "nowhere", 8, bench.a.targets)
    source = Servers([servers[0].address])
    with pytest.raises(ModelError, match="nowhere") as caught:
        source.load(gone, None)
    assert "in the server's sight" in caught.value.remedy
    source.close()


def test_a_server_that_is_started_anew_is_given_its_adapter_again(servers: list[Server], bench: Bench, tmp_path: Path) -> None:
    """Last of this file: it ends the first server."""
    model = open_vllm(settings(servers=(servers[0].address,)), runtime=RUNTIME, adapter=bench.a.folder)
    requests = questions(8, temperature=0.0)
    [before] = ask((model, requests))
    stop(servers[0])
    again = start_server(tmp_path / "again.log", max_loras=2, port=int(servers[0].address.split(":")[2].split("/")[0]))
    try:
        wait_for([again])
        [after] = ask((model, requests))
        assert [c.token_ids for c in after] == [c.token_ids for c in before]
        asyncio.run(model.close())
    finally:
        stop(again)
