"""What decoders are held to is readable, in form, and no narrower than the budget asks."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from transformers import AutoTokenizer

from evolve_dag.experience.extraction import llm_plans as plans
from evolve_dag.experience.extraction.llm_form import form_problems, tidy
from evolve_dag.experience.extraction.llm_guides import ExtractionGuides, choice, principle_pattern
from evolve_dag.experience.pool import principle_problems
from evolve_dag.experience.selection.llm import SCHEMA
from evolve_dag.inference.chat import ChatFormat
from evolve_dag.inference.folders import POCKET
from evolve_dag.inference.guided import Guides
from evolve_dag.records import Granularity

IDS = ("p0001", "p0002", "p0007", "p0011")


@pytest.fixture(scope="module")
def chat() -> ChatFormat:
    return ChatFormat.from_tokenizer(AutoTokenizer.from_pretrained(POCKET))


def walk(chat: ChatFormat, schema: Any, seed: int) -> Any:
    """An answer that fits, every token drawn evenly from those that may come next."""
    guide, draw, ids = Guides(chat).start(schema), np.random.default_rng(seed), []
    assert guide is not None
    while not guide.finished:
        ids.append(int(draw.choice(np.flatnonzero(guide.mask()))))
        guide.advance(ids[-1])
    assert guide.problem is None
    return json.loads(chat.decode_action(ids))


def texts(value: Any) -> list[str]:
    """All items that an answer proposes."""
    if isinstance(value, dict):
        own = [value[name] for name in ("text", "content") if isinstance(value.get(name), str)]
        return own + [text for inner in value.values() for text in texts(inner)]
    return [text for inner in value for text in texts(inner)] if isinstance(value, list) else []


@given(st.data(), st.integers(4, 32))
def test_what_fits_the_pattern_has_the_form(data: st.DataObject, words: int) -> None:
    text = data.draw(st.from_regex(principle_pattern(words), fullmatch=True)).rstrip("\n")
    assert principle_problems(text) == []
    assert form_problems(text, "principle", words) == []
    assert tidy(text) == text


@pytest.mark.parametrize(
    ("text", "fits"),
    [
        ("Verify: when a snippet names the answer, visit the page before answering.", True),
        ("Other words: when the two-word name isn't found, search it alone, then read.", True),
        ("Verify: when a snippet names Bado Keli, visit the page before answering.", False),
        ("Verify: when the first 3 results differ, visit the page before answering.", False),
        ("Verify: when a snippet names the answer, visit example.com before answering.", False),
        ("Verify: visit the page before answering.", False),
        ("Three words here: when a snippet names the answer, visit the page first.", False),
        ("Verify: when " + "a " * 20 + "b, visit the page first.", False),
    ],
)
def test_pattern_of_principles(text: str, fits: bool) -> None:
    assert (re.fullmatch(principle_pattern(32), text) is not None) == fits


@pytest.mark.parametrize("max_tokens", [32, 160, 2048])
@pytest.mark.parametrize("granularity", ["principle", "instance"])
def test_what_a_guide_lets_through_can_be_read(chat: ChatFormat, granularity: Granularity, max_tokens: int) -> None:
    guides = ExtractionGuides(granularity, 20, max_tokens)
    cases = (
        (guides.candidates(3), plans.CANDIDATES_SCHEMA, lambda v: plans.read_candidates(v)),
        (guides.decisions(3, IDS), plans.DECISIONS_SCHEMA, lambda v: plans.read_decisions(v, 3, IDS, Counter())),
        (guides.reconciliation(5), plans.RECONCILE_SCHEMA, lambda v: plans.read_reconciliation(v, 5, Counter())),
        (guides.consolidation(IDS), plans.CONSOLIDATE_SCHEMA, lambda v: plans.read_consolidation(v, IDS, Counter())),
        (guides.repair(), plans.REPAIR_SCHEMA, lambda v: plans.read_text(v)),
        (choice(IDS, 1, 3, max_tokens), SCHEMA, lambda v: v["ids"] and set(v["ids"]) <= set(IDS)),
    )
    for guide, judged, read in cases:
        for seed in range(2):
            value = walk(chat, guide, seed)
            Draft202012Validator(judged).validate(value)
            assert read(value) not in (None, False)
            for text in texts(value) if granularity == "principle" else ():
                assert form_problems(text, "principle", 20) == []


def test_a_pool_with_no_items_is_decided_upon_as_well(chat: ChatFormat) -> None:
    value = walk(chat, ExtractionGuides("principle", 32, 512).decisions(2, ()), 1)
    assert [entry["id"] for entry in value["decisions"]] == [None, None]


def longest(schema: Any) -> int:
    """Characters of the longest answer, with English words of 6 letters where a word may stand."""
    if schema.get("type") == "object":
        return sum(len(name) + 6 + longest(inner) for name, inner in schema["properties"].items())
    if schema.get("type") == "array":
        return 2 + schema["maxItems"] * (2 + longest(schema["items"]))
    if "enum" in schema:
        return max(len(json.dumps(value)) for value in schema["enum"])
    if "pattern" in schema:
        most = re.findall(r"\)\{\d+,(\d+)\}", schema["pattern"])  # words behind the first of situation and strategy
        assert len(most) == 2
        return 7 * (5 + sum(map(int, most)))
    return 2 + int(schema["maxLength"])


@given(st.integers(160, 4096), st.integers(1, 10), st.integers(2, 40), st.sampled_from(["principle", "instance"]))
def test_the_longest_answer_fits_into_its_tokens(tokens: int, candidates: int, items: int, granularity: Granularity) -> None:
    """At 3.75 characters a token; English in JSON has about 4."""
    ids = [f"p{number:04d}" for number in range(items)]
    guides = ExtractionGuides(granularity, 32, tokens)
    for guide in (guides.candidates(candidates), guides.decisions(candidates, ids), guides.reconciliation(items),
                  guides.consolidation(ids), guides.repair(), choice(ids, 1, 10, tokens)):  # fmt: skip
        assert longest(guide) <= 3.75 * tokens, guide


def test_more_tokens_allow_more() -> None:
    few, many = (ExtractionGuides("principle", 32, tokens).candidates(3) for tokens in (120, 2048))
    assert few["properties"]["items"]["maxItems"] == 2
    assert many["properties"]["items"]["maxItems"] == 3
    assert many["properties"]["items"]["items"]["properties"]["text"]["pattern"] == principle_pattern(32)
    assert choice(IDS, 1, 3, 64)["properties"]["ids"]["maxItems"] == 3
    assert choice(IDS, 2, 3, 32)["properties"]["ids"] == {
        "type": "array", "items": {"type": "string", "enum": list(IDS)}, "minItems": 1, "maxItems": 1,
    }  # fmt: skip
