"""The success curve as a picture inside a materialization's metadata.

Dagster shows Markdown at once only below 1,000 characters; anything longer hides behind a click. So the picture is a
hand-made SVG with integer coordinates in a ``data:`` address, and leaves out its band and its dots when a lineage grows long.
"""

from collections.abc import Callable, Sequence

from evolve_dag.evaluation.metrics import Metrics
from evolve_dag.reporting.summary import IterationRow

INLINE_CHARACTERS = 1000
"""Dagster's limit for Markdown that is shown without a click (exclusive)."""

LEFT, TOP, WIDTH, HEIGHT = 40, 12, 250, 150
"""The plot's rectangle, in pixels: with its labels it fits beside Dagster's list of partitions."""
WITHOUT, WITH = "#28d", "#d71"
"""Short colours that can be read on white and on near-black."""
FONT = "font-family='Arial' font-size='12' fill='gray'"

Point = tuple[int, float]
"""Iteration and share in 0..1."""


def success_curve(rows: Sequence[IterationRow]) -> str:
    """Held-out success over iterations, without and with experience, as Markdown below 1,000 characters; '' without scores."""
    rows = [row for row in rows if row.without is not None and row.without.success is not None]
    if not rows:
        return ""
    every = 1
    while True:  # ends: with two points left the text is far below the limit
        kept = [row for row in rows if row.iteration % every == 0 or row is rows[-1]]
        for band, dots in ((True, True), (True, False), (False, False)):
            text = _markdown(_svg(kept, band=band, dots=dots))
            if len(text) < INLINE_CHARACTERS:
                return text
        every += 1


def _markdown(svg: str) -> str:
    address = "".join({"%": "%25", "<": "%3C", ">": "%3E", "#": "%23"}.get(letter, letter) for letter in svg)
    return f"![success over iterations](<data:image/svg+xml,{address}>)"


def _svg(rows: Sequence[IterationRow], *, band: bool, dots: bool) -> str:
    last = max(1, rows[-1].iteration)

    def at(point: Point) -> str:
        return f"{LEFT + round(WIDTH * point[0] / last)} {TOP + round(HEIGHT * (1 - point[1]))}"

    without = _points(rows, lambda row: row.without)
    with_ = _points(rows, lambda row: row.with_experience)
    bottom, right = TOP + HEIGHT, LEFT + WIDTH
    out = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='415' height='{bottom + 26}' {FONT}>",
        f"<path stroke='#8886' d='M{LEFT} {TOP}h{WIDTH}m0 {HEIGHT // 2}h-{WIDTH}m0 {HEIGHT // 2}h{WIDTH}'/>",
        f"<text x='4' y='{TOP + 4}'>100%</text><text x='11' y='{TOP + HEIGHT // 2 + 4}'>50%</text>",
        _axis(rows, last, bottom + 18),
    ]
    if band:
        lows, highs = (_points(rows, lambda row: row.without, end=end) for end in (0, 1))
        out.append(f"<path fill='{WITHOUT}3' d='M{' '.join(map(at, lows + highs[::-1]))}'/>")
    out.append(f"<g fill='none' stroke-width='2'><path stroke='{WITHOUT}' d='M{' '.join(map(at, without))}'/>")
    if with_:  # a single point would have no line to be seen by
        dash = "h5" if len(with_) == 1 else ""
        out.append(f"<path stroke='{WITH}' stroke-dasharray='5' d='M{' '.join(map(at, with_))}{dash}'/>")
    if dots:
        marks = "".join(f"M{at(point)}h0" for point in without)
        out.append(f"<path stroke='{WITHOUT}' stroke-width='7' stroke-linecap='round' d='{marks}'/>")
    out.append("</g>")
    ends = [_height(points[-1]) for points in (without, with_) if points]
    if len(ends) == 2 and abs(ends[0] - ends[1]) < 14:
        middle, sign = sum(ends) // 2, 1 if ends[0] >= ends[1] else -1
        ends = [middle + 7 * sign, middle - 7 * sign]
    for points, colour, name, y in zip((without, with_), (WITHOUT, WITH), ("without", "with experience"), ends, strict=False):
        out.append(f"<text x='{right + 9}' y='{y + 4}' fill='{colour}'>{points[-1][1]:.0%} {name}</text>")
    return "".join([*out, "</svg>"])


def _height(point: Point) -> int:
    return TOP + round(HEIGHT * (1 - point[1]))


def _axis(rows: Sequence[IterationRow], last: int, y: int) -> str:
    """Numbers of the iterations: one text with a place for every digit, as long as they have one digit."""
    numbers = [row.iteration for row in rows]
    if last > 9:
        return f"<text x='{LEFT}' y='{y}'>{numbers[0]}</text><text x='{LEFT + WIDTH - 6}' y='{y}'>{last}</text>"
    places = " ".join(str(LEFT - 3 + round(WIDTH * number / last)) for number in numbers)
    return f"<text y='{y}' x='{places}'>{''.join(map(str, numbers))}</text>"


def _points(
    rows: Sequence[IterationRow], side: Callable[[IterationRow], Metrics | None], end: int | None = None
) -> list[Point]:
    """Success of one condition, or the low (0) or high (1) ``end`` of its interval, where it is known."""
    found: list[Point] = []
    for row in rows:
        metrics = side(row)
        if metrics is None or metrics.success is None:
            continue
        bounds = metrics.intervals.get("success") or (metrics.success, metrics.success)
        found.append((row.iteration, metrics.success if end is None else bounds[end]))
    return found
