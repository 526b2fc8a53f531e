"""A language model chooses the items of a step (METHOD: step_wise, R(h_{t-1}, E)).

The same question is asked once: concurrent steps wait for one answer, later ones find it in memory. What cannot be used is
not remembered; the lexical selector chooses in its place, and that is counted.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydantic import Field

from evolve_dag import prompts
from evolve_dag.config.parts import SelectionSettings
from evolve_dag.config.section import MOST
from evolve_dag.errors import ModelError, UnreachableError
from evolve_dag.experience.extraction.llm_guides import choice
from evolve_dag.experience.extraction.llm_plans import entries, known_id
from evolve_dag.experience.features import answer_demanded, strip_last_step
from evolve_dag.experience.llm_text import pool_text, shorten, state_text
from evolve_dag.experience.pool import Pool
from evolve_dag.experience.selection.base import ONLY_ANSWER, Selection, SelectorPart
from evolve_dag.experience.selection.lexical import LexicalSelector
from evolve_dag.inference.ledger import purpose
from evolve_dag.inference.roles import Roles
from evolve_dag.inference.structured import ask_json, extract_json
from evolve_dag.plain import one_line
from evolve_dag.prompts import fence
from evolve_dag.protocols import LanguageModel, Sampling
from evolve_dag.records import Message, Step
from evolve_dag.store.memory import Memory

SPACE = "selection"
"""Where choices are remembered."""
PROMPT = "experience/select"
SCHEMA = {
    "type": "object",
    "properties": {"ids": {"type": "array", "items": {"type": "string"}}, "rationale": {"type": "string"}},
    "required": ["ids", "rationale"],
    "additionalProperties": False,
}
_WRAPPERS = ("ids", "items", "selected", "choice", "choices")


class LLMSelection(SelectionSettings):
    """``models.selector`` chooses; an invalid or empty choice falls back to ``lexical`` and is counted."""

    selector: Literal["llm"] = "llm"
    """Items that a language model chooses."""
    min_items: int = Field(3, ge=0, le=50)
    """Fewest items it is asked for (fewer where the pool or ``max_items`` is smaller)."""
    temperature: float = Field(0.3, ge=0)
    """Of the selector's calls."""
    top_p: float = Field(0.9, gt=0, le=1)
    """Nucleus of the selector's calls."""
    max_tokens: int = Field(512, ge=32, le=MOST)
    """Most tokens of one choice."""
    max_characters: int = Field(8_000, ge=500, le=MOST)
    """Most characters of question and steps in one call, about 2,000 tokens; head and tail of what is longer. The pool comes
    on top."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """What came of asking once."""

    selection: Selection | None
    """None: nothing usable."""
    problem: str = ""


def read_choice(value: Any, pool: Pool, most: int) -> tuple[tuple[str, ...], int, str]:
    """(ids of the pool, each once, at most ``most``; how many were unknown; rationale) of any JSON value."""
    found = entries(value, "ids", ("id",)) or []
    if isinstance(value, dict) and not any(isinstance(inner, (list, dict)) for inner in value.values()):
        found = [value.get(name) for name in _WRAPPERS if value.get(name) is not None][:1]  # one id without its list
    chosen: dict[str, None] = {}
    unknown = 0
    for entry in found:
        item_id = known_id(entry.get("id") if isinstance(entry, dict) else entry, pool.ids)
        if item_id is None:
            unknown += 1
        else:
            chosen[item_id] = None
    rationale = value.get("rationale") or value.get("reason") if isinstance(value, dict) else ""
    return tuple(chosen)[:most], unknown, one_line(rationale) if isinstance(rationale, str) else ""


class LLMSelector:
    """Asks a model for ``min_items`` to ``max_items`` ids and a rationale.

    - More ids than ``max_items``: the first ones. Fewer than ``min_items``: taken as they are (``short``); an item that
      does not fit would be worse. An empty list where ``min_items`` is 0: none. Else none of the pool, or no readable answer
      after one repair: the lexical selector (``fallbacks``).
    - The model cannot be asked: the lexical selector (``failed_calls``); the next question is asked again.
    - Where the pool has no more items than must be chosen, all are, and nobody is asked (``forced``).

    Args:
        model: gives the model when it is first needed.
        identity: what the model is; part of every key.
        memory: where choices are remembered; None: in this process only.
        seed: of sampling.
    """

    def __init__(
        self,
        settings: LLMSelection,
        model: Callable[[], LanguageModel],
        identity: str,
        *,
        memory: Memory | None = None,
        seed: int = 0,
    ) -> None:
        self._settings, self._model, self._identity = settings, model, identity
        self._memory = memory
        self._sampling = Sampling(
            temperature=settings.temperature, top_p=settings.top_p, max_tokens=settings.max_tokens, seed=seed
        )
        self._lexical = LexicalSelector(max_items=settings.max_items)
        self._known: dict[str, Selection] = {}
        self._in_flight: dict[str, asyncio.Task[_Asked]] = {}
        self._shown: tuple[Pool, str, str] | None = None
        names = ("asked", "remembered", "forced", "short", "fallbacks", "failed_calls", "unknown_ids")
        self.statistics: Counter[str] = Counter(dict.fromkeys(names, 0))
        """Steps by how they were served: ``asked`` (the model was), ``remembered``, ``forced``; of those ``fallbacks`` and
        ``failed_calls`` went to the lexical selector. ``short`` and ``unknown_ids`` count per answer of the model."""

    async def select(self, question: str, steps: Sequence[Step], pool: Pool) -> Selection:
        if answer_demanded(question, steps):
            return ONLY_ANSWER
        if not pool.items:
            return Selection((), "the pool is empty")
        most = min(self._settings.max_items, len(pool))
        least = min(self._settings.min_items, most)
        if least == len(pool):
            self.statistics["forced"] += 1
            return Selection(pool.ids, "the whole pool: it has no more items than are to be chosen")
        pool_shown, pool_digest = self._pool(pool)
        asked = strip_last_step(question)
        state = state_text(steps, self._settings.max_characters)
        key = Memory.key_of(
            pool_digest,
            Memory.key_of(asked, state),
            self._identity,
            asdict(self._sampling),
            prompts.digest(PROMPT),
            least,
            most,
        )
        known = self._known.get(key) or self._recall(key, pool, most)
        if known is not None:
            self.statistics["remembered"] += 1
            return known
        task = self._in_flight.get(key)
        if task is None or task.get_loop() is not asyncio.get_running_loop():
            content = prompts.load(PROMPT).fill(
                pool=fence("pool", pool_shown),
                question=fence("question", shorten(asked, self._settings.max_characters // 2)),
                state=fence("state", state),
                low=least,
                high=most,
            )
            # A task of its own: a step that is cancelled takes nobody else's answer with it.
            task = asyncio.ensure_future(self._ask(key, content, pool, least, most))
            self._in_flight[key] = task
            task.add_done_callback(lambda done: self._forget(key, done))
            self.statistics["asked"] += 1
        else:
            self.statistics["remembered"] += 1
        answer = await asyncio.shield(task)
        if answer.selection is not None:
            return answer.selection
        self.statistics["failed_calls" if answer.problem == _FAILED else "fallbacks"] += 1
        instead = await self._lexical.select(question, steps, pool)
        return Selection(instead.ids, f"lexical, {answer.problem}: {instead.rationale}")

    def _pool(self, pool: Pool) -> tuple[str, str]:
        """The pool as the prompt shows it, and its digest."""
        if self._shown is None or self._shown[0] is not pool:
            text = pool_text(pool)
            self._shown = (pool, text, Memory.key_of([[item.id, item.text] for item in pool.items]))
        return self._shown[1], self._shown[2]

    def _forget(self, key: str, task: asyncio.Task[_Asked]) -> None:
        if self._in_flight.get(key) is task:
            del self._in_flight[key]

    def _recall(self, key: str, pool: Pool, most: int) -> Selection | None:
        text = self._memory.get(SPACE, key) if self._memory is not None else None
        if text is None:
            return None
        ids, _, rationale = read_choice(json.loads(text), pool, most)
        self._known[key] = Selection(ids, rationale)
        return self._known[key]

    async def _ask(self, key: str, content: str, pool: Pool, least: int, most: int) -> _Asked:
        def check(value: Any) -> str | None:
            ids, unknown, _ = read_choice(value, pool, most)
            if ids or (least == 0 and _is_none(value)):
                return None
            return "none of its ids stands in the pool" if unknown else "it names no id"

        guide = choice(pool.ids, least, most, self._sampling.max_tokens)
        try:
            with purpose("select"):
                answer = await ask_json(
                    self._model(), (Message("user", content),), SCHEMA, self._sampling, check=check, repairs=1, guide=guide
                )
        except UnreachableError:
            raise  # every step would be the lexical selector's: whoever plays the episode writes down why it is lost
        except ModelError:
            return _Asked(None, _FAILED)
        value = answer.value if answer.ok else extract_json(answer.text)
        ids, unknown, rationale = read_choice(value, pool, most)
        self.statistics["unknown_ids"] += unknown
        if not ids and not (least == 0 and _is_none(value)):
            return _Asked(None, "the model chose none of the items" if value is not None else "the model's answer is no choice")
        self.statistics["short"] += len(ids) < least
        selection = Selection(ids, rationale or "no reason given")
        self._known[key] = selection
        if self._memory is not None:
            self._memory.put(SPACE, key, json.dumps({"ids": ids, "rationale": selection.rationale}))
        return _Asked(selection)


def _is_none(value: Any) -> bool:
    """Whether a choice says that no item fits; anything else without an id of the pool is a choice that went wrong."""
    return (value.get("ids") if isinstance(value, dict) else value) == []


NONE_FITS = "none may fit"
"""How a choice of nothing is read where it is one; in digests, since the lexical selector stood in for it before."""
_FAILED = "the model could not be asked"


def _make(settings: LLMSelection, roles: Roles, seed: int) -> LLMSelector:
    return LLMSelector(settings, roles.later("selector"), roles.identity("selector"), memory=roles.memory, seed=seed)


LLM = SelectorPart(
    settings=LLMSelection,
    make=_make,
    roles=lambda settings: ("selector",),
    prompts=lambda settings, experiment: (PROMPT,),
    data=lambda settings: "" if settings.min_items else NONE_FITS,
)
