"""ContainsVerifier: whole words of the reference in a short answer."""

from __future__ import annotations

import asyncio

import pytest

from evolve_dag.records import Task
from evolve_dag.verification.contains import ContainsVerifier


@pytest.mark.parametrize(
    ("answer", "reward"),
    [
        ("The mayor is Rato Miku.", 1.0),
        ("RATO  MIKU", 1.0),
        ("It is R. Miku, they say", 1.0),
        ("The mayor is Rato Mikus.", 0.0),
        ("Rato", 0.0),
        ("", 0.0),
        (None, 0.0),
        ("Rato Miku " + "or someone else " * 15, 0.0),
    ],
)
def test_cases(answer: str | None, reward: float) -> None:
    task = Task("t", "Who?", "Rato Miku", metadata={"aliases": "R. Miku"})
    assert asyncio.run(ContainsVerifier().verify(task, answer)) == reward


def says(reference: str, answer: str) -> bool:
    return asyncio.run(ContainsVerifier().verify(Task("t", "?", reference), answer)) == 1.0


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("北京", "答案是北京。"), ("ソニー", "それはソニーです"),
        ("กรุงเทพ", "เมืองหลวงคือกรุงเทพ"), ("7", "答えは7です"), ("서울", "서울은 수도입니다"),
        ("Sony", "それはSonyです"), ("5", "It is 5."), ("5", "5, I think"), ("5", "+5"),
        ("5", "$5"), ("5", "a 5-year plan"), ("5", "(5)"),
        ("5", "2 + 3 = 5"), ("19", "covid-19"),
        ("2019-2020", "in 2019-2020."), ("-5", "It is −5."), ("3.5", "3.5 or so"), ("10%", "10%"),
        ("1,000,000", "1,000,000 people"), ("5", "Answer:5"), ("C++", "I like C++."), ("1 1", "11 1 1"),
        ("Jean-Luc", "It is Jean\u2011Luc."), ("2019-2020", "in 2019–2020"),
    ],
)  # fmt: skip
def test_whole_words_and_numbers(reference: str, answer: str) -> None:
    assert says(reference, answer)


@pytest.mark.parametrize(
    ("reference", "answer"),
    [
        ("5", "The answer is -5"), ("5", "The answer is −5"), ("5", "-5"), ("5", "答案是-5"), ("5", "It is 3.5"),
        ("5", "it is .5"),
        ("72", "72.5 degrees"), ("1", "1,000,000"), ("000", "1,000,000"), ("2", "1/2"), ("2", "½"), ("10", "10%"),
        ("10", "10 %"),
        ("5", "5²"), ("30", "12:30"), ("2020", "2019-2020"), ("2019", "2019–2020"), ("5", "15"), ("5", "5th"), ("1", "1'000"),
        ("ony", "それはSonyです"), ("Ann", "Anna"), ("C", "_C"),
    ],
)  # fmt: skip
def test_a_part_of_a_word_or_number_is_not_it(reference: str, answer: str) -> None:
    assert not says(reference, answer)


def test_where_words_are_not_spaced_letters_are_counted() -> None:
    assert says("北京", "北京" + "首都" * 29)
    assert not says("北京", "北京" + "首都" * 30)
    assert says("서울", "서울 " + "입니다요 " * 29), "Korean is spaced"


def test_signs_in_a_reference_are_text() -> None:
    assert asyncio.run(ContainsVerifier().verify(Task("t", "?", "3.5 (b)"), "It is 3.5 (b), no more")) == 1.0
    assert asyncio.run(ContainsVerifier().verify(Task("t", "?", "3.5"), "It is 325")) == 0.0
