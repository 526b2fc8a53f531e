"""The row of a verifier."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from evolve_dag.config.parts import Part, VerificationSettings
from evolve_dag.protocols import Verifier

if TYPE_CHECKING:
    from evolve_dag.inference.roles import Roles

S = TypeVar("S", bound=VerificationSettings)


@dataclass(frozen=True, slots=True, kw_only=True)
class VerifierPart(Part[S]):
    """The row of a verifier."""

    make: Callable[[S, Roles | None], Verifier]
    """(settings, the models that it may ask; None: none is needed now) -> the verifier."""
