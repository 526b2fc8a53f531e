"""Words that item and state share: BM25. It knows nothing of the miner's conditions and features, so a result that holds
with it and with the ``state`` selector is no artefact of a shared tracker."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evolve_dag.config.parts import SelectionSettings
from evolve_dag.experience.features import answer_demanded, strip_last_step
from evolve_dag.experience.phrases import split
from evolve_dag.experience.pool import Pool, lift
from evolve_dag.experience.selection.base import ONLY_ANSWER, STOP_WORDS, TOKEN, Selection, SelectorPart
from evolve_dag.records import ExperienceItem, Step

_NEGATIONS = frozenset({"no", "not", "nothing", "none", "never", "without"})
_NAMED = re.compile(r"(?<!\w)\w++(?:\s++[A-Z]\w*+)++")
_SYNONYMS = {"see": "point", "redirect": "point", "mov": "point"}
"""Stem -> stem; what a pointer is called on pages and in speech."""


@dataclass(frozen=True, slots=True)
class LexicalSelector:
    """BM25 between the item and a plain description of the state (:func:`describe`).

    Of a principle the clause between 'when' and the comma is compared, of other items the whole text. Items that share
    no word are never chosen, nor those below ``keep`` of the best score. A clause with a negation ('no results') needs
    a description with one: BM25 alone cannot tell 'no results' from 'results'.
    """

    max_items: int = 3
    k1: float = 1.2
    """Saturation of a repeated word."""
    b: float = 0.75
    """Weight of the clause's length."""
    keep: float = 0.5
    """Share of the best score that an item must reach."""

    async def select(self, question: str, steps: Sequence[Step], pool: Pool) -> Selection:
        if answer_demanded(question, steps):
            return ONLY_ANSWER
        description = describe(question, steps)
        words = _terms(description)
        negated = bool(_NEGATIONS & set(TOKEN.findall(description.lower())))
        documents = []
        for item in pool.items:
            clause = _clause(item)
            if negated or not _NEGATIONS & set(TOKEN.findall(clause.lower())):
                documents.append((item, _terms(clause)))
        scores = bm25(set(words), [terms for _, terms in documents], self.k1, self.b)
        ranked = sorted(
            ((score, item) for score, (item, _) in zip(scores, documents, strict=True) if score > 0),
            key=lambda pair: (-round(pair[0], 9), -lift(pair[1]), pair[1].id),
        )
        chosen = [(score, item) for score, item in ranked if score >= self.keep * ranked[0][0]][: self.max_items]
        shown = ", ".join(f"{item.id} {score:.2f}" for score, item in chosen)
        return Selection(tuple(item.id for _, item in chosen), f"'{description[:160]}'; bm25: {shown or 'no shared word'}")


def describe(question: str, steps: Sequence[Step]) -> str:
    """The state in plain words, made mechanically from the transcript.

    Before the first step: that no tool was used and what is asked. After it: the tool, what it returned, and which
    lower-case words of the question (the one before a name aside: 'person Bado Keli' is one name) stand below the first
    line of that and which do not. Counts are spelled out.
    """
    asked = " ".join(strip_last_step(question).split())
    if not steps:
        return f"step 1. no tool used yet, nothing is known. question: {asked}"
    last = steps[-1]
    tool = last.call.name if last.call is not None else "none"
    returned = strip_last_step(last.observation or "").strip()
    if last.problem is not None:
        return f"step {len(steps) + 1}. the last call was refused: {last.problem}"
    lines = returned.splitlines()
    text = re.sub(r"(?m)^[^\S\n]*+\d+[.)]\s+", "", returned)  # ranks are no counts
    text = re.sub(r"\b(\d+)(?= (?:results?|pages?|matches|hits)\b)", _spell, text)
    parts = [f"step {len(steps) + 1}. last tool: {tool}. it returned: {' '.join(text.split())}."]
    if len(lines) > 1:
        below = {_stem(word) for word in TOKEN.findall(" ".join(lines[1:]).lower())}
        wanted = [w for w in TOKEN.findall(_NAMED.sub(" ", asked))[1:] if w.islower() and w not in STOP_WORDS]
        shown = [w for w in wanted if _stem(w) in below]
        missing = [w for w in wanted if _stem(w) not in below]
        if shown:
            parts.append(f"of the question it shows: {' '.join(shown)}.")
        if missing:
            parts.append(f"it lacks: {' '.join(missing)}.")
    return " ".join(parts)


def _spell(match: re.Match[str]) -> str:
    count = int(match[1])
    return "no" if count == 0 else "one" if count == 1 else "several"


def _clause(item: ExperienceItem) -> str:
    parts = split(item.text) if item.granularity == "principle" else None
    return parts[1] if parts else item.text


def _stem(word: str) -> str:
    """A crude stem, enough to join 'returns' with 'returned' and 'name' with 'named'."""
    for ending in ("ing", "ed", "es", "s", "e"):
        if word.endswith(ending) and len(word) - len(ending) >= 3 and not word.endswith("ss"):
            return word[: -len(ending)]
    return word


def _terms(text: str) -> list[str]:
    stems = [_stem(word) for word in TOKEN.findall(text.lower()) if word not in STOP_WORDS]
    return [_SYNONYMS.get(stem, stem) for stem in stems]


def bm25(query: set[str], documents: Sequence[Sequence[str]], k1: float = 1.2, b: float = 0.75) -> list[float]:
    """Okapi BM25 of every document (a list of terms) for the set of query terms, with the idf that is never negative
    (Robertson & Zaragoza 2009, eq. 3.15, with ln(1 + ...) as in Lucene)."""
    if not documents:
        return []
    average = max(sum(len(terms) for terms in documents) / len(documents), 1e-9)
    frequency = Counter(term for terms in documents for term in set(terms))
    scores = []
    for terms in documents:
        counts = Counter(terms)
        norm = k1 * (1 - b + b * len(terms) / average)
        score = 0.0
        for term in sorted(query & counts.keys()):  # a fixed order: the sum is the same in every process
            idf = math.log(1 + (len(documents) - frequency[term] + 0.5) / (frequency[term] + 0.5))
            score += idf * counts[term] * (k1 + 1) / (counts[term] + norm)
        scores.append(score)
    return scores


class LexicalSelection(SelectionSettings):
    """Word overlap of item and state, BM25."""

    selector: Literal["lexical"] = "lexical"
    """Items that share words with the state."""


LEXICAL = SelectorPart(settings=LexicalSelection, make=lambda settings, roles, seed: LexicalSelector(settings.max_items))
