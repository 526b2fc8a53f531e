"""The policy in this process: any causal language model of ``transformers``, asked by many episodes at once.

Calls that wait are gathered into *rounds*. A round computes, for every call, what its prompt has more than
what its session already holds, then samples all answers together. What comes out of a call depends on its
prompt and seed alone, not on its company (up to rounding); so calls that agree in both are computed once, as where an episode
with experience has not parted yet from the one without.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import logging
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from evolve_dag.errors import (
    ClosedError,
    ContextOverflowError,
    ExhaustedError,
    ModelError,
    UnreachableError,
    exhausted,
    first_line,
    out_of_memory,
)
from evolve_dag.inference import lora
from evolve_dag.inference.attention import ATTENTION, bare
from evolve_dag.inference.chat import ChatFormat, read_chat
from evolve_dag.inference.folders import same_angles
from evolve_dag.inference.freed import give_back
from evolve_dag.inference.guided import Guide, Guides
from evolve_dag.inference.host_memory import host_memory
from evolve_dag.inference.kernels import fused_layers
from evolve_dag.inference.kv import RoundCache, SlotPool, cache_share, tokens_in
from evolve_dag.inference.quantization import pretrained, require
from evolve_dag.inference.quiet import quiet_peft
from evolve_dag.inference.recording import Recording, distribution
from evolve_dag.protocols import Completion, Request
from evolve_dag.records import Message
from evolve_dag.store.layout import ADAPTER_CONFIG

log = logging.getLogger(__name__)

_SHARED_PREFIX = 16
"""Least tokens that new sessions must share before the shared part is computed once and copied."""
_PREFILL_TOKENS = 16_384
"""Most padded tokens of one forward pass over prompts; bounds the memory of activations."""
_COMPACT_BELOW = 0.6
"""Share of rows still sampling below which the finished ones are dropped; each time is one copy of the rest."""


@dataclass(slots=True)
class Counters:
    """What the model did since it was loaded."""

    rounds: int = 0
    calls: int = 0
    """Computed; calls that agree are one."""
    prompt_tokens: int = 0
    """Tokens of all contexts."""
    computed_tokens: int = 0
    """Tokens of contexts that went through the model, padding left out; the others were reused."""
    sampled_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


@dataclass(slots=True)
class _Call:
    request: Request
    ids: np.ndarray
    session: str
    future: asyncio.Future[Completion]
    limit: int
    """Most tokens to sample."""
    guide: Guide | None = None
    """Holds the answer to its schema."""

    @property
    def decided_by(self) -> object:
        """All that its answer follows from, so calls that agree in it are answered once. One with a guide is its own."""
        how = self.request.sampling
        seed = how.seed if how.temperature > 0 else 0
        return (self.ids.tobytes(), self.limit, how.temperature, how.top_p, seed) if self.guide is None else id(self)


class TransformersModel:
    """Implements :class:`~evolve_dag.protocols.LanguageModel`. Make it with :meth:`load`.

    One event loop at a time may use it; rounds run in one thread of its own, which alone touches the cache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        chat: ChatFormat,
        *,
        threads: int | None = None,
        max_batch: int = 128,
        cache_bytes: int | None = None,
    ) -> None:
        config = model.config.get_text_config()
        self.chat = chat
        self.max_context = _longest_context(config)
        self.counters = Counters()
        self._model: PreTrainedModel | None = model.eval()
        self._device = model.device
        self._threads = threads
        self._max_batch = max_batch
        self._most = max_batch
        """Calls that go through the model at once: fewer than ``max_batch`` once memory ran out."""
        self._pool = SlotPool(_cache_budget(config, model.dtype, model.device, cache_bytes), self.max_context)
        self._guides = Guides(chat)
        self._stops = torch.tensor(sorted(chat.stop_ids), device=model.device)
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="evolve-model")
        self._released: deque[str] = deque()
        self._anonymous = itertools.count()
        self._last_round = 0.1
        self._recording: Recording | None = None
        # State of the event loop that asks at the moment; see _reset.
        self._loop: asyncio.AbstractEventLoop | None = None
        self._waiting: list[_Call] = []
        self._live: set[str] = set()
        self._arrived = asyncio.Event()
        self._server: asyncio.Task[None] | None = None

    @classmethod
    def load(
        cls,
        path_or_model: str | Path | torch.nn.Module,
        tokenizer: Any = None,
        *,
        adapter_dir: str | Path | None = None,
        dtype: str = "float32",
        quantize: str = "none",
        device: str = "cpu",
        threads: int | None = None,
        max_batch: int = 128,
        merge: bool = True,
        cache_bytes: int | None = None,
    ) -> TransformersModel:
        """Load a policy.

        Args:
            path_or_model: a folder that ``from_pretrained`` reads, or a model that is in memory. The latter is
                used as it is, in evaluation mode; where an adapter is merged it is copied first.
            tokenizer: Hugging Face tokenizer, :class:`ChatFormat`, or a folder that holds a tokenizer; None reads
                it from the model's folder.
            adapter_dir: folder of a LoRA adapter that peft wrote.
            quantize: how the weights are kept (``models.policy.quantize``).
            merge: add adapters into the weights (unmerged they cost 20-37% of a rollout's time), where these are float32; else
                they stay beside, or much of what was learned is rounded away.
            threads: CPU threads of a forward pass; None leaves torch's setting.
            max_batch: most calls of one round.
            cache_bytes: memory for keys and values; None takes a quarter of what is available, 2 GiB at most on a CPU.

        Raises:
            ModelError: model, tokenizer or adapter cannot be read, or do not fit each other.
        """
        name = str(path_or_model) if isinstance(path_or_model, (str, Path)) else type(path_or_model).__name__
        model = _read_model(path_or_model, name, dtype, quantize, device)
        if adapter_dir is not None:
            model = _add_adapter(model, Path(adapter_dir), name, in_memory=isinstance(path_or_model, torch.nn.Module))
        if merge and hasattr(model, "merge_and_unload"):
            if isinstance(path_or_model, torch.nn.Module) and adapter_dir is None:
                model = copy.deepcopy(model)  # the caller may be training it
            model = lora.merge(model)
        if tokenizer is None or isinstance(tokenizer, (str, Path)):
            tokenizer = _read_tokenizer(tokenizer or path_or_model, name)
        chat = tokenizer if isinstance(tokenizer, ChatFormat) else ChatFormat.from_tokenizer(tokenizer)
        embeddings = model.get_input_embeddings().weight.shape[0]
        if chat.vocab_size > embeddings:
            raise ModelError(
                f"{name}: the tokenizer has {chat.vocab_size} ids, the model knows {embeddings}",
                "take the tokenizer that belongs to the model",
            )
        _choose_attention(model)
        _keep_together(model)
        return cls(model, chat, threads=threads, max_batch=max_batch, cache_bytes=cache_bytes)

    @property
    def model(self) -> PreTrainedModel:
        """The model itself, adapter merged in, for scoring in this process.

        Raises:
            ModelError: it was closed.
        """
        if self._model is None:
            raise ClosedError("the model was closed", "load it again")
        return self._model

    @contextmanager
    def recording(self, top_k: int) -> Iterator[Recording]:
        """Keep the distributions of all tokens that are sampled meanwhile (temperature 1, unrestricted)."""
        self._recording = Recording(top_k)
        try:
            yield self._recording
        finally:
            self._recording = None

    async def generate(self, request: Request) -> Completion:
        """Sample one assistant turn. An ``answer_schema`` is enforced where ``llguidance`` is installed; log-probabilities
        are those of the model without it.

        Raises:
            ContextOverflowError: the context is longer than the model takes.
            UnreachableError: it fails, as where a card does; no other call would fare better.
            ModelError: no answer fits the schema, its probabilities are no numbers, or it was closed.
        """
        _ = self.model  # closed?
        ids = np.array(self.chat.encode(request.messages), dtype=np.int64)
        if len(ids) >= self.max_context:
            raise ContextOverflowError(
                f"the context is {len(ids)} tokens long, the model takes {self.max_context} with the answer",
                "lower rollout.max_tokens, or shorten observations (environment.results, snippet_characters)",
            )
        limit = min(request.sampling.max_tokens, self.max_context - len(ids))
        if limit < 1:
            raise ModelError(f"max_tokens is {request.sampling.max_tokens}", "ask for at least one token")
        guide = self._guides.start(request.answer_schema) if request.answer_schema is not None else None
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._reset(loop)
        session = request.session or f"\0{next(self._anonymous)}"
        call = _Call(request, ids, session, loop.create_future(), limit, guide)
        self._waiting.append(call)
        if request.session:
            self._live.add(request.session)
        self._arrived.set()
        if self._server is None or self._server.done():
            self._server = loop.create_task(self._serve())
        return await call.future

    def count_tokens(self, message: Message) -> int:
        """Tokens that ``message`` adds to a conversation, its markup included."""
        return len(self.chat.encode_parts([message])[0])

    def release(self, session: str) -> None:
        """The episode is over: its slot may be used by another."""
        self._live.discard(session)
        self._released.append(session)
        self._arrived.set()

    async def close(self) -> None:
        """Wait for the round that runs, then free the weights and the cache. Safe to call twice."""
        self._model = None
        await asyncio.to_thread(self._executor.shutdown)
        self._pool.forget()
        give_back()

    # ------------------------------------------------------------------ gathering, in the event loop

    def _reset(self, loop: asyncio.AbstractEventLoop) -> None:
        """A new event loop asks: whoever waited in the last one is gone with it."""
        self._loop = loop
        self._waiting = []
        self._live = set()  # sessions that asked and were not released: they will ask again
        self._arrived = asyncio.Event()
        self._server = None

    async def _serve(self) -> None:
        """Run rounds until nobody waits."""
        loop = asyncio.get_running_loop()
        batch: list[_Call] = []
        try:
            while self._waiting:
                await self._settle()
                batch = self._take()
                if not batch:
                    continue
                model = self._model
                if model is None:
                    raise ClosedError("the model was closed while calls waited", "close it after the rollouts")
                results = await loop.run_in_executor(self._executor, self._round, model, batch)
                for call, result in zip(batch, results, strict=True):
                    if call.future.done():
                        continue
                    if isinstance(result, ModelError):
                        call.future.set_exception(result)
                    else:
                        call.future.set_result(result)
        except asyncio.CancelledError:
            for call in (*batch, *self._waiting):
                call.future.cancel()
            self._waiting = []
            raise
        except Exception as problem:
            known = isinstance(problem, (ModelError, ExhaustedError))
            error = problem if known else UnreachableError(f"the model failed: {problem!r}")
            for call in (*batch, *self._waiting):
                if not call.future.done():
                    call.future.set_exception(error)
            self._waiting = []

    async def _settle(self) -> None:
        """Return when a round should start.

        That is when every session that will ask again has asked, or enough calls wait, or the others let wait
        longer than a tenth of a round (they are at a slow tool).
        """
        before_waiting: int | None = None
        while True:
            seen, still = -1, 0
            while still < 3:  # whoever can run now runs first, and may ask
                still = still + 1 if len(self._waiting) == seen else 0
                seen = len(self._waiting)
                await asyncio.sleep(0)
            sessions = {call.session for call in self._waiting}
            if len(self._waiting) >= self._max_batch or self._live <= sessions or before_waiting == len(self._waiting):
                return
            self._arrived.clear()
            try:
                await asyncio.wait_for(self._arrived.wait(), min(max(0.1 * self._last_round, 0.002), 0.05))
                before_waiting = None
            except TimeoutError:
                # Not yet: on a busy machine this timer and the calls it should wait for come due together.
                before_waiting = len(self._waiting)

    def _take(self) -> list[_Call]:
        """The calls of the next round, first come first served, one per session."""
        batch: list[_Call] = []
        later: list[_Call] = []
        sessions: set[str] = set()
        for call in self._waiting:
            if call.future.done():  # its caller was cancelled
                continue
            if len(batch) < self._max_batch and call.session not in sessions:
                batch.append(call)
                sessions.add(call.session)
            else:
                later.append(call)
        self._waiting = later
        return batch

    # ------------------------------------------------------------------ computing, in the model's thread

    @torch.inference_mode()
    def _round(self, model: PreTrainedModel, calls: list[_Call]) -> list[Completion | ModelError]:
        begun = time.perf_counter()
        while self._released:
            self._pool.release(self._released.popleft())
        if self._threads is not None and torch.get_num_threads() != self._threads:
            torch.set_num_threads(self._threads)
        firsts: dict[object, _Call] = {}
        for call in calls:
            firsts.setdefault(call.decided_by, call)
        results: list[Completion | ModelError] = []
        rest, alone = list(firsts.values()), False
        while rest:
            longest = max(len(call.ids) + call.limit for call in rest)
            part = rest[: self._most]
            spent: str | None = None
            try:
                self._pool.narrow([call.session for call in rest], longest)
                part = part[: self._pool.rows_allowed(longest)]
                # On a GPU nobody has tried it: kernels are compiled by the shape there.
                with fused_layers(model) if self._device.type == "cpu" else nullcontext():
                    results.extend(self._compute(model, part))
                alone = False
            except Exception as problem:
                slots = self._pool.slots
                self._pool.forget()
                if not out_of_memory(problem):
                    error = UnreachableError(f"the model failed: {type(problem).__name__}: {problem}")
                    error.__cause__ = problem
                    results.extend([error] * len(part))
                else:
                    spent = first_line(problem)
                    if alone:  # once more, after what was kept was handed back
                        what = f"memory ran out over one call of {longest} tokens: {spent}"
                        raise ExhaustedError(what, "free memory of the device, or lower rollout.max_tokens") from problem
            if spent is not None:  # out of the handler: the traceback held every tensor of the round
                alone = len(part) == 1 and slots <= 1
                self._halve(part, max(len(part), slots), longest, spent)
                continue
            rest = rest[len(part) :]
            for call in part:
                if not call.request.session:
                    self._pool.release(call.session)
        self.counters.rounds += 1
        self._last_round = time.perf_counter() - begun
        found = dict(zip(firsts, results, strict=True))
        return [found[call.decided_by] for call in calls]

    def _halve(self, calls: list[_Call], slots: int, longest: int, told: str) -> None:
        """Half as many slots from now on, of ``longest`` tokens, and no more calls at once than that."""
        self._most = max(1, min(self._most, slots // 2))
        self._pool.shrink(self._most, longest)
        give_back()
        log.warning("memory ran out over %d calls and %d slots: %d from now on: %s", len(calls), slots, self._most, told)
        for call in calls:
            if call.request.answer_schema is not None:  # what was sampled has moved its guide
                call.guide = self._guides.start(call.request.answer_schema)

    def _compute(self, model: PreTrainedModel, calls: list[_Call]) -> list[Completion | ModelError]:
        begun = time.perf_counter()
        self._pool.prepare([call.session for call in calls], max(len(call.ids) + call.limit for call in calls))
        self._compute_shared_prefix(model, calls)
        held = [self._pool.acquire(call.session, call.ids) for call in calls]
        # Rows in the order of their slots: then a full round works on the slab itself, without a copy.
        order = sorted(range(len(calls)), key=lambda i: held[i][0])
        rows = [calls[i] for i in order]
        slots, starts = [held[i][0] for i in order], [held[i][1] for i in order]
        logits = self._prefill_distinct(model, rows, slots, starts)
        filled = time.perf_counter()
        tokens, logprobs, columns = self._decode(model, rows, slots, logits)
        self.counters.prefill_seconds += filled - begun
        self.counters.decode_seconds += time.perf_counter() - filled

        results: dict[int, Completion | ModelError] = {}
        for row, (index, call) in enumerate(zip(order, rows, strict=True)):
            count = int((tokens[row] >= 0).sum())
            ids = tokens[row, :count].tolist()
            # The last sampled token never went through the model, so it has no key and value.
            self._pool.hold(slots[row], len(call.ids), ids[:-1])
            if self._recording is not None:
                self._recording.add([*call.ids, *ids], len(call.ids), tuple(one[row, :count].copy() for one in columns))
            results[index] = self._completion(call, ids, logprobs[row, :count].tolist(), starts[row])
        return [results[index] for index in range(len(calls))]

    def _completion(self, call: _Call, ids: list[int], logprobs: list[float], cached: int) -> Completion | ModelError:
        if not np.isfinite(logprobs).all():
            return ModelError("the model gives probabilities that are not numbers", "its weights or its adapter are broken")
        if call.guide is not None and call.guide.problem is not None:
            return ModelError(f"the answer cannot be held to its schema: {call.guide.problem}", "ask with a simpler schema")
        self.counters.calls += 1
        self.counters.prompt_tokens += len(call.ids)
        self.counters.sampled_tokens += len(ids)
        finish: Literal["stop", "length"] = "stop" if ids[-1] in self.chat.stop_ids else "length"
        return Completion(self.chat.decode_action(ids), tuple(ids), tuple(logprobs), finish, len(call.ids), cached)

    def _compute_shared_prefix(self, model: PreTrainedModel, calls: list[_Call]) -> None:
        """What all new sessions start with (the system message) is computed once, for the first of them."""
        owners = set(self._pool.owners)
        fresh = [call for call in calls if call.session not in owners]
        if len(fresh) < 2:
            return
        first = fresh[0].ids
        shared = len(first)
        for call in fresh[1:]:
            common = min(shared, len(call.ids))
            differ = np.flatnonzero(first[:common] != call.ids[:common])
            shared = int(differ[0]) if len(differ) else common
        if shared - self._pool.best_prefix(first[:shared]) < _SHARED_PREFIX:
            return
        slot, start = self._pool.acquire(fresh[0].session, first[:shared])
        self._forward_prompts(model, [first[:shared]], [slot], [start])

    def _prefill_distinct(
        self, model: PreTrainedModel, calls: Sequence[_Call], slots: list[int], starts: list[int]
    ) -> torch.Tensor:
        """:meth:`_prefill`, where rollouts of a task that have not parted yet are one: computed once, then copied."""
        first: dict[bytes, int] = {}
        owners = [first.setdefault(call.ids.tobytes(), row) for row, call in enumerate(calls)]
        rows = list(first.values())
        logits = self._prefill(model, [calls[row] for row in rows], [slots[row] for row in rows], [starts[row] for row in rows])
        if len(rows) == len(calls):
            return logits
        for row, owner in enumerate(owners):
            if row != owner:
                self._pool.copy(slots[owner], slots[row], starts[row], calls[row].ids)
        place = {row: at for at, row in enumerate(rows)}
        return logits[torch.tensor([place[owner] for owner in owners], device=logits.device)]

    def _prefill(self, model: PreTrainedModel, calls: Sequence[_Call], slots: list[int], starts: list[int]) -> torch.Tensor:
        """Compute what the slots lack; logits [rows, vocabulary] after the last token of each prompt."""
        missing = [len(call.ids) - start for call, start in zip(calls, starts, strict=True)]
        logits: torch.Tensor | None = None
        for part in _buckets(missing):
            out = self._forward_prompts(
                model, [calls[i].ids for i in part], [slots[i] for i in part], [starts[i] for i in part]
            )
            if len(part) == len(calls):
                return out
            if logits is None:
                logits = out.new_empty(len(calls), out.shape[1])
            logits[torch.tensor(part, device=out.device)] = out
        assert logits is not None
        return logits

    def _forward_prompts(
        self, model: PreTrainedModel, prompts: Sequence[np.ndarray], slots: list[int], starts: list[int]
    ) -> torch.Tensor:
        """Run ``prompts[i][starts[i]:]`` through the model and keep their keys and values."""
        length = max(map(len, prompts))
        width = max(len(ids) - start for ids, start in zip(prompts, starts, strict=True))
        # New tokens stand at the right end, so that the last position is the wanted one in every row.
        tokens = np.zeros((len(prompts), width), dtype=np.int64)
        columns = np.full((len(prompts), width), -1, dtype=np.int64)
        for row, (ids, start) in enumerate(zip(prompts, starts, strict=True)):
            tokens[row, width - len(ids) + start :] = ids[start:]
            columns[row, width - len(ids) + start :] = np.arange(start, len(ids))
        self.counters.computed_tokens += sum(len(ids) - start for ids, start in zip(prompts, starts, strict=True))
        cache = RoundCache(self._pool, slots, length, self._device)
        logits = self._forward(model, torch.from_numpy(tokens), torch.from_numpy(columns), length, cache)
        for ids, slot, start in zip(prompts, slots, starts, strict=True):
            self._pool.hold(slot, start, ids[start:])
        return logits

    def _forward(
        self, model: PreTrainedModel, tokens: torch.Tensor, columns: torch.Tensor, length: int, cache: RoundCache
    ) -> torch.Tensor:
        """Logits [rows, vocabulary] at the last position.

        Args:
            tokens: [rows, new tokens].
            columns: [rows, new tokens], position of each token in its sequence; -1 marks padding.
            length: longest sequence, the new tokens included.
        """
        tokens, columns = tokens.to(self._device), columns.to(self._device)
        cache.place(columns, length)
        positions = columns.clamp(min=0)  # padding looks at the first token: a row that sees nothing would be NaN
        visible = torch.arange(length, device=self._device) <= positions[:, None, :, None]  # (B, 1, T, L)
        mask = torch.zeros(visible.shape, dtype=model.dtype, device=self._device)
        mask.masked_fill_(~visible, torch.finfo(model.dtype).min)
        out = model(
            input_ids=tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = out.logits[:, -1].float()
        return logits

    def _decode(
        self, model: PreTrainedModel, calls: Sequence[_Call], slots: list[int], logits: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, list[np.ndarray]]:
        """Sample until every row has ended.

        Returns:
            Ids (-1 behind the end) and log-probabilities, both [rows, steps], and what is recorded, [rows, steps, ...].
        """
        device, count = self._device, len(calls)
        steps = max(call.limit for call in calls)
        width = max(len(call.ids) + call.limit for call in calls)
        limits = torch.tensor([call.limit for call in calls], device=device)
        draw = _Sampler([call.request for call in calls], steps, device)
        tokens = torch.full((count, steps), -1, dtype=torch.long, device=device)
        logprobs = torch.zeros((count, steps), dtype=torch.float32, device=device)
        cache = RoundCache(self._pool, slots, width, device)
        rows = torch.arange(count, device=device)
        columns = torch.tensor([len(call.ids) for call in calls], device=device)
        running = torch.ones(count, dtype=torch.bool, device=device)
        guides = {row: call.guide for row, call in enumerate(calls) if call.guide is not None}
        recorded: list[torch.Tensor] = []
        for step in range(steps):
            guided: list[tuple[int, Guide]] = []
            if guides:
                live = zip(rows.tolist(), running.tolist(), strict=True)
                guided = [(place, guides[row]) for place, (row, runs) in enumerate(live) if runs and row in guides]
            chosen, chosen_logprobs = draw(logits, rows, step, _restrict(logits, guided) if guided else None)
            if guided:
                sampled = chosen.tolist()
                for place, guide in guided:
                    guide.advance(sampled[place])
            if self._recording is not None:
                columns_now = distribution(logits, self._recording.top_k)
                recorded = recorded or [one.new_empty((count, steps, *one.shape[1:])) for one in columns_now]
                for whole, now in zip(recorded, columns_now, strict=True):
                    whole[rows, step] = now
            tokens[rows, step] = torch.where(running, chosen, -1)
            logprobs[rows, step] = torch.where(running, chosen_logprobs, 0.0)
            running = running & ~torch.isin(chosen, self._stops) & (limits > step + 1)
            alive = int(running.sum())
            if alive == 0:
                break
            if alive <= _COMPACT_BELOW * len(rows):
                keep = running.nonzero()[:, 0]
                cache.compact(keep)
                rows, columns, limits, chosen, running = rows[keep], columns[keep], limits[keep], chosen[keep], running[keep]
            # A row that has ended stays where it is and writes again behind what its session holds.
            logits = self._forward(model, chosen[:, None], columns[:, None], int(columns.max()) + 1, cache)
            columns = columns + running
        return tokens.cpu(), logprobs.cpu(), [one.cpu().numpy() for one in recorded]


class _Sampler:
    """Draws one token per row. Token i of a call comes from the number u(seed, i) and the row's own logits."""

    def __init__(self, requests: Sequence[Request], steps: int, device: torch.device) -> None:
        settings = [request.sampling for request in requests]
        self._temperature = torch.tensor([s.temperature for s in settings], dtype=torch.float32, device=device)
        self._top_p = torch.tensor([s.top_p for s in settings], dtype=torch.float64, device=device)
        self._uniform = torch.from_numpy(uniforms([s.seed for s in settings], steps)).to(device)
        self._any_sampled = any(s.temperature > 0 for s in settings)
        self._all_sampled = all(s.temperature > 0 for s in settings)
        self._any_tempered = any(s.temperature not in (0, 1) for s in settings)
        self._any_truncated = any(s.top_p < 1 for s in settings)

    def __call__(
        self, logits: torch.Tensor, rows: torch.Tensor, step: int, restricted: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Chosen ids and their log-probabilities at temperature 1, both [rows].

        Args:
            logits: [rows, vocabulary], float32.
            rows: which of the requests the rows are.
            step: position in the completion.
            restricted: ``logits`` with -inf where nothing may be chosen; None: anything may.
        """
        logprobs = F.log_softmax(logits, dim=-1)
        if restricted is not None:
            logits = restricted
        greedy = logits.argmax(-1)
        if self._any_sampled:
            tempered = logprobs if restricted is None else F.log_softmax(logits, dim=-1)
            temperature = self._temperature[rows][:, None]
            if self._any_tempered:
                tempered = F.log_softmax(logits / torch.where(temperature > 0, temperature, 1.0), dim=-1)
            weights = tempered.double().exp()
            if self._any_truncated:
                weights = _nucleus(weights, self._top_p[rows][:, None])
            # Inverse of the distribution function over the ids in their order: no sorting, no state.
            below = weights.cumsum(-1)
            target = self._uniform[rows, step][:, None] * below[:, -1:]
            chosen = torch.searchsorted(below, target, right=True)[:, 0].clamp(max=logits.shape[-1] - 1)
            if not self._all_sampled:
                chosen = torch.where(temperature[:, 0] > 0, chosen, greedy)
        else:
            chosen = greedy
        return chosen, logprobs.gather(-1, chosen[:, None])[:, 0]


def _restrict(logits: torch.Tensor, guided: Sequence[tuple[int, Guide]]) -> torch.Tensor:
    """``logits`` [rows, vocabulary] with -inf where the guide of a row forbids the id; other rows as they are."""
    restricted = logits.clone()
    for place, guide in guided:
        mask = torch.from_numpy(guide.mask()).to(logits.device)
        restricted[place, len(mask) :] = -torch.inf  # the embedding may be padded
        restricted[place, : len(mask)].masked_fill_(~mask, -torch.inf)
    return restricted


def _nucleus(weights: torch.Tensor, top_p: torch.Tensor) -> torch.Tensor:
    """Zero all but the smallest set of most likely ids whose weight reaches ``top_p`` (the likeliest always stays)."""
    sorted_weights, order = weights.sort(dim=-1, descending=True, stable=True)
    before = sorted_weights.cumsum(-1) - sorted_weights
    drop = (before >= top_p) & (top_p < 1)
    drop[:, 0] = False
    return weights.masked_fill(torch.zeros_like(drop).scatter(-1, order, drop), 0.0)


def uniforms(seeds: Sequence[int], steps: int) -> np.ndarray:
    """Numbers in [0, 1) from (seed, position) alone, [seeds, steps] float64: splitmix64, counter-based."""
    with np.errstate(over="ignore"):
        keys = _splitmix(np.array([seed & (2**64 - 1) for seed in seeds], dtype=np.uint64))
        counters = np.arange(1, steps + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        mixed = _splitmix(keys[:, None] + counters[None, :])
    return (mixed >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _splitmix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _buckets(missing: Sequence[int]) -> list[list[int]]:
    """Rows that go through the model together: all of them, unless padding would cost more than the work."""
    rows = list(range(len(missing)))
    if max(missing) * len(rows) <= min(2 * sum(missing) + 1024, _PREFILL_TOKENS):
        return [rows]
    parts: list[list[int]] = []
    for row in sorted(rows, key=missing.__getitem__):
        part = parts[-1] if parts else []
        if part and missing[row] <= 2 * missing[part[0]] + 16 and missing[row] * (len(part) + 1) <= _PREFILL_TOKENS:
            part.append(row)
        else:
            parts.append([row])
    return [sorted(part) for part in parts]


def _longest_context(config: Any) -> int:
    """Positions that the model knows; a sliding window counts as the end, because the cache keeps all columns, and so do other
    angles, which would have to be those of the columns that it has."""
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    unknown = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if unknown:
        raise ModelError(
            f"{config.model_type} has layers of kind {', '.join(sorted(unknown))}, which keep no keys and values",
            "use a model whose layers are all attention (Qwen3, Llama), or serve this one through an endpoint",
        )
    limits = [getattr(config, "max_position_embeddings", None) or 2**20, same_angles(config.to_dict())]
    if getattr(config, "layer_types", None) is None or kinds != {"full_attention"}:
        windows = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        limits += [window for window in windows if window is not None]
    return int(min(limits))


def _cache_budget(config: Any, dtype: torch.dtype, device: torch.device, cache_bytes: int | None) -> int:
    """Tokens whose keys and values fit."""
    if cache_bytes is None:
        # On the host not what is free: files that the system keeps in memory for speed make room.
        free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else host_memory()[1]
        cache_bytes = cache_share(free, device.type)
    return tokens_in(cache_bytes, config, dtype)


def _choose_attention(model: Any) -> None:
    """The function above where the model goes through transformers' attention interface, else what it has."""
    base = bare(model)
    if getattr(base.config.get_text_config(), "attn_logit_softcapping", None) is not None:
        base.set_attn_implementation("eager")
    elif getattr(base, "_supports_attention_backend", False) and getattr(base, "_supports_sdpa", False):
        base.set_attn_implementation(ATTENTION)


def _keep_together(model: Any) -> None:
    """Of a head in half precision that has no gradients torch makes a copy for every row of a batch whose last positions lie
    apart, as they do behind a prompt: a third of the time of rollouts with an adapter on a CPU. In float32 it does not."""
    head = model.get_output_embeddings()
    if head.weight.dtype != torch.float32:
        head.register_forward_pre_hook(lambda _, states: (states[0].contiguous(),))


def _read_model(path_or_model: str | Path | torch.nn.Module, name: str, dtype: str, quantize: str, device: str) -> Any:
    if isinstance(path_or_model, torch.nn.Module):
        return path_or_model
    require(quantize, device)
    return _reading(
        f"model {name}",
        "the folder must hold config.json and intact *.safetensors",
        lambda: pretrained(path_or_model, dtype=dtype, quantize=quantize, device=device),
    )


def _read_tokenizer(path_or_model: str | Path | torch.nn.Module, name: str) -> ChatFormat:
    if isinstance(path_or_model, torch.nn.Module):
        raise ModelError(f"{name}: a model in memory comes without tokenizer", "pass tokenizer=")
    return read_chat(path_or_model)


def _add_adapter(model: Any, adapter_dir: Path, name: str, *, in_memory: bool) -> Any:
    from peft import PeftModel

    if not (adapter_dir / ADAPTER_CONFIG).is_file():
        raise ModelError(f"adapter {adapter_dir}: there is no {ADAPTER_CONFIG}", "name the folder that peft wrote")
    base = copy.deepcopy(model) if in_memory else model
    return _reading(
        f"adapter {adapter_dir}",
        f"it must be intact and made for {name}; materialize it again",
        lambda: _read_adapter(PeftModel, base, adapter_dir),
    )


def _read_adapter(kind: Any, base: Any, adapter_dir: Path) -> Any:
    with quiet_peft():
        return kind.from_pretrained(base, str(adapter_dir))


def _reading(what: str, remedy: str, read: Callable[[], Any]) -> Any:
    try:
        return read()
    except ModelError:
        raise
    except Exception as problem:  # transformers, peft and safetensors share no base class
        if out_of_memory(problem):
            raise exhausted(what, problem) from problem
        raise ModelError(f"{what}: cannot be read: {type(problem).__name__}: {problem}", remedy) from problem
