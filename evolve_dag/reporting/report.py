"""The report: one self-contained HTML file about one or several lineages; it loads nothing from anywhere.

All text that comes from artifacts (items, reasons, settings) is data: it is escaped and shown as it is, whatever it holds.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import metadata, resources
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from evolve_dag.errors import DataError, StoreError
from evolve_dag.evaluation.intervals import Interval
from evolve_dag.evaluation.metrics import Metrics
from evolve_dag.lineage import audit
from evolve_dag.records import ExperienceItem
from evolve_dag.reporting import figures, markup
from evolve_dag.reporting.summary import (
    STAYS,
    IterationRow,
    LineageSummary,
    StepRow,
    count,
    dollars,
    duration,
    judged_of,
    number,
    number_interval,
    percent,
    percent_interval,
    standing_note,
    step_names,
)
from evolve_dag.store.disk import write_atomic

if TYPE_CHECKING:
    from evolve_dag.lineage.audit import Internalized
    from evolve_dag.store.artifacts import Store

PACKAGES = ("evolve-dag", "torch", "transformers", "peft", "dagster", "polars", "duckdb", "numpy")
"""Packages whose version the report names."""


def write_report(summaries: Sequence[LineageSummary], path: Path | str, *, store: Store | None = None) -> Path:
    """Write the report; every file appears whole or not at all.

    Args:
        summaries: lineages, compared side by side in the order given.
        path: file to write; its folder is made when missing.
        store: where the lineages are; given, each gets an audit page beside the report, which links to it.

    Returns:
        The path.

    Raises:
        DataError: no lineage was given, or the same one twice.
        StoreError: the file cannot be written.
    """
    path = Path(path)
    pages: dict[str, str] = {}
    if store is not None:
        from evolve_dag.reporting import audit_page

        for summary in summaries:
            read = [row.iteration for row in summary.iterations]
            pages[summary.experiment] = audit_page.render(store, summary.experiment, read, report=quote(path.name))
    content = render(summaries, {name: quote(_audit_name(name)) for name in pages})
    for name, page in pages.items():
        _write(path.with_name(_audit_name(name)), page)
    return _write(path, content)


def _audit_name(experiment: str) -> str:
    return f"{experiment}-audit.html"


def _write(path: Path, content: str) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, content.encode(), durable=False)
    except OSError as error:
        raise StoreError(
            f"{path}: the report cannot be written: {error.strerror or error}", "name another file, or free room"
        ) from error
    return path


def render(summaries: Sequence[LineageSummary], audits: Mapping[str, str] | None = None) -> str:
    """The report as one HTML text.

    Args:
        audits: experiment -> address of its audit page, relative to the report; linked where given.

    Raises:
        DataError: no lineage was given, or the same one twice.
    """
    names = [summary.experiment for summary in summaries]
    if not names or len(set(names)) < len(names):
        raise DataError(
            "the report was asked for no experiment" if not names else f"an experiment is named twice: {', '.join(names)}",
            "name each experiment once, e.g. evolve report A B",
        )
    from plotly.offline import get_plotlyjs

    page = _Page(summaries, audits or {})
    sections = [
        ("result", "Result", page.result()),
        ("behaviour", "Behaviour", page.behaviour()),
        ("experience", "Experience pool", page.experience()),
        ("training", "Training", page.training()),
        ("internalization", "Internalization", page.internalization()),
        ("gate", "Gate", page.gate()),
        ("cost", "Time and cost", page.cost()),
        ("reproduce", "Reproduce", page.reproduce()),
    ]
    title = f"Self-evolution of {names[0]}" if len(names) == 1 else "Self-evolution, side by side"
    now, version = datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"), versions().get("evolve-dag", "")
    return markup.fill(
        resources.files("evolve_dag.reporting").joinpath("report.html").read_text(encoding="utf-8"),
        {
            "title": escape(title),
            "subtitle": page.subtitle(),
            "navigation": "".join(f'<a href="#{key}">{heading}</a>' for key, heading, _ in sections),
            "content": "\n".join(f'<section><h2 id="{key}">{heading}</h2>{body}</section>' for key, heading, body in sections),
            "footer": f"Written {now} by evolve-dag {escape(version)}. This file holds everything that it shows.",
            # "</script>" inside a JSON string would end the element: "<" never stands there as itself
            "figures": json.dumps(page.figures, allow_nan=False).replace("<", "\\u003c"),
            "plotly": get_plotlyjs(),
        },
    )


def versions() -> dict[str, str]:
    """Python and the packages that decide results, as installed where the report is written."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


class _Page:
    """Sections as HTML; the figures that they refer to gather in ``figures``."""

    def __init__(self, summaries: Sequence[LineageSummary], audits: Mapping[str, str]) -> None:
        self.summaries = summaries
        self.audits = audits
        self.figures: list[figures.Figure] = []

    def subtitle(self) -> str:
        parts = []
        for summary in self.summaries:
            k = len(summary.iterations)
            parts.append(f"<b>{escape(summary.experiment)}</b>: {k} iteration{'' if k == 1 else 's'}{_recipe(summary)}")
        return "<br>".join(parts)

    def result(self) -> str:
        out = [markup.note("Success on held-out tasks, which decide nothing. Bands and ranges are 95% intervals over tasks.")]
        out.append(self._tiles(self.summaries[0]) if len(self.summaries) == 1 else self._comparison())
        hollow = "A hollow point is a candidate that the gate declined."
        if len(self.summaries) == 1:
            note = f"Without experience in context: what is inside the weights. With: weights and pool together. {hollow}"
            drawn = figures.success(self.summaries, ["without", "with_experience"])
            out.append(markup.grid(self._figure("Success over iterations", note, drawn, wide=True)))
        else:
            without = figures.success(self.summaries, ["without"])
            with_experience = figures.success(self.summaries, ["with_experience"])
            out.append(
                markup.grid(
                    self._figure("Without experience in context", f"What is inside the weights. {hollow}", without),
                    self._figure("With experience in context", "Weights and pool together.", with_experience),
                )
            )
        out.append(self._over_seeds())
        for summary in self.summaries:
            out += [self._heading(summary), self._results(summary)]
        plots = []
        for summary in self.summaries:
            parts = [row.without.by for row in summary.rows if row.without]
            for key in sorted({key for by in parts for key, values in by.items() if len(values) > 1}):
                drawn = figures.breakdown(summary, key)
                plots.append(self._figure(f"Success by {key}{self._of(summary)}", "Without experience in context.", drawn))
        out.append(markup.grid(*plots))
        return "".join(out)

    def behaviour(self) -> str:
        out = [markup.note("Without experience in context, as shares of all episodes.")]
        plots = []
        for field, title, note in (
            ("premature", "Premature answers", "Answered before a page that was read held the answer; a listing is no page."),
            ("no_tool", "Answers without any tool", "Answered before the first tool call."),
            ("turns", "Turns", "Mean assistant turns of an episode."),
            ("unanswered", "Unanswered", "Episodes that never gave an answer."),
        ):
            plots.append(self._figure(title, note, figures.behaviour(self.summaries, field, share=field != "turns")))
        for summary in self.summaries:
            title = f"How episodes end{self._of(summary)}"
            alone = len(self.summaries) == 1
            plots.append(self._figure(title, "Every episode ends in one of these ways.", figures.endings(summary), wide=alone))
        return "".join([*out, markup.grid(*plots, pairs=True)])

    def experience(self) -> str:
        plots = [self._figure("Pool size", "Items after each iteration.", figures.pool_growth(self.summaries))]
        detail = "Share of the items that hold trajectory detail (URL, number, entity) or state a strategy."
        for summary in self.summaries:
            edits = figures.pool_edits(summary)
            plots.append(self._figure(f"Pool edits{self._of(summary)}", "Deleted and merged items point down.", edits))
            plots.append(self._figure(f"Locality{self._of(summary)}", detail, figures.locality(summary)))
        out = [markup.grid(*plots)]
        for summary in self.summaries:
            row = next((row for row in reversed(summary.rows) if row.items), None)
            if row is None:
                continue
            kept = " (of a declined candidate)" if row.gate is not None and row.gate.decision in STAYS else ""
            note = markup.note(f"The pool after iteration {row.iteration}{kept}: {len(row.items)} items.")
            out += [self._heading(summary), note, _items(row.items)]
        return "".join(out)

    def training(self) -> str:
        plots = []
        for summary in self.summaries:
            title = f"Training curve{self._of(summary)}"
            told = "Teacher to student, one line per iteration. A batch holds clean rows and rows of retention."
            plots.append(self._figure(title, told, figures.training(summary)))
        out = [markup.grid(*plots)]
        for summary in self.summaries:
            rows = [row for row in summary.iterations if row.training]
            numbers = (k for row in rows for k, value in row.training.items() if isinstance(value, (int, float)))
            # in the order in which the step notes them; tokens stand under cost
            facts = [key for key in dict.fromkeys(numbers) if key != "tokens"]
            if facts:
                body = [[str(row.iteration), *(escape(markup.plain(row.training.get(key))) for key in facts)] for row in rows]
                heads = ["iteration", *(escape(TRAINED.get(key, key.replace("_", " "))) for key in facts)]
                out += [self._heading(summary), markup.table(heads, body, numeric=range(1, len(heads)))]
        if any(row.training for summary in self.summaries for row in summary.iterations):
            out.append(
                markup.note(
                    "First and last: means over the first and the last five batches, in nats per action token. A batch mixes "
                    "clean rows and rows of retention, whose student reads the item too; the clean ones alone stand under "
                    "Internalization."
                )
            )
        return "".join(out)

    def internalization(self) -> str:
        out = [
            markup.note(
                "How much of each item is inside the weights: KL from the teacher, which reads the item, to the student, which "
                "does not, per action token, at the learned steps where the item stood in the teacher's context. Before: "
                "policy(k), after: its candidate, now: the policy that the lineage holds. A step with several items counts for "
                "each of them."
            )
        ]
        measured = [s for s in self.summaries if any(row.internalized for row in s.rows)]
        plots = []
        if len(measured) > 1:
            title, told = "Share that each iteration took over", "1 − after / before, all learned steps together, 95% bands."
            plots.append(self._figure(title, told, figures.inside(measured), wide=True))
        for summary in measured:
            if summary.settings.get("injection") == "global":
                continue  # every item stands at every step: its bars would all be the same
            told = "Share of an item's divergence that the present policy took over, where it was first taught; 95% intervals."
            title = f"Inside the weights now{self._of(summary)}"
            plots.append(self._figure(title, told, figures.inside_now(summary), wide=True))
            title = f"Divergence at each item's own steps{self._of(summary)}"
            plots.append(
                self._figure(title, "Teacher to student; what is left after.", figures.internalized(summary), wide=True)
            )
        out.append(markup.grid(*plots))
        for summary in self.summaries:
            rows = [one for row in summary.iterations for one in row.internalized]
            out.append(self._heading(summary))
            if summary.settings.get("injection") == "global":
                rows = [one for one in rows if one.item in (audit.ALL, audit.NONE)]
                out.append(markup.note("With global injection every item stands at every step: items cannot be told apart."))
            if rows:
                out.append(_internalized(rows))
            else:
                out.append(f'<p class="soft">Not measured yet: <code>evolve audit {escape(summary.experiment)}</code></p>')
            if summary.experiment in self.audits:
                link = escape(self.audits[summary.experiment])
                out.append(f'<p><a href="{link}">What every item did, and what every score goes back to</a></p>')
        return "".join(out)

    def gate(self) -> str:
        out = [
            markup.note(
                "Candidate and best champion so far on the same development tasks under the same draws, paired. On keep the "
                "champion stays; on restore the best one comes back, because the candidates since have lost against it."
            )
        ]
        for summary in self.summaries:
            body = [
                [str(row.iteration), _mark(row), _reasons(row.gate.reasons), _evidence(row.gate.evidence)]
                for row in summary.rows
                if row.gate is not None
            ]
            out.append(self._heading(summary))
            if not body:
                out.append(markup.note("No decision yet."))
                continue
            out.append(markup.table(["iteration", "decision", "reasons", "numbers"], body, text=[2]))
            out.append(markup.note(standing_note(summary)))
        return "".join(out)

    def cost(self) -> str:
        plots = []
        for summary in self.summaries:
            of = self._of(summary)
            seconds, tokens = "Wall time of what made each artifact.", "Sampled tokens."
            plots.append(self._figure(f"Seconds per step{of}", seconds, figures.seconds(summary)))
            plots.append(self._figure(f"Tokens per step{of}", tokens, figures.tokens(summary)))
            priced = "Calls to models with a price, as they were asked."
            plots.append(self._figure(f"Cost per step{of}", priced, figures.cost(summary)))
        out = [markup.grid(*plots, pairs=True)]
        for summary in self.summaries:
            names = step_names(summary.iterations)
            steps = [step for row in summary.iterations for step in row.steps]
            body = [
                [str(row.iteration), *(_spent([s for s in row.steps if s.name == name]) for name in names), _spent(row.steps)]
                for row in summary.iterations
            ]
            body.append(["all", *(_spent([s for s in steps if s.name == name]) for name in names), _spent(steps)])
            heads = ["iteration", *map(escape, names), "all"]
            out += [self._heading(summary), markup.table(heads, body, numeric=range(1, len(heads))), _calls(summary)]
        return "".join(out)

    def reproduce(self) -> str:
        out = [
            "<p>The digest of an artifact follows from its step's code version, its settings and what it read: "
            "the same commands on the same versions lead to the same digests.</p>"
        ]
        commands = [summary.command for summary in self.summaries if summary.command]
        commands += [f"evolve audit {s.experiment}" for s in self.summaries if any(row.internalized for row in s.rows)]
        commands.append(f"evolve report {' '.join(summary.experiment for summary in self.summaries)}")
        out.append(f"<pre>{escape(chr(10).join(commands))}</pre>")
        installed = [[escape(name), escape(version)] for name, version in versions().items()]
        out.append(markup.details("Versions where this report was written", markup.table(["package", "version"], installed)))
        for summary in self.summaries:
            names = step_names(summary.iterations)
            body = [
                [str(row.iteration), *("".join(markup.digest(s.digest) for s in row.steps if s.name == name) for name in names)]
                for row in summary.iterations
            ]
            settings = escape(json.dumps(dict(summary.settings), indent=2, ensure_ascii=False, default=str))
            digests = markup.table(["iteration", *map(escape, names)], body)
            out.append(markup.details(f"Digests of {summary.experiment}", digests))
            out.append(markup.details(f"Settings of {summary.experiment}", f"<pre>{settings}</pre>"))
        return "".join(out)

    # -- parts

    def _over_seeds(self) -> str:
        several = {name: members for name, members in _by_experiment(self.summaries).items() if len(members) > 1}
        note = "Mean over seeds; bands reach from the lowest to the highest seed, they are no 95% intervals."
        without = figures.over_seeds(several, "without")
        with_experience = figures.over_seeds(several, "with_experience")
        return markup.grid(
            self._figure("Over seeds, without experience in context", note, without),
            self._figure("Over seeds, with experience in context", note, with_experience),
        )

    def _figure(self, title: str, note: str, figure: figures.Figure, *, wide: bool = False) -> str:
        if not figure["data"]:
            return ""
        # plotly reads a little markup in texts (<b>, <a href>): names from artifacts must not be read so
        for trace in figure["data"]:
            trace.update({key: escape(trace[key], quote=False) for key in ("name", "legendgroup") if key in trace})
        self.figures.append(figure)
        return (
            f"<figure{' class=wide' if wide else ''}><figcaption><b>{escape(title)}</b><span>{escape(note)}</span></figcaption>"
            f'<div class="plot" data-figure="{len(self.figures) - 1}" role="img" aria-label="{escape(title)}"></div></figure>'
        )

    def _heading(self, summary: LineageSummary) -> str:
        return f"<h3>{escape(summary.experiment)}</h3>" if len(self.summaries) > 1 else ""

    def _of(self, summary: LineageSummary) -> str:
        return f", {summary.experiment}" if len(self.summaries) > 1 else ""

    def _tiles(self, summary: LineageSummary) -> str:
        scored = [row for row in summary.rows if row.without is not None]
        if not scored:
            return markup.note("No held-out scores yet.")
        first, last = scored[0], scored[-1]
        tiles = []
        for heading, condition, field in HEADLINE:
            metrics: Metrics | None = getattr(last, condition)
            if metrics is None or getattr(metrics, field) is None:
                continue
            show, around = _shown(field)
            before = getattr(first.without, field) if condition == "without" and first is not last else None
            parts = [around(metrics.intervals.get(field)), f"{_called(first)} {show(before)}" if before is not None else ""]
            tiles.append(
                f'<div class="card tile"><div class="name">{_called(last)}: {heading}</div>'
                f'<div class="value">{show(getattr(metrics, field))}</div>'
                f'<div class="note">{"; ".join(part for part in parts if part)}</div></div>'
            )
        return f'<div class="tiles">{"".join(tiles)}</div>'

    def _comparison(self) -> str:
        """One line an experiment: the base policy, and the last iteration that is scored."""
        body = []
        for summary in self.summaries:
            scored = [row for row in summary.rows if row.without is not None]
            if not scored:
                body.append([escape(summary.experiment), *["–"] * (len(HEADLINE) + 3)])
                continue
            first, last = scored[0], scored[-1]
            cells = [_cell(getattr(last, condition), field) for _, condition, field in HEADLINE]
            base = _cell(first.without, "success") if first.iteration == 0 else "–"
            champion = "–" if summary.champion is None else "base" if summary.champion == 0 else str(summary.champion)
            body.append([f"<b>{escape(summary.experiment)}</b>", base, str(last.iteration), *cells, champion])
        heads = ["experiment", "base", "iteration", *(heading for heading, _, _ in HEADLINE), "champion"]
        return markup.table(heads, body, numeric=range(1, len(heads)))

    def _results(self, summary: LineageSummary) -> str:
        body = []
        for row in summary.rows:
            cells = [_cell(getattr(row, condition), field) for _, condition, field in RESULTS]
            judged = "–" if row.without is None else judged_of(row.without)
            pool = "–" if row.pool_size is None else str(row.pool_size)
            body.append([_called(row), *cells, judged, pool, _mark(row)])
        heads = ["", *(heading for heading, _, _ in RESULTS), "judged", "pool", "gate"]
        return markup.table(heads, body, numeric=range(1, len(heads) - 1))


TRAINED = {
    "loss_first": "loss, first",
    "loss_last": "loss, last",
    "divergence_first": "divergence, first",
    "divergence_last": "divergence, last",
}
"""Headings of the adapter's numbers that need the note below the table."""

HEADLINE = (
    ("success without", "without", "success"),
    ("success with", "with_experience", "success"),
    ("premature answers", "without", "premature"),
    ("mean turns", "without", "turns"),
)
"""What the last iteration is known by: heading, condition, metric."""

RESULTS = (
    ("success without", "without", "success"),
    ("success with", "with_experience", "success"),
    ("greedy", "greedy", "success"),
    ("turns", "without", "turns"),
    ("premature", "without", "premature"),
    ("unanswered", "without", "unanswered"),
    ("forced", "without", "forced"),
)
"""Columns of the table of results: heading, condition, metric."""


def _internalized(rows: Sequence[Internalized]) -> str:
    body = []
    for one in rows:
        called = {audit.ALL: "<b>all&nbsp;steps</b>", audit.NONE: "no&nbsp;item"}
        name = called.get(one.item, f"<code>{escape(one.item)}</code>")
        share = percent(one.share) + (f"<br><small>{percent_interval(one.interval)}</small>" if one.interval else "")
        nats = [f"{value:.4f}" if value is not None else "–" for value in (one.before, one.after, one.now)]
        numbers = [str(one.steps), *nats[:2], share, nats[2], percent(one.share_now)]
        body.append([str(one.iteration), name, escape(one.text), *numbers])
    heads = ["iteration", "item", "text", "steps", "before", "after", "inside", "now", "inside now"]
    return markup.table(heads, body, numeric=range(3, 9), text=(2,))


def _calls(summary: LineageSummary) -> str:
    """Calls to other models than the policy, with tokens and cost; '' when there were none."""
    body = []
    for row in summary.iterations:
        for step in row.steps:
            for role, sums in step.calls.items():
                cost = sums.get("cost")
                numbers = [
                    count(int(sums.get(name) or 0)) for name in ("calls", "errors", "prompt_tokens", "completion_tokens")
                ]
                price = dollars(None if cost is None else float(cost))
                body.append([str(row.iteration), escape(step.name), escape(role), *numbers, price])
    heads = ["iteration", "step", "role", "calls", "errors", "prompt tokens", "sampled tokens", "cost"]
    return markup.table(heads, body, numeric=range(3, 8)) if body else ""


def _items(items: Sequence[ExperienceItem]) -> str:
    body = [
        [
            f"<code>{escape(item.id)}</code>",
            escape(item.text),
            markup.facts(item.evidence, " · ") or "–",
            str(len(item.trajectory_ids)),
            str(item.created),
            str(item.updated),
        ]
        for item in items
    ]
    heads = ["id", "text", "evidence", "trajectories", "first seen", "updated"]
    return markup.table(heads, body, numeric=(3, 4, 5), text=(1,))


def _cell(metrics: Metrics | None, field: str) -> str:
    if metrics is None:
        return "–"
    show, around = _shown(field)
    bounds = around(metrics.intervals.get(field))
    return show(getattr(metrics, field)) + (f"<br><small>{bounds}</small>" if bounds else "")


def _shown(field: str) -> tuple[Callable[[float | None], str], Callable[[Interval | None], str]]:
    """How a metric and its interval are written."""
    return (number, number_interval) if field == "turns" else (percent, percent_interval)


def _mark(row: IterationRow) -> str:
    return "–" if row.gate is None else f'<span class="mark {row.gate.decision}">{row.gate.decision}</span>'


def _called(row: IterationRow) -> str:
    return "base" if row.iteration == 0 else f"iteration {row.iteration}"


def _reasons(reasons: Sequence[str]) -> str:
    return f'<ul class="reasons">{"".join(f"<li>{escape(reason)}</li>" for reason in reasons)}</ul>'


def _evidence(evidence: Mapping[str, float | None]) -> str:
    return f"<details><summary>{len(evidence)} numbers</summary>{markup.facts(evidence, '<br>')}</details>"


def _spent(steps: Sequence[StepRow]) -> str:
    if not steps:
        return "–"
    tokens = [step.tokens for step in steps if step.tokens]
    shown = ("≥ " if any(step.resumed for step in steps) else "") + duration(sum(step.seconds for step in steps))
    return f"{shown}<br><small>{count(sum(tokens))}</small>" if tokens else shown


def _by_experiment(summaries: Sequence[LineageSummary]) -> dict[str, list[LineageSummary]]:
    """Experiment -> its lineages of several seeds (``<experiment>-s<N>``, see evolve_dag.config.registry)."""
    groups: dict[str, list[LineageSummary]] = {}
    for summary in summaries:
        groups.setdefault(summary.experiment.removesuffix(f"-s{summary.settings.get('seed')}"), []).append(summary)
    return groups


def _recipe(summary: LineageSummary) -> str:
    """The three dimensions, where the artifacts tell them (METHOD)."""
    parts = [summary.settings.get("granularity"), summary.settings.get("injection")]
    regime = summary.settings.get("regime")
    if isinstance(regime, Mapping):
        rejection = "with rejection" if regime.get("rejection") else "without rejection"
        parts += [f"source {regime.get('source')}", regime.get("divergence"), rejection]
    told = [str(part) for part in parts if part]
    return f" · {escape(', '.join(told))}" if told else ""
