"""Teacher scoring and student training, each against the plain way, in the same run.

    python benchmarks/distillation.py                      # the pocket policy's shape, about a minute
    python benchmarks/distillation.py --vocabulary 49152   # what a real vocabulary does to the output layer

Prints CPU seconds (best of --repeats, arms interleaved, so a busy machine disturbs little), tokens and ratios:

- scoring: the teacher views of all rollouts of a task packed, every distinct beginning once, against one sequence per step;
- training: rows packed likewise, the output layer on action tokens only, against a plain peft loop that pads rows of a batch
  and computes logits everywhere. Batches, optimizer and loss are the same.
"""

from __future__ import annotations

import argparse
import json
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from evolve_dag.config.schema import DistillationSettings, Regime
from evolve_dag.distillation.adapter import attach, detach
from evolve_dag.distillation.alignment import Aligned, StudentRow, TeacherView
from evolve_dag.distillation.batch import joined_teacher
from evolve_dag.distillation.dataset import DistillationRow, batches, make_rows, retention_rows
from evolve_dag.distillation.losses import token_losses
from evolve_dag.distillation.teacher import TeacherScorer, TeacherTargets
from evolve_dag.distillation.trainer import BETAS, distill, learning_rate
from evolve_dag.inference.prefix_tree import GrowingTree
from evolve_dag.inference.recording import distribution

ACTION, OBSERVATION, SYSTEM, HINT, HEADER = (16, 30), (20, 60), (90, 90), (20, 50), 3
"""Tokens: ranges as measured on pocket transcripts."""


def synthetic(
    seed: int,
    name: str,
    vocabulary: int,
    injection: str,
    steps: tuple[int, int] = (2, 9),
    action_tokens: tuple[int, int] = ACTION,
    observation: tuple[int, int] = OBSERVATION,
    hints: tuple[int, int] = HINT,
) -> Aligned:
    """A trajectory of random ids, by default as long as in the pocket world; rollouts of one ``seed`` share their question."""
    shared, order = random.Random(f"task {seed}"), random.Random(f"{seed} {name}")

    def some(bounds: tuple[int, int], order: random.Random = order) -> list[int]:
        return [order.randrange(8, vocabulary) for _ in range(order.randint(*bounds))]

    header = [1, 2, 3]
    system, clean = some(SYSTEM, random.Random("system")), some(observation, shared)
    notes = some(hints, random.Random("pool")) if injection == "global" else []
    spans: list[tuple[int, int]] = []
    views: list[TeacherView] = []
    for step in range(order.randint(*steps)):
        hint = some(hints) if injection == "step_wise" else []
        action = some(action_tokens)
        context = [*system, *notes, *clean, *hint, *header]
        views.append(TeacherView(name, step, (*context, *action), len(context), injected="item" if hint or notes else ""))
        start = len(system) + len(clean) + HEADER
        spans.append((start, start + len(action)))
        clean += [*header, *action]
        row = (*system, *clean)
        clean += some(observation)
    return Aligned(StudentRow(name, row, tuple(range(len(spans))), tuple(spans)), tuple(views))


def plain_loop(
    model: torch.nn.Module, rows: Sequence[DistillationRow], settings: DistillationSettings, regime: Regime
) -> list[float]:
    """What one writes first: logits of every position, then pick the action tokens."""
    wrapped = attach(model, rank=settings.rank, alpha=settings.alpha, seed=0)
    parameters = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=settings.learning_rate, betas=BETAS, weight_decay=settings.weight_decay)
    order = batches(rows, settings.tokens_per_batch, 0, 0)
    losses = []
    for step, chosen in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, len(order))
        part = [rows[index] for index in chosen]
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.row.ids) for row in part], batch_first=True)
        mask = torch.arange(ids.shape[1])[None] < torch.tensor([row.tokens for row in part])[:, None]
        logits = wrapped(input_ids=ids, attention_mask=mask.long(), use_cache=False).logits.float()
        picked = torch.cat([logits[b, torch.tensor(row.row.positions) - 1] for b, row in enumerate(part)])
        loss = token_losses(regime.divergence, picked, teacher=joined_teacher(part))[0].mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, settings.gradient_clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    detach(wrapped)
    return losses


def view_by_view(
    model: torch.nn.Module, aligned: Sequence[Aligned], top_k: int = 64, tokens: int = 4096
) -> list[TeacherTargets]:
    """One prefill per step, in batches of like length and of the same budget; logits on action tokens only here too."""
    views = [(owner, view) for owner, one in enumerate(aligned) for view in one.views]
    order = sorted(range(len(views)), key=lambda index: -len(views[index][1].ids))
    parts: list[tuple[np.ndarray, ...]] = [()] * len(views)
    with torch.inference_mode():
        while order:
            rows = max(1, tokens // len(views[order[0]][1].ids))
            chosen, order = order[:rows], order[rows:]
            ids = [torch.tensor(views[index][1].ids) for index in chosen]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(model.device)
            states = model.model(input_ids=padded, use_cache=False).last_hidden_state
            for row, index in enumerate(chosen):
                view = views[index][1]
                logits = model.lm_head(states[row, view.start - 1 : len(view.ids) - 1])
                parts[index] = tuple(one.cpu().numpy() for one in distribution(logits, top_k))
    found: list[list[tuple[np.ndarray, ...]]] = [[] for _ in aligned]
    for (owner, _), part in zip(views, parts, strict=True):
        found[owner].append(part)
    return [TeacherTargets(*(np.concatenate(column) for column in zip(*own, strict=True))) for own in found]


def distinct_tokens(aligned: Sequence[Aligned]) -> int:
    """Tokens of all teacher views, those that several share counted once."""
    tree = GrowingTree()
    for one in aligned:
        for view in reversed(one.views):
            tree.add(view.ids)
    return tree.tokens


def best_of(repeats: int, arms: dict[str, Callable[[], Any]]) -> tuple[dict[str, float], dict[str, Any]]:
    """Least CPU seconds per arm, arms taking turns, and what each returned last."""
    seconds = dict.fromkeys(arms, float("inf"))
    values: dict[str, Any] = {}
    for _ in range(repeats):
        for name, arm in arms.items():
            started = time.process_time()
            values[name] = arm()
            seconds[name] = min(seconds[name], time.process_time() - started)
    return seconds, values


def largest_difference(a: Sequence[TeacherTargets], b: Sequence[TeacherTargets]) -> float:
    return max(float(abs(x.logprobs - y.logprobs).max()) for x, y in zip(a, b, strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--trajectories", type=int, default=48)
    parser.add_argument("--group", type=int, default=6, help="trajectories of one task")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vocabulary", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    shape = {
        "vocab_size": given.vocabulary,
        "hidden_size": given.hidden,
        "intermediate_size": 3 * given.hidden,
        "num_hidden_layers": given.layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": given.hidden // 4,
        "tie_word_embeddings": True,
    }
    model = Qwen3ForCausalLM(Qwen3Config(**shape)).eval()
    results: dict[str, Any] = {"settings": vars(given)}
    for injection in ("step_wise", "global"):
        names = [
            (index // given.group, f"t{index // given.group}#{index % given.group}") for index in range(given.trajectories)
        ]
        aligned = [synthetic(task, name, given.vocabulary, injection, (given.steps, given.steps)) for task, name in names]
        views = [one.views for one in aligned]
        seconds, values = best_of(
            given.repeats,
            {
                "packed": partial(TeacherScorer(model).score, views),
                "per_step": partial(view_by_view, model, aligned),
            },
        )
        results[f"scoring {injection}"] = {
            "tokens_distinct": distinct_tokens(aligned),
            "tokens_per_step": sum(len(view.ids) for own in views for view in own),
            "seconds_packed": seconds["packed"],
            "seconds_per_step": seconds["per_step"],
            "ratio": seconds["per_step"] / seconds["packed"],
            "largest_difference": largest_difference(values["packed"], values["per_step"]),
        }
        if injection == "step_wise":
            rows = make_rows(aligned, values["packed"])
            rows += retention_rows(rows, aligned, DistillationSettings().retention, 0)
    settings, regime = DistillationSettings(epochs=1), Regime()
    with tempfile.TemporaryDirectory() as folder:
        seconds, values = best_of(
            given.repeats,
            {
                "evolve": lambda: distill(
                    model, rows, settings=settings, regime=regime, out=Path(folder), threads=given.threads
                ),
                "plain": lambda: plain_loop(model, rows, settings, regime),
            },
        )
    tokens = sum(row.tokens for row in rows)
    losses = [point.loss for point in values["evolve"].curve]
    results["training"] = {
        "tokens": tokens,
        "action_tokens": sum(row.action_tokens for row in rows),
        "tokens_per_second_evolve": tokens / seconds["evolve"],
        "tokens_per_second_plain": tokens / seconds["plain"],
        "ratio": seconds["plain"] / seconds["evolve"],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(losses, values["plain"], strict=True)),
    }
    if given.json:
        print(json.dumps(results, indent=1))
        return
    for name, facts in results.items():
        print(name)
        for key, value in facts.items():
            print(f"  {key:26} {value:.4g}" if isinstance(value, float) else f"  {key:26} {value}")


if __name__ == "__main__":
    main()
