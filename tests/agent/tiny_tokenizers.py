"""Two small tokenizers with ChatML tokens, made in memory."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TAGS = ["<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"]
TEXT = [
    "What is the mayor of the home of person Bado Keli?",
    "page: city Bado Keli\nmayor: person Rato Miku\nstream: river Zano Pile",
    '2 results\n1. city Bado Keli: mayor: person Rato Miku\n{"name": "search", "arguments": {"query": "Bado Keli mayor"}}',
    "hint:\nVerify: when a snippet names the answer, visit the page before answering.\nlast step: answer now",
]


def byte_level() -> Any:
    """Byte-level BPE as Qwen3 has it: control tokens special, ``<tool_call>`` and the like added but not special."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(TEXT * 4, trainers.BpeTrainer(vocab_size=360, initial_alphabet=alphabet, show_progress=False))
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in TAGS])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|endoftext|>")


def word_level() -> Any:
    """Words, tags among them as ordinary words of the vocabulary; unknown text falls to single characters."""
    letters = [chr(code) for code in range(33, 127)] + ["\n", " "]
    words = ["[UNK]", *SPECIAL, *TAGS, "<answer>", "</answer>", "user", "system", "assistant", "Bado", "Keli", *letters]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"<\|?/?[a-z_]+\|?>|[A-Za-z]+|\n| |."), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", unk_token="[UNK]")
