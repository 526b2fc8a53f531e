"""Answers that fit a JSON schema, from a model in this process: what may be sampled next, token by token.

The grammar work is done by ``llguidance`` (Rust; a mask takes a fraction of a millisecond). The project runs without it: then
schemas are ignored, and who asked parses and repairs what comes (:mod:`evolve_dag.inference.structured`).
"""

from __future__ import annotations

import json
import logging
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import numpy as np

from evolve_dag.errors import ModelError
from evolve_dag.inference.chat import ChatFormat

log = logging.getLogger(__name__)

_STYLE: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""JSON as ``json.dumps`` writes it and as prompts show it. Free whitespace would let a small model spend its tokens on it."""
_PROBE = '{"a": [1, "b c"]}'
_KEPT = 64
"""Compiled schemas kept; compiling one takes about a millisecond, the first masks of a new one some more."""


class Guide:
    """The state of one answer. Made by :meth:`Guides.start`; used by one thread at a time."""

    def __init__(self, matcher: Any, vocabulary: int, end: int) -> None:
        self._matcher, self._vocabulary, self._end = matcher, vocabulary, end
        self.problem: str | None = None
        """Why the answer cannot go on: no token of the vocabulary continues it. None while it can."""

    @property
    def finished(self) -> bool:
        """Whether nothing but the end of the turn may follow."""
        return self.problem is not None or bool(self._matcher.is_stopped())

    def mask(self) -> np.ndarray:
        """Ids that may come next, [vocabulary of the tokenizer] bool. At least one always is: a complete answer, or one that
        cannot go on, allows the end of the turn."""
        if not self.finished:
            bits = np.frombuffer(self._matcher.compute_bitmask(), dtype=np.uint8)
            allowed = np.unpackbits(bits, bitorder="little")[: self._vocabulary].astype(bool)
            if not self._matcher.is_error() and allowed.any():
                return allowed
            self._fail()
        allowed = np.zeros(self._vocabulary, dtype=bool)
        allowed[self._end] = True
        return allowed

    def advance(self, token: int) -> None:
        """``token`` was sampled. One that :meth:`mask` does not allow ends the answer with a :attr:`problem`."""
        if token == self._end or self.finished:
            return
        if not self._matcher.consume_token(token):
            self._fail()

    def _fail(self) -> None:
        self.problem = _first_line(self._matcher.get_error()) or "no token continues the answer"


class Guides:
    """Makes guides for one tokenizer."""

    def __init__(self, chat: ChatFormat) -> None:
        self._chat = chat
        self._tokenizer: Any = None
        self._usable = True
        self._compiled: OrderedDict[str, Any] = OrderedDict()

    def start(self, schema: Mapping[str, Any]) -> Guide | None:
        """A guide for a new answer; None where the library is missing or cannot read the tokenizer (said once, in the log).

        Raises:
            ModelError: no answer can fit the schema, or it holds what the library does not know.
        """
        if self._usable and self._tokenizer is None:
            self._tokenizer = self._read()
            self._usable = self._tokenizer is not None
        if not self._usable:
            return None
        return Guide(self._compile(json.dumps(schema)).deep_copy(), self._chat.vocab_size, self._chat.end_of_turn_id)

    def _read(self) -> Any:
        """The library's tokenizer, or None. Reading one of 50,000 ids takes a third of a second, once."""
        try:
            from llguidance import LLTokenizer
        except ImportError:
            log.info("schemas of answers are not enforced: llguidance is not installed")
            return None
        try:
            size, end = self._chat.vocab_size, self._chat.end_of_turn_id
            tokenizer = LLTokenizer(self._chat.tokenizer_json(), n_vocab=size, eos_token=end)
            if tokenizer.decode_bytes(tokenizer.tokenize_str(_PROBE)) != _PROBE.encode():
                spelling: Any = _Greedy(tokenizer, size, end)
                tokenizer = LLTokenizer(spelling, n_vocab=size)
            return tokenizer
        except Exception as problem:  # the library raises several kinds
            log.warning("schemas of answers are not enforced: llguidance cannot read this tokenizer: %s", problem)
            return None

    def _compile(self, text: str) -> Any:
        """The matcher at the start of an answer; whoever uses it takes a copy."""
        if text in self._compiled:
            self._compiled.move_to_end(text)
            return self._compiled[text]
        from llguidance import LLMatcher

        try:
            matcher = LLMatcher(self._tokenizer, LLMatcher.grammar_from_json_schema(text, overrides=_STYLE), log_level=0)
            problem = matcher.get_error() if matcher.is_error() else ""
        except ValueError as error:
            problem = str(error)
        if problem:
            raise ModelError(f"no answer fits the schema: {' '.join(problem.split())[:300]}", f"mend the schema: {text[:300]}")
        self._compiled[text] = matcher
        while len(self._compiled) > _KEPT:
            self._compiled.popitem(last=False)
        return matcher


class _Greedy:
    """A tokenizer whose tokens do not spell the text they came from (the pocket model's leave blanks to its decoder), as the
    library wants one: text becomes the longest tokens that spell it byte for byte. Its text decodes to the same JSON value."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Any, size: int, end: int) -> None:
        self.eos_token_id = end
        self.special_token_ids = [index for index in range(size) if tokenizer.is_special_token(index)]
        special = set(self.special_token_ids)
        self.tokens = [b"" if index in special else tokenizer.decode_bytes([index]) for index in range(size)]
        self._greedy = tokenizer.greedy_tokenize

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._greedy(text)
        return ids


def _first_line(text: str) -> str:
    """What the library says, without the state of its parser, which follows."""
    return text.strip().partition("\n")[0][:300]
