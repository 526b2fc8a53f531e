from __future__ import annotations

import copy
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distillation_fakes import TinyChat, make_scored_rows, make_trajectory, tiny_model
from safetensors.torch import load_file

import evolve_dag.distillation.losses as losses_module
import evolve_dag.distillation.trainer as trainer_module
from evolve_dag.config.schema import DistillationSettings, Regime
from evolve_dag.distillation.adapter import attach, load_adapter
from evolve_dag.distillation.alignment import align, no_injection, replay_injection
from evolve_dag.distillation.batch import joined_teacher, row_losses, step_divergences
from evolve_dag.distillation.dataset import DistillationRow, make_rows
from evolve_dag.distillation.forward import Forward
from evolve_dag.distillation.trainer import CurvePoint, DistillationResult, distill, learning_rate
from evolve_dag.errors import AlignmentError, ModelError, StoreError
from evolve_dag.inference.lora import fuse, merge
from evolve_dag.inference.prefix_tree import prefix_tree

STEP_WISE = replay_injection("step_wise")
SETTINGS = DistillationSettings(
    learning_rate_decay=0.7, rank=8, alpha=16, learning_rate=1e-2, epochs=2, tokens_per_batch=256, top_k=8
)


@pytest.fixture(scope="module")
def rows(trained: torch.nn.Module) -> list[DistillationRow]:
    return make_scored_rows(trained, range(24), STEP_WISE)


@pytest.fixture(scope="module")
def held_out(trained: torch.nn.Module) -> list[DistillationRow]:
    return make_scored_rows(trained, range(1000, 1024), STEP_WISE)


def run(model: torch.nn.Module, rows: list[DistillationRow], out: Path, **changes: Any) -> DistillationResult:
    settings = SETTINGS.model_copy(
        update={key: changes.pop(key) for key in list(changes) if key in DistillationSettings.model_fields}
    )
    regime = Regime(**{"divergence": changes.pop("divergence", "forward_kl")})
    return distill(model, rows, settings=settings, regime=regime, out=out, **changes)


def mean_divergence(model: torch.nn.Module, rows: list[DistillationRow]) -> float:
    return float(np.mean([value for steps in step_divergences(model, rows) for value in steps]))


def adapted(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    return merge(load_adapter(copy.deepcopy(model), folder))


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl", "jsd", "cross_entropy"])
def test_the_student_moves_to_the_hint_following_teacher(
    divergence: str, trained: torch.nn.Module, held_out: list[DistillationRow], tmp_path: Path
) -> None:
    """Without the hint the student learns what the hint would have said, also on trajectories it never saw."""
    rows = make_scored_rows(trained, range(48), STEP_WISE)
    before = mean_divergence(trained, held_out)
    result = run(trained, rows, tmp_path, divergence=divergence, epochs=14)
    after = mean_divergence(adapted(trained, result.adapter), held_out)
    assert before > 0.4
    assert after < 0.6 * before
    assert not result.unchanged
    assert mean_divergence(trained, held_out) == before  # the model given is as it was


def test_teacher_without_experience_gives_nothing_to_learn(trained: torch.nn.Module, tmp_path: Path) -> None:
    rows = make_scored_rows(trained, range(8), no_injection, hints=False)
    result = run(trained, rows, tmp_path, epochs=1)
    assert result.curve[0].loss == pytest.approx(0, abs=1e-6)
    assert max(abs(value) for steps in step_divergences(trained, rows) for value in steps) < 1e-5


def test_the_loss_is_the_mean_over_action_tokens(trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path) -> None:
    """Against a loop that computes all logits, one row at a time, and knows nothing of spans in batches."""
    result = run(trained, rows, tmp_path, tokens_per_batch=100_000, epochs=1)
    total, tokens = 0.0, 0
    for row in rows:
        assert row.teacher is not None
        assert row.teacher.ids is not None
        assert row.teacher.tail is not None
        with torch.no_grad():
            q = torch.log_softmax(trained(input_ids=torch.tensor([row.row.ids])).logits[0].double(), -1)
        for n, position in enumerate(row.row.positions):
            p, ids = row.teacher.logprobs[n], row.teacher.ids[n]
            kept = q[position - 1, torch.tensor(ids).long()].numpy()
            total += float((np.exp(p) * (p - kept)).sum())
            tail = float(row.teacher.tail[n])
            total += math.exp(tail) * (tail - math.log1p(-math.exp(float(np.logaddexp.reduce(kept)))))
            tokens += 1
    assert result.curve[0].loss == pytest.approx(total / tokens, rel=1e-3)
    assert result.curve[0].action_tokens == tokens == result.action_tokens
    assert result.curve[0].tokens == sum(row.tokens for row in rows) == result.tokens


def test_padding_and_batching_do_not_change_divergences(trained: torch.nn.Module, rows: list[DistillationRow]) -> None:
    alone = [value for row in rows for value in step_divergences(trained, [row])[0]]
    together = [value for steps in step_divergences(trained, rows, tokens_per_pass=100) for value in steps]
    np.testing.assert_allclose(alone, together, atol=1e-5)


def test_small_logit_chunks_train_the_same(
    trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run(trained, rows, tmp_path / "a")
    monkeypatch.setattr(losses_module, "default_chunk", lambda vocabulary: 7)
    chunked = run(trained, rows, tmp_path / "b")
    assert [p.loss for p in chunked.curve] == pytest.approx([p.loss for p in whole.curve], rel=1e-3)


def test_same_seed_same_bytes(trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path) -> None:
    made = {}
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        torch.manual_seed(hash(name) % 1000)  # what the process drew before does not matter
        made[name] = run(trained, rows, tmp_path / name, seed=seed)
    weights = {name: (tmp_path / name / "adapter_model.safetensors").read_bytes() for name in made}
    assert weights["a"] == weights["b"]
    assert weights["a"] != weights["c"]

    def facts(point: CurvePoint) -> CurvePoint:
        return replace(point, tokens_per_second=0.0)

    assert [facts(p) for p in made["a"].curve] == [facts(p) for p in made["b"].curve]


def test_the_adapter_continues(trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path) -> None:
    first = run(trained, rows, tmp_path / "1", epochs=4)
    second = run(trained, rows, tmp_path / "2", epochs=1, tokens_per_batch=100_000, init_adapter=first.adapter, training=2)
    policy = load_adapter(tiny_model(), first.adapter)
    policy.get_base_model().load_state_dict({**policy.get_base_model().state_dict(), **_base_weights(policy, trained)})
    tokens = [end - start for row in rows for start, end in row.row.spans]
    values = [value for steps in step_divergences(policy, rows) for value in steps]
    assert second.curve[0].loss == pytest.approx(float(np.average(values, weights=tokens)), rel=1e-3)
    assert second.curve[0].learning_rate == pytest.approx(1e-2 * 0.7 / 5)


def _base_weights(policy: Any, trained: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Weights of ``trained`` under the names that the wrapped model has for them."""
    names = set(policy.get_base_model().state_dict())
    found = {}
    for name, tensor in trained.state_dict().items():
        stem, _, last = name.rpartition(".")
        found[f"{stem}.base_layer.{last}" if f"{stem}.base_layer.{last}" in names else name] = tensor
    return found


def test_nothing_kept_leaves_the_adapter_unchanged(
    trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path
) -> None:
    first = run(trained, rows, tmp_path / "1")
    second = run(trained, [], tmp_path / "2", init_adapter=first.adapter, refresh=3)
    assert second.unchanged
    assert second.note == "no trajectory was kept"
    assert (second.rows, second.curve, second.tokens) == (0, (), 0)
    weights = "adapter_model.safetensors"
    assert (second.adapter / weights).read_bytes() == (first.adapter / weights).read_bytes()
    from_base = run(trained, [], tmp_path / "3")
    ids = torch.arange(8, 40)[None]
    with torch.no_grad():
        assert torch.equal(adapted(trained, from_base.adapter)(input_ids=ids).logits, trained(input_ids=ids).logits)


def test_learning_rate_warms_up_decays_to_a_tenth_and_falls_per_training() -> None:
    settings = SETTINGS.model_copy(update={"warmup_steps": 5})
    rates = [learning_rate(settings, step, 101) for step in range(101)]
    assert rates[0] == pytest.approx(1e-2 / 5)
    assert max(rates) == rates[4] == pytest.approx(1e-2 * (1 - 0.9 * 4 / 100))
    assert rates[50] == pytest.approx(1e-2 * 0.55)
    assert rates[100] == pytest.approx(1e-3)
    assert learning_rate(settings, 50, 101, training=3) == pytest.approx(rates[50] * 0.49)
    assert learning_rate(settings.model_copy(update={"warmup_steps": 0}), 0, 1) == pytest.approx(1e-2)


def test_every_row_is_seen_once_per_epoch(trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path) -> None:
    result = run(trained, rows, tmp_path, epochs=3)
    assert result.tokens == 3 * sum(row.tokens for row in rows)
    assert sum(point.action_tokens for point in result.curve) == 3 * result.action_tokens


def test_on_step_follows_training(trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = run(trained, rows, tmp_path, on_step=lambda point, total: seen.append((point.step, total)))
    assert seen == [(step, len(result.curve)) for step in range(len(result.curve))]


def test_fresh_trajectories_come_at_even_points_from_the_current_student(
    trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path
) -> None:
    fresh = make_scored_rows(trained, range(200, 212), STEP_WISE)
    asked: list[tuple[int, float]] = []

    def resample(number: int, student: torch.nn.Module) -> list[DistillationRow]:
        asked.append((number, mean_divergence(student, fresh)))
        torch.set_num_threads(2)
        with torch.no_grad():  # the student is a copy: what happens to it stays without effect
            for parameter in student.parameters():
                parameter.zero_()
        return fresh if number != 2 else []

    result = run(trained, rows, tmp_path, divergence="reverse_kl", refresh=3, epochs=6, resample=resample)
    assert [number for number, _ in asked] == [1, 2]
    assert mean_divergence(trained, fresh) > asked[0][1] > asked[1][1]
    assert (result.refreshes, result.empty_refreshes) == (2, 1)
    total = len(result.curve)
    starts = [next(point.step for point in result.curve if point.round == number) for number in range(3)]
    assert starts == [0, total // 3, total * 2 // 3]
    lengths = {row.tokens for row in fresh}
    first_round = [point for point in result.curve if point.round == 1]
    assert len(first_round) > 2
    assert max(point.tokens for point in first_round) <= 256
    assert lengths  # rounds train on the fresh rows: their divergence at the start is the student's own
    assert mean_divergence(adapted(trained, result.adapter), fresh) < asked[1][1]


def test_where_nothing_new_is_kept_passes_go_on(trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path) -> None:
    whole = run(trained, rows, tmp_path / "whole", epochs=3)
    anew = run(trained, rows, tmp_path / "anew", epochs=3, refresh=4, resample=lambda number, student: [])
    assert (anew.refreshes, anew.empty_refreshes) == (3, 3)
    weights = "adapter_model.safetensors"
    assert (anew.adapter / weights).read_bytes() == (whole.adapter / weights).read_bytes()
    assert anew.tokens == 3 * sum(row.tokens for row in rows), "every row once per epoch"


def test_a_round_that_keeps_nothing_goes_on_where_the_one_before_ended(
    trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh = make_scored_rows(trained, range(100, 118), STEP_WISE)
    seen: dict[int, list[str]] = {}
    step = trainer_module._Run._step

    def watched(self: Any, rows: Any, at: int, total: int, number: int) -> CurvePoint:
        seen.setdefault(number, []).extend(row.row.trajectory_id for row in rows)
        return step(self, rows, at, total, number)

    monkeypatch.setattr(trainer_module._Run, "_step", watched)
    kept = {1: fresh, 2: [], 3: fresh[:2]}
    run(trained, rows, tmp_path, epochs=2, refresh=4, tokens_per_batch=128, resample=lambda number, student: kept[number])
    assert 0 < len(seen[1]) < len(fresh), "part of a pass"
    first = (seen[1] + seen[2])[: len(fresh)]
    assert sorted(first) == sorted(row.row.trajectory_id for row in fresh), "one pass over both rounds"
    assert set(seen[3]) == {row.row.trajectory_id for row in fresh[:2]}, "other rows begin with a pass of their own"


def test_refresh_without_a_sampler_is_a_mistake(trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="refresh is 2, but nothing can sample"):
        run(trained, rows, tmp_path, refresh=2)


def poison(row: DistillationRow) -> DistillationRow:
    """A teacher that claims more than probability 1 by infinity: loss and gradient are not finite."""
    assert row.teacher is not None
    return replace(row, teacher=replace(row.teacher, logprobs=np.full_like(row.teacher.logprobs, np.inf)))


def test_a_bad_batch_is_skipped_and_counted(trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path) -> None:
    result = run(trained, [poison(rows[0]), *rows[1:]], tmp_path, epochs=2)
    assert result.skipped == 2  # once per epoch
    assert sum(point.skipped for point in result.curve) == 2
    assert all(math.isfinite(point.loss) for point in result.curve if not point.skipped)
    assert not result.unchanged
    load_adapter(tiny_model(), result.adapter)


def test_gradients_that_are_not_finite_are_skipped(
    trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clip, calls = torch.nn.utils.clip_grad_norm_, []

    def broken_once(parameters: Any, limit: float) -> torch.Tensor:
        calls.append(1)
        norm = clip(parameters, limit)
        return torch.tensor(math.inf) if len(calls) == 2 else norm

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", broken_once)
    result = run(trained, rows, tmp_path)
    assert [point.step for point in result.curve if point.skipped] == [1]


def test_bad_batches_in_a_row_end_the_training_and_give_the_model_back(
    trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path
) -> None:
    before = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    with pytest.raises(ModelError, match="training step 3: 4 batches in a row"):
        run(trained, [poison(row) for row in rows], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list(trained.state_dict()) == list(before)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained.state_dict().items())


def test_three_bad_batches_alone_are_no_update(trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path) -> None:
    result = run(trained, [poison(rows[0])], tmp_path, epochs=3)
    assert result.unchanged
    assert result.note == "every batch was skipped"


def test_rows_without_a_teacher_are_refused_where_one_is_needed(trained: torch.nn.Module, tmp_path: Path) -> None:
    chat = TinyChat()
    bare = make_rows([align(make_trajectory(chat, seed), chat, STEP_WISE) for seed in range(4)], None)
    with pytest.raises(AlignmentError, match=r"trajectory t0#0: no teacher log-probabilities, which forward_kl needs"):
        run(trained, bare, tmp_path)
    result = run(trained, bare, tmp_path, divergence="cross_entropy")
    assert {point.divergence for point in result.curve} == {None}
    assert result.curve[0].loss > 0


def test_mixed_teachers_are_refused(trained: torch.nn.Module) -> None:
    mixed = [make_scored_rows(trained, [1], STEP_WISE, top_k=k)[0] for k in (4, 8)]
    with pytest.raises(AlignmentError, match="different kinds of teacher"):
        joined_teacher(mixed)


def test_full_vocabulary_and_wide_top_k_agree(trained: torch.nn.Module, tmp_path: Path) -> None:
    curves = []
    for top_k in (0, 131):
        rows = make_scored_rows(trained, range(8), STEP_WISE, top_k=top_k)
        curves.append([point.loss for point in run(trained, rows, tmp_path / str(top_k)).curve])
    assert curves[0] == pytest.approx(curves[1], rel=1e-3)


def test_a_model_folder_and_an_untied_model(rows: list[DistillationRow], trained: torch.nn.Module, tmp_path: Path) -> None:
    trained.save_pretrained(tmp_path / "model")
    from_folder = run(tmp_path / "model", rows, tmp_path / "a")  # type: ignore[arg-type]
    from_object = run(trained, rows, tmp_path / "b")
    weights = "adapter_model.safetensors"
    assert (from_folder.adapter / weights).read_bytes() == (from_object.adapter / weights).read_bytes()
    untied = run(tiny_model(tie_word_embeddings=False), rows, tmp_path / "c", epochs=1)
    assert not any("lm_head" in name for name in load_adapter(tiny_model(), untied.adapter).state_dict() if "lora" in name)


def test_what_cannot_be_loaded_is_named(rows: list[DistillationRow], tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere: not a model"):
        run(tmp_path / "nowhere", rows, tmp_path / "out")  # type: ignore[arg-type]
    with pytest.raises(StoreError, match=r"adapter_config\.json: no such file"):
        run(tiny_model(), rows, tmp_path / "out", init_adapter=tmp_path)


def test_threads_are_given_back(trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path) -> None:
    assert torch.get_num_threads() == 1
    seen: list[int] = []
    run(trained, rows[:1], tmp_path, threads=2, epochs=1, on_step=lambda *_: seen.append(torch.get_num_threads()))
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1


def test_betas_and_final_fraction_are_those_of_the_method() -> None:
    assert trainer_module.BETAS == (0.9, 0.99)
    assert trainer_module.FINAL_FRACTION == 0.1


def test_passes_of_any_size_give_the_curve_of_one(
    trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path
) -> None:
    """Eight trajectories a step: one pass of eight, eight passes of one."""
    whole, single = (
        run(trained, rows, tmp_path / str(tokens), tokens_per_batch=600, epochs=3, tokens_per_pass=tokens)
        for tokens in (100_000, 1)
    )
    assert len(whole.curve) >= 6
    assert [point.loss for point in single.curve] == pytest.approx([point.loss for point in whole.curve], abs=1e-5)


@pytest.mark.parametrize("kind", ["qwen3", "llama"])
def test_activation_checkpointing_keeps_less_and_gives_the_same_bytes(kind: str, tmp_path: Path) -> None:
    """In a model that is not in training mode, where transformers' own switch does nothing."""
    model = tiny_model(kind=kind, num_hidden_layers=4)
    rows = make_scored_rows(model, range(12), STEP_WISE)
    saved = {}
    for less in (False, True):
        kept: list[int] = []

        def count(tensor: torch.Tensor, kept: list[int] = kept) -> torch.Tensor:
            kept.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            run(model, rows, tmp_path / str(less), epochs=1, tokens_per_batch=100_000, activation_checkpointing=less)
        saved[less] = sum(kept)
    weights = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("False", "True")]
    assert weights[0] == weights[1]
    assert not any("forward" in vars(module) for module in model.modules())
    assert saved[True] < 0.5 * saved[False]


def test_a_base_in_half_precision_has_lora_weights_in_single(
    trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path
) -> None:
    half = tiny_model().to(torch.bfloat16)
    half.load_state_dict(trained.state_dict())
    full = run(trained, rows, tmp_path / "full")
    result = run(half, rows, tmp_path / "half")
    weights = load_file(str(result.adapter / "adapter_model.safetensors"))
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    assert next(half.parameters()).dtype == torch.bfloat16
    losses = [[point.loss for point in one.curve] for one in (result, full)]
    assert losses[0] == pytest.approx(losses[1], rel=0.05, abs=0.01)


def test_a_token_among_very_many_counts_in_float16_as_well(trained: torch.nn.Module, rows: list[DistillationRow]) -> None:
    """Divided by a batch's weight before the way back, its gradient would be below the smallest number there."""
    found = []
    for dtype in (torch.float32, torch.float16):
        model = tiny_model().to(dtype)
        model.load_state_dict(trained.state_dict())
        wrapped = attach(model, rank=8, alpha=16, seed=0).eval()
        fuse(wrapped)
        regime = Regime(divergence="forward_kl")
        one = trainer_module._Run(wrapped, Forward(wrapped), rows[:4], SETTINGS, regime, 0, 1, 1, 8192)
        with one.forward.ready():
            sums = one._accumulate(rows[:4], weight=1e6)
        found.append((sums.loss, torch.cat([p.grad.flatten() for p in one.parameters.values() if p.grad is not None])))
    (full_loss, full), (half_loss, half) = found
    assert half_loss == pytest.approx(full_loss, rel=0.01)
    assert (half.dtype, float((half - full).norm() / full.norm())) == (torch.float32, pytest.approx(0, abs=0.02))


def memory_for(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Passes of more distinct tokens run out of memory."""

    def losses(forward: Any, part: list[DistillationRow], *given: Any, **more: Any) -> Any:
        if prefix_tree([row.row.ids for row in part]).tokens > tokens:
            raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte")
        return row_losses(forward, part, *given, **more)

    monkeypatch.setattr(trainer_module, "row_losses", losses)


def test_where_memory_runs_out_passes_are_halved_once_and_it_is_said(
    trained: torch.nn.Module,
    rows: list[DistillationRow],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    whole = run(trained, rows, tmp_path / "whole", tokens_per_batch=600)
    memory_for(300, monkeypatch)
    result = run(trained, rows, tmp_path / "halved", tokens_per_batch=600)
    assert re.fullmatch(r"out of memory at step \d: passes of \d+ tokens in place of 8192 since then", result.note)
    assert result.note in caplog.text
    assert [point.loss for point in result.curve] == pytest.approx([point.loss for point in whole.curve], abs=1e-5)


@pytest.mark.parametrize(
    ("passes", "words"), [(8192, "memory ran out again in passes of"), (1, "memory ran out in passes of 1")]
)
def test_where_halving_does_not_help_the_message_says_what_does(
    trained: torch.nn.Module,
    rows: list[DistillationRow],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    passes: int,
    words: str,
) -> None:
    memory_for(10, monkeypatch)
    with pytest.raises(ModelError, match=rf"(?s)training step 0: {words}.*activation_checkpointing"):
        run(trained, rows, tmp_path, tokens_per_batch=1200, tokens_per_pass=passes)


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*given: Any, **more: Any) -> Any:
        raise RuntimeError("shapes do not fit")

    monkeypatch.setattr(trainer_module, "row_losses", broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run(trained, rows, tmp_path)


def test_training_ends_after_the_first_pass_that_had_little_left(
    trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path
) -> None:
    whole = run(trained, rows, tmp_path / "whole", epochs=4)
    steps = len(whole.curve) // 4
    means = [float(np.mean([point.divergence for point in whole.curve[n * steps : (n + 1) * steps]])) for n in range(4)]
    assert means[0] > means[1] > means[2]
    early = run(trained, rows, tmp_path / "early", epochs=4, target_divergence=(means[0] + means[1]) / 2)
    assert len(early.curve) == 2 * steps
    assert [point.loss for point in early.curve] == [point.loss for point in whole.curve[: 2 * steps]]
    assert early.note == f"ended after 2 of 4 passes, with a mean divergence of {means[1]:.2g} nats"
    late = run(trained, rows, tmp_path / "late", epochs=4, target_divergence=means[3] / 1000)
    assert (late.curve[-1].loss, late.note) == (whole.curve[-1].loss, "")


def test_without_a_teacher_no_pass_ends_training_early(
    trained: torch.nn.Module, rows: list[DistillationRow], tmp_path: Path
) -> None:
    unscored = [replace(row, teacher=None) for row in rows]
    whole = run(trained, unscored, tmp_path / "whole", divergence="cross_entropy")
    result = run(trained, unscored, tmp_path / "same", divergence="cross_entropy", target_divergence=1e9)
    assert (len(result.curve), result.note) == (len(whole.curve), "")
