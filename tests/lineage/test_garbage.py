"""``evolve gc``: what is needed stays, what is not goes whole, and a kill in between is no harm."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from quick_lineages import WORLDS, everything_below, experiment, fake_steps, run
from typer.testing import CliRunner

from evolve_dag import cli
from evolve_dag.config import registry
from evolve_dag.errors import ConcurrencyError, StoreError
from evolve_dag.inference.folders import POCKET
from evolve_dag.lineage import audit, garbage
from evolve_dag.lineage.planning import plan
from evolve_dag.lineage.trace import trace
from evolve_dag.steps.base import STEP_ORDER, resolve
from evolve_dag.store.artifacts import Store
from evolve_dag.store.mirror import Mirror, MirroredStore
from evolve_dag.warmup import folder


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    fake_steps(monkeypatch)
    return Store(tmp_path / "store")


def digests(found: garbage.Found | garbage.Removed, what: str = "artifact") -> set[str]:
    listed = found.removable if isinstance(found, garbage.Found) else found.removed
    return {one.digest for one in listed if one.what == what}


def held(store: Store) -> set[str]:
    return {artifact.digest for artifact in store.artifacts()}


def sound(store: Store) -> None:
    """Every reference opens with its hashes, every artifact's inputs are there, and any id can be walked."""
    present = held(store)
    for ref in store.refs():
        artifact = store.open(ref.kind, ref.digest, verify=True)
        assert set(artifact.inputs.values()) <= present
        entering = artifact.manifest.config.get("policy")
        if artifact.kind == "policy" and isinstance(entering, dict):
            assert {entering["adapter"], entering["experience"]} - {None} <= present
    last = store.refs()[-1]
    assert trace(store, last.digest).origins.id == last.digest


def age(path: Path, seconds: float) -> None:
    for one in [path, *path.rglob("*")]:
        os.utime(one, (time.time() - seconds, time.time() - seconds))


def test_an_empty_store_has_nothing_and_gets_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "none")
    found, removed = garbage.remove(store)
    assert (found.removable, removed.removed, found.kept) == ((), (), 0)
    assert not store.root.exists()


def test_what_no_lineage_reaches_goes_and_the_second_time_there_is_nothing(store: Store) -> None:
    run(experiment(), store)
    old = held(store)
    changed = experiment(selection={"max_items": 2})
    run(changed, store)
    needed = {ref.digest for ref in store.refs()}
    expected = old - needed
    assert expected, "the change left something behind"
    before = everything_below(store.root)
    found = garbage.find(store)
    assert everything_below(store.root) == before
    assert digests(found) == expected
    size_before = sum(p.stat().st_size for p in (store.root / "objects").rglob("*") if p.is_file())
    found, removed = garbage.remove(store)
    size_after = sum(p.stat().st_size for p in (store.root / "objects").rglob("*") if p.is_file())
    assert digests(removed) == expected
    assert removed.bytes == found.bytes == size_before - size_after > 0
    assert held(store) == needed
    assert not (store.root / "trash").exists()
    sound(store)
    assert plan(changed, store).up_to_date
    again, nothing = garbage.remove(store)
    assert (again.removable, nothing.removed) == ((), ())
    assert "nothing to remove" in garbage.sentences(again, nothing)[0]


def test_a_champion_stays_when_the_iteration_that_made_it_has_no_reference(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_steps(monkeypatch, lambda k: "promote" if k == 1 else "keep")
    run(experiment(), store)
    champion = {kind: store.ref("quick", 1, kind).digest for kind in ("adapter", "experience", "contexts", "trajectories")}
    shutil.rmtree(store.root / "refs" / "quick" / "01")
    shutil.rmtree(store.root / "refs" / "quick" / "02")
    garbage.remove(store)
    assert set(champion.values()) <= held(store), "the policy of iteration 3 names them, and they name what made them"
    sound(store)


def test_what_a_registered_file_asks_for_stays_before_it_is_run(store: Store, tmp_path: Path) -> None:
    """Changed there and back: the references stand at the other config, the file at this one."""
    path = tmp_path / "quick.yaml"

    def write(**changes: Any) -> None:
        path.write_text(json.dumps({"iterations": 2, "tasks": WORLDS} | changes))

    write()
    first = registry.register(store.root, path)
    run(first, store)
    write(selection={"max_items": 2})
    run(registry.load_seeded(path), store)
    write()
    garbage.remove(store)
    assert plan(first, store).up_to_date
    path.unlink()
    found = garbage.find(store)
    assert any("kept by its references alone" in note for note in found.notes)
    assert digests(found), "nobody asks for the first config any more"


def test_what_mlflow_was_told_of_stays_until_it_is_let_go(store: Store) -> None:
    run(experiment(), store)
    promotion = store.ref("quick", 2, "promotion").digest
    run(experiment(seed=1), store)
    unneeded = digests(garbage.find(store))
    record = store.root / "tracking" / "0123456789abcdef.jsonl"
    record.parent.mkdir()
    record.write_text(json.dumps({"key": f"run/quick/{promotion}", "value": "a" * 32}) + "\n")
    found, _ = garbage.remove(store)
    assert promotion in held(store)
    assert {digest for digest in unneeded if digest in held(store)} == unneeded - digests(found)
    kept = store.open("promotion", promotion)
    assert set(kept.inputs.values()) <= held(store), "with all that it was made of"
    assert found.only_tracked == len(unneeded - digests(found)) > 0
    assert "only because MLflow was told" in " ".join(garbage.sentences(found, None))
    sound(store)
    garbage.remove(store, even_tracked=True)
    assert promotion not in held(store)
    sound(store)


def test_while_something_runs_nothing_is_removed(store: Store) -> None:
    run(experiment(), store)
    run(experiment(selection={"max_items": 2}), store)
    before = held(store)
    with store.lock("quick"):
        assert garbage.find(store).busy == ("experiment-quick",)
        with pytest.raises(ConcurrencyError, match="being run"):
            garbage.remove(store)
    digest = Store.digest_of("adapter", "1", {}, {})
    with (
        store.build("adapter", digest, code_version="1", config={}, inputs={}),
        pytest.raises(ConcurrencyError, match="nothing was removed"),
    ):
        garbage.remove(store)
    assert before < held(store)
    garbage.remove(store)
    assert digest not in held(store)


def test_an_experiment_cannot_begin_meanwhile(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run(experiment(), store)
    run(experiment(seed=1), store)
    tried = []
    delete = garbage._delete

    def trying(at: Store, one: garbage.Removable) -> None:
        with pytest.raises(ConcurrencyError), at.lock("quick"):
            raise AssertionError("it began")
        tried.append(one)
        delete(at, one)

    monkeypatch.setattr(garbage, "_delete", trying)
    garbage.remove(store)
    assert tried
    with store.lock("quick"):
        pass


def test_a_kill_in_the_middle_leaves_whole_artifacts_or_a_leftover(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run(experiment(), store)
    run(experiment(seed=1), store)
    needed = {ref.digest for ref in store.refs()}
    real, calls = shutil.rmtree, []

    def dying(path: Path, *args: Any, **kwargs: Any) -> None:
        calls.append(path)
        if len(calls) == 3:
            next(p for p in Path(path).rglob("*") if p.is_file()).unlink()
            raise KeyboardInterrupt
        real(path, *args, **kwargs)

    monkeypatch.setattr(garbage.shutil, "rmtree", dying)
    with pytest.raises(KeyboardInterrupt):
        garbage.remove(store)
    monkeypatch.setattr(garbage.shutil, "rmtree", real)
    for artifact in store.artifacts():
        artifact.verify()
    assert len(digests(garbage.find(store), "trash")) == 1
    garbage.remove(store)
    assert held(store) == needed
    assert garbage.find(store).removable == ()
    assert not (store.root / "trash").exists()


def test_a_folder_that_cannot_be_removed_is_told_and_the_rest_goes(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    run(experiment(), store)
    run(experiment(seed=1), store)
    real = Path.rename

    def refusing(self: Path, target: Path) -> Path:
        if self.parent.name == "adapter":
            raise PermissionError(13, "Permission denied")
        return real(self, target)

    monkeypatch.setattr(Path, "rename", refusing)
    found, removed = garbage.remove(store)
    assert removed.left
    assert all("adapter" in line for line in removed.left)
    assert len(removed.removed) + len(removed.left) == len(found.removable)


def test_work_that_nobody_would_resume_goes_after_an_hour(store: Store, tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text(json.dumps({"iterations": 1, "tasks": WORLDS}))
    e = registry.register(store.root, tmp_path / "quick.yaml")
    run(e, store)
    shutil.rmtree(store.root / "objects" / "scores")
    resumable = resolve("scores", e, 1, store).digest
    assert resumable is not None
    stale, fresh = "a" * 32, "b" * 32
    for digest in (resumable, stale, fresh):
        journals = store.root / "work" / "scores" / digest / "journals"
        journals.mkdir(parents=True)
        (journals / "x.jsonl").write_text('{"a": 1}\n')
    for digest in (resumable, stale):
        age(store.root / "work" / "scores" / digest, 7200)
    found, _ = garbage.remove(store)
    assert digests(found, "work") == {stale}
    assert sorted(p.name for p in (store.root / "work" / "scores").iterdir()) == sorted([resumable, fresh])
    assert run(e, store) == {(1, "scores")}


def test_work_that_is_resumed_if_the_gate_decides_as_before_stays(store: Store, tmp_path: Path) -> None:
    """A key of the gate was changed while a night was stopped half-way: its digests follow a promotion that is not made yet."""
    path = tmp_path / "quick.yaml"
    path.write_text(json.dumps({"iterations": 2, "tasks": WORLDS}))
    e = registry.register(store.root, path)
    run(e, store)
    stopped = resolve("trajectories", e, 2, store).digest
    assert stopped is not None
    shutil.rmtree(store.root / "objects" / "trajectories" / stopped)
    journals = store.root / "work" / "trajectories" / stopped / "journals"
    journals.mkdir(parents=True)
    (journals / "rollouts.jsonl").write_text('{"hours": "of work"}\n')
    age(journals.parent, 7200)
    assert digests(garbage.find(store), "work") == set()
    path.write_text(json.dumps({"iterations": 2, "tasks": WORLDS, "gate": {"margin": 0.01}}))
    assert digests(garbage.find(store), "work") == set()


def test_a_warm_up_that_was_killed_is_gone_on_with(store: Store, tmp_path: Path) -> None:
    """Before there is a model nothing of the experiment can be planned."""
    shutil.copytree(POCKET, tmp_path / "base")
    asked = {"models": {"policy": {"path": "made"}}, "warmup": {"base": "base", "world": 500}, "tasks": WORLDS}
    (tmp_path / "warmed.yaml").write_text(json.dumps(asked))
    digest = folder.digest(registry.register(store.root, tmp_path / "warmed.yaml"))
    stale = "a" * 32
    for one in (digest, stale):
        (store.root / "work" / "warmup" / one / "journals").mkdir(parents=True)
        age(store.root / "work" / "warmup" / one, 7200)
    found, _ = garbage.remove(store)
    assert digests(found, "work") == {stale}
    made = folder.config(registry.load(store.root, "warmed"))
    with store.build(folder.KIND, digest, code_version=folder.VERSION, config=made, inputs={}):
        pass
    assert not digests(garbage.find(store)), "it was killed before the model was put where the file wants it"
    shutil.rmtree(tmp_path / "base")
    assert digests(garbage.find(store)) == {digest}, "nobody can ask for it any more"


def test_measurements_of_what_is_gone_go_too(store: Store) -> None:
    run(experiment(), store)
    contexts, adapter = (store.ref("quick", 1, kind).digest for kind in ("contexts", "adapter"))
    for names in ((contexts, adapter), (contexts, None), ("c" * 32, adapter)):
        audit._write(store, audit.Measurement(*names, {}))
    _, removed = garbage.remove(store)
    assert {one.what for one in removed.removed} == {"cache"}
    left = sorted(p.name for p in (store.root / "cache" / "audit").iterdir())
    assert left == sorted([f"{contexts}-{adapter}.json", f"{contexts}-base.json"])


def test_what_a_killed_process_was_about_to_write_goes_after_an_hour(store: Store) -> None:
    left = [
        store.root / "refs" / "quick" / "01" / ".scores.json.17.23.tmp",
        store.root / "experiments" / ".quick.json.17.23.tmp",
    ]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert not [one for one in garbage.find(store).removable if one.what == "temporary"], "it may be being written now"
    os.utime(left[0], (0, 0))
    _, removed = garbage.remove(store)
    assert [one.path for one in removed.removed if one.what == "temporary"] == left[:1]
    assert not left[0].exists()
    assert left[1].exists()


def test_a_list_beside_a_run_that_moves_its_work_away_meanwhile(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    work = store.root / "work" / "scores" / ("a" * 32)
    (work / "files").mkdir(parents=True)
    (store.root / "refs" / "quick" / "01").mkdir(parents=True)
    temporary = store.root / "refs" / "quick" / "01" / ".scores.json.17.23.tmp"
    temporary.touch()
    os.utime(temporary, (0, 0))
    look = os.scandir

    def look_too_late(path: Any = ".") -> Any:
        if Path(path) == work / "files" and work.exists():
            work.rename(store.root / "published")
        if Path(path) == store.root / "published" and temporary.exists():
            temporary.unlink()
        return look(path)

    monkeypatch.setattr(os, "scandir", look_too_late)
    assert garbage.find(store).removable == ()
    assert not work.exists()


def test_a_machine_that_has_little_of_the_mirror_fetches_nothing_to_tell(store: Store, tmp_path: Path) -> None:
    (tmp_path / "quick.yaml").write_text(json.dumps({"iterations": 2, "tasks": WORLDS}))
    mirror = Mirror(f"file://{tmp_path}/mirror")
    run(registry.register(store.root, tmp_path / "quick.yaml"), MirroredStore(store.root, mirror))
    other = MirroredStore(tmp_path / "other", mirror)
    registry.register(other.root, tmp_path / "quick.yaml")
    found, removed = garbage.remove(other)
    assert (found.removable, removed.removed, other.here.listing()) == ((), (), [])
    assert run(registry.load(other.root, "quick"), other) == set()
    assert garbage.find(other).removable == ()


def test_what_goes_with_its_folder_is_named_once(store: Store) -> None:
    left = [store.root / "work" / "scores" / ("a" * 32), store.root / "trash" / "b"]
    for path in left:
        path.mkdir(parents=True)
        (path / ".x.json.17.23.tmp").touch()
        age(path, 7200)
    found, removed = garbage.remove(store)
    assert [one.path for one in found.removable] == left
    assert (removed.removed, removed.left) == (found.removable, ())


def test_what_is_young_can_be_left(store: Store) -> None:
    run(experiment(), store)
    run(experiment(seed=1), store)
    found, removed = garbage.remove(store, older_than_days=1)
    assert removed.removed == ()
    assert found.young > 0
    assert "younger" in " ".join(garbage.sentences(found, removed))


def test_a_damaged_manifest_that_is_needed_stops_it(store: Store) -> None:
    run(experiment(), store)
    run(experiment(seed=1), store)
    path = store.root / "objects" / "adapter" / store.ref("quick", 2, "adapter").digest / "manifest.json"
    before = held(store)
    content = path.read_text()
    path.write_text("")
    with pytest.raises(StoreError, match="corrupt, so what this artifact needs cannot be told"):
        garbage.remove(store)
    path.write_text(content)
    assert held(store) == before


def test_a_damaged_one_that_nobody_needs_goes(store: Store) -> None:
    run(experiment(), store)
    old = store.ref("quick", 2, "adapter").digest
    run(experiment(seed=1), store)
    (store.root / "objects" / "adapter" / old / "manifest.json").write_text("?")
    assert old in digests(garbage.remove(store)[0])


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    history=st.lists(
        st.fixed_dictionaries(
            {"name": st.sampled_from(["one", "two"])},
            optional={
                "seed": st.integers(0, 1),
                "selection": st.fixed_dictionaries({"max_items": st.integers(2, 3)}),
                "gate": st.fixed_dictionaries({"max_turn_ratio": st.sampled_from([2.0, 3.0])}),
                "iterations": st.integers(1, 2),
            },
        ),
        min_size=1,
        max_size=3,
    ),
    verdicts=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_after_any_history_everything_that_is_needed_is_there(
    history: list[dict[str, Any]],
    verdicts: list[bool],
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake_steps(monkeypatch, lambda k: "promote" if verdicts[k - 1] else "keep")
    store = Store(tmp_path_factory.mktemp("any") / "store")
    newest = {}
    for changes in history:
        e = experiment(**({"iterations": 2} | changes))
        run(e, store)
        newest[e.experiment] = e
    refs = store.refs()
    garbage.remove(store)
    sound(store)
    assert store.refs() == refs
    for e in newest.values():
        assert plan(e, store).up_to_date
        assert run(e, store) == set()
    assert garbage.find(store).removable == ()


def test_the_command_lists_then_removes(store: Store) -> None:
    run(experiment(), store)
    run(experiment(seed=1), store)
    listed = CliRunner().invoke(cli.app, ["gc", "--store", str(store.root)])
    assert listed.exit_code == 0
    assert "Nothing was removed: --yes does it" in listed.output
    content = json.loads(CliRunner().invoke(cli.app, ["gc", "--yes", "--json", "--store", str(store.root)]).output)
    assert content["removed"] is True
    assert {one["kind"] for one in content["items"]} <= set(STEP_ORDER)
    assert content["bytes"] == sum(one["bytes"] for one in content["items"]) > 0
    after = CliRunner().invoke(cli.app, ["gc", "--yes", "--store", str(store.root)])
    assert "nothing to remove" in after.output


def test_sizes_in_words() -> None:
    assert [garbage.size(n) for n in (0, 999, 1000, 1_234_567, 5 * 10**9)] == ["0 B", "999 B", "1.0 kB", "1.2 MB", "5.0 GB"]
