"""Distributions of sampled tokens: the most probable ones, and what is left."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from evolve_dag.inference import recording
from evolve_dag.inference.recording import distribution


def in_float64(logits: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    logprobs = logits.double().log_softmax(-1)
    top, ids = logprobs.topk(top_k, dim=-1)
    return top, ids, logprobs.scatter(1, ids, -torch.inf).logsumexp(-1)


@pytest.mark.parametrize("threads", [1, 4], ids=["parted", "torch's own"])
@pytest.mark.parametrize("spread", [0.1, 3.0, 60.0])
@pytest.mark.parametrize(("size", "top_k"), [(2, 1), (65, 64), (702, 64), (5000, 16)])
def test_head_and_tail_are_those_of_a_log_softmax(
    size: int, top_k: int, spread: float, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr(recording, "BLOCK", 3 * size)  # several blocks, the last one shorter
    logits = torch.randn(10, size, generator=torch.Generator().manual_seed(0)) * spread
    kept = logits.clone()
    top, ids, tail = distribution(logits, top_k)
    assert torch.equal(logits, kept)
    assert (top.dtype, ids.dtype, tail.dtype) == (torch.float32, torch.int32, torch.float32)
    expected_top, expected_ids, expected_tail = in_float64(logits, top_k)
    assert torch.equal(ids.long(), expected_ids)
    torch.testing.assert_close(top.double(), expected_top, atol=1e-4 * spread, rtol=1e-5)
    torch.testing.assert_close(tail.double(), expected_tail, atol=1e-4 * spread, rtol=1e-5)


def test_a_tail_of_next_to_nothing_keeps_its_digits() -> None:
    logits = torch.tensor([[100.0, 0.0, -1.0, -2.0], [0.0, 500.0, -300.0, -300.0]])
    _, _, tail = distribution(logits, 1)
    np.testing.assert_allclose(tail, [np.log(1 + np.exp(-1) + np.exp(-2)) - 100, -500.0], rtol=1e-6)


def test_of_equal_logits_as_many_as_asked_are_kept() -> None:
    """Half precision has many that are equal; so have rows of an embedding that were never trained."""
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0], [5.0, 4.0, 3.0, 2.0, 1.0]])
    top, ids, tail = distribution(logits, 2)
    assert [len(set(row)) for row in ids.tolist()] == [2, 2]
    assert ids[:, 0].tolist() == [0, 0]
    expected_top, _, expected_tail = in_float64(logits, 2)
    torch.testing.assert_close(top.double(), expected_top, atol=1e-6, rtol=0)
    torch.testing.assert_close(tail.double(), expected_tail, atol=1e-6, rtol=0)


def test_what_cannot_be_sampled_has_no_probability() -> None:
    logits = torch.tensor([[1.0, -torch.inf, -torch.inf, -torch.inf], [1.0, 1.0, -torch.inf, -torch.inf]])
    top, _, tail = distribution(logits, 2)
    torch.testing.assert_close(top, torch.tensor([[0.0, -torch.inf], [np.log(0.5), np.log(0.5)]], dtype=torch.float32))
    assert tail.tolist() == [-torch.inf, -torch.inf]


@pytest.mark.parametrize("broken", [torch.nan, torch.inf])
def test_a_row_that_is_no_numbers_says_so_and_no_other_does(broken: float) -> None:
    logits = torch.randn(3, 9)
    logits[1, 4] = broken
    top, _, _ = distribution(logits, 2)
    assert top.isnan().any(1).tolist() == [False, True, False]


def test_a_row_with_too_many_and_one_with_too_few_do_not_make_up_for_each_other() -> None:
    logits = torch.tensor([[3.0, 2.0, 2.0, 0.0], [4.0, 3.0, 2.0, 1.0], [torch.nan, 5.0, 4.0, 3.0]])
    top, ids, _ = distribution(logits, 2)
    assert ids[:2, 0].tolist() == [0, 0]
    assert ids[1].tolist() == [0, 1]
    assert top.isnan().any(1).tolist() == [False, False, True]


def test_no_token_has_no_distribution() -> None:
    assert [tuple(one.shape) for one in distribution(torch.zeros(0, 7), 3)] == [(0, 3), (0, 3), (0,)]


def test_logits_that_learn_are_read() -> None:
    top, _, _ = distribution(torch.zeros(1, 4, requires_grad=True), 1)
    assert not top.requires_grad
