"""Policies that vLLM samples from: an engine of our own in its own process, or servers that run already.

Messages become token ids here (:class:`~evolve_dag.inference.chat.ChatFormat`) and ids come back: nothing is tokenized a second
time, and text from outside cannot produce a control token. This process never imports vLLM.
"""

from __future__ import annotations

import asyncio
import math
from pathlib import Path
from typing import TYPE_CHECKING

from evolve_dag.errors import ContextOverflowError, ModelError, UnreachableError
from evolve_dag.inference.folders import model_folder
from evolve_dag.inference.vllm_source import Adapter, Ask, Source
from evolve_dag.protocols import Completion, Request
from evolve_dag.records import Message

if TYPE_CHECKING:
    from evolve_dag.config.schema import RuntimeSettings, VllmModelSettings
    from evolve_dag.inference.chat import ChatFormat


def open_vllm(settings: VllmModelSettings, *, runtime: RuntimeSettings, adapter: Path | None, check: bool = True) -> VllmModel:
    """The model of ``settings``, with ``adapter`` where there is one: on its servers, or on an engine of our own.

    Args:
        adapter: folder of a LoRA adapter in peft's format; servers must see it under the same path.
        check: compare log-probabilities of a probe with transformers + peft before anything is sampled. The model is loaded
            for it once per process, base and adapter (before the engine starts, so both need not fit at once).

    Raises:
        ModelError: no engine, no server, no adapter; or what is served is not what was asked for.
    """
    from evolve_dag.inference.chat import read_chat
    from evolve_dag.inference.vllm_probe import Probe, make_probe

    folder = model_folder(settings)
    served = Adapter.read(adapter) if adapter is not None else None
    chat = read_chat(folder)
    probe: Probe | None = make_probe(folder, served, chat, dtype=settings.dtype, device=runtime.device) if check else None
    source: Source
    if settings.servers:
        from evolve_dag.inference.vllm_servers import Servers, server_key

        source = Servers(
            settings.servers, model=settings.model, key=server_key(settings.key), timeout_seconds=settings.timeout_seconds
        )
    else:
        from evolve_dag.inference.vllm_process import EngineProcess

        source = EngineProcess.start(settings, runtime, folder, () if served is None else (served,))
    try:
        source.load(served, probe)
        return VllmModel(source, chat, served, vocabulary=_vocabulary(folder))
    except BaseException:
        source.close()
        raise


class VllmModel:
    """Implements :class:`~evolve_dag.protocols.LanguageModel`. :func:`open_vllm` makes it.

    Any number of event loops may use it, one after the other.

    Args:
        source: who samples; closed with the model.
        adapter: what is asked there; it must be loaded.
        vocabulary: ids of the model are below this.
    """

    def __init__(self, source: Source, chat: ChatFormat, adapter: Adapter | None = None, *, vocabulary: int) -> None:
        if chat.vocab_size > vocabulary:
            raise ModelError(
                f"the tokenizer has {chat.vocab_size} ids, the model knows {vocabulary}",
                "take the tokenizer that belongs to the model",
            )
        self.chat = chat
        self.adapter = adapter
        self.max_context = source.max_context
        self._source = source
        self._vocabulary = vocabulary
        self._stops = tuple(sorted(chat.stop_ids))

    async def generate(self, request: Request) -> Completion:
        """Sample one assistant turn.

        Raises:
            ContextOverflowError: the context is longer than the model takes.
            ModelError: or there is no answer after retries.
        """
        ids = tuple(self.chat.encode(request.messages))
        if len(ids) >= self.max_context:
            raise ContextOverflowError(
                f"the context is {len(ids)} tokens long, the model takes {self.max_context} with the answer",
                "lower rollout.max_tokens, shorten observations, or raise models.policy.context_tokens",
            )
        limit = min(request.sampling.max_tokens, self.max_context - len(ids))
        if limit < 1:
            raise ModelError(f"max_tokens is {request.sampling.max_tokens}", "ask for at least one token")
        ask = Ask(
            ids, request.sampling, limit, self._stops, self.adapter, session=request.session, schema=request.answer_schema
        )
        limit_seconds = self._source.timeout_seconds
        try:
            async with asyncio.timeout(limit_seconds):
                sampled = await asyncio.wrap_future(self._source.submit(ask))
        except TimeoutError:
            assert limit_seconds is not None
            self._source.late(limit_seconds)
            raise UnreachableError(
                f"vLLM gave no answer within {limit_seconds:g} s",
                "raise models.policy.timeout_seconds, or lower runtime.concurrency",
            ) from None
        if not sampled.ids or len(sampled.ids) != len(sampled.logprobs):
            raise ModelError(f"vLLM answered {len(sampled.ids)} ids with {len(sampled.logprobs)} log-probabilities")
        if not all(map(math.isfinite, sampled.logprobs)):
            raise ModelError("the model gives probabilities that are not numbers", "its weights or its adapter are broken")
        if not 0 <= min(sampled.ids) <= max(sampled.ids) < self._vocabulary:
            raise ModelError(f"vLLM answered an id beyond the model's {self._vocabulary}", "the servers serve another model")
        return Completion(
            self.chat.decode_action(sampled.ids),
            sampled.ids,
            sampled.logprobs,
            "stop" if sampled.ids[-1] in self.chat.stop_ids else "length",
            len(ids),
            sampled.cached,
        )

    def count_tokens(self, message: Message) -> int:
        """Tokens that ``message`` adds to a conversation, its markup included."""
        return len(self.chat.encode_parts([message])[0])

    def release(self, session: str) -> None:
        """The episode is over."""
        self._source.release(session)

    async def close(self) -> None:
        """End the engine, or the connections. Safe to call twice."""
        await asyncio.to_thread(self._source.close)


def _vocabulary(folder: Path) -> int:
    import json

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return int({**config, **(config.get("text_config") or {})}["vocab_size"])
