"""A base in 4 bit: NF4 with its scales quantized once more, as QLoRA has it (arXiv:2305.14314, section 3), by bitsandbytes.

The linear layers are kept so, but for the output layer; the rest, and every product, is in ``dtype``. An adapter stays beside
such a base: added in, the sum would be rounded to 4 bit again, and act as another policy than the one that was trained.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve_dag.errors import ModelError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK = 64
"""Weights that share a scale."""
SCALES = 256
"""Scales that share one of their own."""
MOST_OFF = 0.15
"""Of weights that were read back, relative to their size: 4 bit cost 0.09."""


def require(quantize: str, device: str) -> None:
    """Whether a base can be kept as ``models.*.quantize`` says.

    Raises:
        ModelError: bitsandbytes is missing, or does not know the device.
    """
    if quantize == "none":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ModelError(
            f"quantize: {quantize} needs the library bitsandbytes, which is not installed",
            "pip install -c constraints.txt 'evolve-dag[quantized]', or set quantize to none",
        )
    import bitsandbytes
    import torch

    if torch.device(device).type not in bitsandbytes.supported_torch_devices:
        raise ModelError(
            f"quantize: {quantize}: bitsandbytes {bitsandbytes.__version__} does not compute on {device}",
            f"set quantize to none, or runtime.device to one of {', '.join(sorted(bitsandbytes.supported_torch_devices))}",
        )


def pretrained(folder: Path | str, *, dtype: str, quantize: str, device: str) -> Any:
    """A causal language model of transformers on ``device``; :func:`require` first.

    Raises:
        ModelError: bitsandbytes reads its weights in 4 bit back wrongly on this processor.
        Exception: whatever transformers, safetensors or the config parser raise.
    """
    import torch
    from transformers import AutoModelForCausalLM

    number = getattr(torch, dtype)
    # What a folder is called by is the hash of its *.safetensors: no other weights count. And without a word about code of its
    # own transformers would ask at the terminal whether to run it.
    how: dict[str, Any] = {"dtype": number, "local_files_only": True, "use_safetensors": True, "trust_remote_code": False}
    if quantize == "none":
        return AutoModelForCausalLM.from_pretrained(str(folder), **how).to(device)
    from transformers import BitsAndBytesConfig

    how["quantization_config"] = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quantize, bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=number
    )
    model = AutoModelForCausalLM.from_pretrained(str(folder), device_map={"": device}, **how)
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # Such a CPU would pack the weights anew at the first answer, for a product in bfloat16 and without a gradient.
            module.support_avx512bf16_for_cpu = False
    if torch.device(device).type == "cpu":
        _require_right(model, quantize)
    return model


def _require_right(model: Any, quantize: str) -> None:
    """Whether the library reads back rows as wide as those of ``model``: on CPUs with AVX512 bitsandbytes 0.50.2 does not where
    that is a multiple of 16 and none of 64.

    Raises:
        ModelError: it does not.
    """
    from bitsandbytes import __version__ as version

    states = [state for weight in model.parameters() if (state := state_of(weight)) is not None]
    for width, number in sorted(
        {(int(state.shape[-1]), state.dtype) for state in states}, key=lambda one: (one[0], str(one[1]))
    ):
        # Rows of an odd width take another road there, in PyTorch: it is right, and compiled for 20 s before it is taken first.
        if width % 2 == 0 and not (off := _off(width, number)) <= MOST_OFF:
            raise ModelError(
                f"quantize: {quantize}: bitsandbytes {version} on this processor reads weights {width} wide back wrongly: "
                f"they are off by {100 * off:.0f}%, where 4 bit cost 9%",
                "set quantize to none, or take another processor or device (runtime.device)",
            )


@cache
def _off(width: int, number: torch.dtype) -> float:
    """How far weights of that width are off when they have been read back, relative to their size. Takes milliseconds."""
    import torch
    from bitsandbytes.functional import quantize_4bit

    drawn, rows = torch.Generator().manual_seed(0), max(8, -(-8192 // width))
    # Blocks of other sizes: one that is read with a neighbour's scale is far off.
    sizes = 2.0 ** torch.randint(0, 5, (-(-rows * width // BLOCK),), generator=drawn)
    weights = torch.randn(rows * width, generator=drawn) * sizes.repeat_interleave(BLOCK)[: rows * width]
    weights = weights.reshape(rows, width).to(number)
    kept, state = quantize_4bit(weights, blocksize=BLOCK, quant_type="nf4", compress_statistics=True)
    return float((dense(kept, state) - weights).float().norm() / weights.float().norm())


def is_quantized(model: Any) -> bool:
    """Whether a model, bare or wrapped by peft, is kept in fewer bits than it computes in."""
    return bool(getattr(model, "is_quantized", False))


def state_of(weight: Tensor) -> Any:
    """What a weight in 4 bit is read with (bitsandbytes' ``QuantState``); None for any other."""
    return getattr(weight, "quant_state", None)


def packed(shape: Sequence[int], dtype: torch.dtype) -> torch.nn.Parameter:
    """A weight in 4 bit whose numbers mean nothing, to calculate with what it takes."""
    import torch
    from bitsandbytes.functional import QuantState

    scales = -(-math.prod(shape) // BLOCK)
    outer = QuantState(torch.empty(-(-scales // SCALES)), code=torch.empty(256), blocksize=SCALES, dtype=torch.float32)
    state = QuantState(
        torch.empty(scales, dtype=torch.uint8),
        shape=torch.Size(shape),
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=outer,
    )
    found: Any = torch.nn.Parameter(torch.empty(-(-math.prod(shape) // 2), 1, dtype=torch.uint8), requires_grad=False)
    found.quant_state = state
    return found


def dense(weight: Tensor, state: Any) -> Tensor:
    """The weight ``(out, in)`` as it is computed with: made anew at every call where it is kept in 4 bit."""
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    found: Tensor = dequantize_4bit(weight, state)
    return found
