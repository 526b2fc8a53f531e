"""A night whose whole pool is one item of harmful advice, through the real steps; a script takes the place of the policy."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evolve_dag.config.schema import Experiment
from evolve_dag.experience.pool import Pool
from evolve_dag.records import ExperienceItem
from evolve_dag.steps.base import STEP_ORDER, entering_policy, run_step
from evolve_dag.store.artifacts import Store


def assert_refused(folder: Path, text: str, condition: Mapping[str, str], **experiment: Any) -> None:
    """The item is withdrawn, nothing is taught, and the student does not fall.

    Args:
        experiment: at least its environment, its tasks and how it injects.
    """
    item = ExperienceItem("p0001", text, "principle", dict(condition))
    (folder / "pool.json").write_text(Pool((item,)).to_json())
    shared = {
        "experiment": "harm",
        "start_pool": str(folder / "pool.json"),
        "extraction": {"extractor": "given"},
        "rollout": {"group_size": 2, "max_steps": 9},
        "evaluation": {"bootstrap": 200, "base_temperatures": [], "greedy": False},
        "runtime": {"threads": 1},
    }
    e, store = Experiment.model_validate(shared | experiment), Store(folder / "store")
    made = {step: run_step(step, e, 1, store).artifact for step in STEP_ORDER}
    told, scored = made["contexts"].summary, made["scores"].json("summary.json")
    assert (told["kept"], told["withdrawn"]) == (0, 1)
    assert told["not_taught"].startswith("the teacher with experience is below the student without it: -")
    assert made["adapter"].summary["unchanged"]
    assert entering_policy(e, 2, store).withdrawn == {"p0001"}
    assert scored["without"]["success"] == scored["base"]["success"] > 0
    assert "with" not in scored, "no item is left to stand in a context"
