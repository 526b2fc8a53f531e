"""Prompts are files with named blanks: ``evolve_dag/<package>/prompts/<name>.md``, ``{{blank}}``.

Their hash is part of the lineage, so a reworded prompt recomputes what it decides.

What comes from outside may hold anything, our own markup included. In a prompt it stands between ``<data name="...">`` and
``</data>``; every prompt says that nothing in there is an order, and :func:`fence` sees to it that the text cannot close its
fence or open another one.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

from evolve_dag.errors import ConfigError, SliceError

ROOT = Path(__file__).parent
_BLANK = re.compile(r"\{\{([a-z][a-z0-9_]*)\}\}")
_MARKUP = re.compile(r"<(?=\s*+(?:\||(?:/\s*+)?data\b))", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt file."""

    name: str
    """``experience/critique_web``."""
    text: str
    """As written, blanks included."""

    @property
    def blanks(self) -> frozenset[str]:
        """Names that must be filled."""
        return frozenset(_BLANK.findall(self.text))

    def fill(self, **values: object) -> str:
        """The text with every blank filled. What is filled in is data: it is not looked through for blanks again.

        Raises:
            ConfigError: a blank is left unfilled, or a value has no blank.
        """
        missing, unknown = sorted(self.blanks - set(values)), sorted(set(values) - self.blanks)
        if missing or unknown:
            parts = [f"unfilled: {', '.join(missing)}"] * bool(missing) + [f"unknown: {', '.join(unknown)}"] * bool(unknown)
            raise ConfigError(
                f"prompt {self.name}: {'; '.join(parts)}",
                f"make evolve_dag/{_file(self.name)} and its caller agree on the blanks",
            )
        return _BLANK.sub(lambda match: str(values[match.group(1)]), self.text)


_declared: ContextVar[frozenset[str] | None] = ContextVar("declared_prompts", default=None)


@contextmanager
def only(names: frozenset[str]) -> Iterator[None]:
    """While it lasts, no other prompt can be loaded here: those of a step are in its digest."""
    before = _declared.set(names)
    try:
        yield
    finally:
        _declared.reset(before)


def load(name: str) -> Prompt:
    """The prompt ``<package>/<name>``, e.g. ``experience/critique_web``.

    Raises:
        ConfigError: there is no such file.
        SliceError: a step runs, and its digest does not hold this prompt.
    """
    declared = _declared.get()
    if declared is not None and name not in declared:
        raise SliceError(
            f"prompt {name} is used by a step, but is not in its digest", "name it under `prompts` in the row of the part"
        )
    return _read(name)


@lru_cache(maxsize=64)
def _read(name: str) -> Prompt:
    try:
        return Prompt(name, (ROOT / _file(name)).read_text(encoding="utf-8"))
    except OSError:
        raise ConfigError(f"prompt {name}: evolve_dag/{_file(name)} is not there", "reinstall the package") from None


def fence(name: str, text: str) -> str:
    """``text`` as data. The ``<`` of fence markers and chat markup (``<|...``) in it becomes ``‹``."""
    clean = text.encode("utf-8", "replace").decode("utf-8")
    return f'<data name="{name}">\n{_MARKUP.sub("‹", clean)}\n</data>'


def digest(*names: str) -> str:
    """One hash over several prompts, whatever their order."""
    total = hashlib.sha256()
    for name in sorted(set(names)):
        content = _read(name).text.encode()
        total.update(f"{name}\0{len(content)}\0".encode() + content)
    return f"sha256:{total.hexdigest()[:32]}"


def _file(name: str) -> str:
    package, _, file = name.rpartition("/")
    return f"{package}/prompts/{file}.md"
