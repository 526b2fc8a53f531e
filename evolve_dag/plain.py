"""Text from outside on its way into a context: it stays text. And the lines that only the loop writes.

That it cannot open a turn or call a tool is the chat format's affair (:mod:`evolve_dag.inference.chat`). What is left are lines
that would *look* like ours: the heading of injected experience, and the line that announces the last step. A page that holds
one, by accident or on purpose, would pose as experience, and would make the check of clean histories fail the episode.
Such a line is shown as a quotation.
"""

from __future__ import annotations

import re
import unicodedata

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
_MAX_READ = 200
"""Characters of a line that are compared."""


def plain(text: str) -> str:
    """``text`` with one kind of line break, no control characters and no half characters; reserved lines are quoted.

    Idempotent, and never makes a line that is reserved.
    """
    text = text.encode("utf-8", "replace").decode("utf-8")
    text = _CONTROLS.sub("", _BREAKS.sub("\n", text))
    return "\n".join(f"{QUOTE}{line}" if _poses(line) else line for line in text.split("\n"))


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
    """Whether a reader could take the line for a reserved one: case, width, spaces and invisible characters do not matter."""
    seen = unicodedata.normalize("NFKC", line.lstrip()[:_MAX_READ])
    # Formatting and combining characters leave the letters as they look.
    seen = "".join(c for c in seen if unicodedata.category(c) not in ("Cf", "Mn", "Cc") and not c.isspace()).casefold()
    return any(seen.startswith("".join(reserved.split())) for reserved in RESERVED)
