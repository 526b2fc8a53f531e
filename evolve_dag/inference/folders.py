"""Where a model's files lie and what they hash to; nothing here loads a model."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from evolve_dag.config.schema import SHIPPED, PolicySettings, VllmModelSettings
from evolve_dag.errors import ModelError
from evolve_dag.inference.chat import begins_with_bos, switches_thought
from evolve_dag.store.layout import ADAPTER_CONFIG

POCKET = Path(__file__).resolve().parent.parent / "environments" / "pocket" / "model"
"""The policy that ships with the package."""
POCKET_CASES = POCKET.with_name("model_cases")
"""The same, taught to recall a case that stands in its context."""


def shipped() -> dict[str, Path]:
    """Folders of the policies that ship with the package, by what ``models.policy.path`` calls them."""
    return dict(zip(SHIPPED, (POCKET, POCKET_CASES), strict=True))


def pretraining(name: str) -> str:
    """The command that makes the weights of a policy that ships."""
    return f"evolve pocket pretrain{'' if name == 'pocket' else ' --cases'}"


def place(settings: PolicySettings) -> Path:
    """Where a model's files should lie."""
    return shipped().get(settings.path) or Path(settings.path)


def model_folder(settings: PolicySettings) -> Path:
    """Folder of the model's files.

    Raises:
        ModelError: there is no such folder, or it holds no weights, or an adapter.
    """
    folder = place(settings)
    if (folder / ADAPTER_CONFIG).is_file():  # transformers would open the model that it names, wherever that lies, and wear it
        raise ModelError(
            f"{settings.path}: holds an adapter ({ADAPTER_CONFIG}), which is a part of a model",
            "merge it into its base (peft: merge_and_unload, then save_pretrained), and set models.policy.path to that folder",
        )
    if not any(folder.glob("*.safetensors")):
        remedy = (
            f"make the weights: `{pretraining(settings.path)}`"
            if settings.path in SHIPPED
            else "set models.policy.path to a folder with config.json, tokenizer.json and *.safetensors"
        )
        raise ModelError(f"{settings.path}: no weights (*.safetensors) there", remedy)
    return folder


def longest_context(settings: PolicySettings, folder: Path) -> int:
    """Tokens of a context with its answer: what the config of the model in ``folder`` allows, and the engine is asked for.

    In this process the window of a model whose attention slides is the end, since its cache keeps all columns, and so is where
    a model begins to turn all positions otherwise.

    Raises:
        ModelError: there is no readable ``config.json``.
    """
    allowed, window = _own_context(folder)
    return min(allowed, settings.context_tokens) if isinstance(settings, VllmModelSettings) else min(allowed, window)


def _own_context(folder: Path) -> tuple[int, int]:
    """Tokens that the config of a model allows, and those up to which what came before can be kept."""
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        config = {**config, **(config.get("text_config") or {})}
        return int(config.get("max_position_embeddings") or 2**31 - 1), min(_window(config), same_angles(config))
    except (OSError, ValueError, TypeError) as problem:
        raise ModelError(f"{path}: cannot be read: {problem}", "take a folder that from_pretrained reads") from problem


def _window(config: Mapping[str, Any]) -> int:
    """Tokens that a layer of a model looks back, where one does not look back to the beginning."""
    if set(config.get("layer_types") or ()) == {"full_attention"} or config.get("use_sliding_window") is False:
        return 2**31 - 1
    windows = (config.get(name) for name in ("sliding_window", "attention_chunk_size"))
    return min([int(one) for one in windows if one is not None], default=2**31 - 1)


def same_angles(config: Mapping[str, Any]) -> int:
    """Tokens of the longest sequence whose positions are turned by the same angles as a shorter one's. In a longer one LongRoPE
    (Phi-3, MiniCPM) and dynamic scaling (InternLM) turn the first tokens too by others, so what was computed of it before it
    grew so long is of no use, and in one pass with others it changes theirs."""
    most = int(config.get("max_position_embeddings") or 2**31 - 1)
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = [2**31 - 1]
    for rope in (given, *(one for one in given.values() if isinstance(one, Mapping))):  # one for all layers, or one a kind
        kind = rope.get("rope_type") or rope.get("type")
        if kind in ("longrope", "su"):
            name = "original_max_position_embeddings"
            found.append(int(config.get(name) or rope.get(name) or most))
        elif kind == "dynamic":
            found.append(most)
    return min(found)


def is_pocket(settings: PolicySettings) -> bool:
    """Is it a policy that ships with the package, wherever its folder lies?"""
    folder = Path(settings.path)
    return settings.path in SHIPPED or (folder.is_dir() and folder_digest(folder) in map(folder_digest, shipped().values()))


def base_identity(settings: PolicySettings) -> str:
    """Identity of the base model: its weights, their number format and how they are kept, wherever the folder lies."""
    kept = "" if settings.quantize == "none" else f":{settings.quantize}"
    return f"sha256:{folder_digest(model_folder(settings))[:32]}:{settings.dtype}{kept}"


def how_worn(settings: PolicySettings) -> dict[str, str]:
    """How a policy wears its adapter where that is not the plain way, merged into the weights; a part of what it is."""
    return {} if settings.dtype == "float32" else {"worn": "beside the base"}


def how_short(settings: PolicySettings) -> dict[str, int]:
    """The longest context of a policy whose engine is asked for less than the model allows; a part of what it is, since an
    episode that comes to it ends there. Servers have a limit of their own, which nobody knows before they are asked."""
    if not isinstance(settings, VllmModelSettings) or settings.servers:
        return {}
    allowed, _ = _own_context(model_folder(settings))
    return {"context_tokens": settings.context_tokens} if settings.context_tokens < allowed else {}


def turns_of(settings: PolicySettings) -> str:
    """How a model's turns begin where that is not the plain way; a part of what it says that its weights do not tell."""
    template = _chat_template(model_folder(settings))
    ways = {"no thought": switches_thought(template), "a beginning": begins_with_bos(template)}
    return ", ".join(way for way, there in ways.items() if there)


def _chat_template(folder: Path) -> str | dict[str, str]:
    """Of the tokenizer there, or several by name; '' where there is none."""
    own, settings = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    try:
        if own.is_file():
            return own.read_text(encoding="utf-8")
        found = json.loads(settings.read_text(encoding="utf-8")).get("chat_template") or ""
    except (OSError, ValueError, AttributeError):
        return ""
    return found if isinstance(found, str) else {str(one["name"]): str(one["template"]) for one in found}


def folder_digest(folder: Path) -> str:
    """SHA-256 over names and contents of the files that decide what a model says; not of notes on how it was made."""
    kinds, notes = (".safetensors", ".json", ".jinja", ".model"), ("pretraining.json", "measured.json", "warmup.json")
    files = sorted(p for p in folder.iterdir() if p.suffix in kinds and p.name not in notes)
    return _digest(tuple((str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in files))


@lru_cache(maxsize=32)
def _digest(files: tuple[tuple[str, int, int], ...]) -> str:
    total = hashlib.sha256()
    for name, _, _ in files:
        path = Path(name)
        total.update(path.name.encode() + b"\0")
        with path.open("rb") as handle:
            total.update(hashlib.file_digest(handle, "sha256").digest())
    return total.hexdigest()
