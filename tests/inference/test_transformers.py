"""The batched model with its cache against one sequence at a time without any."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import naive
import numpy as np
import pytest
import tiny_tokenizers
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from evolve_dag.errors import ContextOverflowError, ExhaustedError, ModelError, UnreachableError
from evolve_dag.inference import transformers as backend
from evolve_dag.inference.chat import ChatFormat, read_chat
from evolve_dag.inference.kv import bytes_per_token
from evolve_dag.inference.recording import distribution
from evolve_dag.inference.transformers import TransformersModel, uniforms
from evolve_dag.protocols import Completion, LanguageModel, Request, Sampling
from evolve_dag.records import Message

SYSTEM = Message("system", "Use the tools: search, visit. Then answer.")


def ask(model: TransformersModel, requests: Sequence[Request]) -> list[Completion]:
    async def scene() -> list[Completion]:
        return list(await asyncio.gather(*(model.generate(request) for request in requests)))

    return asyncio.run(scene())


def question(number: int, **sampling: Any) -> Request:
    words = " ".join(["Who", "is", "the", "mayor", "of", "Bado", "Keli", "city"][: 1 + number % 8] * (1 + number % 3))
    settings = {"max_tokens": 6 + number % 9, "seed": number, **sampling}
    return Request((SYSTEM, Message("user", words)), Sampling(**settings), f"s{number}")


def check(model: Any, chat: ChatFormat, request: Request, completion: Completion) -> None:
    ids, logprobs = naive.answer(model, chat, request)
    assert list(completion.token_ids) == ids
    assert np.allclose(completion.logprobs, logprobs, atol=1e-4)
    assert completion.finish_reason == ("stop" if ids[-1] in chat.stop_ids else "length")
    assert completion.text == chat.decode_action(ids)
    assert completion.prompt_tokens == len(chat.encode(request.messages))


def load(model: PreTrainedModel, chat: ChatFormat, **options: Any) -> TransformersModel:
    return TransformersModel.load(copy.deepcopy(model), chat, threads=1, **options)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {}, {"temperature": 0.6}, {"top_p": 0.7}, {"temperature": 1.5, "top_p": 0.5}]
)
def test_ragged_batch_matches_the_naive_loop(policy: PreTrainedModel, chat: ChatFormat, sampling: dict[str, float]) -> None:
    model = load(policy, chat)
    assert isinstance(model, LanguageModel)
    requests = [question(number, **sampling) for number in range(7)]
    for request, completion in zip(requests, ask(model, requests), strict=True):
        check(policy, chat, request, completion)
    assert model.counters.rounds == 1
    assert model.counters.calls == 7


def test_mixed_settings_share_a_round(policy: PreTrainedModel, chat: ChatFormat) -> None:
    requests = [
        question(0, temperature=0.0),
        question(1),
        question(2, temperature=0.5),
        question(3, top_p=0.6),
        question(4, temperature=0.0, top_p=0.1),
    ]
    for request, completion in zip(requests, ask(load(policy, chat), requests), strict=True):
        check(policy, chat, request, completion)


def test_turns_with_hints_put_in_and_taken_out(policy: PreTrainedModel, chat: ChatFormat) -> None:
    """Episodes of several turns; a hint stands in one view and is gone in the next; some episodes end early."""
    model = load(policy, chat)
    rng = random.Random(1)
    histories = {f"s{n}": question(n).messages for n in range(6)}
    lengths = {name: 2 + n % 4 for n, name in enumerate(histories)}
    cached = 0
    for turn in range(5):
        requests = []
        for name, history in histories.items():
            if turn >= lengths[name]:
                model.release(name)
                continue
            hint = "\nhint:\n" + "visit the page " * rng.randint(1, 4) if rng.random() < 0.6 else ""
            view = (*history[:-1], replace(history[-1], content=history[-1].content + hint))
            requests.append(Request(view, Sampling(max_tokens=rng.randint(3, 9), seed=rng.randrange(2**40)), name))
        for request, completion in zip(requests, ask(model, requests), strict=True):
            check(policy, chat, request, completion)
            cached += completion.cached_tokens if turn else 0
            observation = Message("tool", "page: city " + "Bado Keli " * rng.randint(1, 8))
            histories[request.session] = (
                *histories[request.session],
                Message("assistant", completion.text, completion.token_ids),
                observation,
            )
    assert cached > 500


def test_cache_is_cut_where_the_prompt_diverges(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    model = load(qwen3, chat)
    first = Request((SYSTEM, Message("user", "Who is the mayor? hint: visit")), Sampling(max_tokens=4, seed=1), "s")
    [one] = ask(model, [first])
    assert one.cached_tokens == 0
    other = replace(first, messages=(SYSTEM, Message("user", "Who is the mayor? Then say it.")))
    [two] = ask(model, [other])
    a, b = chat.encode(first.messages), chat.encode(other.messages)
    shared = next(i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y)
    assert 10 < shared < len(b)
    assert two.cached_tokens == shared
    check(qwen3, chat, other, two)
    # Growing again from the clean trunk reuses prompt and sampled tokens; the last sampled one was never computed.
    grown = replace(
        other, messages=(*other.messages, Message("assistant", two.text, two.token_ids), Message("tool", "no results"))
    )
    [three] = ask(model, [grown])
    assert three.cached_tokens == len(b) + len(two.token_ids) - 1
    check(qwen3, chat, grown, three)
    # The same prompt once more: everything but the last token, whose logits are needed.
    [four] = ask(model, [grown])
    assert four.cached_tokens == len(chat.encode(grown.messages)) - 1
    assert four.token_ids == three.token_ids


def test_company_does_not_matter(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    requests = [question(number, max_tokens=20) for number in range(12)]
    alone = [ask(load(qwen3, chat), [request])[0] for request in requests]
    together = ask(load(qwen3, chat), requests)
    shuffled = dict(zip(range(11, -1, -1), ask(load(qwen3, chat, max_batch=5), requests[::-1]), strict=True))
    for number, completion in enumerate(alone):
        assert completion.token_ids == together[number].token_ids == shuffled[number].token_ids
        assert np.allclose(completion.logprobs, together[number].logprobs, atol=1e-4)


def test_recorded_distributions_are_those_of_a_forward_pass(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    model = load(qwen3, chat)
    requests = [
        question(n, max_tokens=limit, temperature=n % 3 / 2) for n, limit in enumerate([1, 40, 2, 3, 30, 4, 5, 20, 6, 7])
    ]
    for top_k in (5, 0):
        with model.recording(top_k) as recording:
            completions = ask(model, requests)
        assert len(recording) == len(requests)
        for request, completion in zip(requests, completions, strict=True):
            context = chat.encode(request.messages)
            ids = [*context, *completion.token_ids]
            columns = recording.get(ids, len(context))
            assert columns is not None
            assert recording.get(ids, len(context) - 1) is None
            assert recording.get([*ids, 0], len(context)) is None
            with torch.no_grad():
                logits = qwen3(input_ids=torch.tensor([ids])).logits[0, len(context) - 1 : -1]
            for found, expected in zip(columns, distribution(logits, top_k), strict=True):
                np.testing.assert_allclose(found, expected.numpy(), atol=1e-4)
    ask(model, [question(99)])
    assert len(recording) == len(requests)  # nothing is kept behind the end


def test_rollouts_that_have_not_parted_are_computed_once(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    model = load(qwen3, chat)
    group = [replace(question(3, seed=seed, max_tokens=12), session=f"g{seed}") for seed in range(5)]
    requests = [*group, question(5), question(6)]
    completions = ask(model, requests)
    lengths = [len(chat.encode(request.messages)) for request in requests[4:]]
    assert model.counters.computed_tokens <= sum(lengths)
    assert model.counters.prompt_tokens == sum(lengths) + 4 * lengths[0]
    assert len({completion.token_ids for completion in completions[:5]}) > 1
    for request, completion in zip(requests, completions, strict=True):
        check(qwen3, chat, request, completion)
    followed = [
        replace(request, messages=(*request.messages, Message("assistant", c.text, c.token_ids), Message("tool", "no results")))
        for request, c in zip(requests, completions, strict=True)
    ]
    for request, completion in zip(followed, ask(model, followed), strict=True):
        check(qwen3, chat, request, completion)


def test_calls_that_agree_are_answered_once_until_they_part(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    model = load(qwen3, chat)
    pairs = [(question(number), replace(question(number), session=f"twin of {number}")) for number in range(3)]
    answers = ask(model, [request for pair in pairs for request in pair])
    assert model.counters.calls == 3
    for (one, _), mine, its in zip(pairs, answers[::2], answers[1::2], strict=True):
        check(qwen3, chat, one, mine)
        assert its == mine
    # The twin reads something more now, and goes on from what was computed for the other.
    parted = []
    for (one, other), mine in zip(pairs, answers[::2], strict=True):
        history = (*one.messages, Message("assistant", mine.text, mine.token_ids))
        parted += [replace(one, messages=(*history, Message("tool", "Bado")))]
        parted += [replace(other, messages=(*history, Message("tool", "Keli")))]
    answers = ask(model, parted)
    for request, completion in zip(parted, answers, strict=True):
        check(qwen3, chat, request, completion)
    assert model.counters.calls == 9
    assert [answer.cached_tokens for answer in answers[1::2]] == [answer.cached_tokens for answer in answers[::2]]


def test_other_draws_and_settings_are_other_calls(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    model = load(qwen3, chat)
    settings = [Sampling(max_tokens=6, seed=1), Sampling(max_tokens=6, seed=2), Sampling(max_tokens=5, seed=1)]
    settings += [Sampling(temperature=0.0, max_tokens=6, seed=seed) for seed in (1, 2)]  # argmax draws nothing: one call
    requests = [replace(question(1), sampling=one, session=str(number)) for number, one in enumerate(settings)]
    for request, completion in zip(requests, ask(model, requests), strict=True):
        check(qwen3, chat, request, completion)
    assert model.counters.calls == 4


def test_finished_rows_leave_and_the_rest_goes_on(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    """Row lengths from 1 to 40: the round is compacted several times, in and outside the slab."""
    model = load(qwen3, chat)
    for seed in (0, 100):
        requests = [question(n, max_tokens=limit, seed=seed + n) for n, limit in enumerate([1, 40, 2, 3, 30, 4, 5, 20, 6, 7])]
        completions = ask(model, requests)
        for request, completion in zip(requests, completions, strict=True):
            check(qwen3, chat, request, completion)
        followed = [
            replace(
                request,
                messages=(*request.messages, Message("assistant", c.text, c.token_ids), Message("tool", "no results")),
                sampling=replace(request.sampling, max_tokens=5),
            )
            for request, c in list(zip(requests, completions, strict=True))[1::3]
        ]
        for request, completion in zip(followed, ask(model, followed), strict=True):
            check(qwen3, chat, request, completion)
            assert completion.cached_tokens > 20


def test_scarce_memory_evicts_and_stays_right(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    per_token = 2 * 2 * 2 * 8 * 4
    model = load(qwen3, chat, cache_bytes=3 * 128 * per_token)  # three slots of 128 tokens for eight sessions
    histories = [question(n).messages for n in range(8)]
    for turn in range(3):
        requests = [Request(h, Sampling(max_tokens=5, seed=turn), f"s{n}") for n, h in enumerate(histories)]
        for n, (request, completion) in enumerate(zip(requests, ask(model, requests), strict=True)):
            check(qwen3, chat, request, completion)
            histories[n] = (
                *histories[n],
                Message("assistant", completion.text, completion.token_ids),
                Message("tool", "none " * 3),
            )
    assert model._pool.slots * model._pool.columns <= 3 * 128 * 2  # a round of one longer session may exceed it


def test_one_long_episode_takes_no_room_from_those_after_it(
    qwen3: PreTrainedModel, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts: list[int] = []
    whole = TransformersModel._compute
    monkeypatch.setattr(
        TransformersModel, "_compute", lambda self, model, calls: parts.append(len(calls)) or whole(self, model, calls)
    )
    model = load(qwen3, chat, cache_bytes=8 * 128 * bytes_per_token(qwen3.config, torch.float32))
    stays = Request((SYSTEM, Message("user", "I stay.")), Sampling(max_tokens=6, seed=1), "stays")
    long = Request((SYSTEM, Message("user", "x" * 400)), Sampling(max_tokens=8), "long")
    ask(model, [stays, long])
    model.release("long")
    short = [question(number, max_tokens=6) for number in (0, 1, 2, 8, 9, 10)]
    [said] = ask(model, [stays])
    goes_on = replace(stays, messages=(*stays.messages, Message("assistant", said.text, said.token_ids), Message("tool", "on")))
    parts.clear()
    for request, completion in zip([goes_on, *short], ask(model, [goes_on, *short]), strict=True):
        check(qwen3, chat, request, completion)
    assert parts == [7]


def test_memory_that_the_system_would_give_back_counts(qwen3: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(total=9_000_000, available=4_000_000, free=4))
    cpu = torch.device("cpu")
    assert backend._cache_budget(qwen3.config, torch.float32, cpu, None) == 1_000_000 // bytes_per_token(
        qwen3.config, torch.float32
    )


def test_new_sessions_share_what_they_start_with(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    model = load(qwen3, chat)
    requests = [question(number) for number in range(8)]
    completions = ask(model, requests)
    system = len(chat.encode([SYSTEM], generation_prompt=False))
    assert [c.cached_tokens >= system for c in completions] == [True] * 8
    for request in requests:
        model.release(request.session)
    late = replace(question(3), session="late")
    [completion] = ask(model, [late])
    assert completion.cached_tokens == completion.prompt_tokens - 1  # a released slot still serves
    check(qwen3, chat, late, completion)


def test_merged_adapter_equals_peft(qwen3: PreTrainedModel, chat: ChatFormat, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    adapted = get_peft_model(
        copy.deepcopy(qwen3), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    )
    adapted.save_pretrained(tmp_path / "adapter")
    qwen3.save_pretrained(tmp_path / "base")
    adapted.eval()
    before = {name: value.clone() for name, value in qwen3.state_dict().items()}
    requests = [question(number) for number in range(4)]
    loaded = [
        TransformersModel.load(tmp_path / "base", chat, adapter_dir=tmp_path / "adapter", threads=1),
        TransformersModel.load(qwen3, chat, adapter_dir=tmp_path / "adapter", threads=1),
        TransformersModel.load(qwen3, chat, adapter_dir=tmp_path / "adapter", threads=1, merge=False),
        TransformersModel.load(adapted, chat, threads=1),
    ]
    for model in loaded:
        for request, completion in zip(requests, ask(model, requests), strict=True):
            check(adapted, chat, request, completion)
    assert all(torch.equal(value, before[name]) for name, value in qwen3.state_dict().items())
    assert any(ask(loaded[0], [r])[0].token_ids != ask(load(qwen3, chat), [r])[0].token_ids for r in requests)


def test_in_half_precision_an_adapter_stays_beside_the_base(qwen3: PreTrainedModel, chat: ChatFormat, tmp_path: Path) -> None:
    """Added into the weights, a small one would be lost: so it is here."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    base = copy.deepcopy(qwen3).to(torch.bfloat16)
    base.save_pretrained(tmp_path / "base")
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e-5)
    adapted.save_pretrained(tmp_path / "adapter")
    before = {name: value.clone() for name, value in base.named_parameters() if "base_layer" in name}
    model = TransformersModel.load(tmp_path / "base", chat, adapter_dir=tmp_path / "adapter", dtype="bfloat16", threads=1)
    assert sum("lora_A" in name for name, _ in model.model.named_parameters()) == len(before)
    [completion] = ask(model, [question(1)])
    assert completion.token_ids
    merged = dict(adapted.merge_and_unload().named_parameters())
    unchanged = [(value == merged[name.replace(".base_layer", "")]).float().mean().item() for name, value in before.items()]
    assert len(unchanged) == 2 * 7
    assert min(unchanged) > 0.9


@pytest.mark.parametrize(("dtype", "together"), [("bfloat16", True), ("float32", False)])
def test_in_half_precision_the_head_gets_last_positions_that_lie_together(
    qwen3: PreTrainedModel, chat: ChatFormat, dtype: str, together: bool
) -> None:
    """Where they lie apart torch copies a head without gradients for every row."""
    model = TransformersModel.load(copy.deepcopy(qwen3).to(getattr(torch, dtype)), chat, threads=1)
    head, seen = model.model.get_output_embeddings(), list[bool]()
    head.register_forward_pre_hook(lambda _, states: seen.append(states[0].is_contiguous()))
    head(torch.zeros(2, 3, head.in_features, dtype=head.weight.dtype)[:, -1:])
    assert seen == [together]


def test_a_model_that_trains_is_copied_with_its_adapter(qwen3: PreTrainedModel, tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    tiny_tokenizers.byte_level().save_pretrained(tmp_path)
    student = get_peft_model(copy.deepcopy(qwen3), LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))
    student.train()
    ids = torch.arange(12)[None]
    student(input_ids=ids, labels=ids).loss.backward()
    model = TransformersModel.load(student, tmp_path, threads=1)
    [completion] = ask(model, [question(1)])
    assert student.training
    assert all(p.grad is not None for name, p in student.named_parameters() if "lora" in name)
    assert student.config._attn_implementation == "sdpa"
    student.eval()
    check(student, model.chat, question(1), completion)


def test_model_still_scores_a_padded_batch_like_the_stock_one(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    """The attention function stays in the model's config: scoring and training go through it too."""
    ours = copy.deepcopy(qwen3)
    TransformersModel.load(ours, chat)
    assert ours.config._attn_implementation == backend.ATTENTION
    ids = torch.randint(0, 300, (3, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 8:] = 0
    mask[2, :3] = 0
    with torch.no_grad():
        expected, found = (m(input_ids=ids, attention_mask=mask).logits[mask.bool()] for m in (qwen3, ours))
        assert torch.allclose(expected, found, atol=1e-5)
        plain, other = (m(input_ids=ids).logits for m in (qwen3, ours))
        assert torch.allclose(plain, other, atol=1e-5)
    ours.train()
    ours(input_ids=ids, attention_mask=mask, labels=ids).loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in ours.parameters() if p.grad is not None)


def test_a_message_counts_the_tokens_that_it_adds(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    model, page = load(qwen3, chat), Message("tool", "city Bado Keli: 市长 Rato Miku")
    assert model.count_tokens(page) == len(chat.encode((SYSTEM, page))) - len(chat.encode((SYSTEM,)))


def test_too_long_context_fails_alone(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    model = load(qwen3, chat)
    long = Request((SYSTEM, Message("user", "Bado Keli " * 400)), Sampling(max_tokens=4), "long")

    async def scene() -> list[Any]:
        return await asyncio.gather(model.generate(long), model.generate(question(1)), return_exceptions=True)

    error, completion = asyncio.run(scene())
    assert isinstance(error, ContextOverflowError)
    assert "the model takes 512" in str(error)
    assert "remedy: lower rollout.max_tokens" in str(error)
    check(qwen3, chat, question(1), completion)


def test_answer_ends_where_the_positions_end(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    count = 505
    base = (SYSTEM, Message("user", ""))
    filler = count - len(chat.encode(base))
    messages = (SYSTEM, Message("user", "\x01" * filler))
    assert len(chat.encode(messages)) == count
    request = Request(messages, Sampling(max_tokens=50, seed=3), "s")
    [completion] = ask(load(qwen3, chat), [request])
    assert len(completion.token_ids) <= 512 - count
    check(qwen3, chat, replace(request, sampling=replace(request.sampling, max_tokens=512 - count)), completion)


def test_broken_weights_are_an_error_not_a_text(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    model = copy.deepcopy(qwen3)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="not numbers"):
        ask(TransformersModel.load(model, chat, threads=1), [question(0)])


def test_failure_in_the_model_reaches_every_caller_and_the_next_call_works(
    qwen3: PreTrainedModel, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(qwen3, chat)
    ask(model, [question(0)])
    whole = TransformersModel._forward
    calls = 0

    def fails_late(self: TransformersModel, *args: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise RuntimeError("an illegal instruction")
        return whole(self, *args)

    monkeypatch.setattr(TransformersModel, "_forward", fails_late)

    async def scene() -> list[Any]:
        return await asyncio.gather(model.generate(question(0)), model.generate(question(4)), return_exceptions=True)

    errors = asyncio.run(scene())
    assert [type(error) for error in errors] == [UnreachableError] * 2, "it says nothing about an episode"
    assert "an illegal instruction" in str(errors[0])
    for request, completion in zip([question(0), question(4)], ask(model, [question(0), question(4)]), strict=True):
        check(qwen3, chat, request, completion)


SPENT = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB\nGPU 0 has a total of")


def short_of_memory(monkeypatch: pytest.MonkeyPatch, rows: int, error: Exception = SPENT) -> list[int]:
    """Sampling after the first token of more than ``rows`` rows runs out of memory; the rows of every forward pass, as they
    come."""
    whole = TransformersModel._forward
    seen: list[int] = []

    def forward(self: TransformersModel, model: Any, tokens: torch.Tensor, *args: Any) -> torch.Tensor:
        seen.append(len(tokens))
        if tokens.shape[1] == 1 and len(tokens) > rows:
            raise error
        return whole(self, model, tokens, *args)

    monkeypatch.setattr(TransformersModel, "_forward", forward)
    return seen


def test_memory_that_runs_out_halves_the_calls_at_once(
    qwen3: PreTrainedModel, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What was held in memory before is lost, and no answer is another one for it, this turn or the next."""
    model = load(qwen3, chat)
    requests = [question(number, max_tokens=6) for number in range(9)]
    first = ask(model, requests)
    seen = short_of_memory(monkeypatch, 2)
    again = [
        replace(one, messages=(*one.messages, Message("assistant", said.text, said.token_ids), Message("tool", "none")))
        for one, said in zip(requests, first, strict=True)
    ]
    for request, completion in zip(again, ask(model, again), strict=True):
        check(qwen3, chat, request, completion)
    told = [record.getMessage() for record in caplog.records]
    assert [line.split(": ")[1] for line in told] == ["4 from now on", "2 from now on"]
    assert "9 calls" in told[0]
    assert all("\n" not in line for line in told)
    seen.clear()
    ask(model, requests)
    assert max(seen) <= 2  # and so it stays
    assert model._pool.slots <= 2


def test_an_answer_that_is_held_to_a_schema_begins_anew(
    qwen3: PreTrainedModel, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"enum": ["x", "yy"]}}, "required": ["a"], "additionalProperties": False}
    requests = [replace(question(number, max_tokens=60), answer_schema=schema) for number in range(3)]
    expected = ask(load(qwen3, chat), requests)
    short_of_memory(monkeypatch, 1)
    again = ask(load(qwen3, chat), requests)
    assert [one.token_ids for one in again] == [one.token_ids for one in expected]


@pytest.mark.parametrize(
    ("error", "told"),
    [(SPENT, "CUDA out of memory"), (MemoryError(), "MemoryError"), (RuntimeError("CUBLAS_STATUS_ALLOC_FAILED"), "CUBLAS")],
)
def test_memory_that_is_too_small_for_one_call_ends_the_work(
    qwen3: PreTrainedModel, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch, error: Exception, told: str
) -> None:
    """It says nothing about the episodes, so none of them has failed."""
    model = load(qwen3, chat)
    short_of_memory(monkeypatch, 0, error)
    with pytest.raises(ExhaustedError, match=rf"over one call of .* tokens: {told}"):
        ask(model, [question(number) for number in range(3)])


def test_memory_that_is_short_for_a_moment_costs_a_straggler_nothing_but_another_try(
    qwen3: PreTrainedModel, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One call is left, many slots are held: it is these that are halved."""
    model = load(qwen3, chat)
    ask(model, [question(number) for number in range(8)])
    whole, passes = TransformersModel._forward, 0

    def short_once(self: TransformersModel, *args: Any) -> torch.Tensor:
        nonlocal passes
        passes += 1
        if passes == 2:
            raise SPENT
        return whole(self, *args)

    monkeypatch.setattr(TransformersModel, "_forward", short_once)
    [completion] = ask(model, [question(3)])
    check(qwen3, chat, question(3), completion)
    assert model._most == 4


def test_without_room_for_a_first_slot_it_ends_too(
    qwen3: PreTrainedModel, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any) -> None:
        raise MemoryError

    model = load(qwen3, chat)
    monkeypatch.setattr("evolve_dag.inference.kv.SlotPool._resize", full)
    with pytest.raises(ExhaustedError):
        ask(model, [question(0), question(1)])


def test_cancelled_caller_harms_nobody(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    model = load(qwen3, chat)

    async def scene() -> Completion:
        victim = asyncio.create_task(model.generate(question(2, max_tokens=40)))
        other = asyncio.create_task(model.generate(question(5)))
        await asyncio.sleep(0.001)
        victim.cancel()
        with pytest.raises(asyncio.CancelledError):
            await victim
        return await other

    check(qwen3, chat, question(5), asyncio.run(scene()))
    check(qwen3, chat, question(2), ask(model, [question(2)])[0])


def test_two_calls_of_one_session_and_calls_without_session(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    model = load(qwen3, chat)
    requests = [replace(question(n), session="same") for n in range(3)] + [replace(question(n), session="") for n in range(3)]
    for request, completion in zip(requests, ask(model, requests), strict=True):
        check(qwen3, chat, request, completion)


def test_sessions_at_a_slow_tool_do_not_stop_the_others(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    model = load(qwen3, chat)

    async def scene() -> float:
        await asyncio.gather(model.generate(question(0)), model.generate(question(1)))
        begun = asyncio.get_running_loop().time()
        await model.generate(question(0))  # s1 lives and does not ask
        return asyncio.get_running_loop().time() - begun

    assert asyncio.run(scene()) < 0.5


def test_live_sessions_are_waited_for(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    """Episodes whose tools take unequal, short times still share rounds."""
    model = load(qwen3, chat)
    model._last_round = 0.4  # so that the others may be up to 40 ms late

    async def episode(number: int) -> None:
        for _ in range(4):
            await model.generate(question(number, max_tokens=3))
            model._last_round = 0.4
            await asyncio.sleep(0.001 * number)
        model.release(f"s{number}")

    async def scene() -> None:
        await asyncio.gather(*(episode(number) for number in range(6)))

    asyncio.run(scene())
    assert model.counters.calls == 24
    assert model.counters.rounds == 4


def test_close_twice(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    model = load(qwen3, chat)
    ask(model, [question(0)])
    asyncio.run(model.close())
    asyncio.run(model.close())
    with pytest.raises(ModelError, match="closed"):
        ask(model, [question(0)])


def test_unreadable_folders(qwen3: PreTrainedModel, chat: ChatFormat, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"model .*nowhere: cannot be read"):
        TransformersModel.load(tmp_path / "nowhere", chat)
    with pytest.raises(ModelError, match="no adapter_config"):
        TransformersModel.load(qwen3, chat, adapter_dir=tmp_path)
    from peft import LoraConfig, get_peft_model

    get_peft_model(copy.deepcopy(qwen3), LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path / "adapter")
    weights = tmp_path / "adapter" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:200])
    with pytest.raises(ModelError, match=r"adapter .*cannot be read[\s\S]*remedy: it must be intact"):
        TransformersModel.load(qwen3, chat, adapter_dir=tmp_path / "adapter")
    small = Qwen3ForCausalLM(Qwen3Config(**{**qwen3.config.to_dict(), "vocab_size": 100, "pad_token_id": None}))
    with pytest.raises(ModelError, match="the model knows 100"):
        TransformersModel.load(small, chat)
    with pytest.raises(ModelError, match="without tokenizer"):
        TransformersModel.load(qwen3)


def test_sliding_window_counts_as_the_end_of_the_context(qwen3: PreTrainedModel, chat: ChatFormat) -> None:
    config = {
        **qwen3.config.to_dict(),
        "use_sliding_window": True,
        "sliding_window": 64,
        "max_window_layers": 1,
        "layer_types": None,
    }
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**config)).eval()
    assert "sliding_attention" in model.config.layer_types
    loaded = load(model, chat)
    assert loaded.max_context == 64
    request = Request((Message("user", "Who?"),), Sampling(max_tokens=30, seed=1), "s")
    check(model, chat, request, ask(loaded, [request])[0])


def test_other_angles_count_as_the_end_of_the_context(qwen3: PreTrainedModel, chat: ChatFormat, tmp_path: Path) -> None:
    """LongRoPE turns the first tokens otherwise too once a sequence is long: keys that were kept were of no use any more, and a
    long call changed what its company was answered."""
    from evolve_dag.config.schema import TransformersModelSettings
    from evolve_dag.inference.folders import longest_context

    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0]}
    config = Qwen3Config(**{**qwen3.config.to_dict(), "rope_parameters": {**rope, "original_max_position_embeddings": 64}})
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(config).eval()
    loaded = load(model, chat)
    assert loaded.max_context == 64
    config.save_pretrained(tmp_path)
    assert longest_context(TransformersModelSettings(path=str(tmp_path)), tmp_path) == 64
    older = json.loads((tmp_path / "config.json").read_text())
    older |= {"rope_scaling": {**rope, "type": "su"}, "original_max_position_embeddings": 48}
    del older["rope_parameters"], older["rope_scaling"]["rope_type"]
    (tmp_path / "config.json").write_text(json.dumps(older))
    assert longest_context(TransformersModelSettings(path=str(tmp_path)), tmp_path) == 48
    request = Request((Message("user", "Who?"),), Sampling(max_tokens=30, seed=1), "s")
    check(model, chat, request, ask(loaded, [request])[0])


def test_code_of_a_folder_is_neither_run_nor_asked_about(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named = {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.Odd", "AutoTokenizer": ["odd.OddTokens", None]}
    for name in ("config.json", "tokenizer_config.json"):
        (tmp_path / name).write_text(json.dumps({"model_type": "odd", "tokenizer_class": "OddTokens", "auto_map": named}))
    (tmp_path / "model.safetensors").write_bytes(b"")
    (tmp_path / "odd.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    def yes(question: str) -> str:
        asked.append(question)
        return "y"

    asked: list[str] = []
    monkeypatch.setattr("builtins.input", yes)
    for read in (lambda: TransformersModel.load(tmp_path), lambda: read_chat(tmp_path)):
        with pytest.raises(ModelError, match="cannot be read"):
            read()
    assert not asked
    assert not (tmp_path / "ran").exists()


def test_weights_beside_those_that_are_hashed_are_not_read(qwen3: PreTrainedModel, chat: ChatFormat, tmp_path: Path) -> None:
    qwen3.save_pretrained(tmp_path)
    torch.save(qwen3.state_dict(), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(ModelError, match="cannot be read"):
        TransformersModel.load(tmp_path, chat)


def test_the_folder_of_an_adapter_is_no_model(qwen3: PreTrainedModel, tmp_path: Path) -> None:
    """transformers opens the base that it names and wears it; the identity would be the adapter's alone."""
    from peft import LoraConfig, get_peft_model

    from evolve_dag.config.schema import TransformersModelSettings
    from evolve_dag.inference.folders import model_folder

    get_peft_model(copy.deepcopy(qwen3), LoraConfig(r=4, target_modules="all-linear")).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match=r"holds an adapter[\s\S]*merge it into its base"):
        model_folder(TransformersModelSettings(path=str(tmp_path)))


def test_bfloat16(qwen3: PreTrainedModel, chat: ChatFormat, tmp_path: Path) -> None:
    qwen3.save_pretrained(tmp_path)
    model = TransformersModel.load(tmp_path, chat, dtype="bfloat16", threads=1)
    exact = ask(load(qwen3, chat), [question(0, temperature=0.0, max_tokens=1)])
    [completion] = ask(model, [question(0, temperature=0.0, max_tokens=1)])
    assert model._pool.keys[0].dtype == torch.bfloat16
    assert np.allclose(completion.logprobs, exact[0].logprobs, atol=0.3)


def test_uniforms_are_fixed_uniform_and_independent() -> None:
    draws = uniforms(range(2000), 50)
    assert draws.shape == (2000, 50)
    assert ((draws >= 0) & (draws < 1)).all()
    assert np.array_equal(draws[7], uniforms([7], 80)[0, :50])
    counts, _ = np.histogram(draws, bins=20, range=(0, 1))
    assert np.abs(counts / draws.size - 0.05).max() < 0.004
    assert abs(np.corrcoef(draws[:-1].ravel(), draws[1:].ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(draws[:, :-1].ravel(), draws[:, 1:].ravel())[0, 1]) < 0.02
    assert uniforms([-1, 2**63 - 1], 1).shape == (2, 1)


def test_sampled_frequencies_follow_the_distribution() -> None:
    logits = torch.tensor([[2.0, -float("inf"), 0.5, 1.0, -3.0]]).expand(20_000, 5)
    requests = [Request((), Sampling(seed=seed)) for seed in range(20_000)]
    draw = backend._Sampler(requests, 1, torch.device("cpu"))
    chosen, logprobs = draw(logits, torch.arange(20_000), 0)
    expected = torch.softmax(logits[0], -1)
    assert torch.allclose(torch.bincount(chosen, minlength=5) / 20_000, expected, atol=0.012)
    assert torch.allclose(logprobs, expected.log()[chosen])
