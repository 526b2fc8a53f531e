"""Which artifact names which: how far a reference reaches.

A digest stands in whatever an artifact was made from (its manifest) and in what it decided (its decision, its policy). What
a reference leads to over any number of such steps must not be removed, and is fetched together.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path

from evolve_dag.errors import StoreError
from evolve_dag.store.layout import DECISION, MANIFEST, POLICY

NAMING = (DECISION, POLICY)
"""Files of artifacts that name other artifacts, besides the manifest."""
_DIGEST = re.compile(rb"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])")
_CHUNK = 1 << 22


def reach(starts: Iterable[str], following: Callable[[str], Iterable[str]]) -> set[str]:
    """``starts``, what follows each of them, what follows that, and so on. Circles do no harm."""
    reached: set[str] = set()
    waiting = list(starts)
    while waiting:
        one = waiting.pop()
        if one not in reached:
            reached.add(one)
            waiting += following(one)
    return reached


def named_by(folder: Path) -> set[str]:
    """Digests in the manifest, the decision and the policy of an artifact, without its own.

    Raises:
        StoreError: its manifest is missing or holds no digest, or a file cannot be read: what it needs cannot be told.
    """
    manifest = folder / MANIFEST
    found: set[str] = set()
    for path in (manifest, *(folder / name for name in NAMING)):
        try:
            found |= digests_in(path)
        except FileNotFoundError:
            if path == manifest:
                raise StoreError(
                    f"{manifest}: missing, so what this artifact needs cannot be told",
                    f"delete folder {folder} and run again: it will be recomputed",
                ) from None
        except OSError as error:
            raise StoreError(f"{path}: cannot be read: {error.strerror}", "check its permissions, then try again") from None
    if not found:  # a manifest names at least its own digest
        raise StoreError(
            f"{manifest}: corrupt, so what this artifact needs cannot be told",
            f"delete folder {folder} and run again: it will be recomputed",
        )
    return found - {folder.name}


def digests_in(path: Path) -> set[str]:
    """Every 32 hex digits that stand alone in a file, of any format.

    Raises:
        OSError: it cannot be read.
    """
    found: set[str] = set()
    with path.open("rb") as stream:
        tail = b""
        while chunk := stream.read(_CHUNK):
            text = tail + chunk
            found |= {match[0].decode("ascii") for match in _DIGEST.finditer(text)}
            tail = text[-64:]  # a digest may lie across the border; one cut there is found whole in the next round
    return found
