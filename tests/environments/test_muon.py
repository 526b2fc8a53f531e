"""Muon in single precision against its definition and against torch's own."""

from __future__ import annotations

import pytest
import torch

from evolve_dag.environments.pocket.muon import Muon, orthogonalized


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 24), (2, 24, 8)])
def test_singular_values_come_near_one_and_the_directions_stay(shape: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    stack = torch.randn(shape)
    left, _, right = torch.linalg.svd(stack, full_matrices=False)
    inner = left.transpose(1, 2) @ orthogonalized(stack) @ right.transpose(1, 2)
    values = inner.diagonal(dim1=1, dim2=2)
    assert values.min() > 0.3
    assert values.max() < 1.3
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-3


def test_a_matrix_is_treated_alone_and_at_any_scale() -> None:
    torch.manual_seed(0)
    stack = torch.randn(4, 8, 12)
    whole = orthogonalized(stack)
    for one, of_stack in zip(stack, whole, strict=True):
        assert torch.allclose(orthogonalized(1000 * one[None])[0], of_stack, atol=1e-4)
    assert torch.equal(orthogonalized(torch.zeros(1, 3, 4)), torch.zeros(1, 3, 4))


def test_steps_are_those_of_torch_up_to_its_bfloat16() -> None:
    torch.manual_seed(0)
    start = [torch.randn(16, 16), torch.randn(16, 16), torch.randn(24, 16), torch.randn(8, 16)]
    ours, theirs = ([torch.nn.Parameter(p.clone()) for p in start] for _ in range(2))
    muon = Muon(ours, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, adjust_lr_fn="original")
    for _ in range(5):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        muon.step(0.02)
        reference.step()
    for a, b, begin in zip(ours, theirs, start, strict=True):
        moved = (b - begin).norm()
        assert (a - b).norm() < 0.03 * moved
