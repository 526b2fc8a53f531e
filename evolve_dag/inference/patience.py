"""How long an endpoint that is busy asks to be left alone, and how much is made without one that cannot be asked."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

MOST_UNREACHABLE = 0.1
"""Share of what a step asks for (episodes of a condition, calls of an extraction) that it may be made without, since a model
could not be asked: some requests break an endpoint every time."""


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds that the endpoint asks to wait; None where it does not say, or not readably.

    Args:
        headers: of its answer; names in lower case, or of a mapping that does not mind case.
    """
    try:
        if (milliseconds := headers.get("retry-after-ms")) is not None:
            return max(0.0, float(milliseconds) / 1000)
    except ValueError:
        pass
    value = headers.get("retry-after")
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            date = parsedate_to_datetime(value)
        except (ValueError, OverflowError):
            return None
        seconds = ((date if date.tzinfo else date.replace(tzinfo=UTC)) - datetime.now(UTC)).total_seconds()
    return max(0.0, seconds) if seconds == seconds else None  # not a number
