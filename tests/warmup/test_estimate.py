"""What a warm-up and an iteration after it will take, said before they begin."""

from __future__ import annotations

import pytest
import torch

from evolve_dag.config.schema import Experiment
from evolve_dag.inference.folders import POCKET
from evolve_dag.warmup import estimate as module
from evolve_dag.warmup.estimate import estimate, seconds_per_token

EXPERIMENT = Experiment.model_validate(
    {
        "experiment": "estimated",
        "warmup": {"base": str(POCKET), "world": 1, "episodes": 96, "development": 48, "rounds": 2},
        "tasks": {
            "train": {"count": 48, "world": 100},
            "development": {"count": 64, "world": 200},
            "held_out": {"count": 200, "world": 300},
        },
        "rollout": {"group_size": 2},
        "distillation": {"epochs": 1},
        "runtime": {"threads": 1},
    }
)


def test_it_counts_episodes_that_are_learned_from_and_played(monkeypatch: pytest.MonkeyPatch) -> None:
    """An episode of 1,000 tokens at a millisecond each takes a second forward, three to learn and one and a half to play."""
    monkeypatch.setattr(module, "seconds_per_token", lambda experiment: 0.001)
    minutes = (96 * 3 + 2 * 48 * 1.5) / 60, ((96 + 64 + 200) * 2 * 1.5 + 96 * 3) / 60
    assert [round(one, 1) for one in minutes] == [7.2, 22.8]
    assert estimate(EXPERIMENT, 96_000) == (
        "1,000 tokens/s forward: about 7 minutes a round of 96,000 tokens, at most 2 of them; then 23 minutes an iteration"
    )


def test_it_times_the_model_itself_and_leaves_the_threads_as_they_were() -> None:
    before = torch.get_num_threads()
    assert 0 < seconds_per_token(EXPERIMENT) < 1
    assert torch.get_num_threads() == before
