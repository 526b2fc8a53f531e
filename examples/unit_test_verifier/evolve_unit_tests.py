"""A verifier that runs unit tests on an answer. Right is what every test lets pass.

The tests are functions ``test_*(answer, reference)`` in a file that the experiment names. Both arguments are text; where
answers are programs, a test executes them. All of it runs in evolve-dag's sandbox, a process an answer.
"""

from __future__ import annotations

import ast
import secrets
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field

from evolve_dag.config.parts import VerificationSettings
from evolve_dag.config.schema import Experiment
from evolve_dag.config.section import PATH
from evolve_dag.environments.web.sandbox import open_sandbox
from evolve_dag.records import Task
from evolve_dag.verification.base import VerifierPart

RUNNER = """
for _name, _test in list(globals().items()):
    if _name.startswith("test_"):
        _test({answer!r}, {reference!r})
print({token!r})
"""
"""Behind the tests. Whoever ends the process early has not printed the token; one that looks for it would find it, so what a
strong policy must not see belongs into a process of its own."""


class UnitTestVerification(VerificationSettings):
    """Every unit test of a file passes."""

    tests: str = Field(json_schema_extra=PATH)
    """Python file with functions `test_*(answer, reference)`; its content is in the digest."""
    seconds: float = Field(5.0, gt=0, le=30)
    """Longest that the tests of one answer may take; what takes longer is wrong."""
    megabytes: int = Field(512, ge=64, le=4096)
    """Memory of the process."""


@dataclass(frozen=True, slots=True)
class UnitTestVerifier:
    """Runs ``tests`` on an answer. It may block: a part from outside works in a thread of its own."""

    tests: str
    settings: UnitTestVerification

    async def verify(self, task: Task, answer: str | None) -> float | None:
        """1.0 where every test passes, else 0.0; without a sandbox it raises, and the answer is not judged."""
        if answer is None:
            return 0.0
        token = secrets.token_hex(16)
        code = self.tests + RUNNER.format(answer=answer, reference=task.answer, token=token)
        outcome = open_sandbox().run_python(code, seconds=self.settings.seconds, megabytes=self.settings.megabytes)
        return float(outcome.ending == "done" and outcome.output.decode("utf-8", "replace").strip().endswith(token))


def _mistakes(settings: UnitTestVerification, experiment: Experiment) -> list[tuple[str, str]]:
    try:
        names = [f.name for f in ast.parse(_text(settings)).body if isinstance(f, ast.FunctionDef)]
    except (OSError, ValueError, SyntaxError) as error:
        return [("verification.tests", f"cannot be read: {error}")]
    return [] if any(name.startswith("test_") for name in names) else [("verification.tests", "has no function test_*")]


def _text(settings: UnitTestVerification) -> str:
    return Path(settings.tests).read_text(encoding="utf-8")


UNIT_TESTS = VerifierPart(
    settings=UnitTestVerification, make=lambda settings, roles: UnitTestVerifier(_text(settings), settings), mistakes=_mistakes
)
