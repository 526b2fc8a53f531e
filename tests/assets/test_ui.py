"""``evolve ui`` before anything is started; what it starts is tested in tests_ui."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evolve_dag.assets import ui

from evolve_dag.errors import ConcurrencyError
from evolve_dag.lineage import garbage
from evolve_dag.store.artifacts import Store


def test_a_store_has_one_interface_whatever_the_ports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two Dagster daemons on one store would each make the ticks of its schedules."""
    served: list[int] = []

    def busy(services: Any, *_: Any) -> None:
        served.append(len(services))
        with pytest.raises(ConcurrencyError, match="another `evolve ui` serves") as told:
            ui.serve(tmp_path, 3911, 3912, mlflow=False)
        assert "end it first" in told.value.remedy
        assert garbage.find(Store(tmp_path)).busy == (), "to look at runs is not to work on them"

    monkeypatch.setattr(ui, "supervise", busy)
    for port in (3913, 3914):
        ui.serve(tmp_path, port, port + 10, mlflow=False)
    assert served == [1, 1]
