from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_dag.experience.locality import Locality, locality, names_in, task_names
from evolve_dag.experience.phrases import SITUATIONS, STRATEGIES, render
from evolve_dag.records import ExperienceItem, Task


def item(text: str) -> ExperienceItem:
    return ExperienceItem("x", text, "instance")


TASKS = [Task("1", "What is the mayor of person Bado Keli?", "Rato Miku"), Task("2", "Which river crosses Paris?", "seine"),
         Task("3", "How many?", "42")]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "url", "number", "entity", "strategy"),
    [
        ("Case: What is the mayor of the home of person Bado Keli? answer Rato Miku.", 0, 0, 1, 0),
        ("Narrow: when a search returns no results, search only the short name.", 0, 0, 0, 1),
        ("open https://a.b/c", 1, 0, 0, 0),
        ("the site example.com has it", 1, 0, 0, 0),
        ("look at page 7", 0, 1, 0, 0),
        ("the answer is seine", 0, 0, 1, 0),  # lower-case, but an answer of a task
        ("it flows through Paris", 0, 0, 1, 0),
        ("a parisian seinex", 0, 0, 0, 0),
        ("If a list is long, read it twice.", 0, 0, 0, 1),
        ("nothing of the kind", 0, 0, 0, 0),
    ],
)
def test_one_item(text: str, url: float, number: float, entity: float, strategy: float) -> None:
    assert locality([item(text)], TASKS) == Locality(1, url, number, entity, strategy)


def test_shares() -> None:
    found = locality([item("see www.a.org"), item("When a, b."), item("in 1999"), item("of Alo Bem")])
    assert found == Locality(4, 0.25, 0.25, 0.25, 0.25)
    assert locality([]) == Locality(0, 0.0, 0.0, 0.0, 0.0)


def test_rendered_principles_are_not_local() -> None:
    items = [item(render(condition, action)) for condition, _ in SITUATIONS for action in STRATEGIES]
    assert locality(items, TASKS) == Locality(len(items), 0.0, 0.0, 0.0, 1.0)


def test_names_of_tasks() -> None:
    assert task_names(TASKS) == {"Bado Keli", "Rato Miku", "Paris", "seine"}


words = st.lists(st.sampled_from(["A", "b", "Bc", "aB", "if", " ", "  ", "\n", "-", "'", "1", ".", ", "]), max_size=14).map(
    "".join
)


@given(words)
def test_names_and_strategies_are_what_the_plain_patterns_find(text: str) -> None:
    names = re.compile(r"[A-Z][\w'’-]*(?:\s+[A-Z][\w'’-]*)+")  # quadratic time on one long word
    strategy = re.compile(r"\b(?:when|whenever|if|before|after|once|unless)\b[^,\n]+,\s*\w+", re.IGNORECASE)
    assert names_in(text) == names.findall(text)
    assert locality([item(text)]).strategy == float(strategy.search(text) is not None)
