"""Packed sequences: what the tree says, it says of each sequence; and a model under it gives what it gives without."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from evolve_dag.errors import ModelError
from evolve_dag.inference import attention
from evolve_dag.inference.attention import ATTENTION, our_attention, packed_states, padded_states, takes_chains
from evolve_dag.inference.prefix_tree import hosts, prefix_tree

SOME = st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(SOME)
def test_every_sequence_can_be_read_back_and_every_beginning_is_there_once(sequences: list[list[int]]) -> None:
    tree = prefix_tree(sequences)
    beginnings = {tuple(one[:end]) for one in sequences for end in range(1, len(one) + 1)}
    assert tree.tokens == len(tree.positions) == len(beginnings)
    assert [tree.ids[path].tolist() for path in tree.paths] == sequences
    assert all(tree.positions[path].tolist() == list(range(len(path))) for path in tree.paths)


@settings(max_examples=300, deadline=None)
@given(SOME)
def test_a_token_sees_its_own_sequence_and_nothing_else(sequences: list[list[int]]) -> None:
    tree = prefix_tree(sequences)
    sees: dict[int, list[int]] = {}
    for chain in tree.chains:
        before = [at for start, end in chain.prefix for at in range(start, end)]
        assert len(before) == chain.depth
        for at in range(chain.start, chain.end):
            sees[at] = [*before, *range(chain.start, at + 1)]
    assert sorted(sees) == list(range(tree.tokens))
    for path in tree.paths:
        for position, at in enumerate(path.tolist()):
            assert sees[at] == path[: position + 1].tolist()


@settings(max_examples=200, deadline=None)
@given(SOME)
def test_a_host_begins_with_its_guest_and_is_its_own(sequences: list[list[int]]) -> None:
    found = hosts(sequences)
    for guest, host in enumerate(found):
        assert sequences[host][: len(sequences[guest])] == sequences[guest]
        assert found[host] == host
    distinct = {tuple(one) for one in sequences}
    ends = {one for one in distinct if not any(other != one and other[: len(one)] == one for other in distinct)}
    assert len(set(found)) == len(ends)


def test_chains_by_hand() -> None:
    tree = prefix_tree([[1, 2, 3, 4], [1, 2, 5], [1, 2, 5, 6, 7], [8], [1, 2]])
    # The longest first: 1 2 5 6 7; 3 4 hangs on its first two; 8 begins anew. The others are parts of it.
    assert tree.ids.tolist() == [1, 2, 5, 6, 7, 3, 4, 8]
    assert [(one.start, one.end, one.prefix) for one in tree.chains] == [(0, 5, ()), (5, 7, ((0, 2),)), (7, 8, ())]


def test_nothing_to_pack() -> None:
    assert prefix_tree([]).tokens == 0
    with pytest.raises(ValueError, match="empty sequence"):
        prefix_tree([[1], []])


SHAPE = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
}


def model_of(kind: str, **changes: object) -> torch.nn.Module:
    torch.manual_seed(0)
    shape = {**SHAPE, **changes}
    model = LlamaForCausalLM(LlamaConfig(**shape)) if kind == "llama" else Qwen3ForCausalLM(Qwen3Config(**shape))
    for parameter in model.parameters():  # the initial weights are too small to tell positions apart
        if parameter.ndim > 1:
            parameter.data.mul_(3)
    return model.eval()


def family(count: int = 14) -> list[list[int]]:
    """Sequences that branch off each other at random places."""
    order = np.random.default_rng(3)
    found = [order.integers(0, 40, 20).tolist()]
    for _ in range(count - 1):
        trunk = found[order.integers(len(found))]
        found.append([*trunk[: order.integers(0, len(trunk) + 1)], *order.integers(0, 40, order.integers(1, 12)).tolist()])
    return [*found, found[0][:7], [5]]


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
@pytest.mark.parametrize("heads", [1, 2, 4])
@pytest.mark.parametrize("way", ["one mask", "few queries at a time", "long chains", "no mask"])
def test_states_and_gradients_are_those_of_one_sequence_at_a_time(
    kind: str, heads: int, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way in ("few queries at a time", "long chains"):
        monkeypatch.setattr(attention, "QUERIES", 3)
        monkeypatch.setattr(attention, "SHORT", 5 if way == "long chains" else 1024)
    elif way == "no mask":
        monkeypatch.setattr(attention, "_needs_mask", lambda q: False)
    model = model_of(kind, num_key_value_heads=heads)
    sequences = family()
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(1))

    def alone() -> torch.Tensor:
        return torch.cat([model.model(input_ids=torch.tensor([one])).last_hidden_state[0] for one in sequences])

    def together(states: object) -> torch.Tensor:
        found, paths = states(model.model, sequences, "cpu")  # type: ignore[operator]
        return found[torch.from_numpy(np.concatenate(paths))]

    def gradients(states_N_H: torch.Tensor) -> list[torch.Tensor]:
        model.zero_grad()
        (states_N_H * weight.repeat(8, 1)[: len(states_N_H)]).sum().backward()
        return [parameter.grad.clone() for parameter in model.model.parameters() if parameter.grad is not None]

    expected = alone()
    wanted = gradients(expected)
    for states in (packed_states, padded_states):
        with our_attention(model):
            assert model.config._attn_implementation == ATTENTION
            found = together(states)
            torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
            for a, b in zip(gradients(found), wanted, strict=True):
                assert (a - b).norm() < 1e-4 * b.norm()
    assert model.config._attn_implementation == "sdpa"


def test_the_equality_above_can_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions of the packed row, or a chain that sees a neighbour, give other values."""
    model, sequences = model_of("qwen3"), family()
    right = attention.prefix_tree

    def states() -> torch.Tensor:
        with our_attention(model), torch.no_grad():
            found, paths = packed_states(model.model, sequences, "cpu")
        return found[torch.from_numpy(np.concatenate(paths))]

    def flat_positions(given: list[list[int]]) -> object:
        tree = right(given)
        tree.positions[:] = np.arange(tree.tokens)
        return tree

    def wrong_prefix(given: list[list[int]]) -> object:
        tree = right(given)
        for chain in tree.chains[1:]:
            moved = tuple((start + 1, end + 1) for start, end in chain.prefix)
            object.__setattr__(chain, "prefix", moved)
        return tree

    expected = states()
    for wrong in (flat_positions, wrong_prefix):
        monkeypatch.setattr(attention, "prefix_tree", wrong)
        assert (states() - expected).abs().max() > 1e-2


def test_layers_that_keep_who_sees_whom_to_themselves_are_refused() -> None:
    """Every token would see every other, and nobody would notice."""
    decoder = model_of("llama").get_decoder()

    def forgets(**given: Any) -> Any:
        del given["chains"]
        return decoder(**given)

    with our_attention(decoder), pytest.raises(ModelError, match="who sees whom"):
        packed_states(forgets, [[1, 2, 3], [1, 2, 4]], "cpu")


def test_a_layer_that_masks_by_itself_is_refused() -> None:
    """Doge's attention makes a mask of its own out of the one that it is given: packed, it was another model."""
    from transformers import DogeConfig, DogeForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = DogeForCausalLM(DogeConfig(vocab_size=64, num_key_value_heads=2, **shape)).eval()
    with our_attention(model), torch.no_grad(), pytest.raises(ModelError, match="DogeAttention says itself who sees whom"):
        packed_states(model.model, [[1, 2, 3], [1, 2, 4]], "cpu")


def test_who_takes_a_packed_row() -> None:
    assert takes_chains(model_of("qwen3"))
    assert takes_chains(model_of("llama"))
    assert not takes_chains(model_of("qwen3", use_sliding_window=True, sliding_window=8, max_window_layers=1))
    capped = model_of("qwen3")
    capped.config.attn_logit_softcapping = 30.0
    assert not takes_chains(capped)
    assert not takes_chains(torch.nn.Linear(2, 2))
