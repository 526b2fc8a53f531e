"""Adapters on disk: two files in peft's format, the same bytes for the same weights.

``adapter_model.safetensors`` and ``adapter_config.json`` can be given to ``peft.PeftModel.from_pretrained`` or to
an inference server as they are. The config names the base model as configured, never a path of this machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve_dag.errors import ConfigError, ModelError, StoreError
from evolve_dag.inference.quantization import state_of
from evolve_dag.inference.quiet import quiet_peft
from evolve_dag.store.layout import ADAPTER_CONFIG, ADAPTER_WEIGHTS

if TYPE_CHECKING:
    from peft import LoraConfig
    from torch import Tensor, nn


def attach(model: nn.Module, *, rank: int, alpha: float, seed: int, init_adapter: Path | None = None) -> Any:
    """Wrap ``model`` with trainable LoRA weights on all linear layers but the output layer; a mixture's experts, which lie in
    one tensor, stay as they are.

    Without ``init_adapter`` A is random (from ``seed`` alone) and B is 0, so the wrapped model equals the base.
    With it, training continues from its weights.

    Raises:
        ModelError: the model carries an adapter already.
        ConfigError: ``init_adapter`` has another rank or alpha.
        StoreError: ``init_adapter`` is missing, corrupt or belongs to another architecture.
    """
    import torch
    from peft import LoraConfig, get_peft_model

    if hasattr(model, "get_base_model"):
        raise ModelError("the model carries an adapter already", "give the base model and name the adapter's folder")
    config = partial(LoraConfig, r=rank, lora_alpha=alpha, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
    layers = _linear_layers(model, config)
    if init_adapter is not None:
        found = read_config(init_adapter)
        if found["r"] != rank or found["lora_alpha"] != alpha:
            raise ConfigError(
                f"{init_adapter}: adapter of rank {found['r']} and alpha {found['lora_alpha']}, "
                f"the experiment asks for rank {rank} and alpha {alpha}",
                "an adapter continues with its own rank: set distillation.rank and distillation.alpha to these, or start anew",
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        with quiet_peft():
            wrapped = get_peft_model(model, config(target_modules=layers))
    if init_adapter is not None:
        try:
            _load_weights(wrapped, init_adapter)
        except BaseException:
            detach(wrapped)
            raise
    return wrapped


def _linear_layers(model: nn.Module, config: Callable[..., LoraConfig]) -> str | list[str]:
    """What peft is to wrap. Of experts in one tensor it would make layers within layers, with ranks of their own, which neither
    the function of :mod:`evolve_dag.inference.lora` nor an inference server knows."""
    import torch
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    if all(one.dim() < 3 for one in model.parameters()):
        return "all-linear"
    causal: Any = model
    head = causal.get_output_embeddings()
    linear = {name: one for name, one in model.named_modules() if isinstance(one, torch.nn.Linear) and one is not head}
    names = {name.rpartition(".")[2] for name, one in linear.items() if _multiplies(one)}
    taken = config(target_modules=sorted(names))
    # Where dense layers (GLM-4.5, DeepSeek: the first ones, shared experts) are called as experts were in older checkpoints,
    # peft takes the names for the experts', and moves them out of this list.
    convert_peft_config_for_transformers(taken, causal, None)
    return sorted(taken.target_modules or ())


def _multiplies(layer: nn.Linear) -> bool:
    """Whether a linear layer, ordinary or in 4 bit, is no more than that: a router may be one by its class."""
    import torch

    return type(layer).forward is torch.nn.Linear.forward or state_of(layer.weight) is not None


def detach(wrapped: Any) -> Any:
    """The base model again, as it was before :func:`attach`."""
    base = wrapped.unload()
    # peft leaves its notes on the base model; the next attach would warn of a second adapter.
    for name in ("peft_config", "_hf_peft_config_loaded"):
        if name in vars(base):
            delattr(base, name)
    for parameter in base.parameters():
        parameter.requires_grad_(parameter.is_floating_point())  # what is kept in 4 bit can have none
    return base


def save_adapter(wrapped: Any, folder: Path, *, base: str = "") -> None:
    """Write the adapter of a peft model.

    Args:
        base: identity of the base model as the experiment names it (``pocket``, a hub name). A path is cut
            to its last part.

    Raises:
        StoreError: the files cannot be written.
        ModelError: a weight is not a finite number.
    """
    import torch
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in get_peft_model_state_dict(wrapped).items()}
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise ModelError(f"adapter weights are not finite: {broken[0]}", "lower distillation.learning_rate")
    name = Path(base).name if Path(base).is_absolute() else base
    config = {**wrapped.peft_config["default"].to_dict(), "base_model_name_or_path": name, "inference_mode": True}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(weights, str(folder / ADAPTER_WEIGHTS), metadata={"format": "pt"})
        text = json.dumps(config, indent=2, sort_keys=True, default=_plain)
        (folder / ADAPTER_CONFIG).write_text(text + "\n", encoding="utf-8")
    except Exception as error:  # safetensors has error types of its own for a full disk
        raise StoreError(f"{folder}: adapter cannot be written: {error}", "free disk space, or use another store") from error


def load_adapter(model: nn.Module, folder: Path) -> Any:
    """Wrap ``model`` with a saved adapter, frozen, for inference; in half precision computed as in training.

    Raises:
        StoreError: a file is missing or corrupt, or the adapter belongs to another architecture.
    """
    from evolve_dag.inference.lora import can_merge, wear

    config = read_config(folder)
    wrapped = attach(model, rank=config["r"], alpha=config["lora_alpha"], seed=0, init_adapter=folder)
    for parameter in wrapped.parameters():
        parameter.requires_grad_(False)
    return wrapped.eval() if can_merge(wrapped) else wear(wrapped)


def read_config(folder: Path) -> dict[str, Any]:
    """The adapter's config.

    Raises:
        StoreError: it is missing, not JSON, or not a LoRA config.
    """
    path = folder / ADAPTER_CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StoreError(f"{path}: no such file", "the folder holds no adapter: materialize adapter again") from None
    except (OSError, ValueError) as error:
        raise StoreError(f"{path}: cannot be read: {error}", _AGAIN) from error
    known = config if isinstance(config, dict) else {}
    numbers = isinstance(known.get("r"), int) and isinstance(known.get("lora_alpha"), (int, float))
    if not numbers or known.get("peft_type") != "LORA":
        raise StoreError(f"{path}: not the config of a LoRA adapter", _AGAIN)
    return known


_AGAIN = "the file was changed or cut off: delete the artifact and materialize adapter again"


def _read_weights(folder: Path) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    path = folder / ADAPTER_WEIGHTS
    if not path.is_file():
        raise StoreError(f"{path}: no such file", "the folder holds no adapter: materialize adapter again")
    try:
        return load_file(str(path))
    except Exception as error:  # safetensors raises its own type, which derives from Exception alone
        raise StoreError(f"{path}: cannot be read: {error}", _AGAIN) from error


def _load_weights(wrapped: Any, folder: Path) -> None:
    import torch
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    weights = _read_weights(folder)
    expected: Mapping[str, Tensor] = get_peft_model_state_dict(wrapped)
    wrong = sorted(set(weights) ^ set(expected)) or [name for name in weights if weights[name].shape != expected[name].shape]
    if wrong:
        raise StoreError(
            f"{folder / ADAPTER_WEIGHTS}: does not fit this model: {len(wrong)} weights, the first {wrong[0]}",
            "the adapter belongs to another base model: check models.policy.path",
        )
    broken = [name for name, tensor in weights.items() if not torch.isfinite(tensor).all()]
    if broken:
        raise StoreError(f"{folder / ADAPTER_WEIGHTS}: {broken[0]} is not finite", _AGAIN)
    set_peft_model_state_dict(wrapped, weights)


def _plain(value: Any) -> Any:
    """Sets in a stable order (their own depends on the process), enums by value."""
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    return getattr(value, "value", str(value))
