"""In what arms differ: found in the resolved experiments, also what nobody meant to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from studies import ARM, study, write

from evolve_dag.study.definition import Study, load_study
from evolve_dag.study.what_differs import Change, outline, what_differs

SHIPPED = Path(__file__).parents[2] / "configs/study.yaml"
MAIN = {"regime": {"preset": "off_policy", "rejection": False}}


def of(folder: Path, arms: dict[str, Any], **changes: Any) -> Study:
    """A study whose arms lie on a recipe that learns from failures too; ``cell.yaml`` extends it as a cell of the grid does."""
    write(folder)
    (folder / "arm.yaml").write_text(yaml.safe_dump(ARM | MAIN))
    (folder / "cell.yaml").write_text("extends: arm.yaml\ninjection: global\nregime: off_policy\n")
    path = folder / "own.yaml"
    path.write_text(yaml.safe_dump({"seeds": [4], "iterations": 1, "arms": arms, **changes}, sort_keys=False))
    return load_study(path)


def told(found: Study, arm: str) -> dict[str, tuple[Any, Any, str]]:
    return {c.key: (c.here, c.there, c.said) for c in what_differs(found) if c.arm == arm}


def test_a_preset_that_sets_back_what_the_recipe_chose_is_seen(tmp_path: Path) -> None:
    found = of(
        tmp_path, {"main": "arm.yaml", "cell": "cell.yaml", "matched": {"config": "arm.yaml", "set": {"injection": "global"}}}
    )
    assert told(found, "matched") == {"injection": ("global", "step_wise", "set")}
    assert told(found, "cell") == {
        "injection": ("global", "step_wise", "config"),
        "regime.rejection": (True, False, "preset"),
    }
    assert told(found, "main") == {}
    assert list(outline(found)) == [
        "cell against main: injection global (step_wise), regime.rejection true (false) by the regime's preset",
        "matched against main: injection global (step_wise)",
    ]


def test_what_the_reference_says_of_itself_is_not_said_of_the_arm(tmp_path: Path) -> None:
    arms = {
        "main": {"config": "arm.yaml", "set": {"distillation": {"epochs": 5}}},
        "matched": {"config": "arm.yaml", "set": {"injection": "global"}},
    }
    found = of(tmp_path, arms)
    assert told(found, "matched")["distillation.epochs"] == (2, 5, "")
    assert list(outline(found)) == ["matched against main: injection global (step_wise), distillation.epochs 2 (5) (NOT SAID)"]


def test_keys_that_decide_nothing_are_not_told(tmp_path: Path) -> None:
    """How fast it runs, what is scored besides, and settings of a part that neither side chose."""
    other = {
        "runtime": {"concurrency": 3},
        "evaluation": {"ceiling": True, "base_temperatures": [0.5], "greedy": False},
        "extraction": {"placebo": True},
        "selection": {"max_items": 2},
    }
    arms = {
        "main": {"config": "arm.yaml", "set": {"injection": "global", "evaluation": {"with_experience": False}}},
        "same": {"config": "arm.yaml", "set": {"injection": "global", **other}},
    }
    assert told(of(tmp_path, arms), "same") == {"extraction.placebo": (True, False, "set")}


def test_a_key_that_only_one_side_has(tmp_path: Path) -> None:
    chosen = {"config": "arm.yaml", "set": {"selection": {"selector": "embedding"}}}
    changes = told(of(tmp_path, {"main": "arm.yaml", "chosen": chosen}), "chosen")
    assert changes["selection.selector"] == ("embedding", "state", "set")


def test_settings_of_a_part_that_the_arm_names_are_said_with_it(tmp_path: Path) -> None:
    pool = tmp_path / "pool.json"
    pool.write_text('{"p1": "search first"}')
    chosen = {"config": "arm.yaml", "set": {"extraction": {"extractor": "given"}, "start_pool": str(pool)}}
    found = of(tmp_path, {"main": "arm.yaml", "chosen": chosen})
    changes = told(found, "chosen")
    assert changes["extraction.extractor"] == ("given", "contrast", "set")
    assert changes["extraction.min_lift"] == (None, 0.05, "part")
    assert not [key for key, (_, _, said) in changes.items() if not said]
    [line] = outline(found)
    assert "extraction.min_lift – (0.05) with that part" in line
    unsaid = of(tmp_path, {"chosen": chosen, "main": "arm.yaml"})  # the other way round the reference alone says it
    assert told(unsaid, "main")["extraction.min_lift"] == (0.05, None, "")


def test_arms_without_a_common_seed_differ_in_more_than_the_seed(tmp_path: Path) -> None:
    arms = {"main": "arm.yaml", "apart": {"config": "arm.yaml", "seeds": [9], "set": {"injection": "global"}}}
    assert set(told(of(tmp_path, arms), "apart")) == {"injection"}


def test_equal_arms(tmp_path: Path) -> None:
    found = study(tmp_path, arms={"a": "arm.yaml", "b": "arm.yaml"})
    assert what_differs(found) == []
    assert list(outline(found)) == ["b against a: nothing differs"]


def test_the_shipped_study_contrasts_what_differs_in_what_is_said() -> None:
    changes = what_differs(load_study(SHIPPED))
    by_pair: dict[tuple[str, str], list[Change]] = {}
    for change in changes:
        by_pair.setdefault((change.arm, change.reference), []).append(change)
    assert not [change for change in changes if not change.said]
    one = {pair: found[0].key for pair, found in by_pair.items() if len(found) == 1}
    assert one.items() >= {
        ("global", "pocket"): "injection",
        ("instance", "pocket"): "granularity",
        ("no-experience", "sft"): "injection",
        ("placebo", "no-check"): "extraction.placebo",
        ("lexical", "pocket"): "selection.selector",
        ("principle-step-wise-off", "pocket"): "regime.rejection",
        ("principle-global-off", "principle-step-wise-off"): "injection",
        ("instance-step-wise-off", "principle-step-wise-off"): "granularity",
    }.items()  # fmt: skip
    by_preset = {change.arm for change in changes if change.said == "preset"}
    assert all(arm.startswith(("principle-", "instance-")) for arm in by_preset), "cells of the paper's grid"
