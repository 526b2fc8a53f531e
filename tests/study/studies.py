"""Small study files for the tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from evolve_dag.study.definition import Choice, Study, load_study

ARM = {
    "iterations": 7,
    "tasks": {
        "train": {"count": 12, "world": 13, "stream": True},
        "development": {"count": 6, "world": 22},
        "held_out": {"count": 6, "world": 32},
    },
}


def write(folder: Path, **changes: Any) -> Path:
    """A study of two arms over two seeds and two iterations."""
    (folder / "arm.yaml").write_text(yaml.safe_dump(ARM))
    content = {
        "seeds": [4, 5],
        "iterations": 2,
        "arms": {"plain": "arm.yaml", "greedy": {"config": "arm.yaml", "set": {"rollout": {"temperature": 0.0}}}},
    }
    path = folder / "tiny.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in {**content, **changes}.items() if v is not None}, sort_keys=False))
    return path


def study(folder: Path, choice: Choice | None = None, **changes: Any) -> Study:
    return load_study(write(folder, **changes), choice)
