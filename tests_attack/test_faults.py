"""A fault of any kind in any step of the command ends with a message, and the next run goes on and ends the same."""

from __future__ import annotations

from pathlib import Path

from conftest import Calm
from forks import Forks
from instruments import FAULTS
from world import NAME, store_differences

from evolve_dag.steps.base import STEP_ORDER
from evolve_dag.store.artifacts import Store

INTERRUPTED = 130


def test_a_fault_in_every_step(forks: Forks, calm: Calm, tmp_path: Path) -> None:
    """One store for all of them: what a fault leaves behind is what the next one meets."""
    store, draws = tmp_path / "store", tmp_path / "draws"
    command = ("run", f"{NAME}.yaml", "--store", str(store))
    found = []
    for step in STEP_ORDER:
        for where in ("before", "after"):
            for fault in FAULTS:
                said = forks.run(*command, folder=calm.folder, instruments={"fault": (step, where, fault), "draws": str(draws)})
                told = ["nothing failed"] if said.code == 0 else said.complaints
                if fault == "Ctrl-C":
                    told = [] if said.code == INTERRUPTED and "Traceback" not in said.err else [f"Ctrl-C: {said.code}"]
                found += [f"{fault} {where} {step}: {one}\n{said.err[-600:]}" for one in told]
                if Store(store).ref(NAME, 1, step) is not None:
                    found.append(f"{fault} {where} {step}: it is published all the same")
    assert not found, "\n".join(found)
    said = forks.run(*command, folder=calm.folder, instruments={"draws": str(draws)})
    assert (said.code, said.complaints) == (0, []), said.err
    assert store_differences(calm.store, store) == []
    drawn = draws.read_text().splitlines()
    assert sorted(drawn) == sorted(calm.draws), "no rollout twice: a fault after the work leaves the journals"
