"""Every iteration takes tasks of its own, and nothing that comes later changes them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from evolve_dag.config.loading import load_experiment
from evolve_dag.config.schema import Experiment
from evolve_dag.environments.pocket.tools import STREAM_WORLDS
from evolve_dag.errors import ConfigError, DataError, OrderError
from evolve_dag.steps.base import STEP_ORDER, resolve, run_step, settings, settings_digest
from evolve_dag.store.artifacts import Store
from evolve_dag.tasks.jsonl import in_percent
from evolve_dag.tasks.streams import FILE, facts_of, of_iteration, of_lineage, read_so_far
from evolve_dag.tasks.suites import load_tasks_of


def rows(start: int, count: int) -> str:
    return "".join(
        json.dumps({"question": f"Who is {n}?", "answer": f"person {n}"}) + "\n" for n in range(start, start + count)
    )


def experiment(folder: Path, train: str, kind: str = "corpus", development: str = "{path: other.jsonl}") -> Experiment:
    (folder / "pages.jsonl").write_text('{"title": "person A", "text": "home: city B"}\n')
    (folder / "other.jsonl").write_text(rows(900, 4))
    (folder / "held.jsonl").write_text(rows(950, 4))
    body = f"""
environment: {{kind: {kind}{", pages: pages.jsonl" if kind == "corpus" else ""}}}
tasks:
  train: {train}
  development: {development if kind == "corpus" else "{count: 4, world: 2}"}
  held_out: {{{"path: held.jsonl" if kind == "corpus" else "count: 4, world: 3"}}}
"""
    path = folder / "experiment.yaml"
    path.write_text(body)
    return load_experiment(path)


def asked(found: Experiment, iteration: int) -> list[str]:
    return [task.question for task in load_tasks_of(of_iteration(found, iteration), "train")]


def test_the_pocket_world_is_a_new_one_every_iteration(tmp_path: Path) -> None:
    found = experiment(tmp_path, "{count: 5, world: 1, stream: true}", "pocket")
    assert of_iteration(found, 1).tasks.train.world == 1
    assert of_iteration(found, 4).tasks.train.world == 1 + 3 * STREAM_WORLDS
    assert not set(asked(found, 1)) & set(asked(found, 2))
    assert of_iteration(found, 4).tasks.held_out == found.tasks.held_out
    digests = [settings("trajectories", of_iteration(found, k)) for k in (1, 2)]
    assert digests[0] != digests[1]
    plain = experiment(tmp_path, "{count: 5, world: 1}", "pocket")
    assert of_iteration(plain, 7) is plain
    assert settings("trajectories", plain) == digests[0]  # the first night of a stream is the split itself


def test_worlds_of_a_stream_never_meet_another_split(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="below that"):
        experiment(tmp_path, "{count: 5, world: 20000, stream: true}", "pocket")
    (tmp_path / "x.yaml").write_text("tasks: {held_out: {count: 4, world: 3, stream: true}}\n")
    with pytest.raises(ConfigError, match="must stay the same"):
        load_experiment(tmp_path / "x.yaml")


def test_a_long_file_gives_its_next_rows_and_an_appended_row_changes_no_earlier_night(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(rows(0, 7))
    found = experiment(tmp_path, "{path: train.jsonl, count: 3, stream: true}")
    assert asked(found, 1) == ["Who is 0?", "Who is 1?", "Who is 2?"]
    assert asked(found, 3) == ["Who is 6?"]  # what is left of the last night
    before = [settings("trajectories", of_iteration(found, k)) for k in (1, 2, 3)]
    with pytest.raises(OrderError, match="no tasks left: it holds 7 rows, and this iteration begins with row 10"):
        asked(found, 4)
    with (tmp_path / "train.jsonl").open("a") as file:
        file.write(rows(7, 3))
    after = [settings("trajectories", of_iteration(found, k)) for k in (1, 2, 3)]
    assert after[:2] == before[:2]
    assert after[2] != before[2]  # nobody has made it yet: it is a longer one now
    assert asked(found, 4) == ["Who is 9?"]


def finished(store: Store, found: Experiment, iteration: int, **facts: Any) -> None:
    """A night's trajectories in the store, as :func:`run_step` leaves them; what is read is looked up behind earlier ones."""
    made = store.digest_of("trajectories", "1", {}, {})
    with store.build("trajectories", made, code_version="1", config={}, inputs={}):
        pass
    facts = facts or facts_of(found, of_lineage(found, iteration, store))
    store.set_ref("experiment", iteration, "trajectories", made, **facts)


def test_a_night_that_the_end_of_the_file_cut_short_stays_and_the_next_one_begins_behind_it(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(rows(0, 5))
    found, store = experiment(tmp_path, "{path: train.jsonl, count: 3, stream: true}"), Store(tmp_path / "store")
    before = [settings("trajectories", of_lineage(found, k, store)) for k in (1, 2)]
    for night in (1, 2, 2):  # a night that is there already is asked for once more
        finished(store, found, night)
    with pytest.raises(OrderError, match="holds 5 rows, and this iteration begins with row 6"):
        load_tasks_of(of_lineage(found, 3, store), "train")
    for more in (1, 4):
        (tmp_path / "train.jsonl").write_text(rows(0, 5 + more))
        assert [settings("trajectories", of_lineage(found, k, store)) for k in (1, 2)] == before
    nights = [[task.question for task in load_tasks_of(of_lineage(found, k, store), "train")] for k in (2, 3, 4)]
    assert nights == [["Who is 3?", "Who is 4?"], ["Who is 5?", "Who is 6?", "Who is 7?"], ["Who is 8?"]]
    (tmp_path / "train.jsonl").write_text(rows(0, 4) + rows(50, 1))
    assert settings("trajectories", of_lineage(found, 2, store)) != before[1], "a row of its own was edited"


def test_a_short_night_of_an_older_version_stays_as_it_was_made(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(rows(0, 5))
    found, store = experiment(tmp_path, "{path: train.jsonl, count: 3, stream: true}"), Store(tmp_path / "store")
    for night in (1, 2):
        finished(store, found, night, recomputed=True)
    assert read_so_far(found, store) == (None, None)
    assert of_lineage(found, 2, store).tasks.train.count == 3, "it stands in the digest of that night"
    finished(store, found, 2)
    assert read_so_far(found, store) == (None, None)
    finished(store, found, 1)
    assert read_so_far(found, store) == (["train.jsonl", 3, 0, 3], None)


@pytest.mark.parametrize("fact", ["x", 3, [], ["train.jsonl", 3, 0, "2"], ["train.jsonl", 4, 0, 2], ["train.jsonl", 3, 0, -1]])
def test_rows_that_were_taken_under_another_rule_do_not_count(tmp_path: Path, fact: Any) -> None:
    (tmp_path / "train.jsonl").write_text(rows(0, 5))
    found, store = experiment(tmp_path, "{path: train.jsonl, count: 3, stream: true}"), Store(tmp_path / "store")
    finished(store, found, 1, tasks_rows=fact)
    assert [of_lineage(found, k, store).tasks.train.count for k in (1, 2)] == [3, 2]


def test_an_edited_row_makes_just_its_own_night_out_of_date(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(rows(0, 6))
    found = experiment(tmp_path, "{path: train.jsonl, count: 3, stream: true}")
    before = [settings("trajectories", of_iteration(found, k)) for k in (1, 2)]
    (tmp_path / "train.jsonl").write_text(rows(0, 3) + rows(30, 3))
    assert [settings("trajectories", of_iteration(found, k)) == b for k, b in zip((1, 2), before, strict=True)] == [True, False]


@pytest.mark.parametrize("again", [{}, {"id": "x", "question": "Who is new?"}, {"answer": "another"}])
def test_a_row_that_an_earlier_night_had_is_told_in_its_own_night_alone(tmp_path: Path, again: dict[str, str]) -> None:
    row = {"id": "x", "question": "Who is first?", "answer": "person A"}
    repeated = {**row, "id": "y", **again}
    (tmp_path / "train.jsonl").write_text(f"{json.dumps(row)}\n{rows(1, 2)}{json.dumps(repeated)}\n{rows(4, 5)}")
    found = experiment(tmp_path, "{path: train.jsonl, count: 3, stream: true}")
    assert len(asked(found, 1)) == len(asked(found, 3)) == 3
    with pytest.raises(DataError, match=r"line 4: the same (question|id 'x') as on line 1"):
        asked(found, 2)


def test_a_folder_gives_a_file_a_night(tmp_path: Path) -> None:
    days = tmp_path / "days"
    days.mkdir()
    (days / "2026-11-02.jsonl").write_text(rows(10, 2))
    (days / "2026-11-01.jsonl").write_text(rows(0, 3))
    (days / ".2026-11-03.jsonl.part").write_text("{")
    found = experiment(tmp_path, "{path: days, count: 2, stream: true}")
    assert asked(found, 1) == ["Who is 0?", "Who is 1?"]
    assert asked(found, 2) == ["Who is 10?", "Who is 11?"]
    store = Store(tmp_path / "store")
    assert resolve("trajectories", found, 3, store).missing == "promotion[experiment|01]"


@pytest.mark.parametrize("nothing", ["", "\n \n"])
def test_a_day_without_tasks_is_passed_over(tmp_path: Path, nothing: str) -> None:
    days = tmp_path / "days"
    days.mkdir()
    for day, content in enumerate((rows(0, 2), nothing, rows(10, 2)), 1):
        (days / f"2026-11-0{day}.jsonl").write_text(content)
    found = experiment(tmp_path, "{path: days, stream: true}")
    assert asked(found, 1) == ["Who is 0?", "Who is 1?"]
    assert asked(found, 2) == ["Who is 10?", "Who is 11?"]
    with pytest.raises(OrderError, match=r"holds 2 files, .*; passed over, since they are empty: 2026-11-02\.jsonl"):
        of_iteration(found, 3)


def table(path: Path, questions: Sequence[str]) -> None:
    """A file of any kind that has a header."""
    rows = {"question": questions, "answer": ["x"] * len(questions)}
    match path.suffix:
        case ".parquet":
            pl.DataFrame(rows, schema={"question": pl.String(), "answer": pl.String()}).write_parquet(path)
        case ".xlsx":
            book = pytest.importorskip("openpyxl").Workbook()
            for line in (tuple(rows), *zip(*rows.values(), strict=True)):
                book.active.append(line)
            book.save(path)
        case ".json":
            path.write_text(json.dumps([dict(zip(rows, line, strict=True)) for line in zip(*rows.values(), strict=True)]))
        case _:
            lines = [tuple(rows), *zip(*rows.values(), strict=True)]
            path.write_text("".join(("\t" if path.suffix == ".tsv" else ",").join(line) + "\n" for line in lines), "utf-8-sig")


@pytest.mark.parametrize("ending", ["csv", "tsv", "json", "parquet", "xlsx"])
def test_a_day_with_a_header_alone_is_passed_over(tmp_path: Path, ending: str) -> None:
    days = tmp_path / "days"
    days.mkdir()
    for day, questions in enumerate((["Who is 0?"], [], ["Who is 10?"]), 1):
        table(days / f"{day}.{ending}", questions)
    (days / "4.jsonl").write_bytes(b"\xef\xbb\xbf\n")
    found = experiment(tmp_path, "{path: days, stream: true}")
    assert [asked(found, k) for k in (1, 2)] == [["Who is 0?"], ["Who is 10?"]]
    with pytest.raises(OrderError, match=rf"holds 2 files, .*; passed over, since they are empty: 2\.{ending}, 4\.jsonl"):
        of_iteration(found, 3)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("2.json", "["), ("2.parquet", "PAR1"), ("2.xlsx", "x"), ("2.csv", "question\na,b\n"), ("2.csv", "what is 2+2,4\n"),
        ("2.csv", '"question,answer\nq1,a1\n'), ("2.json", '{"items": [], "error": "the service is down"}'), ("2.json", '""'),
    ],
)  # fmt: skip
def test_a_broken_day_is_not_an_empty_one(tmp_path: Path, name: str, content: str) -> None:
    days = tmp_path / "days"
    days.mkdir()
    (days / "1.jsonl").write_text(rows(0, 1))
    (days / name).write_text(content)
    with pytest.raises(DataError, match=name):
        asked(experiment(tmp_path, "{path: days, stream: true}"), 2)


def test_files_that_were_read_stay_with_their_nights(tmp_path: Path) -> None:
    days = tmp_path / "days"
    days.mkdir()
    for day in (1, 2, 3, 4):
        (days / f"{day}.jsonl").write_text(rows(10 * day, 1))
    found = experiment(tmp_path, "{path: days, stream: true}")
    store = Store(tmp_path / "store")
    made = store.digest_of("trajectories", "1", {}, {})
    with store.build("trajectories", made, code_version="1", config={}, inputs={}):
        pass
    assert read_so_far(found, store) == ()
    store.set_ref("experiment", 2, "trajectories", made, **{FILE: "days/3.jsonl"})
    assert read_so_far(found, store) == (), "of nights of an older version nothing is known, so all go by name"
    store.set_ref("experiment", 1, "trajectories", made, **facts_of(found, of_iteration(found, 1)))
    read = read_so_far(found, store)
    assert read == ("1.jsonl", "3.jsonl")
    paths = [Path(of_iteration(found, k, read).tasks.train.path or "").name for k in (1, 2, 3)]
    assert paths == ["1.jsonl", "3.jsonl", "4.jsonl"]
    with pytest.raises(OrderError, match=r"holds 3 files.*sort before what was read: 2\.jsonl"):
        of_iteration(found, 4, read)
    store.set_ref("experiment", 1, "trajectories", made, **{FILE: "elsewhere/1.jsonl"})
    assert read_so_far(found, store) == (), "another folder is another stream"


def test_a_file_that_a_finished_night_took_and_that_is_gone_is_named_with_its_night(tmp_path: Path) -> None:
    """Old days are often packed away; the message told to correct the path."""
    (tmp_path / "days").mkdir()
    for day in (1, 3):
        (tmp_path / "days" / f"{day}.jsonl").write_text(rows(10 * day, 1))
    found = experiment(tmp_path, "{path: days, stream: true}")
    with pytest.raises(DataError, match=r"2\.jsonl: gone, and the finished iteration 2 of .* took its tasks") as told:
        of_iteration(found, 2, ("1.jsonl", "2.jsonl"))
    assert "put it back" in told.value.remedy
    assert Path(of_iteration(found, 3, ("1.jsonl", "2.jsonl")).tasks.train.path or "").name == "3.jsonl"


def test_a_late_file_changes_no_config_asset_of_a_lineage_that_has_begun(tmp_path: Path) -> None:
    days = tmp_path / "days"
    days.mkdir()
    (days / "2.jsonl").write_text(rows(20, 1))
    found, store = experiment(tmp_path, "{path: days, stream: true}"), Store(tmp_path / "store")
    made = store.digest_of("trajectories", "1", {}, {})
    with store.build("trajectories", made, code_version="1", config={}, inputs={}):
        pass
    store.set_ref("experiment", 1, "trajectories", made, **facts_of(found, of_iteration(found, 1)))
    before = settings_digest("trajectories", found, store)
    assert before == settings_digest("trajectories", found), "nor does the first night itself"
    (days / "1.jsonl").write_text(rows(10, 1))
    assert settings_digest("trajectories", found, store) == before != settings_digest("trajectories", found)


def test_a_file_may_ask_again_what_an_earlier_one_asked(tmp_path: Path) -> None:
    days = tmp_path / "days"
    days.mkdir()
    (days / "2026-11-01.jsonl").write_text('{"id": "x", "question": "Who is 0?", "answer": "person 0"}\n')
    (days / "2026-11-02.jsonl").write_text('{"id": "x", "question": "Who is 0?", "answer": "person 1"}\n')
    found = experiment(tmp_path, "{path: days, stream: true}")
    assert [asked(found, k) for k in (1, 2)] == [["Who is 0?"]] * 2


def test_a_night_without_tasks_says_so_and_stores_nothing(tmp_path: Path) -> None:
    days = tmp_path / "days"
    days.mkdir()
    found = experiment(tmp_path, "{path: days, stream: true}")
    store = Store(tmp_path / "store")
    assert "holds 0 files" in (resolve("scores", found, 1, store).missing or "")
    with pytest.raises(OrderError, match="no tasks yet") as caught:
        run_step("trajectories", found, 1, store)
    assert "put the next file there" in str(caught.value)
    assert not list((tmp_path / "store").rglob("manifest.json"))


def test_a_stream_of_rows_needs_a_count(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text(rows(0, 7))
    with pytest.raises(ConfigError, match="how many rows"):
        experiment(tmp_path, "{path: train.jsonl, stream: true}")


def test_splits_of_one_file_beside_a_stream_share_no_task_whatever_is_appended(tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text(rows(0, 60))
    part = "{path: all.jsonl, count: 5, percent: [0, 80], stream: true}", "corpus", "{path: all.jsonl, percent: [80, 100]}"
    found = experiment(tmp_path, *part)
    nights = [asked(found, k) for k in range(1, 10)]
    kept = {task.question for task in load_tasks_of(found, "development")}
    assert {len(night) for night in nights} == {5}
    assert kept
    (tmp_path / "all.jsonl").write_text(rows(0, 60) + rows(100, 60))
    assert [asked(found, k) for k in range(1, 10)] == nights
    later = {task.question for task in load_tasks_of(found, "development")}
    assert kept < later
    assert not later & {question for k in range(1, 19) for question in asked(found, k)}


def test_an_appended_row_changes_what_its_own_part_is_for_and_no_finished_night(tmp_path: Path) -> None:
    def appended(low: int, high: int) -> str:
        return next(row for row in rows(100, 900).splitlines() if in_percent(json.loads(row)["question"], low, high))

    (tmp_path / "all.jsonl").write_text(rows(0, 60))
    part = "{path: all.jsonl, count: 5, percent: [0, 80], stream: true}", "corpus", "{path: all.jsonl, percent: [80, 100]}"
    found = experiment(tmp_path, *part)
    night = of_iteration(found, 2)
    before = {step: settings(step, night) for step in STEP_ORDER}
    for low, high, changed in ((0, 80, set()), (80, 100, {"scores"})):
        with (tmp_path / "all.jsonl").open("a") as file:
            file.write(f"{appended(low, high)}\n")
        assert {step for step in STEP_ORDER if settings(step, night) != before[step]} == changed


def test_half_an_emoji_in_a_row_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"question": "Who is \\ud83d?", "answer": "x"}\n' + rows(0, 3))
    found = of_iteration(experiment(tmp_path, "{path: train.jsonl, count: 2, stream: true}"), 1)
    assert settings("trajectories", found) == settings("trajectories", found)


def test_the_same_question_in_other_letters_falls_into_the_same_part(tmp_path: Path) -> None:
    def part_of(question: str) -> list[int]:
        return [low for low in range(100) if in_percent(question, low, low + 1)]

    assert part_of("Who is it?") == part_of(" WHO is  it? ")
    assert part_of("Who is Ren\u00e9?") == part_of("Who is Rene\u0301?")
    assert len(part_of("Who is it?")) == 1
    assert part_of("Who is it?") != part_of("Who is she?")


def test_a_part_without_a_task_is_told(tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text(rows(0, 1))
    [mine] = [low for low in range(100) if in_percent("Who is 0?", low, low + 1)]
    other = (mine + 1) % 100
    with pytest.raises(DataError, match=rf"percent {other} to {other + 1}: no task falls"):
        load_tasks_of(experiment(tmp_path, f"{{path: all.jsonl, percent: [{other}, {other + 1}]}}"), "train")


@pytest.mark.parametrize("development", ["{path: all.jsonl, skip: 5, count: 4}", "{path: all.jsonl, percent: [79, 100]}"])
def test_a_stream_that_would_come_to_the_tasks_of_another_split_is_refused(tmp_path: Path, development: str) -> None:
    (tmp_path / "all.jsonl").write_text(rows(0, 60))
    with pytest.raises(ConfigError, match=r"tasks\.development\.percent: the stream of tasks\.train reads the same file"):
        experiment(tmp_path, "{path: all.jsonl, count: 5, percent: [0, 80], stream: true}", "corpus", development)


@pytest.mark.parametrize("percent", ["[0, 101]", "[50, 50]", "[60, 40]", "[0.5, 1]", "[10]"])
def test_parts_are_whole_numbers_of_a_hundred(tmp_path: Path, percent: str) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.train\.percent"):
        experiment(tmp_path, f"{{path: all.jsonl, percent: {percent}}}")


def test_an_experiment_without_parts_keeps_its_digests(tmp_path: Path) -> None:
    (tmp_path / "all.jsonl").write_text(rows(0, 60))
    assert "percent" not in settings("trajectories", experiment(tmp_path, "{path: all.jsonl}"))["tasks.train"]
    part = settings("trajectories", experiment(tmp_path, "{path: all.jsonl, percent: [0, 80]}"))["tasks.train"]
    assert part["percent"] == [0, 80]
