"""What a materialization shows: tables with schemas, numbers with stable keys, links in both directions of the closing edge."""

from __future__ import annotations

import json
import re
from typing import Any
from urllib.parse import parse_qs, urlsplit

import dagster as dg
import polars as pl
import pytest
from assets_helpers import FakeSteps, iteration
from evolve_dag.assets import links, preview
from evolve_dag.assets.columns import describe

from evolve_dag.config.schema import Experiment
from evolve_dag.steps import base
from evolve_dag.store.artifacts import Store
from evolve_dag.tracking import mlflow_sync


def shown(instance: dg.DagsterInstance, step: str, partition: str) -> dict[str, Any]:
    """Metadata of the latest materialization of a partition."""
    [record] = instance.fetch_materializations(
        dg.AssetRecordsFilter(asset_key=dg.AssetKey(step), asset_partitions=[partition]), limit=1
    ).records
    assert record.asset_materialization is not None
    return dict(record.asset_materialization.metadata)


@pytest.fixture
def made(fake: FakeSteps, experiment: Experiment, memory: dg.DagsterInstance) -> dg.DagsterInstance:
    """Two iterations of ``tiny``."""
    iteration(memory, 1)
    iteration(memory, 2)
    return memory


def test_every_table_has_a_schema_that_says_what_its_columns_mean(made: dg.DagsterInstance) -> None:
    for step, spec in base.SPECS.items():
        if not spec.tables:
            continue
        main = spec.tables[0]
        metadata = shown(made, step, "tiny|01")
        schema = metadata["dagster/column_schema"].schema
        assert schema.columns
        assert [column.name for column in schema.columns if not column.description] == [], main.file
        assert metadata["dagster/row_count"].value > 0
        preview_columns = [column.name for column in metadata["preview"].schema.columns]
        assert preview_columns == [name for name in main.columns if describe(main.file, name) and name in preview_columns]
        assert 0 < len(metadata["preview"].records) <= main.rows


def test_a_curve_with_what_is_no_number_is_json() -> None:
    curve = pl.DataFrame({"step": [0, 1, 2], "loss": [0.5, float("nan"), float("inf")]})
    rows = [dict(record.data) for record in preview.table("curve.parquet", curve).records]
    assert json.loads(json.dumps(rows, allow_nan=False))[1:] == [{"step": 1, "loss": "nan"}, {"step": 2, "loss": "inf"}]


def test_numbers_have_the_same_keys_in_every_iteration(made: dg.DagsterInstance) -> None:
    for step in base.STEP_ORDER:
        first, second = (
            {key for key, value in shown(made, step, key_).items() if isinstance(value.value, int | float)}
            for key_ in ("tiny|01", "tiny|02")
        )
        assert first == second, step
    scores = shown(made, "scores", "tiny|02")
    assert scores["success_without"].value == 1.0
    assert scores["success_without_low"].value <= 1.0 <= scores["success_without_high"].value
    assert "success_development_candidate" not in scores, "long keys; the promotion has these numbers"
    assert "success_difference" in shown(made, "promotion", "tiny|02")


def test_results_are_a_table_and_a_picture(made: dg.DagsterInstance) -> None:
    metadata = shown(made, "scores", "tiny|02")
    rows = {record.data["condition"]: record.data for record in metadata["results"].records}
    assert set(rows) == {"base", "without", "with", "development candidate", "development best"}
    assert rows["without"]["success"] == "100.0%"
    assert metadata["success_curve"].value.startswith("![success over iterations](<data:image/svg+xml,")
    assert "M40 12 165 12 290 12" in metadata["success_curve"].value, "base and two iterations, all right"


def test_a_ledger_of_calls_becomes_numbers() -> None:
    calls = {"calls": {"extractor": {"calls": 3, "cost": 0.123456, "prompt_tokens": 900}}, "note": "", "none": None}
    assert dict(preview._numbers(calls)) == {
        "calls.extractor.calls": 3,
        "calls.extractor.cost": 0.1235,
        "calls.extractor.prompt_tokens": 900,
    }


def test_cells_are_short_plain_and_never_null() -> None:
    frame = pl.DataFrame({"text": ["a\n b" * 60, None], "selected": [["p0001", "p0002"], []], "reward": [1 / 3, None]})
    first, second = (record.data for record in preview.table("items.parquet", frame).records)
    assert len(str(first["text"])) == preview.CELL
    assert "\n" not in str(first["text"])
    assert (first["selected"], first["reward"]) == ("p0001, p0002", 0.3333)
    assert second == {"text": "", "selected": "", "reward": ""}


def test_rows_come_from_all_over_the_table() -> None:
    frame = pl.DataFrame({"n": range(100)})
    assert preview._some(frame, 8)["n"].to_list() == [0, 14, 28, 42, 56, 70, 84, 99]
    assert preview._some(frame.head(3), 8).height == 3
    contexts = pl.DataFrame({"injected": ["", "", "hint"], "step": [0, 1, 2]})
    assert preview._some(contexts, 8)["step"].to_list() == [2]


def addresses(markdown: str) -> list[tuple[str, str]]:
    """(asset, partition) of every link."""
    found = [urlsplit(target) for target in re.findall(r"\]\(([^)]+)\)", markdown)]
    return [(address.path.removeprefix("/assets/"), parse_qs(address.query)["partition"][0]) for address in found]


def test_upstream_digests_link_to_their_assets(made: dg.DagsterInstance, experiment: Experiment, store: Store) -> None:
    text = shown(made, "scores", "tiny|02")["upstream"].value
    assert addresses(text) == [(name, "tiny|02") for name in base.resolve("scores", experiment, 2, store).inputs]
    for digest in base.resolve("scores", experiment, 2, store).inputs.values():
        assert digest[: links.SHORT] in text
    assert "upstream" not in shown(made, "policy", "tiny|01")


def test_the_closing_edge_is_a_link_in_both_directions(made: dg.DagsterInstance) -> None:
    promotion, following = shown(made, "promotion", "tiny|01"), shown(made, "policy", "tiny|02")
    assert addresses(promotion["commits"].value) == [("policy", "tiny|02")]
    assert addresses(following["decided_by"].value) == [("promotion", "tiny|01")]
    assert addresses(following["adapter"].value) == [("adapter", "tiny|01")]
    assert addresses(following["experience"].value) == [("experience", "tiny|01")]
    announced = shown(made, "policy", "tiny|03")  # by the promotion alone; iteration 3 has not begun
    assert addresses(announced["decided_by"].value) == [("promotion", "tiny|02")]
    assert "bare base model" in shown(made, "policy", "tiny|01")["decided_by"].value


def test_a_champion_that_stayed_links_to_where_it_was_made(
    fake: FakeSteps, experiment: Experiment, store: Store, memory: dg.DagsterInstance
) -> None:
    iteration(memory, 1)
    policy = store.open("policy", str(base.resolve("policy", experiment, 2, store).digest))
    stayed = links.hand_over(policy, store, "tiny", 7)
    assert addresses(stayed["decided_by"].value) == [("promotion", "tiny|06")]
    assert addresses(stayed["adapter"].value) == [("adapter", "tiny|01")]


def test_the_link_to_mlflow_can_be_missing_or_broken_without_harm(
    fake: FakeSteps, experiment: Experiment, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def found(link: object) -> dict[str, Any]:
        def answer(*_: object) -> object:
            if isinstance(link, Exception):
                raise link
            return link

        monkeypatch.setattr(mlflow_sync, "tracking_link", answer)
        return links.mlflow(store.root, "tiny", 1, policy)

    policy = base.run_step("policy", experiment, 1, store).artifact
    assert found(None) == {}
    assert found("http://127.0.0.1:5000/#/experiments/1")["mlflow"] == dg.MetadataValue.url(
        "http://127.0.0.1:5000/#/experiments/1"
    )
    assert found("mlflow run 1234")["mlflow"] == dg.MetadataValue.text("mlflow run 1234")
    assert found(OSError("no such table, password=hunter2"))["mlflow"] == "not known: OSError"


def test_the_report_is_named_once_it_is_there(store: Store) -> None:
    assert links.report(store.root, "tiny") == {}
    path = store.root / "reports" / "tiny.html"
    path.parent.mkdir(parents=True)
    path.write_text("<html>")
    assert links.report(store.root, "tiny")["report"] == dg.MetadataValue.path(path.resolve())
