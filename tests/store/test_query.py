"""SQL over small stores made by hand."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from evolve_dag.errors import DataError, StoreError
from evolve_dag.records import ExperienceItem, PoolEdit, Score, Step, ToolCall, Trajectory
from evolve_dag.store import frames
from evolve_dag.store.artifacts import Artifact, Store
from evolve_dag.store.layout import EDITS, ITEMS, SCORES, STEPS, TRAJECTORIES
from evolve_dag.store.query import VIEWS, connect, run_sql


def make(
    store: Store, kind: str, tables: dict[str, pl.DataFrame], config: dict[str, Any] | None = None, **inputs: str
) -> Artifact:
    config = config or {}
    digest = Store.digest_of(kind, "1", config, inputs)
    with store.build(kind, digest, code_version="1", config=config, inputs=inputs) as build:
        for name, table in tables.items():
            table.write_parquet(build.path / name)
        build.note(rows=sum(table.height for table in tables.values()))
    assert build.artifact is not None
    return build.artifact


def trajectory(task: str, rollout: int, reward: float | None, **fields: Any) -> Trajectory:
    steps = (
        Step(0, "look", (1, 2), (-0.5, -0.5), ToolCall("search", {"query": "Bado Keli"}), observation="1 result", **fields),
        Step(1, "done", (3,), (-1.0,), answer="Rato Miku"),
    )
    return Trajectory(f"{task}#{rollout}", task, rollout, 7, "system", "question?", steps, "answered", "Rato Miku", reward)


def both(trajectories: list[Trajectory]) -> dict[str, pl.DataFrame]:
    rows, steps = frames.trajectories_to_frames(trajectories)
    return {TRAJECTORIES: rows, STEPS: steps}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    store = Store(tmp_path / "it's a [store]*")
    rolled = make(store, "trajectories", both([trajectory("a", 0, 1.0), trajectory("a", 1, 0.0), trajectory("b", 0, None)]))
    item = ExperienceItem("p1", "Look: when lost, search.", "principle", {"last_tool": "visit"}, {"lift": 0.25}, ("a#0",), 1, 1)
    edit = PoolEdit("add", "p1", 1, None, item.text, "lift 0.25", ("a#0",))
    tables = {ITEMS: frames.items_to_frame([item]), EDITS: frames.edits_to_frame([edit])}
    pool = make(store, "experience", tables, {"seed": 3}, trajectories=rolled.digest)
    scores = [Score("h", 0, "without", 1.0, False, "answered", 3, 20, "Rato Miku", {"hops": "2"})]
    held_out = {SCORES: frames.scores_to_frame(scores), **both([trajectory("without/h", 0, 1.0)])}
    scored = make(store, "scores", held_out, None, experience=pool.digest)
    curve = pl.DataFrame({"step": [0, 1], "round": [0, 0], "loss": [1.5, float("nan")], "tokens_per_second": [10.0, 11.0]})
    curve = curve.cast({"step": pl.Int32, "round": pl.Int32})
    make(store, "adapter", {"curve.parquet": curve}, None, experience=pool.digest)
    for experiment in ("one", "two"):
        store.set_ref(experiment, 1, "trajectories", rolled.digest)
    store.set_ref("one", 1, "scores", scored.digest)
    store.set_ref("one", 2, "scores", scored.digest)
    return store


def test_every_view_exists_in_a_store_that_does_not(tmp_path: Path) -> None:
    store = Store(tmp_path / "nothing")
    for view in VIEWS:
        frame = run_sql(store, f"select * from {view}")
        assert frame.height == 0
        assert "digest" in frame.columns
    assert {"experiment", "iteration", "selected", "injected"} <= set(run_sql(store, "select * from steps").columns)
    assert run_sql(store, "select avg(reward) x, count(*) n from scores").rows() == [(None, 0)]
    assert not store.root.exists()


@pytest.mark.parametrize("empty", [True, False])
def test_the_tables_that_are_shown_are_the_views(empty: bool, store: Store, tmp_path: Path) -> None:
    looked_at = Store(tmp_path / "nothing") if empty else store
    assert run_sql(looked_at, "show tables")["name"].to_list() == sorted(VIEWS)


@pytest.mark.parametrize("above", ["seed=99", "id=5", "reward=0.5", "experiment=other", "filename=3"])
def test_the_name_of_a_folder_above_the_store_is_no_column(above: str, tmp_path: Path) -> None:
    store = Store(tmp_path / above / "store")
    rolled = make(store, "trajectories", both([trajectory("a", 0, 1.0)]))
    store.set_ref("one", 1, "trajectories", rolled.digest)
    found = run_sql(store, "select * from trajectories")
    assert found.select("id", "seed", "reward", "experiment").rows() == [("a#0", 7, 1.0, "one")]
    assert found.columns == run_sql(Store(tmp_path / "nothing"), "select * from trajectories").columns


def test_columns_do_not_depend_on_what_was_made(store: Store, tmp_path: Path) -> None:
    nothing = Store(tmp_path / "nothing")
    for view in VIEWS:
        empty, full = (dict(run_sql(one, f"select * from {view} limit 0").schema) for one in (nothing, store))
        assert empty.items() <= full.items(), view
        assert not any(name.endswith("_1") for name in full), f"{view}: two columns share a name"
    assert "tokens_per_second" in run_sql(store, "select * from curves").columns


def test_rows_carry_their_artifact_and_each_iteration_that_uses_it(store: Store) -> None:
    counts = run_sql(store, "select kind, experiment, iteration, count(*) n from trajectories group by all order by all")
    assert counts.rows() == [
        ("scores", "one", 1, 1),
        ("scores", "one", 2, 1),
        ("trajectories", "one", 1, 3),
        ("trajectories", "two", 1, 3),
    ]
    judged = run_sql(store, "select avg(reward) from trajectories where experiment = 'two'")
    assert judged.item() == 0.5, "a trajectory that was not judged must not count as wrong"
    unused = run_sql(store, "select distinct kind, experiment, iteration from items")
    assert unused.rows() == [("experience", None, None)]


def test_lists_mappings_and_joins(store: Store) -> None:
    assert (
        run_sql(store, "select arguments->>'$.query' from steps where tool is not null and kind = 'scores' limit 1").item()
        == "Bado Keli"
    )
    assert run_sql(store, "select cast(evidence->>'$.lift' as double) from items").item() == 0.25
    taught = "select distinct t.id from items i join trajectories t on list_contains(i.trajectory_ids, t.id)"
    assert run_sql(store, taught).item() == "a#0"
    assert run_sql(store, "select sum(len(token_ids)) from steps where kind = 'scores' and iteration = 1").item() == 3
    assert run_sql(store, "select metadata->>'$.hops' from scores").to_series().to_list() == ["2", "2"]
    assert run_sql(store, "select operation, reason, edit_iteration, iteration from edits").rows() == [
        ("add", "lift 0.25", 1, None)
    ]
    assert run_sql(store, "select count(*) from curves where not isnan(loss)").item() == 1
    assert run_sql(store, "select config->>'$.seed', summary->>'$.rows' from artifacts where kind = 'experience'").rows() == [
        ("3", "2")
    ]


def test_score_rows_join_their_trajectories(store: Store) -> None:
    join = "scores s join trajectories t on t.digest = s.digest and t.id = s.condition || '/' || s.task_id || '#' || s.rollout"
    assert run_sql(store, f"select distinct s.reward = t.reward as agree from {join}").to_series().to_list() == [True]


def test_artifacts_has_one_row_each(store: Store) -> None:
    rows = run_sql(store, "select kind, len(digest) from artifacts order by kind").rows()
    assert rows == [("adapter", 32), ("experience", 32), ("scores", 32), ("trajectories", 32)]
    assert run_sql(store, "select count(*) from refs").item() == 4


@pytest.mark.parametrize(
    "text",
    [
        "copy scores to 'SCORES.csv'",
        "copy scores to '{root}/SCORES.csv'",
        "attach '{root}/other.db'",
        "export database '{root}/out'",
        "create table t as select 1",
        "drop view scores",
        "install httpfs",
        "load httpfs",
        "set threads = 1",
        "explain analyze copy scores to '{root}/SCORES.csv'",
        "select 1; drop view scores",
        "",
        "selec 1",
        "select * from nothing",
        "select no_such_column from scores",
        "select * from read_csv('/etc/passwd')",
        "select * from glob('/etc/*')",
        "select * from 'https://example.invalid/x.parquet'",
        "select 1 / 'a'::int",
        "select interval 1 day",
    ],
)
def test_what_is_refused(store: Store, text: str) -> None:
    before = sorted(store.root.rglob("*"))
    with pytest.raises(DataError, match="SQL: ") as caught:
        run_sql(store, text.format(root=str(store.root).replace("'", "''")))
    assert "trajectories, steps, items" in str(caught.value) or "cast it" in str(caught.value)
    assert sorted(store.root.rglob("*")) == before


@pytest.mark.parametrize("text", ["read_text('{0}')", "read_blob('{0}')", "read_csv('{0}')", "'{0}'", "glob('{1}/*')"])
def test_no_other_file_of_the_store_is_read(store: Store, text: str) -> None:
    """A journal, a log or a database beside the artifacts, and what of an artifact is no table."""
    log = store.root / "logs" / "dagster.csv"
    log.parent.mkdir()
    log.write_text("secret\nvalue\n")
    for path in (log, next(store.root.glob("objects/scores/*/manifest.json"))):
        quoted = (str(one).replace("'", "''") for one in (path, path.parent))
        with pytest.raises(DataError, match=r"SQL: .*(Permission|disabled|not allowed)"):
            run_sql(store, f"select * from {text.format(*quoted)}")


def test_python_variables_are_out_of_reach(store: Store) -> None:
    secret = pl.DataFrame({"key": [1]})
    with pytest.raises(DataError, match="secret"):
        run_sql(store, "select * from secret")
    assert secret.height == 1


def test_describe_and_with_are_queries(store: Store) -> None:
    assert "reward" in run_sql(store, "describe scores")["column_name"].to_list()
    assert run_sql(store, "with x as (select 2 as n) select n from x").item() == 2
    assert run_sql(store, "from scores").height == 2


def test_connections_need_no_lock(store: Store) -> None:
    with connect(store) as first, connect(store) as second, store.lock("one"):
        assert (
            first.execute("select count(*) from scores").fetchall() == second.execute("select count(*) from scores").fetchall()
        )


def test_a_file_cut_short_is_named(store: Store) -> None:
    path = next(store.root.glob("objects/scores/*/scores.parquet"))
    os.truncate(path, 10)
    with pytest.raises(StoreError, match=r"scores\.parquet: corrupt: 10 bytes") as caught:
        run_sql(store, "select 1")
    assert "delete folder" in caught.value.remedy
