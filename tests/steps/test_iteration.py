"""A whole iteration through the real steps: small, but with the real policy, world, trainer and store."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from small_lineage import SMALL, copy_of, small

from evolve_dag.distillation import checkpoint
from evolve_dag.distillation.dataset import load_contexts
from evolve_dag.distillation.launch import Request, train
from evolve_dag.errors import DataError, OrderError, StoreError
from evolve_dag.experience.pool import Pool
from evolve_dag.inference.roles import Roles
from evolve_dag.plain import STEP_HEADING
from evolve_dag.steps import adapter, experience
from evolve_dag.steps.base import STEP_ORDER, entering_policy, resolve, resolve_iteration, run_step, settings_digest
from evolve_dag.steps.body import Silent, StepContext
from evolve_dag.steps.contexts import RETENTION
from evolve_dag.steps.experience import MINED
from evolve_dag.steps.policies import open_pool, trainings
from evolve_dag.store.artifacts import Store
from evolve_dag.store.frames import load_trajectories, scores_from_frame


@pytest.fixture(scope="module")
def made(small_lineage: Store, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store that holds one iteration of ``small``."""
    return copy_of(small_lineage, tmp_path_factory.mktemp("made") / "store")


@pytest.fixture
def copied(made: Store, tmp_path: Path) -> Store:
    return copy_of(made, tmp_path / "store")


def test_a_second_run_makes_nothing(made: Store) -> None:
    before = {p: p.stat().st_mtime_ns for p in (made.root / "objects").rglob("*") if p.is_file()}
    for step in STEP_ORDER:
        assert not run_step(step, small(), 1, made).recomputed
    assert {p: p.stat().st_mtime_ns for p in (made.root / "objects").rglob("*") if p.is_file()} == before


def test_the_policy_of_the_next_iteration_is_committed_with_the_promotion(made: Store) -> None:
    promoted = made.ref("small", 1, "promotion")
    assert promoted is not None
    decision = made.open("promotion", promoted.digest).json("decision.json")
    following = entering_policy(small(), 2, made)
    assert made.ref("small", 2, "policy") is not None
    assert following.adapter == decision["policy"]["adapter"]
    if decision["decision"] == "promote":
        assert following.adapter == made.ref("small", 1, "adapter").digest


def test_an_iteration_needs_the_promotion_before_it(made: Store) -> None:
    with pytest.raises(OrderError, match=r"materialize promotion\[small\|02\] first"):
        run_step("trajectories", small(), 3, made)
    assert resolve("adapter", small(), 3, made).missing == "promotion[small|02]"


def test_a_step_needs_what_stands_before_it(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(OrderError, match=r"policy\[small\|01\]"):
        run_step("adapter", small(), 1, store)
    assert not (tmp_path / "objects").exists()


@pytest.mark.parametrize(
    ("changes", "first"),
    [
        ({"runtime": {"threads": 2}}, None),
        ({"description": "other words"}, None),
        ({"iterations": 9}, None),
        ({"gate": {"max_turn_ratio": 3.0}}, {"promotion"}),
        ({"evaluation": {"seed": 1}}, {"scores"}),
        ({"distillation": {"learning_rate": 2e-3}}, {"adapter"}),
        ({"regime": {"divergence": "jsd"}}, {"adapter"}),
        ({"regime": {"refused": True}}, {"contexts"}),
        ({"selection": {"selector": "lexical"}}, {"contexts", "scores"}),
        ({"injection": "global"}, {"contexts", "scores"}),
        ({"extraction": {"cap": 5}}, {"experience"}),
        ({"granularity": "instance"}, {"experience"}),
        ({"evaluation": {"bootstrap": 500}}, {"scores"}),
        ({"rollout": {"max_steps": 9}}, {"trajectories", "contexts", "scores"}),
        ({"seed": 5}, {"trajectories", "experience", "contexts", "adapter", "promotion"}),
        ({"models": {"policy": {"dtype": "bfloat16"}}}, {"policy"}),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, dict) else None,
)
def test_a_key_touches_the_steps_that_read_it_and_what_follows(made: Store, changes: dict, first: set[str] | None) -> None:
    old, new = small(), small(**changes)
    read = {step for step in STEP_ORDER if settings_digest(step, old) != settings_digest(step, new)}
    assert read == (first or set())
    before, after = (resolve_iteration(e, 1, made) for e in (old, new))
    touched = {step for step in STEP_ORDER if before[step].digest != after[step].digest}
    if first is None:
        assert not touched
    else:
        expected = set(read)
        for step in STEP_ORDER:  # in order, so that what follows follows
            expected |= {step} if expected & set(before[step].inputs) else set()
        assert touched == expected


def test_an_engine_that_is_asked_for_less_than_the_model_allows_is_another_policy(tmp_path: Path) -> None:
    def digest(**policy: Any) -> str | None:
        changes = {
            "models": {"policy": {"backend": "vllm", "path": "pocket", **policy}},
            "rollout": {"max_tokens": 256, "max_action_tokens": 32},
        }
        return resolve("policy", small(**changes), 1, Store(tmp_path)).digest

    # The model allows 2,048 tokens. An episode that comes to the engine's limit ends there, so a higher one plays it anew.
    assert len({digest(context_tokens=tokens) for tokens in (1024, 1500, 2048)}) == 3
    assert digest(context_tokens=2048) == digest(context_tokens=4096)
    servers = ["http://127.0.0.1:1/v1"]  # have a limit of their own
    assert digest(context_tokens=1024, servers=servers) == digest(context_tokens=2048)


def test_stored_histories_hold_no_experience_and_rows_hold_the_sampled_ids(made: Store) -> None:
    artifact = made.open("contexts", made.ref("small", 1, "contexts").digest)
    trajectories = {t.id: t for t in load_trajectories(artifact)}
    rows = load_contexts(artifact.path)
    assert rows
    assert any(step.injected for t in trajectories.values() for step in t.steps)
    for row in rows:
        trajectory = trajectories[row.row.trajectory_id]
        assert trajectory.reward == 1.0
        assert all(STEP_HEADING not in message.content for message in trajectory.history(trajectory.turns))
        for step, (start, end) in zip(row.row.steps, row.row.spans, strict=True):
            assert row.row.ids[start:end] == trajectory.steps[step].token_ids


def test_retention_rows_hold_the_experience_and_the_same_actions(made: Store) -> None:
    from evolve_dag.environments.pocket.tokenizer import build_tokenizer
    from evolve_dag.inference.chat import ChatFormat

    artifact = made.open("contexts", made.ref("small", 1, "contexts").digest)
    trajectories = {t.id: t for t in load_trajectories(artifact)}
    rows = load_contexts(artifact.path / RETENTION)
    with_item = sum(bool(c.injected) for row in load_contexts(artifact.path) for c in row.contexts)
    assert 0 < len(rows) < with_item
    chat = ChatFormat.from_tokenizer(build_tokenizer())
    for row in rows:
        name, _, number = row.row.trajectory_id.rpartition("@")
        step = trajectories[name].steps[int(number)]
        [(start, end)] = row.row.spans
        assert end == len(row.row.ids)
        assert row.row.ids[start:end] == step.token_ids
        assert step.injected
        assert step.injected.strip() in chat.decode(row.row.ids[:start])
        assert len(row.teacher) == len(step.token_ids)


def test_scores_say_under_which_condition_and_hold_every_task(made: Store) -> None:
    artifact = made.open("scores", made.ref("small", 1, "scores").digest)
    scores = scores_from_frame(artifact.frame("scores.parquet"))
    held_out = {"base", "base_at_0", "base_at_0.5", "without", "with", "greedy", "ceiling"}
    assert {s.condition for s in scores} == held_out | {"development_candidate", "development_best"}
    for condition in held_out:
        assert len([s for s in scores if s.condition == condition]) == 6, "the rollout's own temperature is `base` itself"
    assert set(artifact.json("summary.json")) == {s.condition for s in scores}
    by_id = {t.id: t for t in load_trajectories(artifact)}
    read = {c: sum(bool(s.injected) for t in by_id.values() if t.id.startswith(f"{c}/") for s in t.steps) for c in held_out}
    assert {c for c, steps in read.items() if steps} == {"with", "ceiling"}, "only these two have experience in context"


def test_the_base_policy_is_read_at_every_temperature(made: Store) -> None:
    from evolve_dag.reporting.summary import status_json, summarize

    summary = summarize(made, "small")
    base, first = summary.rows
    assert list(base.at_temperature) == [0.0, 0.5, 1.0]
    assert base.at_temperature[1.0] is base.without
    assert base.at_temperature[0.0] is base.greedy
    assert first.ceiling is not None
    assert "success by temperature: 0 " in summary.base_by_temperature
    shown = status_json(summary)["iterations"]
    assert set(shown[0]["at_temperature"]) == {"0", "0.5", "1"}
    assert shown[1]["ceiling"]["n"] == 6


def test_other_intervals_need_no_other_episodes(copied: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    before = copied.open("scores", resolve("scores", small(), 1, copied).digest)
    finer = small(evaluation=SMALL["evaluation"] | {"bootstrap": 300})
    monkeypatch.setattr("evolve_dag.steps.scores.roll_out_together", None)
    after = run_step("scores", finer, 1, copied).artifact
    assert after.digest != before.digest
    assert load_trajectories(after) == load_trajectories(before)
    assert after.frame("scores.parquet").equals(before.frame("scores.parquet"))
    assert after.json("summary.json") != before.json("summary.json")
    assert {**after.summary} == {**before.summary}
    monkeypatch.undo()
    (copied.folder("scores", before.digest) / "steps.parquet").write_bytes(b"?")
    shutil.rmtree(copied.folder("scores", after.digest))
    again = run_step("scores", finer, 1, copied).artifact  # a damaged twin is none: the episodes are sampled anew
    assert again.frame("scores.parquet").drop("seconds", strict=False).height == after.frame("scores.parquet").height


def test_a_broken_adapter_is_declined_and_the_champion_stays(copied: Store) -> None:
    """A learning rate that wrecks the policy: the gate keeps the champion and the loop can go on."""
    # It babbles to the end of every episode, so few of them are asked for.
    wrecked = small(
        distillation={"epochs": 2, "learning_rate": 0.3, "warmup_steps": 0},
        tasks=SMALL["tasks"] | {"development": {"count": 24, "world": 22}, "held_out": {"count": 1, "world": 32}},
        evaluation={"bootstrap": 200, "greedy": False},
    )
    for step in STEP_ORDER:
        outcome = run_step(step, wrecked, 1, copied)
    decision = outcome.artifact.json("decision.json")
    assert decision["decision"] == "keep"
    assert decision["reasons"]
    assert entering_policy(wrecked, 2, copied).adapter is None
    assert resolve("trajectories", wrecked, 2, copied).missing is None
    declined = open_pool(copied.open("experience", resolve("experience", wrecked, 1, copied).digest))
    assert declined.next_number > 1
    # The declined pool is gone, but its ids stay in the record: the next iteration must not give them again.
    assert entering_policy(wrecked, 2, copied).next_item == declined.next_number


def test_without_any_experience_nothing_is_sampled_for_it_and_nothing_trained(copied: Store) -> None:
    """Teacher and student are one then, and Adam would turn rounding noise into full steps."""
    silent = small(extraction={"min_support": 10_000})
    made = {step: run_step(step, silent, 1, copied).artifact for step in STEP_ORDER}
    assert (made["contexts"].summary["trajectories"], made["contexts"].summary["tokens"]) == (0, 0)
    assert made["adapter"].summary["unchanged"]
    assert made["adapter"].summary["note"] == "no experience stood in any context"
    scores = made["scores"].json("summary.json")
    assert scores["development_candidate"] == scores["development_best"]
    assert "with" not in scores


def test_a_night_that_changed_nothing_takes_its_held_out_episodes_over(copied: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same policy under the same draws: the scores are those that playing again would give."""
    silent = small(extraction={"min_support": 10_000})
    for iteration in (1, 2):
        made = {step: run_step(step, silent, iteration, copied).artifact for step in STEP_ORDER}
    first = copied.ref("small", 1, "scores")
    assert first is not None
    assert made["promotion"].json("decision.json")["policy"]["adapter"] is not None, "by name it is another adapter"
    assert made["scores"].summary["of"] == {"without": None, "greedy": None}
    assert made["scores"].summary["taken_over"] == {"without": first.digest, "greedy": first.digest}
    told = ("scores.parquet", "summary.json")
    taken = [(made["scores"].path / name).read_bytes() for name in told]
    shutil.rmtree(made["scores"].path)
    monkeypatch.setattr(Store, "ref", lambda *args: None)
    again = run_step("scores", silent, 2, copied).artifact
    assert "taken_over" not in again.summary
    assert [(again.path / name).read_bytes() for name in told] == taken


def test_the_base_policy_is_played_once_for_all_lineages_that_begin_with_it(
    copied: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the arms of a study do, whatever they do with experience; which episodes come out does not change by it."""
    # Of three temperatures, one is asked for by nobody else.
    evaluation = SMALL["evaluation"] | {"base_temperatures": [0, 0.5, 0.8]}
    start_pool = str(Path(__file__).parents[2] / "configs/textworld/coin.json")  # a pool is no part of who plays without one
    arm = small(
        experiment="arm",
        seed=9,
        injection="none",
        start_pool=start_pool,
        extraction={"min_support": 10_000},
        evaluation=evaluation,
    )
    for step in STEP_ORDER:
        made = run_step(step, arm, 1, copied).artifact
    first = copied.ref("small", 1, "scores")
    assert first is not None
    taken = copied.open("scores", copied.ref("arm", 1, "scores").digest)
    base = {name for name in taken.summary["conditions"] if name.startswith("base")}
    assert base == {"base", "base_at_0", "base_at_0.5", "base_at_0.8"}
    assert taken.summary["taken_over"] == dict.fromkeys(base - {"base_at_0.8"} | {"development_best"}, first.digest)
    kept = [(taken.path / name).read_bytes() for name in ("scores.parquet", "summary.json")]
    shutil.rmtree(taken.path)
    monkeypatch.setattr(Store, "refs", lambda *args: [])
    again = run_step("scores", arm, 1, copied).artifact
    assert "taken_over" not in again.summary
    assert [(again.path / name).read_bytes() for name in ("scores.parquet", "summary.json")] == kept
    assert made.kind == "promotion"


@pytest.mark.parametrize(
    "other",
    [
        {"evaluation": SMALL["evaluation"] | {"seed": 3}},
        {"rollout": {"temperature": 0.7}},
        {"verification": {"kind": "contains"}},
    ],
)
def test_who_plays_otherwise_takes_nothing_over(copied: Store, other: dict[str, Any]) -> None:
    arm = small(experiment="arm", extraction={"min_support": 10_000}, **other)
    for step in STEP_ORDER[: STEP_ORDER.index("scores") + 1]:
        made = run_step(step, arm, 1, copied).artifact
    assert "base" in made.summary["conditions"]
    assert "taken_over" not in made.summary


def test_the_learning_rate_falls_with_trainings_not_with_nights(copied: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    promoted, asked = copied.ref("small", 1, "adapter"), []
    assert promoted is not None
    assert (trainings(copied, None), trainings(copied, promoted.digest)) == (0, 1)

    def note(request: Request, *rest: Any, **more: Any) -> Any:
        asked.append(request.training)
        return train(request, *rest, **more)

    monkeypatch.setattr(adapter, "train", note)
    for step in STEP_ORDER[: STEP_ORDER.index("adapter") + 1]:
        run_step(step, small(), 2, copied)
    entered = entering_policy(small(), 2, copied).adapter
    assert asked == [1 + trainings(copied, entered)]
    asked.clear()
    silent = small(extraction={"min_support": 10_000})
    for iteration in (1, 2):
        for step in STEP_ORDER:
            run_step(step, silent, iteration, copied)
    assert asked == [1, 1], "a night that had nothing to learn is no training"


def test_a_placebo_pool_is_injected_and_mining_goes_on_from_the_mined_one(copied: Store, tmp_path: Path) -> None:
    disguised = small(extraction=SMALL["extraction"] | {"placebo": True})
    for step in STEP_ORDER[:3]:
        artifact = run_step(step, disguised, 1, copied).artifact
    mined = open_pool(copied.open("experience", copied.ref("small", 1, "experience").digest), MINED)
    pool = open_pool(artifact)
    plain = open_pool(copied.open("experience", resolve("experience", small(), 1, copied).digest))
    assert [item.text for item in mined.items] == [item.text for item in plain.items] != []
    assert pool.ids == mined.ids
    assert not {item.text for item in pool.items} & {item.text for item in mined.items}
    assert [e["after"] for e in artifact.frame("edits.parquet").to_dicts()] == [item.text for item in pool.items]

    (tmp_path / "two").mkdir()
    build = SimpleNamespace(path=tmp_path / "two", note=lambda **_: None)
    entering = replace(entering_policy(disguised, 1, copied), experience=artifact.digest, next_item=pool.next_number)
    inputs = {"trajectories": copied.open("trajectories", resolve("trajectories", disguised, 1, copied).digest)}
    with Roles(disguised) as roles:
        experience.run(StepContext(disguised, 2, copied, inputs, build, Silent(), entering, roles))
    again, kept = (Pool.from_json((tmp_path / "two" / name).read_text()) for name in (MINED, "pool.json"))
    common = set(again.ids) & set(mined.ids)
    assert common
    for item_id in common:
        assert again.get(item_id).text == mined.get(item_id).text
        assert again.get(item_id).updated == 2, "the miner knows its own lesson again"
        assert kept.get(item_id).text == pool.get(item_id).text, "an item keeps its placebo"


def test_plain_fine_tuning_on_own_successes_needs_no_teacher(copied: Store) -> None:
    plain = {"injection": "none", "regime": {"divergence": "cross_entropy", "rejection": True}}
    for step in STEP_ORDER[:5]:
        outcome = run_step(step, small(**plain), 1, copied)
    contexts = copied.open("contexts", outcome.artifact.inputs["contexts"])
    assert outcome.artifact.summary["rows"] == contexts.summary["kept"] > 0
    assert contexts.summary["items_per_step"] == 0
    assert all(row.teacher is None for row in load_contexts(contexts.path))


def test_cross_entropy_learns_retention_rows_too(copied: Store) -> None:
    for step in STEP_ORDER[:5]:
        outcome = run_step(step, small(regime={"divergence": "cross_entropy"}), 1, copied)
    contexts = copied.open("contexts", outcome.artifact.inputs["contexts"])
    assert contexts.summary["retention"] > 0
    assert outcome.artifact.summary["rows"] == contexts.summary["kept"] + contexts.summary["retention"]


@pytest.mark.parametrize(
    ("kind", "name", "reader"),
    [
        ("adapter", "adapter_model.safetensors", "scores"),
        ("trajectories", "steps.parquet", "experience"),
        ("experience", "pool.json", "contexts"),
    ],
)
def test_a_corrupt_artifact_is_named_with_its_remedy(copied: Store, kind: str, name: str, reader: str) -> None:
    path = copied.open(kind, copied.ref("small", 1, kind).digest).path / name
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2] + b"?" + content[len(content) // 2 + 1 :])
    changes = {
        "scores": {"evaluation": {"seed": 9}},
        "experience": {"extraction": {"cap": 4}},
        "contexts": {"selection": {"max_items": 2}},
    }
    objects = sorted((copied.root / "objects").rglob("manifest.json"))
    with pytest.raises(StoreError, match=name) as caught:
        run_step(reader, small(**(SMALL | changes[reader])), 1, copied)
    assert caught.value.remedy
    assert sorted((copied.root / "objects").rglob("manifest.json")) == objects


def test_bad_tasks_leave_the_store_untouched(tmp_path: Path) -> None:
    page = {"title": "city Beli Zuto", "text": "mayor: person Zali Zeto"}
    (tmp_path / "pages.jsonl").write_text(json.dumps(page) + "\n")
    good = json.dumps({"question": "What is the mayor of city Beli Zuto?", "answer": "Zali Zeto"})
    (tmp_path / "train.jsonl").write_text(f'{good}\n{{"question": "half\n')
    for name in ("development", "held_out"):
        (tmp_path / f"{name}.jsonl").write_text(good.replace("mayor", name) + "\n")
    tasks = {name: {"path": str(tmp_path / f"{name}.jsonl")} for name in ("train", "development", "held_out")}
    experiment = small(environment={"kind": "corpus", "pages": str(tmp_path / "pages.jsonl")}, tasks=tasks)
    store = Store(tmp_path / "store")
    run_step("policy", experiment, 1, store)
    with pytest.raises(DataError, match="line 2"):
        run_step("trajectories", experiment, 1, store)
    assert [a.kind for a in store.artifacts()] == ["policy"]


RUN = """
import sys
from pathlib import Path
from evolve_dag.config.schema import Experiment
from evolve_dag.steps.base import STEP_ORDER, run_step
from evolve_dag.store.artifacts import Store
experiment = Experiment.model_validate_json(sys.argv[1])
for step in STEP_ORDER:
    run_step(step, experiment, 1, Store(sys.argv[2]))
"""


@pytest.mark.parametrize(
    ("step", "journal"), [("trajectories", "rollouts"), ("contexts", "teacher_rollouts"), ("scores", "without")]
)
def test_kill_at_any_moment_then_the_same_digests_and_nothing_done_twice(
    made: Store, tmp_path: Path, step: str, journal: str
) -> None:
    # Few episodes at a time, so that there is a middle to be killed in; the other steps are there.
    experiment = small(runtime={"threads": 1, "concurrency": 8})
    store = copy_of(made, tmp_path / "store")
    artifact = store.folder(step, made.ref("small", 1, step).digest)
    shutil.rmtree(artifact)
    command = [sys.executable, "-c", RUN, experiment.model_dump_json(), str(store.root)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment)
    try:
        deadline = time.monotonic() + 600
        files: list[Path] = []
        while not (files and len(files[0].read_bytes().splitlines()) >= 3):
            assert process.poll() is None, "finished before it could be killed"
            assert time.monotonic() < deadline, "never got there"
            time.sleep(0.01)
            files = list(store.root.glob(f"work/{step}/*/journals/{journal}*.jsonl"))  # the scores say whose they are, too
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    lines = files[0].read_bytes().splitlines(keepends=True)
    kept = [json.loads(line) for line in lines if line.endswith(b"\n")]
    assert not artifact.exists()
    digests = {name: run_step(name, experiment, 1, store).artifact.digest for name in STEP_ORDER}
    assert digests == {name: made.ref("small", 1, name).digest for name in STEP_ORDER}
    final = {
        t.id.rpartition("/")[2]: t
        for t in load_trajectories(store.open(step, digests[step]))
        if "/" not in t.id or t.id.startswith(f"{journal}/")
    }
    for record in kept:  # a rollout that was journalled is in the artifact as it was, to the microsecond it took
        assert final[record["id"]].seconds == pytest.approx(record["seconds"], abs=1e-9)


class Interrupted(Silent):
    """Interrupts at the third unit of progress."""

    def __init__(self) -> None:
        self.units = 0

    def advance(self, n: int = 1) -> None:
        self.units += n
        if self.units == 3:
            raise KeyboardInterrupt


def test_a_training_that_was_interrupted_goes_on(made: Store, copied: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "SECONDS", 0.0)
    whole = made.open("adapter", made.ref("small", 1, "adapter").digest)
    shutil.rmtree(copied.folder("adapter", whole.digest))
    with pytest.raises(KeyboardInterrupt):
        run_step("adapter", small(), 1, copied, Interrupted())
    assert not copied.exists("adapter", whole.digest)
    again = run_step("adapter", small(), 1, copied).artifact
    assert again.manifest.resumed
    weights = "adapter_model.safetensors"
    assert again.manifest.files[weights] == whole.manifest.files[weights]
    assert set(again.manifest.files) == set(whole.manifest.files)
    assert not list((copied.root / "work").glob("adapter/*"))
