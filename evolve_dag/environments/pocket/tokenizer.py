"""Tokenizer of the pocket policy: one token a word, control strings of the chat template as single tokens.

The chat text is ChatML with Qwen3's tool-call grammar, letter for letter; only the cut into tokens is the pocket
world's own, so that an action costs a dozen tokens instead of forty. Any other text is spelled in bytes, so nothing
is unreadable, only expensive.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from evolve_dag.environments.pocket.language import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END_OF_TURN = "<|endoftext|>", "<|im_end|>"
CONTROL = (
    PAD,
    END_OF_TURN,
    "<|im_start|>",
    "<|im_start|>system\n",
    "<|im_start|>user\n",
    "<|im_start|>assistant\n",
    "<|im_start|>user\n<tool_response>\n",
    "\n</tool_response><|im_end|>\n",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    '\n<tool_call>\n{"name": "',
    '", "arguments": {"query": "',
    '", "arguments": {"page": "',
    '", "arguments": {"entry": "',
    '"}}\n</tool_call>',
    "<answer>",
    "</answer>",
)
"""Control strings, each one token. They are special: text from outside that spells them stays ordinary text."""
_PUNCTUATION = list(".,:;?!-()[]{}\"'/_<>|=+*&%$#@^~`\\")
_SPACE = "\u2581"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message.role == 'tool' -%}"
    "{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' -}}"
    "{%- else -%}"
    "{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, from the words of :mod:`evolve_dag.environments.pocket.language` alone."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = [f"{_SPACE}{w}" for w in vocabulary() if w not in _PUNCTUATION]
    marks = [f"{_SPACE}{m}" for m in [*_PUNCTUATION, "\n"]]
    byte_tokens = [f"<0x{b:02X}>" for b in range(256)]
    tokens = [*CONTROL, *words, *marks, _SPACE, *byte_tokens]
    vocab = {t: i for i, t in enumerate(dict.fromkeys(tokens))}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[], byte_fallback=True, ignore_merges=True, unk_token=None))
    inner.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[ \t\r]+"), "removed"),
            pre_tokenizers.Split(Regex(r"\n|\p{L}+|\p{N}|[^\p{L}\p{N}\n]"), "isolated"),
            pre_tokenizers.Metaspace(replacement=_SPACE, prepend_scheme="always", split=False),
        ]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Replace(Regex(rf"{_SPACE}(?=[.,:;?!\)\]\}}'\n])"), ""),
            decoders.Replace(Regex(rf"(?<=[\n\"'(\[{{>]){_SPACE}|^{_SPACE}"), ""),
            decoders.Replace(_SPACE, " "),
        ]
    )
    inner.add_special_tokens([AddedToken(c, special=True, normalized=False) for c in CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        eos_token=END_OF_TURN,
        chat_template=CHAT_TEMPLATE,
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
