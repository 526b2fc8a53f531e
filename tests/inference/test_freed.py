"""Freed memory goes back to the system."""

from __future__ import annotations

import ctypes
import os

import psutil
import pytest

from evolve_dag.inference.freed import give_back


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="another C library than glibc")
def test_what_was_freed_in_pieces_is_given_back() -> None:
    """64 MB in pieces that the C library keeps: every other one is freed, then all but the last."""
    me = psutil.Process(os.getpid())
    pieces = [bytearray(2**16) for _ in range(1024)]
    last = pieces[-1]
    held = me.memory_info().rss
    del pieces
    give_back()
    assert me.memory_info().rss < held - 2**25
    assert len(last) == 2**16


def test_another_c_library_is_no_mistake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    give_back()  # says nothing
