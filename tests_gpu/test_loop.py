"""Rollouts, and a whole iteration, on a GPU."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from evolve_dag.inference.folders import POCKET
from evolve_dag.inference.transformers import TransformersModel
from evolve_dag.protocols import Request, Sampling
from evolve_dag.records import Message


def answers(device: str, temperature: float) -> list[str]:
    model = TransformersModel.load(POCKET, device=device, max_batch=16)

    async def ask() -> list[str]:
        start = (Message("system", "Use the tools: search, visit. Then answer."),)
        requests = [
            Request(
                (*start, Message("user", f"question {n}")), Sampling(max_tokens=12, temperature=temperature, seed=n), f"s{n}"
            )
            for n in range(24)
        ]
        found = await asyncio.gather(*map(model.generate, requests))
        await model.close()
        return [one.text for one in found]

    return asyncio.run(ask())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_what_is_sampled_is_what_the_cpu_samples(temperature: float) -> None:
    """But for a draw that falls between two roundings."""
    here, there = answers("cpu", temperature), answers("cuda:0", temperature)
    assert sum(a == b for a, b in zip(here, there, strict=True)) >= 22


def test_an_iteration(tmp_path: Path) -> None:
    from small_lineage import SMALL, STEP_ORDER, iterate, small

    from evolve_dag.store.artifacts import Store

    store = iterate(Store(tmp_path), small(runtime=SMALL["runtime"] | {"device": "cuda:0"}))
    for step in STEP_ORDER:
        assert store.ref("small", 1, step) is not None
