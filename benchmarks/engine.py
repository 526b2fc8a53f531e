"""The engine's ratios in one run: what was asked (issue "the distillation engine"), and what this machine gives.

    make bench                                # a quarter of an hour on two idle cores; installs TRL for its two rows
    python benchmarks/engine.py --only scoring memory --plot docs/images/engine-growth.svg

Both sides of a row run in turn in one process (memory: one process a side), on the same model and tokens; seconds are CPU
seconds of one thread, the least of the repeats, so a busy machine disturbs little. What top-k leaves out needs a teacher that
was trained: ``benchmarks/losses.py --bias``.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import importlib.util
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from cores import seconds_of_steps, told
from distillation import best_of, plain_loop, synthetic, view_by_view
from memory import high_water, random_row
from rollouts import Script, episodes, random_model, tokenizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry
from transformers import Qwen3ForCausalLM

from evolve_dag.config.schema import DistillationSettings, Regime
from evolve_dag.distillation.alignment import TeacherView
from evolve_dag.distillation.dataset import DistillationRow, make_rows
from evolve_dag.distillation.teacher import TeacherScorer
from evolve_dag.distillation.trainer import distill
from evolve_dag.inference import transformers as backend
from evolve_dag.inference.chat import ChatFormat
from evolve_dag.inference.recording import Recording
from evolve_dag.inference.transformers import TransformersModel
from evolve_dag.protocols import Request, Sampling
from evolve_dag.records import Message

aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table."""

    what: str
    asked: str
    found: str


def scoring() -> Iterator[Row]:
    """Step-wise and global injection, ten steps, groups of six."""
    model = random_model()
    for injection in ("step_wise", "global"):
        aligned = [synthetic(index // 6, f"t{index // 6}#{index % 6}", 2048, injection, (10, 10)) for index in range(12)]
        views = [one.views for one in aligned]
        seconds, _ = best_of(
            12, {"packed": partial(TeacherScorer(model).score, views), "alone": partial(view_by_view, model, aligned)}
        )
        ratio = seconds["alone"] / seconds["packed"]
        yield Row(f"teacher scoring, 10 steps, {injection}, against one prefill a step", "4", f"{ratio:.2f}")


def sampled() -> Iterator[Row]:
    """What keeping the sampler's distributions costs, against scoring the same views."""
    chat = ChatFormat.from_tokenizer(tokenizer())
    policy, scripts = random_model(chat.vocab_size), [Script(number) for number in range(96)]
    model = TransformersModel.load(copy.deepcopy(policy), chat, threads=1, max_batch=96)
    asyncio.run(episodes(model, scripts[:4], 4))
    # Timed where it is done: as the difference of rollouts with it and without, it drowns in how these differ among themselves.
    spent = [0.0]
    found = []
    with (
        patch.object(backend, "distribution", _timed(backend.distribution, spent)),
        patch.object(Recording, "add", _timed(Recording.add, spent)),
    ):
        for _ in range(8):
            spent[0] = 0.0
            with model.recording(64) as kept:
                views = asyncio.run(_viewed(model, chat, scripts))
                _timed(TeacherScorer(model.model).score, spent)(views, recording=kept)
            recorded, again = spent[0], [0.0]
            _timed(TeacherScorer(policy).score, again)(views)
            found.append(again[0] / recorded)
    what = "the same where the teacher sampled them itself: scoring against what recording takes"
    yield Row(what, "10", f"{median(found[1:]):.1f}")


def _timed(work: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    """``work``, its CPU seconds added to the one number in ``spent``."""

    def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.process_time()
        try:
            return work(*args, **kwargs)
        finally:
            spent[0] += time.process_time() - started

    return timed


async def _viewed(model: TransformersModel, chat: ChatFormat, scripts: list[Script]) -> list[list[TeacherView]]:
    """:func:`rollouts.episodes`, and what the teacher saw at each step."""

    async def one(number: int, script: Script) -> list[TeacherView]:
        messages, found = script.start, []
        for turn, (length, observation) in enumerate(script.turns):
            sampling = Sampling(max_tokens=length, seed=number * 100 + turn)
            completion = await model.generate(Request(messages, sampling, f"s{number}"))
            context = chat.encode(messages)
            found.append(TeacherView(f"t{number}#0", turn, (*context, *completion.token_ids), len(context)))
            action = Message("assistant", completion.text, completion.token_ids)
            messages = (*messages, action, Message("tool", observation))
        model.release(f"s{number}")
        return found

    return await asyncio.gather(*(one(number, script) for number, script in enumerate(scripts)))


def trl() -> Iterator[Row]:
    """Against TRL's GKDTrainer."""
    for shape, count, asked in (("small", 24, "1.5"), ("smollm2", 4, "2.5")):
        what = f"distillation step, 15% action tokens, against TRL GKDTrainer, {shape}: tokens a second"
        if importlib.util.find_spec("trl") is None:
            yield Row(what, asked, "trl is not installed: pip install -c constraints.txt -e '.[bench]'")
            continue
        from against_trl import compare

        found = compare(shape, count, 4 if shape == "small" else 2)
        differ, shipped = found["largest_loss_difference"], found["ratio_top_64"]
        yield Row(what, asked, f"{found['ratio']:.2f} (losses differ by {differ:.0e}; top 64: {shipped:.2f})")


def peft() -> Iterator[Row]:
    """A training step as it ships against a plain loop around peft, which pads rows and computes logits everywhere."""
    model = random_model()
    aligned = [synthetic(index // 6, f"t{index // 6}#{index % 6}", 2048, "none") for index in range(24)]
    rows = make_rows(aligned, TeacherScorer(model).score([one.views for one in aligned]))
    settings = DistillationSettings(epochs=1)
    plain = partial(plain_loop, model, rows, settings, Regime())
    seconds, _ = best_of(4, {"plain": plain, "ours": partial(train, model, rows, settings.tokens_per_batch)})
    yield Row("training against a plain peft loop", "1.19 before", f"{seconds['plain'] / seconds['ours']:.2f}")


MEMORY = {"hidden": 256, "layers": 2, "vocabulary": 151_936}


def rows_of(model: Qwen3ForCausalLM, tokens: int) -> list[DistillationRow]:
    """Trajectories of 15% action tokens, scored by ``model``, ``tokens`` in all."""
    aligned = []
    while sum(len(one.row.ids) for one in aligned) < tokens:
        at = len(aligned)
        aligned.append(synthetic(at // 4, f"t{at // 4}#{at % 4}", model.config.vocab_size, "none", (9, 11), (7, 12)))
    return make_rows(aligned, TeacherScorer(model).score([one.views for one in aligned]))


def train(model: Qwen3ForCausalLM, rows: list[DistillationRow], tokens_per_batch: int, **more: Any) -> None:
    settings = DistillationSettings(epochs=1, tokens_per_batch=tokens_per_batch)
    with tempfile.TemporaryDirectory() as folder:
        distill(model, rows, settings=settings, regime=Regime(), out=Path(folder), **more)


def peak(arm: str, size: int) -> None:
    """Print by how much the largest resident size grows, MB, and CPU seconds: ``size`` tokens trained, or episodes played."""
    torch.set_num_threads(1)
    work = _rollouts_of(size) if arm == "episodes" else _training_on(arm, size)
    started, before = time.process_time(), high_water()
    work()
    print((high_water() - before) / 2**20, time.process_time() - started)


def _rollouts_of(size: int) -> Callable[[], None]:
    chat = ChatFormat.from_tokenizer(tokenizer())
    model = TransformersModel.load(random_model(chat.vocab_size), chat, threads=1, max_batch=EPISODES)
    asyncio.run(episodes(model, [Script(number) for number in range(2)], 2))
    return lambda: asyncio.run(episodes(model, [Script(number) for number in range(size)], EPISODES))


def _training_on(arm: str, tokens: int) -> Callable[[], Any]:
    model = random_model() if arm == "growth" else random_model(**MEMORY)
    # Made, not scored, which would raise the mark.
    rows = [random_row(1024, model.config.vocab_size, 64, seed) for seed in range(tokens // 1024)]
    if arm != "plain":
        return partial(train, model, rows, TOKENS if arm == "growth" else tokens)
    return partial(plain_loop, model, rows, DistillationSettings(epochs=1, tokens_per_batch=tokens), Regime())


def in_process(arm: str, size: int) -> tuple[float, float]:
    command = [sys.executable, __file__, "--peak", arm, str(size)]
    out = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(out[-2]), float(out[-1])


def memory() -> Iterator[Row]:
    """The largest step at Qwen3's vocabulary, of few tokens: the loop's logits of 8K do not fit into 24 GB."""
    (plain, _), (fused, _) = in_process("plain", 2048), in_process("fused", 2048)
    found = f"{fused / plain:.2f} ({fused:.0f} of {plain:.0f} MB)"
    yield Row("peak memory of a step of 2K tokens, V = 151,936, against the full-logits loop", "at most 0.35", found)


class _Flops(TorchDispatchMode):
    """Counts what torch's own counter counts, without its hooks on modules, which frozen ones do not bear; and what that one
    leaves out: a CPU's attention (the pairs that a query sees, and nothing for scores computed again on the way back) and
    products in place."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        packet = aten.addmm if func is aten.addmm_.default else func._overloadpacket
        if packet in flop_registry:
            self.total += flop_registry[packet](*args, **kwargs, out_val=out)
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu:
            self.total += 4 * _seen(args[0], args[1], any(args[4:5]), kwargs.get("attn_mask"))
        elif packet is aten._scaled_dot_product_flash_attention_for_cpu_backward:
            self.total += 8 * _seen(args[1], args[2], args[7], kwargs.get("attn_mask"))
        return out


def _seen(query: torch.Tensor, key: torch.Tensor, causal: bool, mask: torch.Tensor | None) -> int:
    """Pairs of a query and a key, times heads and width."""
    rows, keys = query.shape[-2], key.shape[-2]
    pairs = rows * (rows + 1) // 2 if causal else rows * keys if mask is None else int((mask > -torch.inf).sum())
    return query.shape[0] * query.shape[1] * query.shape[3] * pairs


def utilisation() -> Iterator[Row]:
    """FLOPs of one training against those of a plain product."""
    model = random_model(hidden=256, layers=6)
    rows = rows_of(model, 8192)
    with _Flops() as counted:
        train(model, rows, 1 << 20)
    a = torch.randn(1024, 1024)
    seconds, _ = best_of(6, {"product": lambda: [a @ a for _ in range(20)], "training": lambda: train(model, rows, 1 << 20)})
    share = counted.total / seconds["training"] / (20 * 2 * 1024**3 / seconds["product"])
    yield Row("forward + backward against the matmul peak, fp32, hidden 256 x 6", "at least 45%", f"{100 * share:.0f}%")


def rollouts() -> Iterator[Row]:
    """One ``generate`` of transformers per turn for all episodes at once, left-padded; both sample as many tokens."""
    chat = ChatFormat.from_tokenizer(tokenizer())
    policy, scripts = random_model(chat.vocab_size), [Script(number) for number in range(64)]
    model = TransformersModel.load(copy.deepcopy(policy), chat, threads=1, max_batch=64)
    asyncio.run(episodes(model, scripts[:4], 4))
    seconds, _ = best_of(
        3,
        {
            "evolve": lambda: asyncio.run(episodes(model, scripts, 64)),
            "generate": partial(_generate_per_turn, policy, chat, scripts),
        },
    )
    ratio = seconds["generate"] / seconds["evolve"]
    yield Row("rollouts, episodes a second, against one `generate` per turn on the same batch", "at least 2", f"{ratio:.2f}")


@torch.inference_mode()
def _generate_per_turn(policy: Qwen3ForCausalLM, chat: ChatFormat, scripts: list[Script]) -> None:
    messages: list[tuple[Message, ...]] = [script.start for script in scripts]
    for turn in range(len(scripts[0].turns)):
        ids = [torch.tensor(chat.encode(one)) for one in messages]
        batch = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True, padding_side="left")
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(one) for one in ids], batch_first=True, padding_side="left")
        most = max(script.turns[turn][0] for script in scripts)
        out = policy.generate(
            batch, attention_mask=mask, do_sample=True, top_k=0, max_new_tokens=most, eos_token_id=None, pad_token_id=0
        )
        for index, script in enumerate(scripts):
            length, observation = script.turns[turn]
            new = tuple(out[index, batch.shape[1] : batch.shape[1] + length].tolist())
            messages[index] = (*messages[index], Message("assistant", "", new), Message("tool", observation))


def iteration() -> Iterator[Row]:
    """Night 1 of configs/pocket.yaml on one thread, in CPU seconds."""
    spent = seconds_of_steps(1, time.process_time)
    whole = sum(spent.values())
    rest = 1 - sum(spent[step] for step in ("trajectories", "contexts", "adapter", "scores")) / whole
    yield Row("one pocket iteration, CPU seconds of one thread", "at most 30 s on 2 cores", f"{whole:.0f} ({told(spent)})")
    yield Row("of it outside rollouts, scoring, training and evaluation", "at most 5%", f"{100 * rest:.0f}%")


def elsewhere() -> Iterator[Row]:
    """Ratios that take processes, and so scripts, of their own; wall time, so they want an idle machine."""
    what, asked = "two processes against one (gloo, same global batch), tokens a second", "1.6 on 2 idle cores"
    if len(os.sched_getaffinity(0)) < 2:
        yield Row(what, asked, "one core here")
    else:
        one, two = (
            float(rate) for rate in re.findall(r"processes: (\d+) tokens/s", _printed("cores.py", "training", "1", "2"))
        )
        yield Row(what, asked, f"{two / one:.2f}")
    what, asked = "Ray, two workers against one, rollouts behind an endpoint of 50 ms", "1.8, same digests"
    if importlib.util.find_spec("ray") is None:
        yield Row(what, asked, "ray is not installed: make test-ray")
        return
    yield Row(what, asked, _printed("ray_workers.py", "1").strip().splitlines()[-1])


def _printed(script: str, *arguments: str) -> str:
    command = [sys.executable, str(Path(__file__).with_name(script)), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


SIZES = (1, 2, 4, 8, 16, 32)
TOKENS, EPISODES = 2048, 16
"""What 1 x is."""


def growth(plot: Path | None = None) -> Iterator[Row]:
    """Training on 1 to 32 times 2,048 tokens, and rollouts of 1 to 32 times 16 episodes; each in a process of its own."""
    arms = {"growth": "training on 32 x the tokens", "episodes": "rollouts of 32 x the episodes, as many in flight"}
    sizes = {"growth": TOKENS, "episodes": EPISODES}
    measured = {arm: [in_process(arm, sizes[arm] * size) for size in SIZES] for arm in arms}
    for arm, what in arms.items():
        (_, first), (_, last) = measured[arm][1], measured[arm][-1]  # the first steps of a process are dearer
        yield Row(f"growth: CPU seconds of {what} over 16 times those on 2 x", "1", f"{last / first / 16:.2f}")
        peaks = " ".join(f"{mb:.0f}" for mb, _ in measured[arm])
        yield Row(f"growth: peak memory of {what.split()[0]}, 1 x to 32 x, MB", "flat", peaks)
    if plot is not None:
        plot.write_text(_svg(measured), encoding="utf-8")


LINES = (
    ("growth", 1, "#1f77b4", "training: CPU seconds", 8),
    ("growth", 0, "#d62728", "training: peak memory", 16),
    ("episodes", 1, "#17becf", "rollouts: CPU seconds", -6),
    ("episodes", 0, "#ff7f0e", "rollouts: peak memory", -4),
)
"""Arm, column, colour, name, and where the name stands beside the end of its line."""


def _svg(measured: dict[str, list[tuple[float, float]]]) -> str:
    """Cost against size, both axes by factors of two; seconds and megabytes relative to the first point."""
    lines = []
    for arm, column, colour, name, below in LINES:
        base = measured[arm][0][column]
        at = [(60 + 80 * i, 330 - 56 * _log2(max(one[column] / base, 2**-0.5))) for i, one in enumerate(measured[arm])]
        path = " ".join(f"{x:.0f},{y:.0f}" for x, y in at)
        lines.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        lines.append(f'<text x="{at[-1][0] + 6:.0f}" y="{at[-1][1] + below:.0f}" fill="{colour}">{name}</text>')
    for i, size in enumerate(SIZES):
        lines.append(f'<text x="{60 + 80 * i}" y="360" text-anchor="middle">{size} x</text>')
        lines.append(f'<text x="45" y="{334 - 56 * i}" text-anchor="end">{2**i} x</text>')
    style = 'font-family="sans-serif" font-size="12" style="background:#fff"'
    title = f'<text x="60" y="20">Cost against size, relative to {TOKENS:,} tokens and {EPISODES} episodes</text>'
    body = "\n".join([title, *lines])
    return f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 620 380" {style}>\n{body}\n</svg>\n'


def _log2(value: float) -> float:
    return float(torch.tensor(value).log2())


PARTS: dict[str, Callable[..., Iterator[Row]]] = {
    "scoring": scoring,
    "sampled": sampled,
    "trl": trl,
    "peft": peft,
    "memory": memory,
    "utilisation": utilisation,
    "rollouts": rollouts,
    "iteration": iteration,
    "elsewhere": elsewhere,
    "growth": growth,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--plot", type=Path, help="write the growth as SVG")
    parser.add_argument("--peak", nargs=2, metavar=("ARM", "SIZE"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.peak:
        peak(given.peak[0], int(given.peak[1]))
        return
    torch.set_num_threads(1)
    print("| what | asked | found |\n|---|---|---|")
    for name in given.only:
        for row in PARTS[name](given.plot) if name == "growth" else PARTS[name]():
            print(f"| {row.what} | {row.asked} | {row.found} |", flush=True)


if __name__ == "__main__":
    main()
