"""The audit page: one HTML file that leads from a score row back to what taught it, and from an item to what it did.

All text that comes from artifacts (questions, actions, observations, items) is data: it is escaped and shown as it is.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from html import escape
from importlib import resources
from typing import TYPE_CHECKING

from evolve_dag.lineage import audit
from evolve_dag.reporting import markup
from evolve_dag.reporting.principles import SPELLED_OUT, Chain, Contrast, Edit, Facts, Principle, ScoreRow, Share, Shown, gather
from evolve_dag.reporting.summary import percent, percent_interval
from evolve_dag.steps.base import SPECS

if TYPE_CHECKING:
    from evolve_dag.store.artifacts import Store

ROWS = SPELLED_OUT
"""Rows of one table; the rest is counted, and ``evolve trace`` finds each of them."""
NEWEST = 6
"""Iterations whose rows are listed; of earlier ones the chain alone."""
CHARACTERS = 400
"""Of an observation that are shown."""


def render(store: Store, experiment: str, iterations: Sequence[int] | None = None, *, report: str = "") -> str:
    """The page of one lineage as HTML text.

    Args:
        iterations: those to read; None reads all.
        report: address of the report, relative to the page; '' for none.

    Raises:
        OrderError: the experiment has not been run.
        StoreError, DataError: an artifact is missing, corrupt or of another version.
    """
    return page(gather(store, experiment, iterations), report=report)


def page(facts: Facts, *, report: str = "") -> str:
    """The page for what was gathered."""
    links = _Links(facts)
    sections = [("items", "What every item did", _principles(facts, links))]
    sections += [
        (f"iteration-{one.iteration}", f"Iteration {one.iteration}", _chain(facts, one, links)) for one in facts.chains
    ]
    back = f'<a href="{escape(report)}">Report</a>' if report else ""
    subtitle = (
        "From a score back to the adapter, its training rows, the items in the teacher's context and the trajectories that "
        "taught them; and from an item forward to what it did."
    )
    return markup.fill(
        resources.files("evolve_dag.reporting").joinpath("report.html").read_text(encoding="utf-8"),
        {
            "title": escape(f"Audit of {facts.experiment}"),
            "subtitle": escape(subtitle),
            "navigation": back + "".join(f'<a href="#{key}">{escape(heading)}</a>' for key, heading, _ in sections),
            "content": "\n".join(
                f'<section><h2 id="{key}">{escape(heading)}</h2>{body}</section>' for key, heading, body in sections
            ),
            "footer": f"Written {datetime.now(UTC).strftime('%Y-%m-%d %H:%M UTC')}. This file holds everything that it shows.",
            "figures": "[]",
            "plotly": "",
        },
    )


class _Links:
    """Anchors on the page. They are numbered, so that no text of an artifact becomes a part of an address."""

    def __init__(self, facts: Facts) -> None:
        self.items = {one.item.id: f"item-{n}" for n, one in enumerate(facts.principles)}
        self.taught = {
            (chain.iteration, name): f"taught-{chain.iteration}-{n}"
            for chain in facts.chains
            for n, name in enumerate(chain.taught)
        }
        self.iterations = {chain.iteration for chain in facts.chains}
        self.adapters = {
            chain.artifacts["adapter"][0]: chain.iteration for chain in facts.chains if "adapter" in chain.artifacts
        }
        self.teaches: dict[tuple[int, str], list[str]] = {}
        for one in facts.principles:
            for edit in one.edits:
                for name in edit.trajectories:
                    if one.item.id not in self.teaches.setdefault((edit.iteration, name), []):
                        self.teaches[edit.iteration, name].append(one.item.id)

    def item(self, name: str) -> str:
        """A link to an item's card."""
        anchor = self.items.get(name)
        code = f"<code>{escape(name)}</code>"
        return f'<a href="#{anchor}">{code}</a>' if anchor else code

    def many(self, names: Iterable[str]) -> str:
        """Links to items, with blanks between them."""
        return " ".join(self.item(name) for name in names) or "–"

    def trajectory(self, iteration: int, name: str) -> str:
        """A link to a training rollout, where it is shown."""
        anchor = self.taught.get((iteration, name))
        code = f"<code>{escape(name)}</code>"
        return f'<a href="#{anchor}">{code}</a>' if anchor else code

    def iteration(self, number: int, part: str = "") -> str:
        """A link to an iteration, or to a part of it."""
        anchor = f"{part}-{number}" if part else f"iteration-{number}"
        return f'<a href="#{anchor}">{number}</a>' if number in self.iterations else str(number)


# -- items


def _principles(facts: Facts, links: _Links) -> str:
    out = [
        markup.note(
            "Success with and without an item is observational: an item is chosen where it seems to fit, so the episodes "
            "differ in more than the item. Inside the weights: 1 − after / before of the divergence from teacher to student at "
            "the item's own steps; a step with several items counts for each of them."
        )
    ]
    out += [markup.note(note) for note in facts.notes]
    if not facts.principles:
        out.append(markup.note("No item yet."))
    else:
        out.append(_overview(facts, links))
    return "".join([*out, *(_card(one, links) for one in facts.principles)])


def _overview(facts: Facts, links: _Links) -> str:
    body = []
    for one in facts.principles:
        learned = sum(steps for steps, _ in one.learned.values())
        first = one.internalized[0] if one.internalized else None
        held = [c for k in sorted(one.contrasts) for c in one.contrasts[k] if c.where == "held-out"]
        body.append(
            [
                links.item(one.item.id),
                escape(one.item.text),
                _gone(one),
                str(learned),
                percent(first.share_now) if first else "–",
                percent(held[-1].chosen.success) if held else "–",
                percent(held[-1].other.success) if held else "–",
            ]
        )
    heads = ["item", "text", "pool", "learned steps", "inside now", "held-out with it", "without it"]
    told = "Inside now: at the learned steps of the iteration that first taught it. Held-out: of the newest iteration."
    return markup.table(heads, body, numeric=range(3, 7), text=(1,)) + markup.note(told)


def _gone(one: Principle) -> str:
    """Whether it stands in the newest pool."""
    return "newest" if one.gone is None else f"gone in {one.gone}" if one.gone else "gone"


def _card(one: Principle, links: _Links) -> str:
    item = one.item
    states = "; ".join(
        f"<code>{escape(s.feature)} = {escape(s.value)}</code> at {s.share:.0%} of its steps ({s.all:.0%} of all)"
        for s in one.states
    )
    facts = [
        f"<p>{escape(item.text)}</p>",
        f'<p class="soft">{escape(item.granularity)}, first seen in iteration {links.iteration(item.created)}, '
        f"changed in {links.iteration(item.updated)}; {'in the newest pool' if one.gone is None else _gone(one)}"
        + (f"; evidence: {markup.facts(item.evidence, ' · ')}" if item.evidence else "")
        + "</p>",
        f"<p>Chosen where {states}.</p>" if states else "",
        _by_iteration(one, links),
        _edits(one.edits, links),
    ]
    anchor = links.items[item.id]
    return f'<section class="card item" id="{anchor}"><h3><code>{escape(item.id)}</code></h3>{"".join(facts)}</section>'


def _by_iteration(one: Principle, links: _Links) -> str:
    measured = {found.iteration: found for found in one.internalized}
    body = []
    for k in sorted({*one.learned, *one.contrasts, *measured}):
        learned = one.learned.get(k)
        inside = measured.get(k)
        by_place = {contrast.where: contrast for contrast in one.contrasts.get(k, ())}
        body.append(
            [
                links.iteration(k),
                f"{learned[0]}<br><small>of {learned[1]}</small>" if learned else "–",
                f"{inside.before:.4f} →<br>{inside.after:.4f}" if inside else "–",
                _inside(inside),
                percent(inside.share_now) if inside else "–",
                *_contrast(by_place.get("teacher")),
                *_contrast(by_place.get("held-out")),
            ]
        )
    heads = ["iteration", "learned steps", "before → after", "inside", "inside now"]
    heads += ["teacher: chosen at", "with it", "without it", "held-out: chosen at", "with it", "without it"]
    return markup.table(heads, body, numeric=range(1, len(heads))) if body else ""


def _contrast(found: Contrast | None) -> list[str]:
    if found is None:
        return ["–", "–", "–"]
    return [f"{found.steps}<br><small>of {found.of} steps</small>", _success(found.chosen), _success(found.other)]


def _success(share: Share) -> str:
    if share.success is None:
        return "–<br><small>no episode</small>"
    return f"{percent(share.success)}<br><small>{percent_interval(share.interval)}, n={share.episodes}</small>"


def _inside(found: audit.Internalized | None) -> str:
    if found is None or found.share is None:
        return "–"
    return percent(found.share) + (f"<br><small>{percent_interval(found.interval)}</small>" if found.interval else "")


def _edits(edits: Sequence[Edit], links: _Links) -> str:
    if not edits:
        return ""
    body = []
    for edit in edits:
        names = [links.trajectory(edit.iteration, name) for name in edit.trajectories[:12]]
        more = f" and {len(edit.trajectories) - 12} more" if len(edit.trajectories) > 12 else ""
        change = escape(edit.after or "")
        if edit.before is not None and edit.after is not None:
            change = f"<s>{escape(edit.before)}</s><br>{change}"
        into = f" into {links.item(edit.into)}" if edit.into else ""
        body.append(
            [
                links.iteration(edit.iteration),
                f"{escape(edit.operation)}{into}",
                escape(edit.reason),
                change,
                " ".join(names) + more,
            ]
        )
    return markup.details(
        "What taught it", markup.table(["iteration", "edit", "reason", "text", "trajectories"], body, text=(2, 3, 4))
    )


# -- iterations


def _chain(facts: Facts, chain: Chain, links: _Links) -> str:
    k = chain.iteration
    newest = {one.iteration for one in facts.chains[-NEWEST:]}
    out = [_walk(facts, chain, links)]
    if k not in newest:
        out.append(markup.note(f"Rows are listed for the {NEWEST} newest iterations; evolve trace finds the others."))
        return "".join(out)
    without = [row for row in chain.scores if row.condition == "without"]
    with_experience = [row for row in chain.scores if row.condition == "with"]
    out.append(f'<div id="scores-{k}">')
    for heading, rows in (("without experience in context", without), ("with experience in context", with_experience)):
        if rows:
            right = sum(row.reward == 1.0 for row in rows)
            table = _scores(rows, chain, links)
            out.append(markup.details(f"Score rows {heading}: {right} of {len(rows)} right", table))
    out.append(f'</div><div id="rows-{k}">')
    if chain.learned:
        steps = sum(len(one.steps) for one in chain.learned)
        heading = f"Training rows of adapter {k}: {len(chain.learned)} trajectories, {steps} learned steps"
        out.append(markup.details(heading, _learned(chain, links)))
    out.append("</div>")
    if chain.taught:
        shown = "".join(_taught(chain, name, one, links) for name, one in chain.taught.items())
        out.append(markup.details(f"Trajectories that taught items in iteration {k} ({len(chain.taught)})", shown))
    return "".join(out)


def _walk(facts: Facts, chain: Chain, links: _Links) -> str:
    """The artifacts of one iteration, each with what it was made from."""
    k = chain.iteration
    entering = chain.entering.get("adapter")
    came = links.adapters.get(str(entering))
    where = f"the adapter of iteration {links.iteration(came)}" if came is not None else "an adapter"
    where = where if entering else "the base policy"
    rows = _number(chain, "contexts", "kept")
    parts = []
    told: Mapping[str, str] = {
        "policy": f"what enters: {where}",
        "experience": f"what they taught: the pool, with {_number(chain, 'experience', 'items')} items",
        "contexts": f'the teacher with items in its context: <a href="#rows-{k}">{rows} training rows</a>',
        "adapter": f"learned from those rows{_learnt(facts, k, links)}",
        "scores": f'<a href="#scores-{k}">score rows</a> of that adapter',
        "promotion": _decision(chain),
    }
    for name, (digest, _) in chain.artifacts.items():
        parts.append([f"<b>{escape(name)}</b>", markup.digest(digest), told.get(name) or escape(SPECS[name].description)])
    return markup.table(["step", "digest", ""], parts, text=(2,))


def _learnt(facts: Facts, iteration: int, links: _Links) -> str:
    """Items by what the adapter took over of them, most first; a score without experience goes back to these."""
    rows = [one for p in facts.principles for one in p.internalized if one.iteration == iteration and one.share is not None]
    rows.sort(key=lambda one: -(one.before - one.after) * one.tokens)
    parts = [f"{links.item(one.item)} {percent(one.share)} inside" for one in rows[:8]]
    return f": {', '.join(parts)}" if parts else ""


def _decision(chain: Chain) -> str:
    if chain.decision is None:
        return "not decided"
    mark = f'<span class="mark {escape(chain.decision)}">{escape(chain.decision)}</span>'
    return f"{mark} {escape('; '.join(chain.reasons))}"


def _number(chain: Chain, step: str, fact: str) -> str:
    _, summary = chain.artifacts.get(step, ("", {}))
    return escape(str(summary.get(fact, "–")))


def _scores(rows: Sequence[ScoreRow], chain: Chain, links: _Links) -> str:
    adapter = chain.artifacts["adapter"][0] if "adapter" in chain.artifacts else ""
    body = []
    for row in rows[:ROWS]:
        shown = row.shown
        body.append(
            [
                f"<code>{escape(row.id)}</code>",
                _reward(row.reward, row.premature),
                escape(shown.question) if shown else "",
                escape(shown.answer or "–") if shown else "",
                links.many(shown.items) if shown else "–",
                f'<a href="#iteration-{chain.iteration}">{escape(adapter[:8])}</a>',
                _steps(shown, links) if shown else "",
            ]
        )
    heads = ["row", "result", "question", "answer", "items in context", "adapter", "episode"]
    return markup.table(heads, body, text=(2, 6)) + _more(len(rows), chain, "scores", rows)


def _learned(chain: Chain, links: _Links) -> str:
    body = []
    for one in chain.learned[:ROWS]:
        body.append(
            [
                f"<code>{escape(one.id)}</code>",
                _reward(one.reward, False),
                escape(one.question),
                links.many(one.items),
                _steps(one, links, observations=False),
            ]
        )
    heads = ["trajectory", "result", "question", "items in the teacher's context", "learned steps"]
    return markup.table(heads, body, text=(2, 4)) + _more(len(chain.learned), chain, "contexts", chain.learned)


def _more(count: int, chain: Chain, step: str, rows: Sequence[ScoreRow] | Sequence[Shown]) -> str:
    if count <= ROWS:
        return ""
    last = rows[-1]
    name = f"{last.condition}/{last.id}" if isinstance(last, ScoreRow) else last.id
    command = f"evolve trace '{chain.artifacts[step][0][:12]}/{name}'"
    return f'<p class="soft">and {count - ROWS} more: <code>{escape(command)}</code> shows one of them</p>'


def _taught(chain: Chain, name: str, one: Shown, links: _Links) -> str:
    teaches = links.many(links.teaches.get((chain.iteration, name), ()))
    return (
        f'<div class="episode" id="{links.taught[chain.iteration, name]}"><p><code>{escape(name)}</code> '
        f"{_reward(one.reward, False)} taught {teaches}<br>{escape(one.question)}</p>{_listed(one, links)}</div>"
    )


def _steps(one: Shown, links: _Links, *, observations: bool = True) -> str:
    heading = f"{len(one.steps)} step{'' if len(one.steps) == 1 else 's'}"
    return f"<details><summary>{heading}</summary>{_listed(one, links, observations=observations)}</details>"


def _listed(one: Shown, links: _Links, *, observations: bool = True) -> str:
    parts = []
    for step in one.steps:
        items = f'<span class="items">{links.many(step.selected)}</span>' if step.selected else ""
        seen = ""
        if observations and step.observation is not None:
            text = step.observation if len(step.observation) <= CHARACTERS else step.observation[: CHARACTERS - 1] + "…"
            seen = f'<pre class="seen">{escape(text)}</pre>'
        parts.append(f'<li value="{step.index}">{items}<pre>{escape(step.text)}</pre>{seen}</li>')
    return f'<ol class="steps">{"".join(parts)}</ol>'


def _reward(reward: float | None, premature: bool) -> str:
    if reward is None:
        return "not judged"
    mark = '<span class="mark promote">right</span>' if reward == 1.0 else '<span class="mark keep">wrong</span>'
    if 0.0 < reward < 1.0:
        mark = f'<span class="mark keep">{reward:.2f}</span>'
    return mark + (" <small>premature</small>" if premature else "")
