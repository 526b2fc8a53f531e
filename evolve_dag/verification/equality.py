"""What runs in the process that compares mathematics. It imports nothing of ours, so that a new worker starts soon."""

from __future__ import annotations

import logging
import re

log = logging.getLogger(__name__)

_ANCHOR = re.compile(r"(?<!\\)\$|\\boxed|(?<!\\)\\[(\[]")
_PROSE = re.compile(r"[^\W\d_]{2,}|^\d{1,3}(?: \d{3})+$")
"""A word; and a number as the prose of many countries writes it, which LaTeX takes for a product."""
_CURRENCY = re.compile(r"(?<!\\)\\\$")
"""A dollar as LaTeX writes it."""
_ASCII = {0xFEE0 + code: code for code in range(0x21, 0x7F)}
"""Full-width forms, as texts in Chinese and Japanese have them, and what they stand for."""
_UNSPACED = r"[\u0e00-\uffef]"
_BESIDE = re.compile(rf"(?<={_UNSPACED})(?=[-+(]?\d)|(?<={_UNSPACED}:)(?=[-+(]?\d)|(?<=[\d%)])(?={_UNSPACED})")
"""Where a number touches a script that is written without spaces, which would be taken for a part of it."""


def equal(reference: str, answer: str) -> float | None:
    """1.0 where both are equal as mathematics, 0.0 where not, None when that could not be decided.

    Must run in the main thread of its process.
    """
    from math_verify import parse, verify
    from math_verify.errors import TimeoutException

    try:
        reference, answer = (_CURRENCY.sub("", text) for text in (reference, answer))
        gold = parse(_anchored(reference), raise_on_error=True)
        if not gold:
            return 0.0  # no mathematics, and not the same text
        candidates = _readings(answer.strip().strip("*`"))
        return 1.0 if any(verify(gold, parse(one, raise_on_error=True), raise_on_error=True) for one in candidates) else 0.0
    except (TimeoutError, TimeoutException):
        return None
    except Exception as error:
        log.warning("not judged: %s", type(error).__name__)
        return None


def _readings(answer: str) -> tuple[str, ...]:
    """An answer in a sentence is searched for its last expression too. A bare expression is taken as LaTeX alone: the search
    would find the 25 in ``25\\pi``."""
    anchored = _anchored(answer)
    prose = anchored == answer or ("\\" not in answer and _PROSE.search(answer))
    return (_BESIDE.sub(" ", answer.translate(_ASCII)), anchored) if prose else (anchored,)


def _anchored(text: str) -> str:
    """A bare expression between dollar signs, so that it is read as LaTeX; text that has an anchor stays."""
    return text if _ANCHOR.search(text) else f"${text}$"
