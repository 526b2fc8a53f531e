"""Items whose hidden states are nearest to those of the state (selector ``embedding``).

A decoder that was trained to predict the next token is a weak embedding model: mean-pooled last hidden states lie in a narrow
cone, so cosines are all high and differ by wording as much as by meaning. It is here because it needs no second model, no
key and no miner's conditions; a folder with a real embedding model under ``models.embedding`` does better.
"""

from __future__ import annotations

import asyncio
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from evolve_dag.config.parts import SelectionSettings
from evolve_dag.errors import ModelError, exhausted, out_of_memory
from evolve_dag.experience.features import answer_demanded
from evolve_dag.experience.llm_text import shorten
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.base import ONLY_ANSWER, Selection, SelectorPart
from evolve_dag.experience.selection.lexical import describe
from evolve_dag.records import Step

MAX_TOKENS = 512
"""Tokens of a text that are embedded; the text is shortened before, so the end of it is not lost first."""
_CHARACTERS = 4 * MAX_TOKENS
_BATCH = 16
_MEMO = 65_536
"""Vectors kept."""


class Embedder:
    """Mean of the last hidden states of a transformers model, length 1; memoised by text. Safe to use from many threads.

    Args:
        folder: what ``from_pretrained`` reads; opened with the first text.
    """

    def __init__(self, folder: Path, *, dtype: str = "float32", device: str = "cpu") -> None:
        self._folder, self._dtype, self._device = folder, dtype, device
        self._lock = threading.Lock()
        self._loaded: tuple[Any, Any] | None = None
        self._vectors: OrderedDict[str, np.ndarray] = OrderedDict()
        self._announced: set[str] = set()
        self.computed = 0
        """Texts that went through the model."""

    def announce(self, text: str) -> None:
        """Whoever computes next computes ``text`` too: what many episodes ask for at once shares its batches."""
        if text not in self._vectors:
            self._announced.add(text)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Vectors of ``texts`` as rows (B, D), each of length 1 (all zeros for a text without tokens).

        Raises:
            ModelError: the folder cannot be loaded.
        """
        with self._lock:
            wanted = {text for text in texts if text not in self._vectors}
            while wanted and self._announced:
                wanted.add(self._announced.pop())
            missing = sorted(wanted - self._vectors.keys(), key=lambda text: (len(text), text))  # little padding
            for start in range(0, len(missing), _BATCH):
                part = missing[start : start + _BATCH]
                self._vectors.update(zip(part, self._in_memory(part), strict=True))
            found = np.stack([self._vectors[text] for text in texts])
            while len(self._vectors) > _MEMO:
                self._vectors.popitem(last=False)
            return found

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch
            from transformers import AutoModel, AutoTokenizer

            try:
                tokenizer = AutoTokenizer.from_pretrained(self._folder, trust_remote_code=False)
                how: Any = {"dtype": getattr(torch, self._dtype), "use_safetensors": True, "trust_remote_code": False}
                model = AutoModel.from_pretrained(self._folder, **how)
            except (OSError, ValueError, KeyError, AttributeError) as error:
                raise ModelError(
                    f"{self._folder}: cannot be loaded for embeddings: {error}",
                    "set models.embedding.path to a folder that AutoModel.from_pretrained reads",
                ) from error
            self._loaded = tokenizer, model.to(self._device).eval()
        return self._loaded

    def _in_memory(self, texts: Sequence[str]) -> np.ndarray:
        """By halves where memory runs out, or ExhaustedError."""
        try:
            return self._forward(texts)
        except Exception as error:
            if not out_of_memory(error):
                raise
            if len(texts) == 1:
                raise exhausted("a text that is embedded", error) from error
        half = len(texts) // 2
        return np.concatenate([self._in_memory(texts[:half]), self._in_memory(texts[half:])])

    def _forward(self, texts: Sequence[str]) -> np.ndarray:
        import torch

        tokenizer, model = self._load()
        longest = min(MAX_TOKENS, getattr(model.config.get_text_config(), "max_position_embeddings", MAX_TOKENS))
        rows = [tokenizer(text)["input_ids"][:longest] for text in texts]
        width = max(1, *map(len, rows))
        ids_B_T = torch.zeros(len(rows), width, dtype=torch.long)
        mask_B_T = torch.zeros(len(rows), width, dtype=torch.long)
        for place, row in enumerate(rows):
            ids_B_T[place, : len(row)] = torch.tensor(row, dtype=torch.long)
            mask_B_T[place, : len(row)] = 1
        ids_B_T, mask_B_T = ids_B_T.to(self._device), mask_B_T.to(self._device)
        with torch.inference_mode():
            states_B_T_D = model(input_ids=ids_B_T, attention_mask=mask_B_T).last_hidden_state.float()
        weights_B_T_1 = mask_B_T[..., None].float()
        pooled_B_D = (states_B_T_D * weights_B_T_1).nan_to_num().sum(1) / weights_B_T_1.sum(1).clamp(min=1)
        self.computed += len(rows)
        vectors_B_D: np.ndarray = torch.nn.functional.normalize(pooled_B_D, dim=1).cpu().numpy()
        return vectors_B_D


class EmbeddingSelector:
    """The ``max_items`` items with the highest cosine between their text and the described state; of equals (four digits)
    the lower id first. States of concurrent episodes are embedded in common batches.
    """

    def __init__(self, embedder: Embedder, max_items: int) -> None:
        self._embedder, self._max_items = embedder, max_items
        self._pool: tuple[Pool, np.ndarray] | None = None

    async def select(self, question: str, steps: Sequence[Step], pool: Pool) -> Selection:
        if answer_demanded(question, steps):
            return ONLY_ANSWER
        if not pool.items:
            return Selection((), "the pool is empty")
        description = describe(question, steps)
        text = shorten(description, _CHARACTERS)
        self._embedder.announce(text)
        known = self._pool
        if known is None or known[0] is not pool:
            texts = [shorten(item.text, _CHARACTERS) for item in pool.items]
            known = self._pool = (pool, await asyncio.to_thread(self._embedder.embed, texts))
        items_N_D = known[1]
        state_D = (await asyncio.to_thread(self._embedder.embed, [text]))[0]
        # Rounded: company in the batch moves the last digits.
        scores = [round(float(score), 4) for score in items_N_D @ state_D]
        chosen = sorted(zip(scores, pool.ids, strict=True), key=lambda pair: (-pair[0], pair[1]))[: self._max_items]
        shown = ", ".join(f"{item_id} {score:.4f}" for score, item_id in chosen)
        return Selection(tuple(item_id for _, item_id in chosen), f"'{description[:160]}'; cosine: {shown}")


class EmbeddingSelection(SelectionSettings):
    """Nearest hidden states, of the model ``models.embedding``."""

    selector: Literal["embedding"] = "embedding"
    """Items whose hidden states are nearest to those of the state."""


EMBEDDING = SelectorPart(
    settings=EmbeddingSelection,
    make=lambda settings, roles, seed: EmbeddingSelector(Embedder(roles.embedding_folder), settings.max_items),
    roles=lambda settings: ("embedding",),
)
