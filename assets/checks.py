"""The checks of the steps as asset checks, with their evidence.

They run inside the step's own run. A blocking one keeps what follows in that run from starting; the gate decides for
itself again in ``promotion``, which may run alone.
"""

from typing import Any

import dagster as dg

from evolve_dag.config.schema import Experiment
from evolve_dag.steps import base
from evolve_dag.steps.spec import StepSpec, Verdict
from evolve_dag.store.artifacts import Artifact

SHOWN = 20
"""Culprits that a check names."""


def specs(step: StepSpec) -> list[dg.AssetCheckSpec]:
    """Checks of a step's asset."""
    return [
        dg.AssetCheckSpec(check.name, asset=step.name, description=check.description, blocking=check.blocking)
        for check in step.checks
    ]


def evaluate(step: str, artifact: Artifact, experiment: Experiment) -> list[dg.AssetCheckResult]:
    """Results of all checks of a step."""
    spec = base.SPECS[step]
    blocking = {check.name: check.blocking for check in spec.checks}
    return [_result(verdict, blocking[verdict.check]) for verdict in spec.examine(artifact, experiment)]


def _result(verdict: Verdict, blocking: bool) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name=verdict.check,
        passed=verdict.passed,
        severity=dg.AssetCheckSeverity.ERROR if blocking or verdict.serious else dg.AssetCheckSeverity.WARN,
        description=verdict.text or None,
        metadata={name: _shown(value) for name, value in verdict.evidence.items()},
    )


def _shown(value: Any) -> Any:
    """The first culprits; in words when there is none, since Dagster hides even an empty list behind a click."""
    if not isinstance(value, list | dict):
        return value
    if not value:
        return dg.MetadataValue.text("none")
    return dg.MetadataValue.json(dict(list(value.items())[:SHOWN]) if isinstance(value, dict) else value[:SHOWN])
