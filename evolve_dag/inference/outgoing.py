"""Text on its way to an endpoint: control strings broken, a conversation that is too long cut in its middle.

An endpoint tokenizes what we send with its own tokenizer, so the id-wise protection of :mod:`evolve_dag.inference.chat` does
not reach there. Instead the strings that tokenizers know as control tokens, and the tags of our action grammar, are broken
by a space wherever the text is not the system's or the policy's own. The reader still sees what stood there.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache

from evolve_dag.errors import ModelError
from evolve_dag.protocols import CountsTokens, LanguageModel
from evolve_dag.records import Message, Role

BYTES_PER_TOKEN = 3.2
"""UTF-8 bytes that count as one token. English has 4 to 4.5, Chinese about 4, digits and names 2 to 3: an estimate on the
careful side, because some servers drop the beginning of what is too long without a word."""
MESSAGE_TOKENS = 8
"""Tokens that a turn's markup counts for."""
LEAST_BYTES = 240
"""A message is not cut below this."""

_TAGS = (
    r"tool_calls?|tool_response|tool_output|answer|think|start_of_turn|end_of_turn|s|bos|eos|pad|unk|"
    r"im_start|im_end|end_of_utterance"
)
_CONTROL = re.compile(
    r"(?P<open>[<＜](?=[|｜])"  # <|im_start|>, <|eot_id|>, <｜User｜>
    rf"|[<＜](?=/?(?:{_TAGS})\s*[>＞])"  # <tool_call>, </s>, <start_of_turn>
    r"|<(?=[a-z_]{1,24}\|>)"  # <turn|>, <tool_response|>
    r"|\[(?=\|[a-z_]{1,24}\|\])"  # [|endofturn|]
    r"|<(?=</?SYS>>)|\[(?=/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|SYSTEM_PROMPT|THINK)\]))",
    re.IGNORECASE,
)


def neutral(text: str) -> str:
    """``text`` with a space inside every control string, e.g. ``< |im_start|>`` and ``< /tool_response>``."""
    return _CONTROL.sub(r"\g<open> ", text) if "<" in text or "[" in text or "＜" in text else text


def chat_messages(messages: Sequence[Message]) -> list[dict[str, str]]:
    """A conversation as endpoints take it.

    A tool message goes as a user turn that wraps its content in ``<tool_response>``, as the chat text of every backend
    does. System and assistant messages are sent as they are; what is not text (half of a surrogate pair) becomes ``?``.
    """
    return [
        {"role": "user" if message.role == "tool" else message.role, "content": _content(message.role, message.content)}
        for message in messages
    ]


@lru_cache(maxsize=8_192)  # every call of an episode sends its earlier turns again
def _content(role: Role, content: str) -> str:
    if role in ("user", "tool"):
        content = neutral(content)
    if role == "tool":
        content = f"<tool_response>\n{content}\n</tool_response>"
    return content if content.isascii() else content.encode("utf-8", "replace").decode("utf-8")


def size(text: str) -> int:
    """UTF-8 bytes."""
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def estimate(messages: Sequence[dict[str, str]]) -> int:
    """Tokens of a conversation, roughly; no tokenizer needed."""
    return sum(round(size(m["content"]) / BYTES_PER_TOKEN) + MESSAGE_TOKENS for m in messages)


def tokens_of(model: LanguageModel, message: Message) -> int:
    """What a message adds to a conversation: as the model counts, else by :func:`estimate`."""
    if isinstance(model, CountsTokens):
        return model.count_tokens(message)
    return estimate([{"role": message.role, "content": message.content}])


def fit(messages: Sequence[dict[str, str]], tokens: int) -> tuple[list[dict[str, str]], int]:
    """The conversation within ``tokens`` by estimate: head and tail of its longest message stay, and a line between them
    says how much was cut. Where one message does not give enough, the next longest is cut too. The system message stays.

    Returns:
        The messages and the number of characters that were cut; the messages unchanged and 0 where they fit.

    Raises:
        ModelError: even with every message cut to :data:`LEAST_BYTES` it is too long.
    """
    fitted = [dict(message) for message in messages]
    excess = estimate(messages) - tokens
    cut = 0
    by_size = sorted((n for n, m in enumerate(fitted) if m["role"] != "system"), key=lambda n: -size(fitted[n]["content"]))
    for position in by_size:
        if excess <= 0:
            break
        content = fitted[position]["content"]
        # One token more than needed: rounding must not leave the sum above the limit.
        shortened, removed = cut_middle(content, size(content) - round((excess + 1) * BYTES_PER_TOKEN))
        fitted[position]["content"] = shortened
        cut += removed
        excess = estimate(fitted) - tokens
    if excess > 0:
        raise ModelError(
            f"the request does not fit: about {estimate(messages)} tokens, {max(0, tokens)} are free, "
            "and cutting its messages is not enough",
            "raise the model's context_tokens, lower the answer's max_tokens, or shorten the system message",
        )
    return fitted, cut


def cut_middle(text: str, limit: int) -> tuple[str, int]:
    """Head and tail of ``text``, at most ``limit`` bytes with the line that tells the cut, and the characters removed.

    Never cuts below :data:`LEAST_BYTES`; a text that is within the limit comes back whole.
    """
    total = size(text)
    limit = max(limit, LEAST_BYTES)
    if total <= limit:
        return text, 0
    keep = int(len(text) * limit / total)
    while True:
        head, tail = (keep + 1) // 2, keep // 2
        removed = len(text) - head - tail
        shortened = f"{text[:head]}\n[... {removed:,} characters cut ...]\n{text[len(text) - tail :]}"
        over = size(shortened) - limit
        if over <= 0 or keep == 0:
            return shortened, removed
        keep = max(0, keep - max(1, int(over * keep / max(1, size(text[:head]) + size(text[len(text) - tail :])))))
