"""Lineage over a store of two iterations made by hand, as the steps lay it down."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from rich.console import Console
from small_lineage import copy_of

from evolve_dag.cli import main
from evolve_dag.errors import DataError
from evolve_dag.lineage.trace import SHOWN, Trace, TraceNode, _Walk, deep, render, trace
from evolve_dag.records import ExperienceItem, PoolEdit, Score, Step, ToolCall, Trajectory
from evolve_dag.steps.base import STEP_ORDER
from evolve_dag.store import frames
from evolve_dag.store.artifacts import Artifact, Store
from evolve_dag.store.layout import EDITS, ITEMS, SCORES, STEPS, TRAJECTORIES


def make(store: Store, kind: str, tables: dict[str, pl.DataFrame], config: dict[str, Any], **inputs: Artifact) -> Artifact:
    digests = {name: artifact.digest for name, artifact in inputs.items()}
    digest = Store.digest_of(kind, "1", config, digests)
    with store.build(kind, digest, code_version="1", config=config, inputs=digests) as build:
        for name, table in tables.items():
            table.write_parquet(build.path / name)
    assert build.artifact is not None
    return build.artifact


def trajectory(task: str, rollout: int, reward: float | None, selected: tuple[str, ...] = ()) -> Trajectory:
    steps = (
        Step(0, "look", (1,), (-0.5,), ToolCall("search", {"query": "x"}), observation="no results", selected=selected),
        Step(1, "done", (2,), (-0.5,), answer="Rato"),
    )
    return Trajectory(f"{task}#{rollout}", task, rollout, 7, "s", "q", steps, "answered", "Rato", reward)


def both(trajectories: list[Trajectory]) -> dict[str, pl.DataFrame]:
    rows, steps = frames.trajectories_to_frames(trajectories)
    return {TRAJECTORIES: rows, STEPS: steps}


def pool(items: list[ExperienceItem], edits: list[PoolEdit]) -> dict[str, pl.DataFrame]:
    return {ITEMS: frames.items_to_frame(items), EDITS: frames.edits_to_frame(edits)}


def contexts(trajectories: list[Trajectory]) -> dict[str, pl.DataFrame]:
    steps = [(t.id, step) for t in trajectories for step in t.steps]
    table = pl.DataFrame(
        {
            "trajectory_id": [id for id, _ in steps],
            "step": pl.Series([step.index for _, step in steps], dtype=pl.Int32),
            "selected": pl.Series([list(step.selected) for _, step in steps], dtype=pl.List(pl.String)),
        }
    )
    return {**both(trajectories), "contexts.parquet": table}


TEXT = "Look: when lost, [bold]search[/bold]."
TAUGHT = ("a#0", *(f"a#{n}" for n in range(1, SHOWN + 2)))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, dict[str, Artifact]]:
    """Iteration 1 whole; of iteration 2 the policy, the rollouts and the pool."""
    store = Store(tmp_path_factory.mktemp("store"))
    made: dict[str, Artifact] = {}
    made["policy1"] = make(store, "policy", {}, {"policy": {"iteration": 1, "base": "b", "adapter": None, "experience": None}})
    rolled = [trajectory("a", n, 1.0) for n in range(SHOWN + 2)] + [trajectory("b", 0, 0.0)]
    made["trajectories1"] = make(store, "trajectories", both(rolled), {}, policy=made["policy1"])
    item = ExperienceItem("p1", TEXT, "principle", {"last_tool": "visit"}, {"lift": 0.25}, TAUGHT, 1, 1)
    add = PoolEdit("add", "p1", 1, None, TEXT, "lift 0.25", TAUGHT)
    dropped = PoolEdit("delete", "p0", 1, "old words", None, "over the cap", ("b#0",))
    made["experience1"] = make(
        store, "experience", pool([item], [add, dropped]), {}, policy=made["policy1"], trajectories=made["trajectories1"]
    )
    taught = [trajectory("a", 0, 1.0, ("p1",)), trajectory("b", 0, 1.0, ())]
    upstream = {name: made[f"{name}1"] for name in ("policy", "trajectories", "experience")}
    made["contexts1"] = make(store, "contexts", contexts(taught), {"regime.source": "teacher"}, **upstream)
    made["student1"] = make(
        store, "contexts", contexts([trajectory("b", 0, 0.0, ("p1",))]), {"regime.source": "student"}, **upstream
    )
    made["adapter1"] = make(store, "adapter", {}, {}, policy=made["policy1"], contexts=made["contexts1"])
    tables = both([trajectory("with/h", 0, 1.0, ("p1",)), trajectory("without/h", 0, 0.0)])
    scores = [Score("h", 0, condition, 1.0, False, "answered", 2, 2, "Rato") for condition in ("with", "without")]
    tables[SCORES] = frames.scores_to_frame(scores)
    made["scores1"] = make(store, "scores", tables, {}, adapter=made["adapter1"], experience=made["experience1"])
    made["promotion1"] = make(store, "promotion", {}, {}, adapter=made["adapter1"], scores=made["scores1"])
    entering = {"iteration": 2, "base": "b", "adapter": made["adapter1"].digest, "experience": made["experience1"].digest}
    made["policy2"] = make(store, "policy", {}, {"policy": entering})
    made["trajectories2"] = make(
        store, "trajectories", both([trajectory("a", n, 0.0) for n in (0, 1)]), {}, policy=made["policy2"]
    )
    update = PoolEdit("update", "p1", 2, TEXT, "Look: twice.", "lift 0.5", ("a#0",))
    later = ExperienceItem("p1", "Look: twice.", "principle", {}, {"lift": 0.5}, TAUGHT, 1, 2)
    made["experience2"] = make(
        store, "experience", pool([later], [add, update]), {}, policy=made["policy2"], trajectories=made["trajectories2"]
    )
    for name, artifact in made.items():
        if name != "student1":
            store.set_ref("pocket", int(name[-1]), artifact.kind, artifact.digest)
    store.set_ref("twin", 1, "trajectories", made["trajectories1"].digest)
    return store, made


def nodes(root: TraceNode) -> list[TraceNode]:
    return [root, *(inner for child in root.children for inner in nodes(child))]


def ids(root: TraceNode, kind: str | None = None) -> set[str]:
    return {node.id for node in nodes(root) if node.id and kind in (None, node.kind)}


def path_exists(root: TraceNode, *kinds: str) -> bool:
    """Whether some branch shows ``kinds`` in this order, not necessarily next to each other."""
    rest = kinds[1:] if root.kind == kinds[0] else kinds
    return not rest or any(path_exists(child, *rest) for child in root.children)


def show(traced: Trace) -> str:
    from rich.console import Console

    out = io.StringIO()
    Console(width=200, file=out).print(render(traced))
    return out.getvalue()


def test_a_score_row_goes_back_to_the_trajectories_that_taught(world: tuple[Store, dict[str, Artifact]]) -> None:
    traced = trace(world[0], "h#0")
    assert traced.origins.label.startswith("2 things bear the id h#0")
    aware = next(node for node in traced.origins.children if node.label == "h#0  with")
    bare = next(node for node in traced.origins.children if node.label == "h#0  without")
    assert path_exists(aware, "score", "scores", "adapter", "contexts", "item", "trajectory")
    assert path_exists(aware, "score", "scores", "adapter", "contexts", "experience", "trajectories", "policy")
    assert "p1" in {node.id for node in aware.children}
    assert "p1" not in {node.id for node in bare.children}, "this rollout saw no experience"
    assert trace(world[0], "with/h#0").origins == aware
    assert trace(world[0], aware.id).origins == aware
    uses = traced.uses.children[0]
    assert path_exists(uses, "score", "scores", "promotion", "policy", "trajectories", "experience")


def test_an_artifact_by_prefix_in_both_directions(world: tuple[Store, dict[str, Artifact]]) -> None:
    store, made = world
    traced = trace(store, made["adapter1"].digest[:8])
    assert traced.origins.id == traced.uses.id == made["adapter1"].digest
    assert {made[name].digest for name in ("contexts1", "experience1", "trajectories1", "policy1")} <= ids(traced.origins)
    assert made["scores1"].digest not in ids(traced.origins)
    later = {made[name].digest for name in ("scores1", "promotion1", "policy2", "trajectories2", "experience2")}
    assert later <= ids(traced.uses)
    assert made["contexts1"].digest not in ids(traced.uses)
    items = [node for node in nodes(traced.origins) if node.kind == "item"]
    assert [(node.id, node.facts["steps"]) for node in items] == [("p1", 1)]
    assert made["policy1"].digest[:12] + "  pocket|01" in show(traced)


def test_every_artifact_is_spelled_out_once(world: tuple[Store, dict[str, Artifact]]) -> None:
    store, made = world
    for name, artifact in made.items():
        traced = trace(store, artifact.digest)
        for root in (traced.origins, traced.uses):
            spelled = [
                node.id
                for node in nodes(root)
                if node.id in {a.digest for a in made.values()} and "see above" not in node.label
            ]
            assert len(spelled) == len(set(spelled)), name


def test_an_item_knows_its_teachers_edits_and_students(world: tuple[Store, dict[str, Artifact]]) -> None:
    store, made = world
    traced = trace(store, "p1")
    edits = [node for node in nodes(traced.origins) if node.kind == "edit"]
    assert [node.label for node in edits] == ["add: lift 0.25", "update: lift 0.5"]
    first = [(child.kind, child.label) for child in edits[0].children]
    assert first == [*(("trajectory", f"a#{n}") for n in range(SHOWN)), ("more", "and 2 more trajectories")]
    assert edits[0].children[0].id == f"{made['trajectories1'].digest[:12]}/a#0"
    assert edits[1].children[0].id == f"{made['trajectories2'].digest[:12]}/a#0", "the same id, another iteration"
    assert edits[1].children[0].facts["reward"] == 0.0
    assert traced.origins.facts["updated"] == 2
    steps = {node.id: node.facts["steps"] for node in nodes(traced.uses) if "steps" in node.facts}
    assert steps == {made["contexts1"].digest: 1, made["student1"].digest: 1, made["scores1"].digest: 1}
    assert path_exists(traced.uses, "item", "contexts", "adapter", "scores", "promotion")
    assert path_exists(traced.uses, "item", "contexts", "step")


def test_an_item_that_was_deleted_is_still_found(world: tuple[Store, dict[str, Artifact]]) -> None:
    traced = trace(world[0], "p0")
    assert "old words" in traced.origins.label
    assert [node.label for node in nodes(traced.origins) if node.kind == "edit"] == ["delete: over the cap"]
    assert traced.uses.children == ()
    assert "nothing" in show(traced)


def test_an_ambiguous_trajectory_lists_all(world: tuple[Store, dict[str, Artifact]]) -> None:
    store, made = world
    traced = trace(store, "a#0")
    holders = {made[name].digest[:12] + "/a#0" for name in ("trajectories1", "contexts1", "trajectories2")}
    assert {node.id for node in traced.origins.children} == holders
    second = trace(store, f"{made['trajectories2'].digest[:8]}/a#0")
    assert [node.label for node in nodes(second.uses) if node.kind == "item"] == ["p1: Look: twice."]
    namesake = trace(store, f"{made['trajectories2'].digest[:8]}/a#1")
    assert not ids(namesake.uses, "item"), "it was a#1 of iteration 1 that taught p1"
    one = trace(store, f"{made['trajectories1'].digest[:8]}/a#0")
    assert one.origins.id == f"{made['trajectories1'].digest[:12]}/a#0"
    assert ids(one.uses, "item") == {"p1"}
    assert made["contexts1"].digest not in {node.id for node in one.uses.children}, "the teacher's own rollout has the same id"
    again = trace(store, f"{made['contexts1'].digest[:8]}/a#0")
    assert ids(again.origins, "item") == {"p1"}
    assert path_exists(again.uses, "trajectory", "contexts", "adapter", "scores")


def test_a_failed_trajectory_teaches_too(world: tuple[Store, dict[str, Artifact]]) -> None:
    store, made = world
    traced = trace(store, f"{made['trajectories1'].digest[:8]}/b#0")
    assert ids(traced.uses, "item") == {"p0"}, "a deletion is an edit that it caused"
    assert made["student1"].digest in {node.id for node in traced.uses.children}, "on-policy contexts learn from it itself"


def test_two_lineages_with_one_item_id_stay_apart(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for seed in (1, 2):
        rolled = make(store, "trajectories", both([trajectory("a", 0, 1.0)]), {"seed": seed})
        item = ExperienceItem("p1", f"text {seed}", "principle", trajectory_ids=("a#0",))
        owned = make(store, "experience", pool([item], []), {"seed": seed}, trajectories=rolled)
        make(store, "contexts", contexts([trajectory("a", 0, 1.0, ("p1",))]), {"seed": seed}, experience=owned)
    store.set_ref("two", 1, "experience", owned.digest)
    traced = trace(store, "p1")
    assert traced.origins.children[0].label == "p1: text 2", "what an iteration uses comes first"
    assert sorted(node.label for node in traced.origins.children) == ["p1: text 1", "p1: text 2"]
    assert [len(ids(node, "contexts")) for node in traced.uses.children] == [1, 1]


def test_model_text_is_not_markup(world: tuple[Store, dict[str, Artifact]]) -> None:
    assert "[bold]search[/bold]" in show(trace(world[0], world[1]["contexts1"].digest))


def test_what_a_terminal_would_obey_is_not_sent_to_it() -> None:
    nodes = TraceNode("item", "p1", "p1: \x1b[2J\x9b2J", {"answer": "\x1b]0;title\x07"})
    printed = io.StringIO()
    Console(file=printed, force_terminal=False).print(render(Trace("p1", nodes, nodes)))
    assert not set(printed.getvalue()) & set("\x1b\x9b\x07")
    assert "p1: \ufffd[2J\ufffd2J" in printed.getvalue()


def test_json_form(world: tuple[Store, dict[str, Artifact]]) -> None:
    for id in ("h#0", "p1", "a#0", world[1]["promotion1"].digest):
        assert json.loads(json.dumps(trace(world[0], id).to_dict(), allow_nan=False))["id"] == id


@pytest.mark.parametrize(
    ("id", "said"),
    [("p2", "p1"), ("h#7", "h#0"), ("zzz", "evolve status"), ("", "evolve status"), ("abcdef/h#00", "h#0")],
)
def test_unknown_ids_name_near_ones(world: tuple[Store, dict[str, Artifact]], id: str, said: str) -> None:
    with pytest.raises(DataError, match="nothing in the store has this id") as caught:
        trace(world[0], id)
    assert said in caught.value.remedy


def test_a_mistyped_digest_names_the_near_one(world: tuple[Store, dict[str, Artifact]]) -> None:
    digest = world[1]["adapter1"].digest
    wrong = digest[:10] + ("0" if digest[10] != "0" else "1")
    with pytest.raises(DataError) as caught:
        trace(world[0], wrong)
    assert digest[:12] in caught.value.remedy


def test_a_short_prefix_is_refused(world: tuple[Store, dict[str, Artifact]]) -> None:
    with pytest.raises(DataError, match="too short for a digest"):
        trace(world[0], world[1]["adapter1"].digest[:5])


def test_an_empty_store_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the store is empty"):
        trace(Store(tmp_path / "none"), "p1")


def test_one_experiment_alone(world: tuple[Store, dict[str, Artifact]]) -> None:
    store, made = world
    assert len(trace(store, "a#0").origins.children) == 3
    only = trace(store, "a#0", experiment="twin")
    assert only.origins.id == made["trajectories1"].digest[:12] + "/a#0"
    assert trace(store, "p1", experiment="pocket").origins.label.startswith("p1: Look: twice.")
    with pytest.raises(DataError, match="nothing that twin uses now has this id") as caught:
        trace(store, "p1", experiment="twin")
    assert "pocket" in caught.value.remedy
    with pytest.raises(DataError, match="uses now") as caught:
        trace(store, made["student1"].digest, experiment="pocket")
    assert "leave out --of" in caught.value.remedy


def test_a_lineage_of_all_the_nights_there_can_be_is_walked_and_shown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Set in by each link it was out of the terminal at the third night, and out of Python's stack at the seventieth."""
    monkeypatch.setattr("os.fsync", lambda _: None)
    store, nights = Store(tmp_path), 99
    found: dict[str, Artifact] = {}
    for k in range(1, nights + 1):
        entering = {"adapter": found["adapter"].digest} if found else {}
        found = {"policy": make(store, "policy", {}, {"policy": {"iteration": k, "base": "b", **entering}})}
        for kind in STEP_ORDER[1:]:
            found[kind] = make(store, kind, {}, {}, above=[*found.values()][-1])
        for kind, artifact in found.items():
            store.set_ref("long", k, kind, artifact.digest)
    last, first = found["promotion"].digest, store.ref("long", 1, "policy")
    assert first is not None
    traced = trace(store, last)
    out = io.StringIO()
    Console(width=80, file=out).print(render(traced))
    assert f"from policy {first.digest[:12]}  long|01" in out.getvalue()
    assert f"into promotion {last[:12]}  long|99" in show(trace(store, first.digest))
    monkeypatch.setattr("sys.argv", ["evolve", "trace", last, "--json", "--store", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 0
    with deep():
        assert json.loads(capsys.readouterr().out) == traced.to_dict()


def test_the_files_of_a_store_are_read_once_for_a_walk(
    world: tuple[Store, dict[str, Artifact]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each question read those of all artifacts again: with ten lineages of twelve nights an item took minutes."""
    expected = {id: trace(world[0], id).to_dict() for id in ("p1", "h#0", "a#0")}
    find = _Walk.starts

    def find_without_files(walk: _Walk, id: str) -> Any:
        shutil.rmtree(store.root / "objects")
        return find(walk, id)

    monkeypatch.setattr(_Walk, "starts", find_without_files)
    for id, told in expected.items():
        store = copy_of(world[0], tmp_path / id)
        assert trace(store, id).to_dict() == told
