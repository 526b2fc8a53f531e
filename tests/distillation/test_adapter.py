from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from distillation_fakes import tiny_model
from peft import PeftModel
from safetensors.torch import load_file, save_file

from evolve_dag.distillation.adapter import (
    attach,
    detach,
    load_adapter,
    save_adapter,
)
from evolve_dag.errors import ConfigError, ModelError, StoreError
from evolve_dag.inference.lora import fuse, merge

IDS = torch.arange(8, 40)[None]


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def saved(folder: Path, model: torch.nn.Module | None = None, *, seed: int = 3, rank: int = 4) -> Path:
    """An adapter whose B is not zero."""
    wrapped = attach(model or tiny_model(), rank=rank, alpha=2 * rank, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save_adapter(wrapped, folder, base="pocket")
    detach(wrapped)
    return folder


def test_a_new_adapter_changes_nothing_and_stands_on_every_linear_layer() -> None:
    model = tiny_model()
    before = logits(model)
    wrapped = attach(model, rank=4, alpha=8, seed=0)
    torch.testing.assert_close(logits(wrapped), before, rtol=0, atol=0)
    adapted = {name.split(".lora_A")[0] for name, _ in wrapped.named_parameters() if "lora_A" in name}
    assert len(adapted) == 2 * 7  # q k v o gate up down of both layers
    assert not any("lm_head" in name or "embed" in name for name in adapted)
    trainable = {name for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert all("lora_" in name for name in trainable)


def mixture(kind: str, **more: object) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "vocab_size": 132}
    rest = {"num_key_value_heads": 2, "max_position_embeddings": 512, "num_experts_per_tok": 2, "pad_token_id": None}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **shape, **rest, **more)).eval()


def require_attention_alone(model: torch.nn.Module) -> torch.nn.Module:
    """A new adapter stands on the projections of attention, and changes nothing yet; the wrapped model."""
    before = logits(model)
    wrapped = attach(model, rank=4, alpha=8, seed=0)
    fuse(wrapped)
    adapted = {name.split(".lora_A")[0].rpartition(".")[2] for name, _ in wrapped.named_parameters() if "lora_A" in name}
    assert adapted == {"q_proj", "k_proj", "v_proj", "o_proj"}
    torch.testing.assert_close(logits(wrapped), before)
    return wrapped


def test_experts_stay_as_they_are() -> None:
    require_attention_alone(mixture("qwen3_moe", num_experts=4, moe_intermediate_size=16, head_dim=8))


def test_experts_stay_where_dense_layers_have_their_old_names(tmp_path: Path) -> None:
    """peft takes `up_proj` for the experts' in some families, whatever else is called so (here the first layer, and one expert
    that all tokens share)."""
    experts = {"n_routed_experts": 4, "n_shared_experts": 1, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
    dense = {"first_k_dense_replace": 1, "head_dim": 8, **experts}
    model = mixture("glm4_moe", **dense)
    assert any(name.endswith("mlp.up_proj") for name, _ in model.named_modules())
    before = logits(model)
    wrapped = require_attention_alone(model)
    again = saved(tmp_path, detach(wrapped))
    theirs = logits(PeftModel.from_pretrained(mixture("glm4_moe", **dense), str(again)).eval())
    torch.testing.assert_close(logits(load_adapter(model, again)), theirs)
    assert (theirs - before).abs().max() > 1e-3


def test_a_router_is_no_layer_to_adapt() -> None:
    """It is one of torch's linear layers by its class, and gives three things."""
    model = mixture("phimoe", num_local_experts=4)
    before = logits(model)
    wrapped = attach(model, rank=4, alpha=8, seed=0)
    assert not any("router.lora_A" in name for name, _ in wrapped.named_parameters())
    torch.testing.assert_close(logits(wrapped), before)


def test_initial_weights_follow_the_seed_alone() -> None:
    def first(seed: int) -> torch.Tensor:
        wrapped = attach(tiny_model(), rank=4, alpha=8, seed=seed)
        return torch.cat([p.flatten() for n, p in wrapped.named_parameters() if "lora_A" in n])

    state = torch.random.get_rng_state()
    a = first(1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(99)
    assert torch.equal(a, first(1))
    assert not torch.equal(a, first(2))


def test_detach_gives_the_base_back() -> None:
    model = tiny_model()
    before, keys = logits(model), list(model.state_dict())
    base = detach(attach(model, rank=4, alpha=8, seed=0))
    assert base is model
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)
    assert all(parameter.requires_grad for parameter in model.parameters())
    attach(model, rank=2, alpha=4, seed=0)  # and it can be adapted again


def test_round_trip_is_exact_and_readable_by_peft(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    loaded = load_adapter(tiny_model(), folder)
    expected = logits(loaded)
    assert not torch.allclose(expected, logits(tiny_model()), atol=1e-3)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert torch.equal(logits(PeftModel.from_pretrained(tiny_model(), str(folder))), expected)
    assert sorted(path.name for path in folder.iterdir()) == ["adapter_config.json", "adapter_model.safetensors"]


def test_training_continues_from_the_saved_weights(tmp_path: Path) -> None:
    folder = saved(tmp_path / "adapter")
    wrapped = attach(tiny_model(), rank=4, alpha=8, seed=77, init_adapter=folder)
    assert torch.equal(logits(wrapped), logits(load_adapter(tiny_model(), folder)))
    assert any(parameter.requires_grad for parameter in wrapped.parameters())


def test_files_are_the_same_bytes_and_name_no_machine(tmp_path: Path) -> None:
    a, b = saved(tmp_path / "a"), saved(tmp_path / "b")
    for path in a.iterdir():
        assert path.read_bytes() == (b / path.name).read_bytes()
    assert json.loads((a / "adapter_config.json").read_text())["base_model_name_or_path"] == "pocket"
    save_adapter(attach(tiny_model(), rank=4, alpha=8, seed=0), tmp_path / "c", base=str(tmp_path / "models" / "mine"))
    text = (tmp_path / "c" / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] == "mine"
    assert str(tmp_path) not in text


def test_merged_equals_unmerged_and_another_adapter_can_follow(tmp_path: Path) -> None:
    folder, model = saved(tmp_path / "adapter"), tiny_model()
    before, names = logits(model), list(model.state_dict())
    merged = merge(load_adapter(model, folder))
    torch.testing.assert_close(logits(merged), logits(load_adapter(tiny_model(), folder)), rtol=1e-4, atol=1e-5)
    assert merged is model
    assert list(merged.state_dict()) == names
    assert not torch.equal(logits(merged), before)
    attach(merged, rank=2, alpha=4, seed=0)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "garbage"])
def test_damaged_files_are_named(name: str, damage: str, tmp_path: Path) -> None:
    path = saved(tmp_path) / name
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2] if damage == "cut" else b"\x00garbage\xff" * 9)
    with pytest.raises(StoreError, match=name) as caught:
        load_adapter(tiny_model(), tmp_path)
    assert "materialize adapter again" in str(caught.value)


@pytest.mark.parametrize("content", ["[]", "{}", '{"r": 4, "lora_alpha": 8, "peft_type": "PREFIX_TUNING"}', '{"r": "4"}'])
def test_configs_of_something_else_are_refused(content: str, tmp_path: Path) -> None:
    (saved(tmp_path) / "adapter_config.json").write_text(content)
    with pytest.raises(StoreError, match="not the config of a LoRA adapter"):
        load_adapter(tiny_model(), tmp_path)


def test_weights_that_do_not_fit_are_refused_and_the_model_stays_usable(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    other = tiny_model(num_hidden_layers=3)
    with pytest.raises(StoreError, match="does not fit this model: 14 weights"):
        load_adapter(other, folder)
    wider = tiny_model(intermediate_size=80)
    with pytest.raises(StoreError, match="does not fit this model"):
        load_adapter(wider, folder)
    attach(other, rank=4, alpha=8, seed=0)


def test_weights_that_are_not_finite_are_neither_saved_nor_loaded(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    weights = load_file(str(folder / "adapter_model.safetensors"))
    next(iter(weights.values()))[0, 0] = float("nan")
    save_file(weights, str(folder / "adapter_model.safetensors"))
    with pytest.raises(StoreError, match="is not finite"):
        load_adapter(tiny_model(), folder)
    wrapped = attach(tiny_model(), rank=4, alpha=8, seed=0)
    with torch.no_grad():
        next(p for n, p in wrapped.named_parameters() if "lora_B" in n).fill_(float("inf"))
    with pytest.raises(ModelError, match="not finite"):
        save_adapter(wrapped, tmp_path / "new")


def test_another_rank_is_a_mistake_of_the_experiment(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rank 4 and alpha 8.*rank 2 and alpha 8"):
        attach(tiny_model(), rank=2, alpha=8, seed=0, init_adapter=saved(tmp_path))


def test_one_adapter_at_a_time(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="carries an adapter already"):
        attach(attach(tiny_model(), rank=2, alpha=4, seed=0), rank=2, alpha=4, seed=0)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StoreError, match="adapter cannot be written"):
        save_adapter(attach(tiny_model(), rank=2, alpha=4, seed=0), tmp_path / "file" / "adapter")
