"""Distillation against TRL's ``GKDTrainer`` (``lmbda=0, beta=0``): the same trajectories, batches, optimizer and losses.

    pip install -c constraints.txt -e '.[bench]'
    python benchmarks/against_trl.py                    # V = 2,048, hidden 128 x 4: two minutes on one core
    python benchmarks/against_trl.py --shape smollm2    # V = 49,152, hidden 576 x 30, on few tokens: ten minutes

Teacher and student are two models of random weights; both sides score with the teacher and train the student by LoRA, forward
KL over the whole vocabulary. CPU seconds of one thread, arms in turn, the least of --repeats counts. ``top 64`` is what ships.
"""

from __future__ import annotations

import argparse
import copy
import os
import tempfile
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from distillation import best_of, synthetic
from rollouts import random_model
from transformers import LlamaConfig, LlamaForCausalLM

from evolve_dag.config.schema import DistillationSettings, Regime
from evolve_dag.distillation.adapter import attach, detach
from evolve_dag.distillation.alignment import Aligned
from evolve_dag.distillation.dataset import DistillationRow, batches, make_rows
from evolve_dag.distillation.teacher import TeacherScorer
from evolve_dag.distillation.trainer import BETAS, distill, learning_rate

SETTINGS = DistillationSettings(epochs=1, top_k=0, warmup_steps=0, tokens_per_batch=1536)
ACTIONS = (7, 12)
"""Tokens of an action: 15% of all."""


def model(shape: str, seed: int) -> torch.nn.Module:
    torch.manual_seed(seed)
    if shape == "smollm2":
        config = LlamaConfig(
            vocab_size=49_152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            tie_word_embeddings=True,
        )
        return LlamaForCausalLM(config).eval()
    return random_model(seed=seed)


def trajectories(count: int, vocabulary: int) -> list[Aligned]:
    """Groups of four; nothing is injected, since GKD's teacher reads what its student reads."""
    names = [(index // 4, f"t{index // 4}#{index % 4}") for index in range(count)]
    return [synthetic(task, name, vocabulary, "none", (8, 12), ACTIONS) for task, name in names]


def ours(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    aligned: Sequence[Aligned],
    top_k: int,
    settings: DistillationSettings = SETTINGS,
    scored: int = 4096,
    **more: Any,
) -> list[float]:
    """Losses of ours; ``scored`` are the tokens of a pass of the teacher, ``more`` goes to :func:`distill`."""
    scorer = TeacherScorer(teacher, top_k=top_k, tokens_per_pass=scored)
    rows = make_rows(aligned, scorer.score([one.views for one in aligned]))
    with tempfile.TemporaryDirectory() as folder:
        settings = settings.model_copy(update={"top_k": top_k})
        result = distill(student, rows, settings=settings, regime=Regime(), out=Path(folder), **more)
    return [point.loss for point in result.curve]


def theirs(
    student: torch.nn.Module,
    teacher: torch.nn.Module,
    aligned: Sequence[Aligned],
    settings: DistillationSettings = SETTINGS,
    **more: Any,
) -> list[float]:
    """Losses of TRL; ``more`` are its own settings."""
    from datasets import Dataset
    from trl.experimental.gkd import GKDConfig, GKDTrainer

    options = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False} | more
    rows = make_rows(aligned, None)
    order = batches(rows, settings.tokens_per_batch, 0, 0)
    wrapped = attach(student, rank=settings.rank, alpha=settings.alpha, seed=0)
    learned = [one for one in wrapped.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=settings.learning_rate, betas=BETAS, weight_decay=settings.weight_decay)
    rate = partial(_share, settings, len(order))
    with tempfile.TemporaryDirectory() as folder:
        config = GKDConfig(
            output_dir=folder,
            lmbda=0.0,
            beta=0.0,
            per_device_train_batch_size=1,
            num_train_epochs=1,
            max_grad_norm=settings.gradient_clip,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            train_sampling_strategy="sequential",
            **options,
        )
        trainer = GKDTrainer(
            model=wrapped,
            teacher_model=teacher,
            args=config,
            data_collator=lambda items: padded([rows[index] for index in items[0]["rows"]]),
            train_dataset=Dataset.from_dict({"rows": order}),
            processing_class=_tokenizer(),
            optimizers=(optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, rate)),
        )
        trainer.train()
    detach(trainer.accelerator.unwrap_model(trainer.model))
    return [record["loss"] for record in trainer.state.log_history if "loss" in record]


def _share(settings: DistillationSettings, total: int, step: int) -> float:
    return learning_rate(settings, min(step, total - 1), total) / settings.learning_rate


def padded(rows: Sequence[DistillationRow]) -> dict[str, torch.Tensor]:
    """Labels stand on the actions, as one does by hand for a chat of several turns."""
    ids = [torch.tensor(row.row.ids) for row in rows]
    labels = [torch.full_like(one, -100) for one in ids]
    for row, one, label in zip(rows, ids, labels, strict=True):
        for start, end in row.row.spans:
            label[start:end] = one[start:end]
    pad = partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    mask = pad([torch.ones_like(one) for one in ids])
    return {"input_ids": pad(ids), "attention_mask": mask, "labels": pad(labels, padding_value=-100)}


def _tokenizer() -> Any:
    """TRL asks for one; nothing is tokenized."""
    from rollouts import tokenizer

    made = tokenizer()
    made.pad_token = "<|im_end|>"
    return made


def compare(shape: str, count: int, repeats: int) -> dict[str, float]:
    student, teacher = model(shape, 0), model(shape, 1)
    aligned = trajectories(count, int(student.config.vocab_size))
    tokens = sum(len(one.row.ids) for one in aligned)
    actions = sum(len(one.row.positions) for one in aligned)
    seconds, values = best_of(
        repeats,
        {
            "trl": lambda: theirs(copy.deepcopy(student), teacher, aligned),
            "all": lambda: ours(student, teacher, aligned, 0),
            "top 64": lambda: ours(student, teacher, aligned, 64),
        },
    )
    return {
        "tokens": tokens,
        "action_share": actions / tokens,
        "tokens_per_second_trl": tokens / seconds["trl"],
        "tokens_per_second": tokens / seconds["all"],
        "ratio": seconds["trl"] / seconds["all"],
        "ratio_top_64": seconds["trl"] / seconds["top 64"],
        "largest_loss_difference": max(abs(a - b) for a, b in zip(values["trl"], values["all"], strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--shape", choices=["small", "smollm2"], default="small")
    parser.add_argument("--trajectories", type=int)
    parser.add_argument("--repeats", type=int, default=2)
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    for name, value in compare(
        given.shape, given.trajectories or (8 if given.shape == "smollm2" else 24), given.repeats
    ).items():
        print(f"{name:26} {value:.4g}")


if __name__ == "__main__":
    main()
