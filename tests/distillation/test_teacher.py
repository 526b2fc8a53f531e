from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from distillation_fakes import TinyChat, global_injection, make_trajectory, tiny_model, train_to_follow_hints

import evolve_dag.distillation.teacher as teacher_module
from evolve_dag.distillation.alignment import Aligned, Inject, align, no_injection, replay_injection
from evolve_dag.distillation.teacher import TeacherScorer, pack, supports_tree
from evolve_dag.errors import ModelError

STEP_WISE = replay_injection("step_wise")


def some(inject: Inject = STEP_WISE, count: int = 9, merges: bool = False) -> list[Aligned]:
    chat = TinyChat(merges)
    trajectories = [make_trajectory(chat, seed, steps=1 + seed % 4) for seed in range(count)]
    # A step for which nothing was selected, in the middle and at the end.
    for at, gap in ((3, 1), (7, 3)):
        steps = list(trajectories[at].steps)
        steps[gap] = replace(steps[gap], injected="", selected=())
        trajectories[at] = replace(trajectories[at], steps=tuple(steps))
    return [align(one, chat, inject) for one in trajectories]


def oracle(model: torch.nn.Module, one: Aligned) -> np.ndarray:
    """One forward pass of the whole model per step, logits everywhere."""
    rows = []
    with torch.no_grad():
        for view in one.views:
            logprobs = torch.log_softmax(model(input_ids=torch.tensor([view.ids])).logits[0].float(), -1)
            rows.append(logprobs[view.start - 1 : len(view.ids) - 1])
    return torch.cat(rows).numpy()


def nearest(expected: list[np.ndarray], scored: list) -> float:
    return max(float(np.abs(a - b.logprobs).max()) for a, b in zip(expected, scored, strict=True))


@pytest.fixture(params=["random", "trained", "trained llama", "trained eager"], scope="module")
def any_model(request: pytest.FixtureRequest) -> torch.nn.Module:
    if request.param == "random":
        return tiny_model()
    if request.param == "trained llama":
        return train_to_follow_hints(tiny_model(kind="llama"), 30)
    model = request.getfixturevalue("trained")
    if request.param == "trained eager":
        eager = tiny_model(attn_implementation="eager")
        eager.load_state_dict(model.state_dict())
        assert eager.config._attn_implementation == "eager"
        return eager
    return model


@pytest.mark.parametrize("inject", [STEP_WISE, global_injection, no_injection])
@pytest.mark.parametrize("budget", [16384, 150, 1])
def test_tree_equals_one_sequence_per_step(any_model: torch.nn.Module, inject: Inject, budget: int) -> None:
    aligned = some(inject)
    expected = [oracle(any_model, one) for one in aligned]
    scored = TeacherScorer(any_model, top_k=0, tokens_per_batch=budget).score([one.tree for one in aligned])
    assert nearest(expected, scored) < 1e-4


def test_tree_with_a_tokenizer_that_merges_across_the_injection(trained: torch.nn.Module) -> None:
    aligned = some(merges=True)
    scored = TeacherScorer(trained, top_k=0).score([one.tree for one in aligned])
    assert nearest([oracle(trained, one) for one in aligned], scored) < 1e-4


def test_the_equality_above_can_fail(trained: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """A branch that sees one trunk token too many, or stands one position off, is found on trained weights."""
    aligned = some()
    expected = [oracle(trained, one) for one in aligned]
    right = teacher_module.fill_mask

    def off_by_one(tree, mask, positions):  # type: ignore[no-untyped-def]
        right(tree, mask, positions)
        positions += 1

    def leaking(tree, mask, positions):  # type: ignore[no-untyped-def]
        right(tree, mask, positions)
        mask[:, : len(tree.trunk)] = True

    for wrong in (off_by_one, leaking):
        monkeypatch.setattr(teacher_module, "fill_mask", wrong)
        scored = TeacherScorer(trained, top_k=0).score([one.tree for one in aligned])
        assert nearest(expected, scored) > 1e-3


def test_sequence_per_step_is_the_same(trained: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    trees = [one.tree for one in some()]
    expected = TeacherScorer(trained, top_k=0).score(trees)
    plain = TeacherScorer(trained, top_k=0, tree=False).score(trees)
    sizes = sorted(teacher_module._mask_elements([tree]) for tree in trees if tree.branches[0].ids)
    assert sizes[0] < sizes[-1]
    monkeypatch.setattr(teacher_module, "MASK_ELEMENTS", sizes[len(sizes) // 2])  # larger trees are unpacked
    mixed = TeacherScorer(trained, top_k=0).score(trees)
    for other in (plain, mixed):
        assert nearest([one.logprobs for one in expected], other) < 1e-4


def test_top_k_is_the_head_of_the_full_distribution(trained: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    trees = [one.tree for one in some()]
    full = TeacherScorer(trained, top_k=0).score(trees)
    monkeypatch.setattr(teacher_module, "LOGIT_ELEMENTS", 132 * 4)  # four tokens at a time
    top = TeacherScorer(trained, top_k=5).score(trees)
    for a, b in zip(full, top, strict=True):
        assert (a.kind, b.kind) == ("full", "top_k")
        assert b.ids is not None
        assert b.tail is not None
        assert b.ids.dtype == np.int32
        assert b.logprobs.dtype == b.tail.dtype == np.float32
        assert b.logprobs.shape == b.ids.shape == (len(a), 5)
        np.testing.assert_allclose(np.take_along_axis(a.logprobs, b.ids, 1), b.logprobs, atol=1e-5)
        np.testing.assert_allclose(np.exp(b.logprobs).sum(1) + np.exp(b.tail), 1, atol=1e-5)
        assert (np.diff(b.logprobs) <= 0).all()


def test_top_k_past_the_vocabulary_keeps_all(trained: torch.nn.Module) -> None:
    assert TeacherScorer(trained, top_k=10_000).score([some()[0].tree])[0].kind == "full"


def test_rows_come_in_the_order_of_the_action_tokens(trained: torch.nn.Module) -> None:
    """The hint-following teacher is sure of exactly the letter that each step's hint names."""
    aligned = some()
    scored = TeacherScorer(trained, top_k=1).score([one.tree for one in aligned])
    for one, targets in zip(aligned[:3], scored, strict=False):
        assert targets.ids is not None
        assert tuple(targets.ids[:, 0]) == one.row.action_ids


def test_the_tree_is_much_smaller() -> None:
    trees = [one.tree for one in some(count=40)]
    assert sum(tree.tokens for tree in trees) < 0.75 * sum(tree.unpacked_tokens for tree in trees)


def test_pack_points_at_the_token_before_each_action_token() -> None:
    for one in some():
        ids, predictors = pack(one.tree)
        at = iter(predictors)
        for view in one.views:
            for position in range(view.start, len(view.ids)):
                assert ids[next(at)] == view.ids[position - 1]
        assert next(at, None) is None


def test_scoring_leaves_the_model_as_it_was(trained: torch.nn.Module) -> None:
    trained.train()
    try:
        done: list[int] = []
        TeacherScorer(trained, top_k=3, tokens_per_batch=200).score([one.tree for one in some()], done.append)
        assert trained.training
        assert sum(done) == 9
        assert all(parameter.grad is None or not parameter.grad.is_inference() for parameter in trained.parameters())
    finally:
        trained.eval()


def test_no_tree_for_attention_that_takes_no_mask() -> None:
    assert supports_tree(tiny_model().config)
    assert supports_tree(tiny_model(kind="llama").config)
    assert not supports_tree(tiny_model(use_sliding_window=True, sliding_window=8, max_window_layers=1).config)
    config = tiny_model().config
    config._attn_implementation = "flash_attention_2"
    assert not supports_tree(config)


def test_sliding_windows_are_scored_one_sequence_per_step() -> None:
    model = tiny_model(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    aligned = some()
    scored = TeacherScorer(model, top_k=0).score([one.tree for one in aligned])
    assert nearest([oracle(model, one) for one in aligned], scored) < 1e-4


def test_broken_weights_name_the_trajectory() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="trajectory t0#0"):
        TeacherScorer(model).score([one.tree for one in some()])


@pytest.mark.parametrize(("name", "value"), [("final_logit_softcapping", 30.0), ("logit_scale", 0.5)])
def test_architectures_that_rescale_their_logits_are_refused(name: str, value: float) -> None:
    model = tiny_model()
    setattr(model.config, name, value)
    with pytest.raises(ModelError, match=f"behind the output layer \\({name} = {value}\\)"):
        TeacherScorer(model)


def test_a_body_without_output_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="no output embeddings"):
        TeacherScorer(tiny_model().model)


def test_nothing_to_score(trained: torch.nn.Module) -> None:
    assert TeacherScorer(trained).score([]) == []
