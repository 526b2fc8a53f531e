from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import evolve_dag.distillation.losses as losses_module
from evolve_dag.distillation.losses import (
    Teacher,
    default_chunk,
    token_losses,
    token_losses_from_hidden,
)

KINDS = ("forward_kl", "reverse_kl", "jsd")
OPTIONS = {"jsd": {"jsd_weight": 0.3}}


def log(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def random_pair(seed: int, n: int = 5, v: int = 11, scale: float = 2.0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    draw = torch.randn(2, n, v, generator=generator, dtype=torch.float64) * scale
    return draw[0], torch.log_softmax(draw[1], -1)


def keep_top(logprobs: torch.Tensor, k: int) -> Teacher:
    top, ids = logprobs.topk(k, dim=-1)
    tail = logprobs.scatter(1, ids, -torch.inf).logsumexp(-1)
    return Teacher(top, ids, tail)


# p = (1/2, 1/4, 1/4), q = (1/4, 1/4, 1/2); by hand, in nats.
P, Q = (0.5, 0.25, 0.25), (0.25, 0.25, 0.5)
LOG2 = math.log(2)
BY_HAND = {
    "forward_kl": 0.5 * LOG2 - 0.25 * LOG2,
    "reverse_kl": 0.5 * LOG2 - 0.25 * LOG2,
    # m = (3/8, 1/4, 3/8)
    "jsd": 0.5 * math.log(4 / 3) + 0.25 * math.log(2 / 3),
}


@pytest.mark.parametrize("kind", KINDS)
def test_constants_computed_by_hand(kind: str) -> None:
    loss, divergence = token_losses(kind, log(*Q), teacher=Teacher(log(*P)))
    assert loss.item() == pytest.approx(BY_HAND[kind], abs=1e-12)
    assert divergence.item() == pytest.approx(BY_HAND["forward_kl"], abs=1e-12)


def test_forward_and_reverse_are_not_swapped() -> None:
    p, q = (0.9, 0.05, 0.05), (0.4, 0.3, 0.3)
    forward = 0.9 * math.log(0.9 / 0.4) + 0.1 * math.log(0.05 / 0.3)
    reverse = 0.4 * math.log(0.4 / 0.9) + 0.6 * math.log(0.3 / 0.05)
    assert token_losses("forward_kl", log(*q), teacher=Teacher(log(*p)))[0].item() == pytest.approx(forward)
    assert token_losses("reverse_kl", log(*q), teacher=Teacher(log(*p)))[0].item() == pytest.approx(reverse)


def test_top_1_with_tail_by_hand() -> None:
    # Two classes: the first token and everything else; (1/2, 1/2) against (1/4, 3/4).
    teacher = Teacher(log(0.5), torch.tensor([[0]]), torch.tensor([0.5]).double().log())
    loss, _ = token_losses("forward_kl", log(*Q), teacher=teacher)
    assert loss.item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3), abs=1e-12)


def test_cross_entropy_is_minus_the_log_probability_of_the_sampled_id() -> None:
    loss, divergence = token_losses("cross_entropy", log(*Q), sampled_N=torch.tensor([2]))
    assert loss.item() == pytest.approx(LOG2)
    assert math.isnan(divergence.item())  # no teacher: not zero


def test_cross_entropy_reports_the_divergence_when_there_is_a_teacher() -> None:
    _, divergence = token_losses("cross_entropy", log(*Q), sampled_N=torch.tensor([2]), teacher=Teacher(log(*P)))
    assert divergence.item() == pytest.approx(BY_HAND["forward_kl"])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [0, 3])
def test_equal_distributions_diverge_by_zero(kind: str, k: int) -> None:
    _, p = random_pair(1)
    teacher = keep_top(p, k) if k else Teacher(p)
    loss, _ = token_losses(kind, p + 7.0, teacher=teacher)  # logits are free up to a constant
    assert loss.abs().max() < 1e-12


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_of_the_whole_vocabulary_is_the_full_divergence(kind: str) -> None:
    logits, p = random_pair(2)
    full, _ = token_losses(kind, logits, teacher=Teacher(p))
    top, _ = token_losses(kind, logits, teacher=keep_top(p, p.shape[1]))
    torch.testing.assert_close(top, full)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10_000), k=st.integers(1, 10), kind=st.sampled_from(KINDS), scale=st.floats(0.1, 4.0))
def test_top_k_with_tail_is_a_lower_bound(seed: int, k: int, kind: str, scale: float) -> None:
    logits, p = random_pair(seed, n=3, scale=scale)
    full, _ = token_losses(kind, logits, teacher=Teacher(p))
    top, _ = token_losses(kind, logits, teacher=keep_top(p, k))
    assert (top <= full + 1e-9).all()
    assert (top >= -1e-9).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), weight=st.floats(0.01, 0.99))
def test_jsd_is_bounded_by_the_entropy_of_its_weight(seed: int, weight: float) -> None:
    logits, p = random_pair(seed, scale=8.0)
    loss, _ = token_losses("jsd", logits, teacher=Teacher(p), jsd_weight=weight)
    entropy = -weight * math.log(weight) - (1 - weight) * math.log1p(-weight)
    assert (loss >= -1e-9).all()
    assert (loss <= entropy + 1e-9).all()


def test_jsd_near_its_ends_is_a_scaled_kl() -> None:
    logits, p = random_pair(3)
    weight = 1e-5
    loss, _ = token_losses("jsd", logits, teacher=Teacher(p), jsd_weight=weight)
    forward, _ = token_losses("forward_kl", logits, teacher=Teacher(p))
    torch.testing.assert_close(loss / weight, forward, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [*KINDS, "cross_entropy"])
@pytest.mark.parametrize("k", [0, 3, 11])
def test_gradients_against_finite_differences(kind: str, k: int) -> None:
    logits, p = random_pair(4, n=3)
    teacher = keep_top(p, k) if k else Teacher(p)
    sampled = torch.tensor([1, 0, 5])

    def loss(x: torch.Tensor) -> torch.Tensor:
        return token_losses(kind, x, teacher=teacher, sampled_N=sampled, **OPTIONS.get(kind, {}))[0].sum()

    assert torch.autograd.gradcheck(loss, (logits.requires_grad_(),))


def fused_and_plain(
    kind: str, teacher: Teacher | None, sampled: torch.Tensor, chunk: int | None, dtype: torch.dtype = torch.float64
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Loss, divergence and gradient on hidden states: chunk by chunk, and by autograd over all logits at once."""
    torch.manual_seed(0)
    head = torch.nn.Linear(6, 11, bias=True).to(dtype).requires_grad_(False)
    weight = torch.linspace(0.5, 2, len(sampled), dtype=dtype)  # tokens need not count alike
    results = []
    for fused in (True, False):
        hidden = torch.linspace(-2, 2, 6 * len(sampled), dtype=torch.float64).reshape(-1, 6).sin().to(dtype).requires_grad_()
        if fused:
            loss, divergence = token_losses_from_hidden(
                kind, hidden, head, teacher=teacher, sampled_N=sampled, chunk=chunk, **OPTIONS.get(kind, {})
            )
        else:
            loss, divergence = token_losses(kind, head(hidden), teacher=teacher, sampled_N=sampled, **OPTIONS.get(kind, {}))
        (loss * weight).sum().backward()
        results.append([loss.detach(), divergence, hidden.grad])
    return results[0], results[1]


@pytest.mark.parametrize("kind", [*KINDS, "cross_entropy"])
@pytest.mark.parametrize("k", [0, 1, 4, 10, 11])
@pytest.mark.parametrize("chunk", [None, 10, 3, 1])
def test_fused_chunks_equal_the_plain_computation(kind: str, k: int, chunk: int | None) -> None:
    _, p = random_pair(5, n=10)
    fused, plain = fused_and_plain(kind, keep_top(p, k) if k else Teacher(p), torch.arange(10), chunk)
    for a, b in zip(fused, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("chunk", [None, 3])
def test_cross_entropy_without_a_teacher_is_fused_too(chunk: int | None) -> None:
    fused, plain = fused_and_plain("cross_entropy", None, torch.arange(10), chunk)
    torch.testing.assert_close(fused[0], plain[0])
    torch.testing.assert_close(fused[2], plain[2])
    assert fused[1].isnan().all()


def test_fused_losses_of_half_precision_states_are_made_in_float32() -> None:
    _, p = random_pair(5, n=10)
    fused, plain = fused_and_plain("forward_kl", keep_top(p.float(), 4), torch.arange(10), 3, torch.bfloat16)
    assert fused[0].dtype == torch.float32
    torch.testing.assert_close(fused[0], plain[0])
    assert fused[2].dtype == torch.bfloat16
    torch.testing.assert_close(fused[2], plain[2], rtol=0.05, atol=0.01)


def test_fused_tails_keep_their_digits() -> None:
    """Kept tokens e^80 above the others: a common maximum would turn the tail into 0 and its logarithm into -inf."""
    head = torch.nn.Linear(3, 3, bias=False).requires_grad_(False)
    head.weight.copy_(torch.eye(3))
    hidden = torch.tensor([[120.0, 0.0, -5.0]], requires_grad=True)
    teacher = Teacher(torch.tensor([[0.9]]).log(), torch.tensor([[0]]), torch.tensor([0.1]).log())
    loss, _ = token_losses_from_hidden("forward_kl", hidden, head, teacher=teacher)
    loss.sum().backward()
    tail = math.log1p(math.exp(-5)) - 120
    assert loss.item() == pytest.approx(0.9 * math.log(0.9) + 0.1 * (math.log(0.1) - tail), rel=1e-6)
    assert hidden.grad is not None
    assert hidden.grad[0].tolist() == pytest.approx([0.1, -0.1 / (1 + math.exp(-5)), -0.1 / (1 + math.exp(5))], rel=1e-5)


def test_fused_losses_of_no_token() -> None:
    hidden = torch.zeros((0, 6), requires_grad=True)
    head = torch.nn.Linear(6, 11).requires_grad_(False)
    loss, _ = token_losses_from_hidden("cross_entropy", hidden, head, sampled_N=torch.zeros(0, dtype=torch.long))
    loss.sum().backward()
    assert loss.shape == (0,)


def test_chunks_hold_a_bounded_number_of_logits() -> None:
    assert default_chunk(2048) * 2048 == losses_module.CHUNK_ELEMENTS
    assert default_chunk(151_936) == losses_module.LEAST_CHUNK


def test_reverse_kl_is_finite_where_the_teacher_underflows() -> None:
    teacher = Teacher(torch.tensor([[0.0, -torch.inf, -3e4]]))
    logits = torch.zeros(1, 3, requires_grad=True)
    for kind in KINDS:
        loss, divergence = token_losses(kind, logits, teacher=teacher)
        (gradient,) = torch.autograd.grad(loss.sum(), logits)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(divergence).all()
        assert torch.isfinite(gradient).all()
    reverse, _ = token_losses("reverse_kl", logits, teacher=teacher)
    assert reverse.item() == pytest.approx(20 - math.log(3), rel=1e-5)  # two thirds of the mass at the floor of -30


def test_the_tail_keeps_its_digits_when_the_student_is_certain() -> None:
    # In float32 1 - sum(kept) is 0 here; the true tail is e^-40.
    logits = torch.tensor([[40.0, 0.0, -torch.inf]], requires_grad=True)
    teacher = Teacher(torch.tensor([[0.9]]).log(), torch.tensor([[0]]), torch.tensor([0.1]).log())
    loss, _ = token_losses("forward_kl", logits, teacher=teacher)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert loss.item() == pytest.approx(0.9 * math.log(0.9) + 0.1 * (math.log(0.1) + 40), rel=1e-6)
    assert gradient[0, 0].item() == pytest.approx(0.1, rel=1e-5)


def test_half_precision_logits_are_widened() -> None:
    logits, p = random_pair(6)
    half = logits.to(torch.bfloat16)
    loss, _ = token_losses("forward_kl", half, teacher=Teacher(p.float()))
    expected, _ = token_losses("forward_kl", half.double(), teacher=Teacher(p))
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)


def test_what_is_missing_is_said() -> None:
    with pytest.raises(ValueError, match="sampled"):
        token_losses("cross_entropy", log(*Q))
    with pytest.raises(ValueError, match="teacher"):
        token_losses("jsd", log(*Q))
    with pytest.raises(ValueError, match="unknown divergence 'kl'"):
        token_losses("kl", log(*Q), teacher=Teacher(log(*P)))
