"""Tokenizers as published, cut to their first 2,000 merges, and kinds of tokenizers that treat text otherwise.

``tokenizers/qwen3-head.json`` has Qwen3's byte-level vocabulary, normalizer, pattern and all of its added tokens;
``tokenizers/smollm2-head.json`` is SmolLM2-135M-Instruct's. Both are Apache-2.0. A cut vocabulary splits words into more
pieces; everything that decides whether text can become a control token is as published.

More folders with a ``tokenizer.json`` can be named in EVOLVE_TOKENIZERS, separated as in PATH.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, normalizers
from transformers import PreTrainedTokenizerFast

from evolve_dag.environments.pocket.tokenizer import build_tokenizer

HEADS = Path(__file__).parent / "tokenizers"
TURNS = ("<|im_start|>", "<|im_end|>")
LLAMA_3 = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>")


def _wrapped(tokenizer: Tokenizer, **names: str) -> Any:
    named = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", **names}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named)


def qwen3() -> Any:
    """``<tool_call>``, ``<think>`` and the fill-in-the-middle tokens are added but not special."""
    return _wrapped(Tokenizer.from_file(str(HEADS / "qwen3-head.json")))


def smollm2() -> Any:
    """Special tokens without bars (``<repo_name>``); the tags of an action are ordinary text."""
    return _wrapped(Tokenizer.from_file(str(HEADS / "smollm2-head.json")))


def folding() -> Any:
    """Qwen3's with a normalizer that turns full-width characters into control strings after the text was searched for them."""
    content = json.loads((HEADS / "qwen3-head.json").read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["normalized"] = True
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.normalizer = normalizers.NFKC()
    return _wrapped(tokenizer)


def llama_3() -> Any:
    """ChatML over Llama 3's tokens (as Hermes 3 has it), with a begin-of-text token that a post-processor puts in front."""
    content = json.loads((HEADS / "qwen3-head.json").read_text(encoding="utf-8"))
    first = min(token["id"] for token in content["added_tokens"])
    texts = [*LLAMA_3, "<|endoftext|>", *TURNS, "<tool_call>", "</tool_call>"]
    content["added_tokens"] = [{**content["added_tokens"][0], "id": first + n, "content": text} for n, text in enumerate(texts)]
    content["normalizer"] = None
    begin = {"SpecialToken": {"id": texts[0], "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [begin, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [begin, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {texts[0]: {"id": texts[0], "ids": [first], "tokens": [texts[0]]}},
    }
    return _wrapped(Tokenizer.from_str(json.dumps(content)), bos_token=texts[0])


def sentencepiece() -> Any:
    """Llama 2's kind: a blank is put in front of every text, ``<s>`` and ``</s>`` are special, unknown letters become bytes."""
    letters = [chr(code) for code in range(33, 127)]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *letters, "\n"]
    model: dict[str, Any] = {
        "type": "BPE", "dropout": None, "unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None,
        "fuse_unk": True, "byte_fallback": True, "ignore_merges": False,
        "vocab": {piece: number for number, piece in enumerate(pieces)}, "merges": [],
    }  # fmt: skip
    blank: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    front = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, blank]}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    tokenizer = Tokenizer.from_str(
        json.dumps(
            {
                "version": "1.0", "truncation": None, "padding": None, "added_tokens": [], "normalizer": front,
                "pre_tokenizer": None, "post_processor": None, "model": model,
                "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}]},
            }
        )
    )  # fmt: skip
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>", *TURNS)])
    return _wrapped(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>")


def _folder(path: Path) -> Callable[[], Any]:
    return lambda: _wrapped(Tokenizer.from_file(str(path / "tokenizer.json")))


MAKERS: dict[str, Callable[[], Any]] = {
    "pocket": build_tokenizer,
    "qwen3": qwen3,
    "smollm2": smollm2,
    "folding": folding,
    "llama_3": llama_3,
    "sentencepiece": sentencepiece,
} | {Path(name).name: _folder(Path(name)) for name in os.environ.get("EVOLVE_TOKENIZERS", "").split(os.pathsep) if name}
