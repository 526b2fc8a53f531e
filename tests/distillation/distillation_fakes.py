"""A tiny chat format, trajectories and models for the distillation tests."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from evolve_dag.distillation.alignment import TeacherContext, align
from evolve_dag.distillation.dataset import DistillationRow, make_rows
from evolve_dag.distillation.teacher import TeacherScorer
from evolve_dag.records import Message, Step, Trajectory

VOCABULARY = 132
HEADERS = {"system": 1, "user": 2, "tool": 3, "assistant": 4}
END = 5


class TinyChat:
    """One token per character; ``<header> content <end>`` per message.

    ``merges`` makes letter + newline one token, so text appended to a message changes the token before it, as
    byte-pair tokenizers do.
    """

    def __init__(self, merges: bool = False) -> None:
        self.merges = merges

    def text(self, content: str) -> list[int]:
        ids: list[int] = []
        for letter in content:
            if self.merges and letter == "\n" and ids and 73 <= ids[-1] < 99:
                ids[-1] = ids[-1] - 73 + 104
            else:
                ids.append(103 if letter == "\n" else 8 + ord(letter) - 32)
        return ids

    def action(self, content: str) -> tuple[int, ...]:
        return (*self.text(content), END)

    def encode(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> list[int]:
        ids: list[int] = []
        for message in messages:
            body = list(message.token_ids) or self.text(message.content)
            ids += [HEADERS[message.role], *body, *([] if body and body[-1] == END else [END])]
        return ids + [HEADERS["assistant"]] * generation_prompt


def tiny_model(seed: int = 0, kind: str = "qwen3", **changes: object) -> torch.nn.Module:
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        **changes,
    }
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "llama":
            return LlamaForCausalLM(LlamaConfig(**shape)).eval()
        return Qwen3ForCausalLM(Qwen3Config(**shape)).eval()


HINTS, ACTIONS = "ABCDEFGHIJ", "klmnopqrst"


def make_trajectory(chat: TinyChat, seed: int, *, steps: int = 3, hints: bool = True, reward: float | None = 1.0) -> Trajectory:
    """The question names a digit, the hint of every step a capital, and the action is the letter that belongs to it.

    Which capital belongs to a digit is for the student to learn: no model was trained on it.
    """
    order = random.Random(seed)
    digit = order.randrange(3)
    made = []
    for index in range(steps):
        hint = (digit * 3 + 1) % 10
        action = ACTIONS[hint if hints else order.randrange(10)]
        made.append(
            Step(
                index=index,
                text=action,
                token_ids=chat.action(action),
                logprobs=(),
                observation=None if index == steps - 1 else "see " + "".join(order.choices("abcdef", k=order.randrange(1, 6))),
                selected=(f"p{hint}",) if hints else (),
                injected=f"\nhint:\n{HINTS[hint] * 3}" if hints else "",
            )
        )
    return Trajectory(
        id=f"t{seed}#0",
        task_id=f"t{seed}",
        rollout=0,
        seed=seed,
        system="sys",
        question=f"q{digit}",
        steps=tuple(made),
        status="answered",
        reward=reward,
    )


def global_injection(trajectory: Trajectory, step: int) -> TeacherContext:
    """The same notes in the system message of every step."""
    messages = list(trajectory.history(step))
    messages[0] = replace(messages[0], content=messages[0].content + "\nnotes:\nuse it")
    return TeacherContext(tuple(messages), ("p1",), "\nnotes:\nuse it")


def train_to_follow_hints(model: torch.nn.Module, steps: int = 180) -> torch.nn.Module:
    """With a hint in the last message the action is the hint's letter; without one, any letter."""
    chat, order = TinyChat(), random.Random(0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.99))
    for at in range(steps):
        rows, targets = [], []
        for _ in range(24):
            trajectory = make_trajectory(chat, order.randrange(1 << 30), steps=1 + order.randrange(3), hints=False)
            messages = list(trajectory.history(len(trajectory.steps) - 1))
            hint = order.randrange(10)
            if order.random() < 0.8:
                messages[-1] = replace(messages[-1], content=f"{messages[-1].content}\nhint:\n{HINTS[hint] * 3}")
            context, action = chat.encode(messages), chat.action(ACTIONS[hint])
            rows.append(torch.tensor([*context, *action]))
            targets.append(torch.tensor([-100] * len(context) + list(action)))
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
        labels = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
        loss = model(input_ids=ids, labels=labels).loss
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (at + 1) / 20) * (1 - 0.9 * at / steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


def make_scored_rows(
    model: torch.nn.Module, seeds: Sequence[int], inject: object, *, top_k: int = 8, hints: bool = True, steps: int = 3
) -> list[DistillationRow]:
    chat = TinyChat()
    aligned = [align(make_trajectory(chat, seed, steps=steps, hints=hints), chat, inject) for seed in seeds]
    targets = TeacherScorer(model, top_k=top_k).score([one.views for one in aligned])
    return make_rows(aligned, targets)
