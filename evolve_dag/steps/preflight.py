"""What can be known to fail before anything is made: files with mistakes, a device or a program that is not there."""

from __future__ import annotations

from evolve_dag.config.schema import Experiment
from evolve_dag.errors import ModelError
from evolve_dag.inference.backends import check_device
from evolve_dag.steps.needs import absent_programs
from evolve_dag.store.artifacts import Store
from evolve_dag.tasks.streams import of_lineage
from evolve_dag.tasks.suites import check_files


def preflight(experiment: Experiment, iteration: int, store: Store) -> None:
    """Look at what an iteration will read and run on, so that nothing is stored of one that cannot come to its end.

    Raises:
        DataError: a file of tasks or pages is wrong, or two splits share a question.
        OrderError: the stream of tasks holds none for this iteration yet.
        ModelError: ``runtime.device`` cannot be used on this machine, or a program is not there.
    """
    check_files(of_lineage(experiment, iteration, store))
    check_device(experiment.runtime.device)
    if missing := absent_programs(experiment):
        raise ModelError("; ".join(missing), "install it (docs/production.md, On a GPU), or correct the key")
