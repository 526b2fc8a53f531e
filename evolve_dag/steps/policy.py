"""Step ``policy``: what enters iteration k, by reference (METHOD: policy(k) = base + adapter(k-1) + pool(k-1))."""

from __future__ import annotations

import json
from dataclasses import asdict

from evolve_dag.steps.base import StepContext


def run(context: StepContext) -> None:
    """Write ``policy.json``."""
    ref = context.entering
    (context.build.path / "policy.json").write_text(json.dumps(asdict(ref), indent=2) + "\n")
    context.build.note(adapter=ref.adapter, experience=ref.experience, base=ref.base)
