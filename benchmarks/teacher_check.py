"""The check of the teacher over nights without a neural network: how many good items it withdraws, how many placebos, and what
becomes of the student.

    python benchmarks/teacher_check.py --seeds 1 2 3 4 --nights 6

The policy is the scripted one of nights.py; world, miner, selector and check are the real ones. The student acts on what it has
learned; the teacher on what stands in its context, and where nothing fits on what it has learned. A night's items are learned
as they are: this is about the check, not about distillation.
"""

from __future__ import annotations

import argparse
import asyncio
from collections.abc import Sequence
from dataclasses import dataclass, field
from random import Random

from nights import play

from evolve_dag.environments.pocket.script import FastSearch
from evolve_dag.environments.pocket.world import Question, World
from evolve_dag.experience.extraction.mining import ContrastExtraction, extract
from evolve_dag.experience.extraction.placebo import placebo
from evolve_dag.experience.injection import Injector
from evolve_dag.experience.pool import Pool, Proposal
from evolve_dag.experience.selection.state import StateSelector
from evolve_dag.experience.teacher_check import check_teacher, new_items
from evolve_dag.records import ExperienceItem, Trajectory
from evolve_dag.steps.policies import with_teacher_views

SETTINGS = ContrastExtraction(min_support=5, cap=24)


@dataclass
class Outcome:
    """What came of one lineage."""

    curve: list[float] = field(default_factory=list)
    """Success on 512 held-out questions after each night."""
    looked_at: int = 0
    """Items times nights."""
    withdrawn: int = 0
    refused: int = 0
    """Nights in which nothing was taught."""


def over(first: Pool, second: Pool) -> Pool:
    """The advice of ``first``, and of ``second`` about other situations."""
    said = [dict(item.condition) for item in first.items]
    return Pool((*first.items, *(renamed(i, n) for n, i in enumerate(second.items) if dict(i.condition) not in said)))


def renamed(item: ExperienceItem, number: int) -> ExperienceItem:
    return ExperienceItem(f"learned-{number}", item.text, item.granularity, item.condition)


def rolled(world: World, search: FastSearch, questions: Sequence[Question], pool: Pool, rng: Random) -> list[Trajectory]:
    """An episode for each question; the same question again is another rollout of its task."""
    tasks = {id(question): f"t{n}" for n, question in enumerate({id(q): q for q in questions}.values())}
    return [play(world, search, q, tasks[id(q)], n, pool, rng, 0.95) for n, q in enumerate(questions)]


def lineage(seed: int, nights: int, tasks: int, group: int, placebos: int | None, checked: bool) -> Outcome:
    """Nights of one seed; ``placebos``: night from which on what is new in the pool is a placebo of what was mined."""
    held_out, told = World(3000 + seed), Outcome()
    asked = [held_out.question(Random(f"{seed}/{n}")) for n in range(512)]
    searching, mined, shown, learned, evidence = FastSearch(held_out), Pool(), Pool(), Pool(), None
    for night in range(1, nights + 1):
        rng, world = Random(f"{seed}/{night}"), World(1000 + seed + 10_000 * night)
        search, questions = FastSearch(world), [world.question(rng) for _ in range(tasks)]
        student = rolled(world, search, questions * group, learned, rng)
        found = extract(student, mined, granularity="principle", settings=SETTINGS, iteration=night, seed=seed, before=evidence)
        mined, evidence = found.pool, found.evidence
        disguised = placebos is not None and night >= placebos
        last = placebo(mined, found.edits, student, before=shown, seed=seed) if disguised else found
        shown = last.pool
        if shown.active.items:
            teacher = rolled(world, search, questions * group, over(shown.active, learned), rng)
            source = Injector("step_wise", shown.active, StateSelector())
            sides = [asyncio.run(with_teacher_views(side, source, 64)) for side in (teacher, student)]
            check = check_teacher(shown.active, *sides, new=new_items(last.edits))
            told.looked_at += len(shown.active)
            told.withdrawn += len(check.withdrawn)
            told.refused += bool(check.refusal)
            taught = shown.active
            if checked:
                taught = Pool() if check.refusal else taught.without(check.withdrawn)
                gone = [Proposal("withdraw", item_id=item) for item in check.withdrawn]
                mined = mined.apply(gone, iteration=night).pool
            learned = over(taught, learned)
        right = [play(held_out, searching, q, "held-out", 0, learned, rng, 0.95).reward or 0.0 for q in asked]
        told.curve.append(sum(right) / len(right))
    return told


def main() -> None:
    """Print a line a seed and arm."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--nights", type=int, default=6)
    parser.add_argument("--tasks", type=int, default=64)
    parser.add_argument("--group", type=int, default=6)
    parser.add_argument("--placebos", type=int, default=1, help="night from which on new items are placebos")
    arguments = parser.parse_args()
    for seed in arguments.seeds:
        for placebos in (None, arguments.placebos):
            for checked in (False, True):
                told = lineage(seed, arguments.nights, arguments.tasks, arguments.group, placebos, checked)
                arm = f"placebos from night {placebos}" if placebos else "mined"
                print(
                    f"seed {seed}, {arm}, {'with' if checked else 'without'} the check: "
                    f"{told.withdrawn} of {told.looked_at} withdrawn, {told.refused} nights refused; "
                    + " ".join(f"{value:.1%}" for value in told.curve),
                    flush=True,
                )


if __name__ == "__main__":
    main()
