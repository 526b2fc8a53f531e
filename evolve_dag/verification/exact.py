"""Right is what reads the same as the reference."""

from __future__ import annotations

import re
import unicodedata
from typing import Literal

from evolve_dag.config.parts import VerificationSettings
from evolve_dag.records import Task
from evolve_dag.verification.base import VerifierPart


class ExactVerifier:
    """An answer is right when it equals the reference, or one of the task's aliases, after :func:`normalise`.

    Aliases stand in ``task.metadata["aliases"]``, separated by ``|``. Every task has a reference, so every answer can be
    judged: never None, and no answer is a wrong answer. Equality is of the whole text. No verdict is looked for in it
    and no prefix counts, so "Rato Miku or Zano Pile" is wrong where "Rato Miku" is right.
    """

    async def verify(self, task: Task, answer: str | None) -> float | None:
        return 1.0 if answer is not None and equals(task, answer) else 0.0


def equals(task: Task, answer: str) -> bool:
    """Whether ``answer`` reads the same as the reference or an alias."""
    given = normalise(answer)
    return any(given == normalise(reference) for reference in references(task))


def references(task: Task) -> list[str]:
    """The reference and its aliases, each of them right."""
    return [task.answer, *(alias for alias in task.metadata.get("aliases", "").split("|") if alias.strip())]


def normalise(text: str) -> str:
    """``text`` without what does not change an answer.

    - Unicode: compatibility forms (NFKC: full-width letters, ligatures) and case, as in the standard's compatibility
      caseless matching (Unicode, section 3.13, D146); invisible format characters go. Raised digits keep their
      meaning: "10²" reads "10^2", not "102". The minus sign is a hyphen, and so are the hyphen that breaks no line and the
      dash between two years; a curved apostrophe or quotation mark is a straight one.
    - White space: runs become one space, ends go.
    - Punctuation around the whole answer: a pair of quotation marks or brackets, and the marks that end a sentence.
      Signs that belong to a value stay: "-5", ".5", "5%", "C#", "$3", the feet of 5' and the factorial of "5!".

    Articles stay: "The Who" is not "Who", and other languages have other articles. List such variants as aliases.
    """
    text = _RAISED.sub(lambda digits: f"^{digits.group()}", text)
    # D146: one pass is not enough, folding can make new compatibility forms and the other way round.
    for form in ("NFD", "NFKD", "NFKD"):
        text = unicodedata.normalize(form, text).casefold()
    text = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    return _without_signs(" ".join(text.translate(_SAME).split()))


def _without_signs(text: str) -> str:
    """``text`` without the signs around it. From both ends, in place: thousands of brackets may stand in each other."""
    start, end = 0, len(text)
    while True:
        first, last = start, end
        while last > first and _is_end_mark(text[last - 1], text[last - 2 : last - 1] if last - 1 > first else ""):
            last -= 1
        if last - first > 1 and text[first] + text[last - 1] in _PAIRS:
            first, last = first + 1, last - 1
        while first < last and text[first].isspace():
            first += 1
        while first < last and text[last - 1].isspace():
            last -= 1
        if first == last or (first, last) == (start, end):  # an answer of nothing but signs is that answer
            return text[start:end]
        start, end = first, last


def _is_end_mark(sign: str, before: str) -> bool:
    """Whether a sign only ends a sentence: "5!" is a factorial."""
    return sign in ".,;:。、" or sign.isspace() or (sign in "!?" and not before.isdecimal())


_RAISED = re.compile("[⁰¹²³⁴-⁹]+")
_SAME = str.maketrans("\u2010\u2012\u2013\u2212‘’“”„", '----\'\'"""')
_PAIRS = frozenset(
    {
        '""',
        "''",
        "``",
        "()",
        "[]",
        "{}",
        "<>",
        "«»",
        "»«",
        "‹›",
        "‚'",
        "「」",
        "『』",
        "《》",
        "〈〉",
        "【】",
    }
)


class ExactVerification(VerificationSettings):
    """Normalized text is equal."""

    kind: Literal["exact"] = "exact"
    """The answer is the reference, but for case, white space and the punctuation around it."""


EXACT = VerifierPart(
    settings=ExactVerification,
    make=lambda settings, roles: ExactVerifier(),
)
