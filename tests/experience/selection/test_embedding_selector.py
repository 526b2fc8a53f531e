from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from experience_builders import QUESTION, search, visit

from evolve_dag.config.schema import Experiment
from evolve_dag.errors import ModelError
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.base import ONLY_ANSWER, Selection
from evolve_dag.experience.selection.embedding import EMBEDDING, MAX_TOKENS, Embedder, EmbeddingSelection, EmbeddingSelector
from evolve_dag.experience.selection.lexical import describe
from evolve_dag.inference.folders import POCKET
from evolve_dag.inference.roles import Roles
from evolve_dag.records import ExperienceItem, Step

TEXTS = [
    "Narrow: when a search returns no results, search only the short name.",
    "a page is shown",
    "city",
    "the mayor of the city",
]
STEPS = [search("Bado Keli", "no results")]


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    return Embedder(POCKET)


def pool_of(*texts: str) -> Pool:
    return Pool(tuple(ExperienceItem(f"p{n:04d}", text, "principle") for n, text in enumerate(texts, 1)))


def choose(selector: EmbeddingSelector, pool: Pool, steps: Sequence[Step] = STEPS, question: str = QUESTION) -> Selection:
    return asyncio.run(selector.select(question, steps, pool))


def test_vectors_are_the_mean_of_the_last_hidden_states(embedder: Embedder) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    model, tokenizer = AutoModel.from_pretrained(POCKET, dtype=torch.float32).eval(), AutoTokenizer.from_pretrained(POCKET)
    for text, vector in zip(TEXTS, embedder.embed(TEXTS), strict=True):
        with torch.inference_mode():  # one text, no padding, no mask
            states_T_D = model(torch.tensor([tokenizer(text)["input_ids"]])).last_hidden_state[0]
        expected = states_T_D.mean(0).numpy()
        np.testing.assert_allclose(vector, expected / np.linalg.norm(expected), atol=2e-6)


def test_company_in_a_batch_and_order_do_not_matter() -> None:
    together = Embedder(POCKET).embed(TEXTS)
    alone = np.stack([Embedder(POCKET).embed([text])[0] for text in TEXTS])
    np.testing.assert_allclose(together, alone, atol=2e-6)
    np.testing.assert_array_equal(Embedder(POCKET).embed(TEXTS[::-1])[::-1], together)


def test_a_text_goes_through_the_model_once(embedder: Embedder) -> None:
    embedder.embed(TEXTS)
    before = embedder.computed
    embedder.embed([*TEXTS, *TEXTS])
    assert embedder.computed == before


def test_texts_that_were_announced_share_the_next_batch() -> None:
    own = Embedder(POCKET)
    own.announce("one")
    own.announce("two")
    own.embed(["three"])
    assert own.computed == 3
    own.embed(["one", "two"])
    assert own.computed == 3


def test_empty_and_long_texts_have_vectors(embedder: Embedder) -> None:
    vectors = embedder.embed(["", "word " * (10 * MAX_TOKENS)])
    assert np.isfinite(vectors).all()
    assert np.linalg.norm(vectors[1]) == pytest.approx(1.0, abs=1e-5)


def test_the_item_that_reads_like_the_state_comes_first(embedder: Embedder) -> None:
    state = describe(QUESTION, STEPS)
    found = choose(EmbeddingSelector(embedder, 2), pool_of("city city city", "a page is shown", state))
    assert found.ids[0] == "p0003"
    assert len(found.ids) == 2
    assert "p0003 1.0000" in found.rationale


class Fixed(Embedder):
    """Vectors from a table; unknown texts are the state."""

    def __init__(self, table: dict[str, tuple[float, float]], state: tuple[float, float]) -> None:
        super().__init__(Path("nowhere"))
        self._table, self._state = table, state

    def _forward(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([self._table.get(text, self._state) for text in texts], dtype=np.float32)


def test_highest_cosine_first_and_ties_by_id() -> None:
    table = {"a": (0.0, 1.0), "b": (0.6, 0.8), "c": (0.8, 0.6), "d": (0.60001, 0.79999), "e": (-1.0, 0.0)}
    selector = EmbeddingSelector(Fixed(table, (1.0, 0.0)), 4)
    assert choose(selector, pool_of(*"abcde")).ids == ("p0003", "p0002", "p0004", "p0001")  # b and d: equal to four digits
    assert choose(EmbeddingSelector(Fixed(table, (0.0, 1.0)), 1), pool_of(*"abcde")).ids == ("p0001",)


def test_another_pool_has_other_vectors() -> None:
    selector = EmbeddingSelector(Fixed({"a": (0.0, 1.0), "b": (1.0, 0.0)}, (1.0, 0.0)), 1)
    assert choose(selector, pool_of("a", "b")).ids == ("p0002",)
    assert choose(selector, pool_of("b", "a")).ids == ("p0001",)


def test_concurrent_states_are_embedded_in_few_batches() -> None:
    batches: list[int] = []

    class Counting(Fixed):
        def _forward(self, texts: Sequence[str]) -> np.ndarray:
            batches.append(len(texts))
            return super()._forward(texts)

    selector = EmbeddingSelector(Counting({}, (1.0, 0.0)), 2)
    pool = pool_of("a", "b", "c")

    async def many() -> list[Selection]:
        return await asyncio.gather(*(selector.select(QUESTION, [visit("x", f"page: {n}")], pool) for n in range(40)))

    found = asyncio.run(many())
    assert all(one.ids == ("p0001", "p0002") for one in found)
    assert sum(batches) == 43  # 40 states and three items, each once
    assert len(batches) <= 8


def test_the_same_choice_in_every_run(embedder: Embedder) -> None:
    pool = pool_of(*TEXTS)
    chosen = {choose(EmbeddingSelector(own, 3), pool).ids for own in (embedder, Embedder(POCKET), Embedder(POCKET))}
    assert len(chosen) == 1


def test_nothing_is_chosen_when_only_an_answer_is_possible_or_the_pool_is_empty() -> None:
    selector = EmbeddingSelector(Embedder(Path("nowhere")), 3)  # never opened
    assert choose(selector, pool_of("a"), [search("x", "no results\nlast step: answer now")]) == ONLY_ANSWER
    assert choose(selector, Pool()).ids == ()


def test_a_folder_without_a_model_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="cannot be loaded for embeddings") as caught:
        choose(EmbeddingSelector(Embedder(tmp_path), 3), pool_of("a"))
    assert "models.embedding.path" in caught.value.remedy


def test_the_row_asks_the_model_of_its_role() -> None:
    settings = EmbeddingSelection(max_items=2)
    assert EMBEDDING.roles(settings) == ("embedding",)
    made = EMBEDDING.make(settings, Roles(Experiment(experiment="x")), 0)
    assert isinstance(made, EmbeddingSelector)
    assert len(choose(made, pool_of(*TEXTS)).ids) == 2
