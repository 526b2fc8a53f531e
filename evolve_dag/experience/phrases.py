"""Renders a mined pattern as a principle: ``Name: when <situation>, <strategy>.``

One fixed phrase per predicate and per action, all of them in the tables below. The phrases are held out of the
pretraining of the pocket policy (it learns paraphrases), so obedience to them is not recall.

Phrases added to the agreed ones, because every feature value must have one:

- situations: ``the last call was refused`` (problem), ``the search shows results`` (any listing), ``the search shows
  several results``, ``several results have different names``, ``a page is shown`` (any page)
- joined with ``and``: ``the asked value is listed``, ``part of the question is listed``, ``the asked part is not
  listed``, ``the same call was made before``, ``the last call was new``, ``few steps are done``, ``some steps are
  done``, ``many steps are done``
- what an environment says itself: ``the <feature> is <value>``
- strategies: ``Link: open the page it names``, ``Direct: open a page that was not listed``, ``Tool: use another tool``
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from evolve_dag.errors import DataError
from evolve_dag.experience.features import DID, OWN

SITUATIONS: tuple[tuple[Mapping[str, str], str], ...] = (
    ({"observation": "none"}, "nothing is known yet"),
    ({"observation": "empty"}, "a search returns no results"),
    ({"observation": "missing"}, "no page has that name"),
    ({"observation": "problem"}, "the last call was refused"),
    ({"observation": "redirect"}, "the page only points to another page"),
    ({"observation": "listing", "listed": "several", "shared_name": "no"}, "several results have different names"),
    ({"observation": "listing", "shared_name": "yes"}, "several results share one name"),
    ({"observation": "listing", "listed": "one"}, "the search shows one result"),
    ({"observation": "listing", "listed": "several"}, "the search shows several results"),
    ({"observation": "listing"}, "the search shows results"),
    ({"observation": "page", "evidence": "asked"}, "the page shows the asked value"),
    ({"observation": "page", "evidence": "part"}, "the page answers only part of the question"),
    ({"observation": "page", "evidence": "none"}, "the page lacks the asked part"),
    ({"observation": "page"}, "a page is shown"),
)
"""Predicates -> phrase; the first row whose predicates are all in the condition opens the situation."""

ADDITIONS: Mapping[tuple[str, str], str] = {
    ("evidence", "asked"): "the asked value is listed",
    ("evidence", "part"): "part of the question is listed",
    ("evidence", "none"): "the asked part is not listed",
    ("repeat", "yes"): "the same call was made before",
    ("repeat", "no"): "the last call was new",
    ("depth", "early"): "few steps are done",
    ("depth", "middle"): "some steps are done",
    ("depth", "late"): "many steps are done",
}
"""(feature, value) -> phrase for what the opening phrase does not say; joined with 'and'."""

LONGER_AGO: Mapping[tuple[str, str], str] = {
    ("in_row", "once"): "not just before",
    ("in_row", "twice"): "twice in a row",
    ("in_row", "more"): "three times or more in a row",
    ("shown", "yes"): "the asked value was shown before",
    ("shown", "no"): "the asked value was never shown",
}
"""The same for what is longer ago; what the last step did is said by its strategy. The pocket policy does not know
these words."""

STRATEGIES: Mapping[str, tuple[str, str]] = {
    "search_short": ("Narrow", "search only the short name"),
    "search_long": ("Broad", "search the whole question"),
    "open_fitting": ("Match", "open the page that fits the question"),
    "open_first": ("First", "open the first result"),
    "open_other": ("Other", "open another result"),
    "open_pointed": ("Follow", "follow the page it points to"),
    "open_linked": ("Link", "open the page it names"),
    "open_unlisted": ("Direct", "open a page that was not listed"),
    "use_tool": ("Tool", "use another tool"),
    "answer_listed": ("Trust", "trust the listed value"),
    "answer_page": ("Conclude", "answer with that value now"),
    "answer_unseen": ("Guess", "answer at once"),
    "repeat": ("Retry", "try the same call again"),
    "answer_highest": ("Highest", "answer the value with the highest number"),
    "answer_lowest": ("Lowest", "answer the value with the lowest number"),
    "answer_top": ("Upper", "answer the first value"),
    "answer_bottom": ("Lower", "answer the last value"),
}
"""Action -> (name, strategy). ``malformed`` has none: it is never advice."""

TOOL_NAME = "Source"
DO_NAME = "Do"
_CALL = "use:"
_USE = re.compile(r"call ([A-Za-z0-9_-]+)")
MARKED = "its value is marked "
"""Opens the situation where words stand with the asked value; they follow."""


def strategy(action: str) -> tuple[str, str] | None:
    """(name, strategy) of an action; None when it is never advice."""
    if action.startswith(_CALL):
        return TOOL_NAME, f"call {action.removeprefix(_CALL)}"
    if action.startswith(f"{DID}:"):
        return DO_NAME, action.removeprefix(f"{DID}:")
    return STRATEGIES.get(action)


MAX_WORDS = 32
"""Most words of a principle (METHOD: principle form)."""

_PRINCIPLE = re.compile(r"(?P<name>[A-Z][\w-]*(?: [\w-]+)?): when (?P<situation>.+?), (?P<strategy>.+)\.")
_ACTION_OF = {name_and_strategy: action for action, name_and_strategy in STRATEGIES.items()}


def situation_text(condition: Mapping[str, str]) -> str:
    """Words for a condition.

    Raises:
        DataError: the condition holds a predicate that has no phrase.
    """
    if (mark := condition.get("mark", "none")) != "none":
        condition = {f: v for f, v in condition.items() if f not in ("mark", "evidence")}
    condition = {f: v for f, v in condition.items() if (f, v) != ("mark", "none")}
    own = [f"the {f.removeprefix(OWN)} is {v}" for f, v in condition.items() if f.startswith(OWN)]
    condition = {f: v for f, v in condition.items() if not f.startswith(OWN)}
    rows = [({"observation": "described"}, " and ".join(own))] if own else SITUATIONS
    holding = [row for row in rows if all(condition.get(f) == value for f, value in row[0].items())]
    if not holding:
        raise DataError(f"no phrase for the condition {dict(condition)}", "name a known `observation` in the condition")
    predicates, phrase = holding[0]
    if mark != "none":
        phrase = f"{MARKED}{mark}"
    # The tool is said by the phrase itself; that no name is shared, or how many entries, likewise.
    left = {f: v for f, v in condition.items() if f not in predicates and f not in ("tool", "listed", "shared_name")}
    said = {**ADDITIONS, **LONGER_AGO}
    if (led := strategy(left.get("led", ""))) is not None:
        said["led", left["led"]] = f"that after you {led[1]}"
    unknown = [f"{feature}={value}" for feature, value in left.items() if (feature, value) not in said]
    if unknown:
        raise DataError(f"no phrase for {', '.join(unknown)}", "add it to phrases.ADDITIONS")
    more = [text for (feature, value), text in said.items() if left.get(feature) == value]
    return " and ".join([phrase, *more])


def render(condition: Mapping[str, str], action: str) -> str:
    """The principle for 'in ``condition`` do ``action``'.

    Raises:
        DataError: condition or action has no phrase.
    """
    advice = strategy(action)
    if advice is None:
        raise DataError(f"no phrase for the action {action!r}", f"one of {', '.join(STRATEGIES)}, use:<tool>, or did:<words>")
    return f"{advice[0]}: when {situation_text(condition)}, {advice[1]}."


def split(text: str) -> tuple[str, str, str] | None:
    """(name, situation, strategy) of a text in principle form, else None."""
    if not text.endswith(".") or "\n" in text:  # else every comma would be tried
        return None
    match = _PRINCIPLE.fullmatch(text)
    return (match["name"], match["situation"], match["strategy"]) if match else None


def action_of(text: str) -> str | None:
    """The action that a rendered principle advises; None for a principle in other words."""
    parts = split(text)
    if parts is None:
        return None
    if parts[0] == DO_NAME:
        return f"{DID}:{parts[2]}"
    tool = _USE.fullmatch(parts[2])
    return f"{_CALL}{tool[1]}" if tool and parts[0] == TOOL_NAME else _ACTION_OF.get((parts[0], parts[2]))


def without_tool(text: str) -> str:
    """A principle that advises a call, without the name of the tool that it ends with; any other text as it is."""
    action = action_of(text) or ""
    return text.removesuffix(f"{action.removeprefix(_CALL)}.") + "it." if action.startswith(_CALL) else text


def all_phrases() -> tuple[str, ...]:
    """Every phrase and name of the tables, for holding them out of pretraining and for its vocabulary."""
    names = [part for pair in STRATEGIES.values() for part in pair]
    marked = [MARKED.strip(), TOOL_NAME, "call"]
    return tuple(dict.fromkeys([text for _, text in SITUATIONS] + list(ADDITIONS.values()) + names + marked))
