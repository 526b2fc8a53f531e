"""How sequences are cut into passes, and the last layer on the tokens that are asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from distillation_fakes import VOCABULARY, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, Olmo2Config, PreTrainedConfig, Qwen3MoeConfig

from evolve_dag.distillation.forward import Forward
from evolve_dag.inference import attention
from evolve_dag.inference.prefix_tree import prefix_tree

PACKED = Forward(tiny_model())
SOME = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=20)


@settings(max_examples=300, deadline=None)
@given(SOME, st.integers(1, 30))
def test_passes_hold_every_sequence_once_in_order_and_fit(sequences: list[list[int]], tokens: int) -> None:
    found = PACKED.passes(sequences, tokens)
    assert [index for chosen in found for index in chosen] == list(range(len(sequences)))
    for chosen in found:
        assert len(chosen) == 1 or prefix_tree([sequences[index] for index in chosen]).tokens <= tokens


def test_a_pass_ends_where_the_next_begins_otherwise() -> None:
    shared, other = list(range(10)), [50, 51]
    views = [[*shared, 20], [*shared, 21], [*shared, 22], [*other, 23], [*other, 24]]  # 11 12 13, then 16 17 distinct tokens
    assert PACKED.passes(views, 16) == [[0, 1, 2], [3, 4]], "by the budget alone the last would be a pass of its own"


def test_a_pass_that_is_not_nearly_full_goes_on() -> None:
    views = [[1, 2], [3, 4, 5, 6, 7, 8, 9, 10, 11], [3, 4, 5, 6, 7, 8, 9, 10, 12]]
    assert PACKED.passes(views, 11) == [[0, 1], [2]]


def test_nothing_asks_for_no_pass() -> None:
    assert PACKED.passes([], 10) == []


def other(config: type[PreTrainedConfig]) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    more = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16} if config is Qwen3MoeConfig else {}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    model: torch.nn.Module = AutoModelForCausalLM.from_config(config(**shape, **heads, **more))
    return model.eval()


MODELS: dict[str, tuple[Callable[[], torch.nn.Module], bool]] = {
    "qwen3": (tiny_model, True),
    "llama": (lambda: tiny_model(kind="llama"), True),
    "one layer": (lambda: tiny_model(num_hidden_layers=1), True),
    "experts": (lambda: other(Qwen3MoeConfig), True),
    "norms behind": (lambda: other(Olmo2Config), False),
}
"""And whether its last layer may leave tokens out."""

VIEWS = [[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 8, 9], [1, 2, 3, 8, 9, 10, 11, 12, 13], [20, 21], [1, 2, 3]]
PLACES: list[attention.Places] = [slice(2, -1), np.array([4, 1]), slice(3, 9), slice(0, 0), np.array([2])]
"""Some asked for twice, out of order, none of the fourth."""


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("queries", [192, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_states_at_some_places_are_those_of_all(
    kind: str, queries: int, recompute: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "QUERIES", queries)
    make, leaves_out = MODELS[kind]
    model = make()
    forward = Forward(model, recompute=recompute)
    width: list[int] = []
    forward.decoder.layers[-1].mlp.register_forward_pre_hook(lambda module, given: width.append(given[0].shape[1]))

    def gradients(states_N_H: torch.Tensor) -> dict[str, torch.Tensor]:
        model.zero_grad()
        (states_N_H * torch.linspace(-1, 2, states_N_H.numel()).view_as(states_N_H)).sum().backward()
        return {name: one.grad.clone() for name, one in model.named_parameters() if one.grad is not None}

    with forward.ready():
        everything, paths = forward.states(VIEWS)
        rows = np.concatenate([path[own] for path, own in zip(paths, PLACES, strict=True)])
        expected = everything[torch.from_numpy(rows)]
        wanted = gradients(expected)
        whole = set(width)
        width.clear()
        found = forward.states_at(VIEWS, PLACES)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        for name, one in gradients(found).items():
            torch.testing.assert_close(one, wanted[name], atol=1e-4, rtol=1e-4, msg=name)
    assert whole == {15}
    assert set(width) == ({len(set(rows.tolist()))} if leaves_out else whole)
    assert all("forward" not in vars(module) for module in model.modules()), "the layer is its own again"


def test_the_equality_above_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """A token that sees the one behind it gives other states."""
    right = attention.Chains.wanted_places
    monkeypatch.setattr(
        attention.Chains, "wanted_places", lambda own: [(n, np.minimum(at + 1, own.widths[n] - 1)) for n, at in right(own)]
    )
    forward = Forward(tiny_model())
    with forward.ready(), torch.no_grad():
        everything, paths = forward.states(VIEWS)
        rows = np.concatenate([path[own] for path, own in zip(paths, PLACES, strict=True)])
        assert (forward.states_at(VIEWS, PLACES) - everything[torch.from_numpy(rows)]).abs().max() > 1e-3


def test_without_packing_states_are_chosen_from_padded_rows() -> None:
    packed, padded = Forward(tiny_model()), Forward(tiny_model(), share=False)
    with torch.no_grad(), packed.ready(), padded.ready():
        torch.testing.assert_close(packed.states_at(VIEWS, PLACES), padded.states_at(VIEWS, PLACES), atol=1e-5, rtol=1e-5)


def test_states_at_no_place() -> None:
    forward = Forward(tiny_model())
    with torch.no_grad(), forward.ready():
        assert forward.states_at(VIEWS[:1], [slice(0, 0)]).shape == (0, 32)
