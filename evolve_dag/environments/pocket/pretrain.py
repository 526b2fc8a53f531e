"""Pretrains the pocket policy: a tiny Qwen3 on scripted transcripts (``evolve pocket pretrain``).

Data parallel over processes with one thread each: at this size two threads in one process gain next to nothing.
Everything follows from the seed and the number of processes.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

from evolve_dag.environments.pocket.muon import Muon
from evolve_dag.environments.pocket.script import DWELL_ON_MARKS, MODES, SIMPLE_MODES, Transcript, transcripts
from evolve_dag.environments.pocket.tokenizer import END_OF_TURN, PAD, build_tokenizer
from evolve_dag.environments.pocket.world import PRETRAINING_SEEDS
from evolve_dag.inference.folders import folder_digest, shipped

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

SLIP, CONTEXT, ACTION = 0, 1, 2
"""Role of a token: a slip of the scripted agent, what the policy reads, what it writes."""


@dataclass(frozen=True, slots=True)
class PretrainSettings:
    """How the shipped weights were made."""

    seed: int = 0
    tokens: int = 18_000_000
    """Tokens seen, padding excluded, over all processes."""
    processes: int = 2
    context_weight: float = 0.1
    """Weight of tokens that the policy does not write, against 1 for its actions: what tools return repeats names, and
    copying is learned sooner from it. Slips have no weight at all."""
    simple_share: float = 0.2
    """First part of training, without principles: the tool grammar, copying and matching come first."""
    tokens_per_batch: int = 1280
    """Padded tokens of one step and process."""
    adam_rate: float = 3e-3
    """Learning rate of embeddings and norms (AdamW)."""
    muon_rate: float = 0.02
    """Learning rate of matrices (Muon)."""
    weight_decay: float = 0.01
    warmup_steps: int = 50
    decay_from: float = 0.4
    """Share of training after which the rates fall linearly."""
    final_rate: float = 0.02
    """Last rate as a share of the first."""
    longest: int = 768
    """Transcripts with more tokens are left out."""
    modes: Mapping[str, float] = field(default_factory=lambda: dict(MODES))
    """What stands in the context of a transcript, and how often."""
    dwell_on_marks: bool = False
    """Transcripts that meet marks and rows often (:data:`~evolve_dag.environments.pocket.script.DWELL_ON_MARKS`)."""
    decisions: float = 0.0
    """Share of the transcripts that end with the decision whether a case in the context is that of the question."""
    until: float = 1.0
    """Share of the schedule after which the stage ends."""
    start: str | None = None
    """Folder of a model to continue from, or the name of one that ships; None starts anew."""
    hidden: int = 128
    layers: int = 5
    heads: int = 4
    kv_heads: int = 2
    feed_forward: int = 384


RECIPE = (
    PretrainSettings(until=0.7267),
    PretrainSettings(
        seed=1,
        tokens=9_000_000,
        simple_share=0.0,
        decay_from=0.25,
        warmup_steps=20,
        muon_rate=0.015,
        adam_rate=2.2e-3,
        dwell_on_marks=True,
        modes={"none": 0.15, "step": 0.58, "global": 0.24, "case": 0.03},
    ),
)
"""Stages that made the shipped weights: all modes, then one that dwells on marks and what is said about them."""
_DECIDING = PretrainSettings(
    seed=77,
    tokens=3_000_000,
    processes=1,
    simple_share=0.0,
    decay_from=0.3,
    warmup_steps=20,
    muon_rate=0.01,
    adam_rate=1.5e-3,
    dwell_on_marks=True,
    modes={"none": 0.15, "step": 0.6, "global": 0.25},
    decisions=0.85,
    start="pocket",
)
CASES = (_DECIDING, replace(_DECIDING, seed=78, tokens=2_000_000, muon_rate=0.007, adam_rate=1e-3))
"""Stages that follow for ``pocket-cases``, in one process: mostly decisions whether a case is that of the question."""


class Encoder:
    """Transcript -> token ids and roles, by the chat template; an action ends with its end-of-turn."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self._inner = tokenizer._tokenizer
        self._end = tokenizer.convert_tokens_to_ids(END_OF_TURN)
        self._newline = self._ids("\n")
        self.header = {
            "system": self._ids("<|im_start|>system\n"),
            "user": self._ids("<|im_start|>user\n"),
            "tool": self._ids("<|im_start|>user\n<tool_response>\n"),
            "assistant": self._ids("<|im_start|>assistant\n"),
        }
        self._footer = {
            "system": self._ids("<|im_end|>\n"),
            "user": self._ids("<|im_end|>\n"),
            "tool": self._ids("\n</tool_response><|im_end|>\n"),
        }

    def _ids(self, text: str) -> list[int]:
        return self._inner.encode(text, add_special_tokens=False).ids

    def __call__(self, transcript: Transcript) -> tuple[list[int], list[int]]:
        """Ids and roles of one transcript (:data:`CONTEXT`, :data:`ACTION` or :data:`SLIP`); same length."""
        ids: list[int] = []
        roles: list[int] = []
        for message, target in zip(transcript.messages, transcript.targets, strict=True):
            header, content = self.header[message.role], self._ids(message.content)
            ids += header
            roles += [CONTEXT] * len(header)
            if message.role == "assistant":
                action = [*content, self._end]
                ids += [*action, *self._newline]
                roles += [ACTION if target else SLIP] * len(action) + [CONTEXT] * len(self._newline)
            else:
                rest = content + self._footer[message.role]
                ids += rest
                roles += [CONTEXT] * len(rest)
        return ids, roles


def new_model(settings: PretrainSettings, vocabulary: int, pad: int, end: int) -> Any:
    """A fresh Qwen3 of pocket size (about 0.84 million parameters)."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=settings.hidden,
        intermediate_size=settings.feed_forward,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.kv_heads,
        head_dim=settings.hidden // settings.heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=pad,
        bos_token_id=None,
        eos_token_id=end,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
    )
    return Qwen3ForCausalLM(config)


Document = tuple[list[int], list[int]]
"""Token ids and roles of one transcript."""


def batches(rank: int, settings: PretrainSettings, encode: Encoder, modes: Mapping[str, float]) -> Iterator[list[Document]]:
    """Endless batches of documents of like length, at most ``tokens_per_batch`` padded tokens each."""
    rng = Random(f"{settings.seed}/{rank}/{sorted(modes)}")
    seeds = itertools.count(PRETRAINING_SEEDS + settings.seed * 10_000_000 + rank * 1_000_000 + len(modes) * 100_000)
    curriculum = DWELL_ON_MARKS if settings.dwell_on_marks else None
    source = (encode(t) for t in transcripts(rng, seeds, modes=modes, curriculum=curriculum, decisions=settings.decisions))
    while True:
        documents = [d for d in itertools.islice(source, 1000) if len(d[0]) <= settings.longest]
        documents.sort(key=lambda d: len(d[0]) + rng.random() * 8)
        groups: list[list[Document]] = [[]]
        for document in documents:  # sorted, so the newest is the longest
            if groups[-1] and len(document[0]) * (len(groups[-1]) + 1) > settings.tokens_per_batch:
                groups.append([])
            groups[-1].append(document)
        rng.shuffle(groups)
        yield from (group for group in groups if any(ACTION in roles for _, roles in group))  # some hold nothing but slips


def _padded(rows: Sequence[Sequence[int]], value: int) -> torch.Tensor:
    import torch

    width = max(map(len, rows))
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])


def _rate(step: int, done: float, s: PretrainSettings) -> float:
    warm = min(1.0, (step + 1) / s.warmup_steps)
    fall = 1.0 if done < s.decay_from else max(s.final_rate, (1 - done) / (1 - s.decay_from))
    return warm * fall


def _worker(rank: int, settings: PretrainSettings, out: str, port: int) -> None:
    import torch
    import torch.distributed as dist
    import torch.nn.functional as F

    torch.set_num_threads(1)
    world = settings.processes
    if world > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=world)
    tokenizer = build_tokenizer()
    torch.manual_seed(settings.seed)
    model = new_model(settings, len(tokenizer), tokenizer.pad_token_id, tokenizer.eos_token_id)
    if settings.start is not None:
        model = model.from_pretrained(shipped().get(settings.start, settings.start))
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    parameters = matrices + rest
    muon = Muon(matrices, settings.weight_decay)
    adam = torch.optim.AdamW(rest, lr=settings.adam_rate, betas=(0.9, 0.98), weight_decay=0.0)
    encode = Encoder(tokenizer)
    simple, full = batches(rank, settings, encode, SIMPLE_MODES), batches(rank, settings, encode, settings.modes)
    weights = torch.tensor([0.0, settings.context_weight, 1.0])
    seen, started, recent = 0.0, time.time(), []
    for step in itertools.count():
        done = seen / settings.tokens
        if done >= settings.until:
            break
        batch = next(simple if done < settings.simple_share else full)
        x_B_T = _padded([ids for ids, _ in batch], tokenizer.pad_token_id)
        roles_B_T = _padded([roles for _, roles in batch], SLIP)[:, 1:]
        keep = roles_B_T != SLIP
        hidden_N_D = model.model(x_B_T, use_cache=False).last_hidden_state[:, :-1][keep]
        nll_N = F.cross_entropy(model.lm_head(hidden_N_D), x_B_T[:, 1:][keep], reduction="none")
        roles_N = roles_B_T[keep]
        action = roles_N == ACTION
        ((nll_N * weights[roles_N]).sum() / action.sum()).backward()
        loss = nll_N.detach()[action].mean()
        count = float(sum(len(ids) for ids, _ in batch))
        flat = torch.cat([p.grad.reshape(-1) for p in parameters] + [torch.tensor([loss.item(), count])])
        if world > 1:
            dist.all_reduce(flat)
        seen += flat[-1].item()
        recent.append(flat[-2].item() / world)
        offset = 0
        for p in parameters:
            p.grad.copy_(flat[offset : offset + p.numel()].view_as(p) / world)
            offset += p.numel()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        scale = _rate(step, done, settings)
        muon.step(settings.muon_rate * scale)
        for group in adam.param_groups:
            group["lr"] = settings.adam_rate * scale
        adam.step()
        model.zero_grad()
        if rank == 0 and step % 1000 == 999:
            save(model, tokenizer, Path(out), settings, recent)
        if rank == 0 and step % 100 == 99:
            elapsed = time.time() - started
            line = {
                "step": step + 1,
                "tokens": int(seen),
                "loss": round(math.fsum(recent[-100:]) / 100, 4),
                "seconds": round(elapsed),
                "tokens_per_second": round(seen / elapsed),
                "done": round(min(1.0, seen / settings.tokens), 4),
            }
            with Path(out, "progress.jsonl").open("a") as file:
                file.write(json.dumps(line) + "\n")
    if rank == 0:
        save(model, tokenizer, Path(out), settings, recent)
    if world > 1:
        dist.destroy_process_group()


def save(model: Any, tokenizer: Any, out: Path, settings: PretrainSettings, losses: Sequence[float]) -> None:
    """Weights in safetensors, config, tokenizer and how they were made.

    Written beside and renamed: a process that has the old weights mapped keeps them whole.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=out, prefix=".new-") as fresh:
        model.save_pretrained(fresh)
        tokenizer.save_pretrained(fresh)
        for file in sorted(Path(fresh).iterdir()):
            file.replace(out / file.name)
    made = {
        "settings": asdict(settings),
        "final_loss": round(sum(losses[-100:]) / max(1, len(losses[-100:])), 4),
        "steps": len(losses),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    made["digest"] = folder_digest(out)
    (out / "pretraining.json").write_text(json.dumps(made, indent=2) + "\n")


def pretrain(out: Path, settings: PretrainSettings, on_progress: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """Pretrain and write the model folder ``out``.

    Args:
        out: folder to write; made when absent.
        settings: size, data and schedule.
        on_progress: called with every new line of ``out/progress.jsonl`` (step, tokens, loss, done 0..1).
    """
    import socket

    import torch.multiprocessing as mp

    out.mkdir(parents=True, exist_ok=True)
    log = out / "progress.jsonl"
    log.write_text("")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = mp.start_processes(
        _worker, args=(settings, str(out), port), nprocs=settings.processes, join=False, start_method="spawn"
    )
    read = 0
    while not workers.join(timeout=1.0):
        lines = log.read_text().splitlines()
        for line in lines[read:]:
            if on_progress:
                on_progress(json.loads(line))
        read = len(lines)
    log.unlink(missing_ok=True)
    return out


def pretrain_recipe(
    out: Path,
    recipe: Sequence[PretrainSettings] = RECIPE,
    *,
    seed: int = 0,
    scale: float = 1.0,
    processes: int | None = None,
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> Path:
    """Run a recipe, :data:`RECIPE` or :data:`CASES`: the weights that ship, up to the machine's rounding.

    Args:
        out: folder to write.
        seed: for base policies of another draw.
        scale: share of the recipe's tokens.
        processes: one thread each; decides the result, as the seed does. None: as many as the recipe says.
        on_progress: gets every line of progress, with ``stage`` and with ``done`` over the whole recipe.
    """
    total = sum(stage.tokens * stage.until for stage in recipe)
    before = 0
    for number, stage in enumerate(recipe):
        settings = replace(
            stage,
            seed=stage.seed + len(recipe) * seed,
            tokens=int(stage.tokens * scale),
            processes=processes or stage.processes,
            start=str(out) if number else stage.start,
        )

        def report(line: dict[str, Any], number: int = number, before: int = before) -> None:
            if on_progress:
                done = (before + line["tokens"] / scale) / total
                on_progress({**line, "stage": number + 1, "done": min(1.0, done)})

        pretrain(out, settings, report)
        before += int(stage.tokens * stage.until)
    return out


__all__ = ["PAD", "Encoder", "PretrainSettings", "new_model", "pretrain", "pretrain_recipe"]
