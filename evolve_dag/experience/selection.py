"""Selectors: which items fit the current state (METHOD: step_wise, R(h_{t-1}, E)).

:class:`StateSelector` reads the conditions that the miner wrote. :class:`LexicalSelector` knows nothing of them, nor of
the miner's features: it compares words, so a result that holds with both is no artefact of a shared tracker.

:mod:`selectors_llm` asks a language model, :mod:`embedding` compares hidden states.

None chooses anything for a step at which only an answer is possible ('last step: answer now'): advice to search
would end the episode without one.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from evolve_dag.config import SelectionSettings
from evolve_dag.errors import ConfigError
from evolve_dag.experience.features import answer_demanded, features, strip_last_step
from evolve_dag.experience.phrases import split
from evolve_dag.experience.pool import Pool, lift
from evolve_dag.records import ExperienceItem, Step

if TYPE_CHECKING:
    from pathlib import Path

    from evolve_dag.inference.protocol import LanguageModel
    from evolve_dag.memory import Memory


@dataclass(frozen=True, slots=True)
class Selection:
    """What a selector chose for one step."""

    ids: tuple[str, ...]
    """Best first."""
    rationale: str
    """Why, for the trace of the step."""


@runtime_checkable
class Selector(Protocol):
    """Picks items of a pool for the next step."""

    async def select(self, question: str, steps: Sequence[Step], pool: Pool) -> Selection:
        """Ids of ``pool`` that fit the state after ``steps``, best first; may be none."""
        ...


ONLY_ANSWER = Selection((), "only an answer is possible now")
"""What every selector gives for a step at which only an answer is possible."""
_STOP = frozenset(
    re.findall(r"\w+", "the a an of to is are it that this and or in on at by with was were be has have for from")
)
_NEGATIONS = frozenset({"no", "not", "nothing", "none", "never", "without"})
_TOKEN = re.compile(r"[^\W_]+")
_NAMED = re.compile(r"\w+(?:\s+[A-Z]\w*)+")
_SYNONYMS = {"see": "point", "redirect": "point", "mov": "point"}
"""Stem -> stem; what a pointer is called on pages and in speech."""


@dataclass(frozen=True, slots=True)
class StateSelector:
    """Items whose whole condition holds; the most specific first, then by lift.

    An item is passed over when a more specific one with the same predicates and more was chosen: that is the exception
    to its rule. Items without a condition are looked at before the first step only, and only cases: those that share
    most words with the question.
    """

    max_items: int = 3

    async def select(self, question: str, steps: Sequence[Step], pool: Pool) -> Selection:
        if answer_demanded(question, steps):
            return ONLY_ANSWER
        state = features(question, steps)
        shown = " ".join(f"{name}={value}" for name, value in state.items())
        fitting = [i for i in pool.items if i.condition and all(state.get(f) == v for f, v in i.condition.items())]
        fitting.sort(key=lambda i: (-len(i.condition), -lift(i), i.id))
        chosen: list[ExperienceItem] = []
        for item in fitting:
            if not any(set(item.condition.items()) < set(other.condition.items()) for other in chosen):
                chosen.append(item)
        reason = "condition holds"
        if not chosen and not steps:
            chosen, reason = _closest_cases(question, pool), "shares words with the question"
        ids = tuple(item.id for item in chosen[: self.max_items])
        return Selection(ids, f"{shown}; {reason}: {', '.join(ids)}" if ids else f"{shown}; no item fits")


def _closest_cases(question: str, pool: Pool) -> list[ExperienceItem]:
    wanted = _content(question)
    scored = []
    for item in pool.items:
        if item.granularity == "instance" and not item.condition:
            words = _content(item.text)
            shared = len(wanted & words)
            if shared:
                scored.append((-shared / len(wanted | words), item.id, item))
    return [item for _, _, item in sorted(scored, key=lambda entry: entry[:2])]


def _content(text: str) -> set[str]:
    return {word for word in _TOKEN.findall(text.lower()) if word not in _STOP and word not in ("what", "case", "answer")}


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
        negated = bool(_NEGATIONS & set(_TOKEN.findall(description.lower())))
        documents = []
        for item in pool.items:
            clause = _clause(item)
            if negated or not _NEGATIONS & set(_TOKEN.findall(clause.lower())):
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
    text = re.sub(r"(?m)^\s*\d+[.)]\s+", "", returned)  # ranks are no counts
    text = re.sub(r"\b(\d+)(?= (?:results?|pages?|matches|hits)\b)", _spell, text)
    parts = [f"step {len(steps) + 1}. last tool: {tool}. it returned: {' '.join(text.split())}."]
    if len(lines) > 1:
        below = {_stem(word) for word in _TOKEN.findall(" ".join(lines[1:]).lower())}
        wanted = [w for w in _TOKEN.findall(_NAMED.sub(" ", asked))[1:] if w.islower() and w not in _STOP]
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
    stems = [_stem(word) for word in _TOKEN.findall(text.lower()) if word not in _STOP]
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


def make_selector(
    settings: SelectionSettings,
    *,
    model: Callable[[], LanguageModel] | None = None,
    identity: str = "",
    embedding_folder: Path | None = None,
    memory: Memory | None = None,
    seed: int = 0,
) -> Selector:
    """The selector that the experiment names.

    Args:
        model: for ``llm``: gives the model when it is first needed.
        identity: for ``llm``: what the model is, for the keys of remembered choices.
        embedding_folder: for ``embedding``: folder of the model.
        memory: for ``llm``: where choices are remembered; None: in this process only.
        seed: for ``llm``: of sampling.

    Raises:
        ConfigError: the selector needs a model that is not given.
    """
    if settings.selector == "state":
        return StateSelector(max_items=settings.max_items)
    if settings.selector == "lexical":
        return LexicalSelector(max_items=settings.max_items)
    if settings.selector == "embedding":
        if embedding_folder is None:
            raise ConfigError("selection.selector: embedding needs a model", "name one under models.embedding")
        from evolve_dag.experience.embedding import Embedder, EmbeddingSelector

        return EmbeddingSelector(Embedder(embedding_folder), settings.max_items)
    if model is None:
        raise ConfigError("selection.selector: llm needs a model", "name one under models.selector")
    from evolve_dag.experience.selectors_llm import LLMSelector

    return LLMSelector(settings, model, identity, memory=memory, seed=seed, characters=settings.max_characters)
