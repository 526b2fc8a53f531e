from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_dag.experience.locality import _CONDITION, Locality, entity_in, locality, names_in, task_names, trajectory_detail
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


PRINCIPLES = (
    "Targeted retrieval: Construct queries by joining the rarest attributes of the question instead of pasting it whole.",
    "Source priority: Prefer primary documents and official registers over blogs; treat forum posts as hints only.",
    "Cross-Source Verification: Confirm each decisive fact in two independent sources before answering.",
    "Early anchoring: Do not settle on the first plausible candidate. List alternatives and test each against the constraints.",
    "Constraint Decomposition: Break a multi-hop question into sub-goals; solve the most selective one first.",
    "Query reformulation: If a search returns nothing useful, drop the least certain term and try synonyms.",
    "PDF handling: Open PDFs with the file parser rather than relying on snippets, since tables are lost in previews.",
    "Tool choice: Use Google Scholar for papers, and Wikipedia only for orientation.",
    "Numeric checks: Run Python for any arithmetic beyond a single step; mental sums are a frequent source of errors.",
    "Premature termination: Answering before a page has been opened is the most common failure pattern. Visit at least once.",
    "Temporal reasoning: Check the publication date of a page against the period that the question asks about.",
    "Disambiguation: When several people share a name, compare profession, place of birth and active years before you choose.",
    "Budget awareness: Reserve the last calls for verification. Stop exploring once every constraint is met.",
    "Prioritize official statistics over news reports when both give a figure.",
    "Avoid repeating a query that has already failed. Change the angle, the entity type or the source instead.",
    "Before giving the final answer, re-read the question and make sure the unit and the format match.",
    "Extract candidate names from list pages, then check them one by one with the visit tool.",
    "Evidence logging: Keep a running list of facts with their URLs, so that conflicting claims can be weighed later.",
    "API limits: If the search API returns an error, retry once and then switch tools.",
    "Reverse lookup: Search for the described event, e.g., an award or a merger, and walk from there to the person.",
    "Site restriction: Use operators such as site: and quotation marks to narrow results; Boolean OR helps with spellings.",
    "Archive fallback: A dead link is not the end: try the Wayback Machine or a cached copy.",
    "Answer format: Give the shortest string that answers the question. No explanation is needed.",
    "Unit discipline: Convert all quantities to one unit before comparing; mixing them causes silent mistakes.",
    "Case analysis: Split the problem by parity or sign when a direct argument fails.",
    "Symmetry exploitation: WLOG assumptions save work, but verify that the problem really is symmetric.",
    "Back-substitution: Plug the final result into every original equation; reject extraneous roots.",
    "Modular arithmetic: Reduce large powers early, and use CRT for coprime moduli.",
    "Chinese sources: Search in the language of the topic; English pages often omit local details.",
    "**Hypothesis testing**: Treat each hypothesis as provisional. “Plausible” is not “proven”.",
)
"""Invented, in the style of the pools that come with the paper's code."""
INSTANCES = (
    "Case: What is the mayor of the home of person Bado Keli? search Bado Keli; open city Zano Pile; answer Rato Miku.",
    "For the question about the Lindqvist prize, the page of the academy lists the winners by year.",
    "The answer was found on https://registry.example.org/people under the second heading.",
    "Visit archive.org first: the cached copy still holds the table.",
    "The bridge was opened in 1932, not in the year that the snippet shows.",
    "Marlow Hentsch is the director; the snippet wrongly names his brother.",
    'Search "Tessaly Brook" with the word bishop and open the third result.',
    "The film by Osric Valdane was shot in a quarry near Pellworm.",
    "Verification: The stadium's capacity is 41,200; the older page says less.",
    "When asked for the founder of Corvin & Hale, answer with the elder partner.",
    "Retrieval: Dr. Anwen Price supervised the thesis; her page at the university lists it.",
    "He studied in Uppsala, e.g. under the chemist named in the question.",
    "Wrong turn: the agent mistook McAllister for the later minister.",
    "Query: combine the treaty's name with Zurich and the year.",
)


@pytest.mark.parametrize("text", PRINCIPLES)
def test_a_strategy_is_a_principle_however_it_is_phrased(text: str) -> None:
    assert trajectory_detail(text) == []


@pytest.mark.parametrize("text", INSTANCES)
def test_an_item_with_detail_is_instance_level(text: str) -> None:
    assert trajectory_detail(text) != []


def test_locality_of_a_pool_in_the_papers_style() -> None:
    found = locality([item(text) for text in PRINCIPLES], TASKS)
    assert (found.url, found.number, found.entity) == (0, 0, 0)
    assert found.strategy >= 0.84  # the paper's share for its principle-level items
    assert locality([item(text) for text in INSTANCES]).strategy < 0.15


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("", None),
        (" / ", None),
        ("Search Paris.", "Search Paris"),
        ("ask Dr. Price", "Dr Price"),
        ("It helps. Google Scholar has it", None),
        ("open <Person Name> and [City], then {Year Of Birth}", None),
        ("use WebSearch, read_file and the URLs", None),
        ("by McAllister, who", "McAllister"),
        ("of Müller's", "Müller"),
        ("Retrieval of Primary Sources: Read them.", None),
        ("Write down Anna: read it", "Anna"),  # no title: a long word of it is in lower case
        ("I think I'm right, so I'll answer", None),
        ("先搜索再回答", None),
    ],
)
def test_what_passes_for_an_entity(text: str, name: str | None) -> None:
    assert entity_in(text) == name


def test_shares() -> None:
    found = locality([item("see www.a.org"), item("When a, b."), item("in 1999"), item("of Alo Bem")])
    assert found == Locality(4, 0.25, 0.25, 0.25, 0.25)
    assert locality([]) == Locality(0, 0.0, 0.0, 0.0, 0.0)


def test_rendered_principles_are_not_local() -> None:
    items = [item(render(condition, action)) for condition, _ in SITUATIONS for action in STRATEGIES]
    assert locality(items, TASKS) == Locality(len(items), 0.0, 0.0, 0.0, 1.0)


def test_names_of_tasks() -> None:
    assert task_names(TASKS) == {"Bado Keli", "Rato Miku", "Paris", "seine"}


def test_answers_that_are_ordinary_words_or_labels_name_nothing() -> None:
    answers = ("A", "yes", "True", "both", "42", "1,024", "UK")
    assert task_names([Task(str(n), "which one?", answer) for n, answer in enumerate(answers)]) == frozenset()
    assert task_names([Task("1", "谁?", "张三")]) == {"张三"}


words = st.lists(st.sampled_from(["A", "b", "Bc", "aB", "if", " ", "  ", "\n", "-", "'", "1", ".", ", "]), max_size=14).map(
    "".join
)


@given(words)
def test_names_and_conditions_are_what_the_plain_patterns_find(text: str) -> None:
    names = re.compile(r"[A-Z][\w'’-]*(?:\s+[A-Z][\w'’-]*)+")  # quadratic time on one long word
    condition = re.compile(r"\b(?:when|whenever|if|before|after|once|unless)\b[^,\n]+,\s*\w+", re.IGNORECASE)
    assert names_in(text) == names.findall(text)
    assert bool(_CONDITION.search(text)) == bool(condition.search(text))
