"""How fast rollouts are: the batched model with its cache against one ``generate`` of transformers per call.

A random model of the pocket policy's shape, or a model's folder; conversations of a fixed shape.

    python benchmarks/rollouts.py --episodes 256 --concurrency 128 --threads 1
    python benchmarks/rollouts.py --model models/smollm2-135m --episodes 16 --concurrency 16 --naive-episodes 2
    python benchmarks/rollouts.py --model models/smollm2-135m --episodes 4 --concurrency 1 --naive-episodes 0    # cache alone
    python benchmarks/rollouts.py --model models/smollm2-135m --episodes 32 --concurrency 32 --naive-episodes 0 --dtype bfloat16
    python benchmarks/rollouts.py --model models/smollm2-135m --naive-episodes 0 --episodes 24 --vllm .venv-vllm/bin/python

All sides answer the same conversations; seconds are CPU seconds (of the process, and of vLLM's engine below it), so a busy
machine blurs them less, and wall seconds are printed beside them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from vllm_roads import used

from evolve_dag.config.schema import RuntimeSettings, VllmModelSettings
from evolve_dag.inference.chat import ChatFormat
from evolve_dag.inference.transformers import TransformersModel
from evolve_dag.inference.vllm import open_vllm
from evolve_dag.protocols import LanguageModel, Request, Sampling
from evolve_dag.records import Message

WORDS = 590
TURNS = 5
ACTION_TOKENS = (12, 24)
OBSERVATION_WORDS = (25, 55)
SYSTEM_WORDS = 60


def tokenizer() -> Any:
    vocabulary = [
        "[UNK]",
        "<|im_start|>",
        "<|im_end|>",
        "user",
        "system",
        "assistant",
        "<tool_response>",
        "</tool_response>",
        "\n",
    ]
    vocabulary += [f"w{n}" for n in range(WORDS)]
    backend = Tokenizer(models.WordLevel({word: n for n, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", behavior="isolated"), pre_tokenizers.Split(" ", behavior="removed")]
    )
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]", eos_token="<|im_end|>")


def random_model(vocabulary: int = 2048, hidden: int = 128, layers: int = 4, seed: int = 0) -> Qwen3ForCausalLM:
    """A model of random weights, by default of the pocket policy's shape."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 64,
        head_dim=32,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config).eval()


def words(rng: random.Random, low: int, high: int) -> str:
    return " ".join(f"w{rng.randrange(WORDS)}" for _ in range(rng.randint(low, high)))


class Script:
    """Questions, observations and lengths of the actions of one episode; the same on both sides."""

    def __init__(self, number: int) -> None:
        rng = random.Random(number)
        system = words(random.Random("system"), SYSTEM_WORDS, SYSTEM_WORDS)
        self.start = (Message("system", system), Message("user", words(rng, 8, 20)))
        self.turns = [(rng.randint(*ACTION_TOKENS), words(rng, *OBSERVATION_WORDS)) for _ in range(TURNS)]


async def episodes(model: LanguageModel, scripts: list[Script], concurrency: int) -> int:
    """Play them, so many at a time; returns the tokens sampled."""
    waiting = iter(list(enumerate(scripts)))
    sampled = 0

    async def work() -> None:
        nonlocal sampled
        for number, script in waiting:
            messages: tuple[Message, ...] = script.start
            for turn, (length, observation) in enumerate(script.turns):
                sampling = Sampling(max_tokens=length, seed=number * 100 + turn)
                completion = await model.generate(Request(messages, sampling, f"s{number}"))
                sampled += len(completion.token_ids)
                action = Message("assistant", completion.text, completion.token_ids)
                messages = (*messages, action, Message("tool", observation))
            model.release(f"s{number}")

    await asyncio.gather(*(work() for _ in range(concurrency)))
    return sampled


def one_by_one(model: Any, chat: ChatFormat, scripts: list[Script]) -> int:
    """Tokens sampled with one ``generate`` per call, whole prompt each time."""
    sampled = 0
    for script in scripts:
        messages: tuple[Message, ...] = script.start
        for length, observation in script.turns:
            ids = torch.tensor([chat.encode(messages)])
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=True,
                top_k=0,
                top_p=1.0,
                temperature=1.0,
                max_new_tokens=length,
                eos_token_id=chat.end_of_turn_id,
                pad_token_id=0,
            )
            new = out[0, ids.shape[1] :].tolist()
            sampled += len(new)
            messages = (*messages, Message("assistant", "", tuple(new)), Message("tool", observation))
    return sampled


@contextmanager
def clock(into: dict[str, float]) -> Iterator[None]:
    wall, cpu = time.perf_counter(), used(os.getpid())
    yield
    into["wall_seconds"], into["cpu_seconds"] = time.perf_counter() - wall, used(os.getpid()) - cpu


def rates(facts: dict[str, float]) -> dict[str, float]:
    seconds = facts["cpu_seconds"]
    facts["episodes_per_cpu_second"] = facts["episodes"] / seconds
    facts["sampled_tokens_per_cpu_second"] = facts["sampled_tokens"] / seconds
    return {name: round(value, 3) for name, value in facts.items()}


def by_vllm(options: argparse.Namespace, scripts: list[Script]) -> dict[str, float]:
    """The same episodes, from vLLM's engine in a process of its own; until it is ready nothing is counted."""
    python = str(Path(options.vllm).absolute())
    settings = VllmModelSettings(backend="vllm", path=options.model, dtype=options.dtype, python=python, context_tokens=2048)
    runtime = RuntimeSettings(threads=options.threads, concurrency=options.concurrency)
    model = open_vllm(settings, runtime=runtime, adapter=Path(options.adapter) if options.adapter else None, check=False)
    asyncio.run(episodes(model, scripts[:4], 4))
    facts: dict[str, float] = {"episodes": options.episodes}
    with clock(facts):
        facts["sampled_tokens"] = asyncio.run(episodes(model, scripts, options.concurrency))
    asyncio.run(model.close())
    return rates(facts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--episodes", type=int, default=256)
    parser.add_argument("--concurrency", type=int, default=128)
    parser.add_argument("--naive-episodes", type=int, default=8, help="episodes of the slow side; 0 leaves it out")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--model", default="", help="folder of a model, in place of a random one")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="number format of that model")
    parser.add_argument("--adapter", help="folder of a LoRA adapter for it: merged in float32, beside it in half precision")
    parser.add_argument("--vllm", help="interpreter with vLLM (make vllm): its engine too; needs --model")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)

    if options.model:
        chat = ChatFormat.from_tokenizer(AutoTokenizer.from_pretrained(options.model))
        policy = AutoModelForCausalLM.from_pretrained(options.model, dtype=getattr(torch, options.dtype)).eval()
    else:
        chat = ChatFormat.from_tokenizer(tokenizer())
        policy = random_model(chat.vocab_size)
    scripts = [Script(number) for number in range(options.episodes)]

    how: dict[str, Any] = {"threads": options.threads, "max_batch": options.concurrency}
    model = TransformersModel.load(policy, chat, adapter_dir=options.adapter, **how)
    asyncio.run(episodes(model, scripts[:4], 4))  # first calls of every kernel
    model.counters = type(model.counters)()
    batched: dict[str, float] = {"episodes": options.episodes}
    with clock(batched):
        asyncio.run(episodes(model, scripts, options.concurrency))
    counters = model.counters
    batched |= {
        "sampled_tokens": counters.sampled_tokens,
        "context_tokens_per_call": counters.prompt_tokens / counters.calls,
        "reused_share": 1 - counters.computed_tokens / counters.prompt_tokens,
        "calls_per_round": counters.calls / counters.rounds,
        "prefill_wall_seconds": counters.prefill_seconds,
        "decode_wall_seconds": counters.decode_seconds,
    }
    asyncio.run(model.close())
    result: dict[str, Any] = {"batched": rates(batched)}

    if options.vllm:
        result["vllm"] = by_vllm(options, scripts)

    if options.naive_episodes:
        policy.set_attn_implementation("sdpa")
        naive: dict[str, float] = {"episodes": options.naive_episodes}
        with clock(naive), torch.inference_mode():
            naive["sampled_tokens"] = one_by_one(policy, chat, scripts[: options.naive_episodes])
        result["one_by_one"] = rates(naive)
        result["ratio_sampled_tokens_per_cpu_second"] = round(
            result["batched"]["sampled_tokens_per_cpu_second"] / result["one_by_one"]["sampled_tokens_per_cpu_second"], 1
        )
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
