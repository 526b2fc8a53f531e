"""Figures: what they draw, and that plotly accepts them."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from lineages import audited, lineage

from evolve_dag.evaluation.metrics import Metrics
from evolve_dag.reporting import figures
from evolve_dag.reporting.drawing import Figure
from evolve_dag.reporting.summary import IterationRow, LineageSummary

ONE = [audited(lineage(declined=(3,)))]
TWO = [*ONE, audited(lineage("global", (0.28, 0.41, 0.57), (0.53, 0.6), (0.76, 0.58, 0.42)))]


def every_figure(summaries: list[LineageSummary]) -> dict[str, Figure]:
    one = summaries[0]
    return {
        "success": figures.success(summaries, ["without", "with_experience"]),
        "turns": figures.behaviour(summaries, "turns", share=False),
        "premature": figures.behaviour(summaries, "premature", share=True),
        "endings": figures.endings(one),
        "breakdown": figures.breakdown(one, "hops"),
        "pool_growth": figures.pool_growth(summaries),
        "pool_edits": figures.pool_edits(one),
        "locality": figures.locality(one),
        "training": figures.training(one),
        "seconds": figures.seconds(one),
        "tokens": figures.tokens(one),
        "cost": figures.cost(one),
        "inside": figures.inside(summaries),
        "inside_now": figures.inside_now(one),
        "internalized": figures.internalized(one),
        "over_seeds": figures.over_seeds({"pocket": [one, *summaries]}, "without"),
    }


@pytest.mark.parametrize("name", every_figure(ONE))
@pytest.mark.parametrize("summaries", [ONE, TWO], ids=["one", "two"])
def test_plotly_accepts_every_figure(name: str, summaries: list[LineageSummary]) -> None:
    from plotly.graph_objects import Figure as PlotlyFigure

    figure = every_figure(summaries)[name]
    assert figure["data"]
    PlotlyFigure(figure)  # validates every property
    json.dumps(figure, allow_nan=False)
    assert all(set(trace["meta"]) == {"slot", "paint"} for trace in figure["data"])
    assert not any("color" in json.dumps(trace) for trace in figure["data"]), "the page paints, for light and dark"


@pytest.mark.parametrize("name", every_figure([LineageSummary("empty", ())]))
def test_nothing_known_draws_nothing(name: str) -> None:
    for summary in (LineageSummary("empty", ()), LineageSummary("begun", (IterationRow(1),))):
        assert every_figure([summary])[name]["data"] == []


def test_success_draws_values_bands_and_declined_candidates() -> None:
    figure = figures.success(ONE, ["without"])
    band, line = figure["data"]
    assert line["x"] == [0, 1, 2, 3]
    assert line["y"] == pytest.approx([28, 62, 79, 81])
    assert band["x"] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert all(low <= value <= high for value, high, low in zip(line["y"], band["y"][:4], band["y"][:3:-1], strict=True))
    assert line["marker"]["symbol"] == ["circle", "circle", "circle", "circle-open"]
    assert "declined" in line["customdata"][3]
    assert "declined" not in line["customdata"][2]


def test_a_condition_that_was_not_measured_has_no_point() -> None:
    figure = figures.success(ONE, ["with_experience"])
    assert [trace["x"] for trace in figure["data"] if trace["meta"]["paint"] == "line"] == [[1, 2, 3]]


def test_endings_add_up() -> None:
    figure = figures.endings(ONE[0])
    for column in zip(*(trace["y"] for trace in figure["data"]), strict=True):
        assert sum(column) == pytest.approx(100)


def shown(*found: Metrics) -> dict[str, list[float]]:
    """Way of ending -> percent of the episodes, of the nights that are given."""
    rows = tuple(IterationRow(k, without=metrics) for k, metrics in enumerate(found, 1))
    return {trace["name"]: trace["y"] for trace in figures.endings(LineageSummary("x", rows))["data"] if any(trace["y"])}


def test_games_that_the_environment_ended_are_not_taken_for_answers_after_reading() -> None:
    assert shown(Metrics(4, 4, 4, 0.25, premature=0.0, no_tool=0.0, ended=0.75, ended_solved=0.25)) == {
        "after reading": [25.0],
        "ended, solved": [25.0],
        "ended, not solved": [50.0],
    }


def test_where_there_are_no_tools_nothing_was_read() -> None:
    assert shown(Metrics(4, 4, 4, 0.25, premature=0.0, no_tool=0.75, failed=0.25, ended=0.0)) == {
        "answered": [75.0],
        "failed": [25.0],
    }


def test_several_experiments_have_their_own_colours_and_names() -> None:
    lines = [t for t in figures.success(TWO, ["without"])["data"] if t["meta"]["paint"] == "line"]
    assert [(t["name"], t["meta"]["slot"]) for t in lines] == [("pocket", 0), ("global", 1)]


def test_what_is_inside_is_sorted_named_and_taken_where_it_was_first_taught() -> None:
    [bars] = figures.inside_now(ONE[0])["data"]
    assert bars["x"] == ["p1 Verify", "p2 Requery"]
    assert bars["y"] == pytest.approx([95.0, 75.0]), "1 - now / before of iteration 1, not of the last one"
    assert bars["error_y"]["array"] == pytest.approx([2.0, 2.0])
    assert bars["error_y"]["arrayminus"] == pytest.approx([3.0, 3.0])
    assert bars["customdata"][0] == "first taught in iteration 1, 40 steps"


def test_bars_of_an_item_stand_below_their_iteration() -> None:
    before, after, now = figures.internalized(ONE[0])["data"]
    assert [before["name"], after["name"], now["name"]] == ["before", "after", "now"]
    assert before["x"] == [["iteration 1"] * 2 + ["iteration 2"] * 2 + ["iteration 3"] * 2, ["p1", "p2"] * 3]
    assert before["y"][:2] == [0.08, 0.08]


def test_the_share_of_all_steps_has_a_band_and_begins_with_iteration_1() -> None:
    figure = figures.inside(TWO)
    lines = [trace for trace in figure["data"] if trace["meta"]["paint"] == "line"]
    assert [line["name"] for line in lines] == ["pocket", "global"]
    assert lines[0]["x"] == [1, 2, 3]
    assert lines[0]["y"] == pytest.approx([80.0] * 3)
    assert figure["layout"]["xaxis"]["range"][0] == 0.5


def test_seeds_are_one_line_with_the_range_as_its_band() -> None:
    seeds = [lineage("a", (0.2, 0.5)), lineage("a-s1", (0.3, 0.7)), lineage("a-s2", (0.1, 0.6))]
    figure = figures.over_seeds({"a": seeds, "alone": [lineage("alone")]}, "without")
    band, line = figure["data"]
    assert line["name"] == "a"
    assert line["y"] == pytest.approx([20.0, 60.0])
    assert band["y"] == pytest.approx([30.0, 70.0, 50.0, 10.0])
    assert "3 seeds" in line["customdata"][1]


def test_a_mean_over_seeds_is_over_the_same_seeds_everywhere() -> None:
    seeds = [lineage("a", (0.2, 0.5, 0.9)), lineage("a-s1", (0.3, 0.7, 0.8)), lineage("a-s2", (0.1, 0.6))]
    _, line = figures.over_seeds({"a": seeds}, "without")["data"]
    assert line["x"] == [0, 1]
    assert line["y"] == pytest.approx([20.0, 60.0])


def test_cost_is_drawn_only_where_a_price_is_known() -> None:
    assert [trace["name"] for trace in figures.cost(ONE[0])["data"]] == ["experience"]
    free = replace(
        ONE[0], rows=tuple(replace(row, steps=tuple(replace(s, calls={}) for s in row.steps)) for row in ONE[0].rows)
    )
    assert figures.cost(free)["data"] == []
