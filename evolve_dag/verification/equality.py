"""What runs in the process that compares mathematics. It imports nothing of ours, so that a new worker starts soon."""

from __future__ import annotations

import logging
import re
import unicodedata

log = logging.getLogger(__name__)

_ANCHOR = re.compile(r"(?<!\\)\$|\\boxed|(?<!\\)\\[(\[]")
_PROSE = re.compile(r"[^\W\d_]{2,}|^\d{1,3}(?: \d{3})+$")
"""A word; and a number as the prose of many countries writes it, which LaTeX takes for a product."""
_CURRENCY = re.compile(r"(?<!\\)\\\$")
"""A dollar as LaTeX writes it."""
_ASCII = {0xFEE0 + code: code for code in range(0x21, 0x7F)}
"""Full-width forms, as texts in Chinese and Japanese have them, and what they stand for."""
_PLAIN = {code: sign for code, sign in _ASCII.items() if chr(sign) not in "$\\"} | {ord(sign): "/" for sign in "⁄∕"}
"""Those of them that open no expression, and the slash of fractions."""
_RAISED = re.compile("[⁰¹²³⁴-⁹⁺⁻⁽⁾ⁿ]+")
_RAISED_BEHIND_NUMBER = re.compile(rf"(?<=\d){_RAISED.pattern}")
"""Not those of a unit: 10 m²."""
_METRES = re.compile(r"\d\s?m[²³][\s.]*$")
"""The one unit that could be a product as well."""
_LOWERED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_FRACTION = re.compile(r"(?:(?<!\d)(\d+)\s?)?([¼-¾⅐-⅞])")
_ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|(\d+(?:\.\d+)?|[^\W\d_]))")
_TIMES = re.compile(r"(?<=[\w)])\s?[·⋅]\s?(?=[\w(])")
_POWER = re.compile(r"(?:(?<=[\d)])|(?<=(?<![A-Za-z])[A-Za-z]))\*\*(?=[\d(-])")
_SCIENTIFIC = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?)[eE]([+-]?\d{1,3})(?!\w|\.\d)")
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
        reference, answer = (_spelled(_CURRENCY.sub("", text)) for text in (reference, answer))
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


def _spelled(text: str) -> str:
    """Signs that people, models and Python write outside of LaTeX, as what LaTeX and its readers know: 2√3, x², ½, 1e3, x**2,
    ∞, 3·4, and digits of any script. In prose those of numbers alone."""
    text = _FRACTION.sub(_fraction, text).translate(_PLAIN)
    text = re.sub(r"[^\W\x00-\x7f]", lambda one: str(unicodedata.decimal(one[0], one[0])), text)
    text = _POWER.sub("^", _TIMES.sub("*", text))
    text = _SCIENTIFIC.sub(lambda one: f"{one[1]}*10^({int(one[2])})", text)
    prose = _PROSE.search(_RAISED.sub("", text)) or _METRES.search(text)
    if prose and "$" not in text and "\\" not in text:
        return _RAISED_BEHIND_NUMBER.sub(lambda one: f"^{_lowered(one)}" if one[0].isdigit() else f"^({_lowered(one)})", text)
    text = _RAISED.sub(lambda one: f"^{{{_lowered(one)}}}", text)
    return _ROOT.sub(lambda one: f"\\sqrt{{{one[1] or one[2]}}}", text).replace("∞", "\\infty ")


def _lowered(raised: re.Match[str]) -> str:
    return raised[0].translate(_LOWERED)


def _fraction(sign: re.Match[str]) -> str:
    whole, part = sign.groups()
    return f"({whole}+{unicodedata.normalize('NFKD', part)})" if whole else f"({unicodedata.normalize('NFKD', part)})"


def _readings(answer: str) -> tuple[str, ...]:
    """An answer in a sentence is searched for its last expression too. A bare expression is taken as LaTeX alone: the search
    would find the 25 in ``25\\pi``."""
    anchored = _anchored(answer)
    prose = anchored == answer or ("\\" not in answer and _PROSE.search(answer))
    return (_BESIDE.sub(" ", answer.translate(_ASCII)), anchored) if prose else (anchored,)


def _anchored(text: str) -> str:
    """A bare expression between dollar signs, so that it is read as LaTeX; text that has an anchor stays."""
    return text if _ANCHOR.search(text) else f"${text}$"
