"""Items whose condition holds in the state that the miner's features describe."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from evolve_dag.config.parts import SelectionSettings
from evolve_dag.config.schema import Experiment
from evolve_dag.experience.features import answer_demanded, any_looks_back, features
from evolve_dag.experience.pool import Pool, lift
from evolve_dag.experience.selection.base import ONLY_ANSWER, STOP_WORDS, TOKEN, Selection, SelectorPart
from evolve_dag.records import ExperienceItem, Step


@dataclass(frozen=True, slots=True)
class StateSelector:
    """Items whose whole condition holds; the most specific first, then by lift.

    An item is passed over when a more specific one with the same predicates and more was chosen: that is the exception
    to its rule. Items without a condition are looked at before the first step only, and only cases: those that share
    most words with the question.
    """

    max_items: int = 3

    async def select(self, question: str, steps: Sequence[Step], pool: Pool) -> Selection:
        if answer_demanded(question, steps):
            return ONLY_ANSWER
        state = features(question, steps, history=any_looks_back(pool.items))
        shown = " ".join(f"{name}={value}" for name, value in state.items())
        fitting = [i for i in pool.items if i.condition and all(state.get(f) == v for f, v in i.condition.items())]
        fitting.sort(key=lambda i: (-len(i.condition), -lift(i), i.id))
        chosen: list[ExperienceItem] = []
        for item in fitting:
            if not any(set(item.condition.items()) < set(other.condition.items()) for other in chosen):
                chosen.append(item)
        reason = "condition holds"
        if not chosen and not steps:
            chosen, reason = _closest_cases(question, pool), "shares words with the question"
        ids = tuple(item.id for item in chosen[: self.max_items])
        return Selection(ids, f"{shown}; {reason}: {', '.join(ids)}" if ids else f"{shown}; no item fits")


def _closest_cases(question: str, pool: Pool) -> list[ExperienceItem]:
    wanted = _content(question)
    scored = []
    for item in pool.items:
        if item.granularity == "instance" and not item.condition:
            words = _content(item.text)
            shared = len(wanted & words)
            if shared:
                scored.append((-shared / len(wanted | words), item.id, item))
    return [item for _, _, item in sorted(scored, key=lambda entry: entry[:2])]


def _content(text: str) -> set[str]:
    return {word for word in TOKEN.findall(text.lower()) if word not in STOP_WORDS and word not in ("what", "case", "answer")}


class StateSelection(SelectionSettings):
    """The item's condition holds."""

    selector: Literal["state"] = "state"
    """Items whose condition holds in the state."""


def _mistakes(settings: StateSelection, experiment: Experiment) -> list[tuple[str, str]]:
    if experiment.extraction.extractor in ("contrast", "given") or experiment.granularity == "instance":
        return []
    what = (
        "'state' needs conditions, which only `extractor: contrast` writes, or a pool that is `given` has: use lexical or llm"
    )
    return [("selection.selector", what)]


STATE = SelectorPart(
    settings=StateSelection, make=lambda settings, roles, seed: StateSelector(settings.max_items), mistakes=_mistakes
)
