"""What the body of a step gets, and where it tells how far it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

from evolve_dag.agent.rollouts import PlayEpisode
from evolve_dag.config.schema import Experiment
from evolve_dag.inference.ledger import Ledger
from evolve_dag.inference.roles import Roles
from evolve_dag.records import PolicyRef
from evolve_dag.store.artifacts import Artifact, Build, Store
from evolve_dag.tasks.suites import SplitName


class Progress(Protocol):
    """Where a long step tells how far it is."""

    def start(self, label: str, total: int) -> None:
        """A phase of ``total`` units begins."""

    def advance(self, n: int = 1) -> None:
        """``n`` units are done."""

    def finish(self) -> None:
        """The phase is over."""


class Silent:
    """Progress that nobody watches."""

    def start(self, label: str, total: int) -> None: ...

    def advance(self, n: int = 1) -> None: ...

    def finish(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Playing:
    """What a worker that plays episodes is opened with, beside the experiment."""

    step: str
    """The step whose episodes they are: its keys, models and prompts are what they may read."""
    iteration: int
    split: SplitName
    """Whose tasks are asked."""
    adapter: str | None
    """Digest of the adapter of the policy that acts; None: the bare base model."""


class RolloutWorkers(Protocol):
    """Processes, mostly on other machines, that episodes fan out over."""

    def open(self, playing: Playing, ledger: Ledger | None) -> AbstractContextManager[tuple[PlayEpisode, int]]:
        """What plays one episode somewhere, and how many it plays at once; calls of models go into ``ledger``."""


@dataclass(frozen=True, slots=True)
class StepContext:
    """What the body of a step gets."""

    experiment: Experiment
    iteration: int
    store: Store
    inputs: Mapping[str, Artifact]
    """Step -> its artifact, opened and checked."""
    build: Build
    progress: Progress
    entering: PolicyRef
    roles: Roles
    """The models that may be asked, and :meth:`~evolve_dag.inference.roles.Roles.run` for what is awaited."""
    twin: Artifact | None = None
    """An artifact of this step that differs in the spec's ``derived`` keys alone: what it sampled stands."""
    workers: RolloutWorkers | None = None
    """Where episodes are played; None: here."""
    config: Mapping[str, Any] = field(default_factory=dict)
    """What decides the artifact, as its manifest will have it."""


Body = Callable[[StepContext], None]
