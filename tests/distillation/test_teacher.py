from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from distillation_fakes import TinyChat, global_injection, make_trajectory, tiny_model, train_to_follow_hints

import evolve_dag.distillation.losses as losses_module
from evolve_dag.distillation.alignment import Aligned, Inject, align, no_injection, replay_injection
from evolve_dag.distillation.teacher import TeacherScorer
from evolve_dag.errors import ModelError
from evolve_dag.inference.recording import Recording

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
def test_packed_views_equal_one_sequence_per_step(any_model: torch.nn.Module, inject: Inject, budget: int) -> None:
    aligned = some(inject)
    expected = [oracle(any_model, one) for one in aligned]
    scored = TeacherScorer(any_model, top_k=0, tokens_per_pass=budget).score([one.views for one in aligned])
    assert nearest(expected, scored) < 1e-4


def test_packed_views_of_a_tokenizer_that_merges_across_the_injection(trained: torch.nn.Module) -> None:
    aligned = some(merges=True)
    scored = TeacherScorer(trained, top_k=0).score([one.views for one in aligned])
    assert nearest([oracle(trained, one) for one in aligned], scored) < 1e-4


def test_one_sequence_per_step_is_the_same(trained: torch.nn.Module) -> None:
    views = [one.views for one in some()]
    expected = TeacherScorer(trained, top_k=0).score(views)
    plain = TeacherScorer(trained, top_k=0, share=False, tokens_per_pass=150).score(views)
    assert nearest([one.logprobs for one in expected], plain) < 1e-4


def test_top_k_is_the_head_of_the_full_distribution(trained: torch.nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    views = [one.views for one in some()]
    full = TeacherScorer(trained, top_k=0).score(views)
    monkeypatch.setattr(losses_module, "default_chunk", lambda vocabulary: 4)
    top = TeacherScorer(trained, top_k=5).score(views)
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
    assert TeacherScorer(trained, top_k=10_000).score([some()[0].views])[0].kind == "full"


def test_rows_come_in_the_order_of_the_action_tokens(trained: torch.nn.Module) -> None:
    """The hint-following teacher is sure of exactly the letter that each step's hint names."""
    aligned = some()
    scored = TeacherScorer(trained, top_k=1).score([one.views for one in aligned])
    for one, targets in zip(aligned[:3], scored, strict=False):
        assert targets.ids is not None
        assert tuple(targets.ids[:, 0]) == one.row.action_ids


def test_scoring_leaves_the_model_as_it_was(trained: torch.nn.Module) -> None:
    trained.train()
    try:
        done: list[int] = []
        TeacherScorer(trained, top_k=3, tokens_per_pass=200).score([one.views for one in some()], done.append)
        assert trained.training
        assert sum(done) == 9
        assert all(parameter.grad is None or not parameter.grad.is_inference() for parameter in trained.parameters())
    finally:
        trained.eval()


def test_sliding_windows_are_scored_one_sequence_per_step() -> None:
    model = tiny_model(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    aligned = [*some(), *some(global_injection)]
    scored = TeacherScorer(model, top_k=0, tokens_per_pass=300).score([one.views for one in aligned])
    assert nearest([oracle(model, one) for one in aligned], scored) < 1e-4


def test_broken_weights_name_the_trajectory() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(ModelError, match="trajectory t0#0"):
        TeacherScorer(model).score([one.views for one in some()])


@pytest.mark.parametrize(("name", "value"), [("final_logit_softcapping", 30.0), ("logit_scale", 0.5)])
def test_architectures_that_rescale_their_logits_are_refused(name: str, value: float) -> None:
    model = tiny_model()
    setattr(model.config, name, value)
    with pytest.raises(ModelError, match=f"behind the output layer \\({name} = {value}\\)"):
        TeacherScorer(model)


def test_a_cap_that_the_config_of_the_text_names_is_seen() -> None:
    """Models that see too have a config for their text (Gemma 4); a cap there was passed over."""
    from transformers import AutoModelForCausalLM, Gemma4Config

    shape = {"vocab_size": 132, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    small = {"num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "final_logit_softcapping": 3.0}
    config = Gemma4Config(text_config={**shape, **small, **kinds}, vision_config=None, audio_config=None)
    with pytest.raises(ModelError, match=r"behind the output layer \(final_logit_softcapping = 3.0\)"):
        TeacherScorer(AutoModelForCausalLM.from_config(config))


def test_a_model_that_is_its_own_body_is_refused() -> None:
    model = tiny_model()
    model.get_decoder = lambda: model  # what transformers answers for Llama 4
    with pytest.raises(ModelError, match="does not say which part of it is its body"):
        TeacherScorer(model)


def test_a_sequence_that_turns_all_positions_otherwise_is_alone() -> None:
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [4.0, 8.0, 16.0, 32.0]}
    model = tiny_model(kind="llama", rope_parameters={**rope, "original_max_position_embeddings": 40})
    aligned = some()
    lengths = sorted(len(view.ids) for one in aligned for view in one.views)
    assert lengths[0] < 40 < lengths[-1]
    scored = TeacherScorer(model, top_k=0).score([one.views for one in aligned])
    assert nearest([oracle(model, one) for one in aligned], scored) < 1e-4


def test_a_body_without_output_layer_is_refused() -> None:
    with pytest.raises(ModelError, match="no output embeddings"):
        TeacherScorer(tiny_model().model)


def test_nothing_to_score(trained: torch.nn.Module) -> None:
    assert TeacherScorer(trained).score([]) == []


def test_views_that_were_sampled_cost_no_forward_pass(trained: torch.nn.Module) -> None:
    views = [one.views for one in some()]
    scorer = TeacherScorer(trained, top_k=5)
    expected = scorer.score(views)
    recording = Recording(5)
    for own, targets in list(zip(views, expected, strict=True))[::2]:
        at = 0
        for view in own:
            part = targets[at : at + len(view.action_ids)]
            at += len(view.action_ids)
            assert part.ids is not None
            assert part.tail is not None
            recording.add(view.ids, view.start, (part.logprobs, part.ids, part.tail))
    asked: list[int] = []
    states = scorer.forward.states_at
    scorer.forward.states_at = lambda sequences, places: asked.append(len(sequences)) or states(sequences, places)  # type: ignore[method-assign,func-returns-value,assignment]
    done: list[int] = []
    found = scorer.score(views, done.append, recording)
    sampled = {view.ids for own in views[::2] for view in own}
    assert sum(asked) == sum(view.ids not in sampled for own in views for view in own) > 0
    assert sum(done) == len(views)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
        np.testing.assert_array_equal(a.ids, b.ids)
