"""Distributions as an installation lays them, for tests of parts from outside: a module and its entry points."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

from evolve_dag.config import outside, parts


def install(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    entry_points: Mapping[str, Mapping[str, str]],
    code: str = "",
    version: str = "0.1",
) -> Path:
    """Lay distribution ``name`` with a module of its name (``-`` as ``_``) into ``folder`` and put that on the path.

    Args:
        entry_points: group -> name -> ``module:attribute``.
    """
    info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    sections = [
        f"[{group}]\n" + "".join(f"{key} = {to}\n" for key, to in found.items()) for group, found in entry_points.items()
    ]
    (info / "entry_points.txt").write_text("\n".join(sections))
    module = folder / f"{name.replace('-', '_')}.py"
    module.write_text(code)
    forget(monkeypatch)
    monkeypatch.syspath_prepend(str(folder))
    return module


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a new process: nothing was loaded from outside yet."""
    for module, known in ((parts, "_outside"), (outside, "_modules"), (outside, "_outcomes")):
        monkeypatch.setattr(module, known, {})  # so that what comes in meanwhile is forgotten, too: every step asks after it
