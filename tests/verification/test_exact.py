"""The exact verifier: a table of cases, and what must hold for any text."""

from __future__ import annotations

import asyncio
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_dag.protocols import Verifier
from evolve_dag.records import Task
from evolve_dag.verification.exact import _PAIRS, ExactVerifier, _without_signs, normalise

CASES = json.loads(
    """[
    {"reference": "Rato Miku", "answer": "Rato Miku", "reward": 1.0},
    {"reference": "Rato Miku", "answer": "  rato\\n MIKU ", "reward": 1.0},
    {"reference": "Rato Miku", "answer": "Rato Miku.", "reward": 1.0},
    {"reference": "Rato Miku", "answer": "\\"Rato Miku.\\"", "reward": 1.0},
    {"reference": "Rato Miku", "answer": "(\\u201cRato Miku\\u201d)!", "reward": 1.0},
    {"reference": "Rato Miku", "answer": "Ｒａｔｏ　Ｍｉｋｕ。", "reward": 1.0},
    {"reference": "Rato Miku", "answer": "Rato\\u200b Miku", "reward": 1.0},
    {"reference": "Caf\\u00e9", "answer": "Cafe\\u0301", "reward": 1.0},
    {"reference": "STRASSE", "answer": "Stra\\u00dfe", "reward": 1.0},
    {"reference": "\\ufb01rm", "answer": "FIRM", "reward": 1.0},
    {"reference": "Rato Miku", "answer": "person Rato Miku", "reward": 0.0},
    {"reference": "Rato Miku", "answer": "Rato Miku or Zano Pile", "reward": 0.0},
    {"reference": "Rato Miku", "answer": "Rato", "reward": 0.0},
    {"reference": "Rato Miku", "answer": "RatoMiku", "reward": 0.0},
    {"reference": "Rato Miku", "answer": "Miku Rato", "reward": 0.0},
    {"reference": "Rato Miku", "answer": "", "reward": 0.0},
    {"reference": "Rato Miku", "answer": null, "reward": 0.0},
    {"reference": "Rato Miku", "answer": "Answer: Rato Miku", "reward": 0.0},
    {"reference": "Rato Miku", "answer": "Answer: Incorrect", "reward": 0.0},
    {"reference": "Rato Miku", "answer": "a", "reward": 0.0},
    {"reference": "Rato Miku", "answer": "correct", "reward": 0.0},
    {"reference": "Correct", "answer": "Correct.", "reward": 1.0},
    {"reference": "Correct", "answer": "Incorrect", "reward": 0.0},
    {"reference": "The Who", "answer": "Who", "reward": 0.0},
    {"reference": "5", "answer": "-5", "reward": 0.0},
    {"reference": "5", "answer": ".5", "reward": 0.0},
    {"reference": "5", "answer": "5%", "reward": 0.0},
    {"reference": "5", "answer": "5!", "reward": 0.0},
    {"reference": "5", "answer": "5'", "reward": 0.0},
    {"reference": "C", "answer": "C#", "reward": 0.0},
    {"reference": "102", "answer": "10\\u00b2", "reward": 0.0},
    {"reference": "10^2", "answer": "10\\u00b2", "reward": 1.0},
    {"reference": "?", "answer": "?", "reward": 1.0},
    {"reference": "?", "answer": "!", "reward": 0.0},
    {"reference": "United States", "aliases": "US|USA", "answer": "usa", "reward": 1.0},
    {"reference": "United States", "aliases": "US|USA", "answer": "US|USA", "reward": 0.0},
    {"reference": "United States", "aliases": "US| |", "answer": "", "reward": 0.0}
]"""
)


def reward(reference: str, answer: str | None, aliases: str | None = None) -> float | None:
    metadata = {} if aliases is None else {"aliases": aliases}
    return asyncio.run(ExactVerifier().verify(Task("t", "q?", reference, metadata=metadata), answer))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['reference']}/{case['answer']}")
def test_cases(case: dict) -> None:
    assert reward(case["reference"], case["answer"], case.get("aliases")) == case["reward"]


def test_is_a_verifier() -> None:
    assert isinstance(ExactVerifier(), Verifier)


@given(st.text())
def test_normalising_twice_changes_nothing(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(min_size=1).filter(str.strip))
def test_every_answer_is_judged_and_the_reference_itself_is_right(text: str) -> None:
    assert reward(text, text) == 1.0
    assert reward(text, f'  "{text.upper().lower()}" ') in (0.0, 1.0)


@given(st.from_regex(r"[A-Za-z]{1,8}( [A-Za-z]{1,8}){0,2}", fullmatch=True), st.from_regex(r"[A-Za-z]{1,8}", fullmatch=True))
def test_a_word_more_is_wrong_and_dressing_is_not(name: str, word: str) -> None:
    assert reward(name, f"{name} {word}") == 0.0
    assert reward(name, f"{word} {name}") == 0.0
    assert reward(name, f"« {name.swapcase()} ».") == 1.0


signs = st.lists(st.sampled_from("\"()[]{}5a!?., '。«»\u0663"), max_size=14).map("".join)


@given(signs.map(lambda text: " ".join(text.split())))
def test_signs_go_as_they_would_one_after_the_other(text: str) -> None:
    shown, bare = _without_signs(text), text
    while True:  # the rule as it is said, which takes quadratic time
        inner = re.sub(r"([.,;:。、\s]|(?<!\d)[!?])+$", "", bare)
        inner = inner[1:-1] if len(inner) > 1 and inner[0] + inner[-1] in _PAIRS else inner
        if not inner.strip() or inner.strip() == bare:
            break
        bare = inner.strip()
    assert shown == bare


@pytest.mark.parametrize(
    ("answer", "reference"),
    [
        ("−5", "-5"), ("10−2", "10-2"), ("don’t", "don't"), ("‘Rato Miku’", "Rato Miku"), ("‚Rato‘", "Rato"),
        ("Jean\u2011Luc", "Jean-Luc"), ("Jean\u2010Luc", "Jean-Luc"), ("2019\u20132020", "2019-2020"),
        ("“Rato” and “Miku”", '"Rato" and "Miku"'), ("„Rato“", "Rato"), ("“Rato”", "Rato"), ("„Rato”", "Rato"),
    ],
)  # fmt: skip
def test_a_minus_an_apostrophe_and_a_hyphen_are_written_in_several_ways(answer: str, reference: str) -> None:
    assert normalise(answer) == normalise(reference)
    assert normalise(reference) == normalise(normalise(answer))
