"""Published files of the suites, in small: what they hold becomes tasks, and what is wrong with them is told by row."""

from __future__ import annotations

import base64
import csv
import gzip
import hashlib
import json
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_dag.config.parts import CHOICES
from evolve_dag.config.schema import TaskSplit
from evolve_dag.errors import DataError
from evolve_dag.records import Task
from evolve_dag.tasks.formats import decrypt, load_suite, without_rows


def load(path: Path, suite: str = "jsonl", **keys: Any) -> list[Task]:
    return load_suite(TaskSplit(path=str(path), suite=suite, **keys), suite="test")


def jsonl(folder: Path, rows: Sequence[Any], name: str = "tasks.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def encrypt(text: str, canary: str) -> str:
    key = hashlib.sha256(canary.encode()).digest()
    return base64.b64encode(bytes(b ^ key[n % 32] for n, b in enumerate(text.encode()))).decode()


def test_webwalkerqa(tmp_path: Path) -> None:
    row = {
        "question": "When does it open?",
        "answer": "At nine",
        "root_url": "https://example.org",
        "info": {
            "difficulty_level": "easy",
            "domain": "conference",
            "lang": "en",
            "type": "single_source",
            "golden_path": ["a"],
        },
    }
    [task] = load(jsonl(tmp_path, [row]), "webwalkerqa")
    assert task.question == "When does it open?\n(Start from https://example.org)"
    assert task.answer == "At nine"
    assert task.metadata == {"difficulty": "easy", "domain": "conference", "language": "en", "kind": "single_source"}


def test_webwalkerqa_without_facts(tmp_path: Path) -> None:
    [task] = load(jsonl(tmp_path, [{"question": "q", "answer": "a", "info": ["a"]}]), "webwalkerqa")
    assert task.metadata == {}


def test_gaia_leaves_nothing_out_in_silence(tmp_path: Path) -> None:
    rows = [{"task_id": "a1", "Question": "How many?", "Level": 2, "Final answer": "17", "file_name": ""}]
    [task] = load(jsonl(tmp_path, rows), "gaia_text_103")
    assert (task.id, task.answer, task.metadata) == ("a1", "17", {"difficulty": "2"})
    rows.append({"task_id": "a2", "Question": "What is in it?", "Level": 1, "Final answer": "x", "file_name": "a2.xlsx"})
    with pytest.raises(DataError, match=r"line 2: needs the file 'a2\.xlsx'"):
        load(jsonl(tmp_path, rows), "gaia_text_103")


def test_browsecomp_zh_is_decrypted(tmp_path: Path) -> None:
    canary = "GUID 123"
    row = {name: encrypt(text, canary) for name, text in (("Topic", "电影"), ("Question", "谁是导演?"), ("Answer", "张三"))}
    path = tmp_path / "browsecomp.csv"
    with path.open("w", newline="") as handle:
        writer = csv.DictWriter(handle, [*row, "canary"])
        writer.writeheader()
        writer.writerow({**row, "canary": canary})
    [task] = load(path, "browsecomp_zh")
    assert (task.question, task.answer, task.metadata) == ("谁是导演?", "张三", {"domain": "电影"})
    with pytest.raises(DataError, match="cannot be decrypted with its canary"):
        load(jsonl(tmp_path, [{**row, "canary": "another"}]), "browsecomp_zh")
    with pytest.raises(DataError, match="leave out the canary"):
        load(jsonl(tmp_path, [{"Question": "谁?", "Answer": "李四", "canary": canary}]), "browsecomp_zh")
    [plain] = load(jsonl(tmp_path, [{"Question": "谁?", "Answer": "李四"}]), "browsecomp_zh")
    assert plain.answer == "李四"


@given(st.text(), st.text(min_size=1))
def test_decryption_undoes_encryption(text: str, canary: str) -> None:
    if text.isprintable():
        assert decrypt(encrypt(text, canary), canary) == text


def test_aime_answers_are_text(tmp_path: Path) -> None:
    pl.DataFrame({"ID": ["2024-I-1"], "Problem": ["Find n."], "Answer": [204], "Year": [2024]}).write_parquet(
        tmp_path / "a.parquet"
    )
    [task] = load(tmp_path / "a.parquet", "aime")
    assert (task.id, task.question, task.answer, task.metadata) == ("2024-I-1", "Find n.", "204", {"year": "2024"})


def test_dapo_is_unwrapped_and_counted_once(tmp_path: Path) -> None:
    content = (
        "Solve the following math problem step by step. The last line should be of the form Answer: $Answer.\n\n"
        'What is 1+1?\n\nIt is small.\n\nRemember to put your answer on its own line after "Answer:".'
    )
    row = {
        "prompt": [{"role": "user", "content": content}],
        "reward_model": {"ground_truth": "2", "style": "rule"},
        "extra_info": {"index": "x1"},
    }
    pl.DataFrame([row, row, row]).write_parquet(tmp_path / "dapo.parquet")
    [task] = load(tmp_path / "dapo.parquet", "dapo")
    assert (task.id, task.question, task.answer) == ("x1", "What is 1+1?\n\nIt is small.", "2")


def test_fields_name_what_a_file_calls_otherwise(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"uid": 7, "problem": "1+1?", "solution": 2, "level": "easy", "other": {"x": 1}}])
    fields = {"id": "uid", "question": "problem", "answer": "solution", "difficulty": "level"}
    [task] = load(path, fields=fields)
    assert task == Task("7", "1+1?", "2", "test", {"difficulty": "easy"})
    assert load(path, fields={**fields, "number": "other.x"})[0].metadata == {"difficulty": "easy", "number": "1"}
    for unknown in ("nothing", "other.y", "level.x"):
        with pytest.raises(DataError, match=f"line 1: no field '{unknown}' "):
            load(path, fields={**fields, "answer": unknown})


@pytest.mark.parametrize("fields", [{}, {"question": "question", "answer": "answer"}, {"question": "q", "answer": "answer"}])
def test_a_comma_without_quotes_is_told(tmp_path: Path, fields: dict[str, str]) -> None:
    (tmp_path / "t.csv").write_text('question,answer\n"May, 1990?",Bo\nWho won in May, 1990?,Ada\n')
    with pytest.raises(DataError, match=r"line 3: more cells than columns \(1\)"):
        load(tmp_path / "t.csv", fields=fields)


@pytest.mark.parametrize(
    ("cells", "questions"),
    [
        ('"Yes" is by whom?\tA\n"Half\tB\n', ['"Yes" is by whom?', '"Half']),
        ('"""Yes"" is\nby whom?"\tA\nWho?\tB\n', ['"Yes" is\nby whom?', "Who?"]),
    ],
)
def test_quotes_of_a_tsv(tmp_path: Path, cells: str, questions: list[str]) -> None:
    (tmp_path / "t.tsv").write_text(f"question\tanswer\n{cells}")
    assert [task.question for task in load(tmp_path / "t.tsv")] == questions


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    question = "What is it about? " + "word " * 50_000
    (tmp_path / "t.csv").write_text(f"question,answer\n{question},Bo\n")
    assert [task.question for task in load(tmp_path / "t.csv")] == [question.strip()]


def test_of_a_table_the_line_of_the_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text('question,answer\n"Who\nwon?",Ada\n\nWho lost?,\n')
    with pytest.raises(DataError, match="line 5: 'answer' is empty"):
        load(tmp_path / "t.csv")


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("t.csv", b"question,answer,answer\nq,a,b\n", "column 'answer' stands twice"),
        ("t.tsv", b"question\tanswer\tanswer\nq\ta\tb\n", "column 'answer' stands twice"),
        ("t.json", b'[{"question": "q", "answer": "a", "answer": "b"}]', "key 'answer' stands twice"),
        ("t.json", b'{"question": "q", "answer": "a"}\n{"question": "r", "answer": "a"}\n', "name it .jsonl"),
        ("t.json", b"null", "holds null, not a list of tasks"),
        ("t.csv", b'question,answer\nWho?,"Ada\nWhere?,Rome\n', "the row that begins on line 2 opens a quotation mark"),
        ("t.csv", b'question,answer\nWho?,"Ada"\n\nWhat?,"a ""b"" c""\nWhere?,Rome', "the row that begins on line 4 opens"),
        ("t.csv", b"question;answer\nWho?;Ada, of Bo\n", "its columns are not separated by commas"),
        ("t.csv", "question,answer\nWo liegt Köln?,a\n".encode("cp1252"), "save it as UTF-8"),
        *(
            (name, gzip.compress(b"question,answer\nq,a\n", mtime=0), f"{name}: compressed (gzip)")
            for name in ("t.csv", "t.json", "t.csv.gz")
        ),
    ],
)
def test_what_would_be_read_otherwise_than_meant_is_told(tmp_path: Path, name: str, content: bytes, told: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as caught:
        load(tmp_path / name)
    assert told in str(caught.value)
    assert "download" not in str(caught.value)


def test_a_sheet_is_read_to_its_end_whatever_size_it_says(tmp_path: Path) -> None:
    """Some programs write the size of its first cells."""
    book = pytest.importorskip("openpyxl", reason="pip install 'evolve-dag[web]'").Workbook()
    for row in (("question", "answer"), ("q", "a"), ("r", "b"), ("s", "c")):
        book.active.append(row)
    book.save(tmp_path / "whole.xlsx")
    for size in ("A1", "A1:B2"):
        with zipfile.ZipFile(tmp_path / "whole.xlsx") as whole, zipfile.ZipFile(tmp_path / "t.xlsx", "w") as other:
            for name in whole.namelist():
                content = re.sub(rb'<dimension ref="[^"]*"', f'<dimension ref="{size}"'.encode(), whole.read(name))
                other.writestr(name, content)
        assert [task.answer for task in load(tmp_path / "t.xlsx")] == ["a", "b", "c"]
        assert not without_rows(tmp_path / "t.xlsx")


def test_columns_without_a_name_are_none(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("question,answer,,\nq,a,,\n")
    assert [task.answer for task in load(tmp_path / "t.csv")] == ["a"]


def test_splits_of_one_file_share_no_task(tmp_path: Path) -> None:
    path = jsonl(tmp_path, [{"question": f"q{n}", "answer": "a"} for n in range(20)])
    first, second, rest = load(path, count=8), load(path, count=8, skip=8), load(path, skip=16)
    ids = [task.id for task in (*first, *second, *rest)]
    assert len(ids) == len(set(ids)) == 20
    with pytest.raises(DataError, match="asks for 8 after the first 16"):
        load(path, count=8, skip=16)


def test_a_list_in_json_and_a_wrapped_one(tmp_path: Path) -> None:
    rows = [{"question": "q", "answer": "a"}]
    for content in (rows, {"data": rows}, {**rows[0], "aliases": ["b"]}):
        (tmp_path / "t.json").write_text(json.dumps(content))
        assert [task.question for task in load(tmp_path / "t.json")] == ["q"]


@pytest.mark.parametrize("suite", sorted(CHOICES["suite"].rows))
def test_broken_rows_are_told_by_line(tmp_path: Path, suite: str) -> None:
    path = jsonl(tmp_path, [{}, {"question": "", "answer": ""}, [], "text"])
    with pytest.raises(DataError) as caught:
        load(path, suite)
    for line in ("line 1", "line 2", "line 3", "line 4"):
        assert line in str(caught.value)


@pytest.mark.parametrize("name", ["t.parquet", "t.json", "t.xlsx", "t.jsonl"])
def test_broken_files_are_named(tmp_path: Path, name: str) -> None:
    with pytest.raises(DataError, match=r"no such file"):
        load(tmp_path / name)
    (tmp_path / name).write_bytes(b"\x00\x01 not what the ending says")
    with pytest.raises(DataError, match=name.replace(".", r"\.")):
        load(tmp_path / name)
