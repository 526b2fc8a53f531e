"""How long a warm-up takes here, and the loop after it, from a pass of the model itself over a few hundred tokens."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from evolve_dag.inference.folders import model_folder
from evolve_dag.warmup import folder

if TYPE_CHECKING:
    from evolve_dag.config.schema import Experiment

TRIED = 256
"""Tokens of the pass that is timed."""
TRAINED = 3.0
"""What learning from a token costs, in passes forward."""
PLAYED = 1.5
"""The same for a token of an episode: a tenth of them are sampled, which costs some four passes forward each (batches of 8)."""


def estimate(experiment: Experiment, tokens: int) -> str:
    """A line for people: the warm-up, and an iteration of the loop.

    Args:
        tokens: that one pass over the scripted episodes computes.
    """
    settings, second = folder.section(experiment), seconds_per_token(experiment)
    minute = tokens / settings.episodes * second / 60  # of a pass forward over one episode
    warm = (settings.episodes * TRAINED + 2 * settings.development * PLAYED) * minute
    tasks, group = experiment.tasks, experiment.rollout.group_size
    learned = (tasks.train.count or 0) * group
    asked = 2 * (learned + (tasks.development.count or 0) + (tasks.held_out.count or 0))  # with and without experience
    loop = (asked * PLAYED + learned * experiment.distillation.epochs * TRAINED) * minute
    rounds = f"about {warm:.0f} minutes a round of {tokens:,} tokens, at most {settings.rounds} of them"
    return f"{1 / second:,.0f} tokens/s forward: {rounds}; then {loop:.0f} minutes an iteration"


def seconds_per_token(experiment: Experiment) -> float:
    """Of a pass forward, at the threads and on the device of the experiment, the machine's other work included."""
    import torch

    from evolve_dag.distillation.trainer import load_model

    start, runtime = folder.start(experiment), experiment.runtime
    model = load_model(model_folder(start), start.dtype).to(runtime.device).eval()
    before = torch.get_num_threads()
    torch.set_num_threads(runtime.threads)
    try:
        ids = torch.ones((1, TRIED), dtype=torch.long, device=runtime.device)
        with torch.inference_mode():
            model(input_ids=ids)
            begun = time.perf_counter()
            model(input_ids=ids)
        return (time.perf_counter() - begun) / TRIED
    finally:
        torch.set_num_threads(before)
