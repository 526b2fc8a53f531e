"""Messages -> token ids, in ChatML, piece by piece.

Every part of the text is encoded on its own: headers and footers once, with control tokens; content without
them, so text from outside (a web page, a question, an experience item) can never open or close a turn. Tokens of
the action grammar (``<tool_call>``) may come from the policy's turns and the system message only. What was
sampled is copied verbatim. Three properties follow, and the tests hold them:

- the encoding of a history is a prefix of the encoding of every longer history (DESIGN: Alignment);
- text that is appended to a copy of one message changes the ids of that message only;
- no id of a control token stems from content.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evolve_dag.errors import ModelError
from evolve_dag.records import Message, Role

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

TURN_START = "<|im_start|>"
TURN_END = "<|im_end|>"
GRAMMAR_TAGS = (
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<answer>",
    "</answer>",
    "<think>",
    "</think>",
)
"""Tags with a meaning in an action. Where a tokenizer has one of them as a single token, only the policy and
the system message may produce it."""

_HEADERS: dict[Role, str] = {
    "system": f"{TURN_START}system\n",
    "user": f"{TURN_START}user\n",
    "assistant": f"{TURN_START}assistant\n",
    "tool": f"{TURN_START}user\n<tool_response>\n",
}
_FOOTERS: dict[Role, str] = {
    "system": f"{TURN_END}\n",
    "user": f"{TURN_END}\n",
    "assistant": f"{TURN_END}\n",
    "tool": f"\n</tool_response>{TURN_END}\n",
}
NO_THOUGHT = "<think>\n\n</think>\n\n"
"""What opens a turn of a model that thinks unless it is told not to, as Qwen3's template writes it."""
_TRUSTED: frozenset[Role] = frozenset({"system", "assistant"})
_MEMO = 16_384
"""Encodings of content kept: a turn is encoded once, though every later call of its episode holds it."""


class ChatFormat:
    """ChatML over one tokenizer. Make it with :meth:`from_tokenizer`."""

    end_of_turn_id: int
    """Id of ``<|im_end|>``."""
    stop_ids: frozenset[int]
    """Ids that end an action: end of turn, and the tokenizer's end of text where that is another id."""
    vocab_size: int
    """Ids of the tokenizer are below this; the model's embedding may be larger (padded)."""

    def __init__(
        self,
        backend: FastTokenizer,
        *,
        end_of_text_id: int | None = None,
        named_ids: Iterable[int] = (),
        opening: str = "",
        beginning: int | None = None,
        name: str = "tokenizer",
    ) -> None:
        from tokenizers import Tokenizer as FastTokenizer

        for token in (TURN_START, TURN_END):
            if backend.token_to_id(token) is None:
                raise ModelError(
                    f"{name} has no {token} token, so it cannot mark turns",
                    "use a model with a ChatML tokenizer (Qwen2, Qwen3, SmolLM2-Instruct), or add the special tokens "
                    f"{TURN_START} and {TURN_END} and train their embeddings",
                )
        named_ids = frozenset(named_ids)
        # Private copies: whether special tokens are recognised is state of the tokenizer object itself.
        serialized = backend.to_str()
        self._markup = FastTokenizer.from_str(serialized)
        self._content = FastTokenizer.from_str(serialized)
        for tokenizer in (self._markup, self._content):
            tokenizer.no_padding()
            tokenizer.no_truncation()
        self._content.encode_special_tokens = True
        self.vocab_size = 1 + max(backend.get_vocab(with_added_tokens=True).values())
        end_of_turn = backend.token_to_id(TURN_END)
        assert end_of_turn is not None
        self.end_of_turn_id = end_of_turn
        self.stop_ids = frozenset({self.end_of_turn_id} | ({end_of_text_id} if end_of_text_id is not None else set()))

        added = backend.get_added_tokens_decoder()
        special = {index: token.content for index, token in added.items() if token.special}
        # A tokenizer may have parts of the action grammar as special tokens. Those are for the policy to write.
        control = {i: text for i, text in special.items() if re.search(r"<\|.*?\|>", text) or i in named_ids}
        tags = {i: token.content for i, token in added.items() if re.fullmatch(r"<.+>", token.content, re.S)}
        for tag in GRAMMAR_TAGS:
            if (index := backend.token_to_id(tag)) is not None:
                tags[index] = tag
        self._closed = {True: _Closed(control), False: _Closed(special | tags)}
        self._headers = {role: self._markup_ids(text) for role, text in _HEADERS.items()}
        # In every turn, those of the history too: what was sampled after it must stand after it.
        self._headers["assistant"] += self._markup_ids(opening)
        self._beginning = [] if beginning is None else [beginning]
        self._footers = {role: self._markup_ids(text) for role, text in _FOOTERS.items()}
        self._after_end = self._markup_ids("\n")
        self._encode_content = lru_cache(maxsize=_MEMO)(self._encode_content_anew)

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> ChatFormat:
        """Build from a fast Hugging Face tokenizer.

        Raises:
            ModelError: the tokenizer is not a fast one, or has no ChatML tokens.
        """
        name = f"tokenizer of {getattr(tokenizer, 'name_or_path', '') or type(tokenizer).__name__}"
        backend = getattr(tokenizer, "backend_tokenizer", None)
        if backend is None or not hasattr(backend, "to_str"):
            raise ModelError(
                f"{name} is not a fast tokenizer",
                "load it with AutoTokenizer.from_pretrained(...); the folder must hold a tokenizer.json",
            )
        named = tokenizer.convert_tokens_to_ids(list(tokenizer.special_tokens_map.values()))
        opening = NO_THOUGHT if switches_thought(getattr(tokenizer, "chat_template", None)) else ""
        beginning = tokenizer.bos_token_id if begins_with_bos(getattr(tokenizer, "chat_template", None)) else None
        end = tokenizer.eos_token_id
        return cls(backend, end_of_text_id=end, named_ids=named, opening=opening, beginning=beginning, name=name)

    def encode(self, messages: Sequence[Message], *, generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation.

        Args:
            generation_prompt: end with the header of the assistant's turn, so that the next sampled id is
                the first of an action.
        """
        ids = [*self._beginning, *(index for part in self.encode_parts(messages) for index in part)]
        if generation_prompt:
            ids.extend(self._headers["assistant"])
        return ids

    def encode_parts(self, messages: Iterable[Message]) -> list[list[int]]:
        """Ids of each message with its header and footer, in order; their concatenation, behind the token of the beginning
        where the model has one, is :meth:`encode` without the generation prompt."""
        return [self._encode_message(message) for message in messages]

    def encode_action(self, text: str) -> list[int]:
        """Ids of an action that was written, not sampled: its text, then the end of the turn."""
        return [*self._encode_content(text, True), self.end_of_turn_id]

    def tokenizer_json(self) -> str:
        """The tokenizer, as a tokenizer.json holds it, without padding and truncation."""
        text: str = self._markup.to_str()
        return text

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ``ids``, control tokens included as text."""
        text: str = self._markup.decode(list(ids), skip_special_tokens=False)
        return text

    def decode_action(self, ids: Sequence[int]) -> str:
        """Text of sampled ids, without the token that ended the turn."""
        end = len(ids)
        while end and ids[end - 1] in self.stop_ids:
            end -= 1
        return self.decode(ids[:end])

    def _encode_message(self, message: Message) -> list[int]:
        if message.role == "assistant" and message.token_ids:
            ids = [*self._headers["assistant"], *message.token_ids]
            if ids[-1] != self.end_of_turn_id:
                ids.append(self.end_of_turn_id)
            ids.extend(self._after_end)
            return ids
        content = self._encode_content(message.content, message.role in _TRUSTED)
        return [*self._headers[message.role], *content, *self._footers[message.role]]

    def _markup_ids(self, text: str) -> tuple[int, ...]:
        return tuple(self._markup.encode(text, add_special_tokens=False).ids)

    def _encode_content_anew(self, text: str, trusted: bool) -> tuple[int, ...]:
        """Ids of ``text`` that hold no control token.

        A closed token's text is broken after its first character and the two halves are encoded apart, so no
        pre-tokenizer, merge or added-token match can join them again. Should a normalizer still make one (a
        full-width ``＜`` under NFKC), the text is encoded character by character.
        """
        closed = self._closed[trusted]
        tokenizer = self._markup if trusted else self._content
        ids = [index for piece in closed.pieces(text) for index in tokenizer.encode(piece, add_special_tokens=False).ids]
        if not closed.ids.isdisjoint(ids):
            ids = [index for letter in text for index in self._content.encode(letter, add_special_tokens=False).ids]
            ids = [index for index in ids if index not in closed.ids]
        return tuple(ids)


def switches_thought(template: str | Mapping[str, str] | None) -> bool:
    """Whether a model thinks before it acts unless its turn begins with :data:`NO_THOUGHT`.

    Args:
        template: its chat template, or several by name. They are read, and never run.
    """
    texts = template.values() if isinstance(template, Mapping) else [template or ""]
    return any("enable_thinking" in text and NO_THOUGHT.replace("\n", "\\n") in text for text in texts)


def begins_with_bos(template: str | Mapping[str, str] | None) -> bool:
    """Whether a model's conversations begin with its token of the beginning.

    Args:
        template: its chat template, or several by name. They are read, and never run.
    """
    texts = template.values() if isinstance(template, Mapping) else [template or ""]
    return any(re.search(r"\{\{-?\s*bos_token\b", text) for text in texts)


def read_chat(folder: str | Path) -> ChatFormat:
    """The format over the tokenizer in a model's folder.

    Raises:
        ModelError: it cannot be read, or is none that :class:`ChatFormat` can use.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as problem:  # transformers and tokenizers share no base class
        raise ModelError(
            f"tokenizer of {folder}: cannot be read: {type(problem).__name__}: {problem}", "the folder must hold tokenizer.json"
        ) from problem
    return ChatFormat.from_tokenizer(tokenizer)


class _Closed:
    """Tokens that content must not produce."""

    def __init__(self, tokens: dict[int, str]) -> None:
        self.ids = frozenset(tokens)
        texts = sorted({text for text in tokens.values() if len(text) > 1}, key=len, reverse=True)
        # Zero width: matches between the first character of a closed token and its rest.
        self._break = re.compile("|".join(f"(?<={re.escape(t[0])})(?={re.escape(t[1:])})" for t in texts)) if texts else None

    def pieces(self, text: str) -> list[str]:
        if self._break is None:
            return [text]
        return [piece for piece in self._break.split(text) if piece]
