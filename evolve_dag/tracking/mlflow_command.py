"""``evolve sync-mlflow``: names from experiment files, a progress bar, and what came in the background meanwhile."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from evolve_dag.config import registry
from evolve_dag.errors import ConfigError
from evolve_dag.tracking.mlflow_sync import Sent, known, serve_requests, sync

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as Bars

    from evolve_dag.store.artifacts import Store


def sync_with_bar(store: Store, configs: Sequence[str] | None, *, again: bool, console: Console) -> Sent:
    """What the command does.

    Args:
        configs: experiment files, or names under which the store knows experiments; None: all of them.

    Raises:
        ConfigError: a name is neither.
        TrackingError: MLflow is down or refuses; nothing is lost.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    names = None if configs is None else [_name(store, config) for config in configs]
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        sent = sync(store, names, again=again, progress=_Bar(bars))
    serve_requests(store.root)
    return sent


def _name(store: Store, config: str) -> str:
    there = known(store)
    if config in there and not registry.is_file(config):
        return config
    if not registry.is_file(config):
        raise ConfigError(
            f"{config}: neither an experiment file nor an experiment of {store.root} (it holds {', '.join(there) or 'none'})",
            "name one of these, or the file",
        )
    return registry.load_seeded(Path(config)).experiment


class _Bar:
    """Progress as one bar of rich."""

    def __init__(self, bars: Bars) -> None:
        self._bars = bars
        self._task = bars.add_task("MLflow", total=None)

    def start(self, label: str, total: int) -> None:
        self._bars.reset(self._task, description=label, total=total)

    def advance(self, n: int = 1) -> None:
        self._bars.advance(self._task, n)

    def finish(self) -> None:
        self._bars.reset(self._task, description="MLflow", total=None)
