"""Text from outside on its way into a context: it stays text. And the lines that only the loop writes.

That it cannot open a turn or call a tool is the chat format's affair (:mod:`evolve_dag.inference.chat`). What is left are lines
that would *look* like ours: the heading of injected experience, and the line that announces the last step. A page that holds
one, by accident or on purpose, would pose as experience, and would make the check of clean histories fail the episode.
Such a line is shown as a quotation.

What looks like a letter is what Unicode says (UTS 39, confusables), with compatibility forms folded (NFKD), marks left off and
what shows nothing taken out. A line that is decorated (``**hint:**``) looks like another one.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

STEP_HEADING = "hint:"
"""Line above the items of a step."""
GLOBAL_HEADING = "notes:"
"""Line above the pool in the system message."""
LAST_STEP = "last step: answer now"
"""The line that ends the last observation (or the question) before the last allowed call."""
RESERVED = (STEP_HEADING, GLOBAL_HEADING, LAST_STEP)
"""Lines that only the loop writes."""
QUOTE = "> "
_BREAKS = re.compile(r"\r\n|[\r\v\f\x1c-\x1e\x85\u2028\u2029]")
_CONTROLS = re.compile(r"[\x00-\x08\x0e-\x1b\x1f\x7f-\x9f]")
_OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_UNSEEN = frozenset({"Cc", "Cf", "Cn", "Co", "Mn", "Me", "Zs", "Zl", "Zp"})
"""Categories of characters that show nothing, or only a mark on the one before."""
_BLANKS = frozenset("\u115f\u1160\u2800\u3164\uffa0\ufffc\U0001d159")
"""Letters and symbols without ink: fillers of Hangul, the empty pattern of Braille, a note without head."""
_FIRST_SCRIPT_WITHOUT_SPACES = 0x0E00  # Thai; CJK, kana and hangul come later, and none of them puts spaces around a name
_LATIN = re.compile(r"(?:.* )?(?:LATIN|REGIONAL INDICATOR)\b.* LETTER (?:SMALL CAPITAL |DOTLESS |OPEN )?([A-Z])(?: WITH .+)?")
"""Names of characters that are drawn as a Latin letter."""
_ALIKE = str.maketrans("l1|0", "iiio")
"""ASCII characters that look like another one in some case and some typeface (UTS 39: ``I``, ``l``, ``1`` and ``|``)."""


def plain(text: str) -> str:
    """``text`` with one kind of line break, no control characters and no half characters; reserved lines are quoted.

    Idempotent, and never makes a line that is reserved.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = _CONTROLS.sub("", _BREAKS.sub("\n", text))
    return "\n".join(f"{QUOTE}{line}" if _poses(line) else line for line in text.split("\n"))


def whole(text: str) -> str:
    """``text`` as Unicode: half a character, which JSON can spell (``\\ud83d``) and no file takes, becomes U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def printable(text: str) -> str:
    """``text`` for a terminal, which would obey its control characters: U+FFFD stands for each but tabs and line feeds."""
    return _OBEYED.sub("\ufffd", text)


def spaced(character: str) -> bool:
    """Whether a word boundary must stand beside ``character`` for it to be the edge of a word."""
    return character.isalnum() and ord(character) < _FIRST_SCRIPT_WITHOUT_SPACES


def head(text: str, characters: int) -> str:
    """The beginning of ``text``, at most about ``characters``; says that it was cut."""
    if len(text) <= characters:
        return text
    cut = text[:characters].rstrip()
    return f"{cut}\n... (cut after {characters} characters)"


def one_line(text: object, characters: int | None = 300) -> str:
    """``text`` on one line, so that it cannot begin another one; shortened, unless ``characters`` is None."""
    line = " ".join(str(text).split())
    return line if characters is None or len(line) <= characters else line[: characters - 1].rstrip() + "…"


def _poses(line: str) -> bool:
    """Whether a reader could take the line for a reserved one: its case, its spaces and its alphabet do not matter."""
    read = {""}
    for character in line:
        forms = _looks_like(character)
        if not forms:
            continue
        read = {before + form for before in read for form in forms}
        if any(one.startswith(_reserved()) for one in read):
            return True
        read = {one for one in read if any(reserved.startswith(one) for reserved in _reserved())}
        if not read:
            return False
    return False


@lru_cache(maxsize=1)
def _reserved() -> tuple[str, ...]:
    """The reserved lines as they are compared."""
    return tuple("".join(form for c in line for form in _looks_like(c)) for line in RESERVED)


@lru_cache(maxsize=4096)
def _looks_like(character: str) -> frozenset[str]:
    """What a character can be taken for, in small letters of ASCII where there are such; empty where nothing is seen."""
    if not _visible(character):
        return frozenset()
    parts = _visible(unicodedata.normalize("NFKD", character))
    forms = {parts, *_letters(character), *(_letters(parts) if len(parts) == 1 else ())}
    return frozenset(form.lower().translate(_ALIKE) for form in forms)


def _letters(character: str) -> list[str]:
    """The ASCII characters that one looks like."""
    if character.isascii():
        return [character]
    from confusable_homoglyphs.confusables import is_confusable

    found = is_confusable(character, greedy=True) or [{"homoglyphs": []}]
    alike = [_visible(unicodedata.normalize("NFKD", one["c"])) for one in found[0]["homoglyphs"]]
    named = [_LATIN.fullmatch(unicodedata.name(one, "")) for one in (character, *alike) if len(one) == 1]
    return [one for one in alike if one.isascii()] + [match[1] for match in named if match]


def _visible(text: str) -> str:
    return "".join(c for c in text if c not in _BLANKS and unicodedata.category(c) not in _UNSEEN)
