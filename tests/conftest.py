"""For every test: no time limits of hypothesis (machines are shared), one thread, no network."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from evolve_dag.store.artifacts import Store

sys.path.insert(0, str(Path(__file__).resolve().parent / "servers"))  # test servers: misbehaving, acting
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("EVOLVE_TRACKING", "off")  # no process in the background that sends to MLflow
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("long", settings.get_profile("shared"), max_examples=10_000)  # --hypothesis-profile long
settings.load_profile("shared")
os.fsync = lambda descriptor: None  # no power cut here, and thousands of waits for the disk
os.environ.pop("EVOLVE_MIRROR", None)  # a developer's own object storage gets no test artifacts


@pytest.fixture(scope="session")
def small_lineage(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with one iteration of :data:`small_lineage.SMALL`; not to be changed (:func:`small_lineage.copy_of`)."""
    from filelock import FileLock
    from small_lineage import iterate, small

    from evolve_dag.store.artifacts import Store

    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "small"  # one process makes it for all
    with FileLock(f"{shared}.lock"):
        return iterate(Store(shared), small())
