"""Models by role: extractor, selector and judge, opened when first asked and closed with the step, and its one event loop.

``policy`` in an experiment file means the policy itself (self-generated experience): whichever policy the step has open at the
moment, with its adapter.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self, TypeVar

from evolve_dag.config.schema import PolicySettings
from evolve_dag.errors import ModelError
from evolve_dag.inference.backends import identity, open_backend
from evolve_dag.inference.folders import model_folder
from evolve_dag.inference.ledger import metered

if TYPE_CHECKING:
    from pathlib import Path

    from evolve_dag.config.schema import Experiment, HelperRole
    from evolve_dag.inference.ledger import Ledger
    from evolve_dag.protocols import Completion, LanguageModel, Request
    from evolve_dag.store.memory import Memory


T = TypeVar("T")


class Roles:
    """The models that a step may ask, and the one event loop in which they are asked. Leaving it closes both.

    Args:
        ledger: where calls are written down; None: nowhere.
        memory: what was answered before; None: everything is asked anew.
    """

    def __init__(self, experiment: Experiment, *, ledger: Ledger | None = None, memory: Memory | None = None) -> None:
        self.experiment = experiment
        self.ledger = ledger
        self.memory = memory
        self._policy: tuple[LanguageModel, str] | None = None
        self._open: dict[str, LanguageModel] = {}
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self.run(self.close())
        finally:
            self._runner.close()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of ``work``, run in the loop: connections and batches outlive one call, but belong to one loop."""
        return self._runner.run(work)

    @contextmanager
    def policy(self, model: LanguageModel, adapter: str | None) -> Iterator[None]:
        """While it lasts, ``model`` (base and the adapter artifact of that digest) answers for roles that say ``policy``."""
        before, self._policy = self._policy, (model, adapter or "")
        try:
            yield
        finally:
            self._policy = before

    def model(self, role: HelperRole) -> LanguageModel:
        """The model of a role.

        Raises:
            ModelError: the experiment names none, it cannot be opened, or it is the policy and none is open.
        """
        if getattr(self.experiment.models, role) == "policy":
            if self._policy is None:
                raise ModelError(
                    f"models.{role} is the policy, but no policy is open here", f"give models.{role} a model of its own"
                )
            model = self._policy[0]
            return model if self.ledger is None else metered(model, role=role, model_name="policy", ledger=self.ledger)
        if role not in self._open:
            settings = self.experiment.models.settings(role)
            if settings is None:
                raise ModelError(f"models.{role} is not set", f"name a model under models.{role} in the experiment file")
            self._open[role] = open_backend(settings, role=role, runtime=self.experiment.runtime, ledger=self.ledger)
        return self._open[role]

    def later(self, role: HelperRole) -> Callable[[], LanguageModel]:
        """Asks for the role's model only when it is needed."""
        return lambda: self.model(role)

    def identity(self, role: HelperRole) -> str:
        """What the role's model is, for keys of what it answered: weights or name, and the policy's adapter."""
        settings = self.experiment.models.settings(role)
        own = identity(settings) if settings is not None else ""
        if getattr(self.experiment.models, role) != "policy":
            return own
        return f"{own}+{self._policy[1] if self._policy else ''}"

    @property
    def embedding_folder(self) -> Path:
        """Folder of the model that embeds."""
        settings = self.experiment.models.settings("embedding")
        assert isinstance(settings, PolicySettings)
        return model_folder(settings)

    def elsewhere(self) -> Roles:
        """The same models for a part that works in a thread of its own: they are asked there, and answer in this loop."""
        return _Elsewhere(self)

    async def close(self) -> None:
        """Close what was opened; safe to call twice."""
        while self._open:
            await self._open.popitem()[1].close()


class _Elsewhere(Roles):
    """Roles as another thread sees them; whoever made them closes them."""

    def __init__(self, roles: Roles) -> None:
        self.experiment, self.ledger, self.memory = roles.experiment, roles.ledger, roles.memory
        self._roles = roles

    def model(self, role: HelperRole) -> LanguageModel:
        return _Asked(self._roles.model(role), self._roles._runner.get_loop())

    def identity(self, role: HelperRole) -> str:
        return self._roles.identity(role)

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run(work)

    async def close(self) -> None:
        """Nothing was opened here."""


class _Asked:
    """A model that answers in a loop of its own, whoever asks it."""

    def __init__(self, model: LanguageModel, loop: asyncio.AbstractEventLoop) -> None:
        self._model, self._loop = model, loop

    async def generate(self, request: Request) -> Completion:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(self._model.generate(request), self._loop))

    def release(self, session: str) -> None:
        self._loop.call_soon_threadsafe(self._model.release, session)

    async def close(self) -> None:
        """Whoever opened it closes it."""
