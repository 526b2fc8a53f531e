"""Who is asked what, under which draws. A policy is the digest of its adapter here, and its rollouts say who made them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import Any

import pytest

from evolve_dag.config.schema import Experiment
from evolve_dag.errors import AwayError, StoreError
from evolve_dag.experience.pool import Pool
from evolve_dag.records import PolicyRef, Standing, Task, Trajectory
from evolve_dag.steps import scores
from evolve_dag.steps.policies import Rollouts
from evolve_dag.store.artifacts import Store
from evolve_dag.store.frames import scores_from_frame
from evolve_dag.store.layout import SCORES

TASKS = {name: (Task(f"{name}0", "Who?", "Rato"), Task(f"{name}1", "Who?", "Miku")) for name in ("held_out", "development")}


@dataclass
class Asked:
    """What was rolled out: (adapter, label) -> seed."""

    seeds: dict[tuple[str | None, str], int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    opened: list[str | None] = field(default_factory=list)
    journals: dict[str, set[str | None]] = field(default_factory=dict)

    def of(self, adapter: str | None) -> set[str]:
        return {label for policy, label in self.seeds if policy == adapter}


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    found = Asked()

    @contextmanager
    def open_policy(store: Store, adapter: str | None, roles: object) -> Iterator[str | None]:
        found.opened.append(adapter)
        yield adapter

    def roll_out_together(context: Any, wanted: list[Rollouts], model: str | None) -> list[list[Trajectory]]:
        found.seeds.update({(model, one.label): one.seed for one in wanted})
        found.sizes |= {one.label: one.group_size for one in wanted}
        for one in wanted:
            found.journals.setdefault(one.label, set()).add(one.journal)
        return [
            [Trajectory(f"{t.id}#0", t.id, 0, one.seed, "s", t.question, (), "answered", model, 1.0) for t in one.split.tasks]
            for one in wanted
        ]

    def adapter_folder(store: Store, digest: str | None) -> Path | None:
        if digest == "gone":
            raise StoreError("gone", "none")
        if digest == "away":
            raise AwayError("the mirror cannot be read", "mend the connection")
        return None

    monkeypatch.setattr(scores, "open_policy", open_policy)
    monkeypatch.setattr(scores, "roll_out_together", roll_out_together)
    monkeypatch.setattr(scores, "adapter_folder", adapter_folder)
    monkeypatch.setattr(scores, "load_split", lambda experiment, name, roles: SimpleNamespace(tasks=TASKS[name]))
    monkeypatch.setattr(scores, "checked_pool", lambda context: Pool())
    return found


def run(
    tmp_path: Path,
    *,
    iteration: int = 5,
    champion: str | None = "champion",
    best: str | None = "best",
    settings: Mapping[str, Any] = MappingProxyType({}),
    **adapter: object,
) -> tuple[dict[str, Any], Path]:
    """What was noted, and where the scores are."""
    noted: dict[str, Any] = {}
    folder = tmp_path / f"{iteration}-{best}"
    folder.mkdir()
    standing = Standing(champion=4 if champion else 0, best=(4 if best == champion else 2) if best else 0, adapter=best)
    context = SimpleNamespace(
        experiment=Experiment.model_validate({"experiment": "quick", "evaluation": {"base_temperatures": []}, **settings}),
        iteration=iteration,
        store=Store(tmp_path / "store"),
        inputs={"experience": None, "adapter": SimpleNamespace(digest="candidate", summary=adapter)},
        build=SimpleNamespace(path=folder, note=lambda **facts: noted.update(facts)),
        entering=PolicyRef(iteration, "base", champion, None, standing=standing),
        roles=None,
        twin=None,
    )
    scores.run(context)  # type: ignore[arg-type]
    return noted, folder


HELD_OUT = {"without", "greedy"}


def test_the_first_candidate_is_compared_with_the_base_policy(tmp_path: Path, asked: Asked) -> None:
    noted, _ = run(tmp_path, iteration=1, champion=None, best=None)
    assert asked.of(None) == {"base", "development best"}
    assert asked.of("candidate") == {*HELD_OUT, "development candidate"}
    assert noted[scores.AGAINST] == 0


@pytest.mark.parametrize(("temperature", "times"), [(0.0, 1), (0.7, 3)])
def test_what_is_alike_each_time_is_played_once(tmp_path: Path, asked: Asked, temperature: float, times: int) -> None:
    evaluation = {"base_temperatures": [], "rollouts": 3}
    run(tmp_path, settings={"rollout": {"temperature": temperature}, "evaluation": evaluation})
    assert (asked.sizes["without"], asked.sizes["greedy"]) == (times, 1)


def test_a_champion_that_is_the_best_is_opened_once(tmp_path: Path, asked: Asked) -> None:
    noted, _ = run(tmp_path, best="champion")
    assert asked.opened == ["champion", "candidate"]
    assert asked.of("champion") == {"development best"}
    assert noted[scores.AGAINST] == 4


def test_a_champion_that_is_not_the_best_is_compared_with_as_well(tmp_path: Path, asked: Asked) -> None:
    noted, _ = run(tmp_path)
    assert asked.opened == ["best", "candidate", "champion"]
    assert asked.of("best") == {"development best"}
    assert asked.of("champion") == {"development champion"}
    assert noted[scores.AGAINST] == 2


def test_in_place_of_a_best_that_is_gone_the_champion_is_scored(tmp_path: Path, asked: Asked) -> None:
    noted, _ = run(tmp_path, best="gone")
    assert asked.of("champion") == {"development best"}
    assert noted[scores.AGAINST] == 4


def test_a_best_that_cannot_be_looked_at_now_is_not_gone(tmp_path: Path, asked: Asked) -> None:
    with pytest.raises(AwayError):
        run(tmp_path, best="away")
    assert asked.opened == []


def test_a_journal_says_whose_episodes_it_holds(tmp_path: Path, asked: Asked) -> None:
    """A step that was killed may go on when another policy is the best."""
    run(tmp_path)
    run(tmp_path, best="gone")
    assert len(asked.journals["development best"]) == 2


def test_both_sides_of_a_night_share_their_draws_and_no_night_repeats_them(tmp_path: Path, asked: Asked) -> None:
    run(tmp_path, iteration=5)
    night = {asked.seeds[one, f"development {one}"] for one in ("best", "candidate", "champion")}
    held_out = asked.seeds["candidate", "without"]
    run(tmp_path, iteration=6)
    assert len(night) == 1
    assert asked.seeds["best", "development best"] not in night
    assert asked.seeds["candidate", "without"] == held_out, "held-out tasks are the same measure every night"


@pytest.mark.parametrize(("best", "opened"), [("champion", ["champion"]), ("best", ["best", "champion"])])
def test_a_candidate_that_was_not_trained_is_the_policy_that_entered(
    tmp_path: Path, asked: Asked, best: str, opened: list[str]
) -> None:
    _, folder = run(tmp_path, best=best, unchanged=True)
    assert asked.opened == opened, "the same weights are asked everything at once"
    assert asked.of("champion") >= {*HELD_OUT, "development candidate"}
    import polars as pl

    sides = [s for s in scores_from_frame(pl.read_parquet(folder / SCORES)) if s.condition in scores.DEVELOPMENT]
    assert sorted((s.condition, s.task_id) for s in sides) == [
        (condition, task.id) for condition in (scores.OF_BEST, scores.OF_CANDIDATE) for task in TASKS["development"]
    ], "it is the champion: there is nothing to compare it with"
