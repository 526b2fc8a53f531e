"""Step ``policy``: what enters iteration k, by reference (METHOD: policy(k) = base + adapter(k-1) + pool(k-1))."""

from __future__ import annotations

import json
from pathlib import Path

from evolve_dag.steps.body import StepContext
from evolve_dag.steps.spec import StepSpec
from evolve_dag.store.layout import POLICY


def run(context: StepContext) -> None:
    """Write ``policy.json``; for the first iteration also the pool that the experiment starts from, if any."""
    ref = context.entering
    start = context.experiment.start_pool
    if context.iteration == 1 and start:
        from evolve_dag.interop.pools import artifact_of, read_pool

        found = read_pool(start)
        artifact_of(found.pool, context.store, Path(start).name, renamed=found.renamed)
    (context.build.path / POLICY).write_text(json.dumps(ref.content, indent=2) + "\n")
    context.build.note(adapter=ref.adapter, experience=ref.experience, base=ref.base)


SPEC = StepSpec(
    "policy",
    "What enters iteration k: base model, adapter(k-1) and experience pool(k-1); for k = 1 the bare base model.",
    version="1",
    config=("models.policy",),
    inputs=(),
    run=run,
    kinds=frozenset({"json"}),
    told=("start_pool",),  # the policy that enters names its pool
    hidden=frozenset({"adapter", "experience"}),
)
