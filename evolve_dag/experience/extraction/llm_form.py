"""The form of an item that a language model wrote, checked in code (METHOD: granularity).

A principle is asked for as ``Name: when <situation>, <strategy>.``; other words for a strategy are taken as well. What is
refused is length, and trajectory detail: a URL, a number, an entity of the tasks it was learned from. An instance-level item
keeps the detail; only its length is bounded.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import pairwise

from evolve_dag import prompts
from evolve_dag.errors import ModelError
from evolve_dag.experience.extraction import llm_plans as plans
from evolve_dag.experience.extraction.llm_calls import Asker
from evolve_dag.experience.extraction.llm_guides import ExtractionGuides
from evolve_dag.experience.features import STOP_WORDS
from evolve_dag.experience.llm_text import shorten
from evolve_dag.experience.locality import names_in, task_names
from evolve_dag.experience.phrases import MAX_WORDS
from evolve_dag.experience.pool import principle_problems
from evolve_dag.plain import one_line
from evolve_dag.prompts import fence
from evolve_dag.records import Granularity, Task, Trajectory

INSTANCE_WORDS = 120
"""Most words of an instance-level item."""

_WORD = re.compile(r"[^\W_]+")
_LONGEST_NAME = 8
"""Words of a name that are compared; a longer answer is a sentence, not a name."""


def tidy(text: str, granularity: Granularity = "principle") -> str:
    """``text`` without what models put around an item: line breaks, bullets, numbering, quotes, bold; a principle also gets
    its capital, its small 'when' and its full stop. Nothing that it says is changed."""
    line = " ".join(text.replace("**", "").replace("`", "").split())
    line = re.sub(r"^(?:[-*•]\s+|\(?\d{1,2}[.)]\s+)", "", line)
    if len(line) > 1 and line[0] in "\"“'" and line[-1] in "\"”'":
        line = line[1:-1].strip()
    if granularity == "instance":
        return line
    match = re.fullmatch(r"([^\W\d][\w-]*(?: [\w-]+)?)\s*[:：]\s*(when\b.*)", line.rstrip(".!; "), re.IGNORECASE)
    if match is None:
        return line
    name, rest = match.groups()
    return f"{name[0].upper()}{name[1:]}: {rest[0].lower()}{rest[1:]}."


def most_words(granularity: Granularity, max_words: int) -> int:
    """Words that an item may have. A principle never has more than the pool takes."""
    return min(max_words, MAX_WORDS) if granularity == "principle" else INSTANCE_WORDS


def form_problems(text: str, granularity: Granularity, max_words: int, names: frozenset[str] = frozenset()) -> list[str]:
    """What keeps ``text`` from being an item; empty when nothing does.

    Args:
        names: entities of the tasks (:func:`entities`), which a principle must not hold in any spelling.
    """
    words, limit = len(text.split()), most_words(granularity, max_words)
    if granularity == "instance":
        if not text.strip():
            return ["empty"]
        return [f"{words} words, more than {limit}"] if words > limit else []
    problems = principle_problems(text)
    if limit < words <= MAX_WORDS:
        problems.append(f"{words} words, more than {limit}")
    if name := _entity_in(text, names):
        problems.append(f"holds an entity of the task ({name})")
    return problems


class Form:
    """The form of one extraction, with the one repair that a text without it gets.

    Args:
        tally: gets ``repaired`` and ``dropped_form``.
    """

    def __init__(self, asker: Asker, granularity: Granularity, max_words: int, tally: plans.Tally) -> None:
        self._asker, self._granularity, self._max_words, self._tally = asker, granularity, max_words, tally
        words = most_words(granularity, max_words)
        self.prompt = prompts.load(f"experience/form_{granularity}").fill(max_words=words).strip()
        """The rules, as prompts state them."""
        self.guides = ExtractionGuides(granularity, words, asker.max_tokens)
        """The rules, as decoders are held to them."""

    def problems(self, text: str, names: frozenset[str]) -> list[str]:
        return form_problems(text, self._granularity, self._max_words, names)

    def tidy(self, text: str) -> str:
        return tidy(text, self._granularity)

    async def written(self, text: str, names: frozenset[str], key: tuple[object, ...]) -> str | None:
        """``text`` in the form, after at most one repair by the model; None (counted) when it still has it not."""
        text = self.tidy(text)
        problems = self.problems(text, names)
        if not problems:
            return text
        blanks = {
            "item": fence("item", shorten(text, 4000)),
            "problems": fence("problems", "\n".join(f"- {one_line(problem)}" for problem in problems)),
            "form": self.prompt,
        }
        try:
            value = await self._asker.json(
                "repair",
                (*key, text),
                blanks,
                plans.REPAIR_SCHEMA,
                lambda v: plans.read_text(v) is not None,
                guide=self.guides.repair(),
                repairs=0,
            )
        except ModelError:
            value = None  # counted where it was raised
        repaired = self.tidy(plans.read_text(value) or "")
        if self.problems(repaired, names):
            self._tally["dropped_form"] += 1
            return None
        self._tally["repaired"] += 1
        return repaired


def entities(task: Task | None, trajectories: Iterable[Trajectory]) -> frozenset[str]:
    """Entities of one task, lower-case, words joined by single blanks: the reference answer, the capitalised names of the
    question, and the capitalised names of several words in what the tools returned.

    What also stands in lower case in the question or the results ('Search Results' beside 'search results') is ordinary
    language.
    """
    known, seen = set(task_names([task])) if task is not None else set(), set()
    ordinary: set[tuple[str, ...]] = set()
    for trajectory in trajectories:
        texts = [trajectory.question, *(s.observation for s in trajectory.steps if s.observation)]
        for line in (line for text in texts for line in text.splitlines()):
            tokens = _WORD.findall(line)
            ordinary.update((word,) for word in tokens if word[0].islower())
            ordinary.update((a, b) for a, b in pairwise(tokens) if a[0].islower() and b[0].islower())
            seen.update(names_in(line))
    found: set[str] = set()
    for name in known | seen:
        words = _words(name)
        if task is not None and name == " ".join(task.answer.split()):
            if len(words) <= _LONGEST_NAME:
                found.add(" ".join(words))
            continue
        for stretch in _stretches(words):
            pairs: list[tuple[str, ...]] = [stretch] if len(stretch) == 1 else list(pairwise(stretch))
            if not ordinary.issuperset(pairs) and not STOP_WORDS.issuperset(stretch):
                found.add(" ".join(stretch))
    return frozenset(found)


def _words(text: str) -> list[str]:
    return [word.lower() for word in _WORD.findall(text)]


def _stretches(words: Sequence[str]) -> list[tuple[str, ...]]:
    """Every stretch of at least two words ('The Bado Keli' holds 'bado keli'); of a single word itself."""
    if len(words) == 1:
        return [(words[0],)]
    words = words[:_LONGEST_NAME]
    return [tuple(words[i:j]) for i in range(len(words)) for j in range(i + 2, len(words) + 1)]


def _entity_in(text: str, names: frozenset[str]) -> str | None:
    words = _words(text)
    for length in range(_LONGEST_NAME, 0, -1):
        for start in range(len(words) - length + 1):
            if (stretch := " ".join(words[start : start + length])) in names:
                return stretch
    return None
