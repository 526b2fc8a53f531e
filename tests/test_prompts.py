"""Prompts: every blank is filled, what is filled in is data, and every prompt that ships can be loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from evolve_dag import prompts
from evolve_dag.errors import ConfigError
from evolve_dag.prompts import ROOT, Prompt

SHIPPED = sorted(f"{path.parent.parent.relative_to(ROOT).as_posix()}/{path.stem}" for path in ROOT.rglob("prompts/*.md"))


def test_what_is_filled_in_is_not_looked_through_for_blanks() -> None:
    prompt = Prompt("experience/x", "Task: {{task}}\nAnswer: {{answer}}")
    assert prompt.blanks == {"task", "answer"}
    assert prompt.fill(task="{{answer}} \\1", answer="{{task}}") == "Task: {{answer}} \\1\nAnswer: {{task}}"


@pytest.mark.parametrize("values", [{}, {"task": "a", "other": "b"}, {"task": "a", "more": 1, "answer": 2}])
def test_unfilled_and_unknown_blanks_are_named(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError) as caught:
        Prompt("experience/x", "{{task}} {{answer}}").fill(**values)
    for name in {"task", "answer"} ^ set(values):
        assert name in str(caught.value)


def test_a_prompt_that_is_not_there_is_named() -> None:
    with pytest.raises(ConfigError, match=r"experience/prompts/nothing\.md"):
        prompts.load("experience/nothing")


def test_the_digest_follows_the_text_and_not_the_order(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(prompts, "ROOT", tmp_path)
    prompts._read.cache_clear()
    (tmp_path / "a" / "prompts").mkdir(parents=True)
    for name, text in (("one", "1"), ("two", "2")):
        (tmp_path / "a" / "prompts" / f"{name}.md").write_text(text)
    before = prompts.digest("a/one", "a/two")
    assert before == prompts.digest("a/two", "a/one")
    assert before != prompts.digest("a/one")
    prompts._read.cache_clear()
    (tmp_path / "a" / "prompts" / "two.md").write_text("2 reworded")
    assert prompts.digest("a/one", "a/two") != before
    prompts._read.cache_clear()


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_prompts_load(name: str) -> None:
    prompt = prompts.load(name)
    assert len(prompt.text) > 50
    assert "{{" not in prompt.fill(**dict.fromkeys(prompt.blanks, "x"))
