"""The success curve that Dagster shows without a click."""

from __future__ import annotations

import re
from urllib.parse import unquote
from xml.etree import ElementTree

from evolve_dag.assets.picture import HEIGHT, INLINE_CHARACTERS, LEFT, TOP, WIDTH, success_curve
from hypothesis import given
from hypothesis import strategies as st

from evolve_dag.evaluation.metrics import Metrics
from evolve_dag.reporting.summary import IterationRow

SVG = "{http://www.w3.org/2000/svg}"


def measured(success: float | None, spread: float = 0.05) -> Metrics:
    interval = None if success is None else (max(0.0, success - spread), min(1.0, success + spread))
    return Metrics(n=10, tasks=10, judged=10, success=success, intervals={"success": interval})


def drawn(markdown: str) -> ElementTree.Element:
    """The picture inside the Markdown; fails when either is malformed."""
    found = re.fullmatch(r"!\[success over iterations\]\(<data:image/svg\+xml,([^<>#]*)>\)", markdown)
    assert found, markdown
    return ElementTree.fromstring(unquote(found[1]))


def paths(svg: ElementTree.Element) -> dict[str, str]:
    """Colour of a line -> its points."""
    lines = [path for path in svg.iter(f"{SVG}path") if path.get("stroke") and not path.get("stroke-linecap")]
    return {str(path.get("stroke")): str(path.get("d")) for path in lines}


shares = st.one_of(st.none(), st.floats(0, 1))


@given(st.lists(st.tuples(shares, shares), min_size=1, max_size=99))
def test_every_lineage_fits_and_is_well_formed(values: list[tuple[float | None, float | None]]) -> None:
    rows = [IterationRow(k, measured(without), measured(with_) if k else None) for k, (without, with_) in enumerate(values)]
    picture = success_curve(rows)
    if all(without is None for without, _ in values):
        assert picture == ""
        return
    assert len(picture) < INLINE_CHARACTERS
    svg = drawn(picture)
    labels = [str(text.text) for text in svg.iter(f"{SVG}text")]
    last = [without for without, _ in values if without is not None][-1]
    assert f"{last:.0%} without" in labels
    numbers = [float(n) for d in paths(svg).values() for n in re.findall(r"[\d.]+", d.partition("h")[0])]
    assert all(0 <= n <= max(LEFT + WIDTH, TOP + HEIGHT) for n in numbers)


def test_points_lie_where_the_shares_are() -> None:
    rows = [IterationRow(0, measured(0.0)), IterationRow(1, measured(0.5), measured(1.0)), IterationRow(2, measured(1.0))]
    lines = paths(drawn(success_curve(rows)))
    assert lines["#28d"] == "M40 162 165 87 290 12"
    assert lines["#d71"].startswith("M165 12h"), "a single point has to be seen too"


def test_labels_of_the_two_ends_do_not_cover_each_other() -> None:
    rows = [IterationRow(0, measured(0.3)), IterationRow(1, measured(0.6), measured(0.61))]
    ends = [text for text in drawn(success_curve(rows)).iter(f"{SVG}text") if "with" in str(text.text)]
    without, with_ = (int(str(text.get("y"))) for text in ends)
    assert without - with_ == 14, "the higher share stands above"


def test_nothing_is_drawn_before_there_are_scores() -> None:
    assert success_curve([IterationRow(1)]) == ""
