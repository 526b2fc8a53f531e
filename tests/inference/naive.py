"""The oracle: one sequence, no cache, the whole context through the stock model for every token."""

from __future__ import annotations

from typing import Any

import torch

from evolve_dag.inference.chat import ChatFormat
from evolve_dag.inference.transformers import uniforms
from evolve_dag.protocols import Request


@torch.no_grad()
def answer(model: Any, chat: ChatFormat, request: Request) -> tuple[list[int], list[float]]:
    """Sampled ids and their log-probabilities at temperature 1."""
    sampling = request.sampling
    context = chat.encode(request.messages)
    ids: list[int] = []
    logprobs: list[float] = []
    draws = uniforms([sampling.seed], sampling.max_tokens)[0]
    for position in range(sampling.max_tokens):
        logits = model(input_ids=torch.tensor([context + ids]), use_cache=False).logits[0, -1].double()
        if sampling.temperature == 0:
            chosen = int(logits.argmax())
        else:
            weights = torch.softmax(logits / sampling.temperature, -1)
            if sampling.top_p < 1:
                order = sorted(range(len(weights)), key=lambda i: -float(weights[i]))
                total, kept = 0.0, set()
                for index in order:
                    if total >= sampling.top_p and kept:
                        break
                    kept.add(index)
                    total += float(weights[index])
                weights = torch.tensor([float(w) if i in kept else 0.0 for i, w in enumerate(weights)], dtype=torch.float64)
            target = float(draws[position]) * float(weights.sum())
            below = 0.0
            for index, weight in enumerate(weights.tolist()):
                below += weight
                if below > target:
                    chosen = index
                    break
        ids.append(chosen)
        logprobs.append(float(torch.log_softmax(logits, -1)[chosen]))
        if chosen in chat.stop_ids:
            break
    return ids, logprobs
