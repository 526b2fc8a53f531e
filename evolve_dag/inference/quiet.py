"""Keeps notes that libraries write to each other's developers away from the user's console."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def quiet_peft() -> Iterator[None]:
    """peft 0.21 asks transformers 5.23 for an attribute that is being renamed; there is nothing to be done about it here."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        yield
