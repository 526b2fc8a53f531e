"""How local a pool is: the share of items with trajectory detail, and with a strategy (METHOD: granularity).

The paper counts, for instance-level items, 74.4% with a URL or domain, 57.3% with a number, 93.9% with an entity string
and 3.7% with a strategy statement; 84.0% of its principle-level items hold a strategy statement.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from evolve_dag.experience.pool import _URL
from evolve_dag.records import ExperienceItem, Task

_NAME = re.compile(r"([A-Z][\w'’-]*+(?:\s++[A-Z][\w'’-]*+)++)|[A-Z][\w'’-]*+")
"""A name of several words; or one word, which is passed over whole: the capitals in it begin no name either."""
_SINGLE_NAME = re.compile(r"(?<=[a-z,] )[A-Z][\w'’-]++(?!\s+[A-Z])")
_STRATEGY = re.compile(
    # From comma to comma, so that no stretch is looked at twice however many conditions stand in it.
    r"(?:(?<=[,\n])|\A)(?=[^,\n]*?\b(?:when|whenever|if|before|after|once|unless)\b[^,\n])[^,\n]*+,\s*+\w",
    re.IGNORECASE,
)


@dataclass(frozen=True, slots=True)
class Locality:
    """Shares between 0 and 1; all 0 for an empty pool."""

    items: int
    """How many items were looked at."""
    url: float
    """Share with a URL or domain."""
    number: float
    """Share with a digit."""
    entity: float
    """Share with an entity string: a capitalised name of several words, or a name that the tasks hold."""
    strategy: float
    """Share with a strategy statement: 'when ..., ...'."""


def names_in(text: str) -> list[str]:
    """The capitalised names of several words, as they stand."""
    return [name for name in _NAME.findall(text) if name]


def task_names(tasks: Iterable[Task]) -> frozenset[str]:
    """Entity strings of the tasks: every answer with a letter in it, and the capitalised names inside the questions."""
    names: set[str] = set()
    for task in tasks:
        if re.search(r"[^\W\d_]", task.answer):
            names.add(" ".join(task.answer.split()))
        names.update(" ".join(name.split()) for name in names_in(task.question))
        names.update(_SINGLE_NAME.findall(_NAME.sub(lambda found: " " if found[1] else found[0], task.question)))
    return frozenset(names)


def locality(items: Sequence[ExperienceItem], tasks: Iterable[Task] = ()) -> Locality:
    """Measure ``items``; ``tasks`` supply names that capitals alone do not show (a lower-case answer, one word)."""
    if not items:
        return Locality(0, 0.0, 0.0, 0.0, 0.0)
    known = task_names(tasks)
    pattern = re.compile("|".join(rf"(?<!\w){re.escape(name)}(?!\w)" for name in sorted(known))) if known else None

    def share(count: int) -> float:
        return count / len(items)

    texts = [item.text for item in items]
    return Locality(
        items=len(items),
        url=share(sum(_URL.search(text) is not None for text in texts)),
        number=share(sum(re.search(r"\d", text) is not None for text in texts)),
        entity=share(sum(bool(names_in(text) or (pattern and pattern.search(text))) for text in texts)),
        strategy=share(sum(_STRATEGY.search(text) is not None for text in texts)),
    )
