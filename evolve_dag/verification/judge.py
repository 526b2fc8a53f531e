"""Right is what a model says is right: the judges of the three web benchmarks (METHOD: settings of the paper).

A verdict that cannot be read and an endpoint that is down give None, "not judged", never 0: a wrong answer is a fact about the
policy, a missing verdict is one about the judge. Both would move the filter for groups of mixed outcomes if they were mixed up.
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from typing import Literal

from evolve_dag import prompts
from evolve_dag.config.parts import VerificationSettings
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import ModelError, UnreachableError
from evolve_dag.inference.ledger import purpose
from evolve_dag.inference.reasoning import said
from evolve_dag.inference.roles import Roles
from evolve_dag.inference.structured import ask_json, every_json
from evolve_dag.protocols import LanguageModel, Request, Sampling
from evolve_dag.records import Message, Task
from evolve_dag.secrecy import describe_error
from evolve_dag.store.memory import Memory
from evolve_dag.verification.base import VerifierPart
from evolve_dag.verification.exact import equals, references

log = logging.getLogger(__name__)

Verdict = Literal["word", "json"]
SCHEMA = {
    "type": "object",
    "properties": {
        "final_answer": {"type": "string"},
        "reasoning": {"type": "string"},
        "correct": {"enum": ["yes", "no"]},
    },
    "required": ["correct"],
}
GUIDE = {
    "type": "object",
    "properties": {
        "final_answer": {"type": "string", "maxLength": 300},
        "reasoning": {"type": "string", "maxLength": 600},
        "correct": {"enum": ["yes", "no"]},
    },
    "required": ["final_answer", "reasoning", "correct"],
    "additionalProperties": False,
}
"""What a model is held to that can be held: the verdict comes last, so what stands before it must leave it room."""
READING = "reading 2"
"""How a verdict is read, a part of what it is, in digests and in memory: the first reading was wrong at times, and what was
scored by it does not stand for what is scored now."""
MAX_GIVEN = 4000
"""Characters of an answer that the judge reads; the head and the tail of a longer one."""

_VERDICT = re.compile(r"\b(not\s+)?(in)?correct\b", re.IGNORECASE)
_GOES_ON = re.compile(r"[\"'’*`_]*\s*[:=/?]|\s+(?!because\b|since\b|as\b)\w", re.IGNORECASE)
"""Behind a word that is no verdict: ``correct: false``, "correct or incorrect", "correct answer"."""
_NAMED = re.compile(r"\bthe\s+correct\b", re.IGNORECASE)
_DOUBT = re.compile(
    r"\b(not|never|no|cannot|but|however|though|except|wrong|false|partial|partially|partly|mostly)\b|n['’]t\b", re.IGNORECASE
)
_LEAD = re.compile(
    r"(?:\W|\b(?:the|this|that|given|final|my|answer|verdict|judge?ment|response|is|it|i|would|mark|judge|say|as|yes)\b)*", re.I
)
"""What may stand before a verdict."""
_TAG = re.compile(r"<(?=\s*+(?:\||(?:/\s*+)?(?:question|reference|given|think)\b))", re.IGNORECASE)
"""Opens a tag of the prompt, of reasoning, or chat markup."""


class JudgeVerifier:
    """Asks a model for its verdict.

    An answer that equals the reference or an alias word for word is right without a call, and no answer is wrong without one.

    Args:
        model: gives the judge when it is first needed.
        verdict: ``word`` (one word) or ``json``.
        identity: what the judge is; part of the key under which a verdict is remembered.
        memory: verdicts of earlier runs; None: none.
    """

    def __init__(
        self, model: Callable[[], LanguageModel], *, verdict: Verdict = "word", identity: str = "", memory: Memory | None = None
    ) -> None:
        self._model = model
        self._verdict: Verdict = verdict
        self._identity = identity
        self._memory = memory
        self._prompt = prompts.load(prompt_name(verdict))

    async def verify(self, task: Task, answer: str | None) -> float | None:
        """1.0 right, 0.0 wrong, None when there is no readable verdict."""
        if answer is None or not answer.strip():
            return 0.0
        if equals(task, answer):
            return 1.0
        reference = _reference(*references(task))
        text = self._prompt.fill(question=_data(task.question), reference=_data(reference), given=_data(_shorten(answer)))
        key = Memory.key_of(READING, self._identity, self._prompt.name, text)
        known = await asyncio.to_thread(self._memory.get, "judge", key) if self._memory is not None else None
        verdict = known or await self._ask(text)
        if verdict is None:
            return None
        if known is None and self._memory is not None:
            await asyncio.to_thread(self._memory.put, "judge", key, verdict)
        return 1.0 if verdict == "correct" else 0.0

    async def _ask(self, text: str) -> str | None:
        """``correct``, ``incorrect``, or None.

        Raises:
            UnreachableError: there is no judge to be asked.
        """
        messages = (Message("user", text),)
        try:
            with purpose("verdict"):
                if self._verdict == "json":
                    sampling = Sampling(temperature=0.0, max_tokens=512)
                    answer = await ask_json(self._model(), messages, SCHEMA, sampling, guide=GUIDE)
                    return read_json(answer.text) if answer.ok else None
                completion = await self._model().generate(Request(messages, Sampling(temperature=0.0, max_tokens=16)))
        except UnreachableError:
            raise  # whoever plays the episode writes down why it has no verdict
        except ModelError as error:
            log.warning("not judged: %s", describe_error(error))
            return None
        return read_word(completion.text)


def read_word(text: str) -> str | None:
    """``correct`` or ``incorrect`` when what is said after any reasoning opens with it and takes nothing back; else None.

    "Correct.", "**Answer: Incorrect**" and "Incorrect. The correct answer is Lyon" can be read; "Mostly correct", "Wrong. The
    correct answer is Lyon", "Correct or incorrect?" and ``correct: false`` can not. "not correct" is incorrect.
    """
    told = said(text)
    first = _VERDICT.search(told)
    if first is None or _GOES_ON.match(told, first.end()) or not _LEAD.fullmatch(told, 0, first.start()):
        return None
    found = {_meant(verdict) for verdict in _VERDICT.finditer(_NAMED.sub("", told))}
    doubtful = found == {"correct"} and _DOUBT.search(_VERDICT.sub("", told))
    return None if doubtful or len(found) != 1 else found.pop()


def _meant(verdict: re.Match[str]) -> str:
    negated, opposite = verdict.groups()
    return "incorrect" if bool(negated) != bool(opposite) else "correct"


def read_json(text: str) -> str | None:
    """``correct`` or ``incorrect`` when all verdicts in ``text`` agree: a judge may quote one that an answer brought along."""
    found = {value["correct"] for value in every_json(text, SCHEMA)}
    return ("correct" if found == {"yes"} else "incorrect") if len(found) == 1 else None


def prompt_name(verdict: Verdict) -> str:
    """Name of the prompt that asks for this kind of verdict."""
    return f"verification/verdict_{verdict}"


def _reference(answer: str, *aliases: str) -> str:
    return f"{answer}\nAlso right: {'; '.join(aliases)}" if aliases else answer


def _shorten(answer: str) -> str:
    if len(answer) <= MAX_GIVEN:
        return answer
    half = MAX_GIVEN // 2
    return f"{answer[:half]}\n[... {len(answer) - 2 * half} characters left out ...]\n{answer[-half:]}"


def _data(text: str) -> str:
    """``text`` that cannot close the tag it stands in, nor, where a judge quotes it, the judge's reasoning: what is quoted
    behind that would be read as the verdict."""
    return _TAG.sub("‹", text)


class JudgeVerification(VerificationSettings):
    """The verdict of the model ``models.judge``."""

    kind: Literal["judge"] = "judge"
    """A model says whether the answer is right."""
    verdict: Verdict = "word"
    """What the judge is asked for: one word (WebWalkerQA, GAIA) or JSON (BrowseComp-ZH)."""


def _make(settings: JudgeVerification, roles: Roles | None) -> JudgeVerifier:
    assert roles is not None
    return JudgeVerifier(roles.later("judge"), verdict=settings.verdict, identity=roles.identity("judge"), memory=roles.memory)


def _mistakes(settings: JudgeVerification, experiment: Experiment) -> list[tuple[str, str]]:
    if experiment.models.judge is not None:
        return []
    return [("models.judge", "missing: verification.kind is judge, so name the model that judges")]


JUDGE = VerifierPart(
    settings=JudgeVerification,
    make=_make,
    roles=lambda settings: ("judge",),
    prompts=lambda settings, experiment: (prompt_name(settings.verdict),),
    data=lambda settings: READING,
    mistakes=_mistakes,
)
