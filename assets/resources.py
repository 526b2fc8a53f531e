"""What the assets need from outside: the store, and the session that a run belongs to."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import dagster as dg

from evolve_dag.config import registry
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import EvolveError
from evolve_dag.secrecy import describe_error, masker
from evolve_dag.steps.base import StepOutcome
from evolve_dag.steps.body import Progress
from evolve_dag.store.artifacts import Store
from evolve_dag.store.faults import chain
from evolve_dag.store.mirror import open_store


class StoreResource(dg.ConfigurableResource):
    """The content-addressed store."""

    root: str = ""
    """Folder; empty: ``EVOLVE_STORE``, else ``.evolve`` in the working folder."""

    @property
    def path(self) -> Path:
        """The folder as a path."""
        return Path(self.root) if self.root else registry.default_store()

    def open(self) -> Store:
        """The store itself."""
        return open_store(self.path)


class Session:
    """Who runs the steps. This one serves a run that Dagster started: the web interface, a schedule, a sensor.

    The command line replaces it with one that holds the experiment's lock for the whole command, keeps the
    experiment as it was when the command started, and shows progress.
    """

    def experiment(self, root: Path, name: str) -> Experiment:
        """The experiment behind a partition key."""
        return registry.load(root, name)

    def lock(self, store: Store, name: str) -> AbstractContextManager[object]:
        """Held around a step, so that two runs cannot work on one experiment at once."""
        return store.lock(name)

    @contextmanager
    def step(self, name: str, iteration: int) -> Iterator[Progress | None]:
        """Around the body of a step; yields where it reports progress, if anywhere."""
        yield None

    def finished(self, name: str, iteration: int, outcome: StepOutcome) -> None:
        """After a step is committed."""


SessionParam = dg.ResourceParam[Session]
"""How an asset asks for the session."""


PASSING = "passing"
"""Metadata of a failure: whether the next night may try again by itself."""


@contextmanager
def failures() -> Iterator[None]:
    """Turns evolve-dag's own errors into a Dagster failure with the message and its remedy, never retried.

    The only place that does so. Other exceptions are bugs and keep their traceback. Dagster writes what is raised into its
    database, with all that led to it: where a secret stands in one of those messages, the masked message goes on alone.
    """
    try:
        yield
    except EvolveError as error:
        origin = None if _tells_a_secret(error) else error
        raise dg.Failure(masker()(str(error)), metadata={PASSING: error.passing}, allow_retries=False) from origin
    except Exception as error:
        if _tells_a_secret(error):
            raise RuntimeError(describe_error(error)) from None
        raise


def _tells_a_secret(error: BaseException) -> bool:
    mask = masker()
    return any(mask(str(one)) != str(one) for one in chain(error))
