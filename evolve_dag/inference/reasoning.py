"""Where a model's reasoning ends and its answer begins, in answers of text. (In actions: :mod:`evolve_dag.agent.actions`.)"""

from __future__ import annotations

OPENED, CLOSED = "<think>", "</think>"


def said(text: str) -> str:
    """What a model says after its reasoning, which a template may have opened: what follows the last closing tag. Nothing where
    the reasoning was cut off: it is no answer, whatever it drafts."""
    rest = text.rpartition(CLOSED)[2].strip()
    return "" if rest.startswith(OPENED) else rest
