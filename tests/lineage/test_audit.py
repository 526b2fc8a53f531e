"""How much of an item is inside the weights: hand-computed sums, and the real trainer as the oracle."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from quick_lineages import experiment as quick
from quick_lineages import fake_steps, run
from rich.console import Console
from small_lineage import SMALL, copy_of, iterate
from typer.testing import CliRunner

from evolve_dag import cli
from evolve_dag.config.schema import Experiment
from evolve_dag.distillation.alignment import StudentRow
from evolve_dag.distillation.dataset import DistillationRow, StepView, load_contexts, sharpened
from evolve_dag.errors import ConfigError, OrderError
from evolve_dag.lineage import audit
from evolve_dag.lineage.audit import ALL, NONE, Internalized, Measurement, Sums, sums
from evolve_dag.records import PoolEdit
from evolve_dag.reporting import audit_page, principles, report
from evolve_dag.reporting.summary import status_json, summarize
from evolve_dag.steps.base import run_step
from evolve_dag.store.artifacts import Artifact, Store

# one batch an epoch, without retention: the curve then begins with the divergence of all stored rows
DISTILLATION = {"epochs": 4, "retention": 0.0, "tokens_per_batch": 1_000_000, "warmup_steps": 0}
AUDITED = SMALL | {"experiment": "audited", "iterations": 1, "distillation": DISTILLATION}


@pytest.fixture(scope="module")
def experiment() -> Experiment:
    return Experiment.model_validate(AUDITED)


@pytest.fixture(scope="module")
def made(small_lineage: Store, tmp_path_factory: pytest.TempPathFactory, experiment: Experiment) -> Store:
    return iterate(copy_of(small_lineage, tmp_path_factory.mktemp("audited") / "store"), experiment)


@pytest.fixture(scope="module")
def measured(made: Store, experiment: Experiment) -> audit.Audit:
    return audit.measure(experiment, made)


def artifact(store: Store, kind: str) -> Artifact:
    ref = store.ref("audited", 1, kind)
    assert ref is not None
    return store.open(kind, ref.digest)


def by_step(row: DistillationRow, student: DistillationRow) -> tuple[float, ...]:
    """Mean KL(teacher of ``row`` || teacher of ``student``) at every step, nats."""
    assert row.teacher is not None
    assert student.teacher is not None
    p_N_K, q_N_K = (np.column_stack([one.logprobs, one.tail]) for one in (row.teacher, student.teacher))
    nats_N = (np.exp(p_N_K) * (p_N_K - q_N_K)).sum(axis=1)
    ends = np.cumsum([end - start for start, end in row.row.spans])
    return tuple(float(nats.mean()) for nats in np.split(nats_N, ends[:-1]))


def row(name: str, spans: tuple[tuple[int, int], ...], selected: tuple[tuple[str, ...], ...]) -> DistillationRow:
    steps = tuple(range(len(spans)))
    contexts = tuple(StepView(step, names, "x" if names else "", 1) for step, names in zip(steps, selected, strict=True))
    return DistillationRow(StudentRow(name, tuple(range(20)), steps, spans), contexts, None)


# -- by hand


def test_a_step_with_several_items_counts_for_each_and_one_without_for_none() -> None:
    rows = [
        row("a#0", ((1, 3), (5, 6)), (("p1", "p2"), ())),
        row("a#1", ((2, 6),), (("p1",),)),
        row("b#0", ((1, 2),), (("p2", "p2"),)),
    ]
    found = sums(rows, [(0.5, 0.25), (1.0,), (2.0,)])
    assert found == {
        ALL: {"a": Sums(3, 7, 2 * 0.5 + 0.25 + 4 * 1.0), "b": Sums(1, 1, 2.0)},
        "p1": {"a": Sums(2, 6, 2 * 0.5 + 4 * 1.0)},
        "p2": {"a": Sums(1, 2, 1.0), "b": Sums(1, 1, 2.0)},
        NONE: {"a": Sums(1, 1, 0.25)},
    }
    measurement = Measurement("c", None, found)
    assert measurement.mean("p1") == pytest.approx(5.0 / 6)
    assert measurement.mean() == pytest.approx(7.25 / 8)
    assert measurement.mean("absent") is None


def test_shares_by_hand() -> None:
    one = Internalized("p", 1, "", 3, 30, before=0.08, after=0.02, now=0.01, interval=None)
    assert one.share == pytest.approx(0.75)
    assert one.share_now == pytest.approx(0.875)
    assert replace(one, after=0.16).share == pytest.approx(-1.0), "it moved away"
    assert replace(one, now=None).share_now is None
    nothing = replace(one, before=1e-9, after=0.001)
    assert (nothing.share, nothing.share_now) == (None, None), "of rounding noise there is no share"


def test_the_interval_covers_the_share_and_needs_two_tasks() -> None:
    before = {str(t): Sums(1, 10, 1.0 + t % 3) for t in range(40)}
    after = {task: replace(one, nats=one.nats * (0.2 if int(task) % 2 else 0.4)) for task, one in before.items()}
    share = 1 - sum(one.nats for one in after.values()) / sum(one.nats for one in before.values())
    found = audit._interval(before, after)
    assert found is not None
    assert 0.6 < found[0] < share < found[1] < 0.8
    assert audit._interval(before, after) == found, "the same every time"
    assert audit._interval({"a": before["0"]}, after) is None
    assert audit._interval(before, before) == (0.0, 0.0)
    assert audit._interval({task: replace(one, nats=0.0) for task, one in before.items()}, after) is None


# -- the trainer as the oracle


def test_before_is_where_the_training_curve_begins(made: Store, measured: audit.Audit) -> None:
    curve = artifact(made, "adapter").frame("curve.parquet")
    assert curve.height == 4, "one batch an epoch"
    [everything] = [one for one in measured.items if one.item == ALL]
    assert everything.before == pytest.approx(curve["divergence"][0], rel=1e-3)
    assert everything.tokens == curve["action_tokens"][0]
    assert everything.after < curve["divergence"][-1], "the last update came after the last point"
    assert 0 < everything.after < everything.before
    assert everything.interval is not None
    assert everything.share is not None
    assert everything.interval[0] <= everything.share <= everything.interval[1]


@pytest.fixture(scope="module")
def sharp(small_lineage: Store, tmp_path_factory: pytest.TempPathFactory) -> tuple[Experiment, Store]:
    """The same, trained on the teacher at temperature 0.5."""
    changed = AUDITED | {"distillation": DISTILLATION | {"teacher_temperature": 0.5}}
    experiment = Experiment.model_validate(changed)
    store = copy_of(small_lineage, tmp_path_factory.mktemp("sharp") / "store")
    for step in ("policy", "trajectories", "experience", "contexts", "adapter"):
        run_step(step, experiment, 1, store)
    return experiment, store


def test_the_teacher_is_the_one_that_was_trained_on(sharp: tuple[Experiment, Store], measured: audit.Audit) -> None:
    experiment, store = sharp
    found = audit.measure(experiment, store)
    [everything] = [one for one in found.items if one.item == ALL]
    curve = artifact(store, "adapter").frame("curve.parquet")
    assert everything.before == pytest.approx(curve["divergence"][0], rel=1e-3)
    assert everything.before > measured.items[0].before, "it is surer than at temperature 1"
    assert {one["teacher_temperature"] for one in audit.to_dict(found)["items"]} == {0.5}
    names = {path.name for path in (store.root / "cache" / "audit").iterdir()}
    assert names == {
        f"{artifact(store, 'contexts').digest}-{of}-0.5.json" for of in ("base", artifact(store, "adapter").digest)
    }
    console = Console(width=200)
    with console.capture() as told:
        console.print(audit.render(found))
    assert "at temperature 0.5" in told.get()


def test_a_student_that_equals_the_teacher_it_was_trained_on_has_all_of_it(
    sharp: tuple[Experiment, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment, store = sharp
    store = copy_of(store, tmp_path / "store")
    shutil.rmtree(store.root / "cache" / "audit", ignore_errors=True)
    stored = load_contexts(artifact(store, "contexts").path)
    taught = sharpened(stored, 0.5)

    def divergences(model: Any, rows: list[DistillationRow]) -> list[tuple[float, ...]]:
        """The student is the teacher at temperature 1 before training, and the one that was trained on after."""
        return [by_step(*pair) for pair in zip(rows, taught if hasattr(model, "peft_config") else stored, strict=True)]

    monkeypatch.setattr("evolve_dag.distillation.batch.step_divergences", divergences)
    found = audit.measure(experiment, store).items
    assert found[0].before > 0
    assert [one.share for one in found if one.item != NONE] == [pytest.approx(1.0, abs=1e-6)] * (len(found) - 1)


def test_items_add_up_to_what_the_contexts_hold(made: Store, measured: audit.Audit) -> None:
    rows = load_contexts(artifact(made, "contexts").path)
    steps = [context for one in rows for context in one.contexts]
    by_item = {one.item: one for one in measured.items}
    assert by_item[ALL].steps == len(steps)
    assert by_item[NONE].steps == sum(not context.selected for context in steps)
    items = set(by_item) - {ALL, NONE}
    assert items
    for item in items:
        assert by_item[item].steps == sum(item in context.selected for context in steps)
        assert (
            by_item[item].text
            == dict(artifact(made, "experience").frame("items.parquet").select("id", "text").iter_rows())[item]
        )
    assert by_item[NONE].before == pytest.approx(0.0, abs=1e-5), "without an item teacher and student are one"
    assert by_item[NONE].share is None
    assert measured.items[0].item == ALL


def test_an_adapter_that_changes_nothing_took_over_nothing(made: Store, experiment: Experiment, tmp_path: Path) -> None:
    from evolve_dag.distillation.adapter import attach, save_adapter
    from evolve_dag.distillation.trainer import load_model
    from evolve_dag.inference.folders import POCKET

    shutil.copytree(made.root, tmp_path / "store")
    store = Store(tmp_path / "store")
    config, inputs = {"nothing": True}, dict(artifact(made, "adapter").inputs)
    digest = Store.digest_of("adapter", "1", config, inputs)
    with store.build("adapter", digest, code_version="1", config=config, inputs=inputs) as build:
        save_adapter(attach(load_model(POCKET), rank=4, alpha=8, seed=1), build.path)  # its B is 0
    store.set_ref("audited", 1, "adapter", digest)
    for one in audit.measure(experiment, store).items:
        assert one.after == pytest.approx(one.before, abs=1e-6)
        if one.share is not None:
            assert one.share == pytest.approx(0.0, abs=1e-3)


def test_what_is_measured_is_kept_and_not_measured_again(
    made: Store, measured: audit.Audit, experiment: Experiment, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = made.root / "cache" / "audit"
    contexts, adapter = artifact(made, "contexts").digest, artifact(made, "adapter").digest
    assert {p.name for p in folder.iterdir()} == {f"{contexts}-base.json", f"{contexts}-{adapter}.json"}

    def refuse(*_: Any) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr(audit, "_measure", refuse)
    assert audit.measure(experiment, made) == measured
    assert audit.read(made, "audited") == measured
    assert all(math.isfinite(one.before) for one in measured.items)


def test_a_torn_measurement_is_made_anew(made: Store, measured: audit.Audit, experiment: Experiment, tmp_path: Path) -> None:
    shutil.copytree(made.root, tmp_path / "store")
    store = Store(tmp_path / "store")
    path = next((store.root / "cache" / "audit").glob("*-base.json"))
    path.write_text(path.read_text()[:40])
    assert audit.read(store, "audited").items == ()
    assert "evolve audit audited" in audit.read(store, "audited").notes[0]
    said: list[str] = []
    again = audit.measure(experiment, store, said.append)
    assert len(said) == 1
    assert "the base policy" in said[0]
    for old, new in zip(measured.items, again.items, strict=True):
        assert (old.item, old.steps) == (new.item, new.steps)
        assert old.before == pytest.approx(new.before, abs=1e-7)


def test_another_base_model_and_an_unknown_experiment_are_refused(
    made: Store, measured: audit.Audit, experiment: Experiment, tmp_path: Path
) -> None:
    shutil.copytree(made.root, tmp_path / "store")
    shutil.rmtree(tmp_path / "store" / "cache")
    other = Experiment.model_validate(AUDITED | {"models": {"policy": {"dtype": "bfloat16"}}})
    with pytest.raises(ConfigError, match="another base model"):
        audit.measure(other, Store(tmp_path / "store"))
    with pytest.raises(OrderError, match="has not been run"):
        audit.read(made, "nobody")


def test_iterations_of_another_definition_are_not_the_lineages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file was changed, and iteration 1 has been made anew: 2 and 3 are of what it was before."""
    fake_steps(monkeypatch)
    store = Store(tmp_path)
    run(quick(), store)
    whole = [(one.number, one.now) for one in audit._iterations(store, "quick")]
    assert [number for number, _ in whole] == [1, 2, 3]
    run(quick(distillation={"epochs": 7}), store, 1)
    [(number, now)] = [(one.number, one.now) for one in audit._iterations(store, "quick")]
    assert number == 1
    assert now not in {old for _, old in whole}, "the adapter of the new iteration 1"
    assert audit.read(store, "quick").notes == ("iteration 1 is not measured: evolve audit quick",)


def test_what_is_not_trained_yet_is_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_steps(monkeypatch)
    run_step("policy", quick(), 1, Store(tmp_path))
    assert audit.read(Store(tmp_path), "quick").notes == ("no iteration is trained yet: there is nothing to audit",)


def test_the_command_prints_a_table_and_json(made: Store, measured: audit.Audit, tmp_path: Path) -> None:
    (tmp_path / "audited.yaml").write_text(json.dumps(AUDITED))
    table = CliRunner().invoke(cli.app, ["audit", str(tmp_path / "audited.yaml"), "--store", str(made.root)])
    assert table.exit_code == 0, table.output
    assert "inside" in table.output
    told = json.loads(
        CliRunner().invoke(cli.app, ["audit", str(tmp_path / "audited.yaml"), "--json", "--store", str(made.root)]).output
    )
    assert told["items"][0]["item"] == "all steps"
    assert told["items"][0]["before"] == measured.items[0].before


# -- what the report and the audit page make of it


def test_the_summary_and_the_report_show_it(made: Store, measured: audit.Audit, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly */")
    summary = summarize(made, "audited")
    assert summary.rows[-1].internalized == measured.items
    told = status_json(summary)["iterations"][-1]["internalized"]
    assert set(told) == {one.item for one in measured.items if one.item}
    html = report.render([summary])
    assert "Inside the weights now" in html
    assert "Not measured yet" not in html
    assert "evolve audit audited" in html, "how to reproduce it"
    without = replace(summary, rows=tuple(replace(one, internalized=()) for one in summary.rows))
    assert "Not measured yet: <code>evolve audit audited</code>" in report.render([without])


def test_what_an_item_did_is_counted_from_the_rows(made: Store, measured: audit.Audit) -> None:
    facts = principles.gather(made, "audited")
    [chain] = facts.chains
    contexts, scores = artifact(made, "contexts"), artifact(made, "scores")
    learned = contexts.frame("contexts.parquet")
    rolled = contexts.frame("trajectories.parquet").select("id", "reward")
    steps = contexts.frame("steps.parquet").select("trajectory_id", "index", "selected")
    assert len(chain.learned) == learned["trajectory_id"].n_unique()
    assert sum(len(one.steps) for one in chain.learned) == learned.height
    assert len(chain.scores) == scores.frame("scores.parquet").filter(pl.col("condition").is_in(["with", "without"])).height
    assert facts.principles
    for one in facts.principles:
        seen = steps.filter(pl.col("selected").list.contains(one.item.id))
        if seen.height == 0:
            continue
        [teacher] = [c for c in one.contrasts[1] if c.where == "teacher"]
        assert (teacher.steps, teacher.of) == (seen.height, steps.height)
        chosen = rolled.filter(pl.col("id").is_in(seen["trajectory_id"].unique().to_list()))
        other = rolled.filter(~pl.col("id").is_in(seen["trajectory_id"].unique().to_list()))
        assert teacher.chosen.episodes == chosen.height
        assert teacher.chosen.success == pytest.approx(chosen["reward"].mean())
        assert teacher.other.episodes == other.height
        assert teacher.other.success == (pytest.approx(other["reward"].mean()) if other.height else None)
        assert [state.value for state in one.states if state.feature in one.item.condition] == [
            one.item.condition[state.feature] for state in one.states if state.feature in one.item.condition
        ], "the state selector chooses where the condition holds"
        assert one.internalized == tuple(found for found in measured.items if found.item == one.item.id)
    taught = {name for one in facts.principles for edit in one.edits for name in edit.trajectory_ids[: principles.TAUGHT]}
    assert set(chain.taught) == taught


def test_every_link_of_the_audit_page_leads_somewhere(made: Store, measured: audit.Audit, tmp_path: Path) -> None:
    import re

    path = report.write_report([summarize(made, "audited")], tmp_path / "report.html", store=made)
    assert 'href="audited~audit.html"' in path.read_text(encoding="utf-8")
    html = (tmp_path / "audited~audit.html").read_text(encoding="utf-8")
    anchors = set(re.findall(r'\bid="([^"]+)"', html))
    targets = re.findall(r'href="#([^"]+)"', html)
    assert targets
    assert set(targets) <= anchors
    assert 'href="report.html"' in html
    assert sorted(p.name for p in tmp_path.iterdir()) == ["audited~audit.html", "report.html"]
    assert not re.search(r"https?://|\bsrc=|<link", html)
    facts = principles.gather(made, "audited")
    item = facts.principles[0]
    card = html[html.index('id="item-0"') :]
    assert item.item.text in card[:2000]
    assert 'href="#taught-1-0"' in html, "an item leads to what taught it"
    assert re.search(r'id="taught-1-0">.*?href="#item-\d', html), "and back"


def test_text_of_artifacts_stays_text(made: Store, measured: audit.Audit) -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)> {{figures}} &"
    facts = principles.gather(made, "audited")
    [chain] = facts.chains
    step = principles.ShownStep(0, evil, evil, (evil,))
    shown = principles.Shown(evil, evil, evil, 1.0, evil, (step,))
    edit = PoolEdit("merge", evil, 1, evil, evil, evil, (evil,), into=evil)
    item = replace(facts.principles[0].item, id=evil, text=evil, evidence={evil: 1.0}, granularity=evil)  # type: ignore[arg-type]
    state = principles.State(evil, evil, 1.0, 0.1)
    one = replace(facts.principles[0], item=item, edits=(edit,), states=(state,))
    hostile = replace(
        chain,
        decision=evil,
        reasons=(evil,),
        learned=(shown,),
        scores=(principles.ScoreRow("with", evil, 0.5, True, shown), principles.ScoreRow("without", evil, None, False, None)),
        taught={evil: shown},
        artifacts={**chain.artifacts, "contexts": ("d", {"kept": evil}), "experience": ("d", {"items": evil})},
    )
    html = audit_page.page(principles.Facts(evil, (one,), (hostile,), (evil,)), report=evil)
    assert "<script>alert" not in html
    assert "<img" not in html
    assert "&lt;img src=x" in html
    assert html.count("</script>") == 4
    assert "{{figures}}" in html


def test_an_episode_reads_as_a_transcript(made: Store, measured: audit.Audit) -> None:
    facts = principles.gather(made, "audited")
    chain = facts.chains[0]
    steps = next(row.shown for row in chain.scores if row.shown and len(row.shown.steps) > 1).steps
    assert steps[0].action.startswith(("search(query: ", "visit(page: "))
    assert "<tool_call>" not in steps[0].thought
    assert steps[-1].action.startswith("answer: ")
    refused = principles.ShownStep(0, "Look. <tool_call>{}", None, (), problem="the call has no name")
    shown = replace(chain.scores[0].shown, steps=(refused,), reward=0.4, status="ended")  # type: ignore[type-var]
    scored = (replace(chain.scores[0], shown=shown, reward=0.4), replace(chain.scores[0], reward=1.0))
    html = audit_page.page(replace(facts, chains=(replace(chain, scores=scored),)))
    assert "refused: the call has no name" in html
    assert "ended, 0.40 of 1" in html
    assert f"{chain.scores[0].condition} experience in context: mean reward 0.70 of 1, 1 of 2 with all of it" in html


def test_long_tables_are_cut_and_old_iterations_are_told_in_short(
    made: Store, measured: audit.Audit, monkeypatch: pytest.MonkeyPatch
) -> None:
    facts = principles.gather(made, "audited")
    monkeypatch.setattr(audit_page, "ROWS", 2)
    html = audit_page.page(facts)
    assert f"and {len(facts.chains[0].learned) - 2} more" in html
    assert "evolve trace" in html
    monkeypatch.setattr(audit_page, "NEWEST", 1)
    two = replace(facts, chains=(facts.chains[0], replace(facts.chains[0], iteration=2)))
    assert "Rows are listed for the 1 newest iterations" in audit_page.page(two)
