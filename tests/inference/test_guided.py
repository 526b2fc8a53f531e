"""Answers held to a JSON schema, from the pocket model and from random ones."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

import naive
import numpy as np
import pytest
import tiny_tokenizers
import torch
from jsonschema import Draft202012Validator
from transformers import PreTrainedModel

from evolve_dag.errors import ModelError
from evolve_dag.inference.chat import ChatFormat
from evolve_dag.inference.folders import POCKET
from evolve_dag.inference.guided import Guides
from evolve_dag.inference.transformers import TransformersModel
from evolve_dag.protocols import Completion, Request, Sampling
from evolve_dag.records import Message

SCHEMA = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["city", "river", None]},
        "numbers": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "minItems": 1, "maxItems": 3},
        "rule": {"type": "string", "pattern": "^[A-Z][a-z]{1,6}: when [a-z]{1,6}( [a-z]{1,6}){0,2}, [a-z]{1,6}\\.$"},
    },
    "required": ["kind", "numbers", "rule"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def pocket() -> TransformersModel:
    return TransformersModel.load(POCKET, threads=1)


def ask(model: TransformersModel, requests: Sequence[Request]) -> list[Completion]:
    async def scene() -> list[Completion]:
        return list(await asyncio.gather(*(model.generate(request) for request in requests)))

    return asyncio.run(scene())


def request(seed: int, schema: Any = SCHEMA, **sampling: Any) -> Request:
    text = f"What is the mayor of the home of person Bado Keli? {'again ' * (seed % 4)}"
    return Request(
        (Message("user", text),), Sampling(**{"max_tokens": 160, "seed": seed, **sampling}), f"s{seed}", answer_schema=schema
    )


def check(completion: Completion, schema: Any = SCHEMA) -> Any:
    assert completion.finish_reason == "stop"
    value = json.loads(completion.text)
    Draft202012Validator(schema).validate(value)
    return value


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.0}, {"temperature": 1.5, "top_p": 0.8}])
def test_every_answer_fits_and_the_end_of_turn_ends_it(pocket: TransformersModel, sampling: dict[str, float]) -> None:
    requests = [request(seed, **sampling) for seed in range(8)]
    completions = ask(pocket, requests)
    for completion in completions:
        check(completion)
        assert completion.token_ids[-1] == pocket.chat.end_of_turn_id
        assert completion.token_ids.count(pocket.chat.end_of_turn_id) == 1
    if sampling.get("temperature", 1) > 0:
        assert len({completion.text for completion in completions}) > 4
    assert [c.token_ids for c in ask(pocket, requests)] == [c.token_ids for c in completions]


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.7}, {"top_p": 0.7}, {"temperature": 0.0}])
def test_neighbours_are_not_touched(policy: PreTrainedModel, chat: ChatFormat, sampling: dict[str, float]) -> None:
    """They sample what the naive loop samples, and a guided row what it samples alone."""
    model = TransformersModel.load(policy, chat, threads=1)
    free = [request(seed, None, max_tokens=5 + 7 * seed, **sampling) for seed in range(5)]
    held = [request(seed, **sampling) for seed in (10, 11)]
    completions = ask(model, [held[0], *free, held[1]])
    assert model.counters.rounds == 1
    for wanted, completion in zip(free, completions[1:-1], strict=True):
        ids, logprobs = naive.answer(policy, chat, wanted)
        assert list(completion.token_ids) == ids
        assert np.allclose(completion.logprobs, logprobs, atol=1e-4)
    for wanted, completion in ((held[0], completions[0]), (held[1], completions[-1])):
        check(completion)
        [alone] = ask(TransformersModel.load(policy, chat, threads=1), [wanted])
        assert alone.token_ids == completion.token_ids


def test_log_probabilities_are_those_of_the_model_without_the_schema(policy: PreTrainedModel, chat: ChatFormat) -> None:
    wanted = request(3, temperature=0.6)
    [completion] = ask(TransformersModel.load(policy, chat, threads=1), [wanted])
    context = chat.encode(wanted.messages)
    with torch.inference_mode():
        logits = policy(input_ids=torch.tensor([[*context, *completion.token_ids]])).logits[0, len(context) - 1 : -1]
    expected = torch.log_softmax(logits.float(), -1).gather(-1, torch.tensor(completion.token_ids)[:, None])[:, 0]
    assert np.allclose(completion.logprobs, expected.numpy(), atol=1e-4)
    assert min(completion.logprobs) < -3  # the schema forced what the model would not have said


def test_an_answer_that_is_cut_off_is_data(pocket: TransformersModel) -> None:
    [completion] = ask(pocket, [request(1, max_tokens=8)])
    assert completion.finish_reason == "length"
    assert len(completion.token_ids) == 8
    assert completion.text.startswith("{")


@pytest.mark.parametrize(
    ("schema", "said"),
    [
        ({"type": "string", "enum": []}, "anyOf is empty"),
        ({"type": "array", "minItems": 3, "maxItems": 1}, "minItems"),
        ({"type": "object", "properties": {"text": {"type": "string", "pattern": "("}}}, "unclosed group"),
        ({"type": "strin"}, "strin"),
    ],
)
def test_an_impossible_schema_fails_its_own_request_only(pocket: TransformersModel, schema: Any, said: str) -> None:
    async def scene() -> list[Completion | BaseException]:
        calls = (pocket.generate(request(1, schema)), pocket.generate(request(2)))
        return list(await asyncio.gather(*calls, return_exceptions=True))

    wrong, right = asyncio.run(scene())
    assert isinstance(wrong, ModelError)
    assert "no answer fits the schema" in wrong.what
    assert said in wrong.what
    assert json.dumps(schema) in wrong.remedy
    assert isinstance(right, Completion)
    check(right)


def test_without_the_library_the_schema_is_ignored(
    policy: PreTrainedModel, chat: ChatFormat, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    model = TransformersModel.load(policy, chat, threads=1)
    wanted = request(1, max_tokens=12)
    [completion] = ask(model, [wanted])
    assert list(completion.token_ids) == naive.answer(policy, chat, wanted)[0]


def test_a_tokenizer_that_the_library_cannot_read_is_no_failure(caplog: pytest.LogCaptureFixture) -> None:
    guides = Guides(ChatFormat.from_tokenizer(tiny_tokenizers.word_level()))
    assert guides.start(SCHEMA) is None
    assert guides.start(SCHEMA) is None
    assert len([r for r in caplog.records if "cannot read this tokenizer" in r.message]) == 1


def test_a_guide_allows_what_spells_the_answer_and_then_the_end_alone(chat: ChatFormat) -> None:
    guide = Guides(chat).start({"enum": ["no", "nothing"]})
    assert guide is not None
    text = '"no"'
    for token in chat.encode_action(text)[:-1]:
        assert not guide.finished
        mask = guide.mask()
        assert mask[token]
        assert not mask[chat.end_of_turn_id]
        guide.advance(token)
    assert guide.finished
    assert np.flatnonzero(guide.mask()).tolist() == [chat.end_of_turn_id]
    guide.advance(chat.encode_action("x")[0])  # nothing follows a complete answer
    assert guide.problem is None


def test_a_token_that_was_not_allowed_ends_the_answer(chat: ChatFormat) -> None:
    guide = Guides(chat).start(SCHEMA)
    assert guide is not None
    guide.advance(chat.encode_action("x")[0])
    assert guide.problem is not None
    assert "\n" not in guide.problem
    assert np.flatnonzero(guide.mask()).tolist() == [chat.end_of_turn_id]


def test_answers_do_not_share_a_state(chat: ChatFormat) -> None:
    guides = Guides(chat)
    first, second = guides.start(SCHEMA), guides.start(dict(SCHEMA))
    assert first is not None
    assert second is not None
    before = second.mask().tolist()
    first.advance(chat.encode_action('{"kind"')[0])
    assert second.mask().tolist() == before
    assert first.mask().tolist() != before
