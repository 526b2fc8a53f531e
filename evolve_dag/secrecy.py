"""Secrets stay out of logs, artifacts and messages.

Masked are the values of environment variables that are named like a secret, and what looks like one: keys, bearer tokens,
passwords in addresses, signatures of object storage.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable

from evolve_dag.errors import EvolveError

_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL", re.I)
_TEXT = re.compile(
    r"(?i)(bearer\s+|(?:api[-_]?key|access[-_]?token|password|secret)[\"']?\s*[=:]\s*[\"']?)[^\s\"'&,]+"
    r"|(://[^/\s:@]+:)[^/\s@]+(?=@)"  # user:password@host
    r"|((?:AWSAccessKeyId|Signature|X-Amz-\w+)[=>])[^\s&<]+"
    r"|\bsk-[\w-]{8,}"
)
_LEAST = 8
"""Shorter values are no secrets, and would mask ordinary words."""


def masker() -> Callable[[str], str]:
    """What masks the secrets of the environment as it is now; for many texts."""
    found = {value for name, value in os.environ.items() if _NAME.search(name) and len(value) >= _LEAST}
    values = sorted(found, key=len, reverse=True)

    def mask(text: str) -> str:
        for value in values:
            text = text.replace(value, "***")
        return _TEXT.sub(lambda match: f"{next((part for part in match.groups() if part), '')}***", text)

    return mask


def describe_error(error: BaseException, *, limit: int = 500) -> str:
    """Type and message on one line, shortened, without secrets."""
    message = masker()(error.what if isinstance(error, EvolveError) else str(error))
    message = " ".join(message.encode("utf-8", "replace").decode("utf-8").split())
    text = f"{type(error).__name__}: {message}" if message else type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
