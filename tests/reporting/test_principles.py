"""What items did, as the audit page tells it."""

from __future__ import annotations

import html
import re
import shlex

import pytest

from evolve_dag.records import ExperienceItem, PoolEdit
from evolve_dag.reporting import audit_page
from evolve_dag.reporting.principles import Chain, Contrast, Facts, Principle, ScoreRow, Shown, ShownStep, _Seen


def contrast(where: str, ids: list[str]) -> Contrast:
    """Of an item that was chosen in all episodes but the first; every second one succeeds."""
    seen = _Seen()
    steps = [(ShownStep(0, "", "", ("p1",) if place else ()),) for place in range(len(ids))]
    seen.contrast(1, where, [Shown(id, "q", "answered", place % 2, "a", steps[place]) for place, id in enumerate(ids)])
    [found] = seen.contrasts["p1"][1]
    return found


@pytest.mark.parametrize(("where", "prefix"), [("teacher", ""), ("held-out", "with/")])
def test_an_interval_is_over_tasks_whatever_their_ids_hold(where: str, prefix: str) -> None:
    plain, slashed = ([f"{prefix}{subject}{n}#{r}" for n in range(20) for r in range(2)] for subject in ("t", "test/algebra/"))
    same = [f"{prefix}{n}/1.json#{r}" for n in range(20) for r in range(2)]
    assert contrast(where, plain) == contrast(where, slashed)
    assert contrast(where, plain).chosen.interval == pytest.approx(contrast(where, same).chosen.interval, abs=0.1)


def test_no_words_are_struck_out_that_still_hold() -> None:
    item = ExperienceItem("p0001", "new words", "principle", created=1, updated=3)
    edits = (
        PoolEdit("add", "p0001", 1, None, "old words", "found"),
        PoolEdit("update", "p0001", 2, "old words", "new words", "clearer"),
        PoolEdit("update", "p0001", 3, "new words", "new words", "found again"),
        PoolEdit("graduate", "p0001", 4, "new words", "new words", "done without it"),
    )
    page = audit_page.page(Facts("e", (Principle(item, None, edits, (), {}, {}, {}, ()),), ()))
    assert re.findall("<s>(.*?)</s><br>(.*?)</td>", page) == [("old words", "new words")]


def test_a_command_that_the_page_tells_runs_as_one_word_whatever_a_task_is_called() -> None:
    task = "x'; touch pwned; echo '"
    rows = tuple(ScoreRow("without", f"{task}#{n}", 1.0, False, None) for n in range(audit_page.ROWS + 1))
    page = audit_page.page(Facts("e", (), (Chain(1, {"scores": ("0" * 32, {})}, {}, None, (), (), rows, {}),)))
    [command] = re.findall(r"<code>(evolve trace .*?)</code>", page)
    assert shlex.split(html.unescape(command)) == ["evolve", "trace", f"{'0' * 12}/without/{task}#{audit_page.ROWS}"]


def test_what_a_thinking_model_wrote_is_cut_and_the_page_says_so() -> None:
    written = audit_page.WRITTEN
    steps = (
        ShownStep(0, "h" * (written + 1234), "o" * 5000, (), ""),
        ShownStep(1, "", None, (), "python(" + "c" * written + ")"),
        ShownStep(2, "k" * written, None, (), "answer: 1"),
    )
    shown = Shown("without/t#0", "q", "answered", 1.0, "1", steps)
    rows = (ScoreRow("without", "t#0", 1.0, False, shown),)
    page = audit_page.page(
        Facts("e", (), (Chain(1, {"scores": ("0" * 32, {})}, {}, None, (), (shown,), rows, {"t#0": shown}),))
    )
    assert page.count("h" * written) == page.count("(1,234 characters more)") == 3
    assert "h" * (written + 1) not in page
    assert page.count("(8 characters more)") == 3
    assert page.count("characters more") == 6
    assert "Of a thought and an action 1,000 characters are shown, of an observation 400: all of each step is in" in page
