"""Secrets stay out of logs, artifacts and messages.

Masked are the keys that an experiment names (:func:`read_key`), the values of environment variables that are named like a
secret, and what looks like one: bearer tokens, passwords in addresses, signatures of object storage. What others said goes
into a message through :func:`excerpt`, which masks and *then* cuts: the beginning of a key is a secret too.
"""

from __future__ import annotations

import html
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from urllib.parse import quote

from evolve_dag.errors import EvolveError, ModelError

_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.I)
_TEXT = re.compile(
    r"(?i)(bearer\s+|(?:api[-_]?key|access[-_]?token|password|secret)[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,]+"
    r"|(://[^/\s:@]+:)[^/\s@]+(?=@)"  # user:password@host
    r"|((?:AWSAccessKeyId|Signature|X-Amz-\w+)[=>])[^\s&<]+"
    r"|\bsk-[\w*….-]{8,}"  # with its middle left out, too, as providers show it
)
_LEAST = 8
"""Shorter values are no secrets, and would mask ordinary words."""
_SHOWN = 3
"""Most characters of a secret that may be seen: fewer say nothing about it, and stand everywhere."""
_ELIDED = r"(?:[*•…]|\.\.)[*•….]*[\w-]*"
"""What stands in place of the rest of a key that somebody else has shortened, with the end that he may have left."""
_TOLD_APART = 32
"""Characters of a beginning that are compared; what is longer is masked as far as it may be a key."""
_MASK = "***"
Mask = Callable[[str], str]

_keys: set[str] = set()
"""Values that :func:`read_key` gave out, in this process."""


def read_key(variable: str, environment: Mapping[str, str] | None = None) -> str:
    """The key that an environment variable holds, '' where it is not set. It is masked from now on, however the variable
    is named.

    Raises:
        ModelError: it holds blanks, control characters or letters beyond ASCII. A library that puts such a value into a
            header says it back in its error.
    """
    key = (os.environ if environment is None else environment).get(variable, "").strip()
    if not key:
        return ""
    _keys.add(key)
    if not re.fullmatch(r"[!-~]+", key):
        raise ModelError(
            f"the environment variable {variable} holds characters that no key has",
            "set it to the key alone, without quotes or line breaks",
        )
    return key


def masker() -> Mask:
    """What masks the secrets of this process as they are now; for many texts."""
    whole = _masker(_secrets(), pieces=False)
    return lambda text: _TEXT.sub(_kept, whole(text))


def without_keys(text: str) -> str:
    """``text`` without the keys that were given out, whole or cut off; all else as it is.

    For what is kept as content: there a word that only looks like a secret is a word, and so is a short beginning of a key
    that stands in the middle of the text with nothing that says it was cut.
    """
    return _masker(frozenset(_keys), pieces=False)(text)


def excerpt(text: str, characters: int = 300) -> str:
    """What others said on its way into a message: without secrets and pieces of them, on one line, then shortened."""
    masked = _TEXT.sub(_kept, _masker(_secrets(), pieces=True)(text))
    line = " ".join(masked.encode("utf-8", "replace").decode("utf-8").split())
    return line if len(line) <= characters else line[: characters - 1] + "…"


def describe_error(error: BaseException, *, limit: int = 500) -> str:
    """Type and message on one line, shortened, without secrets."""
    message = error.what if isinstance(error, EvolveError) else str(error)
    name = type(error).__name__
    return excerpt(f"{name}: {message}", limit) if message.strip() else name


def _secrets() -> frozenset[str]:
    # Name by name: `items` raises where another thread takes a variable away, and what is to be masked would be told whole.
    named = {os.environ.get(name, "").strip() for name in list(os.environ) if _NAME.search(name)}
    return frozenset({value for value in named if len(value) >= _LEAST} | _keys)


def _kept(match: re.Match[str]) -> str:
    """The part of a match that says what was masked."""
    return f"{next((part for part in match.groups() if part), '')}{_MASK}"


@lru_cache(maxsize=16)
def _masker(secrets: frozenset[str], *, pieces: bool) -> Mask:
    """Masks ``secrets``, then their beginnings: with ``pieces`` wherever one stands alone, else where it is cut off or long."""
    spelled = {form for secret in secrets if len(secret) > _SHOWN for form in _spellings(secret)}
    whole = sorted(spelled, key=len, reverse=True)
    beginnings: dict[str, list[str]] = {}
    for form in whole:
        if not _is_common(form):
            beginnings.setdefault(form[: _SHOWN + 1], []).append(form)
    cut = [(head, _beginning(forms, pieces)) for head, forms in beginnings.items()]

    def mask(text: str) -> str:
        for form in whole:
            text = text.replace(form, _MASK)
        for head, pattern in cut:
            if head in text:  # most texts hold none: this is many times quicker than the pattern
                text = pattern.sub(_MASK, text)
        return text

    return mask


def _spellings(secret: str) -> Iterator[str]:
    """A secret as it stands, in JSON, in an address and on a page."""
    yield from (secret, json.dumps(secret)[1:-1], quote(secret), quote(secret, safe=""), html.escape(secret))


def _is_common(secret: str) -> bool:
    """Whether it begins as what is no secret does: short ones, paths, addresses, sentences."""
    return len(secret) < _LEAST or secret.startswith(("/", "~", ".")) or "://" in secret or " " in secret


def _beginning(secrets: Sequence[str], anywhere: bool) -> re.Pattern[str]:
    """The first characters of one of ``secrets``, as many as stand there, where no letter or digit goes on."""
    alone = r"(?![^\W_])"
    if anywhere:
        return re.compile(f"{_first(secrets, _SHOWN + 1)}(?:{_ELIDED}|{alone})")
    return re.compile(f"{_first(secrets, _LEAST)}{alone}|{_first(secrets, _SHOWN + 1)}(?:{_ELIDED}|\\Z)")


def _first(secrets: Sequence[str], least: int) -> str:
    """A pattern for at least ``least`` first characters, the longest before the shorter."""
    long = [f"{re.escape(secret[:_TOLD_APART])}[\\w+/=~.-]*" for secret in secrets if len(secret) > _TOLD_APART]
    short = {secret[:end] for secret in secrets for end in range(least, min(len(secret), _TOLD_APART) + 1)}
    return f"(?:{'|'.join([*long, *map(re.escape, sorted(short, key=len, reverse=True))])})"
