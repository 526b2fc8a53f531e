"""A base in 4 bit against a model whose weights are the ones that bitsandbytes reads back. Needs the extra ``[quantized]``."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny_tokenizers
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from evolve_dag.config.loading import load_experiment
from evolve_dag.config.schema import TransformersModelSettings
from evolve_dag.distillation.trainer import load_model
from evolve_dag.errors import ConfigError, ModelError
from evolve_dag.inference import quantization
from evolve_dag.inference.folders import base_identity
from evolve_dag.inference.quantization import BLOCK, dense, is_quantized, pretrained, require, state_of
from evolve_dag.inference.transformers import TransformersModel
from evolve_dag.protocols import Request, Sampling
from evolve_dag.records import Message

# 72 is one block of 64 and an eighth: the blocks do not end with the rows. Nor do they with 96 and 160, but being multiples of
# 16, bitsandbytes 0.50.2 reads those back wrongly on CPUs with AVX512.
SHAPE = {"hidden_size": 72, "intermediate_size": 200, "num_hidden_layers": 2, "num_attention_heads": 4}
IDS = torch.arange(8, 40).reshape(2, 16)


@pytest.fixture
def library() -> None:
    pytest.importorskip("bitsandbytes", reason="make test-quantized")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("model")
    torch.manual_seed(3)
    config = LlamaConfig(**SHAPE, vocab_size=368, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2)
    LlamaForCausalLM(config).save_pretrained(place)
    tiny_tokenizers.byte_level().save_pretrained(place)
    return place


def kept(model: nn.Module) -> dict[str, nn.Linear]:
    """The layers in 4 bit."""
    linear = {name: one for name, one in model.named_modules() if isinstance(one, nn.Linear)}
    return {name: one for name, one in linear.items() if state_of(one.weight) is not None}


def read_back(folder: Path, quantized: nn.Module, dtype: str) -> nn.Module:
    """An ordinary model of the weights that the one in 4 bit computes with."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    for name, layer in kept(quantized).items():
        model.get_submodule(name).weight = nn.Parameter(dense(layer.weight, state_of(layer.weight)))
    return model


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_it_is_the_model_of_the_weights_that_are_read_back(folder: Path, dtype: str) -> None:
    model = pretrained(folder, dtype=dtype, quantize="nf4", device="cpu")
    assert is_quantized(model)
    assert len(kept(model)) == 2 * 7
    assert "lm_head" not in kept(model)
    assert model.dtype == getattr(torch, dtype)
    ordinary = read_back(folder, model, dtype)
    assert not is_quantized(ordinary)
    with torch.inference_mode():
        found = model(input_ids=IDS).logits
        assert torch.equal(found, ordinary(input_ids=IDS).logits)
        full = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))(input_ids=IDS).logits
    assert not torch.allclose(found, full, atol=0.05)  # it is another base, and that is why its identity is another


@pytest.mark.usefixtures("library")
def test_the_layers_take_four_bits_and_a_little_for_scales(folder: Path) -> None:
    model = pretrained(folder, dtype="bfloat16", quantize="nf4", device="cpu")
    full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    for name, layer in kept(model).items():
        weights, state = layer.in_features * layer.out_features, state_of(layer.weight)
        scales = state.absmax.nbytes + state.state2.absmax.nbytes
        assert layer.weight.nbytes == weights / 2
        assert 8 * (layer.weight.nbytes + scales) / weights == pytest.approx(4 + 8 / 64 + 32 / 64 / 256, rel=0.01)
        weight = full.get_submodule(name).weight
        assert 0.05 < (dense(layer.weight, state) - weight).norm() / weight.norm() < 0.12


@pytest.mark.usefixtures("library")
def test_the_same_weights_give_the_same_bits(folder: Path) -> None:
    one, other = (kept(pretrained(folder, dtype="float32", quantize="nf4", device="cpu")) for _ in range(2))
    assert all(torch.equal(layer.weight, other[name].weight) for name, layer in one.items())


@pytest.mark.usefixtures("library")
def test_a_policy_in_4_bit_samples_as_the_weights_that_are_read_back(folder: Path) -> None:
    request = Request((Message("user", "Who is the mayor?"),), Sampling(max_tokens=12, seed=4))
    quantized = pretrained(folder, dtype="float32", quantize="nf4", device="cpu")
    models = (
        TransformersModel.load(folder, quantize="nf4", threads=1),
        TransformersModel.load(read_back(folder, quantized, "float32"), folder, threads=1),
    )
    found, expected = (asyncio.run(model.generate(request)) for model in models)
    assert found.token_ids == expected.token_ids
    assert found.logprobs == pytest.approx(expected.logprobs, abs=1e-5)


@pytest.mark.usefixtures("library")
def test_an_adapter_stays_beside_the_base(folder: Path, tmp_path: Path) -> None:
    """Merged, the sum would be rounded to 4 bit: the last lines show that it is another policy."""
    torch.manual_seed(0)
    expected = get_peft_model(
        read_back(folder, pretrained(folder, dtype="float32", quantize="nf4", device="cpu"), "float32"),
        LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False),
    ).eval()
    expected.save_pretrained(tmp_path)
    policy: Any = TransformersModel.load(folder, adapter_dir=tmp_path, quantize="nf4", threads=1).model
    assert len(kept(policy)) == 2 * 7
    with torch.inference_mode():
        wanted = expected(input_ids=IDS).logits
        torch.testing.assert_close(policy(input_ids=IDS).logits, wanted, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(policy.merge_and_unload()(input_ids=IDS).logits, wanted, atol=0.1)


def test_its_identity_is_another_and_without_it_what_it_was(folder: Path) -> None:
    settings = TransformersModelSettings(path=str(folder))
    plain = base_identity(settings)
    assert plain.endswith(":float32")
    assert base_identity(settings.model_copy(update={"quantize": "nf4"})) == f"{plain}:nf4"


def test_without_the_library_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    require("none", "cpu")
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)  # as if it were not installed
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    require("none", "cpu")
    with pytest.raises(ModelError, match="bitsandbytes, which is not installed") as caught:
        require("nf4", "cpu")
    assert "evolve-dag[quantized]" in caught.value.remedy


@pytest.mark.usefixtures("library")
def test_a_device_that_the_library_does_not_know_is_named() -> None:
    with pytest.raises(ModelError, match="does not compute on vulkan") as caught:
        require("nf4", "vulkan")
    assert "cuda" in caught.value.remedy


@pytest.fixture
def measured_anew(library: None) -> Iterator[None]:
    quantization._off.cache_clear()
    yield
    quantization._off.cache_clear()


@pytest.mark.usefixtures("measured_anew")
@pytest.mark.parametrize("load", [TransformersModel.load, load_model])
def test_weights_that_are_read_back_wrongly_are_refused(load: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library does so on some processors alone, so a stand-in does: every block has its neighbour's scale."""
    from bitsandbytes import functional

    right = functional.dequantize_4bit
    monkeypatch.setattr(
        functional, "dequantize_4bit", lambda weight, state: right(weight.roll(BLOCK // 2, 0), state).roll(-BLOCK)
    )
    with pytest.raises(ModelError, match=r"^quantize: nf4: bitsandbytes \S+ on this processor reads weights 72 wide") as caught:
        load(folder, quantize="nf4")
    told = re.search(r"off by (\d+)%", caught.value.what)
    assert told is not None
    assert int(told[1]) > 50
    assert caught.value.remedy.startswith("set quantize to none, or take another processor or device")


@pytest.mark.usefixtures("measured_anew")
@pytest.mark.parametrize("number", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 64, 72, 200, 576, 2560])
def test_what_four_bits_cost_is_below_what_is_refused(width: int, number: torch.dtype) -> None:
    assert 0.08 < quantization._off(width, number) < 0.11


@pytest.mark.usefixtures("measured_anew")
def test_each_width_is_measured_once_and_an_odd_one_never(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, torch.dtype]] = []
    monkeypatch.setattr(quantization, "_off", lambda *one: seen.append(one) or 0.09)
    model = pretrained(folder, dtype="bfloat16", quantize="nf4", device="cpu")
    assert seen == [(72, torch.bfloat16), (200, torch.bfloat16)]
    for layer in kept(model).values():
        state_of(layer.weight).shape = torch.Size((72, 71))
    quantization._require_right(model, "nf4")
    assert len(seen) == 2
    monkeypatch.setattr(quantization, "_off", lambda *_: float("nan"))
    with pytest.raises(ModelError, match="72 wide"):
        pretrained(folder, dtype="bfloat16", quantize="nf4", device="cpu")


@pytest.mark.usefixtures("library")
def test_a_broken_folder_is_named_in_4_bit_too(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be read"):
        TransformersModel.load(tmp_path, quantize="nf4")


@pytest.mark.parametrize(
    ("backend", "word"),
    [("{backend: vllm, path: m, quantize: nf4}", "'none'"), ("{path: m, quantize: int4}", "'nf4'")],
)
def test_vllm_and_unknown_formats_are_refused(tmp_path: Path, backend: str, word: str) -> None:
    """vLLM would sample from other weights than those that teach and learn."""
    file = tmp_path / "x.yaml"
    file.write_text(f"models: {{policy: {backend}}}\n")
    with pytest.raises(ConfigError) as caught:
        load_experiment(file)
    assert "models.policy" in str(caught.value)
    assert "quantize" in str(caught.value)
    assert word in str(caught.value)
