"""Settings -> verifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evolve_dag.protocols import Verifier
from evolve_dag.verification.exact import ExactVerifier

if TYPE_CHECKING:
    from evolve_dag.config.schema import VerificationSettings
    from evolve_dag.inference.roles import Roles


def make_verifier(settings: VerificationSettings, roles: Roles | None = None) -> Verifier:
    """What judges final answers (METHOD step 2).

    Args:
        roles: who is asked when a model judges; the judge is opened with the first answer.
    """
    if settings.kind == "mathematics":
        from evolve_dag.verification.mathematics import MathematicsVerifier

        return MathematicsVerifier()
    if settings.kind == "judge":
        from evolve_dag.verification.judge import JudgeVerifier

        assert roles is not None
        return JudgeVerifier(
            roles.later("judge"), verdict=settings.verdict, identity=roles.identity("judge"), memory=roles.memory
        )
    if settings.kind == "contains":
        from evolve_dag.verification.contains import ContainsVerifier

        return ContainsVerifier()
    return ExactVerifier()
