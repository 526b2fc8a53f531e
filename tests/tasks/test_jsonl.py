"""Task files: what is read, which mistakes are named, how samples are drawn; and the example that ships."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_dag.config.loading import load_experiment
from evolve_dag.environments.corpus import CorpusSearch
from evolve_dag.errors import DataError
from evolve_dag.jsonlines import read_objects
from evolve_dag.records import Task
from evolve_dag.tasks.jsonl import question_id, refuse_shared_questions, tasks_from

CONFIGS = Path(__file__).parents[2] / "configs"


def write(path: Path, *lines: object) -> Path:
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def load_tasks(path: Path, *, suite: str, count: int | None = None, seed: int = 0) -> list[Task]:
    return tasks_from(path, *read_objects(path), suite=suite, count=count, seed=seed)


def numbered(path: Path, count: int) -> Path:
    return write(path, *[{"question": f"What is {n}?", "answer": str(n)} for n in range(count)])


def test_fields(tmp_path: Path) -> None:
    path = write(
        tmp_path / "tasks.jsonl",
        {"id": "a1", "question": " What is x? ", "answer": " 5 ", "hops": "2", "level": 3, "hard": True, "source": None},
        {"question": "What is y?", "answer": "six", "aliases": ["6", "VI"]},
    )
    first, second = load_tasks(path, suite="own/train")
    assert (first.id, first.question, first.answer, first.suite) == ("a1", "What is x?", "5", "own/train")
    assert first.metadata == {"hops": "2", "level": "3", "hard": "true"}
    assert second.metadata == {"aliases": "6|VI"}
    assert second.id == question_id("What is y?")


def test_ids_do_not_depend_on_the_place_in_the_file(tmp_path: Path) -> None:
    lines = [{"question": f"What is {n}?", "answer": str(n)} for n in range(6)]
    there = load_tasks(write(tmp_path / "a.jsonl", *lines), suite="s")
    back = load_tasks(write(tmp_path / "b.jsonl", {"question": "new?", "answer": "x"}, *reversed(lines)), suite="s")
    assert {t.question: t.id for t in there}.items() <= {t.question: t.id for t in back}.items()
    assert [t.question for t in there] == [line["question"] for line in lines]


def test_all_mistakes_at_once(tmp_path: Path) -> None:
    path = write(
        tmp_path / "tasks.jsonl",
        {"id": "a", "question": "What is x?", "answer": "1"},
        "{",
        {"question": "What is y?"},
        {"question": "What is z?", "answer": ""},
        {"answer": "1"},
        {"question": "  ", "answer": "1"},
        {"question": "What is n?", "answer": 7},
        {"id": "a", "question": "Other?", "answer": "1"},
        {"question": "what  is X?", "answer": "2"},
        {"id": 4, "question": "Fourth?", "answer": "2", "aliases": ["a|b"]},
    )
    with pytest.raises(DataError) as caught:
        load_tasks(path, suite="s")
    said = [line.strip() for line in str(caught.value).splitlines()]
    assert said[0] == f"{path}: 10 mistakes"
    expected = [
        "line 2: not valid JSON",
        "line 3: no reference answer: 'answer' is missing",
        "line 4: 'answer' is empty",
        "line 5: 'question' is missing",
        "line 6: 'question' is empty",
        "line 7: 'answer' must be text, not the number 7",
        "line 8: the same id 'a' as on line 1",
        "line 9: the same question as on line 1",
        "line 10: 'aliases' must be text, a number or a list of texts",
        "line 10: 'id' must be text, not the number 4",
    ]
    for line, start in zip(said[1:11], expected, strict=True):
        assert line.startswith(start)


def test_a_made_id_can_clash_with_a_written_one(tmp_path: Path) -> None:
    path = write(
        tmp_path / "tasks.jsonl",
        {"question": "What is x?", "answer": "1"},
        {"id": question_id("What is x?"), "question": "What is y?", "answer": "1"},
    )
    with pytest.raises(DataError, match="line 2: the same id"):
        load_tasks(path, suite="s")


@pytest.mark.parametrize("content", ["", "\n\n", " "])
def test_an_empty_file_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tasks.jsonl"
    path.write_text(content)
    with pytest.raises(DataError, match="empty file"):
        load_tasks(path, suite="s")


def test_more_than_there_are_is_refused_with_the_number(tmp_path: Path) -> None:
    path = numbered(tmp_path / "tasks.jsonl", 5)
    assert len(load_tasks(path, suite="s", count=5)) == 5
    with pytest.raises(DataError, match="holds 5 tasks, but the experiment asks for 6"):
        load_tasks(path, suite="s", count=6)


def test_a_sample_is_stable(tmp_path: Path) -> None:
    path = numbered(tmp_path / "tasks.jsonl", 60)
    small, large = (load_tasks(path, suite="s", count=n, seed=3) for n in (10, 20))
    order = [t.question for t in load_tasks(path, suite="s")]
    assert {t.id for t in small} < {t.id for t in large}
    assert [t.question for t in large] == sorted((t.question for t in large), key=order.index)
    lines = path.read_text().splitlines()
    moved = write(tmp_path / "moved.jsonl", *reversed(lines))
    assert {t.id for t in load_tasks(moved, suite="s", count=20, seed=3)} == {t.id for t in large}
    grown = write(tmp_path / "grown.jsonl", *lines, {"question": "new?", "answer": "x"})
    assert len({t.id for t in large} - {t.id for t in load_tasks(grown, suite="s", count=20, seed=3)}) <= 1


def test_every_task_has_the_same_chance(tmp_path: Path) -> None:
    path = numbered(tmp_path / "tasks.jsonl", 10)
    drawn = Counter(task.id for seed in range(400) for task in load_tasks(path, suite="s", count=3, seed=seed))
    assert len(drawn) == 10
    assert all(75 <= count <= 165 for count in drawn.values())  # expected 120, standard deviation 9


@given(st.text(), st.text())
def test_ids_of_different_questions_differ(one: str, other: str) -> None:
    assert (question_id(one) == question_id(other)) == (one.split() == other.split())


def test_splits_that_share_a_question_are_refused(tmp_path: Path) -> None:
    train = load_tasks(numbered(tmp_path / "a.jsonl", 3), suite="own/train")
    again = write(tmp_path / "b.jsonl", {"id": "z", "question": "what is  2?", "answer": "2"})
    held_out = load_tasks(again, suite="own/held_out")
    with pytest.raises(DataError, match="1 question stands in more than one split") as caught:
        refuse_shared_questions({"train": train, "held_out": held_out})
    assert "held_out and train: what is  2?" in str(caught.value)
    refuse_shared_questions({"train": train[:2], "held_out": held_out})


# ---- the example in configs/

SPLITS = {"train": 24, "development": 12, "held_out": 16}


def example(split: str):
    return load_tasks(CONFIGS / "own_corpus" / f"{split}.jsonl", suite=f"own_corpus/{split}")


def test_the_example_is_whole() -> None:
    tasks = {split: example(split) for split in SPLITS}
    assert {split: len(found) for split, found in tasks.items()} == SPLITS
    refuse_shared_questions(tasks)


@pytest.mark.parametrize("split", SPLITS)
def test_the_example_can_be_answered_by_reading_its_pages(split: str) -> None:
    """Follows every question through visits, redirects included, down to the reference answer."""
    corpus = CorpusSearch.from_jsonl(CONFIGS / "own_corpus" / "pages.jsonl")
    for task in example(split):
        *relations, page = task.question.removeprefix("What is the ").removesuffix("?").split(" of ")
        for relation in reversed([relation.removeprefix("the ") for relation in relations]):
            shown = corpus.visit(page).splitlines()
            if shown[1].startswith("see: "):
                shown = corpus.visit(shown[1].removeprefix("see: ")).splitlines()
            page = dict(line.split(": ") for line in shown[1:])[relation]
        assert page.split(maxsplit=1)[1] == task.answer
        assert len(relations) == int(task.metadata["hops"])


def test_the_example_has_stale_snippets_and_redirects() -> None:
    pages = CorpusSearch.from_jsonl(CONFIGS / "own_corpus" / "pages.jsonl").pages
    assert sum(page.redirect is not None for page in pages) >= 3
    assert sum(page.indexed is not None and page.redirect is None for page in pages) >= 5


def test_the_example_loads_over_any_parent(tmp_path: Path) -> None:
    """The parent's worlds and counts must not leak into the splits that are files."""
    splits = "".join(f"  {split}: {{count: 96, world: {n}}}\n" for n, split in enumerate(SPLITS))
    (tmp_path / "pocket.yaml").write_text(f"tasks:\n{splits}")
    (tmp_path / "own_corpus.yaml").write_text((CONFIGS / "own_corpus.yaml").read_text())
    experiment = load_experiment(tmp_path / "own_corpus.yaml")
    assert experiment.experiment == "own_corpus"
    assert experiment.environment.kind == "corpus"
    assert experiment.environment.pages == str(tmp_path / "own_corpus" / "pages.jsonl")
    for split in SPLITS:
        settings = getattr(experiment.tasks, split)
        assert (settings.count, settings.world) == (None, None)
        assert settings.path == str(tmp_path / "own_corpus" / f"{split}.jsonl")
