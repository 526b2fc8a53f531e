"""Schemas that hold a decoder to readable answers: bounded in length, and items in their form.

An answer that is cut off at ``max_tokens`` is lost, and a model that is held to a schema writes until the schema lets it stop.
So every list and text here is bounded by the tokens there are. The schemas of
:mod:`evolve_dag.experience.extraction.llm_plans` and the selector are what an answer is judged by; a guide is narrower and
only goes with the request.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evolve_dag.experience.extraction.llm_plans import MOST_MERGED, array_of, object_of
from evolve_dag.records import Granularity

Schema = dict[str, Any]

TOKENS_PER_WORD = 1.5
"""Of a principle, blank or comma included. English needs 1.2 to 1.4. A tighter bound than needed does harm: a small model
that may not write another word writes on without the blank."""
CHARACTERS_PER_TOKEN = 3
"""Of other text. English has 4 to 4.5."""
_ID_TOKENS = 9
"""An id of the pool in quotes with its comma: tokenizers take digits one by one."""
_DELETE_TOKENS = 32
"""One deletion with its reason."""
_SHORTEST = 8
"""Words that a principle needs; below this a budget is not kept."""
_WORD = "[a-z]{1,14}([-'][a-z]{1,10})?"


def principle_pattern(words: int) -> str:
    """Texts that :func:`~evolve_dag.experience.pool.principle_problems` accepts, of at most ``words`` words (at least 4):
    lower-case words of the Latin alphabet after the name, so there is no digit, URL or name of something."""
    named = 2 if words > 6 else 1
    free = words - named - 1  # 'when'
    situation = free // 2
    strategy = free - situation

    def phrase(most: int, joint: str) -> str:
        least = min(3, most)
        return _WORD + (f"({joint}{_WORD}){{{least - 1},{most - 1}}}" if most > 1 else "")

    second = "( [a-z]{1,14})?" if named == 2 else ""
    return f"^[A-Z][a-z]{{2,13}}{second}: when {phrase(situation, ' ')}, {phrase(strategy, ',? ')}\\.$"


class ExtractionGuides:
    """Guides of the extraction chain.

    Args:
        words: most words of a principle.
        max_tokens: of one answer.
    """

    def __init__(self, granularity: Granularity, words: int, max_tokens: int) -> None:
        self._granularity, self._words, self._tokens = granularity, words, max_tokens

    def candidates(self, most: int) -> Schema:
        count = self._count(most, 60)
        tokens = self._share(count, 14)
        entry = object_of({"text": self._item(tokens * 3 // 4), "why": _line(tokens // 4)})
        return object_of({"items": _bounded(entry, 0, count)})

    def decisions(self, candidates: int, ids: Sequence[str]) -> Schema:
        count = self._count(candidates, 70)
        tokens = self._share(count, 30 + _ID_TOKENS)
        item = self._item(tokens * 3 // 4)
        entry = object_of(
            {
                "candidate": {"type": "integer", "enum": list(range(1, candidates + 1))},
                "operation": {"type": "string", "enum": ["ADD", "UPDATE", "DELETE", "NONE"]},
                "id": {"type": ["string", "null"], "enum": [*ids, None]},
                "content": {**item, "type": ["string", "null"]},
                "reason": _line(tokens // 4),
            }
        )
        return object_of({"decisions": _bounded(entry, count, count)})

    def reconciliation(self, proposals: int) -> Schema:
        count, members = self._count(proposals // 2, 80), min(proposals, MOST_MERGED)
        tokens = self._share(count, 20 + 3 * members)
        numbers = {"type": "integer", "enum": list(range(1, proposals + 1))}
        return object_of({"merges": _bounded(self._merge("members", numbers, members, tokens), 0, count)})

    def consolidation(self, ids: Sequence[str]) -> Schema:
        known = {"type": "string", "enum": list(ids)}
        deletes = max(1, min(len(ids), self._tokens // 3 // _DELETE_TOKENS))
        rest = ExtractionGuides(self._granularity, self._words, self._tokens - deletes * _DELETE_TOKENS)
        merges, members = rest._count(len(ids) // 2, 120), min(len(ids), MOST_MERGED)
        merge = rest._merge("ids", known, members, rest._share(merges, 20 + _ID_TOKENS * members))
        delete = object_of({"id": known, "reason": _line(_DELETE_TOKENS - 10 - _ID_TOKENS)})
        return object_of({"merges": _bounded(merge, 0, merges), "deletes": _bounded(delete, 0, deletes)})

    def repair(self) -> Schema:
        return object_of({"text": self._item(self._share(1, 0))})

    def _merge(self, name: str, member: Schema, most: int, tokens: int) -> Schema:
        fields = {name: _bounded(member, 2, most), "content": self._item(tokens * 3 // 4), "reason": _line(tokens // 4)}
        return object_of(fields)

    def _count(self, wanted: int, tokens: int) -> int:
        """Entries of a list: as many as wanted, unless they could not have ``tokens`` each."""
        return max(1, min(wanted, self._tokens // tokens))

    def _share(self, count: int, markup: int) -> int:
        """Tokens for the texts of one of ``count`` entries, beside its own ``markup`` and that of the whole."""
        return max(0, (self._tokens - 12) // count - markup)

    def _item(self, tokens: int) -> Schema:
        if self._granularity == "principle":
            words = min(self._words, max(_SHORTEST, int(tokens / TOKENS_PER_WORD)))
            return {"type": "string", "pattern": principle_pattern(words)}
        return {"type": "string", "minLength": 1, "maxLength": min(800, max(60, CHARACTERS_PER_TOKEN * tokens))}


def choice(ids: Sequence[str], least: int, most: int, max_tokens: int) -> Schema:
    """Guide of a selector: ``least`` to ``most`` of ``ids``, and a rationale as long as the tokens allow."""
    most = max(1, min(most, (max_tokens - 24) // _ID_TOKENS))
    listed = _bounded({"type": "string", "enum": list(ids)}, min(least, most), most)
    return object_of({"ids": listed, "rationale": _line(max_tokens - 16 - _ID_TOKENS * most)})


def _line(tokens: int) -> Schema:
    """One sentence of a reason."""
    return {"type": "string", "maxLength": min(120, max(20, CHARACTERS_PER_TOKEN * tokens))}


def _bounded(items: Schema, least: int, most: int) -> Schema:
    return {**array_of(items), "minItems": least, "maxItems": most}
