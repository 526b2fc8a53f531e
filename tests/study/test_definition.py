"""Study files: cells, worlds by seed, and every mistake at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from studies import study, write

from evolve_dag.config.loading import load_experiment
from evolve_dag.environments.pocket.tools import STREAM_WORLDS
from evolve_dag.errors import ConfigError
from evolve_dag.study import files
from evolve_dag.study.definition import Choice, load_study

WORLDS = (("development", 200), ("held_out", 300))


def mistakes(path: Path, choice: Choice | None = None) -> str:
    with pytest.raises(ConfigError) as caught:
        load_study(path, choice)
    return caught.value.what


def test_a_cell_is_an_experiment_with_the_worlds_of_its_seed(tmp_path: Path) -> None:
    found = study(tmp_path, held_out=9, threads=3)
    assert [cell.name for cell in found.cells] == [
        "tiny.plain-s4", "tiny.greedy-s4", "tiny.plain-s5", "tiny.greedy-s5",
    ]  # fmt: skip
    e = found.cells[3].experiment
    tasks = e.tasks
    assert (tasks.train.world, tasks.development.world, tasks.held_out.world) == (1005, 2005, 3005)
    assert (tasks.train.count, tasks.held_out.count, tasks.train.stream) == (12, 9, True)
    assert (e.seed, e.iterations, e.rollout.temperature, e.runtime.threads) == (5, 2, 0.0, 3)
    assert found.reference == "plain"


def test_a_text_that_looks_like_a_number_is_text_in_the_file_of_a_cell_too(tmp_path: Path) -> None:
    path = write(tmp_path, arms={"plain": {"config": "arm.yaml", "set": {"description": "3e-4"}}})
    path.write_text(path.read_text().replace("3e-4", "'3e-4'"))
    found = load_study(path)
    files.write(tmp_path / "store", found)
    assert load_experiment(files.cell_file(tmp_path / "store", found, found.cells[0])) == found.cells[0].experiment


def test_worlds_of_a_stream_lie_below_the_next_ones(tmp_path: Path) -> None:
    study(tmp_path, seeds=[STREAM_WORLDS - 3001])
    assert "number the worlds of all splits below" in mistakes(write(tmp_path, seeds=[STREAM_WORLDS - 3000]))


def test_worlds_of_another_environment_go_on_from_its_file(tmp_path: Path) -> None:
    """Files of tasks are the same for every seed."""
    split = {"count": 4, "world": 100, "stream": True}
    games = {
        "environment": {"kind": "textworld"},
        "tasks": {"train": split, **{n: {"count": 4, "world": w} for n, w in WORLDS}},
    }
    (tmp_path / "games.yaml").write_text(yaml.safe_dump(games))
    for seed, cell in zip((4, 5), study(tmp_path, arms={"a": "games.yaml"}).cells, strict=True):
        tasks = cell.experiment.tasks
        assert [one.world for one in tasks.splits.values()] == [100 + seed, 200 + seed, 300 + seed]


def test_whether_seeds_are_asked_the_same_tasks(tmp_path: Path) -> None:
    of_a_file = {"a": str(Path(__file__).parents[2] / "configs" / "own_corpus.yaml")}
    assert study(tmp_path, arms=of_a_file).same_tasks
    assert not study(tmp_path, arms=of_a_file, seeds=[4]).same_tasks, "one seed shares with nobody"
    assert not study(tmp_path).same_tasks, "worlds by seed"


def test_arms_are_asked_the_same_tasks(tmp_path: Path) -> None:
    arms = {"a": "arm.yaml", "b": "arm.yaml", "c": {"config": "arm.yaml", "set": {"environment": {"results": 2}}}}
    told = mistakes(write(tmp_path, arms=arms))
    assert told.count("arms.c: environment: asks otherwise than in arm a") == 1, "once, not for every seed"
    assert "arms.b" not in told


def test_arms_may_have_seeds_and_iterations_of_their_own(tmp_path: Path) -> None:
    arms = {"short": {"config": "arm.yaml", "seeds": [5], "iterations": 1}, "long": "arm.yaml"}
    found = study(tmp_path, arms=arms, iterations=3)
    assert [(cell.arm, cell.seed, cell.iterations) for cell in found.cells] == [
        ("short", 5, 1), ("long", 5, 3), ("long", 4, 3),
    ]  # fmt: skip


def test_keys_of_the_study_lie_over_the_file_and_those_of_the_arm_over_both(tmp_path: Path) -> None:
    arms = {"a": "arm.yaml", "b": {"config": "arm.yaml", "set": {"distillation": {"epochs": 5}}}}
    a, b = study(tmp_path, seeds=[1], arms=arms, set={"distillation": {"epochs": 3, "rank": 4}}).cells
    assert (a.experiment.distillation.epochs, a.experiment.distillation.rank) == (3, 4)
    assert (b.experiment.distillation.epochs, b.experiment.distillation.rank) == (5, 4)


def test_the_command_line_takes_a_part(tmp_path: Path) -> None:
    found = study(tmp_path, Choice(arms=("greedy",), seeds=(7, 5), iterations=4, held_out=3, processes=9))
    assert [(cell.name, cell.iterations) for cell in found.cells] == [("tiny.greedy-s7", 4), ("tiny.greedy-s5", 4)]
    assert found.cells[0].experiment.tasks.held_out.count == 3
    assert (found.settings.processes, found.reference, found.leading) == (9, "", "greedy")


def test_a_part_says_so_and_how_it_was_asked_for(tmp_path: Path) -> None:
    whole = study(tmp_path, held_out=6)
    assert (whole.part, whole.command) == (None, "evolve study tiny.yaml")
    same = Choice(("greedy", "plain"), (5, 4), 2, held_out=6, processes=1)
    assert study(tmp_path, same, held_out=6).command == "evolve study tiny.yaml"
    found = study(tmp_path, Choice(("greedy",), (4, 9), 1, held_out=3))
    assert found.part is not None
    assert found.command == "evolve study tiny.yaml --arm greedy --seed 4 --seed 9 --iterations 1 --held-out 3"


@pytest.mark.parametrize("stated", ["plain", None])
def test_no_arm_takes_the_place_of_a_reference_that_is_not_there(tmp_path: Path, stated: str | None) -> None:
    arms = {
        name: {"config": "arm.yaml", "set": {"gate": {"confidence": c}}} for name, c in (("plain", 0.9), ("b", 0.8), ("c", 0.7))
    }
    found = study(tmp_path, Choice(("b", "c")), arms=arms, reference=stated)
    assert (found.reference, found.leading, found.arms) == ("", "b", ("b", "c"))
    assert found.references("c") == ()
    assert study(tmp_path, Choice(("c", "plain")), arms=arms, reference=stated).references("c") == ("plain",)


def test_every_mistake_of_the_study_and_its_arms_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("distillation: {epochs: none}\ngranularity: both\n")
    arms = {
        "plain": {"config": "arm.yaml", "set": {"distilation": {"epochs": 1}, "seed": 4, "tasks": {"train": {"world": 3}}}},
        "gone": "gone.yaml",
        "bad": {"config": "bad.yaml", "seeds": [5, 5]},
        "none": {"config": "arm.yaml", "seeds": []},
    }
    told = mistakes(write(tmp_path, arms=arms, seeds=[4, 4], reference="plane", paper={"on_policy": "unknown"}))
    for expected in (
        "seeds: 4 stands twice",
        "arms.bad.seeds: 5 stands twice",
        "arms.none.seeds: none",
        "reference: no arm 'plane'",
        "paper.on_policy: no arm 'unknown'",
        "arms.plain.set.seed: the study says it itself: `seeds`",
        "arms.plain.set.tasks.train.world: the study says it itself: `worlds`",
        "did you mean 'distillation'?",
        "gone.yaml: no such file",
        "bad.yaml: distillation.epochs",
        "bad.yaml: granularity",
    ):
        assert expected in told, expected
    assert told.count("distilation") == 1, "a mistake that all seeds share is told once"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seeds": []}, "seeds"),
        ({"seeds": None}, "seeds: missing"),
        ({"seeds": [-1]}, "seeds"),
        ({"seeds": ["4"]}, "seeds"),
        ({"arms": {}}, "arms"),
        ({"arms": ["pocket.yaml"]}, "arms"),
        ({"arms": {"No": "arm.yaml"}}, "arms.No"),
        ({"arms": {"a": {"konfig": "arm.yaml"}}}, "arms.a.konfig: unknown key"),
        ({"iterations": 0}, "iterations"),
        ({"process": 3}, "did you mean 'processes'"),
        ({"study": "UPPER"}, "study"),
        ({"arms": {"a" * 60: "arm.yaml"}}, "experiment"),
    ],
)
def test_wrong_keys_are_named(tmp_path: Path, changes: dict, expected: str) -> None:
    assert expected in mistakes(write(tmp_path, **changes))


def test_an_arm_names_what_it_is_matched_to(tmp_path: Path) -> None:
    arms = {
        "plain": "arm.yaml",
        "other": "arm.yaml",
        "one": {"config": "arm.yaml", "reference": "other"},
        "two": {"config": "arm.yaml", "reference": ["one", "plain"]},
    }
    found = study(tmp_path, arms=arms)
    assert {arm: found.references(arm) for arm in found.arms} == {
        "plain": (), "other": ("plain",), "one": ("other",), "two": ("one", "plain"),
    }  # fmt: skip
    part = study(tmp_path, Choice(arms=("plain", "one", "two")), arms=arms)
    assert part.references("one") == (), "better no contrast than one with an arm that it is not matched to"
    assert part.references("two") == ("one", "plain")


def test_a_reference_must_be_an_arm_and_those_of_the_paper_matched(tmp_path: Path) -> None:
    arms = {"plain": "arm.yaml", "cell": "arm.yaml", "lost": {"config": "arm.yaml", "reference": ["plain", "gone"]}}
    told = mistakes(write(tmp_path, arms=arms, paper={"step_wise": "cell", "instance": "lost", "on_policy": "plain"}))
    assert "arms.lost.reference: no arm 'gone'" in told
    assert "paper.instance: 'lost' is matched to another arm than paper.step_wise, 'cell'" in told
    assert "paper.on_policy: 'plain' is matched to another arm" in told
    arms["lost"] = {"config": "arm.yaml", "reference": ["plain", "cell"]}
    study(tmp_path, arms=arms, paper={"step_wise": "cell", "instance": "lost"})


def test_an_experiment_is_no_study(tmp_path: Path) -> None:
    write(tmp_path)
    with pytest.raises(ConfigError, match=r"arm\.yaml: is no study") as caught:
        load_study(tmp_path / "arm.yaml")
    assert "evolve run" in caught.value.remedy


def test_what_the_command_line_asks_for_must_be_there(tmp_path: Path) -> None:
    told = mistakes(write(tmp_path), Choice(arms=("nobody",), seeds=(1, 1)))
    assert "--arm nobody: no such arm: plain, greedy" in told
    assert "--seed 1 stands twice" in told


def test_paths_in_a_study_are_relative_to_the_study(tmp_path: Path) -> None:
    (tmp_path / "below").mkdir()
    (tmp_path / "below/arm.yaml").write_text("start_pool: own.json\n")
    own, laid = study(
        tmp_path, seeds=[1], arms={"own": "below/arm.yaml", "laid": {"config": "arm.yaml", "set": {"start_pool": "pool.json"}}}
    ).cells
    assert own.experiment.start_pool == str(tmp_path / "below/own.json")
    assert laid.experiment.start_pool == str(tmp_path / "pool.json")


def test_the_shipped_studies_load_and_open_with_their_purpose() -> None:
    for path in sorted((Path(__file__).parents[2] / "configs").glob("study*.yaml")):
        found = load_study(path)
        assert f"evolve study configs/{path.name}" in path.read_text()
        assert len(found.arms) > 1
        assert set(yaml.safe_load(path.read_text())["arms"]) == set(found.arms)
        assert all(load_experiment(path.parent / arm.config) for arm in found.settings.arms.values())
