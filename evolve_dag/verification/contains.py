"""Right is what says the reference in few words: for chat models that answer in sentences."""

from __future__ import annotations

import re
from typing import Literal

from evolve_dag.config.parts import VerificationSettings
from evolve_dag.plain import spaced
from evolve_dag.records import Task
from evolve_dag.verification.base import VerifierPart
from evolve_dag.verification.exact import normalise, references

MAX_WORDS = 30
"""A longer answer is wrong: a text that names everything would be right by chance."""
CHARACTERS = 2
"""Of a script without spaces, letters that count as one word."""
READING = "reading 2"
"""How an answer is read, a part of what verdicts are: what was scored by the first reading does not stand for what is now."""

_WITHOUT_SPACES = re.compile(r"[\u0e00-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\U00020000-\U0003ffff]")
"""Thai to Burmese, Khmer, kana, Han."""
_BEFORE_NUMBER = re.compile(r"(?:\d[.,:'/⁄*×÷^+–—-]|(?<![a-z\u00c0-\u0dff])[-–]|(?:^|\s)\.)$")
"""What makes a number behind it a part of another one, or another value: 3.|5, 1/|2, 2019-|2020, -|5, .|5. Not covid-|19."""
_BEHIND_NUMBER = re.compile(r"[.,:'/⁄*×÷^+–—-]\d|\s?[%‰]")
"""The same for a number before it: 72|.5, 1|,000, 1|/2, 10|%. Not the full stop and the comma of a sentence."""


class ContainsVerifier:
    """An answer is right when the reference, or an alias, stands in it as whole words, and it has at most 30 words. A number
    must be all of a number: "5" does not stand in "-5", "3.5", "5%" or "2-5".

    Where words are not spaced, as in Chinese, Japanese and Thai, any place will do, and two letters count as a word.

    Lenient: "not Rato Miku" counts as right where "Rato Miku" is, and 東京都 where 京都 is. Use it where a model will not keep
    to the bare answer, and read its success as an upper bound.
    """

    async def verify(self, task: Task, answer: str | None) -> float | None:
        if answer is None:
            return 0.0
        given = normalise(answer)
        if len(_WITHOUT_SPACES.sub("", given).split()) + len(_WITHOUT_SPACES.findall(given)) / CHARACTERS > MAX_WORDS:
            return 0.0
        return 1.0 if any(_stands_in(normalise(reference), given) for reference in references(task)) else 0.0


def _stands_in(reference: str, given: str) -> bool:
    size = len(reference)
    starts = (at.start() for at in re.finditer(f"(?={re.escape(reference)})", given))
    return any(_whole(given[max(0, at - 2) : at], reference, given[at + size : at + size + 2]) for at in starts)


def _whole(before: str, reference: str, behind: str) -> bool:
    """Whether the reference is no part of a word or number, by the two characters on each side."""
    first, last = reference[:1], reference[-1:]
    if _goes_on(before[-1:], first) or _goes_on(behind[:1], last):
        return False
    if first.isdecimal() and _BEFORE_NUMBER.search(before):
        return False
    return not (last.isdecimal() and _BEHIND_NUMBER.match(behind))


def _goes_on(beside: str, edge: str) -> bool:
    """Whether a word that has ``edge`` at its end goes on with the character ``beside`` it."""
    return (spaced(beside) or beside == "_") and (spaced(edge) or not edge.isalnum())


class ContainsVerification(VerificationSettings):
    """The reference stands in a short answer as whole words."""

    kind: Literal["contains"] = "contains"
    """The answer holds the reference."""


CONTAINS = VerifierPart(
    settings=ContainsVerification,
    make=lambda settings, roles: ContainsVerifier(),
    data=lambda settings: READING,
)
