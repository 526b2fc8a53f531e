"""In which order a study is worked off, and how long the rest will take.

A *unit* is one iteration of one cell. Units that would make the same artifact are not worked on side by side while there is
anything else to do: the store would let the second wait for the first. (It would still be made once: artifacts are locked.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from evolve_dag.steps import base
from evolve_dag.store.artifacts import Store
from evolve_dag.study.definition import Cell, Study


class Unit(NamedTuple):
    """One iteration of one cell."""

    cell: Cell
    iteration: int


@dataclass(slots=True)
class Pace:
    """Seconds that a step took so far, by arm."""

    seen: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    """(arm, step) -> seconds of every artifact that was made."""

    def observe(self, arm: str, step: str, seconds: float) -> None:
        self.seen.setdefault((arm, step), []).append(seconds)

    def expected(self, arm: str, step: str) -> float | None:
        """Mean of the arm, else of the arms that have made one; None when nobody has."""
        own = self.seen.get((arm, step))
        others = own or [seconds for (_, name), known in self.seen.items() if name == step for seconds in known]
        return fmean(others) if others else None


class Agenda:
    """What is left, what is going on, and what is next.

    Args:
        done: cell's name -> its leading iterations that are up to date; none where it has no entry.
    """

    def __init__(self, study: Study, store: Store, done: Mapping[str, int]) -> None:
        self._store = store
        self._cells = study.cells
        self._seeds = {seed: place for place, seed in enumerate(dict.fromkeys(cell.seed for cell in study.cells))}
        self._next = {cell.name: done.get(cell.name, 0) + 1 for cell in study.cells}
        self._going_on: dict[str, Unit] = {}
        self._digests: dict[str, Mapping[str, str | None]] = {}
        """Cell's name -> digests of its next iteration."""
        self.failed: dict[str, str] = {}
        """Cell's name -> why its next iteration could not be made."""
        self.pace = Pace()

    @property
    def total(self) -> int:
        """Iterations of all cells."""
        return sum(cell.iterations for cell in self._cells)

    @property
    def done(self) -> int:
        """Iterations that are up to date."""
        return sum(min(self._next[cell.name] - 1, cell.iterations) for cell in self._cells)

    @property
    def unfinished(self) -> int:
        """Cells that have something left."""
        return sum(self._next[cell.name] <= cell.iterations for cell in self._cells)

    def take(self) -> Unit | None:
        """The unit to begin now; None while every cell that has something left is being worked on.

        Seed by seed, iteration by iteration, so that a study that is stopped has whole seeds to compare.
        """
        busy = self.failed.keys() | self._going_on.keys()
        free = [
            Unit(cell, self._next[cell.name])
            for cell in self._cells
            if cell.name not in busy and self._next[cell.name] <= cell.iterations
        ]
        free.sort(key=lambda unit: (self._seeds[unit.cell.seed], unit.iteration))
        taken = set().union(*(self._costly(unit) for unit in self._going_on.values()))
        alone = (unit for unit in free if not taken & self._costly(unit))
        unit = next(alone, free[0] if free else None)
        if unit is not None:
            self._going_on[unit.cell.name] = unit
        return unit

    def finish(self, unit: Unit, made: Mapping[str, float], failure: str | None = None) -> None:
        """Record what became of a unit.

        Args:
            made: step -> seconds, of the artifacts that it made.
            failure: why it could not be finished; the rest of its cell is then left undone.
        """
        name = unit.cell.name
        del self._going_on[name]
        for step, seconds in made.items():
            self.pace.observe(unit.cell.arm, step, seconds)
        if failure is not None:
            self.failed[name] = failure
            return
        self._next[name] += 1
        self._digests.pop(name, None)

    def seconds_left(self, processes: int) -> float | None:
        """What is left at the pace so far, shared by ``processes``; None while a step of it was never timed."""
        by_cell = [self._cell_seconds(cell) for cell in self._cells if cell.name not in self.failed]
        known = [seconds for seconds in by_cell if seconds is not None]
        if len(known) < len(by_cell):
            return None
        return max([sum(known) / processes, *known])  # the iterations of one cell follow one another

    def _cell_seconds(self, cell: Cell) -> float | None:
        total = 0.0
        for k in range(self._next[cell.name], cell.iterations + 1):
            for step in self._to_make(Unit(cell, k)):
                seconds = self.pace.expected(cell.arm, step)
                if seconds is None:
                    return None
                total += seconds
        return total

    def _costly(self, unit: Unit) -> set[str | None]:
        """Digests of what the unit has to make, without the policy: it is a reference, and all cells begin with the same."""
        return {digest for step, digest in self._to_make(unit).items() if step != "policy"}

    def _to_make(self, unit: Unit) -> dict[str, str | None]:
        """Step -> digest of what the unit has to make; None is a digest that the iteration before decides."""
        name = unit.cell.name
        if unit.iteration != self._next[name]:
            return dict.fromkeys(base.STEP_ORDER)
        if name not in self._digests:
            resolved = base.resolve_iteration(unit.cell.experiment, unit.iteration, self._store)
            self._digests[name] = {step: found.digest for step, found in resolved.items()}
        missing = self._digests[name].items()
        return {step: digest for step, digest in missing if digest is None or not self._store.exists(step, digest)}
