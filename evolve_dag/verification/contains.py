"""Right is what says the reference in few words: for chat models that answer in sentences."""

from __future__ import annotations

import re
from typing import Literal

from evolve_dag.config.parts import VerificationSettings
from evolve_dag.records import Task
from evolve_dag.verification.base import VerifierPart
from evolve_dag.verification.exact import normalise, references

MAX_WORDS = 30
"""A longer answer is wrong: a text that names everything would be right by chance."""


class ContainsVerifier:
    """An answer is right when the reference, or an alias, stands in it as whole words, and it has at most 30 words.

    Lenient: "not Rato Miku" counts as right where "Rato Miku" is. Use it where a model will not keep to the bare answer,
    and read its success as an upper bound.
    """

    async def verify(self, task: Task, answer: str | None) -> float | None:
        if answer is None:
            return 0.0
        given = normalise(answer)
        if len(given.split()) > MAX_WORDS:
            return 0.0
        return 1.0 if any(_stands_in(normalise(reference), given) for reference in references(task)) else 0.0


def _stands_in(reference: str, given: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(reference)}(?!\w)", given) is not None


class ContainsVerification(VerificationSettings):
    """The reference stands in a short answer as whole words."""

    kind: Literal["contains"] = "contains"
    """The answer holds the reference."""


CONTAINS = VerifierPart(
    settings=ContainsVerification,
    make=lambda settings, roles: ContainsVerifier(),
)
