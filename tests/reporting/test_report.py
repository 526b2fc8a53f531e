"""The report: self-contained, escaped, whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import UndefinedError
from lineages import PRINCIPLES, audited, checked, lineage, metrics
from pydantic import ValidationError

from evolve_dag import cli
from evolve_dag.config.schema import Experiment
from evolve_dag.errors import DataError, StoreError
from evolve_dag.evaluation.gate import GateDecision
from evolve_dag.lineage.audit import Internalized
from evolve_dag.reporting import figures, pages, report
from evolve_dag.reporting.drawing import Figure
from evolve_dag.reporting.summary import IterationRow, LineageSummary
from evolve_dag.store.artifacts import Store

EVIL = "Evil: when </script><script>alert('x')</script> & <img src=x onerror=alert(1)>, {{figures}} \"quote\"."


class Page(HTMLParser):
    """Tags, attributes and visible text of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self.text: list[str] = []
        self.inside = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""

    def handle_data(self, data: str) -> None:
        if self.inside == "script":
            self.scripts[-1] += data
        elif self.inside != "style":
            self.text.append(data)

    @property
    def figures(self) -> list[dict]:
        return json.loads(self.scripts[1])


def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for plotly's 4.8 MB, so that a page parses fast; one test uses the real one."""
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly */")


@pytest.fixture
def page(monkeypatch: pytest.MonkeyPatch) -> Page:
    small(monkeypatch)
    return Page(report.render([lineage(declined=(3,), texts=(EVIL, *PRINCIPLES))]))


def test_it_holds_everything_and_loads_nothing(tmp_path: Path) -> None:
    from plotly.offline import get_plotlyjs

    path = report.write_report([lineage()], tmp_path / "new" / "report.html")
    html = path.read_text(encoding="utf-8")
    assert html.count(get_plotlyjs()) == 1
    assert len(html) < 6_000_000
    own = html.replace(get_plotlyjs(), "")
    assert not re.search(r"https?://|@import|url\(|\bsrc=|<link", own)
    assert "default-src 'none'" in own
    assert [file.name for file in path.parent.iterdir()] == ["report.html"], "no temporary file stays"


def test_the_ceiling_and_the_base_by_temperature_are_shown_where_they_were_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    summary = lineage()
    assert "ceiling" not in report.render([summary]).lower()
    base, *rows = summary.rows
    rows = [replace(row, ceiling=metrics(0.86, 0.1, 4.0, 0.0)) for row in rows]
    tried = {0.0: metrics(0.31, 0.1, 4.0, 0.0), 1.0: metrics(0.28, 0.1, 4.0, 0.0)}
    html = report.render([replace(summary, rows=(replace(base, at_temperature=tried), *rows))])
    assert "The base policy, success by temperature: 0 31.0% (best), 1 28.0%." in html
    assert html.count("86.0%") == len(rows)
    names = [trace.get("name") for trace in Page(html).figures[0]["data"]]
    assert "ceiling" in names


def test_text_of_artifacts_is_text(page: Page) -> None:
    assert EVIL in page.text
    assert len(page.scripts) == 4
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert not [name for _, attributes in page.tags for name in attributes if name.startswith("on")]


def test_hostile_names_reach_neither_the_page_nor_plotly(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    name = "</script><b>bold</b>"
    hostile = replace(
        lineage(),
        experiment=name,
        settings={"key": "<script>1</script>"},
        command="evolve run '<i>'",
    )
    row = hostile.rows[1]
    gate = GateDecision("keep", ("<u>reason</u>",), {"<em>": 1.0})
    row = replace(row, gate=gate, training={"<th>": 1}, locality={"<s>": 0.5}, steps=(replace(row.steps[0], name="<q>"),))
    html = report.render([replace(hostile, rows=(hostile.rows[0], row)), lineage()])
    page = Page(html)
    assert len(page.scripts) == 4
    assert not {"i", "u", "em", "s", "q"} & {tag for tag, _ in page.tags}
    assert not re.search(r"<b>bold|<u>reason|<script>1", html)
    assert "<u>reason</u>" in page.text
    assert "</script>" not in json.dumps([t.get("name", "") for f in page.figures for t in f["data"]])


@pytest.mark.parametrize("draw", [figures.inside_now, figures.internalized])
def test_the_words_of_an_item_are_no_markup_in_a_figure(draw: Callable[[LineageSummary], Figure]) -> None:
    one = Internalized("p<1", 1, '<a href="//a.co">x</a>: visit', 3, 9, 0.1, 0.05, 0.02, (0.4, 0.6), (0.7, 0.9))
    drawn: list[Figure] = []
    pages._draw(drawn, draw(LineageSummary("x", (IterationRow(1, internalized=(one,)),))))
    labels = json.dumps([trace["x"] for trace in drawn[0]["data"]])
    assert "<" not in labels
    assert "p&lt;1" in labels


def test_every_figure_of_the_page_has_its_specification(page: Page) -> None:
    wanted = [int(attributes["data-figure"] or "") for _, attributes in page.tags if "data-figure" in attributes]
    assert wanted == list(range(len(page.figures)))
    assert len(wanted) >= 11
    assert all(figure["data"] for figure in page.figures)


def test_sections_and_numbers(page: Page) -> None:
    text = " ".join(page.text)
    ids = {attributes["id"] for _, attributes in page.tags if "id" in attributes}
    assert {"result", "behaviour", "experience", "training", "gate", "cost", "reproduce"} <= ids
    for expected in (
        "Self-evolution of pocket",
        "81.0%",
        "77.6–84.4",
        "base 28.0%",
        "512 of 512",
        "principle, step_wise, source teacher, forward_kl, with rejection",
        "The champion is the candidate of iteration 2.",
        "evolve run configs/pocket.yaml --iterations 3",
        "evolve report pocket",
        "first seen",
        "3 min 17 s",
    ):
        assert expected in text, expected
    digests = [attributes["title"] for tag, attributes in page.tags if tag == "code" and "title" in attributes]
    assert len(digests) == 21
    assert all(re.fullmatch(r"[0-9a-f]{32}", digest or "") for digest in digests)


def test_what_was_measured_and_paid_stands_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    page = Page(report.render([audited(lineage())], {"pocket": "pocket-audit.html"}))
    text = " ".join(page.text)
    for expected in ("Inside the weights now", "0.0800", "0.0200", "75.0%", "70.0–80.0", "95.0%", "Cost per step", "$0.012"):
        assert expected in text, expected
    assert "34.0k" in text, "prompt tokens"
    assert ("a", {"href": "pocket-audit.html"}) in page.tags
    assert "First and last: means over the first and the last five batches" in text
    unpriced = audited(lineage())
    steps = [replace(step, calls={"judge": {"calls": 3, "cost": None}}) for step in unpriced.rows[1].steps]
    unpriced = replace(unpriced, rows=(unpriced.rows[0], replace(unpriced.rows[1], steps=tuple(steps))))
    assert "Cost per step" not in " ".join(Page(report.render([unpriced])).text), "unknown is no 0"


def test_parts_of_a_reward_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    summary = lineage()
    scored = replace(
        summary, rows=tuple(replace(r, without=replace(r.without, solved=0.123)) for r in summary.rows if r.without)
    )
    text = " ".join(Page(report.render([scored])).text)
    assert "solved in full" in text
    assert "12.3%" in text
    assert "success is the mean reward, of 100%" in text
    assert "solved in full" not in " ".join(Page(report.render([summary])).text)


def test_what_experience_did_to_the_teacher_stands_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    text = " ".join(Page(report.render([checked(lineage())])).text)
    for told in ("+10.0", "+2.0 to +18.0, 64 tasks", "-30.0", "not taught", "withdrawn", "attempt 2"):
        assert told in text
    assert "Iteration 3: nothing is taught: the teacher with experience is below the student without it: -30.0 points" in text
    assert "Iteration 3: pocket-001 is withdrawn: the teacher does worse with it: -30.0 points (-40.0 to -20.0)" in text
    assert "Iteration 2: attempt 1 of 2: the teacher with experience is below the student without it: -30.0 points" in text
    assert "Iteration 2: attempt 2 of 2: the teacher may teach, without pocket-001: +10.0 points" in text
    assert "What experience did to the teacher" not in " ".join(Page(report.render([lineage()])).text)


def test_under_global_injection_items_are_not_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    one = audited(lineage())
    text = " ".join(Page(report.render([replace(one, settings={**one.settings, "injection": "global"})])).text)
    assert "items cannot be told apart" in text
    assert "Inside the weights now" not in text
    assert "all\xa0steps" in text


def test_seeds_of_one_experiment_are_drawn_together(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    other = replace(lineage("pocket-s3"), settings={**lineage().settings, "seed": 3})
    text = " ".join(Page(report.render([lineage(), other])).text)
    assert "Over seeds, without experience in context" in text
    assert "Over seeds" not in " ".join(Page(report.render([lineage(), lineage("other")])).text)


def test_both_themes_are_there(page: Page) -> None:
    painting = page.scripts[3]
    assert "light:" in painting
    assert "dark:" in painting
    assert 'getElementById("theme")' in painting
    assert "prefers-color-scheme: dark" in page.scripts[0]


def test_several_experiments_stand_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    other = lineage("global", (0.28, 0.41, 0.57), (0.53, 0.6), (0.76, 0.58, 0.42), declined=(1, 2))
    page = Page(report.render([lineage(), other]))
    first = [trace["name"] for trace in page.figures[0]["data"] if trace["meta"]["paint"] == "line"]
    assert first == ["pocket", "global"]
    text = " ".join(page.text)
    assert "Pool edits, global" in text
    assert "evolve report pocket global" in text
    assert "The champion is the base policy." in text


def test_a_declined_candidate_is_nowhere_what_a_lineage_is_known_by(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    one, none = lineage(declined=(3,)), lineage("global", declined=(1, 2, 3))
    assert (one.held, none.held) == (one.rows[2], none.rows[0])
    undecided = replace(one, rows=tuple(replace(row, gate=None) for row in one.rows))
    assert undecided.held == undecided.rows[3]
    assert "champion, iteration 2: success without" in Page(report.render([one])).text
    text = " ".join(Page(report.render([one, none])).text)
    compared = text[text.index("mean turns") : text.index("Pool edits")].split()
    own = compared[compared.index("pocket") : compared.index("global")]
    assert "79.0%" in own
    assert "81.0%" not in own


def test_a_lineage_that_has_just_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    page = Page(report.render([LineageSummary("begun", (IterationRow(1),))]))
    assert page.figures == []
    assert "No held-out scores yet." in page.text
    assert "No decision yet." in page.text
    Page(report.render([LineageSummary("begun", (IterationRow(1),)), lineage()]))


def test_no_experiment_and_twice_the_same_are_refused() -> None:
    with pytest.raises(DataError, match="no experiment"):
        report.render([])
    with pytest.raises(DataError, match="named twice"):
        report.render([lineage(), lineage()])


def test_no_report_is_called_as_another_page(tmp_path: Path) -> None:
    two = cli._report_path([lineage(), lineage("global")], Store(tmp_path))
    for page in (report._audit_name("pocket"), two.name):
        with pytest.raises(ValidationError, match="experiment"):
            Experiment.model_validate({"experiment": page.removesuffix(".html")})


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    path = tmp_path / "report.html"
    path.write_text("old")

    def full(self: Path, target: Path) -> Path:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(StoreError, match=r"report\.html: the report cannot be written: No space left"):
        report.write_report([lineage()], path)
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["report.html"]


def test_what_a_template_was_not_given_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    small(monkeypatch)
    monkeypatch.delitem(report._FUNCTIONS, "recipe")
    with pytest.raises(UndefinedError, match="'recipe' is undefined"):
        report.render([lineage()])
    with pytest.raises(ValueError, match="not JSON compliant"):
        pages.render("page.html.jinja", title="", sections={}, drawn=[{"data": [float("nan")]}])
