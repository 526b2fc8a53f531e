"""The divergence against its definition, and what every divergence must be."""

from __future__ import annotations

import math

import torch
from evolve_renyi import renyi_half


def test_it_is_what_its_definition_says() -> None:
    p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.9, 0.1]])
    expected = -2 * math.log(math.sqrt(0.45) + math.sqrt(0.05))
    assert math.isclose(renyi_half(p.log(), q.log()).item(), expected, rel_tol=1e-6)
    assert torch.allclose(renyi_half(p.log(), q.log()), renyi_half(q.log(), p.log()))


def test_it_is_zero_between_equals_and_its_gradient_is_a_number() -> None:
    p = torch.log_softmax(torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), -1)
    assert torch.allclose(renyi_half(p, p), torch.zeros(5), atol=1e-6)
    impossible, logits = torch.tensor([[0.0, -math.inf]]), torch.zeros(1, 2, requires_grad=True)
    renyi_half(impossible, torch.log_softmax(logits, -1)).sum().backward()
    assert logits.grad is not None
    assert logits.grad.isfinite().all()
