"""What a report on a study says, as files and as a page."""

from __future__ import annotations

import csv
import io
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from invented import results
from rich.console import Console
from studies import study

from evolve_dag.study import figures, page, published, tables
from evolve_dag.study.definition import Choice, load_study
from evolve_dag.study.findings import QUESTIONS, Findings, find
from evolve_dag.study.results import Results

EVIL = "</script><script>alert('x')</script> {{ 7 * 7 }} <b>bold</b>"
CURVES = {"plain": (0.1, 0.2, 0.35, 0.5), "flat": (0.1, 0.1, 0.1), "peak": (0.1, 0.6, 0.4, 0.3)}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Findings:
    paper = {"step_wise": "plain", "global_injection": "flat", "on_policy": "peak", "instance": "flat"}
    return find(results(tmp_path_factory.mktemp("study"), CURVES, description=EVIL, paper=paper, missing={"tiny.flat-s4": 1}))


def test_every_question_is_asked_where_it_makes_sense(found: Findings) -> None:
    asked = {question: [(c.arm, c.iteration, c.against) for c in found.asked(question)] for question in QUESTIONS}
    assert asked["arm"] == [
        ("flat", 1, "plain"), ("flat", 2, "plain"), ("peak", 1, "plain"), ("peak", 2, "plain"), ("peak", 3, "plain"),
    ]  # fmt: skip
    assert ("plain", 1, "base") in asked["night"]
    assert ("plain", 3, "2") in asked["night"]
    assert [(arm, k) for arm, k, _ in asked["first"]] == [("plain", 2), ("plain", 3), ("flat", 2), ("peak", 2), ("peak", 3)]
    assert asked["best"] == [("plain", 3, "3"), ("flat", 2, "1"), ("peak", 3, "1")]
    assert {against for _, _, against in asked["base"]} == {"temperature 0.3"}
    assert len(asked["experience"]) == len(asked["ceiling"]) == 8


def test_differences_have_the_sign_that_is_said(found: Findings) -> None:
    [last] = found.asked("best", "peak")
    assert last.difference.verdict == "below"
    assert last.difference.value == pytest.approx(-0.3, abs=0.08)
    [against] = found.asked("arm", "peak", 1)
    assert against.difference.value > 0, "peak minus plain"
    assert found.asked("experience", "plain", 1)[0].difference.value > 0, "with minus without"


def test_a_declined_candidate_is_shown_beside_what_is_held(found: Findings) -> None:
    first, second, candidate = (found.point("plain", *at) for at in ((1,), (2,), (2, "without")))
    assert second.success.by_seed[4] == first.success.by_seed[4] != candidate.success.by_seed[4]
    assert second.success.by_seed[5] == candidate.success.by_seed[5]
    [night] = found.asked("night", "plain", 2)
    assert night.difference.by_seed[4] == 0
    [ceiling] = found.asked("ceiling", "plain", 2)
    assert ceiling.difference.value == pytest.approx(-0.01, abs=0.02), "what the candidate has not learned of its own ceiling"
    held, candidates = (
        next(line for line in tables.markdown(found).splitlines() if line.startswith(f"| plain | {name} |")).split(" | ")
        for name in ("held", "candidate")
    )
    assert [cell.endswith("○") for cell in held[3:7]] == [False, False, True, False]
    assert held[4] == candidates[4]
    assert held[5] != candidates[5]
    traces = {trace["name"]: trace for trace in figures.success(found, "plain")["data"] if trace["meta"]["paint"] == "line"}
    for name in ("plain", "the night's candidate"):
        assert traces[name]["marker"]["symbol"] == ["circle", "circle", "circle-open", "circle"]
    assert traces["plain"]["y"][2] != traces["the night's candidate"]["y"][2]


def test_without_a_declined_candidate_there_is_one_curve(tmp_path: Path) -> None:
    found = find(results(tmp_path, {"a": (0.1, 0.2, 0.3)}, seeds=[5]))
    assert found.conditions("a") == ("held", "held_with", "held_greedy", "ceiling")
    assert "○" not in tables.markdown(found).split("## Success over iterations\n\n")[1].replace(tables.HOLLOW, "")


def test_a_mean_over_some_of_the_seeds_says_so(tmp_path: Path) -> None:
    whole = results(tmp_path, {"a": (0.1, 0.2)})
    rows = [
        replace(row, rewards={c: r for c, r in row.rewards.items() if row.seed == 5 or c != "held_with"}) for row in whole.rows
    ]
    some = find(replace(whole, rows=tuple(rows)))
    assert tables.at(some, "a", 1, "held_with").endswith("% (1 seed)")
    assert tables.at(some, "a", 1).endswith("%")
    assert tables.at(some, "a", 0, "held_with") == "–"


def test_a_temperature_of_some_seeds_does_not_narrow_the_contrast_with_the_base(tmp_path: Path) -> None:
    whole = results(tmp_path, {"a": (0.1, 0.2, 0.3), "b": (0.1, 0.2)})
    rows = [
        replace(row, rewards={c: r for c, r in row.rewards.items() if row.arm == "b" or not c.startswith("base_at")})
        for row in whole.rows
        if row.arm == "a" or row.seed == 5
    ]
    found = find(replace(whole, rows=tuple(rows)))
    assert {c.against for c in found.asked("base", "a")} == {"the rollouts' temperature"}
    assert {len(c.difference.by_seed) for c in found.asked("base", "a")} == {3}
    assert {c.against for c in found.asked("base", "b")} == {"temperature 0.3"}


def test_a_contrast_over_some_of_the_seeds_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")
    whole = results(tmp_path, {"a": (0.1, 0.2), "b": (0.1, 0.3)})
    found = find(replace(whole, rows=tuple(row for row in whole.rows if row.arm == "b" or row.seed != 5)))
    assert "| b | 1 | a (2 of 3 seeds) | " in tables.markdown(found)
    assert "<td>a (2 of 3 seeds)</td>" in page.render(found)
    assert "of 3 seeds" not in tables.markdown(find(whole))
    [row] = [row for row in tables.as_json(found)["contrasts"] if row["question"] == "arm"]
    assert row["seeds"] == 2


def test_arms_over_other_seeds_are_not_shown_as_if_they_were_over_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")
    whole = results(tmp_path, {"a": (0.1, 0.2), "b": (0.1, 0.3), "c": (0.1, 0.3)})
    assert tables.other_seeds(find(whole)) == ""
    found = find(replace(whole, rows=tuple(row for row in whole.rows if row.arm != "b" or row.seed == 5)))
    told = tables.other_seeds(found)
    assert told.startswith("Over other seeds than a (seeds 4, 5, 6): b (seed 5). ")
    console = Console(width=400, record=True)
    tables.print_findings(found, console)
    assert told in tables.markdown(found)
    assert told in page.render(found)
    assert told in console.export_text()
    together = (figures.all_arms(found, ["a", "b", "c"]), figures.against_tokens(found, "sampled"))
    assert [{trace["name"] for trace in figure["data"]} for figure in together] == [{"a", "b (seed 5)", "c"}] * 2
    assert figures.at_the_end(found)["data"][0]["x"] == ["base policy", "a", "b (seed 5)", "c"]
    assert "a (seeds 4, 5, 6)" in {trace["name"] for trace in figures.success(found, "b")["data"] if "name" in trace}, (
        "its reference, behind it"
    )


def test_episodes_that_were_not_judged_are_told_wherever_success_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = results(tmp_path, {"a": (0.1, 0.2), "b": (0.1, 0.2)}, seeds=[5, 6])
    assert "judged" not in tables.markdown(find(whole))
    rows = [
        replace(row, metrics={c: replace(m, judged=90) if c == "held" else m for c, m in row.metrics.items()})
        if (row.arm, row.iteration, row.seed) == ("b", 1, 6)
        else row
        for row in whole.rows
    ]
    found = find(replace(whole, rows=tuple(rows)))
    assert tables.at(found, "b", 1).endswith("%*")
    assert tables.at(found, "b", 0).endswith("%")
    [told] = tables.unjudged(found)
    assert told == "* b, held: episodes judged: 210 of 240 in iteration 1"
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly */")
    console = Console(width=80, record=True)
    tables.print_findings(found, console)
    assert told in page.render(found)
    assert rf"\{told}" in tables.markdown(found).splitlines()
    assert told in console.export_text()


def test_an_arm_is_contrasted_with_every_arm_that_it_is_matched_to(tmp_path: Path) -> None:
    references = {"b": ["c", "a"], "c": []}
    found = find(results(tmp_path, {"a": (0.1, 0.2, 0.3), "b": (0.1, 0.2), "c": (0.1, 0.4)}, references=references, seeds=[5]))
    asked = [(c.arm, c.iteration, c.against) for c in found.asked("arm")]
    assert asked == [("b", 1, "c"), ("b", 1, "a"), ("c", 1, "a")]
    assert [(c.arm, c.against) for c in tables.shown_contrasts(found, "arm")] == [("b", "c"), ("b", "a"), ("c", "a")]
    assert figures.contrasts(found)["data"][0]["x"] == ["b − c", "b − a", "c − a"]
    names = [trace["name"] for trace in figures.success(found, "b")["data"] if trace["meta"]["paint"] == "line"]
    assert names[0] == "c", "the first one stands behind it"


def test_costs_add_up_and_say_where_the_gate_kept_the_champion(found: Findings) -> None:
    own = [cost for cost in found.costs if cost.arm == "plain"]
    assert [cost.sampled for cost in own] == [40_000, 80_000, 120_000]
    assert own[-1].trained == 3 * 305_000
    assert [cost.kept for cost in own] == [0, 1, 0]
    assert [cost.items for cost in own] == [4, 5, 6]


def test_files_hold_the_same_numbers_and_are_the_same_bytes_again(found: Findings, tmp_path: Path) -> None:
    names = {path.name for path in tables.write(found, tmp_path / "a")}
    assert {"study.md", "study.json", "success.csv", "contrasts.csv", "costs.csv", "breakdown.csv", "arms.svg"} <= names
    tables.write(found, tmp_path / "b")
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    content = json.loads((tmp_path / "a/study.json").read_text())
    rows = list(csv.DictReader(io.StringIO((tmp_path / "a/contrasts.csv").read_text())))
    assert len(rows) == len(content["contrasts"]) == len(found.contrasts)
    assert float(rows[0]["difference"]) == pytest.approx(content["contrasts"][0]["difference"], rel=1e-5)
    seeds = [row for row in content["success"] if (row["arm"], row["iteration"], row["condition"]) == ("plain", 1, "without")]
    assert [row["seed"] for row in seeds] == ["", 4, 5, 6]
    assert seeds[0]["success"] == pytest.approx(sum(row["success"] for row in seeds[1:]) / 3)
    assert str(tmp_path) not in (tmp_path / "a/study.json").read_text()


def test_a_seeds_success_is_over_tasks_like_that_of_all_seeds(tmp_path: Path) -> None:
    whole = results(tmp_path, {"a": (0.1, 0.2)})
    uneven = [replace(r, metrics={c: replace(m, success=0.9) for c, m in r.metrics.items()}) for r in whole.rows]
    found = find(replace(whole, rows=tuple(uneven)))  # as where more episodes of the easy tasks were judged
    rows = [row for row in tables.as_json(found)["success"] if (row["iteration"], row["condition"]) == (1, "held")]
    assert {row["seed"]: row["success"] for row in rows if row["seed"]} == found.point("a", 1).success.by_seed
    assert all(row["tasks_low"] <= row["success"] <= row["tasks_high"] for row in rows)


def test_markdown_says_what_is_missing_and_how_the_best_was_chosen(found: Findings) -> None:
    text = tables.markdown(found)
    assert "**Not finished**: 1 iterations are not there yet (tiny.flat-s4: 1)" in text
    assert "chosen on one half of the tasks and measured on the other" in text
    lines = text.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("|---"):
            assert line.count("|") == lines[number - 1].count("|") == lines[number + 1].count("|")


def test_no_text_breaks_a_table(tmp_path: Path) -> None:
    whole = results(tmp_path, {"a": (0.1, 0.2), "b": (0.1, 0.3)})
    values = ("algebra|geometry", "two\nlines", "plain")
    facts = {task: {"of\nwhat": values[number % 3]} for number, task in enumerate(whole.facts)}
    lines = tables.markdown(find(replace(whole, facts=facts))).splitlines()
    assert "## Success by of what, last iteration, without experience" in lines
    heads = next(line for line in lines if "algebra" in line)
    assert heads == r"| arm | of what algebra\|geometry | of what plain | of what two lines |"
    rows = lines[lines.index(heads) + 1 :][:3]
    assert [line.count("|") for line in rows] == [5, 5, 5]


def test_where_the_last_is_its_own_best_no_interval_is_told(found: Findings, html: str) -> None:
    asked = {contrast.arm: contrast for contrast in found.asked("best")}
    assert {arm: contrast.itself for arm, contrast in asked.items()} == {"plain": True, "flat": False, "peak": False}
    assert not any(contrast.itself for contrast in found.contrasts if contrast.question != "best")
    lines = [line for line in tables.markdown(found).splitlines() if tables.ITSELF in line]
    assert lines == ["| plain | 3 | 3 | it is its own best | – | – |"]
    assert html.count(tables.ITSELF) == 1
    assert asked["flat"].difference.value == 0, "what is held in both is the same"
    assert asked["flat"].difference.tasks[0] < 0 < asked["flat"].difference.tasks[1]


def test_the_papers_figures_stand_beside_ours_with_their_source(found: Findings) -> None:
    claims = published.compared(found)
    assert published.SOURCE == "arXiv:2606.04703"
    by_claim = {claim.claim.split()[0]: claim for claim in claims}
    assert by_claim["Step-wise"].here.startswith(f"{found.point('plain', 1).success.value:.1%} and ")
    assert "points" in by_claim["Step-wise"].here
    assert "31.2 and 23.2" in by_claim["Step-wise"].paper
    assert "global 2.0% at iteration 2; step-wise 2.0% at iteration 3" in by_claim["Global"].here
    assert "base 4.00; on-policy 5.00; off-policy 5.00" in by_claim["On-policy"].here


def test_without_arms_for_the_paper_nothing_is_claimed(tmp_path: Path) -> None:
    claims = published.compared(find(results(tmp_path, {"a": (0.1, 0.2)}, seeds=[4])))
    assert {claim.here for claim in claims} == {""}


@pytest.fixture
def html(found: Findings, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "/* plotly */")
    return page.render(found)


def test_the_page_loads_nothing_and_text_is_text(html: str) -> None:
    assert not re.search(r"https?://|@import|url\(|\bsrc=|<link", html)
    assert "default-src 'none'" in html
    assert EVIL not in html
    assert "&lt;/script&gt;&lt;script&gt;alert(&#39;x&#39;)&lt;/script&gt; {{ 7 * 7 }}" in html


def test_the_page_shows_every_arm_and_every_figure_has_data(html: str) -> None:
    drawn = json.loads(re.search(r'id="figures">(.*?)</script>', html, re.S)[1])
    assert len(drawn) == html.count('class="plot"')
    assert all(any(len(trace["x"]) for trace in figure["data"]) for figure in drawn)
    for arm in CURVES:
        assert f"<b>{arm}</b>" in html or f">{arm}<" in html
    for told in QUESTIONS.values():
        assert told[1:] in html


def test_an_arm_that_is_called_base_has_a_bar_of_its_own(tmp_path: Path) -> None:
    found = find(results(tmp_path, {"base": (0.1, 0.2), "b": (0.1, 0.6)}))
    [trace] = figures.at_the_end(found)["data"]
    assert trace["x"] == ["base policy", "base", "b"]


def test_what_differs_stands_in_every_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")
    found = find(Results(study(tmp_path), (), {}, {}))  # greedy: temperature 0, by its `set`
    [row] = tables.as_json(found)["what_differs"]
    assert row == {
        "arm": "greedy",
        "reference": "plain",
        "key": "rollout.temperature",
        "here": 0.0,
        "there": 1.0,
        "said": "set",
    }
    assert "| greedy | plain | rollout.temperature | 0.0 | 1.0 | set |" in tables.markdown(found)
    assert "<code>rollout.temperature</code></td><td>0.0</td><td>1.0</td>" in page.render(found)


def test_a_study_that_has_not_begun_has_a_page_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")
    asked = study(tmp_path)
    nothing = find(Results(asked, (), {}, {cell.name: 2 for cell in asked.cells}))
    assert "8 iterations of 4 lineages are not there yet" in page.render(nothing)
    assert "Not finished" in tables.markdown(nothing)
    stream = io.StringIO()
    tables.print_findings(nothing, Console(file=stream, width=200))
    assert "not there yet: 8 iterations" in stream.getvalue()


def test_a_report_on_a_part_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plotly.offline.get_plotlyjs", lambda: "")
    whole = results(tmp_path, {"a": (0.1, 0.2), "b": (0.1, 0.3), "c": (0.1, 0.3)})
    part = load_study(whole.study.file, Choice(("b", "c"), (4,)))
    rows = tuple(row for row in whole.rows if row.arm != "a" and row.seed == 4)
    command = "evolve study tiny.yaml --arm b --arm c --seed 4"
    for found, told in ((find(whole), False), (find(replace(whole, study=part, rows=rows)), True)):
        stream = io.StringIO()
        tables.print_findings(found, Console(file=stream, width=120))
        assert ("a part of it" in stream.getvalue()) == told
        for text in (page.render(found), tables.markdown(found)):
            assert ("A part of the study" in text) == (command in text) == told
    assert found.asked("arm") == [], "the file's reference is not there"


def test_one_seed_has_no_interval_over_seeds(tmp_path: Path) -> None:
    alone = find(results(tmp_path, {"a": (0.1, 0.2), "b": (0.1, 0.3)}, seeds=[4]))
    assert all(point.success.seeds is None for point in alone.points)
    assert "seeds" not in tables.shown(alone.points[0].success)


@pytest.mark.parametrize("width", [80, 200])
def test_the_terminal_shows_a_line_per_arm(found: Findings, width: int) -> None:
    stream = io.StringIO()
    tables.print_findings(found, Console(file=stream, width=width))
    for arm in CURVES:
        assert any(line.strip().startswith(arm) for line in stream.getvalue().splitlines())


@pytest.mark.parametrize(
    ("width", "shown"), [(80, "base 6 12"), (100, "base 3 6 9 12"), (180, "base 1 2 3 4 5 6 7 8 9 10 11 12")]
)
def test_a_narrow_terminal_shows_fewer_iterations_and_every_figure_whole(tmp_path: Path, width: int, shown: str) -> None:
    curve = tuple(min(1.0, 0.1 + 0.1 * k) for k in range(13))
    stream = io.StringIO()
    tables.print_findings(find(results(tmp_path, {"principle-step-wise": curve})), Console(file=stream, width=width))
    heading = next(line for line in stream.getvalue().splitlines() if "seeds" in line)
    assert heading.split("seeds")[1].split("last")[0].split() == shown.split()
    assert "…" not in stream.getvalue()
