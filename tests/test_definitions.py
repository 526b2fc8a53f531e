"""What Dagster loads: the asset graph as a snapshot, and the two settings files."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest
import yaml
from evolve_dag.assets import launch, partitions, settings

from evolve_dag.definitions import defs
from evolve_dag.steps import base

PROJECT = Path(__file__).parent.parent

GRAPH = {
    "policy": {"config/policy"},
    "trajectories": {"config/trajectories", "policy"},
    "experience": {"config/experience", "policy", "trajectories"},
    "contexts": {"config/contexts", "experience", "policy", "trajectories"},
    "adapter": {"config/adapter", "contexts", "experience", "policy"},
    "scores": {"adapter", "config/scores", "contexts", "experience", "policy"},
    "promotion": {"adapter", "config/promotion", "contexts", "experience", "policy", "scores"},
}
"""Asset -> what it depends on. Edit it by hand when the graph is meant to change."""


@pytest.fixture(scope="module")
def specs() -> dict[str, dg.AssetSpec]:
    """Every asset by its key."""
    return {spec.key.to_user_string(): spec for spec in defs.resolve_all_asset_specs()}


def test_definitions_load() -> None:
    dg.Definitions.validate_loadable(defs)


def test_the_graph_is_the_one_we_mean(specs: dict[str, dg.AssetSpec]) -> None:
    found = {key: {dep.asset_key.to_user_string() for dep in spec.deps} for key, spec in specs.items()}
    config = {f"config/{step}": set() for step in base.STEP_ORDER}
    assert found == {**GRAPH, **config}


@pytest.mark.parametrize(
    ("named", "owners"),
    [("", ("team:evolve-dag",)), (" , ", ("team:evolve-dag",)), ("team:a, b@c.org,", ("team:a", "b@c.org"))],
)
def test_owners_are_read_as_people_write_them(named: str, owners: tuple[str, ...]) -> None:
    assert settings._owners(named) == owners


def test_groups_partitions_and_versions(specs: dict[str, dg.AssetSpec]) -> None:
    for step in base.STEP_ORDER:
        assert specs[step].group_name == "loop"
        assert specs[step].partitions_def == partitions.loop
        assert specs[step].code_version == base.code_version(step)
        assert specs[step].description
        assert specs[step].kinds
        assert specs[step].owners == ["team:evolve-dag"]
        assert specs[f"config/{step}"].group_name == "config"
        assert specs[f"config/{step}"].partitions_def == partitions.experiments


def test_dependencies_are_what_the_steps_say_they_read(specs: dict[str, dg.AssetSpec]) -> None:
    for step, spec in base.SPECS.items():
        deps = {dep.asset_key.to_user_string() for dep in specs[step].deps}
        assert deps - {f"config/{step}"} == set(spec.inputs)


def test_keys_sort_as_numbers_do_and_lead_back() -> None:
    keys = [partitions.loop_key("pocket-s1.b", k) for k in (2, 10)]
    assert [str(key) for key in sorted(keys)] == ["pocket-s1.b|02", "pocket-s1.b|10"]
    assert [partitions.split(key) for key in keys] == [("pocket-s1.b", 2), ("pocket-s1.b", 10)]


def test_the_projects_instance_settings_are_those_of_the_package() -> None:
    content = yaml.safe_load((PROJECT / "dagster.yaml").read_text(encoding="utf-8"))
    assert content.pop("storage") == {"sqlite": {"base_dir": ".evolve/dagster"}}
    assert content == launch.INSTANCE


def test_the_workspace_names_the_definitions() -> None:
    [entry] = yaml.safe_load((PROJECT / "workspace.yaml").read_text(encoding="utf-8"))["load_from"]
    module = entry["python_module"]
    assert (module["module_name"], module["attribute"]) == ("evolve_dag.definitions", "defs")
